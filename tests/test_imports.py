"""Importing the package takes little longer than importing torch."""

import subprocess
import sys

import pytest

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


@pytest.mark.slow
def test_importing_loads_no_module_that_few_programs_need() -> None:
    code = f"""if True:
        import sys, torch
        there = set(sys.modules)
        import parq_fn, parq_fn.optim, parq_fn.export
        print(*[m for m in {HEAVY} if m in set(sys.modules) - there])
    """
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == []
