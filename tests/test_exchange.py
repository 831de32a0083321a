"""Sharded leaves on any mesh, whose ranks are threads: what is fitted, mapped, learned and drawn is
that of whole leaves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from parq_fn.transforms.agreement import check_alike, log_not_finite
from parq_fn.transforms.collective import RanksError
from parq_fn.transforms.layout import layout_of
from tests.cuts import cut, dimensions
from tests.threads import on_threads

#: By what ranks do for rows that they have pieces of.
QUANTIZERS = {
    "one rank fits them": pf.lsbq(2, "optimal"),
    "extremes": pf.affine(2),
    "a number of all rows": pf.nvfp4(),
}


@st.composite
def leaves(draw: Any) -> tuple[Any, ...]:
    """(mesh, [(shape, placements), ...], granularity)."""
    mesh = draw(st.sampled_from([(2,), (3,), (2, 2), (1, 2)]))
    rank = draw(st.integers(1, 3))
    along, some = dimensions(draw, rank), st.integers(0, rank - 1)
    found = []
    for _ in range(draw(st.integers(1, 2))):
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank)))
        places = [draw(st.one_of(st.just(Replicate()), st.builds(Shard, some))) for _ in mesh]
        if len(mesh) == 2 and isinstance(places[1], Shard) and draw(st.booleans()):
            places[0] = _StridedShard(places[1].dim, split_factor=mesh[1])
        assume(is_divided(shape, mesh, places))
        found.append((shape, tuple(places)))
    dims = along if isinstance(along, tuple) else (along,)
    lengths = [math.prod(shape[d] for d in dims) for shape, _ in found]
    sizes = [n for n in range(1, min(lengths) + 1) if not any(length % n for length in lengths)]
    blocks = pf.per_block(draw(st.sampled_from(sizes)), along)
    granularity = draw(st.sampled_from([pf.per_tensor(), pf.per_channel(along), blocks]))
    return mesh, found, granularity


def is_divided(shape: Any, mesh: Any, placements: Any) -> bool:
    """Whether strided placements cut dimensions into pieces of one size."""
    for d, size in enumerate(shape):
        own = [(n, p) for n, p in zip(mesh, placements, strict=True) if getattr(p, "dim", -1) == d]
        strided = any(isinstance(p, _StridedShard) for _, p in own)
        if strided and size % math.prod(n for n, _ in own):
            return False
    return True


def numbers(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def placed_on(mesh: Any, whole: Tensor, placements: Any) -> DTensor:
    """A rank's part of a tensor as a DTensor."""
    mine = cut(whole, tuple(mesh.shape), mesh.get_coordinate(), placements).contiguous()
    return DTensor.from_local(
        mine, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def trained(transform: Any, params: Any, grads: list[Any]) -> Iterator[tuple[Any, Any]]:
    """(weights, qparams) after each of the updates."""
    state = transform.init(params)
    for grad in grads:
        updates, state = transform.update(grad, state, params)
        params = pf.apply_updates(params, updates)
        yield transform.weights(state, params), pf.read(state, "qparams")


BOTH = [Shard(0), Shard(0)]
ONE_RANK, EXTREMES, OF_ALL = QUANTIZERS


@settings(max_examples=2)
@given(leaves(), st.sampled_from(list(QUANTIZERS)), st.booleans())
# rows that are sent on twice, and by ranks of which one has nothing
@example(((2, 2), [((5,), BOTH), ((3,), BOTH)], pf.per_tensor()), ONE_RANK, False)
# lines that replicas share, with pieces of blocks; a weight of several lines
@example(((2, 2), [((3, 6, 2), [Shard(1), Replicate()])], pf.per_block(3, 1)), ONE_RANK, False)
# blocks that are cut in two dimensions
@example(((2, 2), [((4, 3), [Shard(1), Shard(0)])], pf.per_block(4, (0, 1))), ONE_RANK, True)
# rows of which a rank has none, and a number that all rows have in common
@example(((3,), [((2, 4), [Shard(0)])], pf.per_channel()), OF_ALL, False)
# the same of rows that are cut: weights of one shape are no one weight
@example(((2,), [((2, 4), [Shard(1)]), ((2, 4), [Shard(1)])], pf.per_channel()), OF_ALL, False)
@example(((2,), [((1, 3), [Shard(0)]), ((4,), [Shard(0)])], pf.per_tensor()), EXTREMES, False)
@example(((2,), [((3, 4), [Shard(1)])], pf.per_channel(0)), EXTREMES, True)
def test_what_ranks_fit_map_learn_and_draw_is_that_of_whole_leaves(
    given: Any, quantizer: str, learns: bool
) -> None:
    """Learned numbers to rounding, for they are sums over ranks; all others bit for bit."""
    mesh, shapes, granularity = given
    own: dict[str, Any] = {"anneal_start": 0, "anneal_end": 9, "granularity": granularity}
    if learns:
        own |= {"learn": pf.sgd(0.01), "gradient": pf.estimators.inside()}
    link = pf.parq_prox(QUANTIZERS[quantizer], period=1, **own)
    transform = pf.chain(pf.add_noise(0.01, seed=3), pf.sgd(0.1), link)
    places = {f"p{i}": p for i, (_, p) in enumerate(shapes)}
    params = {f"p{i}": numbers(shape, i) for i, (shape, _) in enumerate(shapes)}
    grads = [{k: numbers(p.shape, 9 + t) for k, p in params.items()} for t in range(2)]
    wanted = [*trained(transform, params, grads)]
    some = {"rtol": 1e-11, "atol": 1e-11} if learns else {"rtol": 0.0, "atol": 0.0}

    def work() -> None:
        on = init_device_mesh("cpu", mesh)

        def here(tree: Any) -> Any:
            return {name: placed_on(on, x, places[name]) for name, x in tree.items()}

        def same(found: Any, whole: Tensor, placements: Any) -> None:
            mine = cut(whole, mesh, on.get_coordinate(), placements)
            torch.testing.assert_close(found.to_local(), mine, **some)
            assert (found.shape, found.stride()) == (whole.shape, whole.contiguous().stride())

        for found, whole in zip(
            trained(transform, here(params), [here(grad) for grad in grads]), wanted, strict=True
        ):
            for name, w in found[0].items():
                same(w, whole[0][name], places[name])
                rows = layout_of(w, granularity).placements
                same(found[1][name], whole[1][name], rows)

    on_threads(work, math.prod(mesh))


def test_rows_that_ranks_cut_are_refused_by_name_of_a_map_that_takes_them_whole() -> None:
    def least(u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
        return u - u.amin(-1, keepdim=True)

    link = pf.custom_prox(pf.lsbq(1), least, 0.0, granularity=pf.per_channel())

    def work() -> None:
        on = init_device_mesh("cpu", (2,))
        whole = {"a": numbers((4, 3), 0), "b": numbers((4, 3), 1)}
        params = {k: placed_on(on, x, [Shard(int(k == "b"))]) for k, x in whole.items()}
        link.init({"a": params["a"]})
        with pytest.raises(ValueError, match=r"parameter 'b': it is placed as .* maps whole rows"):
            link.init(params)

    on_threads(work, 2)


def test_a_weight_of_other_ranks_is_refused_by_name() -> None:
    def work() -> None:
        p = DTensor.from_local(torch.ones(2), DeviceMesh("cpu", [0]), [Replicate()])
        if dist.get_rank():
            with pytest.raises(ValueError, match=r"parameter 'p': it lies on the ranks \[0\]"):
                pf.hard_prox(pf.lsbq(1)).init({"p": p})
        else:
            pf.hard_prox(pf.lsbq(1)).init({"p": p})

    on_threads(work, 2)


def test_a_state_dict_of_a_sharded_weight_without_rows_loads() -> None:
    link = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel())

    def work() -> None:
        on = init_device_mesh("cpu", (1,))
        p = nn.Parameter(placed_on(on, torch.empty(0, 2), [Shard(0)]))
        groups = [{"params": [("p", p)], "prox": link}]
        optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.1))
        p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.levels(p).shape == (0, 4)

    on_threads(work, 1)


