"""What tells that other code has written a parameter, or entries of its state, since the optimizer
did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from parq_fn.foundation.torch_private import writes_to
from parq_fn.optim.state import Entries, versions

# What a parameter holds, where nothing was done to it since.
COPIED = "copied"  # what its latent is a copy of
WRITTEN = "written"  # the weights of its latent
BEHIND = "behind"  # the weights that its latent had when it was frozen
TAKEN = "taken"  # what other code wrote, of which its latent has taken elements
# Its latent is the one that counts; the parameter may hold anything until it is written:
LOADED = "loaded"  # the latent was loaded
AHEAD = "ahead"  # it was edited in the optimizer's state, or a step stopped on its way
BOTH = "both"  # other code has written the parameter and its latent, who knows which of them last


#: Parameters whose values are compared, though torch counted no write.
Compare = Literal["none", "sharded", "all"]


class Mark(NamedTuple):
    """What tells that a parameter was written since, what it held, and what its state was."""

    versions: tuple[int, ...]
    held: str
    entries: Entries  # those of the optimizer's state, itself
    seen: dict[str, tuple[Any, tuple[int, ...]]]  # of these: what stood there, and its writes

    def changed(self, entries: Entries) -> list[str]:
        """The keys of entries that were put there since, or written."""
        return [
            key
            for key, (got, writes) in self.seen.items()
            if entries.get(key) is not got or writes != writes_of(got)
        ]


def seen(entries: Entries, keys: Iterable[str]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Of a mark: what stands under these keys. It is kept, so that nothing else gets its memory."""
    return {key: (entries[key], writes_of(entries[key])) for key in keys if key in entries}


def writes_of(got: Any) -> tuple[int, ...]:
    if type(got) is Tensor:  # without more, for this is asked at every step
        return writes_to(got), got.data_ptr()
    return versions(got) if isinstance(got, Tensor) else ()
