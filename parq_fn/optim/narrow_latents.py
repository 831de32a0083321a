"""Latents in bfloat16: the base optimizer moves them in float32, and they are rounded
stochastically after it, so that steps smaller than half a last place are not lost but taken now
and then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.value import briefly
from parq_fn.optim.state import Entries, wide
from parq_fn.transforms.noise import mixed, number_of
from parq_fn.transforms.sharded import local
from parq_fn.transforms.stochastic_rounding import round_into

#: The entry that all draws of a parameter follow from, [] int64, with its count of updates.
KEY = "rounding"


def check_latent_dtype(dtype: Any, base: Optimizer) -> None:
    """Raises TypeError for what is no dtype, ValueError for one but bfloat16, and for a base that
    moves latents besides its step."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            "QuantOptimizer: latent_dtype must be torch.bfloat16, or None for float32 or better, "
            f"got {briefly(dtype)}"
        )
    if dtype != torch.bfloat16:
        raise ValueError(
            "QuantOptimizer: latent_dtype must be torch.bfloat16, whose range is float32's, or "
            f"None for float32 or better, got {dtype}"
        )
    if callable(getattr(base, "eval", None)):
        raise ValueError(
            f"QuantOptimizer: latent_dtype={dtype} is not for {type(base).__name__}, whose train() "
            "and eval() move latents, which would round them each time; leave latent_dtype out"
        )


def check_narrow(p: Tensor, dtype: torch.dtype, label: str) -> None:
    """Raises ValueError for a parameter whose latent would be narrower than it is."""
    if p.dtype != dtype:
        raise ValueError(
            f"QuantOptimizer: latent_dtype={dtype} is for parameters of that dtype, and quantized "
            f"parameter {label!r} is {p.dtype}; convert the module before, module.to({dtype}), or "
            "leave latent_dtype out"
        )


def key_of(label: str, like: Tensor) -> Tensor:
    """A parameter's entry `KEY`, of its name: [] int64."""
    return mixed(torch.full_like(like, number_of(label)))


@contextmanager
def in_full(
    base: Optimizer,
    latents: dict[Tensor, Tensor],
    entries: dict[Tensor, Entries],
    chunk: Iterable[Tensor],
) -> Iterator[None]:
    """The base with latents of these parameters in float32 or better; after it what they are then
    is rounded into their entries, and the base has its state of those as before.

    To be used under torch.no_grad. latents: {parameter: what the base moves}; entries: of each, in
    the optimizer's state.
    """
    own = {p: latents[p] for p in chunk if KEY in entries[p]}
    try:
        for p, latent in own.items():
            latents[p] = latent.to(wide(p)).requires_grad_()
            _hand_over(base, latent, latents[p])
        yield
    finally:
        for p, latent in own.items():
            moved, latents[p] = latents[p], latent
            _hand_over(base, moved, latent)
            to, key = entries[p]["latent"], entries[p][KEY] + entries[p]["updates"]
            round_into(local(to), local(moved), mixed(key), to)


def _hand_over(base: Optimizer, one: Tensor, other: Tensor) -> None:
    if one in base.state:
        base.state[other] = base.state.pop(one)
