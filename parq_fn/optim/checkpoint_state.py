"""What a checkpoint holds of an optimizer: state by the names of parameters, and what groups hold,
by those names too, as torch's `flatten_optimizer_state_dict` does: then groups of several modules,
such as the stages of a pipeline, do not meet, and groups may be cut otherwise where they are
loaded.

    optimizer.state.NAME.KEY            of a parameter's state
    optimizer.param_groups.NAME.KEY     of its group; in earlier versions and torch's other form
    optimizer.param_groups.INDEX.KEY    of a group, with the names of its parameters under "params"
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from parq_fn.foundation.torch_private import nested
from parq_fn.optim.adapter import Adapter
from parq_fn.optim.base_owner import AVERAGE, is_of_link, is_own
from parq_fn.optim.checkpoint_bytes import Planner, restricted
from parq_fn.optim.groups import KEYS, is_quantized
from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.state import BEYOND, Entries, Group
from parq_fn.optim.tree_owner import DIGEST
from parq_fn.transforms.chain import every_link
from parq_fn.transforms.prox_link import Prox

_NAMES = ("params", "param_names")
#: What groups show of their last step; parameters need not agree in it.
_SHOWN = ("inverse_slope", "lr_sum")
#: Entries that tell prox links apart.
_LINKS = ("link", DIGEST)
_GROUPS, _STATE = "optimizer.param_groups.", "optimizer.state."


def by_name(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict, with names for parameters, to save: its groups by them."""
    groups = {
        name: {key: got for key, got in group.items() if key not in (*_NAMES, BEYOND)}
        for group in state["param_groups"]
        for name in group["params"]
    }
    beyond = [group[BEYOND] for group in state["param_groups"] if BEYOND in group]
    return {**state, "param_groups": groups, **({BEYOND: _packed(beyond[0])} if beyond else {})}


