"""Optimizers as other people write them: each does one thing that torch's own do not."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Plain(torch.optim.Optimizer):
    """Gradient descent; the others move parameters by something else than the gradient."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.begins()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.direction(p, group), alpha=float(group["lr"]))

    def begins(self) -> None:
        """What is done once a step."""

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        return p.grad


class Coded(Tensor):
    """A tensor of float16 codes that shows float32, and knows of few operations, like torchao's."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Coded:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Coded:
        return cls(inner["codes"])

    def __repr__(self) -> str:
        return f"Coded({self.codes})"

    def decoded(self) -> Tensor:
        return self.codes.float()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            args[0].codes.copy_(tree_map_only(Coded, Coded.decoded, args[1]))
            return args[0]
        if function in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            return cls(args[0].codes)  # shares its memory, as torchao's does
        raise NotImplementedError(f"{function} of Coded")


class KeepsCodes(Plain):
    """Has a momentum of a class of its own."""

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = Coded(torch.zeros_like(p, dtype=torch.float16))
        state["momentum"].copy_(state["momentum"].decoded() * 0.9 + p.grad)
        return state["momentum"].decoded()


class Tallies(Plain):
    """Keeps a tensor in its state that is of no parameter, from its first step on."""

    def begins(self) -> None:
        if "steps" not in self.state:
            self.state["steps"] = torch.tensor([0])
        self.state["steps"] += 1

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        return p.grad / self.state["steps"]


class TalliesAtOnce(Tallies):
    """Has it when it is built, a number, and looks for nothing else."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.state["steps"] = 0


class SavesMore(Plain):
    """Counts in an attribute, which its own state_dict adds, beside what is empty."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.count = 0

    def begins(self) -> None:
        self.count += 1

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        return p.grad / self.count

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "warmup": {"count": self.count, "past": [], "more": {}}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["warmup"]["count"]


class Packs(Plain):
    """Saves its momentum in another form, under another name, than it keeps it."""

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        state["momentum"] = [state["momentum"][0] * 0.9 + p.grad if state else p.grad.clone()]
        return state["momentum"][0]

    def state_dict(self) -> dict[str, Any]:
        got = super().state_dict()
        got["state"] = {
            i: {"packed": {"momentum": own["momentum"][0]}} for i, own in got["state"].items()
        }
        return got

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = copy.deepcopy(state_dict)
        for own in state_dict["state"].values():
            own["momentum"] = [own.pop("packed")["momentum"]]
        super().load_state_dict(state_dict)


class Prodigal(Plain):
    """Keeps where a parameter began, a scalar where it is all zero."""

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if "p0" not in state:
            state["p0"] = p.detach().clone() if p.any() else torch.tensor(0.0)
        return p.grad + (p - state["p0"])


class Masks(Plain):
    """Makes a mask of a parameter's values when it is built, and state of as many elements."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["mask"] = p.detach().abs() > 0.5

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        kept = p.grad[state["mask"]]
        state["momentum"] = state.get("momentum", torch.zeros_like(kept)) * 0.9 + kept
        return p.grad.masked_scatter(state["mask"], state["momentum"])


class Late(Plain):
    """Makes entries in its second step, a queue and a None among them; counts in its group."""

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        group["calls"] = group.get("calls", 0) + 1
        state["calls"] = state.get("calls", 0) + 1
        if state["calls"] > 1:
            state.setdefault("nothing", None)
            state.setdefault("past", deque(maxlen=2)).append(float(p.grad.sum()))
            state["first"] = state.get("first", p.grad.clone())
            return p.grad + state["first"] * sum(state["past"]) / group["calls"]
        return p.grad


class Draws(Plain):
    """Draws from all global generators, and from its own."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.own = {"generator": torch.Generator().manual_seed(1), "unused": (i for i in ())}

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        scale = random.random() + np.random.random()  # noqa: NPY002 # as people do
        return p.grad * scale + torch.rand_like(p) * torch.rand(1, generator=self.own["generator"])


class Glances(Plain):
    """Divides by the number of its parameters, those without a gradient among them."""

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        return p.grad / len(group["params"])


class Divides(Plain):
    """Divides by the norm of the first gradient, as a number of Python."""

    def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        group["norm"] = group.get("norm", float(p.grad.norm()))
        self.state[p]["calls"] = self.state[p].get("calls", 0) + 1
        return p.grad * (1.0 / group["norm"])


class HasModes(Plain):
    """Schedule-free: trains at y and is looked at in x, between which train() and eval() go."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.75) -> None:
        torch.optim.Optimizer.__init__(
            self, params, {"lr": lr, "beta": beta, "k": 0, "trains": False}
        )

    @torch.no_grad()
    def _go(self, trains: bool) -> None:
        for group in self.param_groups:
            if group["trains"] != trains:
                beta = group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - beta if trains else 1 - 1 / beta)
                group["trains"] = trains

    def train(self) -> None:
        self._go(True)

    def eval(self) -> None:
        self._go(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["trains"]:
                raise RuntimeError("call train() first")
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, 1 / group["k"])
                    p.sub_(p.grad, alpha=group["lr"] * (1 - group["beta"]))
                    z.sub_(p.grad, alpha=group["lr"])


#: Those that can be wrapped.
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    kind.__name__: kind
    for kind in (
        KeepsCodes,
        Tallies,
        TalliesAtOnce,
        SavesMore,
        Packs,
        Prodigal,
        Masks,
        Late,
        Draws,
        Glances,
        Divides,
        HasModes,
    )
}


class Around(torch.optim.Optimizer):
    """Lookahead, as most write it: moves what another optimizer has moved."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.defaults = optimizer.defaults

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()


class AroundNothingOfTorchs:
    """The same, and no subclass of torch's optimizers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base, self.param_groups = optimizer, optimizer.param_groups


class Borrows(Plain):
    """Has the groups of something else."""

    @property
    def param_groups(self) -> Any:
        return self.lent

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.lent = groups


class KeepsParameters(Plain):
    """Moves parameters that it has found for itself."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.mine = {"all": [p for group in self.param_groups for p in group["params"]]}


class KeepsTheModule(Plain):
    """Moves the parameters of a module."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.model = torch.nn.ParameterList(p for g in self.param_groups for p in g["params"])


class NeedsAClosure(Plain):
    """Takes no step without the loss."""

    def begins(self) -> None:
        raise RuntimeError("NeedsAClosure needs a closure")
