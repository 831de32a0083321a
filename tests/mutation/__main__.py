"""Runs the tests against every mutant, each in a fork of one process.

Nothing on disk changes. Where a mutant changes what functions do, the process has collected the
tests, and the fork runs those that reach the mutant on the changed functions; else the process has
torch loaded alone, and the fork imports the mutated source in place of the module's own. Results
are kept in a file as they come, and what it holds is not run again; `--survivors` runs those that
no test noticed, for after tests were added.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.selection import TESTS

COLUMNS = (
    "mutants", "run", "killed", "timed out", "survived", "equivalent", "unexplained", "score"
)  # fmt: skip


# Nothing of the package is imported here, nor by what is: a mutant takes the place of a module that
# is imported first in a fork. So `command` is not used, but what it does is done at the end.


def main() -> int:
    from tests.mutation import forked

    parser = argparse.ArgumentParser(
        "python -m tests.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; all by default")
    default = Path(tempfile.gettempdir()) / "parq_fn_mutation.json"
    text = f"file that keeps what was found (default: {default})"
    parser.add_argument("--results", type=Path, default=default, help=text)
    text = "run each k-th mutant only (default: 1)"
    parser.add_argument("--every", type=int, default=1, help=text, metavar="K")
    text = "processor time that the tests of one mutant may take (default: as much as they take)"
    parser.add_argument("--seconds", type=float, default=math.inf, help=text)
    parser.add_argument("--survivors", action="store_true", help="run again what survived")
    parser.add_argument("--first", action="store_true", help="run the most direct tests alone")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is kept")
    chosen = parser.parse_args()
    unknown = set(chosen.modules) - set(TESTS)
    if unknown:
        parser.error(f"no such module: {', '.join(sorted(unknown))}")
    kept: dict[str, dict[str, Any]] = {}
    if chosen.results.exists():
        kept = json.loads(chosen.results.read_text())
    forked.load()
    chosen.modules = chosen.modules or list(TESTS)
    todo = {module: mutants(Path(module).read_text()) for module in chosen.modules}
    for module in chosen.modules:
        kept.setdefault(module, {})
    if not chosen.table:
        _run(todo, kept, chosen)
    rows = {module: _count(module, todo[module], kept[module]) for module in chosen.modules}
    _show(rows)
    return int(any(row["unexplained"] for row in rows.values()))


def _run(todo: dict[str, list[Mutant]], kept: Any, chosen: argparse.Namespace) -> None:
    from tests.mutation import forked, patched

    jobs = [
        patched.Job(module, mutant)
        for module in chosen.modules
        for mutant in todo[module][:: chosen.every]
        if _is_left(mutant, module, kept[module], chosen)
    ]
    if not jobs:
        return
    stages = {
        module: TESTS[module][: 1 if chosen.first else None]
        for module in dict.fromkeys(job.module for job in jobs)
    }
    files = list(dict.fromkeys(f for own in stages.values() for stage in own for f in stage))
    sources = {module: Path(module).read_text() for module in stages}
    done = 0

    def keep(job: patched.Job, result: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        kept[job.module][job.mutant.key] = result
        chosen.results.write_text(json.dumps(kept, indent=1))
        ran = f" {result['tests']} of {result['of']} tests" if "tests" in result else ""
        took = f"{result['status']} {result['seconds']:.1f} s{ran}"
        print(f"{done}/{len(jobs)} {job.module} {took}: {job.mutant.key}", flush=True)

    left: dict[str, list[patched.Job]] = {}
    kills: dict[str, Counter[str]] = {module: Counter() for module in stages}
    for job, result in patched.run(sources, files, jobs, chosen.seconds):
        if result["status"] == "left":
            left.setdefault(job.module, []).append(job)
            continue
        kills[job.module][result["by"]] += 1
        keep(job, result)
    for module, some in left.items():
        untouched = forked.run(module, sources[module], stages[module], [])
        if untouched["status"] != "survived":
            raise SystemExit(f"{module}: the tests fail without a mutant, at {untouched['by']}")
        durations = untouched["durations"]
        by_speed = sorted(durations, key=durations.__getitem__)
        for job in some:
            order = [test for test, _ in kills[module].most_common()] + by_speed
            result = forked.run(module, job.mutant.source, stages[module], order)
            del result["durations"]
            kills[module][result["by"]] += 1
            keep(job, result)


def _is_left(
    mutant: Mutant, module: str, results: dict[str, Any], chosen: argparse.Namespace
) -> bool:
    if any(mutant.key in keys for keys in EQUIVALENT.get(module, {}).values()):
        return False
    status = results.get(mutant.key, {}).get("status")
    return status is None or (chosen.survivors and status == "survived")


def _count(module: str, todo: list[Mutant], results: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; an equivalent mutant that is none any more is told."""
    explained = {key: why for why, keys in EQUIVALENT.get(module, {}).items() for key in keys}
    for key in explained.keys() - {mutant.key for mutant in mutants(Path(module).read_text())}:
        print(f"{module}: listed as equivalent, but no mutant: {key}")
    counts: Counter[str] = Counter()
    for mutant in todo:
        status = results[mutant.key]["status"] if mutant.key in results else "not run"
        if mutant.key in explained:
            status = "equivalent"
        elif status == "survived":
            print(f"unexplained: {module}: {mutant.key}")
        counts[status] += 1
    caught, unexplained = counts["killed"] + counts["timed out"], counts["survived"]
    return {
        "mutants": len(todo),
        "run": len(todo) - counts["not run"],
        "killed": counts["killed"],
        "timed out": counts["timed out"],
        "survived": unexplained + counts["equivalent"],
        "equivalent": counts["equivalent"],
        "unexplained": unexplained,
        "score": _score(caught, unexplained),
    }


def _score(caught: int, unexplained: int) -> str:
    """The share caught of those run that are not equivalent."""
    return f"{100 * caught / max(1, caught + unexplained):.1f}%"


def _show(rows: dict[str, dict[str, Any]]) -> None:
    sums: dict[str, Any] = {c: sum(row[c] for row in rows.values()) for c in COLUMNS[:-1]}
    sums["score"] = _score(sums["killed"] + sums["timed out"], sums["unexplained"])
    rows = {**rows, "all": sums}
    print(f"{'module':36}" + "".join(f"{c:>12}" for c in COLUMNS))
    for module, row in rows.items():
        print(f"{module:36}" + "".join(f"{row[c]:>12}" for c in COLUMNS))


if __name__ == "__main__":
    try:
        status = main()
    except (KeyboardInterrupt, Exception) as error:
        from parq_fn.foundation.command import told

        status = told(error)
    sys.exit(status)
