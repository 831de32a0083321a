"""How the recipe quantizes: a quantizer for each number of bits, and the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import parq_fn as pq
from parq_fn.foundation.command import UserError
from parq_fn.optim import QuantOptimizer, param_groups
from parq_fn.roles import EMBEDDING, roles

FULL = 16  # bits of what is not quantized


def quantizer_of(bits: int) -> pq.Quantizer:
    """Evenly spaced levels with scales of float16, which servers' formats hold; 0 bits are ternary.

    >>> quantizer_of(2), quantizer_of(4)
    (stored(uniform(2), torch.float16), stored(integer(4), torch.float16))
    """
    if bits > 2:
        return pq.stored(pq.integer(bits), torch.float16)
    return pq.stored(pq.uniform(bits) if bits else pq.ternary_uniform(), torch.float16)


def link_of(bits: int, block: int, span: tuple[int, int]) -> pq.Prox:
    """PARQ that anneals between these steps.

    block: weights that have a scale in common; 0 for a row's.
    """
    rows = pq.per_block(block) if block else pq.per_channel()
    start, end = span
    return pq.parq_prox(quantizer_of(bits), anneal_start=start, anneal_end=end, granularity=rows)


def span_of(args: Any) -> tuple[int, int]:
    """The steps at which annealing starts and ends, the end before the last step."""
    start, end = (round(share * args.steps) for share in (args.anneal_start, args.anneal_end))
    end = max(1, min(max(end, start + 1), args.steps - 1))
    return min(start, end - 1), end


def optimizer_of(model: nn.Module, bits: int, args: Any, rate: float) -> torch.optim.Optimizer:
    """AdamW, around it the quantization where there are fewer than 16 bits.

    Embeddings and a head that is none of them have `args.embedding_bits`, by row.
    Raises UserError for rows that blocks of that size do not divide.
    """
    options: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.95)}
    decay = args.weight_decay
    if bits == FULL:
        return torch.optim.AdamW(param_groups(model, {"*": None}, weight_decay=decay), **options)
    span = span_of(args)
    tables = None
    if args.embedding_bits < FULL:
        tables = link_of(args.embedding_bits, 0, span)
    rules: dict[str, Any] = dict.fromkeys(names_of_tables(model), tables)
    groups = param_groups(model, {**rules, "*": bits}, weight_decay=decay)
    base = torch.optim.AdamW(groups, **options)
    try:
        return QuantOptimizer(
            base, link_of(bits, args.block_size, span), compile=args.torch_compile
        )
    except ValueError as error:
        raise UserError(f"--block-size {args.block_size} (0 is a row): {error}") from None


def names_of_tables(model: Any) -> list[str]:
    """The weights of embeddings, and that of the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    own = id(getattr(head, "weight", None))
    return [
        role.name for role in roles(model) if role.kind == EMBEDDING or id(role.parameter) == own
    ]
