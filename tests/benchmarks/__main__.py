"""All benchmarks, or some: what parq_fn's parts take, as ratios within one process.

Groups:
  pass   the prox pass: latents to weights, against a copy and the published maps
  fits   levels of millions of weights, and of a network's
  steps  whole steps of QuantOptimizer(AdamW), their memory, compilation, the functional loop
  refits whole steps of QuantOptimizer(SGD) that fit and round, against the published optimizer
  learning whole compiled steps that learn their levels, against steps that keep them
  sweep  a grid of trainings in one program, against one after another
  packed layers that multiply with the codes of their weights, against float32
  generation tokens a second of packed language models, against float32, bfloat16 and torchao
  gpu    the pass, steps and a captured graph on a GPU
What training on up to thousands of ranks sends and holds is counted by
python -m tests.benchmarks.scale.

The published package is measured beside them where it is installed: pip install -e '.[bench]'.
On the same inputs it is asserted that eager and compiled forms agree bit for bit, and with
float64 to rounding. Ends with an error where a figure misses its limit. What is measured while
the processor's cores run slow, by a calculation that is always the same, is measured again, and
counts only where no round was better; a hundred times in all.
"""

from __future__ import annotations

import itertools
import json
import logging
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from examples.options import at_least
from parq_fn.foundation.command import Parser, command, output_file
from tests.benchmarks import (
    fits,
    generation,
    gpu,
    learning,
    packed,
    peer,
    prox_pass,
    refits,
    steps,
    sweep,
)
from tests.benchmarks.measure import CORES
from tests.benchmarks.report import Found, combined, overall, show

GROUPS = {
    "pass": prox_pass.run,
    "fits": fits.run,
    "steps": steps.run,
    "refits": refits.run,
    "learning": learning.run,
    "sweep": sweep.run,
    "packed": packed.run,
    "generation": generation.run,
    "gpu": gpu.run,
}


def machine() -> dict[str, Any]:
    """What the figures are of."""
    return {
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchao": peer.version(),
    }


def main(argv: list[str] | None = None) -> int:
    usage = "python -m tests.benchmarks [group ...] [options]"
    parser = Parser("tests.benchmarks", __doc__, usage=usage)
    parser.add_argument("groups", nargs="*", help="all by default", metavar="group")
    text = (
        "small inputs, to see in a minute or two that all runs: nothing is compiled but sweeps, or "
        "held to a limit, and no figure means anything"
    )
    parser.add_argument("--tiny", action="store_true", help=text)
    parser.add_argument(
        "--repeats", type=at_least(1, int), default=3, help="runs of each in a round (default: 3)"
    )
    text = "rounds of all, a third of an hour each on two cores (default: 3, with --tiny 1)"
    parser.add_argument("--rounds", type=at_least(1, int), help=text)
    text = "times that one work may be made again, as the cores ran slow in it (default: 3)"
    parser.add_argument("--patience", type=at_least(0, int), default=3, help=text)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    if args.json is not None:
        output_file(args.json)
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no such group: {', '.join(sorted(unknown))}; they are {', '.join(GROUPS)}")
    # the peer's own, of its parts that are not used here
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A training step has freed tensors of many sizes before; glibc then keeps what is freed, and
    # does not ask the system for fresh pages again and again.
    torch.zeros(7 << 20)
    if args.rounds is None:
        args.rounds = 1 if args.tiny else 3
    CORES.patience = 0 if args.tiny else args.patience
    for _ in range(1000 if CORES.patience else 0):
        CORES.seconds()  # finds out how fast they can be
    print(json.dumps(machine()), flush=True)
    found: list[Found] = []
    start = time.perf_counter()
    names = args.groups or list(GROUPS)
    of_rounds: dict[str, list[list[Found]]] = {name: [] for name in names}
    for i, name in itertools.product(range(args.rounds), names):
        own: list[Found] = []
        for one in GROUPS[name]("tiny" if args.tiny else "full", args.repeats):
            one = one._replace(slow=CORES.were_slow)
            own.append(one._replace(limit=None) if args.tiny else one)
            head = f"{time.perf_counter() - start:4.0f} s  round {i + 1}, {name}"
            value = f"{one.value:.3g}{' (slow)' * one.slow}"
            print(f"{head}: {one.case}: {one.what}: {value}", file=sys.stderr, flush=True)
        of_rounds[name].append(own)
    for name, rounds in of_rounds.items():
        own = combined(rounds)
        if own:
            print(f"\n{name}\n{show(own)}", flush=True)
        found += own
    found += overall(found) if not args.tiny else []
    if found and found[-1].group == "all":
        print(f"\n{show([one for one in found if one.group == 'all'])}")
    if args.json is not None:
        figures = [{**one._asdict(), "met": one.met} for one in found]
        report = {"machine": machine(), "repeats": args.repeats, "rounds": args.rounds}
        report |= {"works_again": CORES.again, "slow": sum(one.slow for one in found)}
        report["figures"] = figures
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    slow = sum(one.slow for one in found)
    print(f"\ncores ran slow: {CORES.again} works made again, {slow} figures slow in all rounds")
    if not found:
        print("\nnothing was measured")
        return 1
    missed = [one for one in found if one.met is False]
    held = sum(one.limit is not None for one in found)
    verdict = f"{held - len(missed)} of {held} limits met" if held else "held to no limit"
    print(f"\n{verdict}; {time.perf_counter() - start:.0f} s")
    if missed:
        print(show(missed))
    return int(bool(missed))


if __name__ == "__main__":
    command(main)
