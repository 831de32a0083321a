"""Training with a transformation: gradients at the weights, updates added to the params."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from parq_fn.foundation.tree import PyTree, check_match, tree_leaves, tree_map
from parq_fn.foundation.value import Value, value
from parq_fn.transforms.transformation import Transformation, check_transformation


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """params + updates, leaf by leaf, in each parameter's dtype; None leaves it as it is.

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

    return tree_map(add, params, updates)


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

    loss: Callable[..., Any]
    transform: Transformation
    has_aux: bool = False

    def __post_init__(self) -> None:
        check_transformation(self.transform, "the transformation of value_and_grad")

    def __call__(self, params: PyTree, state: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        """((loss or (loss, aux)), grads); grads in the structure of params.

        Raises TypeError for an nn.Parameter among the params: its graph would grow.
        """
        for leaf in tree_leaves(params):
            if isinstance(leaf, torch.nn.Parameter):
                raise TypeError(
                    "value_and_grad takes plain tensors, got an nn.Parameter; "
                    "use functional(module), or detach it"
                )
        weights = self.transform.weights(state, params)
        leaves, spec = optree.tree_flatten(weights)
        moves = [isinstance(w, Tensor) and w.is_floating_point() for w in leaves]

        def of_leaves(floating: list[Tensor]) -> Any:
            rest = iter(floating)
            filled = [next(rest) if m else w for m, w in zip(moves, leaves, strict=True)]
            return self.loss(optree.tree_unflatten(spec, filled), *args, **kwargs)

        chosen = [w for m, w in zip(moves, leaves, strict=True) if m]
        grads, out = torch.func.grad_and_value(of_leaves, has_aux=self.has_aux)(chosen)
        rest = iter(grads)
        return out, optree.tree_unflatten(spec, [next(rest) if m else None for m in moves])
