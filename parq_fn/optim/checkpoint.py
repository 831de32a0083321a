"""Distributed checkpoints of a model and its optimizer that are whole or not there.

torch.distributed.checkpoint writes a folder: a file a rank and one that says what lies where. It
does not notice a file that was cut off until it reads past its end, when what stands before is
loaded already.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from parq_fn.optim.adapter import Adapter
from parq_fn.optim.checkpoint_files import (
    Writer,
    check_files,
    check_target,
    digests_of,
    found,
    give_up,
    start,
    take_place,
    target_of,
    unfinished_of,
)
from parq_fn.optim.checkpoint_state import by_name, check_values, fit, place_of, read
from parq_fn.optim.ranks import gathered, many, rank_and_world, together
from parq_fn.optim.state import Group


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    **others: Stateful | dict[str, Any],
) -> None:
    """Saves a model's and its optimizer's state in a folder, and others by name: what has a
    state_dict, such as a learning-rate scheduler, and dicts, such as progress={"epoch": 3}.

    Every rank calls it. A folder gets its name when all in it is written; where it is a checkpoint
    already, the new one's files are put beside the old one's, take their place by one rename, and
    nothing else in the folder is touched. A symbolic link is followed. Groups are saved by the
    names of their parameters, so that stages of a pipeline may be saved into one folder. Digests
    (sha256) of all files are saved along, for which each rank reads its share of them again.

    Raises ValueError, before anything is written, for an empty path, and for one that holds
    something else than a checkpoint; TypeError for others that are neither; OSError, on every rank,
    where the system refuses to write, as on a full disk: the old checkpoint is then still there;
    RuntimeError where a rank has ended, or does not come within the process group's timeout: the
    old one is there, or the new one whole, and the next save removes what else was written.

    >>> import tempfile
    >>> import torch
    >>> from parq_fn import hard_prox, lsbq
    >>> from parq_fn.optim import QuantOptimizer, load_checkpoint
    >>> net = nn.Linear(4, 2)
    >>> base = torch.optim.SGD([{"params": net.parameters(), "quant_bits": 1}], lr=0.1)
    >>> optimizer, folder = QuantOptimizer(base, hard_prox(lsbq(1))), tempfile.mkdtemp() + "/last"
    >>> save_checkpoint(folder, net, optimizer, progress={"epoch": 3})
    >>> progress = {"epoch": 0}
    >>> load_checkpoint(folder, net, optimizer, progress=progress)
    >>> progress
    {'epoch': 3}
    """
    _check_arguments("save_checkpoint", folder, model, optimizer)
    _check_others(others)
    final = target_of(folder)
    together(lambda: _check_own("save_checkpoint", model, optimizer))
    together(lambda: check_target(final))  # all have looked before one writes
    unfinished = unfinished_of(final)
    rank, world = rank_and_world()
    try:
        together(lambda: start(final) if rank == 0 else None)
        with _thawed(model), _quiet():
            parameters, state = get_state_dict(model, optimizer)
            saved = {"model": parameters, "optimizer": by_name(state), **others}
            save(saved, storage_writer=Writer(unfinished), no_dist=not many())
        share = together(lambda: digests_of(unfinished, rank, world))
        digests = {name: digest for own in gathered(share) for name, digest in own.items()}
        together(lambda: take_place(final, digests) if rank == 0 else None)
    except (Exception, CheckpointException) as error:  # the latter is none of the former
        if rank == 0:
            give_up(final)
        raise _cause_of(error, final) from None


def _cause_of(error: BaseException, final: Path) -> BaseException:
    """What the system said to a rank, of what torch made of it, or all that was said."""
    if many() and isinstance(error, RuntimeError):
        return RuntimeError(
            f"checkpoint {final} was not saved by all ranks: {error}. A checkpoint that was there "
            "is whole, or the new one is"
        )
    if not isinstance(error, CheckpointException):
        return error
    causes = [cause for cause, _ in error.failures.values()]
    said = "; ".join(sorted({str(cause) for cause in causes}))
    failed = ValueError(f"checkpoint {final} cannot be written: {said}")
    return next((cause for cause in causes if isinstance(cause, OSError)), failed)


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    **others: Stateful | dict[str, Any],
) -> None:
    """Loads what `save_checkpoint` or torch.distributed.checkpoint saved, on as many ranks as it
    was saved on or on others. Without an optimizer the model's state alone is loaded, as to
    evaluate it; without a model, the others alone. Dicts among the others are filled in place with
    all that was saved under their name. Every rank calls it.

    A checkpoint of training in full precision, sharded or not, may be where quantized training
    starts: QuantOptimizer takes moments and steps of its base from it, and latents are the loaded
    parameters.

    Before anything is changed, digests are compared, for which each rank reads its share of the
    files; folders that torch.distributed.checkpoint or an earlier version wrote have none, so that
    torch's checksums are. Both are against accidents: load no checkpoint that you do not trust.
    `.metadata` is a pickle, of which no other classes are taken than torch writes; whatever is no
    tensor is pickled too, and of it values alone are taken, as of torch.load(weights_only=True),
    and what torch.serialization.add_safe_globals allows.

    Warns of what was saved of a model and is in no rank's.

    Raises FileNotFoundError where there is no checkpoint; ValueError, and changes nothing, where a
    part of it is missing, of another shape, damaged, cut off or more than values, for groups that
    were quantized otherwise or whose parameters were saved with other values each, and where
    TransformOptimizer finds nothing that is its own; TypeError as `save_checkpoint`, and for an
    optimizer without its model.
    """
    _check_arguments("load_checkpoint", folder, model, optimizer, optional=True)
    _check_others(others)
    if model is None and optimizer is not None:
        raise TypeError("got an optimizer without its model; its state is saved by their names")
    if model is not None and optimizer is not None:
        together(lambda: _check_own("load_checkpoint", model, optimizer))
    folder, (rank, world) = found(folder), rank_and_world()
    index = together(lambda: check_files(folder, rank, world))
    both = [name for name, got in (("model", model), ("optimizer", optimizer)) if got is not None]
    with _quiet():
        together(lambda: check_values(folder, index, [*both, *others]))
    saved: dict[str, Any] = {**others}
    groups: Any = None
    with _quiet(), _thawed(model, load=True) if model is not None else nullcontext():
        if model is not None and optimizer is not None:
            saved["model"], own = get_state_dict(model, optimizer)
            together(lambda: fit(folder, index, optimizer, own))
            groups = own.pop("param_groups")
            saved["optimizer"] = own
        elif model is not None:
            saved["model"] = get_model_state_dict(model)
        left = _left_out(index, saved.get("model"))
        saved |= _with_all_keys(index, others)
        read(folder, saved, no_dist=not many())
        if model is not None:
            _hand_over(saved, groups, model, optimizer)
    for name, other in others.items():
        if isinstance(other, dict):
            other.update(saved[name])
    if isinstance(optimizer, Adapter):
        optimizer.sync()  # while it is known which parameters are frozen
    if left and rank == 0:
        warnings.warn(
            f"checkpoint {folder} holds {', '.join(left[:5])}{', ...' if left[5:] else ''} of "
            f"another model, which has {len(left)} entries more; they are left out",
            stacklevel=2,
        )


def _left_out(index: Metadata, own: dict[str, Any] | None) -> list[str]:
    """What was saved of a model that no rank's has."""
    if own is None:
        return []
    names = {name for each in gathered([*own]) for name in each}
    stored = {key: path for key, path in (index.planner_data or {}).items() if path[0] == "model"}
    return sorted(key.removeprefix("model.") for key, path in stored.items() if not names & {*path})


