"""A prox map is a value: what it computes, its formulas, and what it declares.

A map takes (u [r, n], levels [r, k], coefficient) and gives w [r, n]. u is the latent weight,
Q = (q_1 <= ... <= q_k) the sorted levels of its row, c_i the midpoint of the cell [q_i, q_{i+1}];
`parq_fn.proxmaps.levels` holds the search and the tie rule. Every map of this folder, one a file,
computes in float32 or better and returns u's dtype and shape; values it puts on a level are
bit-equal to it. NaN gives NaN; an infinity goes to the end level, except where the map has no
bounded range. A coefficient is a number or a 0-d tensor. TypeError and ValueError as
`levels.prepare` raises them.

A regularizer takes (w [r, n], levels [r, k], coefficient) and gives the penalty at every w:
map(u) = argmin_w (w - u)^2 / 2 + penalty(w).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from parq_fn.foundation.scalar import as_scalar, is_plain
from parq_fn.foundation.traits import Penalty, ProxTraits, unchanged
from parq_fn.foundation.value import Value, briefly, show, value
from parq_fn.proxmaps.even import Even
from parq_fn.proxmaps.levels import Levels, prepare, wide

# Formulas. At the ends of annealing a map is `clip` or `hard`; in between a specialised formula is
# cheaper than the general one, which is used where a coefficient cannot be read (batched,
# differentiated, on a device). All give the same weights, bit for bit but for
# the sign of a zero.


def no_scalars(coefficient: Tensor) -> tuple[Tensor, ...]:
    """What a formula takes of the coefficient that does without it."""
    del coefficient
    return ()


def itself(coefficient: Tensor) -> tuple[Tensor, ...]:
    """The coefficient as it is."""
    return (coefficient,)


class Formula(NamedTuple):
    """w = weight(u, levels, None, *scalars(coefficient)), of `prepare`d arguments.

    Work per coefficient (`scalars`) is separate from work per weight (`weight`), which reads and
    writes memory; only the latter is compiled.
    """

    #: (u [r, n], levels [r, k], bound, *scalars) -> w [r, n]; bound is `levels.bounds(levels)`
    #: [r, k - 1] where the caller has them, else None, and no more than a help.
    weight: Callable[..., Tensor]
    #: coefficient [] -> what weights take of it, [] each.
    scalars: Callable[[Tensor], tuple[Tensor, ...]]
    #: Whether the weight takes its arguments as `prepare` gives them.
    prepared: bool = True
    #: Smallest number of levels for which both ends of a weight's cell are looked up; None where
    #: the nearest level suffices, or none is needed.
    cells_from: int | None = None
    #: From so many levels on evenly spaced ones are better given as `Even` than as a table; None:
    #: the weight takes none.
    even_from: int | None = None

    def rounds(self, count: int) -> bool:
        """Whether so many levels are given as `Even` where they may be."""
        return self.even_from is not None and count >= self.even_from

    def __call__(self, u: Tensor, levels: Levels, coefficient: float | Tensor) -> Tensor:
        """The weights, in the dtype of u."""
        x, q, c = prepare(u, levels, coefficient)
        return self.weight(x, q, None, *self.scalars(c)).to(u.dtype)


#: The formula of a map for the value of its coefficient, None where that is not known.
Chooser = Callable[[float | None], Formula]

#: (u, lo, hi, coefficient []) -> (dw/dlo, dw/dhi), each like u: how the weight of u in the cell
#: [lo, hi] moves with the cell's ends. Of `prepare`d arguments, 0 <= u - lo or the lowest cell.
Derivatives = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def known(u: Tensor, levels: Levels, coefficient: float | Tensor) -> float | None:
    """The coefficient as the maps' dtype rounds it, None where it cannot be read or is
    differentiated."""
    c = as_scalar(coefficient)
    if not (is_plain(c) and c.numel() == 1):
        return None
    return float(c.to(wide(u, levels)))


def computed(chooser: Chooser, u: Tensor, levels: Levels, coefficient: float | Tensor) -> Tensor:
    """The weights, by the formula for that coefficient."""
    return chooser(known(u, levels, coefficient))(u, levels, coefficient)


# Maps


@value
class ProxMap(Value):
    """A prox map: called as its function, (u, levels, coefficient) -> weights, and shown by its
    name.

    function: what defines it. One without a coefficient may take one and leave it, so that a prox
        link can have it.
    traits: what it declares; whether it acts element by element is among them.
    formulas: for a known coefficient the formula that gives the same weights with less work;
        None where there is but the function.
    derivatives: of a weight in the two ends of its cell, for levels that are learned; where there
        are none, autograd is asked.

    >>> import torch
    >>> from parq_fn.foundation.traits import ProxTraits
    >>> @prox_map(ProxTraits(elementwise=True))
    ... def lowest(u, levels, coefficient=None):
    ...     return levels[..., :1].expand_as(u)
    >>> lowest(torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]])), lowest.traits.elementwise
    (tensor([[-1., -1.]]), True)
    """

    function: Callable[..., Tensor]
    traits: ProxTraits = ProxTraits()
    formulas: Chooser | None = None
    derivatives: Derivatives | None = None

    def __post_init__(self) -> None:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        own = {"__name__": name, "__qualname__": name, "__wrapped__": self.function}
        for key in ("__module__", "__qualname__", "__doc__"):
            if hasattr(self.function, key):
                own[key] = getattr(self.function, key)
        vars(self).update(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not all(isinstance(got, Tensor | Even) for got in args[:2]):
            raise TypeError(
                f"{show(self)} takes (weights [r, n], levels [r, k]) as tensors, got "
                f"{' and '.join(map(briefly, args[:2]))}"
            )
        return self.function(*args, **kwargs)

    def formula(self, coefficient: float | None) -> Formula:
        """What gives the weights at this coefficient, perhaps with less work; at any for None."""
        if self.formulas is None:
            return Formula(self._whole, itself, prepared=False)
        return self.formulas(coefficient)

    def _whole(self, u: Tensor, levels: Tensor, bound: Tensor | None, c: Tensor) -> Tensor:
        del bound
        return self.function(u, levels, c)

    @property
    def regularizer(self) -> Penalty | None:
        """What it is the prox of, where it is of anything: (w, levels, coefficient) -> penalty."""
        return self.traits.regularizer

    # A map that its module knows by its function's name is that name, printed and pickled.

    def _named(self) -> Any:
        module = sys.modules.get(self.__module__)
        return getattr(module, vars(self)["__qualname__"], None)

    def __repr__(self) -> str:
        if self._named() is self:
            return str(vars(self)["__name__"])
        own = {"formulas": self.formulas, "derivatives": self.derivatives}
        more = "".join(f", {name}={show(got)}" for name, got in own.items() if got is not None)
        return f"ProxMap({show(self.function)}, {self.traits!r}{more})"

    def __reduce__(self) -> Any:
        named = self._named()
        if named is self:
            return vars(self)["__qualname__"]
        if isinstance(named, ProxMap) and named.function is self.function:
            names = "traits", "formulas", "derivatives"
            fields = {name: getattr(self, name) for name in names}
            changes = {name: got for name, got in fields.items() if got is not getattr(named, name)}
            return _replaced, (named, changes)
        return type(self), (self.function, self.traits, self.formulas, self.derivatives)


def _replaced(map: ProxMap, changes: dict[str, Any]) -> ProxMap:
    return replace(map, **changes)


def prox_map(
    traits: ProxTraits, formulas: Chooser | None = None, derivatives: Derivatives | None = None
) -> Callable[[Callable[..., Tensor]], ProxMap]:
    """Decorator: the function as a `ProxMap` with these traits, formulas and derivatives."""

    def made(function: Callable[..., Tensor]) -> ProxMap:
        return ProxMap(function, traits, formulas, derivatives)

    return made


#: What every map of this folder but `par` declares besides its own.
follows_levels = functools.partial(
    ProxTraits,
    elementwise=True,
    fixes_levels=True,
    keeps_side=True,
    between=True,
    odd=unchanged,
    scales=unchanged,
    shifts=True,
    widens=True,
)
