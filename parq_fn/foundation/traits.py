"""Traits: what an operator declares about itself, for `parq_fn.testing` to hold it to.

A prox map carries them as an attribute `traits` (for a function see `declares`), a quantizer or
schedule as a property. What is not declared is not checked; an operator without traits is held to
the laws of all its kind.

In what follows c is the map's coefficient, u the latent weight, Q = (q_1 <= ... <= q_k) its
levels and H the nearest level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from torch import Tensor

from parq_fn.foundation.checks import Interval
from parq_fn.foundation.value import Value, value

_F = TypeVar("_F", bound=Callable[..., Any])

#: A map's coefficient: a number, the slopes of `par`, or None for a map without one.
Coefficient = Any
#: (w, levels, coefficient) -> penalty.
Penalty = Callable[[Tensor, Tensor, Coefficient], Tensor]


@value
class Slopes(Value):
    """Nondecreasing slopes, one for each cell: [r, k-1], or [r, k+1] with the outer ones."""


def unchanged(coefficient: Coefficient, *_: Any) -> Coefficient:
    """The coefficient itself: of a map that commutes with scaling or reflection as it is."""
    return coefficient


@value
class ProxTraits(Value):
    """What a prox map f(u; Q, c) declares. A field is off where it is False or None."""

    #: The coefficients that everything below is declared for; None for a map without one.
    coefficients: Interval | Slopes | None = None
    #: f(u)_j depends on u_j and its row's levels alone: rows may be cut to pieces and filled up.
    elementwise: bool = False
    #: u <= v implies f(u) <= f(v).
    monotone: bool = True
    #: q_1 <= f(u) <= q_k.
    in_range: bool = False
    #: f(u) is a level, bit for bit.
    onto_levels: bool = False
    #: f(q_i) = q_i, bit for bit.
    fixes_levels: bool = False
    #: f(c_i) = c_i, c_i the midpoint of a cell.
    fixes_midpoints: bool = False
    continuous: bool = False
    #: (c, width of the cell) -> f(c_i + 0) - f(c_i - 0) of a map that jumps.
    jump: Callable[[Coefficient, float], float] | None = None
    #: c -> the Lipschitz constant.
    lipschitz: Callable[[Coefficient], float] | None = None
    #: The Lipschitz constant is the slope at every midpoint: none smaller will do.
    lipschitz_attained: bool = False
    #: (fu - fv)(u - v) >= (fu - fv)^2.
    firmly_nonexpansive: bool = False
    #: c -> g with (fu - fv)(u - v) >= g (fu - fv)^2.
    cocoercive: Callable[[Coefficient], float] | None = None
    #: r with f(u) = argmin_w (w - u)^2 / 2 + r(w; Q, c).
    regularizer: Penalty | None = None
    #: c -> g with J(z) - J(fu) >= g (z - fu)^2, J that objective; without it g = 0.
    growth: Callable[[Coefficient], float] | None = None
    #: phi convex and affine between levels with f(u) = argmin_w (w - a)^2 / 2 + phi(w; Q, c),
    #: a = convex_argument(u, c).
    convex_function: Penalty | None = None
    convex_argument: Callable[[Tensor, Coefficient], Tensor] = unchanged
    #: (a, b) -> c with f_a(f_b(u)) = f_c(u).
    semigroup: Callable[[Coefficient, Coefficient], Coefficient] | None = None
    idempotent: bool = False
    #: H(f(u)) = H(u).
    keeps_side: bool = False
    #: For u within [q_1, q_k], f(u) lies between u and H(u).
    between: bool = False
    #: The coefficient at which f = H.
    sharp: float | None = None
    #: The coefficient at which f is the map `soft_map`(u, Q).
    soft: float | None = None
    soft_map: Callable[[Tensor, Tensor], Tensor] | None = None
    #: c -> c' with f(-u; -Q, c') = -f(u; Q, c).
    odd: Callable[[Coefficient], Coefficient] | None = None
    #: (c, a) -> c' with f(a u; a Q, c') = a f(u; Q, c), a > 0.
    scales: Callable[[Coefficient, float], Coefficient] | None = None
    #: f(u + a; Q + a) = f(u; Q) + a.
    shifts: bool = False
    #: c -> the share of u, uniform in a cell, that lands on a level.
    share: Callable[[Coefficient], float] | None = None
    #: Half-precision input is mapped in float32 and the result rounded.
    widens: bool = False


def declares(traits: ProxTraits) -> Callable[[_F], _F]:
    """Decorator: a map that declares these traits.

    >>> @declares(ProxTraits(idempotent=True))
    ... def first_level(u, levels):
    ...     return levels[..., :1].expand_as(u)
    >>> first_level.traits.idempotent
    True
    """

    def declare(f: _F) -> _F:
        f.traits = traits  # type: ignore[attr-defined] # a function takes any
        return f

    return declare


@value
class QuantizerTraits(Value):
    """What a quantizer, rows x [r, n] -> levels Q [r, k], declares."""

    #: Q = -Q.
    symmetric: bool = False
    #: 0 is a level, bit for bit, of every row (only_if_spanned: with min(x) <= 0 <= max(x)).
    includes_zero: bool | Literal["only_if_spanned"] = False
    #: No levels do better: of any form, of the form Q = -Q, or of the form -v, 0, v.
    optimal: Literal["free", "symmetric", "ternary"] | None = None
    #: Every level is the mean of what it stands for: |x|^2 = |w|^2 + |x - w|^2.
    levels_are_means: bool = False
    #: The optimum may not be unique, so that rounding chooses: then the symmetry laws below compare
    #: errors, not levels.
    ambiguous: bool = False
    #: Its last qparams are of the whole tensor: what is given to it together counts.
    whole: bool = False
    #: Its `grid` gives the levels, a step times first, first + 1, ..., last.
    evenly_spaced: bool = False
    #: A constant row is reproduced.
    exact_on_constants: bool = False
    #: A quantized row is reproduced.
    idempotent: bool = False
    #: Q(a x) = a Q(x), a > 0; for a power of two bit for bit, with `scale_exact`.
    scale: bool = False
    scale_exact: bool = False
    #: Q(-x) = -Q(x).
    sign: bool = False
    #: Q(x + a) = Q(x) + a.
    shift: bool = False
    #: The order of a row's entries does not matter.
    permutation: bool = True
    #: Nor does how often all of them are repeated.
    repetition: bool = False
    #: x -> v_1, ..., v_b, each [r, 1], of which the levels are all sums of +-v_i, and each of
    #: which is the mean magnitude of what those before it left.
    parts: Callable[[Tensor], list[Tensor]] | None = None
    #: Quantizers whose squared error is at least as large on every row.
    no_worse_than: tuple[Any, ...] = ()
    #: Half-precision rows are quantized in float32 and the levels rounded.
    widens: bool = False


@value
class ScheduleTraits(Value):
    """What a schedule declares. The defaults are an annealing's: from 1 down to 0."""

    start: float | None = None
    end: float | None = None
    #: Least and largest value.
    low: float | None = 0.0
    high: float | None = 1.0
    #: The value up to the start, and from the end on.
    first: float | None = 1.0
    last: float | None = 0.0
    monotone: Literal["nonincreasing", "nondecreasing"] | None = "nonincreasing"
    #: Continuous at the end: what it tends to is what it is from there on.
    lands: bool = True
    #: s(start + d) + s(end - d) = s(start) + s(end).
    antisymmetric: bool = False
    #: (start, end) -> the same schedule between other steps: it depends on progress only.
    moved: Callable[[float, float], Callable[[Any], Tensor]] | None = None
    #: The softest of the family, a straight line; the sharpest, a step at progress `step_at`.
    line: Callable[[Any], Tensor] | None = None
    step: Callable[[Any], Tensor] | None = None
    step_at: float = 0.5


