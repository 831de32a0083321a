"""Links around a whole transformation, which decide whether it updates at all.

The prox link inside stands still with the rest: its count, slope and levels are those of the
updates that were made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.scalar import concrete, new_count, to_device
from parq_fn.foundation.traits import TransformationTraits, shared
from parq_fn.foundation.tree import (
    PyTree,
    check_floating,
    check_match,
    check_plain,
    select,
    tree_leaves,
    tree_map,
)
from parq_fn.foundation.value import changed, state_class, value
from parq_fn.transforms.sharded import gathered
from parq_fn.transforms.transformation import (
    ANY_RATES,
    Link,
    Rates,
    Transformation,
    begun,
    check_state,
    check_transformation,
    handed,
    in_place,
    pull_back,
    pulled_update,
    pulls_back,
    rates_of,
    updated,
    wrong_state,
)


def wide(leaf: Tensor) -> torch.dtype:
    """The dtype of what is kept of a leaf over many updates: float32 or better."""
    return torch.promote_types(leaf.dtype, torch.float32)


def copies(kept: PyTree, params: PyTree, updates: Tensor) -> PyTree:
    """What a link keeps of params over many updates; before its first they are those of now, which
    may have been loaded since its `init`."""
    first = updates == 0
    known = concrete(first)
    if known is False:
        return kept
    now = tree_map(lambda old, p: p.to(old.dtype, copy=True), kept, params)
    return now if known else select(first, now, kept)


@value
class Around(Link):
    """Base of these links: one transformation, and a state that has its state as `inner`."""

    #: What it wraps, such as a whole chain.
    inner: Transformation

    def __post_init__(self) -> None:
        check_transformation(self.inner, f"the inner transformation of {type(self).__name__}")

    def _check_state(self, state: Any) -> None:
        if not hasattr(state, "inner"):
            raise TypeError(wrong_state(self, state, "the one that its init gave"))

    def weights(self, state: Any, params: PyTree) -> PyTree:
        """The inner weights."""
        self._check_state(state)
        return self.inner.weights(state.inner, params)

    def pullback(
        self, grads: PyTree, state: Any, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """The inner pullback."""
        return pull_back(self.inner, grads, state.inner, params, weights)

    @property
    def pulls_back(self) -> bool:
        """Whether the inner transformation does."""
        return pulls_back(self.inner)

    @property
    def rates(self) -> Rates:
        """Those of the inner transformation."""
        return rates_of(self.inner)

    def children(self) -> dict[str, Transformation]:
        """The inner transformation."""
        return {"inner": self.inner}

    def with_children(self, children: Mapping[str, Transformation]) -> Transformation:
        """The same around another transformation."""
        (inner,) = in_place(self, children)
        return changed(self, inner=inner)

    def child_states(self, state: Any) -> dict[str, PyTree]:
        """The inner state."""
        self._check_state(state)
        return {"inner": state.inner}


def check_no_prox(who: str, inner: Transformation) -> None:
    """Raises ValueError for an inner transformation that looks at params + updates, which a link
    changes afterwards."""
    if shared([inner]).last:
        raise ValueError(
            f"{who}: the inner transformation {inner!r} looks at params + updates, as prox links "
            f"and averages do, and {who} changes these; put it behind: "
            f"chain({who}(...), parq_prox(...))"
        )


@state_class
class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    waiting: Tensor  # [], int64: calls since the last one that updated
    total: PyTree  # like params, in float32 or better: sum of the updates since then
    inner: PyTree  # the inner state


@value
class accumulate(Around):
    """Gradient accumulation: one inner update with the mean of every `steps` updates.

    On the calls between, updates are zeros and the inner state stands still, so the schedule,
    the warmup and the period of a prox link inside count inner updates. A missing gradient
    (None) counts as zeros. `flush` makes the update with what has been gathered before that. Wrap
    the whole chain: gradients at the weights are summed as they are,
    and the inner transformation pulls back their mean.

    Raises ValueError unless steps is a whole number from 1 on.

    >>> import torch
    >>> from parq_fn import accumulate, sgd
    >>> transform, params = accumulate(sgd(1.0), 2), {"w": torch.zeros(1)}
    >>> state = transform.init(params)
    >>> first, state = transform.update({"w": torch.tensor([1.0])}, state, params)
    >>> second, state = transform.update({"w": torch.tensor([3.0])}, state, params)
    >>> first, second
    ({'w': tensor([0.])}, {'w': tensor([-2.])})
    """

    #: Calls of one update.
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("accumulate", 1, steps=self.steps)

    @property
    def traits(self) -> TransformationTraits:
        """Those of the inner transformation, but that updates wait and None counts as zeros."""
        own = shared([self.inner])
        inside = own.pulls_back_inside or pulls_back(self.inner)
        return replace(own, passes_updates=False, keeps_none=False, pulls_back_inside=inside)

    def init(self, params: PyTree) -> AccumulateState:
        """Zeros and the inner state."""
        check_floating(params, "accumulate")
        zeros = tree_map(lambda p: torch.zeros_like(p, dtype=wide(p)), params)
        return AccumulateState(new_count(), zeros, begun(self.inner, params))

    def update(
        self, updates: PyTree, state: AccumulateState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, AccumulateState]:
        check_state(self, state, AccumulateState)
        check_match(updates, params, "accumulate")
        count = state.waiting + 1
        due = count >= self.steps
        total = tree_map(lambda t, u: t if u is None else t + u.to(t.dtype), state.total, updates)
        zeros = tree_map(torch.zeros_like, params)
        if concrete(due) is False:  # the work of a step that would be thrown away
            return zeros, AccumulateState(count, total, state.inner)
        mean = tree_map(lambda t, p: (t / self.steps).to(p.dtype), total, params)
        out, inner = pulled_update(self.inner, mean, state.inner, params, **extra)
        return select(due, out, zeros), AccumulateState(
            torch.where(due, 0, count),
            select(due, tree_map(torch.zeros_like, total), total),
            select(due, inner, state.inner),
        )

    def flush(
        self, state: AccumulateState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, AccumulateState]:
        """The inner update with the mean of what was gathered since the last one, though that be
        fewer calls, as at the end of an epoch; zeros and the same state where it was nothing.

        >>> import torch
        >>> from parq_fn import accumulate, sgd
        >>> transform, params = accumulate(sgd(1.0), 4), {"w": torch.zeros(1)}
        >>> _, state = transform.update({"w": torch.tensor([3.0])}, transform.init(params), params)
        >>> transform.flush(state, params)[0]
        {'w': tensor([-3.])}
        """
        check_state(self, state, AccumulateState)
        check_plain(params, "accumulate")
        count = state.waiting.clamp(min=1)

        def mean(total: Tensor, param: Tensor) -> Tensor:
            return (total / to_device(count, total)).to(param.dtype)

        gathered_so_far = tree_map(mean, state.total, params)
        out, inner = pulled_update(self.inner, gathered_so_far, state.inner, params, **extra)
        due = state.waiting > 0
        return select(due, out, tree_map(torch.zeros_like, out)), AccumulateState(
            torch.zeros_like(state.waiting),
            tree_map(torch.zeros_like, state.total),
            select(due, inner, state.inner),
        )

    def pullback(
        self, grads: PyTree, state: Any, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """(grads, ()): the mean is pulled back, when its update is made."""
        del state, params, weights
        return grads, ()

    pulls_back = False

    @property
    def rates(self) -> Rates:
        """Those of the inner transformation, but that with a prox link inside all begins anew with
        the mean."""
        return ANY_RATES if shared([self.inner]).last else rates_of(self.inner)


@state_class
class FiniteState(NamedTuple):
    """State of `apply_if_finite`."""

    skipped: Tensor  # [], int64: calls skipped so far
    inner: PyTree  # the inner state


@state_class
class LimitedState(NamedTuple):
    """State of `apply_if_finite` with a limit."""

    skipped: Tensor  # [], int64: calls skipped so far
    inner: PyTree  # the inner state
    consecutive: Tensor  # [], int64: calls that were not finite, the last in a row


@value
class apply_if_finite(Around):
    """The inner update where every element of the updates, pulled back, is finite; otherwise zeros.

    A skipped call leaves the inner state as it was, levels and counts of a prox link included,
    and is counted in `skipped`. Wrap the whole chain.

    After `limit` such calls in a row the next are made as they are, until one is finite again:
    what is not finite spoils the params, so that the training ends there and not in skipping for
    ever. (To raise would be no pure function; `read(state, "consecutive")` tells how many it
    were.) Raises ValueError unless the limit is None or a whole number from 0 on.

    >>> import torch
    >>> from parq_fn import apply_if_finite, sgd
    >>> transform, params = apply_if_finite(sgd(1.0), limit=1), {"w": torch.zeros(1)}
    >>> state, grads = transform.init(params), {"w": torch.tensor([torch.nan])}
    >>> first, state = transform.update(grads, state, params)
    >>> second, state = transform.update(grads, state, params)
    >>> first, second, state.consecutive
    ({'w': tensor([0.])}, {'w': tensor([nan])}, tensor(2))
    """

    #: The most calls skipped in a row; None for no limit.
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            check_whole("apply_if_finite", 0, limit=self.limit)

    rates = Around.rates

    @property
    def traits(self) -> TransformationTraits:
        """Those of the inner transformation, but that one leaf holds up the others."""
        return replace(shared([self.inner]), passes_updates=False, leafwise=False)

    def init(self, params: PyTree) -> FiniteState | LimitedState:
        """The inner state, nothing skipped."""
        check_plain(params, "apply_if_finite")
        if self.limit is None:
            return FiniteState(new_count(), begun(self.inner, params))
        return LimitedState(new_count(), begun(self.inner, params), new_count())

    def update(
        self,
        updates: PyTree,
        state: FiniteState | LimitedState,
        params: PyTree,
        *,
        pulled: PyTree = (),
        **extra: Any,
    ) -> tuple[PyTree, FiniteState | LimitedState]:
        check_state(self, state, FiniteState if self.limit is None else LimitedState)
        if params is not None:
            check_match(updates, params, "apply_if_finite")
        if not handed(pulled):
            found, pulled = pull_back(self.inner, updates, state.inner, params)
            if handed(pulled):  # the inner transformation would do it; of others a chain has
                updates = found
        finite = torch.ones((), dtype=torch.bool, device="cpu")
        for leaf in tree_leaves((updates, pulled)):
            if not leaf.is_meta:  # which holds no values, and counts as finite
                finite = to_device(finite, leaf) & gathered(leaf.isfinite().all())
        out, inner = updated(self.inner, updates, state.inner, params, **handed(pulled), **extra)
        zeros = tree_map(torch.zeros_like, out)
        made = finite
        more: dict[str, Tensor] = {}
        if isinstance(state, LimitedState) and self.limit is not None:
            row = torch.where(to_device(finite, state.consecutive), 0, state.consecutive + 1)
            made, more = finite | to_device(row > self.limit, finite), {"consecutive": row}
        skipped = state.skipped + to_device((~made).to(torch.int64), state.skipped)
        kept = select(made, inner, state.inner)
        return select(made, out, zeros), state._replace(skipped=skipped, inner=kept, **more)
