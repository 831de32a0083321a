"""The files of a checkpoint: nothing else in the folder is touched, damage is found before anything
is changed, and whatever the folder is called."""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.state_dict import get_state_dict

from parq_fn.optim import checkpoint, load_checkpoint, save_checkpoint
from parq_fn.optim.checkpoint_files import read_index
from tests.helpers import copies, pairwise
from tests.optim.adapters import saved_with_a_frozen_layer
from tests.optim.helpers import ADAPTERS, begin, check_same, state_of, train
from tests.plugin import seed
from tests.processes import on_processes

QUIET = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or unini")


def trained(adapter: str, steps: int) -> tuple[nn.Module, Any]:
    net, optimizer = begin(adapter, "float32", split=dist.is_initialized())
    train(net, optimizer, steps)
    return net, optimizer


def by_torch(folder: Path, net: nn.Module, optimizer: Any) -> None:
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)


# What else is in the folder


def keeps_other_files(folder: str, adapter: str) -> None:
    last, first = Path(folder) / "last", not dist.is_initialized() or dist.get_rank() == 0
    save_checkpoint(last, *trained(adapter, 1))
    if first:
        (last / "logs").mkdir()
        (last / "logs" / "events").write_text("loss")
        (last / "config.json").write_text("{}")
        before = {path.name for path in last.iterdir()}
    save_checkpoint(last, *trained(adapter, 2))
    if first:
        after = {path.name for path in last.iterdir()}
        assert (last / "config.json").read_text() == "{}"
        assert (last / "logs" / "events").read_text() == "loss"
        assert before & after == {".metadata", "config.json", "logs"}  # no file of the old one
        assert len(before) == len(after)
        assert [path.name for path in Path(folder).glob("*last*")] == ["last"]
    net, optimizer = trained(adapter, 0)
    load_checkpoint(last, net, optimizer)
    assert all(map(_equal, state_of(net, optimizer), state_of(*trained(adapter, 2))))


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(*(getattr(got, "_local_tensor", got) for got in (one, other)))


@QUIET
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_files_of_the_folder_are_kept(adapter: str, tmp_path: Path) -> None:
    keeps_other_files(str(tmp_path), adapter)


@pytest.mark.rare
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_files_of_the_folder_are_kept_on_2_ranks(adapter: str, tmp_path: Path) -> None:
    on_processes(keeps_other_files, 2, tmp_path, str(tmp_path), adapter)


@QUIET
def test_what_another_save_left_behind_is_removed_and_no_more(tmp_path: Path) -> None:
    last = tmp_path / "last"
    by_torch(last, *trained("QuantOptimizer", 1))
    for name in ("__01234567_0_0.distcp", ".metadata.01234567.sha256"):
        (last / name).write_text("of a save that was killed")
    kept = ("__7_0.distcp", "model.distcp", "__init__.py")
    for name in kept:
        (last / name).write_text("another's")
    save_checkpoint(last, *trained("QuantOptimizer", 2))
    left = {path.name for path in last.iterdir()}
    assert left >= {*kept}
    assert len(left) == len(kept) + 3
    load_checkpoint(last, *trained("QuantOptimizer", 0))


@QUIET
def test_an_index_names_no_files_outside_of_its_folder(tmp_path: Path) -> None:
    """Neither to be read nor, where it is replaced, to be removed."""
    last, net, optimizer = tmp_path / "last", *trained("QuantOptimizer", 1)
    by_torch(last, net, optimizer)
    (tmp_path / "__0_0.distcp").write_bytes((last / "__0_0.distcp").read_bytes())
    index = pickle.loads((last / ".metadata").read_bytes())
    for part in index.storage_data.values():
        part.relative_path = "../__0_0.distcp"
    (last / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"\.metadata was damaged .*\.\./__0_0"):
        load_checkpoint(last, net, optimizer)
    save_checkpoint(last, net, optimizer)
    assert (tmp_path / "__0_0.distcp").exists()


# Damage


