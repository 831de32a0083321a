"""Optimizers: chains of links, equal to torch.optim's step for step."""

from __future__ import annotations

from parq_fn.foundation.checks import DECAY, NOT_NEGATIVE, check_numbers
from parq_fn.foundation.scalar import Scalar, is_number
from parq_fn.foundation.value import value
from parq_fn.transforms.chain import Chain, Composite, chain
from parq_fn.transforms.links import (
    add_decayed_weights,
    scale_by_adam,
    scale_by_learning_rate,
    trace,
)


def off(hyperparameter: object) -> bool:
    """Whether it is the number 0, so that its link is left out."""
    return is_number(hyperparameter) and hyperparameter == 0


@value
class sgd(Composite):
    """g <- g + weight_decay * p; m <- momentum * m + (1 - dampening) * g; p <- p - lr * m.

    With nesterov the step takes g + momentum * m. Learning rate and weight decay are numbers,
    0-d tensors or schedules. Equal to torch.optim.SGD.

    Raises ValueError for negative values, and for nesterov without momentum or with dampening.

    >>> import torch
    >>> from parq_fn import apply_updates, sgd
    >>> params, optimizer = {"w": torch.ones(1)}, sgd(0.1, momentum=0.9)
    >>> updates, state = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> apply_updates(params, updates)
    {'w': tensor([0.9000])}
    """

    #: A number, a 0-d tensor or a schedule.
    learning_rate: Scalar
    #: Decay of the momentum buffer; 0 is none.
    momentum: Scalar = 0.0
    #: 1 less the share of a new gradient.
    dampening: Scalar = 0.0
    #: Added to gradients, times the params.
    weight_decay: Scalar = 0.0
    #: Whether Nesterov's momentum is taken.
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_numbers(
            "sgd",
            NOT_NEGATIVE,
            schedules=True,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        check_numbers("sgd", schedules=True, dampening=self.dampening)
        if self.nesterov and (off(self.momentum) or not off(self.dampening)):
            raise ValueError(
                "sgd: nesterov takes a momentum and no dampening, got "
                f"momentum={self.momentum}, dampening={self.dampening}"
            )

    pulls_back = False

    def expand(self) -> Chain:
        """[add_decayed_weights,] [trace,] scale_by_learning_rate."""
        decay = () if off(self.weight_decay) else (add_decayed_weights(self.weight_decay),)
        momentum = (trace(self.momentum, self.dampening, self.nesterov),)
        rate = scale_by_learning_rate(self.learning_rate)
        return chain(*decay, *(() if off(self.momentum) else momentum), rate)


@value
class adam(Composite):
    """Adam with an L2 penalty: g <- g + weight_decay * p before `scale_by_adam`.

    Learning rate and weight decay are numbers, 0-d tensors or schedules. Equal to
    torch.optim.Adam. Raises ValueError for negative values and betas outside [0, 1).
    """

    #: A number, a 0-d tensor or a schedule.
    learning_rate: Scalar = 1e-3
    #: Decay of the mean of gradients.
    b1: Scalar = 0.9
    #: Decay of the mean of their squares.
    b2: Scalar = 0.999
    #: Added to the root.
    eps: Scalar = 1e-8
    #: A number, a 0-d tensor or a schedule.
    weight_decay: Scalar = 0.0
    #: Whether the largest mean square so far is taken.
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check_adam(self)

    pulls_back = False

    def expand(self) -> Chain:
        """[add_decayed_weights,] scale_by_adam, scale_by_learning_rate."""
        decay = () if off(self.weight_decay) else (add_decayed_weights(self.weight_decay),)
        moments = scale_by_adam(self.b1, self.b2, self.eps, self.amsgrad)
        return chain(*decay, moments, scale_by_learning_rate(self.learning_rate))


@value
class adamw(Composite):
    """Adam with decoupled decay: p <- p - lr * (adam direction + weight_decay * p).

    Learning rate and weight decay are numbers, 0-d tensors or schedules. Equal to
    torch.optim.AdamW. Raises ValueError for negative values and betas outside [0, 1).

    Source: Loshchilov and Hutter, AdamW, arXiv 1711.05101.
    """

    #: A number, a 0-d tensor or a schedule.
    learning_rate: Scalar = 1e-3
    #: Decay of the mean of gradients.
    b1: Scalar = 0.9
    #: Decay of the mean of their squares.
    b2: Scalar = 0.999
    #: Added to the root.
    eps: Scalar = 1e-8
    #: A number, a 0-d tensor or a schedule.
    weight_decay: Scalar = 1e-2
    #: Whether the largest mean square so far is taken.
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check_adam(self)

    pulls_back = False

    def expand(self) -> Chain:
        """scale_by_adam, [add_decayed_weights,] scale_by_learning_rate."""
        decay = () if off(self.weight_decay) else (add_decayed_weights(self.weight_decay),)
        moments = scale_by_adam(self.b1, self.b2, self.eps, self.amsgrad)
        return chain(moments, *decay, scale_by_learning_rate(self.learning_rate))


def _check_adam(self: adam | adamw) -> None:
    who = type(self).__name__
    check_numbers(who, DECAY, schedules=True, b1=self.b1, b2=self.b2)
    rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
    check_numbers(who, NOT_NEGATIVE, schedules=True, eps=self.eps, **rates)
