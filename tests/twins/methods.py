"""Methods of quantization-aware training by autograd, written from the formulas of their papers.

Weights [r, n], each row with levels of its own, in plain torch: values are set and gradients are
led by `detach` or by a `torch.autograd.Function`. Nothing of the package is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]


def valued(value: Tensor, *paths: Tensor) -> Tensor:
    """The value, bit for bit, with the gradients of the paths."""
    return value.detach() + sum(path - path.detach() for path in paths)


def code_of(u: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest level, for each weight."""
    return (u.detach()[..., None] - levels.detach()[:, None]).abs().argmin(-1)


def nearest(u: Tensor, levels: Tensor) -> Tensor:
    """The nearest level, whose gradient goes to that level."""
    return levels.gather(-1, code_of(u, levels))


def mean(u: Tensor) -> Tensor:
    """The mean magnitude of each row, [r, 1]."""
    return u.abs().mean(-1, keepdim=True)


def ramp(t: int, low: float, high: float, start: int, end: int) -> float:
    """Linear from step start to step end."""
    return low + (high - low) * min(max((t - start) / (end - start), 0.0), 1.0)


# Levels, of one number a row.


def even(bits: int) -> Tensor:
    """The multiples of a step that are centred on zero; ternary for 0 bits."""
    if bits == 0:
        return torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    return torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2


def step_of(u: Tensor, bits: int) -> Tensor:
    """The outermost level is b times the mean magnitude, at most the largest; of ternary 1.1
    times the mean."""
    if bits == 0:
        return 1.1 * mean(u)
    outermost = torch.minimum(bits * mean(u), u.abs().amax(-1, keepdim=True))
    return outermost / ((2**bits - 1) / 2)


class Twin:
    """Straight-through: w = Q(u), dL/du = dL/dw; the levels are fitted every `period` steps."""

    period = 10
    learns = False
    #: Whether gradients end at the outer levels.
    saturates = False
    #: What the rate of what this class learns is times that of the package's number.
    ratio = 1.0

    def __init__(self, bits: int, steps: int) -> None:
        self.bits, self.steps = bits, steps
        self.begins = 0

    def fitted(self, u: Tensor) -> Tensor:
        return step_of(u, self.bits)

    def levels(self, own: Tensor) -> Tensor:
        return own * even(self.bits)

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        """Weights with their gradients, made after update t."""
        return valued(nearest(u, self.levels(own)), u)

    def penalty(self, u: Tensor, w: Tensor, own: Tensor, t: int) -> Tensor:
        """What is added to the loss of update t."""
        return u.new_zeros(())

    def pull(self, t: int) -> float:
        """lambda of u <- u - lr lambda (u - w)."""
        return 0.0

    def ordered(self, own: Tensor) -> Tensor:
        return own


class Saturated(Twin):
    """w = Q(clip(u)): no gradient beyond the outer levels."""

    saturates = True

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        q = self.levels(own)
        return valued(nearest(u, q), torch.maximum(torch.minimum(u, q[:, -1:]), q[:, :1]))


class Dampening(Twin):
    """Nagel et al., equation (9): the loss + lambda_t / 2 |Q(u) - clip(u)|^2, lambda from 0 to .1
    along a cosine; the gradient is that of straight-through."""

    def penalty(self, u: Tensor, w: Tensor, own: Tensor, t: int) -> Tensor:
        q = self.levels(own)
        clipped = torch.maximum(torch.minimum(u, q[:, -1:]), q[:, :1])
        strength = 0.05 * (1 - math.cos(math.pi * min(t / self.steps, 1.0)))
        return strength / 2 * (w.detach() - clipped).square().sum()