def flipped(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at // 8 % len(content)] ^= 1 << at % 8
    file.write_bytes(content)


@QUIET
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_flipped_bit_is_found_and_changes_nothing(adapter: str, tmp_path: Path) -> None:
    whole, bad, draw = tmp_path / "whole", tmp_path / "bad", random.Random(seed())
    save_checkpoint(whole, *trained(adapter, 2))
    net, optimizer = trained(adapter, 1)
    before = copies(state_of(net, optimizer))
    for path in whole.iterdir():
        for _ in range(20):
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(whole, bad)
            flipped(bad / path.name, draw.randrange(1 << 30))
            with pytest.raises(ValueError, match=r"bad: (\.metadata|__).* (damaged|cut off)"):
                load_checkpoint(bad, net, optimizer)
            assert all(map(torch.equal, state_of(net, optimizer), before))
    load_checkpoint(whole, net, optimizer)


def finds_damage(folder: str) -> None:
    """Of each file, though each rank reads its share alone: raised on all."""
    net, optimizer = trained("QuantOptimizer", 1)
    before = [copies([getattr(p, "_local_tensor", p)])[0] for p in net.parameters()]
    for path in sorted(Path(folder).glob("bad-*")):
        with pytest.raises(ValueError, match=r"(\.metadata|__).* (damaged|cut off)"):
            load_checkpoint(path, net, optimizer)
    assert all(map(_equal, net.parameters(), before))


def saves(folder: str) -> None:
    save_checkpoint(Path(folder) / "whole", *trained("QuantOptimizer", 2))


@pytest.mark.rare
def test_a_flipped_bit_is_found_on_all_of_2_ranks(tmp_path: Path) -> None:
    on_processes(saves, 2, tmp_path, str(tmp_path))
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert len(names) == 4
    for name in names:
        shutil.copytree(tmp_path / "whole", tmp_path / f"bad-{name}")
        flipped(tmp_path / f"bad-{name}" / name, 8 * 200)
    on_processes(finds_damage, 2, tmp_path, str(tmp_path))


@pytest.mark.slow
@QUIET
@pytest.mark.parametrize(
    ("adapter", "file"), pairwise(list(ADAPTERS), [".metadata", "__0_0.distcp"])
)
def test_damage_where_nobody_has_written_digests_changes_nothing(
    adapter: str, file: str, tmp_path: Path
) -> None:
    by_torch(tmp_path / "last", *trained(adapter, 2))
    damaged, draw = tmp_path / "last" / file, random.Random(seed())
    full = damaged.read_bytes()
    net, optimizer = trained(adapter, 0)
    load_checkpoint(tmp_path / "last", net, optimizer)
    check_same(*trained(adapter, 2), net, optimizer, "torch's own")
    net, optimizer = trained(adapter, 1)
    before = copies(state_of(net, optimizer))
    found = 0
    for _ in range(15):  # others in each run
        damaged.write_bytes(full)
        flipped(damaged, draw.randrange(1 << 30))
        try:
            load_checkpoint(tmp_path / "last", net, optimizer)  # the bit says nothing
        except ValueError:
            found += 1
            assert all(map(torch.equal, state_of(net, optimizer), before))
        else:
            net, optimizer = trained(adapter, 1)
    assert found


@QUIET
def test_digests_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", *trained("QuantOptimizer", 1))
    (digests,) = (tmp_path / "last").glob(".metadata.*.sha256")
    checked = ["sha256sum", "--check", "--strict", "--quiet", digests.name]
    subprocess.run(checked, cwd=tmp_path / "last", check=True)


@QUIET
def test_torchs_own_checkpoint_over_ours_loads(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", *trained("QuantOptimizer", 1))
    with pytest.warns(UserWarning, match="Detected an existing checkpoint"):
        by_torch(tmp_path / "last", *trained("QuantOptimizer", 2))
    net, optimizer = trained("QuantOptimizer", 0)
    load_checkpoint(tmp_path / "last", net, optimizer)
    check_same(*trained("QuantOptimizer", 2), net, optimizer, "over ours")


class Mischief:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@QUIET
def test_an_index_with_other_classes_than_torchs_is_refused(tmp_path: Path) -> None:
    last, net, optimizer = tmp_path / "last", *trained("QuantOptimizer", 1)
    save_checkpoint(last, net, optimizer)
    index = pickle.loads((last / ".metadata").read_bytes())
    index.storage_meta = Mischief(tmp_path / "made")
    (last / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"holds posix\.mkdir, which torch does not"):
        load_checkpoint(last, net, optimizer)
    save_checkpoint(last, net, optimizer)  # in its place
    load_checkpoint(last, net, optimizer)
    for module in ("torch.hub", "torch.distributed.checkpoint.metadata"):  # which import os
        (last / ".metadata").write_bytes(f"\x80\x02c{module}\nos\n.".encode("latin1"))
        with pytest.raises(ValueError, match="which torch does not write"):
            load_checkpoint(last, net, optimizer)
    assert not (tmp_path / "made").exists()


@QUIET
def test_an_index_that_numbers_places_beyond_its_bytes_takes_no_memory(tmp_path: Path) -> None:
    """Python's reader makes room for all of them: here two gigabytes, of one flipped bit 60."""
    last, net, optimizer = tmp_path / "last", *trained("QuantOptimizer", 1)
    save_checkpoint(last, net, optimizer)
    place = (1 << 27).to_bytes(4, "little")
    (last / ".metadata").write_bytes(b"\x80\x04Nr" + place + b".")
    with pytest.raises(ValueError, match=r"\.metadata was damaged .*place 134217728 of the memo"):
        load_checkpoint(last, net, optimizer)


class Written(NamedTuple):
    """What is pickled as getattr(owner, name)."""

    owner: Any
    name: str

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_are_read_as_every_python_writes_them(tmp_path: Path) -> None:
    """Python 3.11.2 writes getattr(class, name), which was refused."""
    last, net, optimizer = tmp_path / "last", *trained("QuantOptimizer", 1)
    save_checkpoint(last, net, optimizer)
    index = pickle.loads((last / ".metadata").read_bytes())
    kinds = metadata._MEM_FORMAT_ENCODING
    index.storage_meta = Written(kinds, "TORCH_CHANNELS_LAST")
    (last / ".metadata").write_bytes(pickle.dumps(index))
    assert read_index(last).storage_meta is kinds.TORCH_CHANNELS_LAST
    for owner, name in ((kinds, "mro"), (torch.Size, "numel")):
        index.storage_meta = Written(owner, name)
        (last / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(ValueError, match="which torch does not write"):
            read_index(last)


# A full disk


@contextmanager
def room(size: int) -> Iterator[None]:
    """For no file of more bytes."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


def full_disk(folder: str, adapter: str) -> None:
    last = Path(folder) / "last"
    many = dist.is_initialized()
    save_checkpoint(last, *trained(adapter, 2))
    net, optimizer = trained(adapter, 3)
    for size in (0, 5_000, 20_000) if not many else (5_000,):
        here = not many or dist.get_rank() == 1  # of the second rank alone
        with room(size if here else 1 << 30), pytest.raises(OSError, match="too large"):
            save_checkpoint(last, net, optimizer)
        if many:
            dist.barrier()  # the first rank has cleared away
        assert [path.name for path in Path(folder).glob("*last*")] == ["last"]
    load_checkpoint(last, net, optimizer)
    assert all(map(_equal, state_of(net, optimizer), state_of(*trained(adapter, 2))))


@QUIET
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_full_disk_is_an_os_error_and_leaves_the_old_one(adapter: str, tmp_path: Path) -> None:
    full_disk(str(tmp_path), adapter)


@pytest.mark.slow
def test_a_full_disk_of_one_rank_is_an_os_error_on_both(tmp_path: Path) -> None:
    on_processes(full_disk, 2, tmp_path, str(tmp_path), "QuantOptimizer")


@QUIET
@pytest.mark.parametrize("where", ["digest", ".metadata"])
def test_a_failure_as_it_takes_its_place_leaves_the_old_one(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, (net, optimizer) = tmp_path / "last", trained("QuantOptimizer", 2)
    save_checkpoint(last, net, optimizer)
    before = {path.name for path in last.iterdir()}

    def fails(source: Any, target: Any, replace: Any = os.replace) -> None:
        if where == "digest" or str(target).endswith(".metadata"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    net, optimizer = trained("QuantOptimizer", 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(last, net, optimizer)
    assert {path.name for path in last.iterdir()} == before
    load_checkpoint(last, *trained("QuantOptimizer", 0))


@QUIET
@pytest.mark.parametrize("when", ["start", "save", "digests_of"])
@pytest.mark.parametrize("old", [False, True])
def test_of_two_saves_at_once_one_is_whole_and_the_other_an_os_error(
    old: bool, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other begins and ends within the first; both raise nothing where they do not meet."""
    last, first, other = tmp_path / "last", *(trained("QuantOptimizer", n) for n in (2, 3))
    if old:
        save_checkpoint(last, *first)
    step = getattr(checkpoint, when)

    def both(*args: Any, **options: Any) -> Any:
        got = step(*args, **options)
        monkeypatch.setattr(checkpoint, when, step)
        save_checkpoint(last, *other)
        return got

    monkeypatch.setattr(checkpoint, when, both)
    try:
        save_checkpoint(last, *first)
        expected = first
    except OSError:
        expected = other
    net, optimizer = trained("QuantOptimizer", 0)
    load_checkpoint(last, net, optimizer)
    check_same(*expected, net, optimizer, when)
    assert len([*last.iterdir()]) == 3
    assert [path.name for path in tmp_path.glob("*last*")] == ["last"]


@QUIET
def test_what_two_saves_wrote_into_one_folder_does_not_take_the_place(tmp_path: Path) -> None:
    last = tmp_path / "last"
    save_checkpoint(last, *trained("QuantOptimizer", 1))
    unfinished = checkpoint.start(last)
    for name in ("__01234567_0_0.distcp", "__89abcdef_0_0.distcp", ".metadata"):
        (unfinished / name).touch()
    for names in ([".metadata"], [path.name for path in unfinished.iterdir()]):
        with pytest.raises(FileNotFoundError, match="another save to the same folder"):
            checkpoint.take_place(last, dict.fromkeys(names, ""))
    load_checkpoint(last, *trained("QuantOptimizer", 0))


# Names


@pytest.mark.slow
@QUIET
@pytest.mark.parametrize("length", [233, 240, 255])
def test_long_names_of_folders(length: int, tmp_path: Path) -> None:
    for name in ("a" * length, "é" * (length // 2)):
        net, optimizer = trained("QuantOptimizer", 1)
        for _ in range(2):
            save_checkpoint(tmp_path / name, net, optimizer)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        load_checkpoint(tmp_path / name, net, optimizer)
        shutil.rmtree(tmp_path / name)


@QUIET
def test_a_link_is_followed_and_stays_one(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    link = tmp_path / "latest"
    link.symlink_to(Path("runs") / "one")  # to nothing yet
    for steps in (1, 2):
        save_checkpoint(link, *trained("QuantOptimizer", steps))
        assert link.is_symlink()
        assert {path.name for path in (tmp_path / "runs").iterdir()} == {"one"}
    net, optimizer = trained("QuantOptimizer", 0)
    load_checkpoint(link, net, optimizer)
    check_same(*trained("QuantOptimizer", 2), net, optimizer, "link")


def test_an_empty_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net, optimizer = saved_with_a_frozen_layer("QuantOptimizer")
    for act in (save_checkpoint, load_checkpoint):
        with pytest.raises(ValueError, match="an empty path, expected a folder"):
            act("", net, optimizer)
    assert not any(tmp_path.iterdir())
