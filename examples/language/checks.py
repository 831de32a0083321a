"""Whether a model can be trained and write as the flags say, asked before hours of work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.language.quantization import optimizer_of
from examples.language.scores import logits_of
from parq_fn.foundation.command import UserError


def check(model: Any, args: Any, tokenizer: Any) -> bool:
    """Raises UserError for a model that the tokenizer or the flags do not fit, or that sees the
    tokens that it is to predict. Leaves it as it is."""
    rows, named = model.get_input_embeddings().weight.shape[0], args.model or args.from_config
    if len(tokenizer) > rows:
        raise UserError(
            f"{named} has {rows} tokens and its tokenizer {len(tokenizer)}; give its own by "
            "--tokenizer"
        )
    positions = positions_of(model)
    if args.context > positions:
        raise UserError(f"{named} has {positions} positions, less than --context {args.context}")
    if args.new_tokens and not 0 < prompt_of(args, tokenizer).shape[1] < positions:
        raise UserError(
            f"--prompt {args.prompt!r} has no tokens, or more than the {positions} positions of "
            "the model; --new-tokens 0 needs none"
        )
    for bits in args.bits:
        optimizer_of(model, bits, args, args.lr)
    if args.context > 1 and _sees_ahead(model):
        raise UserError(
            f"{named} ({type(model).__name__}) predicts a token from those after it; the recipe "
            "trains models that write from left to right"
        )
    return True


def positions_of(model: Any) -> int:
    """How many tokens the model takes, at most."""
    most = getattr(model.config, "max_position_embeddings", None)
    return most if isinstance(most, int) else 2**31


def prompt_of(args: Any, tokenizer: Any) -> Tensor:
    """[1, tokens]: what the packed model goes on from."""
    made = tokenizer([args.prompt], add_special_tokens=False)["input_ids"]
    return torch.tensor(made, dtype=torch.int64)


def continued(model: Any, args: Any, tokenizer: Any) -> str:
    """The prompt, and what the model adds to it, by the likeliest token each time; of its tokens
    those that the tokenizer has."""
    ids = prompt_of(args, tokenizer)
    made = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(args.new_tokens, positions_of(model) - ids.shape[1]),
        do_sample=False,
    )
    known = made[0][made[0] < len(tokenizer)]
    return str(tokenizer.decode(known, skip_special_tokens=True))


def _sees_ahead(model: Any) -> bool:
    """Whether the prediction after the first token depends on the second: where it does not, the
    gradient is 0."""
    found: list[Tensor] = []

    def keep(layer: Any, given: Any, out: Tensor) -> Tensor:
        found.append(out.detach().requires_grad_())
        return found[-1]

    was, handle = model.training, model.get_input_embeddings().register_forward_hook(keep)
    try:
        first = logits_of(model.eval(), torch.tensor([[2, 3]]))[0, 0]
    finally:
        handle.remove()
        model.train(was)
    (gradient,) = torch.autograd.grad(first.square().sum(), found[0])
    return bool(gradient[0, 1].any())
