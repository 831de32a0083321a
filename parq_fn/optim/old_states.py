"""States of versions that kept a row's levels, where its qparams are kept now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.quantizers import Quantizer
from parq_fn.transforms.sharded import is_dtensor, spread_so

_CANDIDATES = 17  # scales that are tried, of those between which levels say that it lies


class Kept(NamedTuple):
    """What the qparams of a parameter are of."""

    quantizer: Quantizer
    row_shape: tuple[int, ...]

    def shaped(self, qparams: Tensor) -> Tensor:
        """Qparams of these rows, or what is none as it is."""
        if not qparams.dim():
            return qparams
        shape = torch.Size((*self.row_shape, qparams.shape[-1]))
        same, fits = shape == qparams.shape, self.fits(shape) and shape.numel() == qparams.numel()
        return qparams.reshape(shape) if fits and not same else qparams

    def fits(self, shape: torch.Size) -> bool:
        """Whether qparams of these rows may have that shape."""
        m, k = self.quantizer.num_qparams, self.quantizer.num_levels
        return shape[:-1] == self.row_shape and shape[-1:] in ((m,), (m + k,))

    def holds(self, got: Any) -> bool:
        """Whether it is a tensor that fits, or none at all."""
        return not isinstance(got, Tensor) or self.fits(got.shape)

    def unlike(self, key: str, got: Tensor) -> str:
        """What to say of a tensor that does not fit."""
        m, shape = self.quantizer.num_qparams, (*self.row_shape, self.quantizer.num_qparams)
        return (
            f"{key} has shape {tuple(got.shape)}, expected {shape}: {m} for each row of "
            f"{self.quantizer!r}; it was trained with another quantizer, or with other rows: "
            "build the optimizer with those"
        )


def with_qparams(entries: dict[str, Any], kept: Mapping[str, Kept]) -> dict[str, Any]:
    """Entries of a parameter, with qparams in place of levels [r, k]: where a row has one scale,
    the scale that gives these levels bit for bit; else [..., m + k], the levels beside zeros, as
    of `Quantizer.with_levels`. Weights are the same either way.

    kept: by the key of the qparams, "qparams" or "1.qparams"; levels had "levels" for it.
    """
    new = dict(entries)
    for key, own in kept.items():
        old = f"{key.removesuffix('qparams')}levels"
        if key not in new and isinstance(new.get(old), Tensor):
            levels = new.pop(old)
            new[key] = qparams_of(levels, own.quantizer) if levels.dim() == 2 else levels
        if isinstance(new.get(key), Tensor):
            new[key] = own.shaped(new[key])
    return new


def spread_rows(saved: dict[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """Saved entries, with what belongs to rows placed as mine is: versions that kept it whole on
    every rank saved it so."""
    new = dict(saved)
    for key, got in saved.items():
        own = mine.get(key)
        of_rows = bool({"qparams", "learn", "learned"} & {*key.split(".")})
        if of_rows and is_dtensor(own) and isinstance(got, Tensor) and not is_dtensor(got):
            new[key] = spread_so(got, own, own.placements) if got.dim() == own.dim() else got
    return new


def like_saved(
    mine: dict[str, Any], saved: dict[str, Any], kept: Mapping[str, Kept]
) -> dict[str, Any]:
    """A parameter's entries, with qparams of the saved ones' shape where they are of its rows."""
    new = dict(mine)
    for key, own in kept.items():
        got = saved.get(key)
        if isinstance(got, Tensor) and own.fits(got.shape):
            new[key] = got
    return new


def qparams_of(levels: Tensor, quantizer: Quantizer) -> Tensor:
    """Qparams [r, m], or [r, m + k] (see `with_qparams`), whose levels are levels [r, k].

    >>> from parq_fn import lsbq, uniform
    >>> qparams_of(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), uniform(2))
    tensor([[2.]])
    >>> qparams_of(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), lsbq(2)).shape
    torch.Size([1, 6])
    """
    dtype, m = torch.promote_types(levels.dtype, torch.float32), quantizer.num_qparams
    zeros = levels.new_zeros((len(levels), m), dtype=dtype)
    if _gives(zeros, levels, quantizer).all():  # not fitted yet
        return zeros
    if m == 1 and levels.shape[1] == quantizer.num_levels:
        scale = zeros
        for candidate in _scales(levels, quantizer, dtype):
            known = _gives(scale, levels, quantizer)
            scale = torch.where(known, scale, candidate)
        if _gives(scale, levels, quantizer).all():
            return scale
    return quantizer.with_levels(zeros, levels)


def _gives(qparams: Tensor, levels: Tensor, quantizer: Quantizer) -> Tensor:
    """[r, 1]: whether these are the levels of the qparams."""
    made = quantizer.levels_in(qparams, levels.dtype)
    if made.shape != levels.shape:
        return torch.zeros_like(qparams[:, :1], dtype=torch.bool)
    same = (made == levels) | (made.isnan() & levels.isnan())
    return same.all(-1, keepdim=True)


def _scales(levels: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> list[Tensor]:
    """Scales [r, 1] that may have given the levels: each level lies between two numbers that are
    halfway to its neighbours in its dtype, and over its multiple so does the scale."""
    multiples = quantizer.levels(levels.new_ones((1, 1), dtype=torch.float64))[0].abs()
    found = levels[:, multiples > 0].abs().contiguous()
    multiples = multiples[multiples > 0]
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    code, value = found.view(bits), found.double()
    below = (value + (code - 1).clamp(min=0).view(found.dtype).double()) / 2
    above = (value + (code + 1).view(found.dtype).double()) / 2
    low = (below / multiples).amax(-1, keepdim=True)
    high = (above / multiples).amin(-1, keepdim=True)
    exact = (value / multiples)[:, multiples.argmin(), None]
    shares = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64).tolist()
    between = [low + (high - low) * share for share in shares]
    return [scale.to(dtype) for scale in (exact, (low + high) / 2, *between)]
