"""Puts mended faults back, one at a time, and shows which test notices each.

The faults are real: each was found in an earlier version and mended, with a test. An edit of
today's code brings it back, in a copy of the working tree; then the tests of the files named with
it run there up to the first that fails. Run it before and after a change of the tests, to see
that they still notice what they were written for.

    python -m tests.mutation.history                    all of them
    python -m tests.mutation.history 3 7 checkpoint     by number, or a part of the name
    python -m tests.mutation.history --quick            first the tests that noticed them before

It ends with 1 where a fault is not noticed, where an edit does not fit the code any more, or where
a test that noticed a fault also fails without it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from parq_fn.foundation.command import Parser, command, output_folder

ROOT = Path(__file__).parents[2]
LIMIT_S = 1500.0  # for the tests of one fault
MARK = "PARQ_FN_FAULT"  # set in all processes of a run, so that those left behind can be ended


class Fault(NamedTuple):
    """A fault that was mended, and the edit of today's code that brings it back."""

    name: str  # what goes wrong
    file: str
    right: str  # the text that stands in the file now, once
    wrong: str  # the text that is put in its place
    tests: tuple[str, ...]  # files of the tests that should notice it
    before: str  # names of tests that noticed it, as `pytest -k` takes them
    fix: str  # the commit that mended it


