"""The published recipes, run for real on small data sets in the real formats."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples import create_hdf5, qat_resnet_cifar10, qat_resnet_imagenet, qat_vit_imagenet
from examples.recipe import evaluation, training
from examples.recipe.checkpoints import Progress
from examples.recipe.log import LOG, read
from parq_fn import export
from tests.examples.data_sets import cifar_batches, image_folders
from tests.helpers import sampled
from tests.processes import Program

ROOT = Path(__file__).parents[2]
SHORT = ["--workers", "0", "--save-every", "1", "--quant-period", "2", "--quant-warmup-steps", "1"]


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cifar_batches(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folders(tmp_path_factory.mktemp("imagenet"))


def records(folder: Path) -> list[dict[str, Any]]:
    """The log, but for the times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read(folder / LOG)]


def only_test_images(data: Path, folder: Path) -> Path:
    """A data set without what it trains on."""
    for name in ("val", "cifar-10-batches-py/batches.meta", "cifar-10-batches-py/test_batch"):
        if (data / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(data / name)
    return folder


def printed_accuracy(shown: str) -> float:
    """The accuracy that --evaluate printed."""
    found = re.search(r"test accuracy ([\d.]+) %", shown)
    assert found is not None, shown
    return float(found[1])


CASES = {
    "cifar": (qat_resnet_cifar10, ["--batch-size", "20", "--lr", "0.02"]),
    "resnet": (
        qat_resnet_imagenet,
        ["--arch", "resnet18", "--image-size", "32", "--batch-size", "20", "--lr", "0.02"],
    ),
    "deit": (
        qat_vit_imagenet,
        ["--image-size", "32", "--batch-size", "20", "--warmup-epochs", "0"]
        + ["--const-lr-epochs", "0", "--lr", "1e-3"],
    ),
}


@pytest.mark.rare
@pytest.mark.parametrize("case", sampled(CASES, 2))
def test_a_recipe_trains_tests_and_saves(
    case: str, cifar: Path, folders: Path, tmp_path: Path, capsys
) -> None:
    module, flags = CASES[case]
    data = cifar if case == "cifar" else folders
    saved = ["--data-dir", str(data), "--save-dir", str(tmp_path)]
    assert module.main([*flags, *SHORT, *saved, "--epochs", "2"]) == 0
    told = records(tmp_path)
    assert [line["epoch"] for line in told] == [0, 1]
    assert told[-1]["on_levels"] > 0.99
    assert all(0 <= line["test_accuracy"] <= 100 and line["skipped"] == 0 for line in told)
    assert list((tmp_path / "tensorboard").glob("events*"))
    said = capsys.readouterr().err
    packed = export.load(tmp_path / "quantized.safetensors")
    quantized = [name for name, entry in packed.items() if isinstance(entry, export.Packed)]
    first, last = {"cifar": (True, True)}.get(case, (False, False))
    assert ("conv1.weight" in quantized or "patch_embed.proj.weight" in quantized) == first
    assert ("fc.weight" in quantized or "head.weight" in quantized) == last
    net = [*flags[: flags.index("--batch-size")], "--workers", "0", "--save-dir", str(tmp_path)]
    net += ["--data-dir", str(only_test_images(data, tmp_path / "alone"))]
    for more in ([], ["--batch-size", "7", "--seed", "5", "--epochs", "30"]):
        capsys.readouterr()
        assert module.main([*net, *more, "--evaluate"]) == 0
        shown = printed_accuracy(capsys.readouterr().out)
        assert shown == pytest.approx(told[-1]["test_accuracy"], abs=1e-4)
    (hard,) = re.findall(r"bytes, test accuracy ([\d.]+) %", said)
    assert (
        module.main([*net, "--resume", str(tmp_path / "quantized.safetensors"), "--evaluate"]) == 0
    )
    assert printed_accuracy(capsys.readouterr().out) == pytest.approx(float(hard), abs=1e-2)


@pytest.mark.rare
def test_hdf5_files_are_the_folders_they_were_made_of(
    folders: Path, tmp_path: Path, capsys
) -> None:
    create_hdf5.main(["--data-dir", str(folders), "--save-dir", str(tmp_path)])
    flags = [*CASES["resnet"][1], *SHORT, "--epochs", "1"]
    sources = [["--data-dir", str(folders)], ["--data-dir", str(tmp_path), "--hdf5-data"]]
    told = []
    for i, source in enumerate(sources):
        folder = tmp_path / str(i)
        assert qat_resnet_imagenet.main([*flags, *source, "--save-dir", str(folder)]) == 0
        told.append(records(folder))
    assert told[0] == told[1]


@pytest.mark.rare
def test_full_precision_and_synthetic_data(tmp_path: Path) -> None:
    flags = ["--data", "synthetic", "--synthetic-images", "100", "--full-prec", "--epochs", "1"]
    flags += ["--batch-size", "20", "--lr", "0.02", "--custom-train-transform", "--cutmix-mixup"]
    assert qat_resnet_cifar10.main([*flags, *SHORT, "--save-dir", str(tmp_path)]) == 0
    (line,) = records(tmp_path)
    assert "inverse_slope" not in line
    assert "on_levels" not in line
    assert not (tmp_path / "quantized.safetensors").exists()


# Runs on processes of their own, as torchrun starts them and a scheduler stops them.


def started(folder: Path, world: int, *flags: str, program: str = "qat_resnet_cifar10") -> Program:
    """A recipe that saves in the folder, on some processes."""
    shown = folder.with_name(f"{folder.name}-shown")
    return Program(f"examples.{program}", [*flags, "--save-dir", str(folder)], world, shown)


RESUMED = [("none", 0), ("none", 1), ("ddp", 0), ("ddp", 1), ("fsdp2", 0), ("fsdp2", 1)]


@pytest.mark.rare
@pytest.mark.parametrize(("mode", "workers"), sampled(RESUMED, 1))
def test_a_run_that_was_stopped_resumes_bit_for_bit(
    mode: str, workers: int, cifar: Path, tmp_path: Path
) -> None:
    """SIGTERM in the middle of an epoch, as a scheduler sends it; on several processes, too."""
    world = 1 if mode == "none" else 2
    flags = [*SHORT, "--batch-size", "10", "--lr", "0.02", "--epochs", "2", "--print-freq"]
    flags += ["1", "--data-dir", str(cifar), "--parallel", mode, "--resume"]
    flags[1] = str(workers)
    if mode == "none":
        flags += ["--cutmix-mixup", "--custom-train-transform"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    started(whole, world, *flags).end()
    run = started(parts, world, *flags)
    run.until("epoch 0, step 3 of 6")
    run.signal(signal.SIGTERM)  # its workers, too
    assert "--resume resumes" in run.end(128 + signal.SIGTERM)
    assert not records(parts)
    assert "resumes from" in started(parts, world, *flags).end()
    assert records(parts) == records(whole)
    file = "quantized.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()
    shown = started(parts, world, *flags, "--evaluate").end()
    assert printed_accuracy(shown) == pytest.approx(records(whole)[-1]["test_accuracy"], abs=1e-4)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("case", "mode"), sampled(itertools.product(["resnet", "deit"], ["ddp", "fsdp2"]), 1)
)
def test_networks_for_imagenet_on_two_processes(
    case: str, mode: str, folders: Path, tmp_path: Path
) -> None:
    """CIFAR's are above."""
    module, own = CASES[case]
    flags = [*own, *SHORT, "--epochs", "1", "--data-dir", str(folders), "--parallel", mode]
    program, folder = module.RECIPE.program, tmp_path / "saved"
    started(folder, 2, *flags, program=program).end()
    (told,) = records(folder)
    assert told["on_levels"] > 0.99
    shown = started(folder, 2, *flags, "--evaluate", program=program).end()
    assert printed_accuracy(shown) == pytest.approx(told["test_accuracy"], abs=1e-4)
    packed = export.load(folder / "quantized.safetensors")
    assert any(isinstance(entry, export.Packed) for entry in packed.values())


@pytest.mark.rare
@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
def test_the_status_of_a_run_is_that_of_its_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["qat_resnet_cifar10", "--data", "none", "--resume", "x"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("examples.qat_resnet_cifar10", run_name="__main__")
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


LONG = ["--data", "synthetic", "--synthetic-images", "400", "--batch-size", "20", "--workers", "2"]
LONG += ["--print-freq", "1", "--epochs", "9", "--no-progress", "--quant-warmup-steps", "1"]


@pytest.mark.rare
@pytest.mark.parametrize("when", sampled(["from epoch 0, step 0", "step 2 of"], 1))
def test_ctrl_c_stops_like_a_scheduler(when: str, tmp_path: Path) -> None:
    """Its workers get the signal, too, and the server that they come from as it begins."""
    run = started(tmp_path / "run", 1, *LONG)
    run.until(when)
    time.sleep(1.0)  # into the start of the workers, or a later step
    run.signal(signal.SIGINT)
    shown = run.end(128 + signal.SIGTERM)
    assert re.search("stopped before step .* of epoch 0; --resume", shown)
    assert "Traceback" not in shown


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs /proc, to find workers"
)


@pytest.mark.rare
@needs_proc
@pytest.mark.parametrize("killed", ["run", "worker"])
def test_nothing_is_left_where_a_run_or_a_worker_is_killed(killed: str, tmp_path: Path) -> None:
    """Found by a tester: workers and their server kept each other alive."""
    run = started(tmp_path / "run", 1, *LONG)
    run.until("step 2 of")
    leader = run.processes[0].pid
    assert len(group_of(leader)) > 3  # the run, its workers and their server
    if killed == "run":
        os.kill(leader, signal.SIGKILL)
    else:
        os.kill(max(group_of(leader)), signal.SIGKILL)  # a worker, which came last
        shown = run.end(2)
        assert "error: a process that reads images was lost" in shown
        assert "Traceback" not in shown
    end = time.monotonic() + 60
    while left := group_of(leader):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def group_of(leader: int) -> list[int]:
    """The processes of its group that have not ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            state, _, group = file.read_text().rpartition(")")[2].split()[:3]
            found += [int(file.parent.name)] * (int(group) == leader and state != "Z")
    return found


BROKEN = """
from examples import qat_resnet_cifar10 as recipe
from examples.recipe.training import Run

def step(self, epoch, step, batch):
    raise RuntimeError("out of memory")

Run._step = step
recipe.main(["--data", "synthetic", "--synthetic-images", "400", "--batch-size", "20", "--epochs",
    "9", "--workers", "2", "--quant-warmup-steps", "1", "--save-dir", FOLDER])
"""


LEFT = """
import multiprocessing, signal, time
from examples.recipe.stopping import STOPPING
from examples.recipe.parallel import leave
signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
leave(3)
"""


@pytest.mark.rare
def test_a_process_that_leaves_takes_its_workers_along() -> None:
    """Found by a run of these tests: one that was stuck as it was forked kept the output open."""
    command = [sys.executable, "-c", LEFT]
    left = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=120)
    assert left.returncode == 3


@pytest.mark.rare
def test_a_run_that_breaks_leaves_no_worker_behind(tmp_path: Path) -> None:
    """Found by a user: workers in which SIGTERM was blocked were waited for without end."""
    code = BROKEN.replace("FOLDER", repr(str(tmp_path)))
    command = [sys.executable, "-c", code]
    broken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert broken.returncode == 1
    assert "RuntimeError: out of memory" in broken.stderr


# What can be wrong.


def wrong(
    capsys: pytest.CaptureFixture[str], module: Any, *flags: str, started: bool = False
) -> str:
    """The one line that a program says before it ends with 2."""
    try:
        status = module.main([*SHORT, *flags])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    *before, line = capsys.readouterr().err.strip().splitlines()
    assert len(before) <= started  # what a run says as it begins
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch resnet21", "argument --arch: invalid choice: 'resnet21'"),
        ("--quant-bitz 2", "unrecognized arguments: --quant-bitz 2"),
        ("--quant-bits 9", "argument --quant-bits: invalid choice: 9"),
        ("--hdf5-data", "--hdf5-data is for ImageNet"),
        ("--data synthetic --image-size 99999", "--image-size must be at most 4096, got 99999"),
        ("--lr 1e39", "expected a number from 0 on, got '1e39'"),
        ("--epochs 100000000000000000000", "expected a whole number from 1 on"),
        ("--epochs 0", "expected a whole number from 1 on, got '0'"),
        ("--anneal-start 9 --anneal-end 3 --epochs 10", "must come in this order, got 9, 3 and 10"),
        ("--anneal-end 20 --epochs 10", "must come in this order, got 0, 20 and 10"),
        ("--lr-min 1", "--lr-min must be at most --lr, got 1 and 0.1"),
        ("--warmup-epochs 5 --epochs 5", "leave nothing of 5 epochs"),
        ("--start-epoch 3 --epochs 3", "--start-epoch must be below --epochs, got 3"),
        (
            "--quant-proxmap hard --anneal-wd-frac 0.5",
            "follows parq's inverse slope; hard has none",
        ),
        ("--momentum 1", "--momentum must be below 1"),
        ("--parallel ddp", "--parallel ddp takes its processes from torchrun: torchrun"),
        ("--data synthetic --synthetic-images 64", "--batch-size 128 is more than the 64 images"),
        ("--image-size 64", "--image-size is for --data synthetic"),
        ("--const-lr-epochs 5", "trains at the rate --lr-min, which is 0"),
        ("--warmup-epochs 90", "must end before the rate's first cut, after 80 epochs, got 90"),
        ("--data synthetic --resume nowhere", "no checkpoint of these scripts at nowhere"),
        ("--data synthetic --evaluate", "no checkpoint of these scripts at"),
    ],
)
def test_wrong_flags_get_one_line(flags: str, message: str, tmp_path: Path, capsys) -> None:
    folder = str(tmp_path / "absent")
    assert message in wrong(capsys, qat_resnet_cifar10, *flags.split(), "--save-dir", folder)


@pytest.mark.slow
def test_missing_and_broken_data_get_one_line(
    cifar: Path, folders: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("examples.recipe.datasets.CIFAR_URL", "http://127.0.0.1:9/cifar")
    imagenet = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "20", "--epochs", "1"]

    def line(module: Any, data: Path, *flags: str) -> str:
        folder = str(tmp_path / "saved")
        where = ["--data-dir", str(data), "--save-dir", folder]
        return wrong(capsys, module, *where, *flags, started=module is qat_resnet_imagenet)

    absent = tmp_path / "absent"
    assert "put the folder cifar-10-batches-py there by hand" in line(qat_resnet_cifar10, absent)
    assert "or pass --data synthetic" in line(qat_resnet_imagenet, absent, *imagenet)
    assert "python -m examples.create_hdf5" in line(
        qat_resnet_imagenet, absent, *imagenet, "--hdf5-data"
    )
    broken = cifar_batches(tmp_path / "broken")
    batch = broken / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-5000])
    said = line(qat_resnet_cifar10, broken)
    assert "data_batch_3" in said
    assert "delete" in said
    batch.write_bytes(pickle.dumps({b"data": os.system, b"labels": []}, protocol=2))
    assert "which is no array" in line(qat_resnet_cifar10, broken)
    meta = batch.with_name("batches.meta")
    meta.write_bytes(pickle.dumps({b"other": 1}, protocol=2))
    assert "names no labels" in line(qat_resnet_cifar10, broken)
    cifar_batches(tmp_path / "whole")
    meta.write_bytes((tmp_path / "whole" / "cifar-10-batches-py" / "batches.meta").read_bytes())
    batch.unlink()
    assert "data_batch_3 is missing" in line(qat_resnet_cifar10, broken)
    images = image_folders(tmp_path / "images")
    file = sorted((images / "train" / "n00000003").iterdir())[2]
    file.write_bytes(file.read_bytes()[:300])
    said = line(qat_resnet_imagenet, images, *imagenet)
    assert str(file) in said
    assert "--skip-corrupt" in said
    (images / "val.hdf5").write_bytes(b"no such file")
    assert "was cut off" in line(qat_resnet_imagenet, images, *imagenet, "--hdf5-data")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10], "expected labels from 0 to 9, got 0 to 10"),
        ([0, -1], "expected labels from 0 to 9, got -1 to 0"),
        ([0.0, 1.0], "expected labels that are whole numbers"),
        ([[0], [1]], "expected labels that are whole numbers"),
        ([0], "has 2 images and 1 labels"),
        ([], "expected labels that are whole numbers"),
    ],
)
def test_labels_of_an_hdf5_file_are_checked(labels, message: str, tmp_path: Path, capsys) -> None:
    import h5py

    for name in ("train", "val"):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["labels"] = np.array(labels)
            file["classes"] = np.array([f"n{i}".encode() for i in range(10)])
            file.create_dataset("images", (2,), h5py.vlen_dtype(np.uint8))
    flags = [*CASES["resnet"][1], "--hdf5-data", "--data-dir", str(tmp_path)]
    said = wrong(capsys, qat_resnet_imagenet, *flags, "--save-dir", str(tmp_path / "saved"))
    assert message in said
    assert "examples.create_hdf5" in said
    assert "pass --hdf5-data" in wrong(
        capsys, qat_resnet_imagenet, *CASES["resnet"][1], "--data-dir", str(tmp_path)
    )


@pytest.mark.rare
def test_what_a_run_resumes_from_is_checked(cifar: Path, tmp_path: Path, capsys) -> None:
    flags = ["--data-dir", str(cifar), "--batch-size", "10", "--epochs", "2"]
    flags += ["--save-dir", str(tmp_path), "--resume"]
    assert qat_resnet_cifar10.main([*SHORT, *flags]) == 0
    capsys.readouterr()
    more = cifar_batches(tmp_path / "more", train=200)
    said = wrong(capsys, qat_resnet_cifar10, *flags, "--data-dir", str(more), started=True)
    assert "give it the images that it had" in said
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    for broken in ("{}\n", "5\n", "no json\n"):
        log.write_text(broken)
        said = wrong(capsys, qat_resnet_cifar10, *flags, started=True)
        assert "is no log of a run" in said
    log.write_text(whole)
    assert qat_resnet_cifar10.main([*SHORT, *flags, "--resume", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    "edited",
    [{"epoch": -1}, {"step": 1.0}, {"begun": None}, {"best": "x"}, {"sums": [[1.0]]}],
    ids=str,
)
def test_progress_that_was_edited_is_refused(edited: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Progress(**edited)


def test_images_and_classes_that_do_not_fit_get_one_line(
    folders: Path, tmp_path: Path, capsys
) -> None:
    flags = [*CASES["resnet"][1], "--epochs", "1", "--save-dir", str(tmp_path / "saved")]
    images = image_folders(tmp_path / "images")
    (images / "val" / "n00000009").rename(images / "val" / "n00000010")
    said = wrong(capsys, qat_resnet_imagenet, *flags, "--data-dir", str(images))
    assert "not in both: n00000009, n00000010" in said
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in wrong(capsys, qat_resnet_cifar10, "--data-dir", str(file))
    said = wrong(capsys, qat_resnet_imagenet, *flags, "--data-dir", str(folders / "train"))
    assert "takes a folder of train and val" in said


@pytest.mark.rare
def test_corrupt_images_are_skipped_and_counted(folders: Path, tmp_path: Path, capsys) -> None:
    images = image_folders(tmp_path / "images")
    for part, label in (("train", 3), ("val", 5)):
        file = sorted((images / part / f"n{label:08d}").iterdir())[0]
        file.write_bytes(b"\xff\xd8 no JPEG")
    flags = [*CASES["resnet"][1], *SHORT, "--epochs", "1", "--skip-corrupt", "--workers", "1"]
    folder = tmp_path / "saved"
    data = ["--data-dir", str(images), "--save-dir", str(folder)]
    assert qat_resnet_imagenet.main([*flags, *data]) == 0
    assert records(folder)[0]["skipped"] == 2
    assert "accuracy" in capsys.readouterr().out
    hdf5 = ["--data-dir", str(images), "--save-dir", str(tmp_path), "--check"]
    create_hdf5.main(hdf5)
    assert "train.hdf5: 59 images, 1 left out" in capsys.readouterr().out


@pytest.mark.rare
def test_checkpoints_of_other_runs_are_refused(cifar: Path, tmp_path: Path, capsys) -> None:
    flags = ["--batch-size", "30", "--epochs", "2", "--data-dir", str(cifar)]
    flags += ["--save-dir", str(tmp_path)]
    assert qat_resnet_cifar10.main([*SHORT, *flags]) == 0
    capsys.readouterr()
    other = [*flags, "--resume"]
    said = wrong(capsys, qat_resnet_cifar10, *other, "--arch", "resnet32")
    assert "was trained with --arch resnet20, and this run is with --arch resnet32" in said
    said = wrong(capsys, qat_resnet_cifar10, *other, "--quant-bits", "1")
    assert "trained with --quant-bits 2, and this run is with --quant-bits 1" in said
    said = wrong(capsys, qat_resnet_cifar10, *other, "--full-prec")
    assert "trained without --full-prec, and this run is with --full-prec" in said
    said = wrong(capsys, qat_resnet_cifar10, *other, "--start-epoch", "1")
    assert "is of a run that began at --start-epoch 0, not 1" in said
    said = wrong(capsys, qat_resnet_cifar10, *flags)
    assert "holds a run (last, best, log.jsonl, quantized.safetensors); resume it by" in said
    said = wrong(capsys, qat_resnet_cifar10, *flags, "--evaluate", "--arch", "resnet32")
    assert "this run is with --arch resnet32" in said
    file = str(tmp_path / "quantized.safetensors")
    said = wrong(
        capsys, qat_resnet_cifar10, *flags, "--evaluate", "--resume", file, "--arch", "resnet32"
    )
    assert "does not fit resnet32" in said
    said = wrong(capsys, qat_resnet_cifar10, *other, "--epochs", "4")
    assert "was trained with --epochs 2, and this run is with --epochs 4" in said
    (tmp_path / "last" / ".metadata").unlink()
    assert "no checkpoint of these scripts" in wrong(capsys, qat_resnet_cifar10, *other)
    assert "cannot be made" in wrong(capsys, qat_resnet_cifar10, *flags[:-1], file)


def test_a_loss_that_is_not_finite_ends_a_run(cifar: Path, tmp_path: Path, capsys) -> None:
    flags = ["--batch-size", "10", "--epochs", "2", "--data-dir", str(cifar), "--lr", "1e20"]
    said = wrong(capsys, qat_resnet_cifar10, *flags, "--save-dir", str(tmp_path), started=True)
    assert "a lower --lr" in said


def stopped_once(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """SIGTERM within the call-th test of a run."""
    calls = []

    def signalled(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluation.score(*args)

    monkeypatch.setattr(training, "score", signalled)


@pytest.mark.rare
@pytest.mark.parametrize("call", sampled([1, 2, 3], 1))  # the third is of the packed weights
def test_a_run_that_is_stopped_in_a_test_resumes(
    call: int, cifar: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    flags = [*SHORT, "--batch-size", "30", "--epochs", "2", "--data-dir", str(cifar), "--resume"]
    flags += ["--save-dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert qat_resnet_cifar10.main([*flags, str(whole)]) == 0
    with monkeypatch.context() as patch:
        stopped_once(patch, call)
        assert qat_resnet_cifar10.main([*flags, str(parts)]) == 128 + signal.SIGTERM
    assert "stopped before the test" in capsys.readouterr().err
    assert (parts / "stopped").exists()
    # as if killed when a newer checkpoint was to take the old one's place
    (parts / "last").rename(parts / ".last.parq_fn-old")
    with (parts / LOG).open("a") as log:
        log.write('{"epoch": ')  # and in the midst of a line
    assert qat_resnet_cifar10.main([*flags, str(parts)]) == 0
    assert not (parts / "stopped").exists()
    assert records(parts) == records(whole)
    file = "quantized.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()
    assert told_to_board(parts) == told_to_board(whole)


def told_to_board(folder: Path) -> list[tuple[int, float]]:
    """The test accuracies that TensorBoard shows, by step."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("test_accuracy")]


def test_help_explains_every_flag_with_its_default(capsys) -> None:
    for module in (qat_resnet_cifar10, qat_resnet_imagenet, qat_vit_imagenet):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        entries = re.findall(r" --([a-z][a-z0-9-]+)[ ,]", shown.split("network and data")[1])
        assert len(set(entries)) > 40
        assert shown.count("(default: ") >= 40


@pytest.mark.rare
def test_a_run_begun_later_takes_the_rates_and_the_annealing_of_its_epoch(
    cifar: Path, tmp_path: Path
) -> None:
    flags = [*SHORT, "--batch-size", "30", "--epochs", "3", "--data-dir", str(cifar)]
    found = []
    for name, more in (("all", []), ("late", ["--start-epoch", "1"])):
        folder = str(tmp_path / name)
        assert qat_resnet_cifar10.main([*flags, *more, "--save-dir", folder]) == 0
        told = records(tmp_path / name)[-2:]
        found.append([(r["epoch"], r["learning_rate"], r["inverse_slope"]) for r in told])
    assert found[0] == found[1]
    assert found[0][0][0] == 1
