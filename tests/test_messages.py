"""Everyday mistakes: each is refused where it is made, in one line that says what was got, what was
expected and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn import export, schedules
from parq_fn.export.gguf import to_gguf
from parq_fn.export.onnx import to_onnx
from parq_fn.export.torchao import to_torchao
from parq_fn.optim import (
    QuantOptimizer,
    TransformOptimizer,
    load_checkpoint,
    save_checkpoint,
    share_on_levels,
)

NET, OTHER = (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)) for _ in range(2))
PROX = pf.hard_prox(pf.lsbq(1), period=1)
CHAIN = pf.chain(pf.sgd(0.1), PROX)
APPLY, PARAMS = pf.functional(NET)
STATE = CHAIN.init(PARAMS)


def wrapped(net: nn.Module) -> QuantOptimizer:
    own = [p for p in net.parameters() if p.dim() > 1]
    return QuantOptimizer(torch.optim.SGD([{"params": own, "quant_bits": 1}], lr=0.1), PROX)


OPTIMIZER = wrapped(NET)
SGD = torch.optim.SGD(NET.parameters(), lr=0.1)
WARMED = pf.chain(pf.sgd(0.1), pf.hard_prox(pf.lsbq(1), warmup=2))
APPLIED = TransformOptimizer(OTHER.named_parameters(), WARMED)
ANNEALED: dict[str, Any] = {"anneal_start": 5, "anneal_end": 50}


def prox(**options: Any) -> Any:
    return pf.parq_prox(pf.lsbq(2), **{**ANNEALED, **options})


#: {what is wrong: (the call, what its error says)}
MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    # the torch adapters
    "an optimizer's class": (
        lambda: QuantOptimizer(torch.optim.AdamW, PROX),  # type: ignore[arg-type]
        r"such as torch.optim.AdamW\(groups.*got the class AdamW, which is to be called",
    ),
    "parameters for an optimizer": (
        lambda: QuantOptimizer(NET.parameters(), PROX),  # type: ignore[arg-type]
        r"such as torch.optim.AdamW\(groups, lr=1e-3\), got generator",
    ),
    "a module for an optimizer": (
        lambda: QuantOptimizer(NET, PROX),  # type: ignore[arg-type]
        "expected a torch.optim optimizer .*got Sequential",
    ),
    "a prox link's class": (
        lambda: QuantOptimizer(SGD, pf.hard_prox),  # type: ignore[arg-type]
        r"expected a prox link such as .*got the class hard_prox, which is to be called",
    ),
    "a transformation of a module": (
        lambda: TransformOptimizer(NET, CHAIN),  # type: ignore[arg-type]
        r"got a Sequential; give module.named_parameters\(\)",
    ),
    "a transformation of an optimizer": (
        lambda: TransformOptimizer(SGD, CHAIN),  # type: ignore[arg-type]
        "got a SGD; give its param_groups, or .* by QuantOptimizer",
    ),
    "a transformation of a dict": (
        lambda: TransformOptimizer(PARAMS, CHAIN),  # type: ignore[arg-type]
        r"got a dict; give a list of groups, or of \(name, parameter\) pairs",
    ),
    "a transformation first": (
        lambda: TransformOptimizer(CHAIN, NET.parameters()),  # type: ignore[arg-type]
        r"got a Chain; the order is TransformOptimizer\(params, transformation\)",
    ),
    "an optimizer for a transformation": (
        lambda: TransformOptimizer(NET.parameters(), SGD),  # type: ignore[arg-type]
        r"is torch.optim's SGD, .*give it to parq_fn.optim.QuantOptimizer\(",
    ),
    "a class of torch's for what moves levels": (
        lambda: pf.hard_prox(pf.uniform(2), learn=torch.optim.Adam),  # type: ignore[arg-type]
        r"is torch.optim's Adam, .*make one of torch's, as_link\(Adam, lr=\.\.\.\)",
    ),
    "levels of an optimizer, as of a transformation": (
        lambda: pf.levels_of(OPTIMIZER, OPTIMIZER.state),
        r"levels_of: the transformation is a QuantOptimizer, .* optimizer.levels\(p\)",
    ),
    "levels of a TransformOptimizer, as of its transformation": (
        lambda: pf.levels_of(APPLIED, APPLIED.state),
        "is a TransformOptimizer; give its transformation and its transformation_state",
    ),
    "averages of an optimizer, as of a transformation": (
        lambda: pf.weights_of_average(OPTIMIZER, OPTIMIZER.state, {}),  # type: ignore[arg-type]
        r"is a QuantOptimizer, .*with optimizer.averaged_weights\(\)",
    ),
    "an optimizer for a state": (
        lambda: pf.read(OPTIMIZER, "qparams"),
        r"got a QuantOptimizer; an optimizer's entries of a parameter are in optimizer.state\[p\]",
    ),
    "levels before the first step": (
        lambda: OPTIMIZER.levels(NET[0].weight),
        r"levels: none are fitted yet: the first step past warmup=0 of hard_prox\(.*, and 0 were",
    ),
    "levels in the warmup": (
        lambda: APPLIED.levels(OTHER[0].weight),
        "none are fitted yet: the first step past warmup=2 of hard_prox",
    ),
    "levels by name": (
        lambda: OPTIMIZER.levels("0.weight"),  # type: ignore[arg-type]
        "levels: '0.weight' is none .*give a parameter, such as net.weight",
    ),
    "levels of another net": (
        lambda: OPTIMIZER.levels(OTHER[0].weight),
        r"levels: a parameter of shape \(3, 4\) is none",
    ),
    "the share of a module": (
        lambda: share_on_levels(NET),  # type: ignore[arg-type]
        "expected a QuantOptimizer or a TransformOptimizer, got Sequential",
    ),
    # checkpoints
    "a checkpoint's model first": (
        lambda: save_checkpoint(NET, "folder", OPTIMIZER),  # type: ignore[arg-type]
        r"expected a path for the folder, got a Sequential; the order is save_checkpoint\(folder",
    ),
    "a checkpoint's optimizer before the model": (
        lambda: load_checkpoint("folder", OPTIMIZER, NET),  # type: ignore[arg-type]
        r"for the model, got a QuantOptimizer; the order is load_checkpoint\(folder",
    ),
    "a checkpoint of a net and another's optimizer": (
        lambda: save_checkpoint("folder", OTHER, OPTIMIZER),
        "2 of the 2 parameters of the optimizer are none of the model's; give the model that",
    ),
    "a checkpoint into a net and another's optimizer": (
        lambda: load_checkpoint("folder", OTHER, OPTIMIZER),
        "2 of the 2 parameters of the optimizer are none of the model's; give the model that",
    ),
    "a file for a checkpoint": (
        lambda: load_checkpoint(__file__, NET),
        "no checkpoint at .*test_messages.py, which is a file; give the folder",
    ),
    "a checkpoint that is not there": (
        lambda: load_checkpoint("no folder", NET),
        "no checkpoint at .*no folder, which is not there; give the folder",
    ),
    "a folder of something else": (
        lambda: load_checkpoint(Path(__file__).parent, NET),
        r"has no \.metadata",
    ),
    # the functional core
    "init of a module": (lambda: CHAIN.init(NET), r"got a Sequential, .*use functional\(module\)"),
    "weights of a module": (
        lambda: CHAIN.weights(STATE, NET),
        r"chain: got a Sequential, .*use functional\(module\)",
    ),
    "an update of a module": (
        lambda: CHAIN.update(PARAMS, STATE, NET),
        r"chain: got a Sequential, .*use functional\(module\)",
    ),
    "updates added to a module": (
        lambda: pf.apply_updates(NET, PARAMS),
        r"apply_updates: got a Sequential, .*use functional\(module\)",
    ),
    "a module for updates": (
        lambda: pf.apply_updates(PARAMS, NET),
        r"apply_updates: got a Sequential, .*use functional\(module\)",
    ),
    "functional twice": (
        lambda: pf.functional(APPLY),  # type: ignore[arg-type]
        "expected a torch.nn.Module, got the function apply; it takes a module, and gives apply, p",
    ),
    "functional of a class": (
        lambda: pf.functional(nn.Linear),  # type: ignore[arg-type]
        "got the class Linear, which is to be called",
    ),
    "a module for a mask": (
        lambda: pf.masked(CHAIN, NET),
        r"masked: got the module Sequential for the mask; weight_mask\(module\) is the mask",
    ),
    "a module for labels": (
        lambda: pf.partition({"x": CHAIN}, NET),
        r"partition: got the module Sequential for the labels, expected \{pattern: label\} such",
    ),
    "a mask before the transformation": (
        lambda: pf.masked(NET, CHAIN),  # type: ignore[arg-type]
        r"the transformation of masked\(transformation, mask\) is Sequential, expected a transf",
    ),
    "labels before transformations": (
        lambda: pf.partition({"*": "x"}, {"x": CHAIN}),  # type: ignore[dict-item]
        r"in partition\(transforms, labels\) the transformation of label '\*' is 'x', expected",
    ),
    # quantizers, granularities, maps
    "a quantizer's class": (
        lambda: pf.hard_prox(pf.lsbq),  # type: ignore[arg-type]
        r"expected a quantizer such as lsbq\(2\), got the class lsbq, which is to be called",
    ),
    "bits for a quantizer": (
        lambda: pf.hard_prox(2),  # type: ignore[arg-type]
        r"expected a quantizer such as lsbq\(2\), got 2",
    ),
    "a quantizer's class, centered": (
        lambda: pf.centered(pf.uniform),  # type: ignore[arg-type]
        r"expected a quantizer such as uniform\(4\), got the class uniform",
    ),
    "a quantizer's class, stored": (
        lambda: pf.stored(pf.uniform, torch.float16),  # type: ignore[arg-type]
        r"expected a quantizer such as uniform\(4\), got the class uniform",
    ),
    "a granularity's class": (
        lambda: prox(granularity=pf.per_channel),
        r"expected a granularity such as per_channel\(\), got the class per_channel",
    ),
    "a granularity's name": (
        lambda: prox(granularity="per_channel"),
        r"expected a granularity such as per_channel\(\), got 'per_channel'",
    ),
    "no bits": (lambda: pf.uniform(0), r"uniform: bits must lie in 1\.\.8, got 0"),
    "half a bit": (lambda: pf.lsbq(2.5), "bits must be a whole number, got 2.5"),  # type: ignore[arg-type]
    "bits in words": (lambda: pf.lsbq("2"), "bits must be a whole number, got '2'"),  # type: ignore[arg-type]
    "bits that are True": (lambda: pf.lsbq(True), "bits must be a whole number, got True"),
    "a quantizer for levels": (
        lambda: pf.proxmaps.hard(torch.ones(1, 2), pf.lsbq(1)),
        r"takes \(weights \[r, n\], levels \[r, k\]\) as tensors, got Tensor and lsbq\(1\)",
    ),
    "a module for weights": (
        lambda: pf.proxmaps.parq(NET, torch.ones(1, 2), 0.5),
        r"as tensors, got Sequential and Tensor",
    ),
    # schedules and numbers
    "an annealing that ends first": (
        lambda: prox(anneal_start=60),
        "anneal_start must come before anneal_end, got anneal_start=60, anneal_end=50",
    ),
    "a warmup beyond the annealing": (
        lambda: prox(warmup=100),
        "warmup must end before anneal_end, or nothing is annealed, got warmup=100, anneal_end=50",
    ),
    "a negative warmup": (lambda: prox(warmup=-1), "warmup must be 0 or more, got -1"),
    "no period": (lambda: prox(period=0), "period must be 1 or more, got 0"),
    "steps in words": (
        lambda: prox(anneal_end="50"),
        "anneal_end must be a number, a 0-d tensor, got '50'",
    ),
    "a number for a schedule": (
        lambda: schedules.warmup(0.1, 10),  # type: ignore[arg-type]
        r"warmup: expected a schedule such as constant\(0.1\), got 0.1",
    ),
    "a schedule's class": (
        lambda: schedules.join([schedules.constant, schedules.constant(1.0)], [5]),  # type: ignore[list-item]
        r"join: expected schedules such as constant\(0.1\), got the class constant",
    ),
    "boundaries that fall": (
        lambda: schedules.piecewise([1, 2, 3], [5, 2]),
        r"piecewise: boundaries must increase, got \(5, 2\)",
    ),
    "no learning rate": (
        lambda: pf.adamw(None),  # type: ignore[arg-type]
        "adamw: learning_rate must be a number, a 0-d tensor or a schedule, got None",
    ),
    "a learning rate in words": (
        lambda: pf.sgd("0.1"),  # type: ignore[arg-type]
        "sgd: learning_rate must be a number, .*got '0.1'",
    ),
    "parameters for a learning rate": (
        lambda: pf.sgd(NET.parameters()),  # type: ignore[arg-type]
        "sgd: learning_rate must be a number, .*got generator",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake: str) -> None:
    call, message = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError, FileNotFoundError)) as caught:
        call()
    told = str(caught.value)
    assert re.search(message, told), told
    assert "\n" not in told


#: Options that are on or off, by what takes them.
SWITCHES: dict[str, Callable[[Any], Any]] = {
    "nesterov": lambda got: pf.sgd(0.1, 0.9, nesterov=got),
    "amsgrad": lambda got: pf.adamw(0.1, amsgrad=got),
    "center": lambda got: pf.uniform(2, center=got),
    "symmetric": lambda got: pf.lloyd_max(2, symmetric=got),
    "shrink": lambda got: prox(shrink=got, learning_rate=0.1),
    "clipped_start": lambda got: prox(clipped_start=got),
    "has_aux": lambda got: pf.value_and_grad(lambda w: w["a"].sum(), CHAIN, has_aux=got),
    "compile": lambda got: QuantOptimizer(SGD, compile=got),
    "snap": lambda got: export.pack(NET, OPTIMIZER, snap=got),
    "rounded": lambda got: to_gguf({}, "file", rounded=got),
    "int8_activations": lambda got: to_torchao(NET, {}, int8_activations=got),
    "fuse": lambda got: to_onnx(NET, {}, (), "file", fuse=got),
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("got", ["no", 1, None])
def test_a_switch_takes_true_and_false_alone(name: str, got: Any) -> None:
    with pytest.raises(TypeError, match=rf"\w+: {name} must be True or False, got {got!r}"):
        SWITCHES[name](got)
