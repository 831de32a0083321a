"""What of QuantOptimizer goes through to the optimizer that it wraps, besides the step."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.torch_private import own_attributes
from parq_fn.optim.adapter import Adapter, settled
from parq_fn.optim.base_optimizer import copied
from parq_fn.optim.base_owner import BaseOwner
from parq_fn.optim.groups import is_quantized
from parq_fn.optim.state import BEYOND, unshared
from parq_fn.transforms.prox_link import Prox


class Wrapping(Adapter):
    """An adapter around a base optimizer, which moves latents."""

    base: Optimizer
    prox: Prox | None
    latent_dtype: torch.dtype | None
    _latents: dict[Tensor, Tensor]

    def _shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"base": type(self.base).__name__}
        if self.latent_dtype is not None:
            shown["latent_dtype"] = self.latent_dtype
        if not any(map(is_quantized, self.param_groups)):
            return {**shown, "prox": self.prox, "quantized": "nothing"}
        return shown if self.prox is None else {**shown, "prox": self.prox}

    @settled
    def train(self, mode: bool = True) -> None:
        """The base optimizer's `train()`, or `eval()` where mode is off, on latents and on the
        parameters that are its alone; quantized parameters hold the weights of their latents after
        it. Schedule-free optimizers have them; of others nothing is changed.
        """
        self._store.sync()
        change = getattr(self.base, "train" if mode else "eval", None)
        if not callable(change):
            return
        self._store.check_not_lent("train or eval")
        owner = self._owner()
        with torch.no_grad(), owner.latents_in_groups():
            change()
        for p, latent in self._latents.items():
            if latent is not p:
                self.state[p]["latent"] = latent.detach()
        self._store.rewrite()

    def eval(self) -> None:
        """As train(False)."""
        self.train(False)

    def entry_varies(self, p: Tensor, key: str) -> bool:
        """Whether the base keeps an entry of a parameter in a shape that depends on what it holds,
        or on the steps that were taken."""
        return self._owner().varies(p)(key)

    def _owner(self) -> BaseOwner:
        owner = self._store.owner
        assert isinstance(owner, BaseOwner)
        return owner

    @settled
    def state_dict(self) -> dict[str, Any]:
        """As of every torch.optim optimizer, with the latents of what parameters hold now; entries
        of the base in the form in which it saves them, and what it saves that is of no parameter
        in the first group, under "base_state"."""
        state_dict = super().state_dict()
        shown, groups, beyond = self._owner().saved()
        params = [p for group in self.param_groups for p in group["params"]]
        kept = [
            {k: got for k, got in mine.items() if k in ("params", "param_names") or k in group}
            for mine, group in zip(state_dict["param_groups"], groups, strict=True)
        ]
        if beyond and kept:
            kept[0][BEYOND] = beyond
        state = {i: shown[p] for i, p in enumerate(params) if shown[p]}
        return unshared({**state_dict, "state": state, "param_groups": kept})

    @settled
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if type(self.base).__getstate__ is Optimizer.__getstate__:
            state["_of_the_base"] = _Attributes(own_attributes(self.base))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"average": None, "latent_dtype": None, **state}  # a version before they were
        kept = state.pop("_of_the_base", None)
        super().__setstate__(state)
        if kept is not None:
            vars(self.base).update(kept.values)


class _Attributes:
    """What a base keeps besides what torch copies of an optimizer; in a pickle, what can be."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attributes:
        return _Attributes({name: copied(got, memo) for name, got in self.values.items()})

    def __reduce__(self) -> Any:
        return _Attributes, ({k: got for k, got in self.values.items() if _can_be_pickled(got)},)


def _can_be_pickled(got: Any) -> bool:
    try:
        pickle.dumps(got)
    except Exception:  # whatever a class of the user's own raises
        return False
    return True