def _hand_over(
    saved: dict[str, Any], groups: list[Group], model: nn.Module, optimizer: Optimizer | None
) -> None:
    if optimizer is None:
        set_model_state_dict(model, saved["model"])
        return
    state = {"state": saved["optimizer"].get("state", {}), "param_groups": groups}
    if isinstance(optimizer, Adapter):  # which knows what may be missing
        set_model_state_dict(model, saved["model"])
        optimizer.load_state_dict(state)
    else:
        both: dict[str, Any] = {"model_state_dict": saved["model"], "optim_state_dict": state}
        set_state_dict(model, optimizer, **both)


def _with_all_keys(index: Metadata, others: dict[str, Any]) -> dict[str, Any]:
    """The dicts among the others, with places for all that was saved under their names."""
    filled = {name: copy.deepcopy(other) for name, other in others.items() if type(other) is dict}
    for key, path in (index.planner_data or {}).items():
        if path[0] not in filled or not all(isinstance(entry, str) for entry in path):
            continue
        inner: dict[str, Any] = filled
        for entry in path[:-1]:
            inner = inner.setdefault(entry, {})
        inner.setdefault(path[-1], place_of(index.state_dict_metadata[key]))
    return filled


def _check_arguments(
    who: str, folder: Any, model: Any, optimizer: Any, optional: bool = False
) -> None:
    """Raises TypeError for arguments of other kinds, as in another order; ValueError for a model
    that has no memory."""
    kinds: dict[str, tuple[Any, Any, str]] = {
        "folder": (folder, (str, bytes, os.PathLike), "a path"),
        "model": (model, nn.Module, "a torch.nn.Module"),
        "optimizer": (optimizer, Optimizer, "a torch.optim optimizer"),
    }
    for name, (got, kind, expected) in kinds.items():
        if not (isinstance(got, kind) or (optional and got is None and name != "folder")):
            raise TypeError(
                f"{who}: expected {expected} for the {name}, got a {type(got).__name__}; the order "
                f"is {who}(folder, model, optimizer)"
            )
    meta = [name for name, p in model.named_parameters() if p.is_meta] if model is not None else []
    if meta:
        raise ValueError(
            f"{who}: parameter {meta[0]!r} of the model is on the meta device, which holds no "
            "weights; call module.to_empty(device=...) first"
        )


