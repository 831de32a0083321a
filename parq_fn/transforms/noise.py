"""Noise in updates, drawn from counters: a pure function of a seed, the step and the place."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from parq_fn.foundation.checks import FINITE, NOT_NEGATIVE, check_numbers, check_whole
from parq_fn.foundation.scalar import Scalar, at, new_count, to_device
from parq_fn.foundation.torch_private import constant_result
from parq_fn.foundation.traits import PER_LEAF
from parq_fn.foundation.tree import PyTree, check_floating, names_of
from parq_fn.foundation.value import state_class, value
from parq_fn.transforms.links import times
from parq_fn.transforms.sharded import local, placed, spread
from parq_fn.transforms.transformation import NO_RATE, Link, check_state

# splitmix64's constants, as int64; sums and products of int64 wrap around
_GOLDEN, _FIRST, _SECOND = (
    x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@state_class
class NoiseState(NamedTuple):
    """State of `add_noise`."""

    step: Tensor  # [], int64: updates so far
    seed: Tensor  # [], int64: what all noise follows from, with the step


@value
class add_noise(Link):
    """updates -> updates + n, n normal with mean 0 and variance eta / (1 + t)^gamma, t the updates
    before this one.

    The noise is drawn from counters: that of an element is a fixed function of the seed in the
    state, t, the leaf's name and the element's index, by splitmix64's mixing of bits and the method
    of Box and Muller. So an update is pure, a run is repeated bit for bit from its state, no global
    generator is read, and a leaf's noise does not depend on what other leaves there are, nor on how
    it is sharded. Under torch.vmap no `randomness` is asked for: examples have the same noise,
    unless seeds are batched (`torch.vmap(lambda seed: add_noise(0.1, seed=seed)...)`).

    Hyperparameters are numbers, 0-d tensors or schedules. Raises ValueError for a negative eta.

    >>> import torch
    >>> link, params = add_noise(0.01, seed=3), {"w": torch.zeros(10000)}
    >>> updates, state = link.update(params, link.init(params), params)
    >>> again, _ = link.update(params, link.init(params), params)
    >>> torch.equal(updates["w"], again["w"]), updates["w"].std().sub(0.1).abs() < 0.003
    (True, tensor(True))

    Source: Neelakantan et al., Adding gradient noise improves learning for very deep networks,
    arXiv 1511.06807; splitmix64: Steele, Lea and Flood, OOPSLA 2014.
    """

    #: The variance of the first noise.
    eta: Scalar
    #: How fast the variance falls.
    gamma: Scalar = 0.55
    #: A whole number, or a 0-d tensor of them.
    seed: int | Tensor = 0

    traits = PER_LEAF
    rates = NO_RATE

    def __post_init__(self) -> None:
        check_numbers("add_noise", NOT_NEGATIVE, schedules=True, eta=self.eta)
        check_numbers("add_noise", FINITE, schedules=True, gamma=self.gamma)
        check_whole("add_noise", 0, 2**63 - 1, seed=self.seed)

    def init(self, params: PyTree) -> NoiseState:
        """A count of 0, and the seed."""
        check_floating(params, "add_noise")
        count = new_count()
        if isinstance(self.seed, Tensor):
            return NoiseState(count, self.seed.to(torch.int64))
        return NoiseState(count, torch.full_like(count, self.seed))

    def update(
        self, updates: PyTree, state: NoiseState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, NoiseState]:
        del params, extra
        check_state(self, state, NoiseState)
        eta, gamma = at(self.eta, state.step), at(self.gamma, state.step)
        variance = eta / (1.0 + state.step) ** gamma
        scale = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)

        def noisy(u: Tensor, name: str) -> Tensor:
            of_leaf = mixed(mixed(state.seed) + number_of(name))
            return u + times(normal_like(u, mixed(of_leaf + state.step)), scale)

        leaves, spec = optree.tree_flatten(updates)
        named = zip(leaves, names_of(updates), strict=True)
        out = optree.tree_unflatten(spec, [noisy(u, name) for u, name in named])
        return out, NoiseState(state.step + 1, state.seed)


def normal_like(like: Tensor, key: Tensor) -> Tensor:
    """Normal numbers of a tensor's shape and dtype, each a function of a 0-d key and its index."""
    mine = local(like)
    index = torch.arange(like.numel(), device=mine.device).reshape(like.shape)
    index = local(spread(index, like))
    bits = mixed(bits_of(index, to_device(key, mine)))
    wide = torch.promote_types(mine.dtype, torch.float32)
    high, low = ((bits >> s) & 0xFFFFFFFF for s in (32, 0))
    radius = (-2.0 * ((high.to(wide) + 0.5) * 2.0**-32).log()).sqrt()
    return placed((radius * (low.to(wide) * (2.0 * math.pi * 2.0**-32)).cos()).to(mine.dtype), like)


def bits_of(index: Tensor, key: Tensor) -> Tensor:
    """splitmix64's numbers at these indices, int64, of the stream that a 0-d key begins."""
    return mixed(index * _GOLDEN + key)


@constant_result
def number_of(name: str) -> int:
    """A number that tells leaves apart."""
    return zlib.crc32(name.encode())


def mixed(x: Tensor) -> Tensor:
    """splitmix64 of int64 numbers: every bit of the result depends on every bit of x."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by with zeros from the left, as of an unsigned number."""
    return (x >> by) & ((1 << (64 - by)) - 1)
