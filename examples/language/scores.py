"""How well a model predicts text: the mean cross entropy of the next token."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.language.text import Text, sequences, windows
from examples.recipe.parallel import World, reshard


class Score(NamedTuple):
    """Of the test text."""

    nats: float  # a token
    perplexity: float  # exp(nats)
    bits_per_byte: float  # nats / log 2 over the bytes that a token stands for


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """[sequences, context, vocabulary], float32, of tokens [sequences, context]."""
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found.float()


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross entropy, in nats, of the tokens [sequences, context + 1] but the first."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def score(model: Any, text: Text, args: Any, world: World, stopping: Any = None) -> Score:
    """Over all processes, each of which has its part of the windows.

    stopping: called before each batch; raises where the run was told to stop.
    """
    count = min(windows(text.test, args.context), max(1, args.eval_tokens // args.context))
    each = max(1, args.batch_size // world.size)
    mine = list(range(world.rank, count, world.size))
    turns = math.ceil(math.ceil(count / world.size) / each)  # as many on every process
    sums = torch.zeros(2, dtype=torch.float64)
    was = model.training
    model.eval()
    try:
        for i in range(turns):
            if stopping is not None:
                stopping()
            own = mine[i * each : (i + 1) * each]
            tokens = sequences(text.test, args.context, own or [0]).to(world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=args.amp):
                logits = logits_of(model, tokens[:, :-1])
            loss = loss_of(logits, tokens)
            sums += torch.tensor([float(loss) * len(own), len(own)], dtype=torch.float64)
    finally:
        model.train(was)
        reshard(model)
    total, parts = world.total(*sums.tolist())
    nats = total / parts
    perplexity = math.exp(min(nats, 700.0))
    return Score(nats, perplexity, nats / math.log(2) / text.bytes_per_token)
