"""What of a checkpoint is no tensor: values are read, and nothing is run."""

from __future__ import annotations

import collections
import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from parq_fn.optim import load_checkpoint, save_checkpoint
from parq_fn.optim.checkpoint_bytes import restricted
from tests.optim.adapters import ones_for, quantized


class Mischief:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


class Harmless:
    """A class of the user's own."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Harmless)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("where", ["others", "state", "group"])
def test_what_a_file_would_call_is_not_called_and_nothing_is_changed(
    where: str, tmp_path: Path
) -> None:
    net = nn.Linear(4, 4)
    optimizer = quantized([net.weight])
    ones_for(net.weight)
    optimizer.step()
    made, others = tmp_path / "made", {}
    if where == "others":
        others = {"progress": {"epoch": Mischief(made)}}
    elif where == "state":
        optimizer.state[net.weight]["more"] = Mischief(made)
    else:
        optimizer.param_groups[0]["more"] = Mischief(made)
    save_checkpoint(tmp_path / "last", net, optimizer, **others)
    other = nn.Linear(4, 4)
    fresh = quantized([other.weight])
    before, state = other.weight.clone(), str(fresh.state_dict())
    progress = {"epoch": 0}
    with pytest.raises(ValueError, match=r"pathlib\.Path\.touch|getattr, which is more than value"):
        load_checkpoint(tmp_path / "last", other, fresh, progress=progress)
    assert not made.exists()
    assert torch.equal(other.weight, before)
    assert str(fresh.state_dict()) == state
    assert progress == {"epoch": 0}


def test_what_is_not_asked_for_is_not_looked_at(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    save_checkpoint(
        tmp_path / "last", net, quantized([net.weight]), progress={"epoch": Mischief(tmp_path)}
    )
    load_checkpoint(tmp_path / "last", net)


def test_values_of_many_kinds_are_read(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    kinds = {
        "numpy": np.random.get_state(),  # noqa: NPY002 # the global generator's
        "python": random.getstate(),
        "array": np.arange(3, dtype=np.int16),
        "number": np.float32(2),
        "queue": collections.deque([1.0], maxlen=2),
        "set": {1, 2},
        "tables": (collections.Counter("ab"), collections.defaultdict(list, a=[1])),
        "complex": 1 + 2j,
        "dtype": torch.bfloat16,
        "none": None,
        "tuple": (1, ("a", b"b")),
    }
    save_checkpoint(tmp_path / "last", net, quantized([net.weight]), progress=kinds)
    got: dict[str, Any] = {}
    load_checkpoint(tmp_path / "last", progress=got)
    assert str(got) == str(kinds)


def test_a_class_that_the_user_allows_is_read(tmp_path: Path) -> None:
    net, progress = nn.Linear(4, 4), {"epoch": Harmless()}
    save_checkpoint(tmp_path / "last", net, quantized([net.weight]), progress=progress)
    with pytest.raises(ValueError, match=r"'progress\.epoch' of the checkpoint holds .*Harmless"):
        load_checkpoint(tmp_path / "last", progress={})
    with torch.serialization.safe_globals([Harmless]):
        load_checkpoint(tmp_path / "last", progress=(got := {}))
    assert got == progress


def test_programs_are_not_read() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    with pytest.raises(ValueError, match="holds a program of TorchScript"):
        restricted(file, "the entry 'a'")


def test_an_entry_that_numbers_places_beyond_its_bytes_takes_no_memory() -> None:
    """Python's reader makes room for all of them."""
    file = io.BytesIO()
    torch.save({"lr": 0.1}, file)
    crafted = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(crafted, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("/data.pkl"):
                content = b"\x80\x02Nr" + (1 << 27).to_bytes(4, "little") + b"."
            new.writestr(name, content)
    with pytest.raises(ValueError, match="place 134217728 of the memo"):
        restricted(crafted, "the entry 'x'")
