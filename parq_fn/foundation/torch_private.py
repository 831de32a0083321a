"""Every call into torch that torch keeps private, or promises nothing about.

Another version may name or do these things otherwise: this file is the place to look, and
`nox -s torch` runs the tests on every version that is looked after.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals
from torch.optim import Optimizer, optimizer
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
)

P = ParamSpec("P")
T = TypeVar("T")

# Tensors


def in_dispatch_mode() -> bool:
    """Whether a dispatch mode, such as a tracer's, sees the operations."""
    return _get_current_dispatch_mode() is not None or _is_pre_dispatch()


def _is_pre_dispatch() -> bool:
    count: Any = torch._ops._len_torch_dispatch_stack_pre_dispatch
    return bool(count())


def in_tracer() -> bool:
    """Whether one of torch's own dispatch modes, by which it traces, sees the operations."""
    modes = _get_current_dispatch_mode_stack()
    return any(mode.is_infra_mode() for mode in modes) or _is_pre_dispatch()


def in_script_tracer() -> bool:
    """Whether torch.jit.trace runs, to which sizes are tensors."""
    jit: Any = torch.jit
    return bool(jit.is_tracing())


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it stands for others in vmap, grad or another transformation of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def in_function_transform() -> bool:
    """Whether vmap, grad or another transformation of torch.func runs, whatever of."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def memory_of(tensor: Tensor) -> int | None:
    """A number that tensors have in common where they share memory, wrapped ones too; None of a
    tensor without memory of its own, such as a sparse one."""
    with as_plain_tensors():
        while is_wrapped(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        try:
            return int(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return None


def subclass_of(kind: type[T], tensor: Tensor) -> T:
    """The tensor as one of a subclass, which is no view of it and shares its memory."""
    found: Any = Tensor._make_subclass
    made: T = found(kind, tensor)
    return made


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's sizes as numbers; where torch.jit.trace records, they are tensors otherwise."""
    if not in_script_tracer():
        return tuple(tensor.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are taken for constants
        return tuple(int(size) for size in tensor.shape)


def counted_writes(tensor: Tensor) -> int:
    """As of `writes_to`, -1 of a tensor that counts none, as those of inference mode."""
    with as_plain_tensors():
        return -1 if tensor.is_inference() else tensor._version


def is_functional(tensor: Tensor) -> bool:
    """Whether it wraps another tensor, for a tracer that takes writes out of a program."""
    return torch._is_functional_tensor(tensor)


def writes_to(tensor: Tensor) -> int:
    """How often a tensor's memory was written to, through whatever view of it but `.data`."""
    return tensor._version


def inner_shard(tensor: Tensor) -> Tensor:
    """The tensor in which a DTensor keeps this rank's part: `to_local()` of a parameter is a view
    of it, made anew at each call."""
    found: Tensor = tensor._local_tensor  # type: ignore[attr-defined] # a DTensor has it
    return found


def copy_each(into: list[Tensor], of: list[Tensor]) -> None:
    """Copies tensors into others, of all in few operations."""
    torch._foreach_copy_(into, of)


def is_composed(tensor: Tensor) -> bool:
    """Whether it is of a class that computes with inner tensors, as a DTensor and what libraries
    make of codes and scales: they need not know how to be copied or made anew."""
    return hasattr(type(tensor), "__tensor_flatten__")


def parts_copied(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor with its innermost tensors changed, which are to keep their shapes."""
    if not is_composed(tensor):
        return change(tensor)
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined] # it is composed
    inner = {name: parts_copied(getattr(tensor, name), change) for name in names}
    kind: Any = type(tensor)
    found: Tensor = kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return found


# Modules

#: The base of all batch and instance norms.
BATCH_NORM = nn.modules.batchnorm._NormBase


def flattened_by(p: Tensor) -> str | None:
    """What has flattened a parameter, to cut it where no row ends; None where nothing has."""
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        return "FSDP1"
    return "ZeRO of DeepSpeed" if hasattr(p, "ds_id") else None  # stage 3 has one for each


def no_recomputing(message: str) -> AbstractContextManager[None]:
    """Within it what is saved for the backward pass is saved as it is, and hooks that would do
    otherwise raise RuntimeError with the message; none where there are such hooks already, or where
    nothing is saved."""
    if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True):
        return nullcontext()
    return torch.autograd.graph.disable_saved_tensors_hooks(message)


# Optimizers


def is_optimizer(got: Any) -> bool:
    """Whether it is an optimizer of torch's, or a class of them."""
    return isinstance(got, Optimizer) or (isinstance(got, type) and issubclass(got, Optimizer))


_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def has_step_hooks(base: Optimizer) -> bool:
    """Whether anything else is called at a step of the optimizer."""
    everywhere = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
    return any((*(getattr(base, name) for name in _STEP_HOOKS), *everywhere))


def drop_step_hooks(base: Optimizer) -> None:
    """Takes an optimizer's own hooks of a step away."""
    base.__dict__.update((name, OrderedDict()) for name in _STEP_HOOKS)


_SAVING_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def saves_by_itself(base: Optimizer) -> bool:
    """Whether an optimizer's class, or a hook, does more than torch where state is saved or
    loaded."""
    kind = type(base)
    own = (kind.state_dict, kind.load_state_dict) != (
        Optimizer.state_dict,
        Optimizer.load_state_dict,
    )
    return own or any(getattr(base, name) for name in _SAVING_HOOKS)


def own_attributes(base: Optimizer) -> dict[str, Any]:
    """What an optimizer keeps besides what all have; torch's way of copying one leaves it out."""
    common = {*vars(Optimizer([torch.empty(0)], {})), "step"}
    return {name: got for name, got in vars(base).items() if name not in common}


def hooks_before_load(of: Optimizer) -> list[Callable[..., Any]]:
    """What is called with an optimizer and the state that it is about to load."""
    return [*of._optimizer_load_state_dict_pre_hooks.values()]


def hooks_after_load(of: Optimizer) -> list[Callable[..., Any]]:
    """What is called with an optimizer that has loaded a state."""
    return [*of._optimizer_load_state_dict_post_hooks.values()]


# The compiler


def not_traced(function: Callable[P, T]) -> Callable[P, T]:
    """A function that runs as it is where a compiler traces what calls it."""
    found: Callable[P, T] = torch._disable_dynamo(function)  # type: ignore[attr-defined] # private
    return found


def constant_result(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose result a compiler takes for a constant: torch.compiler's
    assume_constant_result, which would import the whole compiler to set this mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # private
    return function


def mark_constant(tensor: Tensor, dims: list[int]) -> None:
    """Has a compiler take these sizes of a tensor for constants."""
    torch._dynamo.mark_static(tensor, dims)


def compiled(
    function: Any, options: dict[str, Any], *, dynamic: bool | None = True
) -> Callable[..., Any]:
    """A function compiled for sizes of any number; with dynamic=None for those that it has first,
    and for any number of those that turn out to differ.

    Its code object is its own, for a compiler counts the programs of each and stops at eight.
    """
    code, name = function.__code__.replace(), function.__name__
    own: Any = FunctionType(code, function.__globals__, name, None, function.__closure__)
    program: Callable[..., Any] = torch.compile(
        own, fullgraph=True, dynamic=dynamic, options=options
    )
    return program


def compiler_options(device: str, *, two: bool, narrow: bool) -> dict[str, Any]:
    """Options of inductor, for a device's type. two: parts are mapped at a time; narrow: where a
    search comes before a calculation."""
    if device != "cpu":
        # each operation rounded by itself, quotients too, and subnormal numbers kept
        return {
            "emulate_precision_casts": True,
            "eager_numerics.division_rounding": True,
            "eager_numerics.disable_ftz": True,
        }
    # levels made in the loop are rounded to a narrower dtype, and not only as weights are written
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if two:  # one loop, though they share no memory
        options |= {"aggressive_fusion": True, "score_fusion_memory_threshold": 0}
    if narrow and torch.backends.cpu.get_cpu_capability() == "AVX512":
        # With vectors of 512 bits a comparison becomes a vector in a register that some processors
        # wait for, so that the whole way of one weight is gone before the next one's begins.
        options["cpp.simdlen"] = 256
    return options


def is_of_compiler(error: Exception) -> bool:
    """Whether a program could not be compiled, such as without a compiler for C++."""
    from torch._inductor.exc import InductorError

    return isinstance(error, InductorError)


def as_plain_tensors() -> AbstractContextManager[None]:
    """Within it subclasses of tensors are taken for tensors: no __torch_function__ is called."""
    return torch._C.DisableTorchFunctionSubclass()


# Checkpoints


def nested(flat: dict[str, Any], paths: dict[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """What a checkpoint holds under flat keys, as it was nested before."""
    from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

    found: dict[str, Any] = unflatten_state_dict(flat, paths)
    return found


def values_in_files() -> dict[tuple[str, str], Any]:
    """{(module, name): class or function} that torch.load takes of a file with weights_only=True,
    those that users have allowed among them."""
    users: dict[str, Any] = _get_user_allowed_globals()  # type: ignore[no-untyped-call] # torch's
    named = {**_get_allowed_globals(), **users}
    parted = ((name.rpartition("."), got) for name, got in named.items())
    return {(module, name): got for (module, _, name), got in parted}
