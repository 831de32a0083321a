"""What every quantizer does: rows [r, n] -> qparams [r, m] -> levels [r, k], and the nearest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import concrete, is_plain
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import Value, attribute, value
from parq_fn.proxmaps.even import Even, inverse_of
from parq_fn.proxmaps.levels import nearest
from parq_fn.quantizers.own import (
    check_counts,
    check_finite,
    check_grid,
    check_levels,
    check_tensor,
    is_own,
)
from parq_fn.quantizers.powers import power_of_two
from parq_fn.quantizers.reductions import largest, pieces, sorted_columns

_FAR = 2.0**32  # up to here, and down to its inverse, squares and sums are in range
_TELLS = 2.0**8  # by how much the first qparam and the largest magnitude of a row may differ


class Grid(NamedTuple):
    """Evenly spaced levels: step * first, step * (first + 1), ..., step * last."""

    step: Tensor  # [r, 1]
    first: Tensor | float  # [r, 1] where rows differ in it
    last: Tensor | float  # first + k - 1, likewise

    def levels(self, count: int) -> Tensor:
        """All of them, [r, count]."""
        step = self.step
        whole = torch.arange(count, dtype=step.dtype, device=step.device)
        return step * (whole + self.first)


@value
class Quantizer(Value):
    """Base of the quantizers: `fit` finds the few numbers that a row's levels follow from, and
    `levels` gives these levels.

        fit(rows [r, n]) -> qparams [r, m]     levels(qparams [r, m]) -> levels [r, k]
        quantizer(rows)  =  levels(fit(rows))

    A new one gives `num_levels` and `qparams(x)`: x [r, n] -> [r, m], each row from its own row
    of x alone. x is float32 or float64, finite, with n >= 1, each row scaled by a power of two so
    that its largest magnitude lies in [1, 2) (zeros stay zeros). The base sees to the rest: dtypes,
    scaling, empty and non-finite rows.

    Without more its qparams are the levels, in any order: m = k. Others also give `num_qparams`,
    and either `grid(qparams)`, where levels are evenly spaced, or `levels(qparams)`: sorted, pure
    and cheap, for it is called at every step. `scales` says which qparams scale with x.

    Rows are quantized each from itself alone. The one exception: of a quantizer with `num_whole`
    above 0 so many qparams, the last, are of the whole tensor that the rows are of, `whole(x)`, and
    the same in each of them. `qparams(x)` gives the others; `fit` puts them together.

    Raises TypeError, when the class is defined, for one that defines levels and no qparams. `fit`
    raises TypeError or ValueError, with the quantizer's name, where what a class of one's own gives
    is no tensor of that shape, of a narrower dtype, not finite, or where levels are not sorted.

    >>> import torch
    >>> from parq_fn.quantizers import Quantizer
    >>> class sign_times_max(Quantizer):
    ...     num_levels = 2
    ...     def qparams(self, x):
    ...         top = x.abs().amax(-1, keepdim=True)
    ...         return torch.cat([-top, top], -1)
    >>> sign_times_max()(torch.tensor([[0.5, -3.0]]))
    tensor([[-3.,  3.]])
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.levels is not Quantizer.levels and cls.qparams is Quantizer.qparams:
            raise TypeError(
                f"{cls.__name__} defines levels and no qparams: what is computed from rows is "
                "qparams(x) now, and levels(qparams) follow from it; rename levels to qparams"
            )

    # Each of these a subclass gives by a class attribute, or by a property.

    @attribute
    def homogeneous(self) -> bool:
        """Whether qparams(2^i x) = 2^i qparams(x), bit for bit, in those that scale; then only rows
        far from 1 are scaled, which takes a copy of them."""
        return False

    @attribute
    def num_whole(self) -> int:
        """How many of the qparams are of the whole tensor, see the class."""
        return 0

    @attribute
    def telling(self) -> bool:
        """Whether the first qparam of a homogeneous quantizer bounds any row x: it is at most 256
        max|x| and at least mean|x| / 256, infinite where x holds an infinity (it may be where the
        sum of x overflows), and NaN where x holds one. Then rows need no look of their own.

        A subclass with other qparams says so for itself.
        """
        return False

    @attribute
    def extremes(self) -> bool:
        """Whether the fit of a row is that of its least and its largest weight alone, bit for bit.
        Of a row that ranks have pieces of these are then all that is sent.

        A subclass with other qparams says so for itself.
        """
        return False

    @attribute
    def rows_at_once(self) -> int:
        """How many rows to fit at once at least, where they are long: few, but for qparams(x) that
        makes no tensor of the size of x."""
        return 1

    @attribute
    def num_levels(self) -> int:
        """k, the number of levels of every row."""
        raise NotImplementedError(f"{type(self).__name__} must define num_levels")

    @attribute
    def num_qparams(self) -> int:
        """m, the number of qparams of every row."""
        return self.num_levels

    @attribute
    def scales(self) -> tuple[bool, ...]:
        """Which of the m qparams of a x are a times those of x, a > 0; the others stay."""
        return (True,) * self.num_qparams

    @attribute
    def positive(self) -> tuple[bool, ...]:
        """Which of the m qparams stay above 0 where they are learned: scales and magnitudes, but no
        minimum, mean or free level."""
        return (False,) * self.num_qparams

    @attribute
    def learnable(self) -> tuple[bool, ...]:
        """Which of the m qparams may be learned: whole numbers, such as zero points, may not."""
        return (True,) * self.num_qparams

    @attribute
    def largest_code(self) -> float:
        """c, what the largest level is a multiple of a scale by, for the normalization of learned
        qparams; 1 where levels are no multiples of one."""
        return 1.0

    @attribute
    def sorts(self) -> bool:
        """Whether qparams are levels, or their magnitudes, each free: learned ones are kept in
        ascending order. Of the base where it has no grid and no levels of its own."""
        own = type(self)
        return own.grid is Quantizer.grid and own.levels is Quantizer.levels

    def ordered(self, qparams: Tensor) -> Tensor:
        """Qparams [..., m] in the order in which they are kept, see `sorts`."""
        return qparams.sort(-1).values if self.sorts else qparams

    @attribute
    def traits(self) -> QuantizerTraits:
        """What it declares, for `parq_fn.testing`: here what the base sees to."""
        return QuantizerTraits(scale_exact=True, widens=True)

    def qparams(self, x: Tensor) -> Tensor:
        """Prepared rows [r, n] -> qparams [r, m]; see the class."""
        raise NotImplementedError(f"{type(self).__name__} must define qparams")

    def whole(self, x: Tensor) -> Tensor:
        """All rows [r, n] of a tensor -> [1, num_whole], the qparams that they have in common; of
        some of the rows, such that the largest over all parts is that of the whole.

        x is float32 or float64, not scaled, and r may be 0; what rows with NaN and infinities hold
        is left out.
        """
        return x.new_zeros(1, 0)

    def grid(self, qparams: Tensor) -> Grid | None:
        """The levels of qparams [r, m] as multiples of a step; None where they are not."""
        del qparams
        return None

    def levels(self, qparams: Tensor) -> Tensor:
        """Qparams [r, m] -> sorted levels [r, k], in their dtype; NaN for a row that holds one.

        Of the base those of `grid`, else the qparams themselves.
        """
        grid = type(self).grid(self, qparams)  # a field of a subclass may be named so
        if grid is not None:
            return grid.levels(self.num_levels)
        if concrete((qparams.diff() >= 0).all()):  # nor is there a NaN beside a number
            return qparams
        return nan_rows(sorted_columns(qparams), qparams)

    def rounded(self, qparams: Tensor) -> Tensor:
        """The numbers that the levels of qparams [r, m] are made of, and that a file holds: they
        themselves, unless a quantizer rounds them, as `stored` does."""
        return qparams

    def levels_in(self, qparams: Tensor, dtype: torch.dtype) -> Tensor:
        """The levels [r, k] that weights of this dtype are mapped to: held to its range and
        rounded to it, so that weights can be bit-equal to them.

        qparams: [r, m], or [r, m + k] or [r, k] of a state that has levels, see `with_levels`.
        dtype: of the weights.
        """
        end = torch.finfo(dtype).max
        if qparams.shape[-1] != self.num_qparams:
            return self.known_levels(qparams).clamp(-end, end).to(dtype)
        return self.levels_within(qparams, end).to(dtype)

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        """`levels`, held to [-end, end]: sorted, and the same where none is beyond it.

        Here each by itself. Where qparams or magnitudes can be held instead, fewer by far, a
        subclass says so: it counts where a compiler makes levels for every weight.
        """
        return self.levels(qparams).clamp(-end, end)

    @property
    def grid_gives_levels(self) -> bool:
        """Whether no class has levels of its own below the one that defines `grid`."""

        def place(name: str) -> int:
            return next(i for i, one in enumerate(type(self).__mro__) if name in vars(one))

        return all(place("grid") <= place(n) for n in ("levels", "levels_within", "levels_in"))

    def inverse_steps(self, qparams: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[r, 1]: of what `even` takes the roundings by which prox maps find these levels; None
        where they are to search in `levels_in`: levels that are not evenly spaced, few of them,
        rows that `inverse_of` refuses, or whose values cannot be read."""
        if qparams.shape[-1] != self.num_qparams or not self.grid_gives_levels:
            return None
        grid = type(self).grid(self, qparams)
        return None if grid is None else inverse_of(grid.step, grid.first, self.num_levels, dtype)

    def even(self, qparams: Tensor, inverse: Tensor, dtype: torch.dtype) -> Even:
        """`levels_in`, of rows that have `inverse_steps`, as prox maps take them."""
        grid = type(self).grid(self, qparams)
        assert grid is not None
        return Even(grid.step, inverse, grid.first, self.num_levels, dtype)

    def even_in(self, qparams: Tensor, dtype: torch.dtype) -> Even | None:
        """`even` of rows that have inverse steps, None for others."""
        inverse = self.inverse_steps(qparams, dtype)
        return None if inverse is None else self.even(qparams, inverse, dtype)

    # States of versions that kept levels have no qparams to take them from: until the next fit
    # they have [..., m + k], or as they were saved [..., k].

    def with_levels(self, qparams: Tensor, levels: Tensor) -> Tensor:
        """[..., m + k]: qparams whose levels are these, whatever the qparams say."""
        return torch.cat([qparams, levels.to(qparams.dtype)], -1)

    def known_levels(self, qparams: Tensor) -> Tensor:
        """[..., k]: the levels of qparams [..., m], or those that were kept in their place.

        Raises ValueError for what is neither, such as another quantizer's.
        """
        (k, m), given = (self.num_levels, self.num_qparams), qparams.shape[-1]
        if given not in (m, k, m + k):
            raise ValueError(
                f"{self!r} has {m} qparam(s) a row, and the state {given}; a state belongs to the "
                "transformation whose init made it"
            )
        return self.levels(qparams) if given == m else qparams[..., -k:]

    def known_grid(self, qparams: Tensor) -> Grid | None:
        """The `grid` of qparams [r, m]; None too where levels were kept in their place."""
        if qparams.shape[-1] != self.num_qparams:
            return None
        return type(self).grid(self, qparams)

    def fit(self, rows: Tensor, whole: Tensor | None = None) -> Tensor:
        """Qparams [r, m] of rows [r, n], without a look at their values: in float32, of float64
        rows in float64.

        rows: [r, n], of any floating dtype.
        whole: [1, num_whole], what `whole` gives for the tensor that the rows are of; without it
        they are all of its rows. Of no meaning to quantizers without such qparams.

        A row that holds NaN or an infinity gets NaN and leaves the other rows alone; an empty row
        gets zeros. What would be infinite is the dtype's largest number.
        """
        dtype = torch.promote_types(rows.dtype, torch.float32)
        if rows.shape[-1] == 0:
            return rows.new_zeros((*rows.shape[:-1], self.num_qparams), dtype=dtype)
        # laid out in one way, for the order of a sum follows memory
        x = rows.to(dtype).contiguous()
        found = [self._fit(piece) for piece in pieces(x, 0, self.rows_at_once)]
        qparams = found[0] if len(found) == 1 else torch.cat(found)
        if self.num_whole:
            common = (self.whole(x) if whole is None else whole).expand(len(x), -1)
            qparams = torch.cat([qparams, nan_rows(common, qparams)], -1)
        if is_own(self):
            check_grid(self, type(self).grid(self, qparams))
            check_levels(self, qparams, self.levels(qparams))
        return qparams

    def _fit(self, x: Tensor) -> Tensor:
        if self.telling and is_plain(x):
            qparams = self._qparams(x)
            # max|x| is at least the first over 256, and at most n mean|x|
            least, most = (float(end) for end in qparams[:, 0].aminmax()) if len(x) else (1.0, 1.0)
            if least * (_FAR / _TELLS) > 1 and most * (_TELLS * x.shape[1]) < _FAR:
                return qparams
        top = largest(x)
        finite = top.isfinite()
        usable = concrete(finite.all())
        if not usable:
            x, top = torch.where(finite, x, 0.0), torch.where(finite, top, 0.0)
        scale = power_of_two(top)
        if self.homogeneous and concrete(((top * _FAR > 1) & (top < _FAR)).all()):
            qparams = self._qparams(x, finite)
        else:
            one, end = torch.ones_like(scale), torch.finfo(x.dtype).max
            own = self.scales[: self.num_qparams - self.num_whole]
            factors = torch.cat([scale if scales else one for scales in own], -1)
            qparams = (self._qparams(x / scale, finite) * factors).clamp(-end, end)
        return qparams if usable else torch.where(finite, qparams, torch.nan)

    def _qparams(self, x: Tensor, usable: Tensor | None = None) -> Tensor:
        m = self.num_qparams - self.num_whole
        what = "num_qparams" if self.num_qparams != self.num_levels else "num_levels"
        what = "num_qparams - num_whole" if self.num_whole else what
        qparams = self.qparams(x)
        check_tensor(self, "qparams(x)", qparams, (*x.shape[:-1], (m, what)), x)
        if usable is not None and is_own(self):
            check_finite(self, qparams, usable)
        return qparams.to(x.dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """Levels [r, k] of rows [r, n], in their dtype, sorted.

        Raises TypeError unless the rows are floating, ValueError unless they are [r, n] and,
        where values can be read (eager, on the CPU), finite.
        """
        if not isinstance(rows, Tensor):
            raise TypeError(f"{self!r} takes rows as a tensor, got {type(rows).__name__}")
        if not rows.is_floating_point():
            raise TypeError(f"{self!r} takes rows of a floating dtype, got {rows.dtype}")
        if rows.dim() != 2:
            raise ValueError(
                f"{self!r} takes rows [r, n], got shape {tuple(rows.shape)}; "
                "a granularity makes rows of a weight: per_channel().rows(weight)"
            )
        check_counts(self)
        bad = concrete((~rows.isfinite()).any(-1).sum())
        if bad:
            raise ValueError(f"{self!r} takes finite rows, got NaN or infinity in {bad} row(s)")
        return self.levels_in(self.fit(rows), rows.dtype)

    def nearest(self, rows: Tensor, levels: Tensor) -> Tensor:
        """The nearest level of each weight [r, n], a tie going to the lower level."""
        return nearest(rows, levels)


def fitted(quantizer: Any, rows: Tensor) -> Tensor:
    """Its qparams of the rows, checked as those of a subclass are where it is none."""
    qparams: Tensor = quantizer.fit(rows)
    if not isinstance(quantizer, Quantizer):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        shape = (len(rows), (quantizer.num_qparams, "num_qparams"))
        check_tensor(quantizer, "fit(rows)", qparams, shape, wide)
        check_levels(quantizer, qparams, quantizer.levels_in(qparams, qparams.dtype))
    return qparams


def under(magnitudes: Tensor, end: float, reach: float) -> Tensor:
    """Magnitudes, held so that up to `reach` times one of them is not beyond the end."""
    bound = min(end / reach * (1 - 2.0**-22), torch.finfo(magnitudes.dtype).max)  # it is rounded
    return magnitudes.clamp(max=bound)


def mirror(positive: Tensor) -> Tensor:
    """Sorted magnitudes [r, k/2] -> the levels [r, k] of both signs."""
    return torch.cat([-positive.flip(-1), positive], -1)


def nan_rows(levels: Tensor, qparams: Tensor) -> Tensor:
    """The levels [r, k], but NaN in rows whose qparams [r, m] hold one."""
    return torch.where(qparams.isnan().any(-1, keepdim=True), torch.nan, levels)
