"""Tensors that refuse to be written to, for what is made anew at each use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parq_fn.foundation.torch_private import as_plain_tensors, is_wrapped

#: In-place by name, but no change of values.
_HARMLESS = {"requires_grad_", "share_memory_", "__set__ of requires_grad", "__set__ of grad"}


class ReadOnly(Tensor):
    """A tensor whose values, and those of its views, cannot be changed in place.

    A write raises RuntimeError with the sentence that it was made with; everything else gives what
    it gives for a plain tensor, and plain tensors where no memory is shared.

    >>> decoded = ReadOnly.of(torch.zeros(2), "it is decoded at each use")
    >>> decoded + 1
    tensor([1., 1.])
    >>> decoded[0].add_(1)
    Traceback (most recent call last):
    RuntimeError: add_: it is decoded at each use
    """

    why: str

    @classmethod
    def of(cls, tensor: Tensor, why: str) -> ReadOnly:
        """The same values and memory, without a way to write to them."""
        made = tensor.as_subclass(cls)
        made.why = why
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file holds the plain tensor
        with as_plain_tensors():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call] # torch's

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = _name(func)
        for target in _written(name, args, kwargs):
            if isinstance(target, ReadOnly):
                raise RuntimeError(f"{name.partition(' ')[0]}: {target.why}")
        with as_plain_tensors():
            found = func(*args, **kwargs)
        sources = [arg for arg in args if isinstance(arg, ReadOnly)]
        return _kept(found, sources)


def _name(func: Callable[..., Any]) -> str:
    name = str(getattr(func, "__name__", ""))
    if name in ("__set__", "__delete__"):  # of an attribute such as data
        return f"__set__ of {getattr(getattr(func, '__self__', None), '__name__', '')}"
    return name


def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call of that name writes to."""
    out = kwargs.get("out")
    found = list(out) if isinstance(out, tuple | list) else [out]
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    stored = name == "__setitem__" or name.startswith("__set__ of ")
    given = [*args, *kwargs.values()]
    if given and name not in _HARMLESS and (in_place or operator or stored):
        first = given[0]  # of torch's functions on many tensors, a list
        found += first if isinstance(first, tuple | list) else [first]
    return found


def _kept(found: Any, sources: list[ReadOnly]) -> Any:
    """What a call gives: read-only where it shares the memory of one that is."""
    if isinstance(found, tuple | list) and not isinstance(found, torch.Size):
        parts = [_kept(one, sources) for one in found]
        return type(found)(parts) if type(found) in (tuple, list) else found
    if isinstance(found, np.ndarray):  # which shares memory
        found.flags.writeable = False
    if not isinstance(found, Tensor):
        return found
    shared = [s for s in sources if _memory(s) == _memory(found)]
    if shared:
        return ReadOnly.of(found, shared[0].why)
    return found.as_subclass(Tensor) if isinstance(found, ReadOnly) else found


def _memory(tensor: Tensor) -> int | None:
    with as_plain_tensors():
        return None if is_wrapped(tensor) else tensor.untyped_storage().data_ptr() or None
