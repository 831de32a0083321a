"""Lion: the sign of an average of gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.checks import DECAY, NOT_NEGATIVE, check_numbers
from parq_fn.foundation.scalar import Scalar, at, new_count
from parq_fn.foundation.traits import PER_LEAF
from parq_fn.foundation.tree import PyTree, check_floating, check_match, tree_map
from parq_fn.foundation.value import state_class, value
from parq_fn.transforms.chain import Chain, Composite, chain
from parq_fn.transforms.links import add_decayed_weights, scale_by_learning_rate, times
from parq_fn.transforms.optimizers import off
from parq_fn.transforms.transformation import NO_RATE, Link, check_state


@state_class
class LionState(NamedTuple):
    """State of `scale_by_lion`."""

    step: Tensor  # [], int64: updates so far
    mean: PyTree  # like params: running mean of the updates


@value
class scale_by_lion(Link):
    """updates -> sign(b1 m + (1 - b1) u); m <- b2 m + (1 - b2) u.

    >>> import torch
    >>> link, params = scale_by_lion(), {"w": torch.zeros(2)}
    >>> link.update({"w": torch.tensor([0.1, -3.0])}, link.init(params), params)[0]
    {'w': tensor([ 1., -1.])}

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675,
    algorithm 2.
    """

    #: Decay of the mean, where the direction is taken.
    b1: Scalar = 0.9
    #: Decay of the mean that is kept.
    b2: Scalar = 0.99
    traits = PER_LEAF
    rates = NO_RATE

    def __post_init__(self) -> None:
        check_numbers("scale_by_lion", DECAY, schedules=True, b1=self.b1, b2=self.b2)

    def init(self, params: PyTree) -> LionState:
        """Zeros."""
        check_floating(params, "scale_by_lion")
        return LionState(new_count(), tree_map(torch.zeros_like, params))

    def update(
        self, updates: PyTree, state: LionState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, LionState]:
        del params, extra
        check_state(self, state, LionState)
        b1, b2 = (at(b, state.step) for b in (self.b1, self.b2))

        def mean(m: Tensor, u: Tensor, b: Tensor) -> Tensor:
            return times(m, b) + times(u, 1.0 - b).to(m.dtype)

        def kept(m: Tensor, u: Tensor | None) -> Tensor:
            if u is not None and u.shape != m.shape:
                check_match(updates, state.mean, "scale_by_lion")
            return m if u is None else mean(m, u, b2)

        new = tree_map(kept, state.mean, updates)
        out = tree_map(lambda u, m: mean(m, u, b1).sign().to(u.dtype), updates, state.mean)
        return out, LionState(state.step + 1, new)


@value
class lion(Composite):
    """p <- p - lr * (sign(b1 m + (1 - b1) g) + weight_decay * p); m <- b2 m + (1 - b2) g.

    Learning rate, decays and weight decay are numbers, 0-d tensors or schedules. Every weight moves
    by the learning rate, so that it is to be a third to a tenth of Adam's, and the weight decay as
    much larger. Raises ValueError for negative values and for b1 and b2 outside [0, 1).

    >>> import torch
    >>> from parq_fn import apply_updates, lion
    >>> params, optimizer = {"w": torch.ones(2)}, lion(0.25)
    >>> grads = {"w": torch.tensor([0.1, -3.0])}
    >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    >>> apply_updates(params, updates)
    {'w': tensor([0.7500, 1.2500])}

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
    """

    #: A number, a 0-d tensor or a schedule.
    learning_rate: Scalar
    #: Decay of the mean, where the direction is taken.
    b1: Scalar = 0.9
    #: Decay of the mean that is kept.
    b2: Scalar = 0.99
    #: A number, a 0-d tensor or a schedule.
    weight_decay: Scalar = 0.0

    def __post_init__(self) -> None:
        check_numbers("lion", DECAY, schedules=True, b1=self.b1, b2=self.b2)
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        check_numbers("lion", NOT_NEGATIVE, schedules=True, **rates)

    pulls_back = False

    def expand(self) -> Chain:
        """scale_by_lion, [add_decayed_weights,] scale_by_learning_rate."""
        decay = () if off(self.weight_decay) else (add_decayed_weights(self.weight_decay),)
        rate = scale_by_learning_rate(self.learning_rate)
        return chain(scale_by_lion(self.b1, self.b2), *decay, rate)
