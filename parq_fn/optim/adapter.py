"""What both torch adapters are: optimizers whose public methods begin with the store's `sync`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.torch_private import not_traced
from parq_fn.optim.latents import LatentStore
from parq_fn.optim.state import unshared

P = ParamSpec("P")
T = TypeVar("T")


def settled(method: Callable[P, T]) -> Callable[P, T]:
    """A method that makes tensors as it would without torch.inference_mode, whose tensors no later
    step may write, and without meta for torch's default device, which holds no values."""

    @wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            if torch.get_default_device().type == "meta":
                modes.enter_context(torch.device("cpu"))
            return method(*args, **kwargs)

    return wrapped


class Adapter(Optimizer):
    """A torch.optim optimizer whose parameters hold weights, and whose state holds latents."""

    #: Attributes that copies have, besides the store.
    _copied: ClassVar[tuple[str, ...]]
    _store: LatentStore

    @settled
    def sync(self) -> None:
        """Makes edits of parameters by other code those of their latents, and gives parameters the
        weights of latents that it has edited in the state.

        All other methods do so too, but where torch counted no write: through `p.data`, and to
        sharded parameters by torch._foreach operations (other optimizers use them) and by
        torch.distributed.checkpoint.load into a state dict. Call it after those.
        """
        self._store.sync("all")

    @not_traced
    @settled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every torch.optim optimizer; parameters hold the weights of edited latents then."""
        if self._store.has_edits():
            self._store.sync()
        super().zero_grad(set_to_none)

    @settled
    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) in the order of the groups; without names "0.2", the third of the
        first group."""
        self._store.sync()
        return ((place.name, place.p) for place in self._store.places())

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside `with optimizer.rounded():` quantized parameters hold the nearest levels of their
        latents, however far the annealing is, to be evaluated or exported; after it what they held
        before, bit for bit, exceptions included.

        Before levels are fitted, they are those of the latents now. The optimizer can be read
        inside (`levels`, `state_dict`) and not stepped, loaded or copied: RuntimeError. What is
        written to parameters inside is lost.
        """
        self._lend(self._rounded)
        try:
            yield
        finally:
            self._take_back()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside `with optimizer.averaged_weights():` parameters hold the weights of the averages
        of their latents, mapped after averaging, as `weights_of_average` gives them; else as
        `rounded`. Raises ValueError where no average is kept.
        """
        self._lend(self._averages)
        try:
            yield
        finally:
            self._take_back()

    @settled
    def _lend(self, weights: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> None:
        self._store.lend(weights)

    @settled
    def _take_back(self) -> None:
        self._store.take_back()

    def _rounded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(quantized parameter, this rank's part of its nearest levels) of each."""
        raise NotImplementedError(f"{type(self).__name__} must define _rounded")

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, this rank's part of the weights of its average) of each."""
        raise NotImplementedError(f"{type(self).__name__} must define _averages")

    def __repr__(self) -> str:
        first, _, groups = super().__repr__().partition("\n")
        return "\n".join([first, *(f"{key}: {got}" for key, got in self._shown().items()), groups])

    def _shown(self) -> dict[str, Any]:
        """What it was built with, as it prints."""
        raise NotImplementedError(f"{type(self).__name__} must define _shown")

    @settled
    def state_dict(self) -> dict[str, Any]:
        """As of every torch.optim optimizer, with the latents of what parameters hold now."""
        self._store.sync("sharded")
        return unshared(super().state_dict())

    @settled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, tensors in the dtypes of the optimizer's own; entries that are not known
        are kept as they were saved.

        Parameters are matched by position. One without saved state keeps its own, but for a
        latent, which is taken from the parameter. The parameters themselves are the module's to
        load, before or after. Raises ValueError, and changes nothing, where groups, shapes or
        entries do not fit.
        """
        self._store.load_state_dict(state_dict)

    def check_groups(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError unless a state dict's groups are those of this optimizer, quantized
        alike."""
        self._store.matched(state_dict)

    @settled
    def __getstate__(self) -> dict[str, Any]:
        self._store.sync("sharded", write=False)  # a copy of the module may have been made before
        names = ("defaults", "state", "param_groups", "_store", *self._copied)
        return {name: self.__dict__[name] for name in names}

    @settled
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_store" not in state:
            self._resume()
        self._store.copied()

    def _resume(self) -> None:
        """Makes a store, of what a version without one has pickled."""
        raise NotImplementedError(f"{type(self).__name__} must define _resume")