FAULTS = [
    # Compiled passes, and passes over many parameters
    Fault(
        "the compiler makes a program for each rank of a weight, and stops at the ninth",
        "parq_fn/optim/engine/programs.py",
        "    found = Rows._make(x if x is None else x.detach() for x in part)\n",
        "    found = part\n",
        ("tests/optim/test_passes.py",),
        "parameters_of_any_rank",
        "8ccddd3",
    ),
    Fault(
        "the compiler is given rows of a weight that are not contiguous, and fails",
        "parq_fn/optim/engine/passes.py",
        "    if copied or (contiguous and not weight.is_contiguous()):\n",
        "    if copied:\n",
        ("tests/optim/test_passes.py",),
        "test_compiled and hard",
        "4309d18",
    ),
    Fault(
        "the two halves of a large parameter are mapped in one loop each",
        "parq_fn/foundation/torch_private.py",
        '        options |= {"aggressive_fusion": True, "score_fusion_memory_threshold": 0}\n',
        "        pass\n",
        ("tests/optim/test_passes.py",),
        "maps_two_in_one_loop",
        "6adc86e",
    ),
    Fault(
        "a latent without dimensions takes the dtype of its divisor",
        "parq_fn/transforms/prox_state.py",
        "    return wide / to_device(divisor, wide).to(wide.dtype)  # or",
        "    return wide / to_device(divisor, wide)  # or",
        ("tests/optim/test_passes.py",),
        "no_dimension or in_pieces",
        "c5ec22e",
    ),
    # A sweep of many trainings in one program
    Fault(
        "a sweep of one run is compiled twice, as its state changes its strides",
        "examples/sweep.py",
        "t.clone(memory_format=torch.contiguous_format)",
        "t",
        ("tests/test_sweep.py",),
        "one_run_is_compiled_once",
        "4309d18",
    ),
    Fault(
        "a second grid in one process is compiled with symbols for its sizes, and fails",
        "examples/sweep.py",
        "torch.compile(torch.vmap(sweep.step), fullgraph=True, dynamic=False)",
        "torch.compile(torch.vmap(sweep.step), fullgraph=True)",
        ("tests/test_sweep.py",),
        "sweep",
        "4309d18",
    ),
    # Functions under vmap, grad and compile
    Fault(
        "Adam's moments begin as one tree in two places, so that a step compiles again",
        "parq_fn/transforms/links.py",
        "        first, second, largest = (tree_map(torch.zeros_like, params) for _ in range(3))\n",
        "        first = second = largest = tree_map(torch.zeros_like, params)\n",
        ("tests/test_torch_func.py",),
        "a_whole_step_compiles_once",
        "f48b82a",
    ),
    Fault(
        "no derivative in Adam's decay where it is 0",
        "parq_fn/transforms/links.py",
        "    return b * ((count - 1) * b.clamp(min=torch.finfo(b.dtype).tiny).log()).exp()\n",
        "    return (count * b.log()).exp()\n",
        ("tests/test_optimizers.py",),
        "derivatives_in_a_decay_of_zero",
        "92efefc",
    ),
    Fault(
        "the cuts of a batch are found along the wrong axis under vmap",
        "parq_fn/quantizers/kmeans_1d.py",
        "    batched = table.movedim(in_dims[0] or 0, 0)  #",
        "    batched = table  #",
        ("tests/test_torch_func.py", "tests/test_partition.py"),
        "cuts_by_vmap_over_any_axis",
        "b3c2224",
    ),
    # Memory
    Fault(
        "the normal map's pull is held for all parameters at once",
        "parq_fn/optim/moving.py",
        "        if needy and steps_apart(self.base):\n",
        "        if needy and False:\n",
        ("tests/optim/test_memory.py",),
        "largest_parameter_needs",
        "6cc8d12",
    ),
    Fault(
        "a transformation is stepped for all parameters at once",
        "parq_fn/optim/leafwise.py",
        "    if not params or not _tells_all(transformation):\n",
        "    if True:\n",
        ("tests/optim/test_memory.py",),
        "takes_leaves_apart",
        "09d2166",
    ),
    # Several processes
    Fault(
        "TransformOptimizer keeps whole state for parameters that were sharded since",
        "parq_fn/optim/places.py",
        "            if _are_alike(old, new):\n",
        "            if True:\n",
        ("tests/optim/test_sharded.py",),
        "freezing_clipping_exchanged",
        "3a40572",
    ),
    Fault(
        "shards are told apart as if a remainder of rows went to the last process",
        "parq_fn/transforms/layout.py",
        "        step = -(-_length(runs) // (ranks * factor)) or 1\n",
        "        step = _length(runs) // (ranks * factor) or 1\n",
        ("tests/test_layout.py",),
        "indices",
        "5b58075",
    ),
    Fault(
        "sharded latents are gathered in every step, due or not",
        "parq_fn/optim/quantized.py",
        "            fits = concrete(link.due(state)) is not False\n",
        "            fits = True\n",
        ("tests/optim/test_sharded.py",),
        "collectives",
        "5b58075",
    ),
    Fault(
        "a norm of sharded gradients is a part of it on each process",
        "parq_fn/transforms/clipping.py",
        "        gathered(torch.linalg.vector_norm(u,",
        '        (lambda n: getattr(n, "_local_tensor", n))(torch.linalg.vector_norm(u,',
        ("tests/optim/test_sharded.py",),
        "law_12",
        "6cc8d12",
    ),
    Fault(
        "a save by one process alone waits for the others",
        "parq_fn/export/file.py",
        "    _in_ranks(path, parts, _header_of(packed, parts), sharded)\n",
        "    many = sharded or dist.is_initialized()\n"
        "    _in_ranks(path, parts, _header_of(packed, parts), many)\n",
        ("tests/export/test_sharded.py",),
        "written_by_one_rank_alone",
        "ed457e9",
    ),
    # Checkpoints
    Fault(
        "a file of a checkpoint that was cut off is met only as it is read",
        "parq_fn/optim/checkpoint_files.py",
        "        if size < end:\n",
        "        if False:\n",
        ("tests/optim/test_checkpoint.py",),
        "cut_off",
        "6cc8d12",
    ),
    Fault(
        "parameters share 0-d tensors in a state dict, which safetensors refuses",
        "parq_fn/optim/state.py",
        "got.clone() if _is_scalar(got) else got",
        "got",
        ("tests/optim/test_checkpoint.py",),
        "plain_files_and_safetensors",
        "5e92587",
    ),
    Fault(
        "a latent that is loaded is rounded to its parameter's dtype",
        "parq_fn/optim/state.py",
        "    return got.detach().to(device, dtype, copy=True)\n",
        "    return got.detach().to(device, p.dtype, copy=True)\n",
        ("tests/optim/test_checkpoint.py",),
        "without_a_group",
        "ad8cd85",
    ),
    Fault(
        "the state of frozen parameters is saved and not loaded",
        "parq_fn/optim/checkpoint.py",
        "    with _quiet(), _thawed(model, load=True) if model is not None else nullcontext():\n",
        "    with _quiet():\n",
        ("tests/optim/test_frozen.py",),
        "frozen_parameters_is_restored",
        "0813a2e",
    ),
    Fault(
        "groups have no slope before their first step, so that none is restored",
        "parq_fn/optim/quantized.py",
        '        if is_quantized(group) and group["params"]:\n',
        "        if False:\n",
        ("tests/test_qat_fsdp2.py",),
        "killed_and_resumed",
        "ba42139",
    ),
    # Recipes: runs that are stopped, workers that are lost
    Fault(
        "a checkpoint fits a run with another number of epochs",
        "examples/recipe/plan.py",
        "    return sorted(vars(args).keys() - RESUMABLE_FLAGS, "
        'key=lambda name: (name != "epochs", name))\n',
        '    return ["arch", "image_size", "data", "full_prec", "seed", "batch_size", '
        '"quant_bits"]\n',
        ("tests/examples/test_recipes.py",),
        "checkpoints_of_other_runs",
        "0ce3652",
    ),
    Fault(
        "a run that is told to stop in a test finishes the test first",
        "examples/recipe/evaluation.py",
        "            between()\n",
        "",
        ("tests/examples/test_recipes.py",),
        "stopped_in_a_test",
        "05ec096",
    ),
    Fault(
        "Ctrl-C ends a run without a checkpoint",
        "examples/recipe/stopping.py",
        "    before = {s: signal.signal(s, stop) for s in STOPPING}\n",
        "    before = {s: signal.signal(s, stop) for s in STOPPING if s != signal.SIGINT}\n",
        ("tests/examples/test_recipes.py",),
        "ctrl_c",
        "ea43892",
    ),
    Fault(
        "workers and their server keep each other alive after the main process is killed",
        "examples/recipe/loading.py",
        "        while main.is_alive():\n",
        "        while True:\n",
        ("tests/examples/test_recipes.py",),
        "nothing_is_left and run",
        "8ccddd3",
    ),
    Fault(
        "a worker that is killed ends the run with a traceback",
        "examples/recipe/loading.py",
        "    except (ConnectionError, EOFError, RuntimeError) as error:\n",
        "    except UserError as error:\n",
        ("tests/examples/test_recipes.py",),
        "nothing_is_left and worker",
        "8ccddd3",
    ),
    Fault(
        "a run that breaks waits for its workers without end",
        "examples/recipe/loading.py",
        "            if told is not None and told.si_pid == main.pid:\n                break\n",
        "            del told\n",
        ("tests/examples/test_recipes.py",),
        "breaks_leaves_no_worker",
        "ea43892",
    ),
    Fault(
        "a process that leaves at once leaves its workers behind",
        "examples/recipe/parallel.py",
        "        child.kill()\n",
        "        child.is_alive()\n",
        ("tests/examples/test_recipes.py",),
        "leaves_takes_its_workers",
        "a1b58df",
    ),
    Fault(
        "a worker waits without end for a lock that a thread held as it was forked",
        "examples/recipe/loading.py",
        'WORKERS = multiprocessing.get_context("forkserver")\n',
        'WORKERS = multiprocessing.get_context("fork")\n',
        ("tests/examples/test_recipe_parts.py",),
        "wait_for_a_thread",
        "e1e809b",
    ),
    # The testing kit and what is said of it
    Fault(
        "the law of proxes asks for a growth that only convex ones have",
        "parq_fn/testing/laws/proximal.py",
        '    needs=("regularizer",),\n',
        '    needs=("regularizer", "growth"),\n',
        ("tests/test_readme.py",),
        "tables_of_laws",
        "c003ae8",
    ),
    Fault(
        "a law tries NaN in the first place of a row alone, and wrong maps pass",
        "parq_fn/testing/laws/proxmaps.py",
        "        for row, column in ((0, 0), (-1, -1)):\n",
        "        for row, column in ((0, 0),):\n",
        ("tests/laws/test_kit_catches.py",),
        "once_passed",
        "c003ae8",
    ),
    # Quantizers
    Fault(
        "rounding carries a mean past its cluster, and levels of equal weights are unsorted",
        "parq_fn/quantizers/lsbq.py",
        "    hi = between((whole - below) / (n - best), data.gather(-1, best), data[:, -1:])\n",
        "    hi = (whole - below) / (n - best)\n",
        ("tests/test_quantizers.py",),
        "equal_weights_are_the_weight",
        "05c9282",
    ),
    Fault(
        "long rows have too few candidate cuts where many values are equal",
        "parq_fn/quantizers/kmeans_1d.py",
        "_CANDIDATES = 4096  #",
        "_CANDIDATES = 1024  #",
        ("tests/test_partition.py",),
        "long_rows_of_ties",
        "20f55a2",
    ),
    Fault(
        "equal weights of a long row have unequal shares of a derivative",
        "parq_fn/quantizers/reductions.py",
        "    if not is_plain(x):  #",
        "    if False:  #",
        ("tests/test_quantizers.py",),
        "equal_shares_of_a_derivative",
        "4309d18",
    ),
    Fault(
        "levels depend on how a row lies in memory",
        "parq_fn/quantizers/base.py",
        "        x = rows.to(dtype).contiguous()\n",
        "        x = rows.to(dtype)\n",
        ("tests/test_quantizers.py",),
        "layout_of_rows",
        "e72d85a",
    ),
    # Maps, links and schedules
    Fault(
        "parq is not finite at the smallest slopes",
        "parq_fn/proxmaps/parq.py",
        "    safe = s.clamp(min=torch.finfo(s.dtype).tiny)\n",
        "    safe = torch.where(s > 0, s, 1.0)\n",
        ("tests/test_proxmaps.py",),
        "subnormal_slope",
        "c497e1f",
    ),
    Fault(
        "a row that holds NaN at its first fit gets zeros for levels",
        "parq_fn/transforms/prox_fit.py",
        "    take = new.isfinite().all(-1, keepdim=True) | to_device(first, old)\n",
        "    take = new.isfinite().all(-1, keepdim=True)\n",
        ("tests/test_prox.py",),
        "first_fit",
        "fa1353f",
    ),
    Fault(
        "accumulated gradients stall in a narrow dtype",
        "parq_fn/transforms/wrappers.py",
        "torch.zeros_like(p, dtype=wide(p))",
        "torch.zeros_like(p)",
        ("tests/test_transformation.py",),
        "accumulation_does_not_stall",
        "c497e1f",
    ),
    Fault(
        "the check of an exponential path underflows, and a right one is refused",
        "parq_fn/schedules.py",
        "            and (init == 0 or end == 0 or (init < 0) != (end < 0))\n",
        "            and init * end <= 0\n",
        ("tests/test_schedules.py",),
        "exponential_paths",
        "fa1353f",
    ),
    Fault(
        "a chain takes a prox link in front of one that changes its updates",
        "parq_fn/transforms/chain.py",
        "            if not (alone or own.passes_updates):\n",
        "            if False:\n",
        ("tests/test_transformation.py",),
        "in_front_of_what_moves",
        "05c9282",
    ),
    # Adapters
    Fault(
        "parameters that were frozen in turn share a sum of learning rates",
        "parq_fn/optim/base_owner.py",
        "            known[own] = int(count), float(lr_sum)\n",
        "            known[own] = int(count), 0.0\n",
        ("tests/optim/test_frozen.py",),
        "frozen_in_turn",
        "0813a2e",
    ),
    Fault(
        "state stays behind where parameters are exchanged for some on another device",
        "parq_fn/optim/places.py",
        "                entries.update(moved)\n",
        "                pass\n",
        ("tests/optim/test_changed_parameters.py",),
        "state_is_where",
        "67c5032",
    ),
    # Wrong use, and links and maps of one's own
    Fault(
        "a rank maps pieces of rows by a map of whole rows",
        "parq_fn/transforms/prox_state.py",
        "        if part.cut and not link.elementwise:\n",
        "        if False:\n",
        ("tests/optim/test_whole_rows.py",),
        "ranks_give_the_weights",
        "a24ee36",
    ),
    Fault(
        "rows of a map of whole rows are cut to pieces",
        "parq_fn/optim/engine/passes.py",
        "        for piece in _pieces(whole) if maps.link.elementwise else [whole]:\n",
        "        for piece in _pieces(whole):\n",
        ("tests/optim/test_whole_rows.py",),
        "adapters_give_the_weights",
        "a24ee36",
    ),
    Fault(
        "states of one's own cannot be loaded by torch's safe default",
        "parq_fn/foundation/value.py",
        "    torch.serialization.add_safe_globals([cls])\n",
        "",
        ("tests/test_own_states.py",),
        "safe_default",
        "d28e810",
    ),
    Fault(
        "keys of a state that is a dict are not found by name",
        "parq_fn/foundation/reading.py",
        '            kind = "link" if isinstance(child, list | tuple) else "field"\n',
        '            kind = "link"\n            continue\n',
        ("tests/test_own_states.py",),
        "found_by_name",
        "d28e810",
    ),
    Fault(
        "params of as many leaves as a chain has links are taken for its state",
        "parq_fn/transforms/chain.py",
        '        if not isinstance(state, kind) or hasattr(state, "_fields"):\n',
        "        if False:\n",
        ("tests/test_wrong_use.py",),
        "params_as_many_as_links",
        "a24ee36",
    ),
    Fault(
        "a link's two updates are taken for updates and a state",
        "parq_fn/transforms/transformation.py",
        "    if type(got) is tuple and len(got) == 2:\n",
        "    if len(got) == 2:\n",
        ("tests/test_wrong_use.py",),
        "returns_only_updates",
        "a24ee36",
    ),
    Fault(
        "gradients of whole numbers become zeros without a word",
        "parq_fn/foundation/tree.py",
        "        if param.is_floating_point() and not update.is_floating_point():\n",
        "        if False:\n",
        ("tests/test_wrong_use.py",),
        "do_not_fit_name_the_leaf",
        "a24ee36",
    ),
    Fault(
        "two learning rates in front of a prox link ascend",
        "parq_fn/transforms/chain.py",
        "        if least > 1:\n",
        "        if False:\n",
        ("tests/test_wrong_use.py",),
        "two_learning_rates",
        "a24ee36",
    ),
    Fault(
        "apply_updates of swapped arguments loses a parameter",
        "parq_fn/transforms/train.py",
        "        if param is None and update is not None:\n",
        "        if False:\n",
        ("tests/test_wrong_use.py",),
        "loses_no_parameter",
        "a24ee36",
    ),
    # Optimizers of other people as a base, and what is built wrong
    Fault(
        "a base that draws in its first step moves the global generators where it is wrapped",
        "parq_fn/optim/base_optimizer.py",
        "    with _undrawn(p):\n",
        "    if True:\n",
        ("tests/optim/test_other_bases.py",),
        "draws_from_no_global_generator",
        "2f75246",
    ),
    Fault(
        "a state is refused whose shape goes by the values of a parameter",
        "parq_fn/optim/base_owner.py",
        "        return lambda key: not is_own(key) and found(key)\n",
        "        return lambda key: False and found(key)\n",
        ("tests/optim/test_other_bases.py",),
        "resumed_to_the_bit",
        "2f75246",
    ),
    Fault(
        "what a base keeps of no parameter is lost on resume",
        "parq_fn/optim/wrapping.py",
        "        if beyond and kept:\n",
        "        if False and beyond and kept:\n",
        ("tests/optim/test_other_bases.py",),
        "resumed_to_the_bit",
        "2f75246",
    ),
    Fault(
        "codes of a loaded state share memory with those that were saved",
        "parq_fn/optim/state.py",
        "    if is_composed(local(got)):\n",
        "    if False:\n",
        ("tests/optim/test_other_bases.py",),
        "codes_of_a_loaded_state_are_copies",
        "2f75246",
    ),
    Fault(
        "train() and eval() of a base do not reach the weights",
        "parq_fn/optim/wrapping.py",
        "        self._store.rewrite()\n",
        "        pass\n",
        ("tests/optim/test_other_bases.py",),
        "modes_of_a_base_reach",
        "2f75246",
    ),
    Fault(
        "entries and groups that a base made after its first step are not in a checkpoint",
        "parq_fn/optim/checkpoint_state.py",
        "        _make_places(index, optimizer, state)\n",
        "        pass\n",
        ("tests/optim/test_other_bases.py",),
        "resumed_to_the_bit",
        "2f75246",
    ),
    Fault(
        "bounds of an annealing that are meant for fractions are taken for steps",
        "parq_fn/foundation/checks.py",
        "        if bound is not None and (0 < bound < 1 or (shares and bound == 1)):\n",
        "        if False:\n",
        ("tests/optim/test_built_wrong.py",),
        "meant_for_fractions",
        "e2a8832",
    ),
    Fault(
        "a state that was trained with other prox links is resumed",
        "parq_fn/optim/tree_owner.py",
        "            made[params[name]][DIGEST] = digest(*seen)\n",
        "            pass\n",
        ("tests/optim/test_built_wrong.py",),
        "state_of_another_link",
        "2f75246",
    ),
    Fault(
        "a parameter that was flattened trains as one row",
        "parq_fn/optim/state.py",
        "    if len(shape) != p.dim():\n",
        "    if False:\n",
        ("tests/optim/test_built_wrong.py",),
        "flat",
        "2f75246",
    ),
    Fault(
        "a checkpoint calls what its entries name",
        "parq_fn/optim/checkpoint_bytes.py",
        '        raise pickle.UnpicklingError(f"{module}.{name}")\n',
        "        return super().find_class(module, name)\n",
        ("tests/optim/test_checkpoint_values.py",),
        "would_call",
        "2f75246",
    ),
    # Export
    Fault(
        "zero points do not fit the integers that they are stored in",
        "parq_fn/export/grid.py",
        "        least, most = (-half - low).clamp(min=-half), "
        "(half - 1 - high).clamp(max=half - 1)\n",
        "        least, most = -half - low, half - 1 - high\n",
        ("tests/export/test_grid.py",),
        "zero_points",
        "ff8c80d",
    ),
    Fault(
        "a layer under two names cannot be packed",
        "parq_fn/export/layers.py",
        "    layers = dict(module.named_modules(remove_duplicate=False))\n",
        "    layers = dict(module.named_modules())\n",
        ("tests/export/test_layers.py",),
        "layer_under_two_names",
        "ff8c80d",
    ),
    Fault(
        "a GGUF file is written with scales that float16 does not hold",
        "parq_fn/export/gguf.py",
        "    able = [h for h in found if h.worst < torch.inf and _divides(entry, h.kind)]\n",
        "    able = [h for h in found if _divides(entry, h.kind)]\n",
        ("tests/integrations/test_gguf.py",),
        "scales_beyond_float16",
        "ff8c80d",
    ),
]


