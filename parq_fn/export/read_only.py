"""Tensors that refuse to be written to, for what is made anew at each use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from parq_fn.foundation.torch_private import (
    as_plain_tensors,
    constant_result,
    counted_writes,
    memory_of,
    subclass_of,
)

#: In-place by name, but no change of values.
_HARMLESS = {"requires_grad_", "share_memory_", "__set__ of requires_grad", "__set__ of grad"}
#: Ways to memory that others write to, where nothing counts it.
_EXPORTED = {"__dlpack__", "__cuda_array_interface__"}


class ReadOnly(Tensor):
    """A tensor whose values, and those of its views, cannot be changed in place.

    A write raises RuntimeError with the sentence `why` of its class; everything else gives what it
    gives for a plain tensor, and plain tensors where no memory is shared. Functions that write only
    with some of their arguments, such as relu(x, inplace=True), raise once they have written.

    What no tensor notices are writes to its memory as such, by `untyped_storage()`, `data_ptr()`,
    `torch.utils.dlpack.to_dlpack` or `torch.utils.swap_tensors`; those to what torch.func hands on,
    as in vmap(lambda row: row.add_(1))(x); and, within compiled functions, those to its views, of
    which x.data is one. An optimizer over one finds no gradient, or its step raises.

    >>> class decoded(ReadOnly):
    ...     why = "it is decoded at each use"
    >>> made = decoded.of(torch.zeros(2))
    >>> made + 1
    tensor([1., 1.])
    >>> made[0].add_(1)
    Traceback (most recent call last):
    RuntimeError: add_: it is decoded at each use
    """

    why: ClassVar[str] = "it is read-only"

    @classmethod
    def of(cls, tensor: Tensor) -> ReadOnly:
        """The same values and memory, without a way to write to them."""
        if torch.compiler.is_dynamo_compiling():
            return tensor.as_subclass(cls)
        return subclass_of(cls, tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file holds the plain tensor
        with as_plain_tensors():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call] # torch's

    def set_(self, *args: Any, **kwargs: Any) -> Any:  # which torch does not ask about
        raise RuntimeError(f"set_: {self.why}")

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
        if torch.compiler.is_dynamo_compiling():
            with as_plain_tensors():
                return func(*args, **kwargs)
        sources = [arg for arg in _each((*args, *kwargs.values())) if isinstance(arg, ReadOnly)]
        before = [counted_writes(source) for source in sources]
        with as_plain_tensors():
            found = func(*args, **kwargs)
        for source, count in zip(sources, before, strict=True):
            if counted_writes(source) != count:
                raise RuntimeError(f"{name}: {source.why}")
        return _kept(found, {memory_of(source): type(source) for source in sources})


@constant_result  # torch 2.14's compiler does not read names of methods
def _name(func: Callable[..., Any]) -> str:
    name = str(getattr(func, "__name__", "")).partition(".")[0]  # an overload such as add_.Scalar
    if name in ("__set__", "__delete__"):  # of an attribute such as data
        return f"__set__ of {getattr(getattr(func, '__self__', None), '__name__', '')}"
    return name


def _each(given: Iterable[Any]) -> Iterable[Any]:
    """Arguments, and what lists among them hold: torch has functions on many tensors."""
    for one in given:
        if isinstance(one, tuple | list):
            yield from one
        else:
            yield one


def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call of that name writes to, as the name and the arguments say it."""
    found = list(_each([kwargs.get("out")]))
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    stored = name == "__setitem__" or name.startswith("__set__ of ")
    asked = kwargs.get("inplace") is True or name in _EXPORTED
    given = [*args, *kwargs.values()]
    if given and name not in _HARMLESS and (in_place or operator or stored or asked):
        found += _each(given[:1])
    return found


def _kept(found: Any, memory: Mapping[int | None, type[ReadOnly]]) -> Any:
    """What a call gives: read-only where it shares the memory of one that is."""
    if isinstance(found, tuple | list) and not isinstance(found, torch.Size):
        parts = [_kept(one, memory) for one in found]
        return type(found)(parts) if type(found) in (tuple, list) else found
    if isinstance(found, np.ndarray):  # which shares memory
        found.flags.writeable = False
    if not isinstance(found, Tensor):
        return found
    kind = memory.get(memory_of(found))
    if kind is not None:
        return kind.of(found)
    return found.as_subclass(Tensor) if isinstance(found, ReadOnly) else found
