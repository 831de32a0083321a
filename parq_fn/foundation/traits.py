"""Traits: what an operator declares about itself, for `parq_fn.testing` to hold it to.

A prox map carries them as an attribute `traits` (for a function see `declares`), a quantizer,
schedule or link as a property. What is not declared is not checked; an operator without traits is
held to the laws of all its kind. `help(ProxTraits)` and those of the other kinds say what each
field means, and `parq_fn.testing.laws.for_proxmap(map)` which laws follow from what is declared.

    ProxTraits    QuantizerTraits    ScheduleTraits    TransformationTraits

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
    """What a prox map f(u; Q, c) -> w declares. A field is off where it is False or None.

    u is a row's latent weights [n] (of all rows [r, n]), Q its levels [k] ([r, k]) in ascending
    order, c the coefficient, c_i the midpoint of the cell [q_i, q_{i+1}], H the nearest level.
    Fields that are functions of c give the number, or the other coefficient, at each.

    Where it is defined
        coefficients: an `Interval`, or `Slopes()`: the c that all below is declared for, and that
            inputs are drawn from; None for a map without one.
        elementwise: f(u)_j depends on u_j and its row's levels alone: rows may be cut to pieces and
            filled up, and laws of single weights apply in place of those of rows.
        widens: half-precision input is mapped in float32 and the result rounded.
    Its values
        monotone: u <= v implies f(u) <= f(v); for a map of whole rows <fu - fv, u - v> >= 0.
        in_range: q_1 <= f(u) <= q_k.
        onto_levels: f(u) is a level, bit for bit.
        fixes_levels: f(q_i) = q_i, bit for bit.
        fixes_midpoints: f(c_i) = c_i.
        keeps_side: H(f(u)) = H(u).
        between: for u within [q_1, q_k], f(u) lies between u and H(u).
        share: c -> the share of u, uniform in a cell, that lands on a level.
    How it moves
        continuous: small steps of u make small steps of f(u).
        jump: (c, width of the cell) -> f(c_i + 0) - f(c_i - 0) of a map that jumps at midpoints.
        lipschitz: c -> L with |fu - fv| <= L |u - v|.
        lipschitz_attained: L is the slope at every midpoint: none smaller will do.
        firmly_nonexpansive: <fu - fv, u - v> >= |fu - fv|^2: a prox of a convex function.
        cocoercive: c -> g with <fu - fv, u - v> >= g |fu - fv|^2.
    What it minimizes
        regularizer: r with f(u) = argmin_w |w - u|^2 / 2 + r(w; Q, c), summed over the row; it
            takes (w [r, n], Q [r, k], c) and gives [r, n], or [r, 1] of a map of whole rows.
        growth: c -> g with J(z) - J(fu) >= g |z - fu|^2, J that objective; without it g = 0.
        convex_function: phi, convex, with f(u) = argmin_w |w - a|^2 / 2 + phi(w; Q, c).
        convex_argument: (u, c) -> that a; the default: u.
    What follows from it applied twice, and from other inputs
        semigroup: (a, b) -> c with f_a(f_b(u)) = f_c(u).
        idempotent: f(f(u)) = f(u).
        sharp: the coefficient at which f = H.
        soft: the coefficient at which f is the map `soft_map`(u, Q).
        soft_map: (u, Q) -> w, that map.
        odd: c -> c' with f(-u; -Q, c') = -f(u; Q, c); `unchanged` for c' = c.
        scales: (c, a) -> c' with f(a u; a Q, c') = a f(u; Q, c), a > 0; `unchanged` for c' = c.
        shifts: f(u + a; Q + a) = f(u; Q) + a.

    >>> def penalty(w, levels, c):  # soft-thresholding, the prox of c |w|
    ...     return c * w.abs()
    >>> traits = ProxTraits(coefficients=Interval(0.0, 10.0), elementwise=True, regularizer=penalty)
    >>> @declares(traits)
    ... def soft_threshold(u, levels, c):
    ...     return u.sign() * (u.abs() - c).clamp(min=0)
    >>> from parq_fn.testing import check_proxmap
    >>> check_proxmap(soft_threshold, max_examples=5)
    """

    coefficients: Interval | Slopes | None = None
    elementwise: bool = False
    monotone: bool = True
    in_range: bool = False
    onto_levels: bool = False
    fixes_levels: bool = False
    fixes_midpoints: bool = False
    continuous: bool = False
    jump: Callable[[Coefficient, float], float] | None = None
    lipschitz: Callable[[Coefficient], float] | None = None
    lipschitz_attained: bool = False
    firmly_nonexpansive: bool = False
    cocoercive: Callable[[Coefficient], float] | None = None
    regularizer: Penalty | None = None
    growth: Callable[[Coefficient], float] | None = None
    convex_function: Penalty | None = None
    convex_argument: Callable[[Tensor, Coefficient], Tensor] = unchanged
    semigroup: Callable[[Coefficient, Coefficient], Coefficient] | None = None
    idempotent: bool = False
    keeps_side: bool = False
    between: bool = False
    sharp: float | None = None
    soft: float | None = None
    soft_map: Callable[[Tensor, Tensor], Tensor] | None = None
    odd: Callable[[Coefficient], Coefficient] | None = None
    scales: Callable[[Coefficient, float], Coefficient] | None = None
    shifts: bool = False
    share: Callable[[Coefficient], float] | None = None
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
    """What a quantizer, rows x [r, n] -> levels Q [r, k], declares. A field is off where it is
    False, None or ().

    The form of its levels
        symmetric: Q = -Q.
        includes_zero: 0 is a level, bit for bit, of every row; "only_if_spanned": of every row with
            min(x) <= 0 <= max(x).
        evenly_spaced: its `grid` gives the levels, a step times first, first + 1, ..., last.
        parts: x -> v_1, ..., v_b, each [r, 1], of which the levels are all sums of +-v_i, and each
            of which is the mean magnitude of what those before it left.
    How well they fit
        optimal: no levels do better: "free", of any form; "symmetric", of the form Q = -Q;
            "ternary", of the form -v, 0, v.
        levels_are_means: every level is the mean of what it stands for:
            |x|^2 = |w|^2 + |x - w|^2, w the nearest levels.
        no_worse_than: quantizers whose squared error is at least as large on every row.
        exact_on_constants: a constant row is reproduced.
        idempotent: a quantized row is reproduced.
    What follows from other rows
        scale: Q(a x) = a Q(x), a > 0.
        scale_exact: and for a power of two bit for bit.
        sign: Q(-x) = -Q(x).
        shift: Q(x + a) = Q(x) + a.
        permutation: the order of a row's entries does not matter.
        repetition: nor does how often all of them are repeated.
        ambiguous: the optimum may not be unique, so that rounding chooses: then these symmetries
            compare errors, not levels.
        whole: its last qparams are of the whole tensor: what is given to it together counts.
        widens: half-precision rows are quantized in float32 and the levels rounded.

    >>> QuantizerTraits(symmetric=True, scale=True)
    QuantizerTraits(symmetric=True, scale=True)
    """

    symmetric: bool = False
    includes_zero: bool | Literal["only_if_spanned"] = False
    optimal: Literal["free", "symmetric", "ternary"] | None = None
    levels_are_means: bool = False
    ambiguous: bool = False
    whole: bool = False
    evenly_spaced: bool = False
    exact_on_constants: bool = False
    idempotent: bool = False
    scale: bool = False
    scale_exact: bool = False
    sign: bool = False
    shift: bool = False
    permutation: bool = True
    repetition: bool = False
    parts: Callable[[Tensor], list[Tensor]] | None = None
    no_worse_than: tuple[Any, ...] = ()
    widens: bool = False


@value
class ScheduleTraits(Value):
    """What a schedule, step -> number, declares. The defaults are an annealing's: from 1 down to 0.

    start, end: the steps between which it changes; None: 0 and 10, or what the check is given.
    low, high: least and largest value; None: not bounded.
    first, last: the value up to the start, and from the end on; None: any.
    monotone: "nonincreasing", "nondecreasing", or None.
    lands: continuous at the end: what it tends to is what it is from there on.
    antisymmetric: s(start + d) + s(end - d) = s(start) + s(end).
    moved: (start, end) -> the same schedule between other steps: it depends on progress only.
    line: the softest of its family, a straight line.
    step: the sharpest of its family, a step at progress `step_at`.
    step_at: where that steps, in [0, 1].

    >>> ScheduleTraits(first=0.0, last=1.0, monotone="nondecreasing")
    ScheduleTraits(first=0.0, last=1.0, monotone='nondecreasing')
    """

    start: float | None = None
    end: float | None = None
    low: float | None = 0.0
    high: float | None = 1.0
    first: float | None = 1.0
    last: float | None = 0.0
    monotone: Literal["nonincreasing", "nondecreasing"] | None = "nonincreasing"
    lands: bool = True
    antisymmetric: bool = False
    moved: Callable[[float, float], Callable[[Any], Tensor]] | None = None
    line: Callable[[Any], Tensor] | None = None
    step: Callable[[Any], Tensor] | None = None
    step_at: float = 0.5


@value
class TransformationTraits(Value):
    """What a transformation declares. A field is off where it is False.

    passes_updates: the updates that come out are the ones that went in, bit for bit.
    leafwise: a leaf is treated alike whatever other leaves there are, so that adapters may update a
        few parameters at a time.
    plain_weights: the params are also the weights, at every step.
    keeps_none: updates of no gradient are None.
    batches: it can be run under torch.vmap.
    last: it looks at params + updates: what stands behind it in a chain must let updates pass.
    pulls_back_inside: it pulls gradients back in its own update: what stands before it in a chain
        must let updates pass.
    prox: it is a prox link of `parq_fn.transforms.prox_link`, with its state's fields.
    hardens: it is one whose weights are levels from a step on that is known.

    >>> from parq_fn import clip
    >>> clip(1.0).traits
    TransformationTraits(leafwise=True, plain_weights=True)
    """

    passes_updates: bool = False
    leafwise: bool = False
    plain_weights: bool = False
    keeps_none: bool = True
    batches: bool = True
    last: bool = False
    pulls_back_inside: bool = False
    prox: bool = False
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


def tells_of(operator: Any, *methods: str) -> bool:
    """Whether its traits come from the class that defines these methods, not from a parent that
    behaves differently."""
    order = type(operator).__mro__
    traits, *others = (
        next((i for i, cls in enumerate(order) if name in vars(cls)), len(order))
        for name in ("traits", *methods)
    )
    return traits <= min(others)


def traits_of(operator: Any) -> Any:
    """The traits that an operator declares, or None.

    >>> from parq_fn import proxmaps
    >>> traits_of(proxmaps.hard).idempotent, traits_of(len)
    (True, None)
    """
    return getattr(operator, "traits", None)
