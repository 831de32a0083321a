"""Runs the tests against every mutant, each in a fork of one process that has torch loaded.

Nothing on disk changes: the fork imports the mutated source in place of the module's own. Results
are kept in a file as they come, and what it holds is not run again; `--survivors` runs those that
no test noticed, for after tests were added.
"""

from __future__ import annotations

import argparse
import json
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
    rows = {}
    for module in chosen.modules or TESTS:
        todo = mutants(Path(module).read_text())
        results = kept.setdefault(module, {})
        if not chosen.table:
            _run(module, todo[:: chosen.every], results, kept, chosen)
        rows[module] = _count(module, todo, results)
    _show(rows)
    return int(any(row["unexplained"] for row in rows.values()))


def _run(
    module: str, todo: list[Mutant], results: dict[str, Any], kept: Any, chosen: argparse.Namespace
) -> None:
    explained = {key for keys in EQUIVALENT.get(module, {}).values() for key in keys}
    left = [
        mutant
        for mutant in todo
        if mutant.key not in explained
        and (
            mutant.key not in results
            or (chosen.survivors and results[mutant.key]["status"] == "survived")
        )
    ]
    if not left:
        return
    stages = TESTS[module][: 1 if chosen.first else None]
    from tests.mutation import forked

    untouched = forked.run(module, Path(module).read_text(), stages, [])
    if untouched["status"] != "survived":
        raise SystemExit(f"{module}: the tests fail without a mutant, at {untouched['by']}")
    durations = untouched["durations"]
    by_speed = sorted(durations, key=durations.__getitem__)
    kills = Counter(r["by"] for r in results.values() if r["by"])
    near: dict[str, Counter[str]] = {}
    for i, mutant in enumerate(left):
        own = near.setdefault(mutant.function, Counter())
        order = [test for test, _ in own.most_common() + kills.most_common()] + by_speed
        result = forked.run(module, mutant.source, stages, order)
        del result["durations"]
        if result["by"]:
            own[result["by"]] += 1
            kills[result["by"]] += 1
        results[mutant.key] = result
        chosen.results.write_text(json.dumps(kept, indent=1))
        took = f"{result['status']} {result['seconds']:.1f} s"
        print(f"{module} {i + 1}/{len(left)} {took}: {mutant.key}", flush=True)


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
