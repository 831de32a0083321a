"""Training with a transformation: gradients at the weights, updates added to the params."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from parq_fn.foundation.tree import Params, PyTree, check_match, check_plain, check_tree, columns_of
from parq_fn.foundation.value import Value, briefly, value
from parq_fn.transforms.transformation import Transformation, check_transformation


def apply_updates(params: Params, updates: PyTree) -> Params:
    """params + updates, leaf by leaf, in each parameter's dtype; None leaves it as it is.

    Raises ValueError for updates of another structure or shape, and for an update where params has
    None; TypeError for what `update` returned whole, (updates, state).

    >>> import torch
    >>> apply_updates({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": None})
    {'a': tensor([2.]), 'b': tensor([1.])}
    """

    def add(param: Tensor, update: Tensor | None) -> Tensor:
        if update is None:
            return param
        if update.shape != param.shape:
            check_match(updates, params, "apply_updates")
        return (param + update).to(param.dtype)

    for tree in (params, updates):
        check_tree(tree, "apply_updates")
    pair = type(updates) is tuple and len(updates) == 2
    if pair and not isinstance(params, tuple | list):
        raise TypeError(
            "apply_updates: updates is a tuple of two; update returns (updates, state), give the "
            "first: updates, state = transform.update(grads, state, params)"
        )
    spec, leaves, given = columns_of(params, updates, none_is_leaf=True)
    for i, (param, update) in enumerate(zip(leaves, given, strict=True)):
        if param is None and update is not None:
            names = [".".join(map(str, path)) for path in spec.paths()]
            raise ValueError(
                f"apply_updates: params has None at {names[i]!r}, and updates a tensor; the order "
                "is apply_updates(params, updates)"
            )
    added = [None if p is None else add(p, u) for p, u in zip(leaves, given, strict=True)]
    made: Any = optree.tree_unflatten(spec, added)
    return made  # type: ignore[no-any-return] # of the structure of params


def increment(param: Tensor, target: Tensor) -> Tensor:
    """What `apply_updates` has to add to a parameter to give the target, in its dtype.

    To the last place only, where no number gives the target itself: adding one rounds.

    >>> p, q = torch.tensor([1.0, 1e-8]), torch.tensor([0.75, 1.0])
    >>> p + increment(p, q) == q
    tensor([True, True])
    """
    found = target - param
    other = found + (target - (param + found))
    return torch.where((param + found != target) & (param + other == target), other, found)


@value
class value_and_grad(Value):
    """(params, state, *args) -> (loss, grads), differentiated at the weights, not through them.

        loss = loss(w, *args) and grads = its gradient in w, at w = transform.weights(state, params)

    This is the straight way to train: the gradient is taken where the model computes, and the
    update moves the latent params. Leaves that are not floating get None for a gradient. With
    has_aux=True the loss returns (loss, aux), and the call ((loss, aux), grads).

    >>> import torch
    >>> from parq_fn import sgd, value_and_grad
    >>> params, transform = {"w": torch.tensor(3.0)}, sgd(0.1)
    >>> step = value_and_grad(lambda w, x: (w["w"] * x) ** 2, transform)
    >>> step(params, transform.init(params), 2.0)
    (tensor(36.), {'w': tensor(24.)})
    """

    #: (weights, *args) -> loss, one number.
    loss: Callable[..., Any]
    #: Makes the weights, and pulls gradients back where it does more than that.
    transform: Transformation
    #: Whether the loss returns (loss, aux).
    has_aux: bool = False

    def __post_init__(self) -> None:
        loss: Any = self.loss
        if isinstance(loss, torch.nn.Module):
            raise TypeError(
                f"value_and_grad: the loss is the module {type(loss).__name__}, expected a "
                "function of (weights, *args); apply, params = functional(module) makes one of a "
                "module: lambda weights, x, y: mse_loss(apply(weights, x), y)"
            )
        check_transformation(self.transform, "the transformation of value_and_grad(loss, ...)")
        if not callable(loss):
            raise TypeError(
                "value_and_grad: expected a loss, a function of (weights, *args), got "
                f"{briefly(loss)}"
            )

    def __call__(
        self, params: Params, state: PyTree, /, *args: Any, **kwargs: Any
    ) -> tuple[Any, Params]:
        """((loss or (loss, aux)), grads); grads in the structure of params.

        Raises TypeError for an nn.Parameter among the params, whose graph would grow, and for a
        module in their place.
        """
        check_plain(params, "value_and_grad")
        weights: Any = self.transform.weights(state, params)
        leaves, spec = optree.tree_flatten(weights)
        moves = [isinstance(w, Tensor) and w.is_floating_point() for w in leaves]

        def of_leaves(floating: list[Tensor]) -> Any:
            rest = iter(floating)
            filled = [next(rest) if m else w for m, w in zip(moves, leaves, strict=True)]
            return self.loss(optree.tree_unflatten(spec, filled), *args, **kwargs)

        chosen = [w for m, w in zip(moves, leaves, strict=True) if m]
        grads, out = torch.func.grad_and_value(of_leaves, has_aux=self.has_aux)(chosen)
        rest = iter(grads)
        made: Any = optree.tree_unflatten(spec, [next(rest) if m else None for m in moves])
        return out, made
