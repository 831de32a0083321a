"""What tells that other code has written a parameter since the optimizer did."""

from __future__ import annotations

from typing import Literal, NamedTuple

# What a parameter holds, where nothing was done to it since.
COPIED = "copied"  # what its latent is a copy of
WRITTEN = "written"  # the weights of its latent
BEHIND = "behind"  # the weights that its latent had when it was frozen
LOADED = "loaded"  # anything: its latent was loaded, and is the one that counts


#: Parameters whose values are compared, though torch counted no write.
Compare = Literal["none", "sharded", "all"]


class Mark(NamedTuple):
    """What tells that a parameter was written since, and what it held."""

    versions: tuple[int, ...]
    held: str
