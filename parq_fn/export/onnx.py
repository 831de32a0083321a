"""Packed weights in ONNX models: integers with a scale, or codes into a table of levels."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor, nn

from parq_fn.export.given import check_packed
from parq_fn.export.grid import as_multiples, even_grid, shifted
from parq_fn.export.layers import check_fit, names_of_tied
from parq_fn.export.packing import Packed, unpack
from parq_fn.foundation.value import check_flags

_INT2_SINCE = 25  # the opset


def to_onnx(
    module: nn.Module,
    packed: Mapping[str, Packed | Tensor],
    args: tuple[Any, ...],
    file: str | os.PathLike[str],
    *,
    opset: int = 21,
    fuse: bool = False,
    **options: Any,
) -> dict[str, str]:
    """Exports a module with packed weights to an ONNX file, in float32; returns what stands for
    each packed weight, such as "DequantizeLinear, INT4".

    Levels that are whole multiples of one number in 4 bits, or in no more than their codes take,
    become integers behind DequantizeLinear: INT2 (from opset 25 on), INT4 or INT8, with zero
    points where they are needed; the scale is the quantizer's, half of it for half multiples, or,
    where only that is exact, rounded to the weight's dtype. Others become codes into their table
    behind GatherElements, and are as exact, in float32.

    Scales of blocks stand along the first dimension of rows, not in block_size, which onnxruntime
    1.32 takes longer for: 2.4 ms against 1.9 in 4 bits and 2.6 against 1.1 in 8 bits, of a linear
    layer of 1024 x 1024 in blocks of 32 at batch 1, the least of 25 runs in turns on one thread of
    a server's CPU that others used as well.

    module: of which packed weights are parameters; it is not changed.
    packed: what `pack` gives, or a file's content from `load`.
    file: to write to.
    opset: the version of ONNX's operators, 21 or more.
    fuse: let runtimes replace DequantizeLinear and MatMul by one kernel. That of onnxruntime rounds
    activations to 8 bits unless its session is told otherwise, so outputs differ; without it a
    Reshape stands between.

    args: inputs to trace the module with.
    options: torch.onnx.export's, such as input_names and dynamic_shapes.

    Raises ImportError without onnx and onnxscript; ValueError for an opset below 21, and as
    `load_into` does for names and shapes.
    """
    check_flags("to_onnx", fuse=fuse)
    check_packed("to_onnx", packed)
    onnx = _onnx()
    if opset < 21:  # the first with 4-bit integers
        raise ValueError(f"to_onnx: opset must be 21 or more, got {opset}")
    made = copy.deepcopy(module).float().eval()
    check_fit(made, packed)
    own, tied = made.state_dict(keep_vars=True), names_of_tied(made)
    with torch.no_grad():
        for name, weight in unpack(dict(packed)).items():
            own[name].copy_(weight)
    given: Any = args
    traced: Any = optree.tree_map(_single, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's about itself
        program = torch.onnx.export(
            made, traced, dynamo=True, optimize=False, verbose=False, opset_version=opset, **options
        )
    model: Any = program.model_proto  # type: ignore[union-attr] # of the dynamo exporter
    graph, kinds = model.graph, {}
    initializers = {one.name: one for one in graph.initializer}
    nodes: list[Any] = []
    for name, entry in packed.items():
        found = [alias for alias in tied[name] if alias in initializers]
        if not isinstance(entry, Packed) or not found or not own[name].numel():
            continue  # which the module does not use, or which is empty
        alias = found[0]
        graph.initializer.remove(initializers[alias])
        constants, inner, kinds[name] = _standing_for(onnx, alias, entry, opset, fuse)
        graph.initializer.extend(constants)
        nodes.extend(inner)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes + rest)
    onnx.checker.check_model(model)
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        onnx.save(model, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return kinds


def _single(given: Any) -> Any:
    """Floating inputs in float32, as the module is."""
    is_floating = isinstance(given, Tensor) and given.is_floating_point()
    return given.float() if is_floating else given


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 # torch's exporter needs it
    except ImportError:
        raise ImportError("to_onnx needs onnx: pip install 'parq_fn[onnx]'") from None
    return onnx


def _standing_for(
    onnx: Any, name: str, entry: Packed, opset: int, fuse: bool
) -> tuple[list[Any], Any, str]:
    """(constants, nodes whose last output is the weight, what they are)."""
    levels, rows = entry.levels.float().cpu(), entry.indices().cpu()
    r, k = levels.shape
    if not bool(levels.isfinite().all()):
        raise ValueError(f"parameter {name!r}: levels are not finite in float32")
    grid = entry.even
    if grid is None:
        found = even_grid(levels, -127, 127)
    else:
        found = as_multiples(entry.levels, grid, levels.dtype)
    codes, zero, bits = shifted(found)
    codes, zero, unit = codes.cpu(), zero.cpu(), found.unit.cpu()
    stored, coded = _stored(bits, opset), _stored((k - 1).bit_length(), opset)
    if bool(found.is_exact.all()) and stored <= max(4, coded):
        kind = f"INT{stored}"
        whole = fuse and entry.cut is None and r in (1, entry.shape[0])
        shape = entry.shape if whole else (*rows.shape, 1)  # no shape that a Reshape keeps
        scale_shape = [] if r == 1 else [r]
        constants = [
            _integers(onnx, f"{name}.codes", kind, codes.gather(1, rows).reshape(shape)),
            _floats(onnx, f"{name}.scale", unit.reshape(scale_shape)),
        ]
        if bool(zero.any()):
            constants.append(_integers(onnx, f"{name}.zero", kind, zero.reshape(scale_shape)))
        inputs = [one.name for one in constants]
        return _shaped(onnx, name, entry, constants, shape, "DequantizeLinear", kind, inputs)
    kind = f"UINT{coded}"
    constants = [
        _integers(onnx, f"{name}.codes", kind, rows),
        _floats(onnx, f"{name}.levels", levels),
    ]
    cast = onnx.helper.make_node(
        "Cast", [f"{name}.codes"], [f"{name}.indices"], to=onnx.TensorProto.INT64
    )
    inputs = [f"{name}.levels", f"{name}.indices"]
    return _shaped(onnx, name, entry, constants, rows.shape, "GatherElements", kind, inputs, cast)


def _shaped(
    onnx: Any,
    name: str,
    entry: Packed,
    constants: list[Any],
    shape: tuple[int, ...],
    operator: str,
    kind: str,
    inputs: list[str],
    *before: Any,
) -> tuple[list[Any], Any, str]:
    """The operator on its inputs, and a Reshape to the weight's shape where that is another; where
    rows are not runs of the weight, Transposes too."""
    axis = {} if operator == "DequantizeLinear" and len(entry.levels) == 1 else {"axis": 0}
    axis = {"axis": 1} if operator == "GatherElements" else axis
    steps = _steps_back(entry)
    if steps or tuple(shape) != tuple(entry.shape):
        steps.append(("Reshape", list(entry.shape)))
    out = f"{name}.rows" if steps else name
    nodes = [*before, onnx.helper.make_node(operator, inputs, [out], **axis)]
    for i, (step, numbers) in enumerate(steps):
        given, out = out, name if i == len(steps) - 1 else f"{name}.{i}"
        if step == "Transpose":
            nodes.append(onnx.helper.make_node(step, [given], [out], perm=numbers))
            continue
        to, kind_of_size = f"{name}.shape.{i}", onnx.TensorProto.INT64
        constants.append(onnx.helper.make_tensor(to, kind_of_size, [len(numbers)], numbers))
        nodes.append(onnx.helper.make_node(step, [given, to], [out]))
    return constants, nodes, f"{operator}, {kind}"


def _steps_back(entry: Packed) -> list[tuple[str, list[int]]]:
    """Operators, each with its numbers, that put rows into the order of the weight's elements."""
    order = None if entry.cut is None else entry.cut.order(torch.empty(entry.shape, device="meta"))
    steps = [] if order is None else order.steps_back(entry.shape)
    turned = [(sizes, turn) for sizes, turn in steps if turn != sorted(turn)]
    return [step for sizes, turn in turned for step in (("Reshape", sizes), ("Transpose", turn))]


def _stored(bits: int, opset: int) -> int:
    """The bits of the smallest integer type that has so many."""
    return next(b for b in (2, 4, 8, 64) if bits <= b and (b > 2 or opset >= _INT2_SINCE))


def _integers(onnx: Any, name: str, kind: str, values: Tensor) -> Any:
    dtype = getattr(onnx.TensorProto, kind)
    return onnx.helper.make_tensor(name, dtype, list(values.shape), values.flatten().tolist())


def _floats(onnx: Any, name: str, values: Tensor) -> Any:
    dtype = onnx.TensorProto.FLOAT
    raw = values.contiguous().numpy().astype("<f4").tobytes()
    return onnx.helper.make_tensor(name, dtype, list(values.shape), raw, raw=True)