@value
class TransformationTraits(Value):
    """What a transformation declares."""

    #: The updates that come out are the ones that went in, bit for bit.
    passes_updates: bool = False
    #: A leaf is treated alike whatever other leaves there are.
    leafwise: bool = False
    #: The params are also the weights, at every step.
    plain_weights: bool = False
    #: Updates of no gradient are None.
    keeps_none: bool = True
    #: It can be run under torch.vmap.
    batches: bool = True
    #: It looks at params + updates: what stands behind it in a chain must let updates pass.
    last: bool = False
    #: It pulls gradients back in its own update: what stands before it in a chain must let updates
    #: pass.
    pulls_back_inside: bool = False
    #: It is a prox link of `parq_fn.transforms.prox_link`, with its state's fields.
    prox: bool = False
    #: It is one whose weights are levels from a step on that is known.
    hardens: bool = False


#: Of a link that treats every leaf alike and alone, and leaves weights to be the params.
PER_LEAF = TransformationTraits(leafwise=True, plain_weights=True)


def shared(transformations: Iterable[Any]) -> TransformationTraits:
    """What a composition declares: what every one of its parts does.

    >>> from parq_fn import clip, clip_by_global_norm
    >>> shared([clip(1.0), clip_by_global_norm(1.0)])
    TransformationTraits(plain_weights=True)
    """
    parts = [traits_of(t) or TransformationTraits() for t in transformations]
    return TransformationTraits(
        passes_updates=all(p.passes_updates for p in parts),
        leafwise=all(p.leafwise for p in parts),
        plain_weights=all(p.plain_weights for p in parts),
        keeps_none=all(p.keeps_none for p in parts),
        batches=all(p.batches for p in parts),
        last=any(p.last for p in parts),
        pulls_back_inside=any(p.pulls_back_inside for p in parts),
    )


def traits_of(operator: Any) -> Any:
    """The traits that an operator declares, or None.

    >>> from parq_fn import proxmaps
    >>> traits_of(proxmaps.hard).idempotent, traits_of(len)
    (True, None)
    """
    return getattr(operator, "traits", None)
