"""The lists of the mutation runs fit the code of today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.history import FAULTS, Fault
from tests.mutation.mutants import mutants, printed
from tests.mutation.patched import changed_lines, in_place
from tests.mutation.selection import TESTS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_put_back_in_one_place(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.right) == 1
    assert fault.wrong != fault.right
    assert all((ROOT / test).exists() for test in fault.tests)


@pytest.mark.slow
@pytest.mark.parametrize("module", EQUIVALENT)
def test_mutants_that_are_said_to_be_equivalent_exist(module: str) -> None:
    keys = {mutant.key for mutant in mutants((ROOT / module).read_text())}
    listed = {key for same in EQUIVALENT[module].values() for key in same}
    assert listed - keys == set()


def test_files_that_mutants_are_made_of_and_tests_that_run_on_them_exist() -> None:
    tests = {test for stages in TESTS.values() for stage in stages for test in stage}
    named = set(TESTS) | tests
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


_EXAMPLE = """
class Counter:
    first = 1
    def after(self, n, by=2):
        return [m + n for m in range(3)]
def twice(n):
    def add(m):
        return m + n
    return add
twice_of_three = twice(3)
"""


def test_a_mutant_is_put_in_place_where_it_changes_what_functions_do_and_nowhere_else() -> None:
    base = printed(_EXAMPLE)
    compiled = compile(base, "example", "exec")
    found = {}
    for mutant in mutants(_EXAMPLE):
        (line,) = changed_lines(base, mutant.source)
        assert base.splitlines()[line - 1].strip() == mutant.before
        places = in_place(compiled, compile(mutant.source, "example", "exec"))
        found[mutant.key] = None if places is None else {code.co_name for code in places}
    assert found["Counter.after: return [m + n for m in range(3)] -> return None"] == {"after"}
    assert found["twice.add: return m + n -> return m - n"] == {"add", "twice"}
    assert found["twice.add: return m + n -> return None"] == {"twice"}  # no closure any more
    whole = [": twice_of_three = twice(3) ->", "Counter: first = 1 ->", "Counter.after: def after("]
    assert {key for key, names in found.items() if names is None} == {
        key for key in found if key.startswith(tuple(whole))
    }
    assert all(any(key.startswith(start) for key in found) for start in whole)


@pytest.mark.slow
def test_a_run_of_mutants_loads_no_module_of_the_package_before_it_is_mutated() -> None:
    """One that was imported beforehand keeps its own source, and every run would fail."""
    shown = "print([m for m in sys.modules if m.startswith('parq_fn')])"
    code = f"import sys, tests.mutation.__main__; {shown}"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
