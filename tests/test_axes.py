"""Rows along any dimensions, against plain loops over indices."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

import parq_fn as pf
from tests.cuts import cases

Index = tuple[int, ...]


def indices(shape: tuple[int, ...]) -> list[Index]:
    return list(itertools.product(*map(range, shape)))


def channels(shape: tuple[int, ...], axis: int | tuple[int, ...]) -> list[list[Index]]:
    """The indices of each row, one row after another."""
    rank = len(shape)
    if rank < 2:
        return [indices(shape)]
    kept = sorted(d % rank for d in (axis if isinstance(axis, tuple) else (axis,)))
    return [
        [index for index in indices(shape) if tuple(index[d] for d in kept) == key]
        for key in itertools.product(*(range(shape[d]) for d in kept))
    ]


def blocks(shape: tuple[int, ...], size: int, along: int | tuple[int, ...]) -> list[list[Index]]:
    rank = len(shape)
    cut = [d % rank for d in (along if isinstance(along, tuple) else (along,))]
    inside = list(itertools.product(*(range(shape[d]) for d in cut)))
    left = [d for d in range(rank) if d == min(cut) or d not in cut]
    sizes = [len(inside) // size if d == min(cut) else shape[d] for d in left]
    found = []
    for key in itertools.product(*map(range, sizes)):
        at = dict(zip(left, key, strict=True))
        begin = size * at[min(cut)]
        row = []
        for place in inside[begin : begin + size]:
            at.update(zip(cut, place, strict=True))
            row.append(tuple(at[d] for d in range(rank)))
        found.append(row)
    return found


def by_loops(weight: Tensor, cut: Any) -> list[list[float]]:
    shape = tuple(weight.shape)
    if isinstance(cut, pf.per_block):
        rows = blocks(shape, cut.size, cut.along)
    else:
        rows = channels(shape, cut.axis)
    return [[weight[index].item() for index in row] for row in rows]


@example((torch.arange(4.0).reshape(2, 2), pf.per_block(2, along=(0, 1))))
@given(cases())
def test_rows_are_those_of_plain_loops_and_come_back(case: tuple[Tensor, Any]) -> None:
    weight, cut = case
    rows = cut.rows(weight)
    assert rows.shape == cut.shape(weight)
    assert rows.dtype == weight.dtype
    assert rows.tolist() == by_loops(weight, cut)
    for made in (rows, rows.clone(), rows.t().contiguous().t()):
        again = cut.restore(made, weight)
        assert again.shape == weight.shape
        assert torch.equal(again, weight)
    dense = torch.empty_like(weight).stride() == weight.stride()
    if weight.numel() and dense and 0 not in weight.stride():
        strides = zip(weight.shape, again.stride(), weight.stride(), strict=True)
        assert all(a == b for n, a, b in strides if n > 1)


@given(cases(low=1))
def test_under_vmap_and_grad(case: tuple[Tensor, Any]) -> None:
    weight, cut = case
    stack = torch.stack([weight, weight + 1])
    rows = torch.stack([cut.rows(one) for one in stack])
    assert torch.equal(torch.vmap(cut.rows)(stack), rows)
    assert torch.equal(torch.vmap(cut.restore)(rows, stack), stack)
    factor = torch.arange(float(weight.numel())).to(weight.dtype).reshape(cut.shape(weight))

    def loss(w: Tensor) -> Tensor:
        return (cut.restore(cut.rows(w) * factor, w) * w.detach()).sum()

    got = torch.func.grad(loss)(weight)
    assert torch.equal(got, cut.restore(factor, weight) * weight)


CUTS = [
    pf.per_channel(1),
    pf.per_channel((0, 1)),
    pf.per_channel((-1, 0)),
    pf.per_block(2, along=0),
    pf.per_block(3, along=(2, 0)),
    pf.per_block(6, along=(1, 2)),
]


@pytest.mark.rare
@pytest.mark.parametrize("cut", CUTS, ids=repr)
def test_compiled_in_one_graph(cut) -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = cut.rows(weight)
        return rows, cut.restore(2 * rows, weight)

    for shape in ((4, 2, 3), (6, 4, 9)):
        weight = torch.randn(shape)
        for given_one in (weight, weight.mT.contiguous().mT):
            rows, back = both(given_one)
            assert torch.equal(rows, cut.rows(weight))
            assert torch.equal(back, 2 * weight)
            assert back.stride() == given_one.stride()


def views() -> Iterator[tuple[Any, Tensor]]:
    yield pf.per_channel(1), torch.randn(4, 6)
    yield pf.per_channel(-1), torch.randn(4, 3, 6)
    yield pf.per_channel((0, 1)), torch.randn(4, 3, 6)
    yield pf.per_channel((1, 0)), torch.randn(4, 3, 6)
    yield pf.per_block(3, along=(1, 2, 3)), torch.randn(4, 2, 3, 3)
    yield pf.per_block(4, along=0), torch.randn(4, 6)
    yield pf.per_channel(), torch.randn(4, 6).t()


@pytest.mark.parametrize(
    ("cut", "weight"),
    [*views()],
    ids=lambda x: str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x),
)
def test_nothing_is_copied_where_a_view_does(cut, weight: Tensor) -> None:
    rows = cut.rows(weight)
    assert rows.data_ptr() == weight.data_ptr()
    assert cut.restore(rows, weight).data_ptr() == weight.data_ptr()


def test_channels_last_has_the_same_rows_and_keeps_its_format() -> None:
    weight = torch.randn(4, 2, 3, 3)
    last = weight.to(memory_format=torch.channels_last)
    for cut in (pf.per_channel(1), pf.per_block(9, along=(1, 2, 3)), pf.per_block(2, along=0)):
        assert torch.equal(cut.rows(last), cut.rows(weight))
        again = cut.restore(cut.rows(last).contiguous(), last)
        assert torch.equal(again, weight)
        assert again.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("cut", "shape", "rows"),
    [
        (pf.per_channel(1), (768, 2304), (2304, 768)),
        (pf.per_channel(1), (16, 8, 3, 3), (8, 144)),
        (pf.per_channel((0, 1)), (4, 6, 5), (24, 5)),
        (pf.per_channel(7), (5,), (1, 5)),
        (pf.per_channel((0, 1)), (), (1, 1)),
        (pf.per_channel((0, 1)), (2, 3), (6, 1)),
        (pf.per_block(9, along=(1, 2, 3)), (4, 2, 3, 3), (8, 9)),
        (pf.per_block(2, along=0), (4, 6), (12, 2)),
        (pf.per_block(2), (2, 3, 4), (12, 2)),
        (pf.per_block(2, along=(0, 1)), (0, 3), (0, 2)),
    ],
)
def test_shapes(cut, shape: tuple[int, ...], rows: tuple[int, int]) -> None:
    assert cut.shape(torch.zeros(shape)) == rows
    assert cut.rows(torch.zeros(shape)).shape == rows


def test_they_print_compare_and_pickle() -> None:
    shown = {
        pf.per_channel(): "per_channel()",
        pf.per_channel(0): "per_channel()",
        pf.per_channel(axis=1): "per_channel(axis=1)",
        pf.per_channel((0, 1)): "per_channel(axis=(0, 1))",
        pf.per_block(32): "per_block(32)",
        pf.per_block(32, along=(1, 2, 3)): "per_block(32, along=(1, 2, 3))",
    }
    assert len(shown) == 5
    for cut, text in shown.items():
        assert repr(cut) == text
        assert eval(text, vars(pf)) == cut
        assert pickle.loads(pickle.dumps(cut)) == cut
    assert replace(pf.per_block(4, along=0), size=8) == pf.per_block(8, along=0)
    assert replace(pf.per_channel(), axis=1) == pf.per_channel(1) != pf.per_channel()


@pytest.mark.parametrize("got", [1.0, "0", True, None, [0, 1], (0, 1.5), (0, False)])
def test_dimensions_that_are_no_whole_numbers(got: Any) -> None:
    with pytest.raises(TypeError, match="per_channel: axis must be a whole number or a tuple"):
        pf.per_channel(got)
    with pytest.raises(TypeError, match="per_block: along must be a whole number or a tuple"):
        pf.per_block(2, got)


@pytest.mark.parametrize(("got", "what"), [((), "a dimension"), ((0, 0), "each dimension once")])
def test_dimensions_named_twice_or_not_at_all(got: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"per_channel: axis must name {what}, got"):
        pf.per_channel(got)
    with pytest.raises(ValueError, match=f"per_block: along must name {what}, got"):
        pf.per_block(2, got)


@pytest.mark.parametrize(
    ("cut", "shape", "message"),
    [
        (pf.per_channel(2), (3, 4), r"axis=2\) takes weights that have dimension 2, got shape \(3"),
        (pf.per_channel(-3), (3, 4), "dimension -3.*choose another axis for it, or leave it out"),
        (pf.per_channel((0, -2)), (3, 4), r"dimension of shape \(3, 4\) twice, as \(0, 0\)"),
        (
            pf.per_block(2),
            (),
            r"per_block\(2\) takes weights that have dimension -1, got shape \(\)",
        ),
        (pf.per_block(2, along=1), (4,), "dimension 1, got shape .*choose another along"),
        (pf.per_block(2, along=(1, -1)), (2, 4), "twice.*each dimension of along once"),
        (pf.per_block(4, along=0), (6, 4), r"4 does not divide the 6 along 0 of shape \(6, 4\)"),
        (pf.per_block(4, (0, 1)), (3, 2), r"4 does not divide the 6 along \(0, 1\) of shape"),
    ],
)
def test_weights_that_do_not_fit_a_granularity_raise(
    cut, shape: tuple[int, ...], message: str
) -> None:
    for call in (cut.rows, cut.shape, cut.row_shape):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))
    prox = pf.hard_prox(pf.lsbq(1), granularity=cut)
    with pytest.raises(ValueError, match=f"parameter 'w': .*{message}"):
        prox.init({"w": torch.zeros(shape)})


def turned(cut: Any) -> tuple[Any, Any]:
    """(from a weight, to it): for rows of axis 0 that are those of the cut."""
    return (lambda w: cut.rows(w).contiguous()), (lambda rows, like: cut.restore(rows, like))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", CUTS, ids=repr)
@pytest.mark.parametrize("options", [{}, {"shrink": True}, {"normal_map": 1.5}], ids=repr)
def test_a_link_is_that_of_its_rows(options: dict, cut, dtype: torch.dtype) -> None:
    """Latents as rows of axis 0 have the same levels and weights, step for step."""
    prox = pf.parq_prox(
        pf.lsbq(2), anneal_start=1, anneal_end=4, period=2, granularity=cut, learning_rate=0.1,
        **options,
    )  # fmt: skip
    into, back = turned(cut)
    param = torch.randn(4, 6, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    runs = []
    for link, p in ((prox, param), (replace(prox, granularity=pf.per_channel()), into(param))):
        own, params = pf.chain(pf.sgd(0.1, momentum=0.9), link), {"w": p}
        state = own.init(params)
        for _ in range(6):
            updates, state = own.update(pf.tree.tree_map(torch.sin, params), state, params)
            params = pf.apply_updates(params, updates)
        (weight,) = own.weights(state, params).values()
        runs.append((params["w"], weight, pf.read(state, "qparams")["w"].flatten(0, -2)))
    for mine, of_rows in zip(runs[0][:2], runs[1][:2], strict=True):
        assert torch.equal(mine, back(of_rows, param))
    assert torch.equal(runs[0][2], runs[1][2])


def test_a_link_under_vmap() -> None:
    prox = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel(1))
    params = torch.randn(3, 4, 6)

    def weights(p: Tensor) -> Tensor:
        state = prox.init(p)
        _, state = prox.update(torch.zeros_like(p), state, p)
        out: Tensor = prox.weights(state, p)
        return out

    expected = torch.stack([weights(p) for p in params])
    assert torch.equal(torch.vmap(weights)(params), expected)
    of_rows = replace(prox, granularity=pf.per_channel())
    state = of_rows.refit(
        of_rows.advance(of_rows.init(params[0].t()), torch.zeros(())), params[0].t()
    )
    assert torch.equal(expected[0], of_rows.weights(state, params[0].t()).t())


class pairs(pf.Granularity):
    """Rows of two, of a shape alone."""

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return weight.numel() // 2, 2


@pytest.mark.parametrize(
    ("cut", "shape", "expected"),
    [
        (pairs(), (3, 4), (6,)),
        (pf.per_tensor(), (3, 4), ()),
        (pf.per_channel(), (7,), ()),
        (pf.per_channel((2, 0)), (3, 4, 5), (3, 5)),
        (pf.per_channel(-1), (3, 4), (4,)),
        (pf.per_block(2), (3, 4), (3, 2)),
        (pf.per_block(2, along=(2, 0)), (4, 5, 3), (6, 5)),
        (pf.per_block(2, along=(2, 1)), (3, 4, 6), (3, 12)),
    ],
    ids=repr,
)
def test_the_shape_of_what_rows_have_is_the_weight_s_without_what_they_run_over(
    cut: Any, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    weight = torch.zeros(shape)
    assert cut.row_shape(weight) == expected
    assert torch.Size(expected).numel() == cut.shape(weight)[0]


def test_an_axis_counted_from_the_end_is_the_same_axis() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    assert pf.per_channel(-1).rows(weight).tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert torch.equal(pf.per_channel(-2).rows(weight), weight)
