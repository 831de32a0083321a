"""What a store of latents asks of the adapter that it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from parq_fn.optim.old_states import Kept
from parq_fn.optim.state import Entries, Group


class Place(NamedTuple):
    """A parameter in its group."""

    p: Tensor
    group: Group
    name: str  # in the tree of all parameters
    label: str  # in messages


class Owner(Protocol):
    """What the two adapters differ in: which entries a parameter has."""

    who: str  # the adapter, in messages
    keys: tuple[str, ...]  # of groups, that no loaded state changes
    widens: bool  # whether a narrow parameter always has a latent
    needs: frozenset[str]  # the keys of entries that every parameter has

    def check(self) -> None:
        """Raises ValueError where groups were changed in a way of which nothing can be made."""

    def kind(self, group: Group) -> dict[str, Any]:
        """What of a group the entries of its parameters follow."""

    def compared(self, saved: Group) -> tuple[str, ...]:
        """The keys of a saved group that are to be those of the optimizer's."""

    def begin(self, fresh: list[Place], places: list[Place]) -> dict[Tensor, Entries]:
        """Entries as before any step, of the fresh ones among the places at least."""

    def latent_dtype(self, p: Tensor) -> torch.dtype:
        """In which the parameter's latent is kept."""

    def adopted(self, p: Tensor, entries: Entries) -> None:
        """The entries are the parameter's now, in the optimizer's state."""

    def dropped(self, p: Tensor) -> None:
        """The parameter is no longer one of the optimizer's."""

    def is_attached(self, p: Tensor, entries: Entries) -> bool:
        """Whether the next step is one of these entries; else they are to be adopted."""

    def watched(self, entries: Entries) -> Iterable[str]:
        """The keys of entries that other code may replace by such as fit alone."""

    def weighs(self, key: str) -> bool:
        """Whether weights follow from the entry."""

    def trained(self, entries: Entries) -> bool:
        """Whether a step was taken with these entries."""

    def shared(self) -> set[str]:
        """The keys of entries that all parameters have in common."""

    def weights(self, params: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, this rank's part of the weights that its latent has now) of each."""

    def kept(self) -> dict[Tensor, dict[str, Kept]]:
        """What the qparams among the entries of every parameter are of, by their keys."""

    def shown(self) -> dict[Tensor, Entries]:
        """The entries of every parameter in the form in which they are saved."""

    def varies(self, p: Tensor) -> Callable[[str], bool]:
        """Whether an entry of the parameter, by its key, may be of any shape, or not be there."""

    def restored(
        self,
        rows: list[tuple[Tensor, Entries | None]],
        groups: list[Group],
        state_dict: dict[str, Any],
    ) -> list[tuple[Tensor, Entries | None]]:
        """Saved entries of each parameter as they are to be kept, and what the state dict holds
        besides taken over; raises ValueError, and changes nothing, where that does not fit."""

    def check_links(self, p: Tensor, mine: Entries, saved: Entries, where: str) -> None:
        """Raises ValueError for a saved state of other prox links."""

    def fits(self, p: Tensor, mine: Entries, saved: Entries, label: str) -> Entries:
        """Entries of a saved state, completed by the parameter's own; raises ValueError where they
        do not fit."""
