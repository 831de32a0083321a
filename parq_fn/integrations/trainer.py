"""Quantized training under the Trainer of transformers: what is logged, evaluated and refused."""

from __future__ import annotations

import math
from typing import Any

try:
    from transformers import Trainer, TrainerCallback
except ImportError:
    raise ImportError(
        "parq_fn.integrations.trainer needs transformers: pip install transformers"
    ) from None

from parq_fn.foundation.checks import readable
from parq_fn.foundation.value import briefly, check_flags
from parq_fn.optim.flip_counter import FlipCounter
from parq_fn.optim.on_levels import share_on_levels
from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.quantized_parameters import Quantized, quantized_parameters
from parq_fn.optim.transformed import TransformOptimizer

_WHO = "QuantCallback"


class QuantCallback(TrainerCallback):  # type: ignore[misc] # of no known type
    """Logs how far a quantized training is, and refuses what annealing makes meaningless.

    At each log of the loss one more is written, with

        inverse_slope     the map's coefficient; inverse_slope_0, ... where links differ in it
        share_on_levels   see `share_on_levels`
        flips             the share of weights that changed their level since the last log, see
                          `FlipCounter`

    and a best model is refused that could be one of before the annealing's end: its weights are
    on no levels, and the metric, which mostly gets worse as weights are rounded, would choose it.

    trainer: that it is added to, `trainer.add_callback(QuantCallback(trainer))`, with a
        QuantOptimizer or a TransformOptimizer for its optimizer.
    rounded: whether each evaluation in training is followed by one at the nearest levels, as if
        the annealing ended there; its metrics are "eval_rounded_loss", ... Weights are as before
        after it.
    flips: whether flips are counted, which keeps a byte for each quantized weight.

    As training begins it raises TypeError for another optimizer, and ValueError where none of its
    weights are quantized. For `load_best_model_at_end` and `save_strategy="best"` it raises
    ValueError before an evaluation that comes too early, as training begins where that is known
    then: with `eval_strategy="steps"`.
    """

    def __init__(self, trainer: Trainer, *, rounded: bool = False, flips: bool = False) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"{_WHO}: expected a Trainer of transformers, got {briefly(trainer)}")
        check_flags(_WHO, rounded=rounded, flips=flips)
        self.trainer, self.rounded, self.flips = trainer, rounded, flips
        self._optimizer: QuantOptimizer | TransformOptimizer | None = None
        self._counter: FlipCounter | None = None
        self._is_rounded = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the optimizer, and checks what is known of evaluations."""
        optimizer = kwargs["optimizer"]
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # that accelerate has wrapped
        if not quantized_parameters(_WHO, self._optimizer):
            raise ValueError(f"{_WHO}: the optimizer quantizes no weights")
        self._counter = FlipCounter(self._optimizer) if self.flips else None
        if args.eval_strategy == "steps":
            every, after = state.eval_steps, max(state.global_step, math.ceil(args.eval_delay) - 1)
            first = min((after // every + 1) * every, state.max_steps)
            self._check_best(args, state.global_step, int(first))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses a best model of before the annealing's end."""
        if control.should_evaluate:
            self._check_best(args, state.global_step, state.global_step)

    on_epoch_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Logs how far the training is, after the loss."""
        if self._optimizer is not None and "loss" in logs:
            found = _slopes(quantized_parameters(_WHO, self._optimizer))
            found["share_on_levels"] = share_on_levels(self._optimizer)
            if self._counter is not None:
                found["flips"] = self._counter()
            self.trainer.log(found)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Evaluates at the nearest levels, too."""
        if not self.rounded or self._is_rounded or self._optimizer is None:
            return
        end = "_runtime"
        prefix = min((key[: -len(end)] for key in metrics if key.endswith(end)), key=len)
        name = prefix.removeprefix("eval").removeprefix("_")  # of several data sets
        self._is_rounded = True
        try:
            with self._optimizer.rounded():
                prefix = "_".join(filter(None, ["eval_rounded", name]))
                metrics |= self.trainer.evaluate(name or None, metric_key_prefix=prefix)
        finally:
            self._is_rounded = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the optimizer go: what is evaluated later is evaluated once."""
        self._optimizer = self._counter = None

    def _check_best(self, args: Any, step: int, at: int) -> None:
        """Raises ValueError where a best model may be chosen at a step before all is annealed."""
        best = args.load_best_model_at_end or args.save_strategy == "best"
        if not best or self._optimizer is None:
            return
        for one in quantized_parameters(_WHO, self._optimizer):
            end = None if one.link.ends is None else readable(one.link.ends)
            ready = math.inf if end is None else step + end + 1 - int(one.state.count)
            if ready <= at or not one.parameter.requires_grad:
                continue
            when = (
                f"is mapped by {one.link!r}, of which no end is known"
                if end is None
                else f"has its weights on levels from step {ready:g} on"
            )
            raise ValueError(
                f"{_WHO}: the evaluation at step {at} would choose a best model, and parameter "
                f"{one.name!r} {when}; the metric favours weights of before that. Set eval_delay "
                "so that evaluations begin then, or load_best_model_at_end=False and another "
                'save_strategy than "best"'
            )


def _slopes(quantized: list[Quantized]) -> dict[str, float]:
    """{"inverse_slope": that of all}, or where links differ in it with the number of each."""
    links: list[Any] = []
    slopes: list[float] = []
    for one in quantized:
        if one.link not in links:
            links.append(one.link)
            slopes.append(float(one.state.slope))
    if len({*slopes}) == 1:
        return {"inverse_slope": slopes[0]}
    return {f"inverse_slope_{i}": slope for i, slope in enumerate(slopes)}