class Result(NamedTuple):
    """What became of a fault."""

    fault: Fault
    seen: str  # the first test that failed; empty where none did
    said: str  # what is told of it
    seconds: float


def fits(fault: Fault, root: Path) -> bool:
    """Whether the text to be replaced stands in the file, once."""
    file = root / fault.file
    return file.exists() and file.read_text().count(fault.right) == 1


def copy_of_the_tree(folder: Path) -> None:
    """Copies what git tracks, and what it does not ignore, as it is now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in {*listed.stdout.split("\0")} - {""}:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@contextmanager
def put_back(fault: Fault, folder: Path) -> Iterator[None]:
    """The copy with the fault in it."""
    file = folder / fault.file
    text = file.read_text()
    file.write_text(text.replace(fault.right, fault.wrong))
    try:
        yield
    finally:
        file.write_text(text)


def run(folder: Path, *arguments: str, limit: float = LIMIT_S) -> tuple[int | None, str]:
    """(exit status, None where time ran out; output) of a Python command in the copy. No process
    that it has started is left."""
    mark = uuid.uuid4().hex
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    # no bytecode is kept, which Python would take for current after an edit in the same second
    own = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", MARK: mark}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, **own},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end_marked(mark)
        output.seek(0)
        return status, output.read()


def end_marked(mark: str) -> None:
    """Ends the processes whose environment has the mark, where /proc tells."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another's, or it has ended since
            if f"{MARK}={mark}".encode() in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


def first_failure(output: str) -> tuple[str, str]:
    """(the test's id, why) of the first failure; both empty where there is none."""
    found = re.search(r"^FAILED (\S+?::.*?)(?: - (.*))?$", output, re.MULTILINE)
    return (found[1], found[2] or "") if found else ("", "")


def pytest(folder: Path, *arguments: str) -> tuple[int | None, str]:
    """pytest in the copy, in one process."""
    return run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *arguments)


def tried(fault: Fault, folder: Path, quick: bool, kept: Path | None) -> Result:
    """Runs the tests with the fault in the code."""
    ways: list[list[str]] = [["-x", *fault.tests]]
    if quick:
        ways.insert(0, ["-x", "-k", fault.before, *fault.tests])
    start = time.monotonic()
    with put_back(fault, folder):
        for way in ways:
            status, output = pytest(folder, *way)
            seen, why = first_failure(output)
            if seen:
                break
    seconds = time.monotonic() - start
    if kept is not None:
        name = re.sub(r"\W+", "-", fault.name)
        (kept / f"{FAULTS.index(fault) + 1:02d}-{name}.txt").write_text(output)
    if seen:
        return Result(fault, seen, f"seen by {seen} in {seconds:.0f} s ({why})", seconds)
    about = {None: ", time ran out", 0: "", 1: ""}.get(status, f", pytest ended with {status}")
    return Result(fault, "", f"NOT SEEN in {seconds:.0f} s{about}", seconds)


