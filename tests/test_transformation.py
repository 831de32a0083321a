"""Composition: chains, masks, partitions, links around others; purity of all of them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn import schedules
from parq_fn.foundation.tree import tree_leaves, tree_map


def tree(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "conv": {"weight": draw(4, 2, 2, 2).to(memory_format=torch.channels_last)},
        "head": [draw(3, 4), {"bias": draw(3), "none": None}],
        "scalar": draw(),
    }


PROX = pf.parq_prox(
    pf.lsbq(2), anneal_start=1, anneal_end=5, period=2, granularity=pf.per_channel()
)
LINKS = [
    pf.identity(),
    pf.freeze(),
    pf.scale(0.5),
    pf.scale_by_schedule(schedules.linear(1.0, 0.0, 0, 4)),
    pf.sgd(0.1, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    pf.sgd(schedules.cosine(0.1, 0.0, 0, 6), momentum=0.9, nesterov=True),
    pf.adam(amsgrad=True),
    pf.adamw(),
    pf.masked(pf.muon(0.02), "head.0"),
    pf.chain(pf.add_noise(0.1, seed=3), pf.sgd(0.1)),
    pf.monitor_flips(pf.chain(pf.sgd(0.1), PROX)),
    pf.lookahead(pf.sgd(0.1, momentum=0.9), 3),
    pf.chain(pf.schedule_free(pf.adamw(0.1, b1=0.0)), PROX),
    pf.lion(1e-3, weight_decay=0.1),
    pf.averaged(pf.chain(pf.sgd(0.1), PROX), 0.9),
    pf.clip(0.1),
    pf.clip_by_global_norm(0.1),
    PROX,
    pf.hard_prox(pf.lsbq(0, "optimal"), warmup=2, period=1),
    pf.soft_prox(pf.uniform(2), anneal_start=0, anneal_end=3),
    pf.binary_relax_prox(pf.lsbq(1), anneal_start=0, anneal_end=3),
    pf.proxquant_prox(pf.lloyd_max(2), anneal_start=0, anneal_end=3, strength=0.2),
    pf.parq_prox(pf.lsbq(1), anneal_start=1, anneal_end=4, shrink=True, learning_rate=0.6),
    pf.parq_prox(pf.lsbq(1), anneal_start=1, anneal_end=4, normal_map=2.0, learning_rate=0.6),
    pf.chain(pf.clip(1.0), pf.sgd(0.1, momentum=0.9), PROX),
    pf.named_chain(base=pf.adam(), prox=PROX),
    pf.masked(pf.chain(pf.adam(), PROX), "head"),
    pf.partition({"q": PROX, "rest": pf.scale(2.0)}, {"conv": "q", "*": "rest"}),
    pf.accumulate(pf.chain(pf.sgd(0.1), PROX), 2),
    pf.apply_if_finite(pf.chain(pf.sgd(0.1), PROX)),
    pf.apply_if_finite(pf.chain(pf.sgd(0.1), PROX), limit=1),
    pf.conditionally(pf.chain(pf.adam(), PROX), lambda t: t != 2),
    pf.as_link(torch.optim.Adam, lr=0.1, amsgrad=True),
    pf.conditionally(PROX, schedules.linear(1.0, 0.0, 2, 4)),
    pf.GradientTransformation(
        lambda params: (), lambda updates, state, params, **_: (updates, state)
    ),
    pf.stateless(lambda updates, params: tree_map(torch.sign, updates)),
]
every = pytest.mark.parametrize("link", LINKS, ids=lambda link: repr(link)[:60])


def assert_same(a, b) -> None:
    assert optree.tree_structure(a) == optree.tree_structure(b)
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@every
def test_pure_with_a_state_of_fixed_structure(link) -> None:
    """No input changed, the same inputs give the same bits, in any order of calls."""
    params = tree()
    state = link.init(params)
    assert_same(state, link.init(params))
    for t in range(6):
        updates = tree(t + 1)
        kept = copy.deepcopy((updates, state, params))
        out, new = link.update(updates, state, params)
        weights = link.weights(new, params)
        assert_same(kept, (updates, state, params))
        assert_same((out, new), link.update(updates, state, params))
        assert_same(weights, link.weights(new, params))
        assert optree.tree_structure(new) == optree.tree_structure(state)
        for a, b in zip(tree_leaves(new), tree_leaves(state), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b, c in zip(*map(tree_leaves, (out, weights, params)), strict=True):
            assert a.shape == b.shape == c.shape
            assert a.dtype == b.dtype == c.dtype
        assert weights["conv"]["weight"].is_contiguous(memory_format=torch.channels_last)
        state, params = new, pf.apply_updates(params, out)


@pytest.mark.parametrize("link", [k for k in LINKS if not isinstance(k, pf.accumulate)], ids=repr)
def test_a_missing_gradient_changes_nothing_of_its_leaf(link) -> None:
    """But for accumulate, which counts it as a zero."""
    params = tree()
    updates = tree(1)
    updates["head"][0] = None
    out, _ = link.update(updates, link.init(params), params)
    assert pf.apply_updates(params, out)["head"][0] is params["head"][0]


@every
def test_float64_params_stay_float64(link) -> None:
    params = tree_map(lambda p: p.double(), tree())
    updates, state = link.update(params, link.init(params), params)
    moved = pf.apply_updates(params, updates)
    for leaf in tree_leaves((updates, moved, link.weights(state, moved))):
        assert leaf.dtype == torch.float64


def test_chain_runs_from_left_to_right() -> None:
    params = {"w": torch.tensor([2.0])}
    first = pf.chain(pf.clip(1.0), pf.scale(10.0))
    second = pf.chain(pf.scale(10.0), pf.clip(1.0))
    assert first.update(params, first.init(params), params)[0]["w"] == 10
    assert second.update(params, second.init(params), params)[0]["w"] == 1


def test_chain_and_named_chain_agree() -> None:
    params, grads = tree(), tree(1)
    plain, named = pf.chain(pf.adam(), PROX), pf.named_chain(base=pf.adam(), prox=PROX)
    a, state = plain.update(grads, plain.init(params), params)
    b, by_name = named.update(grads, named.init(params), params)
    assert_same(a, b)
    assert_same(list(state), [by_name["base"], by_name["prox"]])


def test_masked_leaves_pass_through_untouched() -> None:
    params, grads = tree(), tree(1)
    link = pf.masked(pf.chain(pf.sgd(0.1, weight_decay=0.1), pf.hard_prox(pf.lsbq(1))), "head.0")
    updates, state = link.update(grads, link.init(params), params)
    weights = link.weights(state, params)
    assert updates["conv"]["weight"] is grads["conv"]["weight"]
    assert weights["conv"]["weight"] is params["conv"]["weight"]
    assert not torch.equal(updates["head"][0], grads["head"][0])
    assert weights["head"][0].unique().numel() == 2


def test_partition_is_each_transformation_on_its_own_leaves() -> None:
    params, grads = tree(), tree(1)
    link = pf.partition({"a": pf.adam(0.1), "b": pf.freeze()}, {"conv": "a", "*": "b"})
    updates, _ = link.update(grads, link.init(params), params)
    alone = pf.adam(0.1)
    expected, _ = alone.update(grads["conv"], alone.init(params["conv"]), params["conv"])
    assert_same(updates["conv"], expected)
    assert not any(bool(leaf.any()) for leaf in tree_leaves(updates["head"]))


def test_clip_by_global_norm_is_torch_s() -> None:
    params, grads = tree(), tree(1)
    mirror = [torch.nn.Parameter(p.clone()) for p in tree_leaves(params)]
    for p, g in zip(mirror, tree_leaves(grads), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(mirror, 0.7)
    link = pf.clip_by_global_norm(0.7)
    clipped, _ = link.update(grads, link.init(params), params)
    for ours, theirs in zip(tree_leaves(clipped), mirror, strict=True):
        torch.testing.assert_close(ours, theirs.grad)
    small = tree_map(lambda g: g * 1e-3, grads)
    assert_same(link.update(small, link.init(params), params)[0], small)


def test_clip_bounds_each_element_from_both_sides() -> None:
    updates = {"a": torch.tensor([-3.0, -0.5, 0.0, 3.0]), "b": torch.tensor(-2.0)}
    found, _ = pf.clip(1.0).update(updates, pf.EmptyState(), updates)
    assert_same(found, tree_map(lambda u: u.clamp(-1.0, 1.0), updates))


def test_the_norm_of_updates_is_of_float32_or_better_and_on_the_device_of_the_first() -> None:
    half = {"a": torch.full((4,), 3e4, dtype=torch.float16)}  # whose norm float16 has not
    assert pf.global_norm(half).item() == pytest.approx(6e4)
    assert pf.global_norm(half).dtype == torch.float32
    many = {"a": torch.full((1,), 3.0), "b": torch.full((1,), 4.0, dtype=torch.float64)}
    assert pf.global_norm(many).item() == 5
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            nothing = pf.global_norm({"a": None})
    finally:
        torch.set_default_dtype(before)
    assert (nothing.item(), nothing.dtype) == (0.0, torch.float32)
    assert pf.global_norm({"a": torch.ones(2, device="meta"), "b": torch.ones(2)}).is_meta
    one = {"a": torch.ones((), dtype=torch.float64)}
    clipped, _ = pf.clip_by_global_norm(1.0).update(one, pf.EmptyState(), one)
    assert clipped["a"].item() == 1 / (1 + 1e-6)


@pytest.mark.parametrize("link", [pf.clip(1.0), pf.clip_by_global_norm(1.0)])
def test_links_that_clip_refuse_a_state_of_another(link: Any) -> None:
    params = tree()
    with pytest.raises(TypeError, match="its state is a dict, expected the EmptyState"):
        link.update(params, {}, params)


def test_accumulate_is_the_mean_of_its_gradients() -> None:
    """Around a prox link: counts, levels and weights stand still between inner updates."""
    inner = pf.chain(pf.sgd(0.1, momentum=0.9), PROX)
    outer = pf.accumulate(inner, 3)
    params = mirror = tree()
    state, reference = outer.init(params), inner.init(params)
    for t in range(12):
        grads = [tree(10 * t + i) for i in range(3)]
        for i, g in enumerate(grads):
            updates, state = outer.update(g, state, params)
            params = pf.apply_updates(params, updates)
            if i < 2:
                assert_same(params, mirror)
                assert_same(state.inner, reference)
        total = tree_map(lambda a, b, c: (a + b + c) / 3, *grads)
        updates, reference = inner.update(total, reference, mirror)
        mirror = pf.apply_updates(mirror, updates)
        assert_same(state.inner, reference)
        assert_same(params, mirror)
        assert_same(outer.weights(state, params), inner.weights(reference, mirror))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_apply_if_finite_skips_the_whole_step(bad: float) -> None:
    inner = pf.chain(pf.adam(), PROX)
    link = pf.apply_if_finite(inner)
    params = tree()
    updates, state = link.update(tree(1), link.init(params), params)
    params = pf.apply_updates(params, updates)
    poisoned = tree(2)
    poisoned["head"][1]["bias"][0] = bad
    out, after = link.update(poisoned, state, params)
    assert not any(bool(leaf.any()) for leaf in tree_leaves(out))
    assert_same(after.inner, state.inner)
    assert (int(state.skipped), int(after.skipped)) == (0, 1)
    assert_same(link.update(tree(3), after, params)[1].inner,
                inner.update(tree(3), state.inner, params)[1])  # fmt: skip


def test_transformations_of_leaves_on_meta_keep_their_counts_on_the_cpu() -> None:
    """Such leaves give shapes alone: nothing is read from them, and no count becomes one."""
    params = {"w": torch.ones(4, 3, device="meta")}
    own = pf.chain(pf.sgd(0.1), PROX)
    for link in (
        own,
        pf.apply_if_finite(own),
        pf.apply_if_finite(own, limit=1),
        pf.accumulate(own, 2),
        pf.averaged(own, 0.9),
        pf.conditionally(own, lambda t: t > 0),
        pf.monitor_flips(own),
        pf.lookahead(pf.sgd(0.1)),
    ):
        state = link.init(params)
        updates, after = link.update(params, state, params)
        assert updates["w"].is_meta
        for old, new in zip(tree_leaves(state), tree_leaves(after), strict=True):
            assert (old.device, old.shape) == (new.device, new.shape)


def test_apply_if_finite_makes_what_is_not_finite_after_its_limit() -> None:
    """And skips again after one that is finite."""
    params = {"w": torch.zeros(1)}
    link = pf.apply_if_finite(pf.sgd(1.0, momentum=0.5), limit=2)
    bad, good = {"w": torch.tensor([torch.inf])}, {"w": torch.ones(1)}
    state, seen = link.init(params), []
    for grads in (good, bad, bad, good, bad, bad, bad, bad, good, bad):
        updates, state = link.update(grads, state, params)
        finite = bool(updates["w"].isfinite())
        seen.append((finite, int(state.skipped), int(state.consecutive)))
    assert seen[:5] == [(True, 0, 0), (True, 1, 1), (True, 2, 2), (True, 2, 0), (True, 3, 1)]
    assert seen[5:] == [(True, 4, 2), (False, 4, 3), (False, 4, 4), (False, 4, 0), (True, 5, 1)]
    never = pf.apply_if_finite(pf.sgd(1.0), limit=0)
    updates, _ = never.update(bad, never.init(params), params)
    assert not updates["w"].isfinite()
    with pytest.raises(ValueError, match="apply_if_finite: limit must be 0 or more, got -1"):
        pf.apply_if_finite(pf.sgd(1.0), -1)


def test_a_flush_of_accumulate_is_the_update_with_the_mean_so_far() -> None:
    inner = pf.chain(pf.sgd(0.1, momentum=0.9), PROX)
    outer = pf.accumulate(inner, 3)
    params = tree()
    state, reference = outer.init(params), inner.init(params)
    for t, count in enumerate((2, 1, 3, 4)):
        given = [tree(10 * t + i) for i in range(count)]
        for g in given:
            updates, state = outer.update(g, state, params)
            if int(state.waiting) == 0:
                _, reference = inner.update(_mean(given[:3]), reference, params)
                given = given[3:]
                params = pf.apply_updates(params, updates)
        before = copy.deepcopy((state, params))
        updates, flushed = outer.flush(state, params)
        assert_same(before, (state, params))
        wanted = tree_map(torch.zeros_like, params)
        if given:
            wanted, reference = inner.update(_mean(given), reference, params)
        assert_same(updates, wanted)
        assert_same(flushed.inner, reference)
        assert_same(outer.flush(flushed, params)[1], flushed)
        state, params = flushed, pf.apply_updates(params, updates)


def _mean(trees: list) -> dict:
    return tree_map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def test_a_link_that_is_off_passes_updates_and_stands_still() -> None:
    on = [True, False, False, True, True, False]
    inner = pf.chain(pf.adam(), PROX)
    params = tree()
    for condition in (
        lambda t: torch.tensor(on)[t],
        schedules.piecewise([1.0, 0.0, 1.0, 0.0], (1, 3, 5)),
    ):
        link = pf.conditionally(inner, condition)
        state, reference = link.init(params), inner.init(params)
        for t in range(6):
            updates, state = link.update(tree(t), state, params)
            wanted = tree(t)
            if on[t]:
                wanted, reference = inner.update(tree(t), reference, params)
            assert_same(updates, wanted)
            assert_same(state.inner, reference)
            assert_same(link.weights(state, params), inner.weights(reference, params))
        assert int(state.calls) == 6
    batched = torch.vmap(lambda last: pf.conditionally(pf.scale(2.0), lambda t: t < last).update(
        {"w": torch.ones(1)}, pf.conditionally(pf.scale(2.0), True).init({"w": torch.ones(1)}), None
    )[0]["w"])(torch.tensor([0, 1]))  # fmt: skip
    assert batched.tolist() == [[1.0], [2.0]]
    with pytest.raises(
        TypeError, match="conditionally: condition must be a number, a 0-d tensor or"
    ):
        pf.conditionally(inner, "never")


class Params(NamedTuple):
    w: Tensor
    steps: Tensor
    nothing: None = None


def test_value_and_grad_differentiates_at_the_weights() -> None:
    params = Params(torch.tensor([0.3, -2.0, 0.9]), torch.tensor(3))
    transform = pf.masked(pf.hard_prox(pf.lsbq(1)), Params(True, False))
    _, state = transform.update(params, transform.init(params), params)
    w = transform.weights(state, params).w
    assert w.unique().numel() == 2

    def loss(p: Params, power: int) -> tuple[Tensor, Tensor]:
        return (p.w**power).sum(), p.steps + 1

    step = pf.value_and_grad(loss, transform, has_aux=True)
    (value, aux), grads = step(params, state, 3)
    assert torch.equal(value, (w**3).sum())
    assert aux == 4
    torch.testing.assert_close(grads.w, 3 * w**2)
    assert grads.steps is None
    assert grads.nothing is None


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: pf.chain(pf.sgd), TypeError, r"link 0 is the class sgd; call it: sgd\(...\)"),
        (lambda: pf.chain(pf.clip(1.0), 3), TypeError, "link 1 is 3, expected a transformation"),
        (lambda: pf.named_chain(base=None), TypeError, "link base is None"),
        (lambda: pf.masked(pf.lsbq(2), "*"), TypeError, "the transformation of masked"),
        (lambda: pf.accumulate(pf.sgd(1.0), 0), ValueError, "steps must be 1 or more, got 0"),
        (lambda: pf.value_and_grad(lambda w: w, None), TypeError, "it lacks init, update"),
        (lambda: pf.trace(0.9, 0.1, nesterov=True), ValueError, "takes no dampening"),
        (lambda: pf.clip(-1.0), ValueError, r"max_abs must lie in \[0, inf\], got -1.0"),
        (lambda: pf.clip_by_global_norm(-1.0), ValueError, r"max_norm must lie in \[0, inf\]"),
    ],
)
def test_bad_composition(build, error, message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_state_of_another_chain_is_refused() -> None:
    params = tree()
    with pytest.raises(ValueError, match=r"state of 1 link\(s\) for a chain of 2"):
        pf.chain(pf.adam(), PROX).update(params, pf.chain(pf.adam()).init(params), params)


@pytest.mark.parametrize("link", [pf.trace(0.9), pf.adam(), PROX, pf.accumulate(pf.sgd(1.0), 2)])
def test_integer_leaves_are_named(link) -> None:
    with pytest.raises(TypeError, match=r"parameter 'a\.1' has dtype torch.int64"):
        link.init({"a": [torch.ones(1), torch.ones(1, dtype=torch.int64)]})
    with pytest.raises(TypeError, match="parameter 'b' is a float, expected a tensor"):
        link.init({"b": 1.0})
    with pytest.raises(TypeError, match=r"got a Linear, expected a tree .* use functional\(module"):
        link.init(torch.nn.Linear(2, 2))


def test_a_prox_link_in_front_of_what_moves_its_params_is_refused() -> None:
    prox = pf.hard_prox(pf.lsbq(2))
    with pytest.raises(ValueError, match=r"hard_prox\(lsbq\(2\)\) fits its levels .* put it last"):
        pf.chain(prox, pf.sgd(0.1))
    with pytest.raises(ValueError, match="put it last"):
        pf.named_chain(prox=pf.masked(prox, "*"), still=pf.identity(), base=pf.sgd(0.1))
    pf.chain(pf.sgd(0.1), pf.masked(prox, "a"), pf.masked(prox, "b"), pf.identity())


@pytest.mark.parametrize(
    ("links", "declared"),
    [
        ((pf.clip(1.0), pf.sgd(0.1)), {"leafwise", "plain_weights", "keeps_none", "batches"}),
        ((pf.clip_by_global_norm(1.0),), {"plain_weights", "keeps_none", "batches"}),
        ((pf.sgd(0.1), pf.hard_prox(pf.lsbq(1))), {"leafwise", "keeps_none", "batches", "last"}),
        ((pf.accumulate(pf.sgd(0.1), 2),), {"leafwise", "plain_weights", "batches"}),
        ((pf.apply_if_finite(pf.sgd(0.1)),), {"plain_weights", "keeps_none", "batches"}),
    ],
)
def test_a_composition_declares_what_its_parts_do(links, declared) -> None:
    traits = pf.chain(*links).traits
    assert {name for name, got in vars(traits).items() if got} == declared


def test_a_composite_must_define_what_it_is_short_for() -> None:
    class bare(pf.Composite):
        pass

    with pytest.raises(NotImplementedError, match="bare must define expand"):
        bare().init({"w": torch.ones(1)})


def test_labels_without_a_transformation_are_refused() -> None:
    link = pf.partition({"a": pf.sgd(0.1), "b": pf.freeze()}, {"x": "c", "*": "a"})
    message = r"labels without a transformation: \['c'\]; .* for: \['a', 'b'\]"
    with pytest.raises(ValueError, match=message):
        link.init({"x": torch.ones(1), "y": torch.ones(1)})
    with pytest.raises(TypeError, match="the transformation of label 'b' is None"):
        pf.partition({"a": pf.sgd(0.1), "b": None}, {"*": "a"})


@pytest.mark.parametrize(
    ("transform", "name"),
    [(pf.chain(pf.identity()), "chain"), (pf.named_chain(a=pf.identity()), "named_chain")],
)
def test_a_chain_refuses_updates_of_another_shape_by_its_name(transform, name: str) -> None:
    params = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=f"^{name}: the update of 'w' has shape"):
        transform.update({"w": torch.ones(3)}, transform.init(params), params)


def test_updates_are_added_in_the_dtype_of_the_params() -> None:
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    assert pf.apply_updates(params, {"w": torch.ones(2)})["w"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="apply_updates: the update of 'w' has shape"):
        pf.apply_updates(params, {"w": torch.ones(1, 2)})


# Found by attack, each with the input that showed it.


@pytest.mark.parametrize("shape", [(8,), (1, 8), (), (8, 4)])
def test_gradients_of_another_shape_are_named(shape) -> None:
    transform = pf.chain(pf.sgd(0.1, 0.9), pf.hard_prox(pf.lsbq(1)))
    params = {"a": torch.zeros(1), "w": torch.zeros(4, 8)}
    grads = {"a": torch.zeros(1), "w": torch.ones(shape)}
    with pytest.raises(ValueError, match=r"chain: the update of 'w' has shape .* \(4, 8\)"):
        transform.update(grads, transform.init(params), params)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 512), (torch.float16, 4096)])
def test_accumulation_does_not_stall_in_a_narrow_dtype(dtype, steps: int) -> None:
    transform = pf.accumulate(pf.sgd(1.0), steps)
    params = {"w": torch.zeros(2, dtype=dtype)}
    state = transform.init(params)
    for _ in range(steps):
        updates, state = transform.update({"w": torch.ones(2, dtype=dtype)}, state, params)
    assert updates["w"].tolist() == [-1.0, -1.0]
    assert updates["w"].dtype == dtype


def test_apply_if_finite_around_accumulate_takes_missing_gradients() -> None:
    transform = pf.apply_if_finite(pf.accumulate(pf.sgd(0.1), 2))
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    updates, _ = transform.update({"a": None, "b": params["b"]}, transform.init(params), params)
    assert updates["b"] == 0