def test_pieces_that_placements_do_not_tell_of_are_refused_by_the_name_of_the_parameter() -> None:
    """On every rank; a mesh with one rank along a strided placement cuts as without it."""
    link = pf.hard_prox(pf.lsbq(2), period=1)
    places = [_StridedShard(0, split_factor=2), Shard(0)]

    def refit(mesh: tuple[int, ...]) -> Tensor:
        mine = placed_on(init_device_mesh("cpu", mesh), numbers((5, 3), 0), places)
        transform, params = pf.chain(pf.sgd(0.0), link), {"name": mine}
        _, state = transform.update(params, transform.init(params), params)
        found: Tensor = pf.read(state, "qparams")["name"].to_local()
        return found

    def work() -> None:
        with pytest.raises(ValueError, match=r"parameter 'name' .* mesh divides"):
            refit((2, 2))

    on_threads(work, 4)
    wanted = pf.lsbq(2).fit(numbers((5, 3), 0).reshape(1, -1))[0]
    for found in on_threads(lambda: refit((1, 2)), 2):
        assert torch.equal(found, wanted)


def test_rows_without_weights_get_the_zeros_that_they_have_in_one_process() -> None:
    def work() -> None:
        on = init_device_mesh("cpu", (2,))
        for quantizer in QUANTIZERS.values():
            link = pf.hard_prox(quantizer, period=1, granularity=pf.per_channel())
            for shape, d in (((3, 0), 1), ((3, 0), 0), ((1, 0, 2), 2)):
                params = {"p": placed_on(on, torch.empty(shape), [Shard(d)])}
                state = link.refit(link.advance(link.init(params), torch.tensor(0.1)), params)
                assert not pf.read(state, "qparams")["p"].to_local().any(), (quantizer, shape)

    on_threads(work, 2)


