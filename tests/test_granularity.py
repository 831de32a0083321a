"""Rows and back: every cut is a permutation-free view that keeps values and memory format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parq_fn as pf

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
cuts = st.sampled_from([pf.per_tensor(), pf.per_channel()])


@given(shapes, cuts, st.randoms(use_true_random=False))
def test_restore_undoes_rows_in_any_memory_format(shape, cut, random) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)
    back = [order.index(d) for d in range(len(shape))]
    weight = torch.randn([shape[d] for d in order]).permute(back)
    rows = cut.rows(weight)
    assert rows.shape == cut.shape(weight)
    again = cut.restore(rows, weight)
    assert torch.equal(again, weight)
    if weight.numel():  # strides of dimensions of one element mean nothing
        kept = [
            (a, b) for n, a, b in zip(shape, again.stride(), weight.stride(), strict=True) if n > 1
        ]
        assert all(a == b for a, b in kept)


def test_channels_last_has_the_same_rows_and_keeps_its_format() -> None:
    weight = torch.randn(4, 3, 2, 2)
    last = weight.to(memory_format=torch.channels_last)
    cut = pf.per_channel()
    assert torch.equal(cut.rows(weight), cut.rows(last))
    again = cut.restore(cut.rows(last), last)
    assert again.is_contiguous(memory_format=torch.channels_last)


def test_gaps_between_entries_are_not_kept() -> None:
    """A slice, and one number repeated: no strides that a tensor of its own could have."""
    cut = pf.per_channel()
    for weight in (torch.randn(4, 6)[:, ::2], torch.ones(()).expand(3, 4)):
        again = cut.restore(cut.rows(weight).contiguous(), weight)
        assert torch.equal(again, weight)
        assert again.is_contiguous()


def test_a_granularity_must_define_its_shape() -> None:
    with pytest.raises(NotImplementedError, match="Granularity must define shape"):
        pf.Granularity().rows(torch.ones(2))


@pytest.mark.parametrize(
    ("cut", "shape", "rows"),
    [
        (pf.per_tensor(), (), (1, 1)),
        (pf.per_tensor(), (2, 3, 4), (1, 24)),
        (pf.per_channel(), (), (1, 1)),
        (pf.per_channel(), (5,), (1, 5)),
        (pf.per_channel(), (2, 3, 4, 5), (2, 60)),
        (pf.per_channel(), (0, 3), (0, 3)),
        (pf.per_block(2), (6,), (3, 2)),
        (pf.per_block(3), (2, 6), (4, 3)),
    ],
)
def test_shapes(cut, shape, rows) -> None:
    assert cut.rows(torch.zeros(shape)).shape == rows


def test_blocks_run_along_the_last_dimension() -> None:
    rows = pf.per_block(2).rows(torch.arange(8.0).reshape(2, 4))
    assert rows.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("size", "shape", "message"),
    [
        (4, (2, 6), r"block size 4 does not divide the last dimension of shape \(2, 6\)"),
        (4, (2, 4, 3), r"block size 4 does not divide the last dimension of shape \(2, 4, 3\)"),
        (3, (), r"per_block\(3\) takes weights that have dimension -1, got shape \(\)"),
    ],
)
def test_blocks_that_do_not_fit(size: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pf.per_block(size).rows(torch.zeros(shape))


@pytest.mark.parametrize("size", [0, -1, 1.5, "8", True])
def test_block_sizes_that_are_none(size) -> None:
    with pytest.raises((TypeError, ValueError), match=r"per_block: size must be (a whole|1 or)"):
        pf.per_block(size)