def _check_own(who: str, model: nn.Module, optimizer: Optimizer) -> None:
    """Raises ValueError unless the optimizer's parameters are the model's."""
    own = set(model.parameters())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(p not in own for p in params)
    if foreign:
        raise ValueError(
            f"{who}: {foreign} of the {len(params)} parameters of the optimizer are none of the "
            "model's; give the model that the optimizer was built on, for a copy of it has "
            "parameters of its own"
        )


def _check_others(others: dict[str, Any]) -> None:
    for name, other in others.items():
        if not isinstance(other, dict | Stateful):
            raise TypeError(
                f"{name} is a {type(other).__name__}, expected something with a state_dict, or a "
                f'dict: {name}={{"value": ...}}'
            )
        if isinstance(other, dict):
            _check_keys(name, other)


def _check_keys(name: str, got: dict[Any, Any]) -> None:
    """Raises TypeError for keys that would come back as strings."""
    for key, inner in got.items():
        if not isinstance(key, str):
            raise TypeError(
                f"{name} has the key {key!r}, expected strings, for entries of a checkpoint have "
                f"names; write {str(key)!r}, or a list of pairs"
            )
        if isinstance(inner, dict):
            _check_keys(f"{name}[{key!r}]", inner)


@contextmanager
def _thawed(model: nn.Module, load: bool = False) -> Iterator[None]:
    """All parameters as if trained: torch saves the state of frozen ones but does not load it.

    load: and without gradients, where torch loads nothing into an optimizer that has no state yet.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    grads = [(p, p.grad) for p in model.parameters() if load and p.grad is not None]
    for p in frozen:
        p.requires_grad_(True)
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or unini")
        yield