def learns_together() -> tuple[Any, Any, Any, Any]:
    """(transformation, gradients, state, params) of a rank whose tensors' rows are cut."""
    on, whole = init_device_mesh("cpu", (2,)), {"a": numbers((2, 2), 0), "b": numbers((4, 3), 1)}
    link = pf.hard_prox(pf.uniform(2), period=1, learn=pf.sgd(0.1))
    transform = pf.chain(pf.sgd(0.1), link)
    params = {name: placed_on(on, x, [Shard(0)]) for name, x in whole.items()}
    _, state = transform.update(params, transform.init(params), params)
    return transform, params, state, params


def test_learned_levels_take_gradients_that_are_placed_otherwise_than_their_leaf() -> None:
    def work() -> None:
        transform, grads, state, params = learns_together()
        wanted = transform.pullback(grads, state, params)
        others = {name: grad.redistribute(placements=[Replicate()]) for name, grad in grads.items()}
        found = transform.pullback(others, state, params)
        for name in params:
            assert torch.equal(found[1][1][name].to_local(), wanted[1][1][name].to_local())
            assert wanted[1][1][name].to_local().any()

    on_threads(work, 2)


def test_where_ranks_cannot_learn_together_the_error_names_the_leaf(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*tensors: Any, **own: Any) -> None:
        raise RuntimeError("connection closed")

    def work() -> None:
        transform, grads, state, params = learns_together()
        dist.barrier()
        monkeypatch.setattr(dist, "all_reduce", fails)
        for name in params:
            alone = {k: grad if k == name else None for k, grad in grads.items()}
            with pytest.raises(RanksError, match=f"the levels of '{name}' together"):
                transform.pullback(alone, state, params)

    on_threads(work, 2)


@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2), (1, 2)])
@pytest.mark.parametrize(
    ("gone", "frozen", "told"),
    [
        ((), (), None),
        ((), ("a",), r"'a' on ranks {others} \(.*, at update 0\), on ranks \[1\] \(.*, frozen\)\."),
        (("a",), (), r"'a' on ranks {others}, not on ranks \[1\]\."),
        (("a",), ("b",), r"'a' .*, not on ranks \[1\]; 'b' on ranks {others} \(.*, frozen\)\."),
    ],
)
def test_every_rank_is_told_which_of_them_are_to_refit_what(
    mesh: tuple[int, ...], gone: Any, frozen: Any, told: str | None
) -> None:
    link, count = pf.hard_prox(pf.lsbq(2)), math.prod(mesh)

    def found() -> str:
        on = init_device_mesh("cpu", mesh)
        leaf = placed_on(on, numbers((4, 12), 0), [Shard(0), Shard(1)][: len(mesh)])
        params = {name: leaf for name in "abc" if dist.get_rank() != 1 or name not in gone}
        state = link.init(params)
        try:
            check_alike(link, state, params, frozen if dist.get_rank() == 1 else ())
        except RanksError as error:
            return str(error)
        return ""

    messages = set(on_threads(found, count))
    assert len(messages) == 1
    others = re.escape(str([rank for rank in range(count) if rank != 1]))
    wanted = "^$" if told is None else r"together: " + told.format(others=others)
    assert re.search(wanted, messages.pop())


@pytest.mark.parametrize(
    ("count", "then"),
    [(1, "have NaN for levels until a fit finds them finite"), (2, "keep their qparams")],
)
def test_ranks_log_who_of_those_that_share_rows_has_what_is_not_finite(
    count: int, then: str, caplog: pytest.LogCaptureFixture
) -> None:
    link = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel())
    whole = numbers((4, 12), 0)
    whole[0, :2], whole[0, 11], whole[3, 11] = math.nan, math.inf, math.nan

    def work() -> None:
        mesh = init_device_mesh("cpu", (2, 2))
        leaf = placed_on(mesh, whole, (Shard(0), Shard(1)))
        params = {"a": leaf, "b": placed_on(mesh, whole.flip(0), (Shard(0), Shard(1)))}
        state = link.init({"w": torch.ones(2, 2)})._replace(count=torch.tensor(count))
        fitted = torch.tensor([[math.nan, math.nan], [1.0, 2.0]])
        log_not_finite(link, state, params, {0: fitted, 1: torch.ones(2, 2)})

    on_threads(work, 4)
    odd, upper, lower = "latents are NaN or infinite: ", "2 on rank 0, 1 on rank 1", "1 on rank 3"
    assert sorted(record.getMessage().split(odd)[1] for record in caplog.records) == sorted(
        2 * [f"'a' ({upper}), 'b' (1 on rank 1); 1 of the rows here {then}"]
        + 2 * [f"'a' ({lower}), 'b' (2 on rank 2, 1 on rank 3); 1 of the rows here {then}"]
    )