class Cage(Twin):
    """u <- u - lr g - lr lambda_t (u - Q(u)), lambda from 0 at 80 % of the steps to 10."""

    period = 1

    def pull(self, t: int) -> float:
        return ramp(t, 0.0, 10.0, self.steps * 4 // 5, self.steps)


class _Trusted(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, u: Tensor, rms: Tensor, outermost: float, count: int) -> Tensor:
        half = outermost * rms / (count - 1)  # of a step
        code = torch.round((u / half + count - 1) / 2).clamp(0, count - 1)
        w = (2 * code - (count - 1)) * half
        context.save_for_backward((w - u).abs() <= half)
        return w

    @staticmethod
    def backward(context: Any, *grads: Any) -> Any:
        return grads[0] * context.saved_tensors[0], None, None, None


#: As published, by bits: the a that is best for a normal weight and levels from -a to a.
OUTERMOST = {
    1: 0.7978845587140913,
    0: 1.2240089519030855,
    2: 1.4935346200015913,
    3: 2.051068354131873,
}


class Quest(Twin):
    """Panferov et al.: the grid that is best for normal weights, gradients where the error is at
    most half a step; without their rotation."""

    period = 1

    def __init__(self, bits: int, steps: int) -> None:
        super().__init__(bits, steps)
        self.outermost = OUTERMOST[bits]

    def fitted(self, u: Tensor) -> Tensor:
        return u.square().mean(-1, keepdim=True).sqrt()

    def levels(self, own: Tensor) -> Tensor:
        table = even(self.bits)
        return own * self.outermost * table / table[-1]

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        count = len(even(self.bits))
        w: Any = _Trusted.apply(u, own.detach(), self.outermost, count)
        return w


class Lsq(Twin):
    """Esser et al., the listing of appendix A: round with gradient 1, a step a with its gradient
    times 1 / sqrt(n Q_p)."""

    learns = saturates = True

    def ends(self) -> tuple[int, int]:
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.bits else (-1, 1)

    def fitted(self, u: Tensor) -> Tensor:
        return 2 * mean(u) / self.ends()[1] ** 0.5 if self.bits else 1.1 * mean(u)

    def levels(self, own: Tensor) -> Tensor:
        low, high = self.ends()
        return own * torch.arange(low, high + 1, dtype=torch.float64)

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        low, high = self.ends()
        share = 1 / (u.shape[1] * high) ** 0.5
        a = valued(own, own * share)
        v = (u / a).clamp(low, high)
        return valued(v.round(), v) * a


class _Elastic(torch.autograd.Function):
    """ParetoQ's function of (u, a): z = (round(clip(u / a) k - h) + h) / k, w = a z; sign(u) for 1
    bit. Clipped at the outer z, where the paper clips u / a at .99."""

    @staticmethod
    def forward(context: Any, u: Tensor, a: Tensor, bits: int) -> Tensor:
        k, h = {1: (1.0, 0.0), 0: (1.5, 0.0), 2: (2.0, 0.5)}[bits]
        end = 1.0 if bits == 1 else (k - h) / k if bits else 1 / k
        share = u / a
        inner = share.clamp(-0.99, 0.99)
        z = u.sign() if bits == 1 else ((inner * k - h).round() + h) / k
        context.save_for_backward(z, share, share.abs() <= end)
        context.bits = bits
        return a * z

    @staticmethod
    def backward(context: Any, *grads: Any) -> Any:
        (g,), (z, share, inside) = grads, context.saved_tensors
        residual = z if context.bits == 1 else torch.where(inside, z - share, z)
        return g * inside, (g * residual).sum(-1, keepdim=True) / g.shape[1] ** 0.5, None


class Seq(Twin):
    """Stretched elastic quantization of ParetoQ, whose a is 2 steps for 2 bits, 1.5 for ternary;
    and its elastic binarization, whose a is half a step."""

    learns = saturates = True

    def __init__(self, bits: int, steps: int) -> None:
        super().__init__(bits, steps)
        self.ratio = {1: 0.5, 0: 1.5, 2: 2.0}[bits]

    def fitted(self, u: Tensor) -> Tensor:
        if self.bits == 0:
            return u.abs().amax(-1, keepdim=True)
        return self.ratio * step_of(u, self.bits)

    def levels(self, own: Tensor) -> Tensor:
        return own / self.ratio * even(self.bits)

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        w: Any = _Elastic.apply(u, own, self.bits)
        return w


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, u: Tensor, scales: Tensor) -> Tensor:
        n, p = scales[:, :1], scales[:, 1:]
        up, down = u > p / 2, u < -n / 2
        context.save_for_backward(n, p, up, down)
        return torch.where(up, p, torch.where(down, -n, 0.0))

    @staticmethod
    def backward(context: Any, *grads: Any) -> Any:
        (g,), (n, p, up, down) = grads, context.saved_tensors
        both = torch.stack([-(g * down).sum(-1), (g * up).sum(-1)], -1)
        return g * torch.where(up, p, torch.where(down, n, 1.0)), both


class Ttq(Twin):
    """Zhu et al., equations (7) and (8), with weights assigned to the nearest level."""

    learns = True

    def fitted(self, u: Tensor) -> Tensor:
        """The magnitude v of -v, 0, v that leaves the least squares: the mean of the j largest."""
        sums = u.abs().sort(-1, descending=True).values.cumsum(-1)
        j = torch.arange(1, u.shape[1] + 1, dtype=u.dtype)
        best = (sums.square() / j).argmax(-1, keepdim=True)
        return (sums / j).gather(-1, best).expand(-1, 2)

    def levels(self, own: Tensor) -> Tensor:
        return torch.stack([-own[:, 0], torch.zeros_like(own[:, 0]), own[:, 1]], -1)

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        w: Any = _Ternary.apply(u, own)
        return w


class Basis(Twin):
    """LQ-Nets: levels are all sums of +-v_i, and the v_i are learned."""

    learns = True

    def fitted(self, u: Tensor) -> Tensor:
        if self.bits == 0:
            return 1.1 * mean(u)
        rest, found = u, []
        for _ in range(self.bits):
            found.append(mean(rest))
            rest = rest - found[-1] * torch.where(rest < 0, -1.0, 1.0)
        return torch.cat(found, -1)

    def levels(self, own: Tensor) -> Tensor:
        signs = (
            list(itertools.product((-1.0, 1.0), repeat=self.bits))
            if self.bits
            else [(-1,), (0,), (1,)]
        )
        return (own @ torch.tensor(signs, dtype=own.dtype).T).sort(-1).values

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        return nearest(u, self.levels(own)) + (u - u.detach())


