"""Scalars: hyperparameters and step counts as 0-d tensors.

Step counts are int64, coefficients float64, both 0-d, so that they neither promote a leaf's
dtype nor round a hyperparameter. They live on the CPU unless the state is moved: a host count
costs no device synchronisation, and a device count is what a CUDA graph captures.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parq_fn.foundation.torch_private import in_dispatch_mode, is_functional

#: A number, a 0-d tensor, or a schedule of the step count.
Scalar = float | Tensor | Callable[[Tensor], Tensor]


def new_count() -> Tensor:
    """A step count of 0."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


def as_scalar(value: float | Tensor, like: Tensor | None = None) -> Tensor:
    """The value as a tensor: numbers become float64 on the device of `like`."""
    if isinstance(value, Tensor):
        return value
    device = "cpu" if like is None else like.device
    return torch.full((), value, dtype=torch.float64, device=device)  # waits for no device


def at(value: Scalar, count: Tensor) -> Tensor:
    """The value at a step: `value(count)` where it is a schedule.

    >>> at(0.5, new_count())
    tensor(0.5000, dtype=torch.float64)
    """
    return as_scalar(value(count) if callable(value) else value, count)


def is_number(value: Any) -> bool:
    """Whether the value is a plain Python number, known when a link is built."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def concrete(tensor: Tensor) -> Any:
    """The Python number in a 0-d tensor, or None where there is none to be had.

    None under `torch.compile`, for a tensor batched by `vmap`, for a fake or meta tensor, and
    off the CPU, where reading it would wait for the device. Use it only to skip work
    that the value makes unnecessary: results must not depend on it.

    >>> concrete(torch.tensor(3))
    3
    """
    if not may_be_read(tensor):
        return None
    try:
        value: Any = tensor.item()
    except RuntimeError:  # vmap, fake and meta tensors each refuse with one
        return None
    return value if isinstance(value, (bool, int, float)) else None  # else a symbol of a tracer's


def may_be_read(tensor: Tensor) -> bool:
    """Whether `concrete` looks into a tensor: on the CPU, in no function that a compiler traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but values in the CPU's memory, which numpy may read: traced by
    no compiler, batched or differentiated by no transformation.

    >>> is_plain(torch.ones(2)), is_plain(torch.ones(2, requires_grad=True))
    (True, False)
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or _is_traced():
        return False
    if is_functional(tensor):
        return False
    try:
        tensor.numpy()
    except (RuntimeError, TypeError):
        return False
    dual: Any = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call] # torch's own
    return dual.tangent is None


def _is_traced() -> bool:
    """Whether operations are recorded, by a compiler or a dispatch mode."""
    return torch.compiler.is_compiling() or in_dispatch_mode()


def to_device(scalar: Tensor, like: Tensor) -> Tensor:
    """The scalar on the device of `like`, without waiting for either device."""
    return scalar if scalar.device == like.device else scalar.to(like.device, non_blocking=True)
