"""Ray: TorchTrainer with FSDP2 on two workers, one of which dies; a sweep in chunks on Ray
Tune's workers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import sweep

os.environ.update(sweep.LOOPBACK)  # before Ray is imported
pytest.importorskip("ray", reason="needs Ray: pip install 'parq_fn[integrations]'")

import psutil
import torch

from parq_fn.optim import load_checkpoint
from tests.helpers import every_case
from tests.integrations.training import check_same, of_the_page

ROOT = Path(__file__).parents[2]
# what Ray says of itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """Ray on this machine alone, as `examples.sweep --ray` starts it."""
    told = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    if not every_case():
        told["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled on workers
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # of a short name: sockets are in it
    with pytest.MonkeyPatch.context() as patch:
        for name, text in told.items():
            patch.setenv(name, text)
        with sweep.cluster(num_cpus=2, _temp_dir=folder):
            yield
    shutil.rmtree(folder, ignore_errors=True)


def test_nothing_listens_but_on_this_machine() -> None:
    listens = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            sockets = process.net_connections("inet")
            listens += [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN]
    assert len(listens) > 2
    assert {ip.removeprefix("::ffff:") for ip in listens} == {"127.0.0.1"}


def dies(rank: int, progress: dict[str, int], folder: Path) -> None:
    """The process of a worker, once."""
    if rank == 1 and progress["step"] == 4 and not folder.with_name("died").exists():
        folder.with_name("died").touch()
        os._exit(1)


def test_workers_equal_a_plain_loop_though_one_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the code of the page, on two workers, of which one dies before a checkpoint."""
    line = '        progress["step"] += 1\n'

    def change(code: str) -> str:
        assert code.count(line) == 1
        return code.replace(line, f"{line}        dies(rank, progress, folder)\n")

    monkeypatch.chdir(tmp_path)
    page = of_the_page("ray", change, dies=dies)
    assert page["result"].error is None
    assert Path("died").exists()
    plain, net = (page["network"]() for _ in range(2))
    optimizer, progress = page["optimizer_of"](net), {"step": 0}
    load_checkpoint("checkpoint", net, optimizer, progress=progress)
    assert progress == {"step": 8}
    alone, batches = page["optimizer_of"](plain), [*page["data"]]
    for pair in zip(batches[::2], batches[1::2], strict=True):  # one for each worker
        alone.zero_grad()
        for x, y in pair:
            ((plain(x) - y).square().mean() / 2).backward()
        alone.step()
    check_same(plain, net)


def test_a_sweep_on_workers_equals_one_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents to the bit, table and figure; compiled where TEST_CASES=all."""
    flags = ["--steps", "10", "--lr", "0.01", "--anneal-end", "0.5", "--seeds", "2"]
    flags += ["--chunk", "3", "--no-progress", "--save-dir", str(tmp_path), "--ray"]
    rows = sweep.main(flags)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)  # the table alone
    inputs = _, settings, *_ = sweep.inputs_of(args := sweep.parse(flags))
    with torch.compiler.set_stance("default" if every_case() else "force_eager"):
        alone = sweep.at_once(*inputs, args.chunk)
    assert rows == sweep.table(settings, alone.accuracy, args.seeds)
    assert len(rows) == 2
    found = {}
    for file in tmp_path.glob("ray/*/*/params.json"):
        (saved,) = file.parent.glob("*/found")
        found[json.loads(file.read_text())["chunk"]] = sweep.Found(**torch.load(saved))
    assert [len(found[i].accuracy) for i in (0, 1)] == [3, 1]
    there = sweep.joined([found[0], found[1]]).params
    assert all(torch.equal(there[name], p) for name, p in alone.params.items())
    figure = sweep.draw(
        settings, alone.accuracy, args.seeds, "4 runs of 10 steps, perceptron, 1 bit"
    )
    figure.savefig(tmp_path / "here.png", dpi=150)
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "sweep.png").read_bytes()