def fail_anyway(results: Sequence[Result], folder: Path) -> list[str]:
    """Those of the tests that noticed a fault which fail without one too."""
    noticed = sorted({result.seen for result in results if result.seen})
    if not noticed:
        return []
    status, output = pytest(folder, *noticed)
    found = re.findall(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", output, re.MULTILINE)
    if status != 0 and not found:
        return [f"unknown, as they ended with {status}: {output[-2000:]}"]
    return found


def table(results: Sequence[Result]) -> str:
    """A line for each fault: its number, name, the file whose test noticed it, seconds."""
    lines = []
    for result in results:
        number = FAULTS.index(result.fault) + 1
        file, _, test = result.seen.partition("::")
        told = f"{file} {test}" if result.seen else "NOT SEEN"
        lines.append(f"{number:>3}  {result.seconds:>5.0f} s  {result.fault.name}: {told}")
    total, unseen = sum(r.seconds for r in results), sum(not r.seen for r in results)
    lines.append(f"{len(results)} faults, {unseen} not seen, {total:.0f} s")
    return "\n".join(lines)


def chosen(words: Sequence[str]) -> list[Fault]:
    """The faults of these numbers or with these parts of names; all without any. Raises ValueError
    for a word that no fault has."""
    if not words:
        return FAULTS
    found: list[Fault] = []
    for word in words:
        own = [f for i, f in enumerate(FAULTS, 1) if word == str(i) or word in f.name]
        if not own or (word.isdigit() and not 1 <= int(word) <= len(FAULTS)):
            raise ValueError(f"no fault {word!r}; there are 1 to {len(FAULTS)}")
        found += own
    return list(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TEST_SEED", "0")  # the check at the end takes the same cases
    parser = Parser("tests.mutation.history", __doc__)
    parser.add_argument("faults", nargs="*", help="numbers or parts of names; all by default")
    text = "run the tests that noticed a fault before first, and the files only if these do not"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--list", action="store_true", help="name the faults, run nothing")
    parser.add_argument("--outputs", type=Path, help="a folder for what pytest prints of each")
    args = parser.parse_args(argv)
    try:
        faults = chosen(args.faults)
    except ValueError as error:
        parser.error(str(error))
    unfit = [fault for fault in faults if not fits(fault, ROOT)]
    for fault in unfit:
        print(f"the text of {fault.name!r} does not stand in {fault.file} exactly once:")
        print(fault.right)
    if args.list:
        for fault in faults:
            print(f"{FAULTS.index(fault) + 1:>3}  {fault.fix}  {fault.file}: {fault.name}")
        return int(bool(unfit))
    if args.outputs is not None:
        output_folder(args.outputs)
    results = []
    with tempfile.TemporaryDirectory(prefix="parq_fn-history-") as temporary:
        folder = Path(temporary).resolve()
        copy_of_the_tree(folder)
        where = "import parq_fn, examples; print(parq_fn.__file__, examples.__path__)"
        _, said = run(folder, "-c", where)
        if said.count(str(folder)) != 2:
            print(f"the copy's packages are not those that are imported: {said}")
            return 1
        for fault in faults:
            if fault not in unfit:
                results.append(tried(fault, folder, args.quick, args.outputs))
                number = FAULTS.index(fault) + 1
                print(f"{number}. {fault.name}: {results[-1].said}", flush=True)
        anyway = fail_anyway(results, folder)
    print(table(results))
    for test in anyway:
        print(f"fails without a fault, too: {test}")
    return int(bool(unfit or anyway) or not all(result.seen for result in results))


if __name__ == "__main__":
    command(main)