def _packed(got: Any) -> Tensor:
    """[bytes], uint8: of anything, with dicts and lists that are empty, which torch leaves out."""
    file = io.BytesIO()
    torch.save(got, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _unpacked(got: Tensor) -> Any:
    return restricted(io.BytesIO(got.numpy().tobytes()), f"the entry {BEYOND!r}")


def place_of(stored: Any) -> Any:
    """What to load an entry of a checkpoint into."""
    if isinstance(stored, TensorStorageMetadata):
        return torch.empty(stored.size, dtype=stored.properties.dtype)
    return None


def read(folder: Path, saved: dict[str, Any], *, no_dist: bool) -> None:
    """Fills what was saved in; raises ValueError for what is missing or of another shape."""
    try:
        load(saved, checkpoint_id=folder, planner=Planner(), no_dist=no_dist)
    except CheckpointException as error:
        causes = sorted({str(cause) for cause, _ in error.failures.values()})
        raise ValueError(f"checkpoint {folder} does not fit: {'; '.join(causes)}") from None


def check_values(folder: Path, index: Metadata, names: Iterable[str]) -> None:
    """Raises ValueError where what was saved under these names, and is no tensor, holds more than
    values; groups are read apart, before anything is changed."""
    wanted = tuple(f"{name}." for name in names)
    _read(
        folder,
        index,
        [
            key
            for key, stored in index.state_dict_metadata.items()
            if isinstance(stored, BytesStorageMetadata)
            and f"{key}.".startswith(wanted)
            and not key.startswith(_GROUPS)
        ],
    )


# Groups


def _saved_groups(folder: Path, index: Metadata, own: list[Group]) -> list[Group]:
    """The optimizer's own groups, with what was saved of them.

    own: of its state dict, with names for parameters.
    Raises ValueError for parameters of one group that were saved with different values.
    """
    names = {name for group in own for name in group["params"]}
    ours = {*KEYS, "quant_prox", *_SHOWN} - {key for group in own for key in group}
    positions = _positions(folder, index)
    owners: dict[str | int, list[str]] = {}
    for name in names:
        owners.setdefault(positions.get(name, name), []).append(name)
    paths = {
        key: path
        for key, path in _group_paths(index).items()
        if path[0] in owners and path[1] not in (*_NAMES, *ours)
    }
    found = nested(_read(folder, index, paths), paths)
    beyond = _beyond(folder, index)
    for values in found.values():
        beyond |= values.pop(BEYOND, {})
    saved = {name: values for owner, values in found.items() for name in owners[owner]}
    groups = [_joined(folder, i, group, saved) for i, group in enumerate(own)]
    if groups:
        groups[0].pop(BEYOND, None)
        groups[0] |= {BEYOND: beyond} if beyond else {}
    return groups


def _beyond(folder: Path, index: Metadata) -> Entries:
    """What was saved of a base optimizer that is of no parameter."""
    key = f"optimizer.{BEYOND}"
    if key not in index.state_dict_metadata:
        return {}
    found: Entries = _unpacked(_read(folder, index, [key])[key])
    return found


def _group_paths(index: Metadata) -> dict[str, tuple[str | int, ...]]:
    """{key in the checkpoint: (index or parameter, key of the group, ...)}."""
    found: dict[str, tuple[str | int, ...]] = {}
    for key, path in (index.planner_data or {}).items():
        if path[:2] == ("optimizer", "param_groups") and len(path) > 3:
            found[key] = path[2:]
        elif key.startswith(_GROUPS) and len(path) == 2:  # flattened by torch
            name, _, entry = key.removeprefix(_GROUPS).rpartition(".")
            found[key] = name, entry
    return found


def _positions(folder: Path, index: Metadata) -> dict[str, int]:
    """{parameter: the index of the group that it was saved in}, where groups were saved so."""
    listed = {
        key: path
        for key, path in _group_paths(index).items()
        if isinstance(path[0], int) and path[1] == "params"
    }
    return {
        name: int(listed[key][0])
        for key, names in _read(folder, index, listed).items()
        for name in names
    }


def _read(folder: Path, index: Metadata, keys: Iterable[str]) -> dict[str, Any]:
    """Some of a checkpoint's entries, on this rank alone."""
    found = {key: place_of(index.state_dict_metadata[key]) for key in keys}
    if found:
        read(folder, found, no_dist=True)
    return found


def _joined(folder: Path, index: int, own: Group, saved: dict[Any, Entries]) -> Group:
    """A group with what was saved of its parameters, in which they are to agree."""
    group = copy.copy(own)
    by: dict[str, str] = {}
    for name in own["params"]:
        for key, got in saved.get(name, {}).items():
            if key not in by:
                by[key], group[key] = name, _like(got, own.get(key))
            elif key not in _SHOWN and not _same(saved[by[key]][key], got):
                raise ValueError(
                    f"checkpoint {folder}: group {index} of the optimizer has {by[key]!r}, which "
                    f"was saved with {key}={saved[by[key]][key]}, and {name!r}, with {key}={got}; "
                    "give them groups of their own"
                )
    return group


def _like(got: Any, own: Any) -> Any:
    return got.to(own.device) if isinstance(got, Tensor) and isinstance(own, Tensor) else got


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


# State


def fit(folder: Path, index: Metadata, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Gives groups what was saved of them, and leaves out of an adapter's state what a checkpoint
    has not and it can do without.

    Those are the digests of links, in earlier versions' checkpoints, and all that QuantOptimizer
    adds to its base where the checkpoint is of training in full precision.
    Raises ValueError for another optimizer's checkpoint, of which TransformOptimizer can take
    nothing, and where groups were quantized otherwise.
    """
    state["param_groups"] = _saved_groups(folder, index, state["param_groups"])
    if not isinstance(optimizer, Adapter):
        return
    optimizer.check_groups({"state": {}, "param_groups": state["param_groups"]})
    stored = {key[:i] for key in index.state_dict_metadata for i in _ends(key)}
    entries: dict[str, Entries] = state["state"]
    named = {f"{_STATE}{name}.{key}": key for name, own in entries.items() for key in own}
    if isinstance(optimizer, QuantOptimizer):
        if any(f"{_STATE}{name}.{DIGEST}" in stored for name in entries):
            raise ValueError(
                f"checkpoint {folder} does not fit: it is of a TransformOptimizer; load the model "
                "alone, load_checkpoint(folder, model), whose weights become the latents"
            )
        if "optimizer" in stored and not any(
            key in stored for key, last in named.items() if last == "updates"
        ):
            _leave_to_the_base(entries, stored)
        else:
            _leave_out_quantized(entries, stored)
        _make_places(index, optimizer, state)
    elif named and stored.isdisjoint(named) and "optimizer" in stored:
        raise ValueError(
            f"checkpoint {folder} does not fit: it is of an optimizer that TransformOptimizer has "
            "no entries of; load the model alone, load_checkpoint(folder, model), whose weights "
            "become the latents"
        )
    for name, own in entries.items():
        for key in (*_LINKS, *AVERAGE):
            if f"{_STATE}{name}.{key}" not in stored:
                own.pop(key, None)
            elif key in AVERAGE and isinstance(optimizer, QuantOptimizer) and key not in own:
                raise ValueError(
                    f"checkpoint {folder}: it has an average of the latents of parameter {name!r}, "
                    "and the optimizer keeps none; build QuantOptimizer(..., average=...), or "
                    "load the model alone, load_checkpoint(folder, model), and begin with its "
                    "weights as latents"
                )
    _check_links(folder, index, optimizer, entries)


def _check_links(
    folder: Path, index: Metadata, optimizer: Adapter, entries: dict[str, Entries]
) -> None:
    """Raises ValueError where parameters were trained with other prox links."""
    known = {
        f"{_STATE}{name}.{key}": (name, own[key])
        for name, own in entries.items()
        for key in _LINKS
        if key in own
    }
    for key, got in _read(folder, index, known).items():
        name, own = known[key]
        if got != own:
            raise ValueError(
                f"checkpoint {folder}: parameter {name!r} was trained with another prox link than "
                f"the optimizer has, {_links_of(optimizer)}; build the optimizer with that one, or "
                "load the model alone, load_checkpoint(folder, model), and begin with its weights "
                "as latents"
            )


def _links_of(optimizer: Adapter) -> str:
    """Its prox links, as they print."""
    links: Iterable[Any] = every_link(getattr(optimizer, "transformation", None))
    if isinstance(optimizer, QuantOptimizer):
        links = map(optimizer.link, filter(is_quantized, optimizer.param_groups))
    return ", ".join({repr(link): None for link in links if isinstance(link, Prox)})


def _make_places(index: Metadata, optimizer: QuantOptimizer, state: dict[str, Any]) -> None:
    """Makes places for entries that a base optimizer has made since its first step, and for those
    whose shapes are not always the same."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(zip(names, params, strict=True))
    paths: dict[str, dict[str, tuple[str | int, ...]]] = {}
    for key, path in (index.planner_data or {}).items():
        if path[:2] == ("optimizer", "state") and len(path) > 3:
            paths.setdefault(str(path[2]), {})[key] = path[3:]
    for name, own in state["state"].items():
        flat = paths.get(name, {})
        places = {key: place_of(index.state_dict_metadata[key]) for key in flat}
        for key, place in nested(places, flat).items():
            if is_own(key) or (key in own and _fits(own[key], place)):
                continue
            p = by_name[name]
            if key not in own or optimizer.entry_varies(p, key):
                alike = isinstance(place, Tensor) and place.shape == p.shape
                own[key] = torch.empty_like(p, dtype=place.dtype) if alike else place


def _fits(own: Any, place: Any) -> bool:
    if isinstance(own, Tensor) or isinstance(place, Tensor):
        alike = isinstance(own, Tensor) and isinstance(place, Tensor)
        return alike and own.shape == place.shape
    return type(own) is type(place) and not isinstance(own, dict | list)


def _ends(key: str) -> list[int]:
    return [i for i, letter in enumerate(key) if letter == "."] + [len(key)]


def _leave_out_quantized(entries: dict[str, Entries], stored: set[str]) -> None:
    """Leaves out what QuantOptimizer keeps of quantized parameters alone, of those that it has
    trained in full precision: their latents come from the parameters."""
    for name, own in entries.items():
        places = {key: f"{_STATE}{name}.{key}" for key in ("updates", "qparams", "levels")}
        if places["updates"] in stored and stored.isdisjoint((places["qparams"], places["levels"])):
            for key in list(filter(is_of_link, own)):
                del own[key]


def _leave_to_the_base(entries: dict[str, Entries], stored: set[str]) -> None:
    """Leaves the entries of the base optimizer; of parameters that it did not train, none."""
    trained = {name for name in entries if f"{_STATE}{name}" in stored}
    for name in list(entries):
        own = {key: got for key, got in entries[name].items() if not is_own(key)}
        if name in trained or (own and not trained):
            entries[name] = own  # where it lacks one, loading says so
        else:
            del entries[name]
