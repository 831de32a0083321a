"""Muon: momentum, orthogonalized."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.checks import FINITE, NOT_NEGATIVE, POSITIVE, check_numbers, check_whole
from parq_fn.foundation.scalar import Scalar, at, new_count, to_device
from parq_fn.foundation.traits import PER_LEAF, TransformationTraits
from parq_fn.foundation.tree import (
    PyTree,
    check_floating,
    check_match,
    names_of,
    tree_leaves,
    tree_map,
)
from parq_fn.foundation.value import state_class, value
from parq_fn.transforms.links import each, times
from parq_fn.transforms.sharded import gathered, spread
from parq_fn.transforms.train import increment
from parq_fn.transforms.transformation import Link, check_state

_RATES = (None, "original", "match_rms_adamw")


@state_class
class MuonState(NamedTuple):
    """State of `muon`."""

    step: Tensor  # [], int64: updates so far
    mean: PyTree  # like params: running mean of the gradients


@value
class muon(Link):
    """m <- momentum m + (1 - momentum) g; p <- (1 - lr * weight_decay) p - lr * r * orthogonal(d),
    d = momentum m + (1 - momentum) g with nesterov, else m.

    orthogonal(d) is near U V^T, where d = U S V^T: `ns_steps` of Newton-Schulz's iteration, with
    `ns_coefficients` (a, b, c), of d over its norm,

        X <- a X + (b X X^T + c (X X^T)^2) X

    in bfloat16, whatever the params' dtype. r = sqrt(max(1, rows / columns)), or with
    adjust_lr_fn="match_rms_adamw" 0.2 sqrt(max(rows, columns)), with which learning rates and
    weight decays of AdamW do.

    Equal to torch.optim.Muon: bit for bit on float32 matrices whose entries no step halves or
    doubles, others may be off by the last place. Under torch.vmap sums in bfloat16 are rounded
    otherwise. A sharded matrix is gathered, for its orthogonalization is of the whole.

    `init` raises ValueError for a parameter that is no matrix, with its name: give biases, norms,
    embeddings and kernels to another optimizer with `partition`.

    >>> import torch
    >>> from parq_fn import adamw, muon, partition
    >>> labels = {"weight": "matrix", "*": "rest"}
    >>> transform = partition({"matrix": muon(0.1, weight_decay=0.0), "rest": adamw(1e-3)}, labels)
    >>> params = {"weight": torch.zeros(2, 2), "bias": torch.ones(2)}
    >>> grads = {"weight": torch.tensor([[30.0, 0.0], [0.0, 10.0]]), "bias": torch.ones(2)}
    >>> updates, _ = transform.update(grads, transform.init(params), params)
    >>> (updates["weight"] / -0.1).diag()  # of 30 and 10; 1 and 1 without rounding
    tensor([0.7500, 1.1328])

    Source: Jordan et al., Muon, kellerjordan.github.io/posts/muon; match_rms_adamw: Liu et al.,
    Muon is scalable for LLM training, arXiv 2502.16982.
    """

    #: A number, a 0-d tensor or a schedule.
    learning_rate: Scalar
    #: Decay of the mean of gradients.
    momentum: Scalar = 0.95
    #: A number, a 0-d tensor or a schedule.
    weight_decay: Scalar = 0.1
    #: Whether the gradient is mixed into the mean once more.
    nesterov: bool = True
    #: Of Newton-Schulz's iteration: a, b, c.
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    #: The least norm that a gradient is divided by.
    eps: float = 1e-7
    #: Steps of the iteration.
    ns_steps: int = 5
    #: How the learning rate follows a matrix's shape.
    adjust_lr_fn: str | None = None

    rates = (1, 1)

    def __post_init__(self) -> None:
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        check_numbers("muon", NOT_NEGATIVE, schedules=True, momentum=self.momentum, **rates)
        check_numbers("muon", POSITIVE, eps=self.eps)
        check_whole("muon", 1, 99, ns_steps=self.ns_steps)
        given: Any = self.ns_coefficients
        if not isinstance(given, tuple) or len(given) != 3:
            raise ValueError(f"muon: expected a tuple of 3 ns_coefficients, got {given!r}")
        check_numbers("muon", FINITE, **{f"ns_coefficients[{i}]": x for i, x in enumerate(given)})
        if self.adjust_lr_fn not in _RATES:
            raise ValueError(
                f"muon: adjust_lr_fn must be one of {', '.join(map(repr, _RATES))}, got "
                f"{self.adjust_lr_fn!r}"
            )

    @property
    def traits(self) -> TransformationTraits:
        """A leaf is treated alike whatever others there are."""
        return replace(PER_LEAF, batches=False)

    def init(self, params: PyTree) -> MuonState:
        """Zeros."""
        check_floating(params, "muon")
        for name, leaf in zip(names_of(params), tree_leaves(params), strict=True):
            if leaf.dim() != 2:
                raise ValueError(
                    f"muon: parameter {name!r} has shape {tuple(leaf.shape)}, expected a matrix; "
                    "give it to another optimizer with partition(...), or reshape it"
                )
        return MuonState(new_count(), tree_map(torch.zeros_like, params))

    def update(
        self,
        updates: PyTree,
        state: MuonState,
        params: PyTree,
        *,
        learning_rate: Scalar | Mapping[str, Scalar | None] | None = None,
        weight_decay: Scalar | Mapping[str, Scalar | None] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MuonState]:
        del extra
        check_state(self, state, MuonState)
        check_match(updates, params, "muon")
        momentum = at(self.momentum, state.step)

        def mean(m: Tensor, u: Tensor | None) -> Tensor:
            return m if u is None else _mixed(m, u.to(m.dtype), 1.0 - momentum)

        def moved(u: Tensor, m: Tensor, p: Tensor, rate: Tensor, decay: Tensor) -> Tensor:
            d = _mixed(u.to(m.dtype), m, momentum) if self.nesterov else m
            whole = gathered(d)
            direction = spread(self._orthogonal(whole), p)
            own = rate * self._ratio(*whole.shape)
            return increment(p, _sum(times(p, 1.0 - rate * decay), -own, direction))

        new = tree_map(mean, state.mean, updates)
        rates = each(self.learning_rate, learning_rate, state.step, updates, params)
        decays = each(self.weight_decay, weight_decay, state.step, updates, params)
        out = tree_map(moved, updates, new, params, rates, decays)
        return out, MuonState(state.step + 1, new)

    def _ratio(self, rows: int, columns: int) -> float:
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / max(columns, 1)))

    def _orthogonal(self, d: Tensor) -> Tensor:
        """In bfloat16; the operations of torch.optim.Muon, in their order."""
        a, b, c = self.ns_coefficients
        x, tall = d.bfloat16(), d.shape[0] > d.shape[1]
        x = x.T if tall else x
        x = x / x.norm().clamp(min=self.eps)
        for _ in range(self.ns_steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x


def _mixed(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """one + share * (other - one), rounded as torch.lerp does."""
    weight = to_device(share, one).to(one.dtype)
    return torch.lerp(one, other, weight)


def _sum(p: Tensor, factor: Tensor, direction: Tensor) -> Tensor:
    """p + factor * direction, rounded once, as torch.add with alpha does: in float64 the product
    of a float32 and a bfloat16 is exact."""
    if p.dtype == torch.float64:
        return p + times(direction.to(p.dtype), factor)
    factor = to_device(factor, p).to(torch.float32)
    return (p + factor * direction.to(torch.float64)).to(p.dtype)
