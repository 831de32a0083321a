"""Tokens of a language model by generate(), one sequence at a time: packed, in float32, in bfloat16
and in torchao's integers. A Llama of some 110 million random weights, whose head is its embedding.

Where the time of a token goes is by a clock around each linear layer, and around attention, whose
linear layers are taken out; the rest is norms, activations, the cache and Python.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import nn

import parq_fn as pf
from parq_fn.export import pack_weight, product, quantized
from tests.benchmarks.measure import ratio
from tests.benchmarks.report import Found

SIZES: dict[str, dict[str, int]] = {
    "full": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 512,
    },
}
PACKED = {
    "packed, 1 bit": (pf.lsbq(1), 0),
    "packed, ternary": (pf.lsbq(0), 0),
    "packed, 2 bits, even": (pf.uniform(2), 0),
    "packed, 2 bits, even, blocks of 32": (pf.uniform(2), 32),
    "packed, 2 bits, lsbq": (pf.lsbq(2), 0),
    "packed, 4 bits, even": (pf.uniform(4), 0),
}
#: Least of the speed of float32's linear layers.
LIMITS = dict.fromkeys(["packed, 2 bits, even", "packed, ternary"], 2.5)
_TOKENS = {"full": 32, "tiny": 4}


def run(size: str, repeats: int) -> Iterator[Found]:
    """Tokens a second, their ratio to float32's, that of the linear layers alone, and shares."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        warnings.warn("generation: not measured, for it needs transformers", stacklevel=2)
        return
    torch.manual_seed(0)
    more: Any = {"max_position_embeddings": 256, "tie_word_embeddings": True}
    config = LlamaConfig(**SIZES[size], **more, bos_token_id=None, eos_token_id=None)
    plain = LlamaForCausalLM(config).eval()
    before = torch.get_num_threads()
    uncompiled = {"compiled": lambda formula, options, dynamic: formula, "_PROGRAMS": {}}
    with mock.patch.multiple(product, **(uncompiled if size == "tiny" else {})):
        try:
            for threads in (1,) if size == "tiny" else sorted({1, before}):
                torch.set_num_threads(threads)
                yield from _all(plain, size, threads, max(repeats, 3))
        finally:
            torch.set_num_threads(before)


def _all(plain: Any, size: str, threads: int, repeats: int) -> Iterator[Found]:
    wanted = None
    for name, make in kinds().items():
        try:
            model = make(plain)
        except Exception as error:  # what torchao cannot do on this machine is said
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:80]
            yield Found("generation", f"{name}: {reason}", "not measured", float("nan"))
            continue
        runs = [_generate(model, _TOKENS[size]) for _ in range(repeats + 1)][1:]
        wanted = wanted or runs
        case = f"{name}, {threads} thread{'s' * (threads > 1)}"
        count = _TOKENS[size]
        yield Found("generation", case, "tokens a second", count / median(r[0] for r in runs))
        for part, what in enumerate(("all", "linear layers", "attention")):
            if what != "attention":
                value, spread = ratio([r[part] for r in wanted], [r[part] for r in runs])
                least = LIMITS.get(name) if what == "linear layers" else None
                text = f"{what}, speed over float32's"
                yield Found("generation", case, text, value, spread, least, at_most=False)
            if part:
                share = median(r[part] / r[0] for r in runs)
                yield Found("generation", case, f"{what}, share of the time", share)


def kinds() -> dict[str, Callable[[Any], Any]]:
    """What makes each kind of model of a plain one."""

    def of_int8(model: Any) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(own := copy.deepcopy(model), Int8WeightOnlyConfig())
        return own

    def of_int4(model: Any) -> Any:  # torchao's form for processors, in bfloat16 alone
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        own = copy.deepcopy(model).to(torch.bfloat16)
        quantize_(own, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
        return own

    found: dict[str, Callable[[Any], Any]] = {
        "float32": copy.deepcopy,
        "bfloat16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
        "torchao, int8": of_int8,
        "torchao, int4": of_int4,
    }
    for name, (quantizer, block) in PACKED.items():
        found[name] = lambda model, q=quantizer, b=block: packed(model, q, b)
    return found


def packed(model: Any, quantizer: pf.Quantizer, block: int) -> Any:
    """The model with all linear layers packed, its head and embedding too."""
    entries: dict[str, Any] = dict(copy.deepcopy(model).named_parameters())
    for name, p in entries.items():
        if p.dim() == 2:
            rows = p.detach().reshape((-1, block) if block else p.shape)
            levels = quantizer(rows)
            on_levels = pf.proxmaps.hard(rows, levels).reshape(p.shape)
            entries[name] = pack_weight(on_levels, levels, name=name)
    return quantized(copy.deepcopy(model), entries)


def _generate(model: Any, count: int) -> tuple[float, float, float]:
    """Seconds of so many tokens: all, those of linear layers, those of attention without them."""
    start = torch.arange(8).unsqueeze(0)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    attention = [m for n, m in model.named_modules() if n.endswith("self_attn")]
    inside = [m for one in attention for m in one.modules() if isinstance(m, nn.Linear)]
    with (
        torch.no_grad(),
        timed(linear) as of_linear,
        timed(inside) as of_inside,
        timed(attention) as of_attention,
    ):
        begin = time.perf_counter()
        made = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=count, do_sample=False
        )
        whole = time.perf_counter() - begin
    assert made.shape == (1, 8 + count)
    return whole, of_linear[0], of_attention[0] - of_inside[0]


@contextmanager
def timed(modules: Sequence[nn.Module]) -> Iterator[list[float]]:
    """The seconds that calls of these modules take, in a list of one."""
    total, begun = [0.0], {}

    def before(module: nn.Module, *args: Any) -> None:
        begun[module] = time.perf_counter()

    def after(module: nn.Module, *args: Any) -> None:
        total[0] += time.perf_counter() - begun[module]

    hooks = [m.register_forward_pre_hook(before) for m in modules]
    hooks += [m.register_forward_hook(after) for m in modules]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()
