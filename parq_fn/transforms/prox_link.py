"""The prox link: latent params in, quantized weights out.

    t       = count before the update
    u      <- u + updates - (lr / gamma) (u - w)      the last term with a normal map or a pull only
    q      <- quantizer.fit(u / shrink)               at t >= warmup, (t - warmup) % period == 0
    w       = map(u / shrink, levels(q), coefficient(t))     from warmup and the annealing's start

and before it, where the map made the weights, gradients g at them become those at the latents:

    g      <- gradient(g, u / shrink, w, Q, t)        with u, w and Q of before the update

Updates pass through (but for the normal map's pull), for w is computed from u and never
reconstructed from an increment. The state keeps q, the few numbers of a row that its levels follow
from; they are fitted to params + updates as they reach this link, so it stands last of what moves
its params.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import optree
import torch
from torch import Tensor

from parq_fn.foundation.checks import (
    NOT_NEGATIVE,
    POSITIVE,
    check_kind,
    check_numbers,
    check_whole,
    readable,
)
from parq_fn.foundation.scalar import Scalar, as_scalar, at, concrete, new_count, to_device
from parq_fn.foundation.traits import TransformationTraits, shared, traits_of
from parq_fn.foundation.tree import PyTree, check_floating, names_of, tree_map
from parq_fn.foundation.value import attribute, briefly, value
from parq_fn.proxmaps.proxmap import Formula, ProxMap, itself, known
from parq_fn.quantizers import Quantizer
from parq_fn.quantizers.granularity import Granularity, per_tensor
from parq_fn.quantizers.own import check_counts
from parq_fn.transforms.estimators import straight_through
from parq_fn.transforms.layout import local_row_shape, to_rows
from parq_fn.transforms.learn import check_learn, learn, learned, learner, needs_chain
from parq_fn.transforms.links import times
from parq_fn.transforms.oscillation import (
    none_held,
    observed,
    oscillation,
    with_held,
    without_held,
)
from parq_fn.transforms.prox_fit import refitted
from parq_fn.transforms.prox_pullback import pulled_back
from parq_fn.transforms.prox_state import (
    LearningState,
    ProxState,
    check_prox_state,
    part_for,
    rows_of,
    shrunk,
)
from parq_fn.transforms.rate import rate_at
from parq_fn.transforms.sharded import local, placed
from parq_fn.transforms.train import apply_updates
from parq_fn.transforms.transformation import (
    NO_RATE,
    Link,
    Transformation,
    begun,
    name_of,
)

# Defaults are got from globals: a compiler that traces a link being built can reach these, and not
# what a class keeps.
_PER_TENSOR = per_tensor()
_STRAIGHT_THROUGH = straight_through()


@value
class Prox(Link):
    """Base of the prox links: a map (`proxmap`), its coefficient at a step, a quantizer, options.

    quantizer: rows [r, n] -> qparams [r, m] -> levels [r, k].
    granularity: which weights share levels.
    period: updates from one fit of the qparams to the next.
    warmup: updates of the base optimizer alone, w = u, before the first fit.
    learning_rate: number, 0-d tensor or schedule; shrink, normal_map and pull need it. An extra
        argument `learning_rate` of `update` overrides it: a scalar, or one for each leaf's
        name, None where it is the link's.
    shrink: map and quantizer see u / max(1, sum of the learning rates), or with a normal map
        u / gamma; the latent itself stays as it is.
    normal_map: gamma > 0; the latent moves by -(lr / gamma) (u - w) besides. gamma = lr with
        plain SGD is proximal SGD, gamma -> infinity is AProx.
    pull: 0 or more, a number or schedule; the latent moves by -lr * pull * (u - w) besides:
        a normal map of gamma = 1 / pull, with 0 allowed. hard_prox with a pull and period=1 is
        decoupled CAGE. Not with normal_map or shrink.
    gradient: what becomes of gradients at the weights on their way to the latents, see
        `parq_fn.estimators`. A chain asks for it before its first link sees them.
    learn: a transformation that moves the qparams along the loss's gradient, or `learn(...)` around
        one. Qparams are fitted until the map makes the weights, and learned from the next update
        on; a row that cannot learn, its scale 0 or not finite, is still fitted where due. In the
        functional loop the link stands in a chain, which hands it the gradient; in an adapter it
        need not. The transformation gets no extra arguments.
    hold: `oscillation(threshold)`: weights whose level keeps turning back are held at the level of
        their average code, their latents get no update. For maps that act element by element.

    `init` raises TypeError for a leaf that is not floating, ValueError for one that the
    granularity cannot cut or that holds NaN or infinities (where values can be read), each with
    the leaf's name. `update` never looks at values: a row that holds NaN keeps the qparams it
    had, and the other rows are left alone; at its very first fit it gets NaN for them, and
    so for weights, until a fit finds it finite again.

    Leaves may be DTensors, on any mesh: qparams are placed as the rows are, and a rank fits and
    maps its own. A row that ranks have pieces of is fitted by one of them. A map that does not
    declare the trait elementwise needs whole rows: else ValueError, on every rank alike.

    Source: Jin et al., PARQ, arXiv 2503.15748, algorithm 1 (AProx); normal map: Qiu, Jiang,
    Milzarek, arXiv 2305.05828.
    """

    quantizer: Quantizer
    granularity: Granularity = field(default_factory=lambda: _PER_TENSOR, kw_only=True)
    period: int = field(default=10, kw_only=True)
    warmup: int = field(default=0, kw_only=True)
    learning_rate: Scalar | None = field(default=None, kw_only=True)
    shrink: bool = field(default=False, kw_only=True)
    normal_map: float | Tensor | None = field(default=None, kw_only=True)
    pull: Scalar | None = field(default=None, kw_only=True)
    gradient: Callable[..., Tensor] = field(default_factory=lambda: _STRAIGHT_THROUGH, kw_only=True)
    learn: learn | Transformation | None = field(default=None, kw_only=True)
    hold: oscillation | None = field(default=None, kw_only=True)

    rates = NO_RATE

    def __post_init__(self) -> None:
        who = type(self).__name__
        made = ("fit", "levels_in", "num_levels", "num_qparams")
        check_kind(who, self.quantizer, "a quantizer such as lsbq(2)", *made)
        check_counts(self.quantizer)
        check_kind(who, self.granularity, "a granularity such as per_channel()", "rows")
        check_whole(who, 1, period=self.period)
        check_whole(who, 0, warmup=self.warmup)
        if self.learning_rate is not None:
            check_numbers(who, NOT_NEGATIVE, schedules=True, learning_rate=self.learning_rate)
        if self.normal_map is not None:
            check_numbers(who, POSITIVE, normal_map=self.normal_map)
        if self.pull is not None:
            check_numbers(who, NOT_NEGATIVE, schedules=True, pull=self.pull)
            if self.normal_map is not None or self.shrink:
                raise ValueError(
                    f"{who}: pull stands for a normal map with gamma = 1 / pull, and is not taken "
                    "with normal_map or shrink; give one of them"
                )
        expected = "an estimator such as gradient=estimators.inside()"
        check_kind(who, self.gradient, expected, "__call__")
        if self.learn is not None:
            check_learn(who, self.learn, self.quantizer)
        if not isinstance(self.hold, oscillation | None):
            raise TypeError(f"{who}: expected hold=oscillation(...), got {briefly(self.hold)}")

    @property
    def traits(self) -> TransformationTraits:
        passes = not self.draws and self.hold is None
        hardens = self.ends is not None and readable(self.ends) is not None
        moves = shared([] if self.learn is None else [learner(self.learn).transformation])
        return TransformationTraits(
            passes, moves.leafwise, batches=moves.batches, last=True, prox=True, hardens=hardens
        )

    # What each kind of prox link gives.

    @attribute
    def begins(self) -> float | Tensor:
        """The first step whose weights the map makes, warmup aside."""
        return 0

    @attribute
    def ends(self) -> float | Tensor | None:
        """The step from which weights are levels, bit for bit; None where that is not known."""
        return None

    def coefficient(self, step: Tensor) -> Tensor:
        """The map's coefficient at a step."""
        return torch.zeros_like(step)

    @attribute
    def proxmap(self) -> Callable[..., Tensor]:
        """(latent rows [r, n], levels [r, k], coefficient []) -> weights [r, n]: a prox map, or a
        method of a subclass's own."""
        raise NotImplementedError(f"{type(self).__name__} must define proxmap")

    def formula(self, coefficient: float) -> Formula:
        """What gives the weights of `proxmap` at this coefficient, perhaps with less work.

        For those who know the coefficient and apply the map often, or compile it.
        """
        if isinstance(self.proxmap, ProxMap):
            return self.proxmap.formula(coefficient)
        return Formula(self._own, itself, prepared=False)

    def _own(self, u: Tensor, levels: Tensor, bound: Tensor | None, coefficient: Tensor) -> Tensor:
        del bound
        return self.proxmap(u, levels, coefficient)

    @attribute
    def elementwise(self) -> bool:
        """Whether a weight depends on its own latent and the levels of its row alone, so that rows
        may be cut and filled up: where the map declares it among its traits.
        """
        return bool(getattr(traits_of(self.proxmap), "elementwise", False))

    # The transformation.

    def init(self, params: PyTree) -> ProxState:
        """Nothing fitted: qparams are zeros, weights are the params."""
        who = type(self).__name__
        check_floating(params, who)

        def empty(param: Tensor, name: str) -> Tensor:
            part_for(self, param, params)
            mine = local(param)
            if concrete(mine.isfinite().all()) is False:
                raise ValueError(f"{who}: parameter {name!r} holds NaN or infinities")
            shape = *local_row_shape(param, self.granularity), self.quantizer.num_qparams
            zeros = mine.new_zeros(shape, dtype=torch.promote_types(param.dtype, torch.float32))
            return to_rows(zeros, param, self.granularity)

        count = new_count()
        leaves, spec = optree.tree_flatten(params)
        named = zip(leaves, names_of(params), strict=True)
        qparams = optree.tree_unflatten(spec, [empty(param, name) for param, name in named])
        slope, lr_sum = self._coefficient(count), count.to(torch.float64)
        if self.learn is None and self.hold is None:
            return ProxState(count, slope, lr_sum, qparams)
        learned = () if self.learn is None else begun(learner(self.learn).transformation, qparams)
        held = () if self.hold is None else none_held(params)
        state: Any = LearningState(count, slope, lr_sum, qparams, learned, held)
        return state  # type: ignore[no-any-return] # with all that a ProxState has

    def update(
        self,
        updates: PyTree,
        state: ProxState,
        params: PyTree,
        *,
        learning_rate: Scalar | Mapping[str, Scalar | None] | None = None,
        pulled: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ProxState]:
        """The updates, and the qparams of params + updates where they are due.

        updates, state, params, extra: as of every link; of extra `frozen` is what `refit` takes.
        learning_rate: in the place of the link's own.
        pulled: the gradients of the qparams, where the link learns, as `pullback` gives them.
        """
        check_prox_state(self, state)
        who, needed = name_of(self), self.shrink or self.draws
        rate = rate_at(learning_rate, state.count, params, needed, who, own=self.learning_rate)
        if self.draws:
            share = self.drawn_by(state, rate)

            def drawn(u: Tensor, p: Tensor, w: Tensor) -> Tensor:
                return u - times(p - w, share).to(u.dtype)

            updates = tree_map(drawn, updates, params, self.weights(state, params))
        learns = None if self.learn is None else self.active(state)
        state = self.advance(state, rate)
        if learns is not None:
            if pulled is None:
                raise needs_chain(self)
            if concrete(learns) is not False:
                state = learned(self, state, pulled, learns)
        if self.hold is not None:
            updates = without_held(self, updates, state)
        fits = concrete(self.due(state)) is not False  # else the fit would be thrown away
        if not fits and self.hold is None:
            return updates, state
        latents = apply_updates(params, updates)
        if fits:
            state = self.refit(state, latents, learns, frozen=extra.get("frozen", ()))
        return updates, state if self.hold is None else observed(self, state, latents)

    # The parts of an update, for adapters whose latents other code moves.

    def advance(self, state: ProxState, rate: Tensor) -> ProxState:
        """The state with the count, coefficient and sum of learning rates of the next update."""
        slope = self._coefficient(state.count)
        return state._replace(count=state.count + 1, slope=slope, lr_sum=state.lr_sum + rate)

    def due(self, state: ProxState) -> Tensor:
        """Whether qparams are due in the update that the state has advanced to."""
        step = state.count - 1
        return (step >= self.warmup) & ((step - self.warmup) % self.period == 0)

    @property
    def draws(self) -> bool:
        """Whether latents are drawn to their weights, by a normal map or a pull."""
        return self.normal_map is not None or self.pull is not None

    def drawn_by(self, state: ProxState, rate: Tensor) -> Tensor:
        """The share of u - w by which latents move to their weights in the next update."""
        if self.pull is not None:
            return rate * at(self.pull, state.count)
        assert self.normal_map is not None
        return rate / as_scalar(self.normal_map)

    def refit(
        self, state: ProxState, latents: PyTree, learns: Tensor | None = None, **extra: Any
    ) -> ProxState:
        """The state with qparams fitted to the updated latents, where they are due.

        state, latents: of this update.
        learns: whether qparams were learned in this update; then rows that are finite keep them.
        extra: frozen, names of leaves whose new qparams the caller does not take; parts.
        """
        return refitted(self, state, latents, learns, **extra)

    def active(self, state: ProxState) -> Tensor:
        """Whether the map makes the weights; else they are the params."""
        step = state.count - 1
        return (step >= self.warmup) & (step >= self.begins)

    def divisor(self, state: ProxState) -> Tensor | None:
        """What map and quantizer divide the latent by, if by anything."""
        if not self.shrink:
            return None
        if self.normal_map is not None:
            return as_scalar(self.normal_map)
        return state.lr_sum.clamp(min=1.0)

    def weights(
        self, state: ProxState, params: PyTree, *, dtype: torch.dtype | None = None
    ) -> PyTree:
        """map(params / shrink, levels, coefficient); the params before warmup and annealing.

        In that dtype, by default the params' own, to which levels are rounded before the map.
        """
        check_prox_state(self, state)
        active = self.active(state)
        known = concrete(active)
        if known is False:
            return params if dtype is None else tree_map(lambda p: p.to(dtype), params)

        def weight(param: Tensor, qparams: Tensor) -> Tensor:
            part, mine = part_for(self, param, params), local(param)
            own = dtype or mine.dtype
            if not mine.numel():
                return param.to(own)
            rows = part.granularity.rows(shrunk(mine, self.divisor(state)))
            rows = self._mapped(rows, rows_of(self, qparams, param, part), own, state.slope)
            mapped = part.granularity.restore(rows, mine).to(own)
            if not known:
                mapped = torch.where(to_device(active, mine), mapped, mine.to(own))
            return placed(mapped, param)

        made = tree_map(weight, params, state.qparams)
        return made if self.hold is None else with_held(self, state, made, params)

    def pullback(
        self, grads: PyTree, state: ProxState, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """(gradient(grads, params / shrink, weights, levels, count), own) where the map makes the
        weights, the gradients as they came elsewhere. own: the gradients of the qparams where the
        link learns, else ().

        Weights that are not given are mapped where the estimator looks at them.
        """
        check_prox_state(self, state)
        if not self.pulls_back:
            return grads, ()
        return pulled_back(self, grads, state, params, weights)

    @property
    def bends(self) -> bool:
        """Whether the estimator is another than the straight-through one."""
        return type(self.gradient) is not straight_through

    @property
    def pulls_back(self) -> bool:
        """Whether it bends gradients, or learns of them."""
        return self.bends or self.learn is not None

    def _mapped(self, u: Tensor, qparams: Tensor, dtype: torch.dtype, c: Tensor) -> Tensor:
        quantizer, proxmap = self.quantizer, self.proxmap
        if isinstance(proxmap, ProxMap) and isinstance(quantizer, Quantizer):
            even = quantizer.even_in(qparams, dtype)
            if even and (formula := proxmap.formula(known(u, even, c))).rounds(even.num_levels):
                return formula(u, even, c)
        return proxmap(u, quantizer.levels_in(qparams, dtype), c)

    def _coefficient(self, step: Tensor) -> Tensor:
        return self.coefficient(step).to(torch.float64)


# of links that were pickled before they had one
Prox.gradient, Prox.pull, Prox.learn, Prox.hold = _STRAIGHT_THROUGH, None, None, None