class Free(Twin):
    """Levels are numbers of their own, which start at those of the evenly spaced ones."""

    learns = True

    def fitted(self, u: Tensor) -> Tensor:
        return step_of(u, self.bits) * even(self.bits)

    def levels(self, own: Tensor) -> Tensor:
        return own

    def ordered(self, own: Tensor) -> Tensor:
        return own.sort(-1).values

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        return nearest(u, own) + (u - u.detach())


class Parq(Twin):
    """Each cell [lo, hi] has slope 1/s about its middle, s from 1 at a fifth of the steps to 0 at
    four fifths; gradients are straight-through."""

    def __init__(self, bits: int, steps: int) -> None:
        super().__init__(bits, steps)
        self.start, self.end = steps // 5, steps * 4 // 5
        self.begins = self.start

    def slope(self, t: int) -> float:
        x = min(max((t - self.start) / (self.end - self.start), 0.0), 1.0)
        h = [1 / (1 + math.exp(10 * (x - 0.5))) for x in (x, 0.0, 1.0)]
        return (h[0] - h[2]) / (h[1] - h[2])

    def mapped(self, u: Tensor, q: Tensor, t: int) -> Tensor:
        s = self.slope(t)
        if s == 0:
            return nearest(u, q)
        w = torch.zeros_like(u)
        for lo, hi in zip(q.T[:-1, :, None], q.T[1:, :, None], strict=True):
            middle = (lo + hi) / 2
            piece = torch.minimum(torch.maximum(middle + (u - middle) / s, lo), hi)
            w = torch.where((u >= lo) & (u <= hi), piece, w)
        return torch.where(u < q[:, :1], q[:, :1], torch.where(u > q[:, -1:], q[:, -1:], w))

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        return valued(self.mapped(u, self.levels(own), t), u)


class ClippedParq(Parq):
    """From the first step on: at s = 1 the map is a clip."""

    def __init__(self, bits: int, steps: int) -> None:
        super().__init__(bits, steps)
        self.begins = 0


class LearnedParq(Parq):
    """The step is learned by the gradients at the weights that are nearest to each level."""

    learns = True

    def quantized(self, u: Tensor, own: Tensor, t: int) -> Tensor:
        q = self.levels(own)
        share = 1 / u.shape[1] ** 0.5
        return valued(self.mapped(u, q, t), u, share * nearest(u, q))


TWINS: dict[str, type[Twin]] = {
    "straight-through": Twin,
    "saturated": Saturated,
    "dampening": Dampening,
    "CAGE": Cage,
    "QuEST": Quest,
    "LSQ": Lsq,
    "SEQ": Seq,
    "TTQ": Ttq,
    "LQ-Nets": Basis,
    "free levels": Free,
    "PARQ": Parq,
    "PARQ, clipped start": ClippedParq,
    "PARQ, learned levels": LearnedParq,
}


class Step(NamedTuple):
    """What there is after an update, by parameter."""

    latents: Params
    weights: Params
    levels: Params
    #: The least distance of a latent to a midpoint, or an end of where gradients pass.
    least: float


def train(
    twin: Twin,
    params: Params,
    quantized: list[str],
    loss: Callable[[Params, int], Tensor],
    rate: float,
    of_levels: float,
) -> Iterator[Step]:
    """Gradient descent by `rate`, of what is learned by `of_levels`."""
    u, own = dict(params), Params()
    for t in range(twin.steps):
        u = {k: p.detach().requires_grad_() for k, p in u.items()}
        own = {k: p.detach().requires_grad_() for k, p in own.items()}
        made = t - 1 >= twin.begins
        w = {k: twin.quantized(p, own[k], t - 1) if made and k in own else p for k, p in u.items()}
        whole = loss(w, t)
        if made:
            whole = whole + sum(twin.penalty(u[k], w[k], own[k], t) for k in own)
        learned = own if twin.learns and made else {}
        leaves = [*u.values(), *learned.values()]
        grads = iter(torch.autograd.grad(whole, leaves))
        with torch.no_grad():
            for k, p in u.items():
                pulled = twin.pull(t) * (p - w[k]) if k in own else 0.0
                u[k] = p - rate * next(grads) - rate * pulled
            for k, q in learned.items():
                own[k] = twin.ordered(q - of_levels * next(grads))
            if not learned and t % twin.period == 0:
                own = {k: twin.fitted(u[k]) for k in quantized}
            now = (
                {k: twin.quantized(u[k], q, t) for k, q in own.items()} if t >= twin.begins else {}
            )
            levels = {k: twin.levels(q) for k, q in own.items()}
            far = [
                (u[k][..., None] - edge[:, None]).abs().min().item()
                for k, q in levels.items()
                for edge in ((q[:, 1:] + q[:, :-1]) / 2, *([q[:, [0, -1]]] * twin.saturates))
            ]
        yield Step(u, u | now, levels, min(far))
