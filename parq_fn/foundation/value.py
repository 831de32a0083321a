"""Values: hyperparameters as data.

Links, quantizers and schedules are frozen dataclasses with lower-case names, so that the
signature, the fields and the printed form are one text: `lsbq(2)` builds one, prints as
`lsbq(2)`, compares and hashes by its fields, pickles, and takes `dataclasses.replace`.
(PEP 8 allows the function's spelling for a class that is used as a callable.)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

if TYPE_CHECKING:  # for checkers alone, so that no dependency comes with it
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda decorator: decorator


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def value(cls: type[_T]) -> type[_T]:
    """Class decorator: a frozen dataclass that keeps the repr, eq and hash of `Value`.

    Fields that are annotated as bool take True and False alone: "no" would count as True.

    Raises TypeError for a class without that base, whose instances would compare by identity.

    >>> @value
    ... class half:
    ...     of: float
    Traceback (most recent call last):
    TypeError: @value: class half has no base of this library; write class half(Value), or one \
of Link, Quantizer, Granularity, Schedule in its place
    """
    if cls.__qualname__ != "Value" and not issubclass(cls, Value):
        bases = "".join(f", {base.__name__}" for base in cls.__bases__ if base is not object)
        raise TypeError(
            f"@value: class {cls.__name__} has no base of this library; write class "
            f"{cls.__name__}(Value{bases}), or one of Link, Quantizer, Granularity, Schedule in "
            "its place"
        )
    flags = [name for name, kind in cls.__annotations__.items() if kind in ("bool", bool)]
    if flags:
        cls.__post_init__ = _checking(flags, getattr(cls, "__post_init__", None))  # type: ignore[attr-defined] # not the type's before
    return dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)


def _checking(flags: list[str], others: Callable[[Any], None] | None) -> Callable[[Any], None]:
    def __post_init__(self: Any) -> None:
        check_flags(type(self).__name__, **{name: getattr(self, name) for name in flags})
        if others is not None:
            others(self)

    return __post_init__


def check_flags(who: str, **fields: Any) -> None:
    """Raises TypeError unless every field is True or False.

    >>> check_flags("sgd", nesterov="no")
    Traceback (most recent call last):
    TypeError: sgd: nesterov must be True or False, got 'no'
    """
    for name, got in fields.items():
        if not isinstance(got, bool):
            raise TypeError(f"{who}: {name} must be True or False, got {briefly(got)}")


class Computed(Protocol[_T_co]):
    """What checkers of types see of a property whose values are of this type."""

    def __get__(self, instance: Any, owner: Any = None, /) -> _T_co:
        """Its value."""


def attribute(get: Callable[[Any], _T]) -> _T | Computed[_T]:
    """Decorator: a property that subclasses override with a property or with a class attribute.

    At run time it is `property`. Checkers of types take both forms below it; below a property
    pyright takes a property alone.

    >>> class base:
    ...     @attribute
    ...     def size(self):
    ...         return 1
    >>> class wide(base):
    ...     size = 2
    >>> base().size, wide().size
    (1, 2)
    """
    return property(get)


def _fields(self: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(self)


@value
class Value:
    """Base of everything that is its hyperparameters and nothing else."""

    # Attributes that are no fields are those of a subclass that has an __init__ of its own.

    def __repr__(self) -> str:
        parts = []
        for field in sorted(_fields(self), key=_optional):
            got = getattr(self, field.name)
            if not _optional(field) and not field.kw_only:
                parts.append(show(got))
            elif not _optional(field) or not same(got, _default(field)):
                parts.append(f"{field.name}={show(got)}")
        known = {field.name for field in _fields(self)}
        parts += [f"{name}={show(got)}" for name, got in vars(self).items() if name not in known]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return same(_contents(self), _contents(other))

    def __hash__(self) -> int:
        contents = _contents(self)
        for name, got in contents.items():
            if _holds_tensor(got):  # equal tensors hash apart
                raise TypeError(f"unhashable {type(self).__name__}: field {name!r} holds a tensor")
        return hash((type(self).__name__, *sorted(contents.items(), key=lambda item: item[0])))

    def _repr_html_(self) -> str | None:
        return _html(self)


def _contents(self: Any) -> dict[str, Any]:
    """What a value is, by name; fields that came after it was pickled have their defaults."""
    return {**{f.name: getattr(self, f.name) for f in _fields(self)}, **vars(self)}


_renderer: Callable[[Any], str] | None = None


def shown_by(renderer: Callable[[Any], str]) -> Callable[[Any], str]:
    """Decorator: what makes the HTML of values and states that a notebook shows. Without one they
    show as text."""
    global _renderer
    _renderer = renderer
    return renderer


def _html(shown: Any) -> str | None:
    return None if _renderer is None else _renderer(shown)


def state_class(cls: type[_T]) -> type[_T]:
    """Class decorator of state NamedTuples: `torch.load(file, weights_only=True)` reads them, once
    the module that defines them is imported, and a notebook shows them as a table.

    Raises TypeError for a class that is no NamedTuple, such as a dataclass, which the functions of
    this library and of torch.func take for a leaf.

    >>> from typing import NamedTuple
    >>> @state_class
    ... class Count(NamedTuple):
    ...     count: Tensor  # [], int64: updates so far
    """
    if not (issubclass(cls, tuple) and hasattr(cls, "_fields")):
        kind = "dataclass" if dataclasses.is_dataclass(cls) else "class"
        raise TypeError(
            f"state_class: {cls.__name__} is a {kind}, expected a NamedTuple of tensors and trees "
            f"of them; write class {cls.__name__}(NamedTuple) with the same fields, and change a "
            "state by state._replace(...)"
        )
    cls._repr_html_ = _html  # type: ignore[attr-defined] # not the type's before
    torch.serialization.add_safe_globals([cls])
    return cls


def changed(value: _T, **fields: Any) -> _T:
    """A value with some fields changed, of a class that may have an __init__ of its own; else what
    `dataclasses.replace` gives.

    >>> from parq_fn import scale
    >>> changed(scale(2.0), factor=3.0)
    scale(3.0)
    """
    new = copy.copy(value)
    vars(new).update(fields)
    check = getattr(new, "__post_init__", None)
    if check is not None:
        check()
    return new


def _holds_tensor(got: Any) -> bool:
    return isinstance(got, Tensor) or (isinstance(got, tuple) and any(map(_holds_tensor, got)))


def _optional(field: dataclasses.Field[Any]) -> bool:
    return not (field.default is field.default_factory is dataclasses.MISSING)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def show(got: Any) -> str:
    """`repr`, except that a named function prints as its name.

    >>> import torch
    >>> show(torch.sin), show([torch.cos, 1])
    ('sin', '[cos, 1]')
    """
    if isinstance(got, list | tuple) and type(got) in (list, tuple):
        inner = ", ".join(map(show, got))
        if isinstance(got, list):
            return f"[{inner}]"
        return f"({inner},)" if len(got) == 1 else f"({inner})"
    if isinstance(got, dict):
        return "{" + ", ".join(f"{k!r}: {show(v)}" for k, v in got.items()) + "}"
    if callable(got) and not isinstance(got, Value):
        return str(getattr(got, "__name__", repr(got)))
    return repr(got)


def briefly(got: Any) -> str:
    """What was got, for an error: as it shows, where that is short, else its class.

    >>> from parq_fn import lsbq
    >>> briefly(lsbq(2)), briefly(lsbq), briefly(iter([1]))
    ('lsbq(2)', 'the class lsbq, which is to be called: lsbq(...)', 'list_iterator')
    """
    if isinstance(got, type):
        return f"the class {got.__name__}, which is to be called: {got.__name__}(...)"
    if isinstance(got, FunctionType) and got.__name__.isidentifier():
        return f"the function {got.__name__}"
    text = show(got)
    if isinstance(got, Tensor) or len(text) > 200 or "\n" in text or text.startswith("<"):
        return type(got).__name__
    return text


def same(a: Any, b: Any) -> bool:
    """Equality that takes tensors (same dtype, shape and elements) and containers of them.

    >>> import torch
    >>> same((1, torch.ones(2)), (1, torch.ones(2))), same(torch.ones(()), 1.0)
    (True, False)
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool((a == b).all())
        )
    if type(a) is type(b) and isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is type(b) and isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)
