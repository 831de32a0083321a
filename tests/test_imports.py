"""Importing the package takes little longer than importing torch."""

import builtins
import importlib
import subprocess
import sys

import pytest

import parq_fn

#: What takes long to import, and few programs need: the compiler and sharded tensors.
HEAVY = [
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "sympy",
    "matplotlib",
    "hypothesis",
    "pandas",
    "transformers",
]

#: Modules that are imported when they are first asked for.
LATER = ["convergence", "display", "export", "optim", "plot", "show", "testing"]


def test_names_are_completed_and_star_gives_what_is_for_users() -> None:
    assert {*parq_fn.__all__, *LATER, "__version__"} <= set(dir(parq_fn))
    assert not {"torch", "Any", "import_module", "command"} & set(dir(parq_fn))
    given: dict[str, object] = {}
    exec("from parq_fn import *", given)
    assert given.keys() - {"__builtins__"} == set(parq_fn.__all__)
    assert not set(parq_fn.__all__) & set(dir(builtins))


@pytest.mark.slow
def test_importing_loads_no_module_that_few_programs_need() -> None:
    code = f"""if True:
        import sys, torch
        there = set(sys.modules)
        import parq_fn, parq_fn.optim, parq_fn.export
        print(*[m for m in {HEAVY} if m in set(sys.modules) - there])
        for name in {LATER}:  # after `import parq_fn` alone
            assert getattr(parq_fn, name).__name__ in sys.modules, name
    """
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == []


@pytest.mark.parametrize("name", ["export.hugging_face", "integrations.trainer"])
def test_without_its_package_a_module_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, f"parq_fn.{name}", raising=False)
    with pytest.raises(ImportError, match=f"parq_fn.{name} needs transformers: pip install tran"):
        importlib.import_module(f"parq_fn.{name}")
