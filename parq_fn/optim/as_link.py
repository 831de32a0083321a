"""A torch.optim optimizer as a link."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam

from parq_fn.foundation.scalar import Scalar, at, new_count
from parq_fn.foundation.torch_private import in_function_transform, not_traced
from parq_fn.foundation.traits import PER_LEAF, TransformationTraits
from parq_fn.foundation.tree import (
    Masked,
    PyTree,
    check_floating,
    check_match,
    columns_of,
    names_of,
    tree_map,
    values_of,
)
from parq_fn.foundation.value import briefly, show, state_class, value
from parq_fn.transforms.train import increment
from parq_fn.transforms.transformation import Link, check_state

#: A scalar, or one for each leaf's name, None where it is the link's.
_Given = Scalar | Mapping[str, Scalar | None] | None


@state_class
class OptimizerState(NamedTuple):
    """State of `as_link`."""

    calls: Tensor  # [], int64: updates so far
    updates: PyTree  # [] for each param, int64: the optimizer's steps on it
    entries: dict[str, PyTree]  # the optimizer's state by its keys, each a tree like params with
    #   `Masked()` for those that have no such entry; zeros before a parameter's first step


@value
class OptimizerLink(Link):
    """See `as_link`."""

    optimizer: type[Optimizer]
    learning_rate: Scalar | None
    weight_decay: Scalar | None
    others: tuple[tuple[str, Any], ...]

    rates = (1, 1)

    def __post_init__(self) -> None:
        kind: Any = self.optimizer
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            hint = (
                "; give its class, and the hyperparameters" if isinstance(kind, Optimizer) else ""
            )
            raise TypeError(
                f"as_link: expected a class of torch.optim such as AdamW, got {briefly(kind)}{hint}"
            )
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"as_link: {kind.__name__} takes a closure, which it calls to measure the loss "
                "anew, and an update has gradients alone; give an optimizer that steps without"
            )
        if issubclass(kind, SparseAdam):
            raise ValueError("as_link: SparseAdam takes sparse gradients, give Adam or AdamW")
        self._built([torch.zeros(1, 1)], [{}], new_count())

    def __repr__(self) -> str:
        given = {"lr": self.learning_rate, "weight_decay": self.weight_decay, **dict(self.others)}
        shown = [f"{key}={show(got)}" for key, got in given.items() if got is not None]
        return f"as_link({', '.join([self.optimizer.__name__, *shown])})"

    @property
    def traits(self) -> TransformationTraits:
        """Of torch's optimizers, that a leaf is treated alike whatever others there are."""
        alone = self.optimizer.__module__.startswith("torch.optim.")
        return replace(PER_LEAF, leafwise=alone, batches=False)

    def _built(
        self, params: list[Tensor], given: list[dict[str, Scalar]], calls: Tensor
    ) -> Optimizer:
        """The optimizer with a group for each of the params; given: what each overrides."""
        own = {"lr": self.learning_rate, "weight_decay": self.weight_decay, **dict(self.others)}
        kept = {key: _plain(got, calls) for key, got in own.items() if got is not None}
        groups = [
            {"params": [p], **{key: _plain(got, calls) for key, got in more.items()}}
            for p, more in zip(params, given, strict=True)
        ]
        kind: Any = self.optimizer
        made: Optimizer = kind(groups, **kept)
        return made

    def _first(self, leaf: Tensor, name: str) -> dict[str, Tensor]:
        """The entries of the optimizer after a step on such a parameter, all zeros."""
        stand_in = torch.zeros_like(leaf).requires_grad_()
        stand_in.grad = torch.ones_like(leaf)
        try:
            optimizer = self._built([stand_in], [{}], new_count())
            with torch.random.fork_rng(devices=[]):
                optimizer.step()
        except Exception as error:
            raise ValueError(
                f"{self!r}: parameter {name!r} cannot be stepped: {type(error).__name__}: {error}"
            ) from error
        entries = {k: got for k, got in optimizer.state[stand_in].items() if got is not None}
        for key, got in entries.items():
            if not isinstance(got, Tensor):
                raise ValueError(
                    f"{self!r}: the optimizer keeps {key!r} of parameter {name!r} as a "
                    f"{type(got).__name__}, and a state holds tensors; give the optimizer to "
                    "parq_fn.optim.QuantOptimizer"
                )
        return {key: torch.zeros_like(got) for key, got in entries.items()}

    @not_traced
    def init(self, params: PyTree) -> OptimizerState:
        """Zeros for what the optimizer will keep."""
        check_floating(params, repr(self))
        leaves, spec = optree.tree_flatten(params)
        self._refuse_transformed()
        named = zip(leaves, names_of(params), strict=True)
        found = [self._first(leaf, name) for leaf, name in named]
        keys = sorted({key for entries in found for key in entries})
        entries: dict[str, PyTree] = {
            key: optree.tree_unflatten(spec, [own.get(key, Masked()) for own in found])
            for key in keys
        }
        return OptimizerState(new_count(), tree_map(lambda _: new_count(), params), entries)

    def _refuse_transformed(self) -> None:
        if in_function_transform():
            raise RuntimeError(
                f"{self!r} runs torch's optimizer on the host, and not under torch.vmap, "
                "torch.func.grad or a tracer; take sgd, adam, adamw, lion or muon there"
            )

    @not_traced
    def update(
        self,
        updates: PyTree,
        state: OptimizerState,
        params: PyTree,
        *,
        learning_rate: _Given = None,
        weight_decay: _Given = None,
        **extra: Any,
    ) -> tuple[PyTree, OptimizerState]:
        """What the optimizer's step adds to copies of the params."""
        del extra
        check_state(self, state, OptimizerState)
        check_match(updates, params, repr(self))
        keys = list(state.entries)
        spec, leaves, grads, counts, *columns = columns_of(
            params, updates, state.updates, *state.entries.values()
        )
        self._refuse_transformed()
        olds = [
            {key: got for key, got in zip(keys, row, strict=True) if isinstance(got, Tensor)}
            for row in zip(*columns, strict=True)
        ] or [{} for _ in leaves]
        given = self._given(params, lr=learning_rate, weight_decay=weight_decay)
        moved = [i for i, grad in enumerate(grads) if grad is not None]
        stepped = {i: leaves[i].detach().clone().requires_grad_() for i in moved}
        if moved:
            chosen = [given[i] for i in moved]
            optimizer = self._built(list(stepped.values()), chosen, state.calls)
            for i, p in stepped.items():
                p.grad = grads[i].detach().to(p.dtype, copy=True)
                if int(counts[i]):
                    optimizer.state[p] = {key: got.clone() for key, got in olds[i].items()}
            optimizer.step()
        news, out = list(olds), list(grads)
        for i, p in stepped.items():
            news[i] = self._kept(olds[i], optimizer.state[p], names_of(params)[i])
            out[i] = increment(leaves[i].detach(), p.detach())
        counts = [c + 1 if i in stepped else c for i, c in enumerate(counts)]
        entries: dict[str, PyTree] = {
            key: optree.tree_unflatten(spec, [own.get(key, Masked()) for own in news])
            for key in keys
        }
        taken = optree.tree_unflatten(spec, counts)
        return optree.tree_unflatten(spec, out), OptimizerState(state.calls + 1, taken, entries)

    def _given(self, params: PyTree, **given: _Given) -> list[dict[str, Scalar]]:
        """Of each leaf: what it overrides of the optimizer's groups, where that has it."""
        found: list[dict[str, Scalar]] = [{} for _ in names_of(params)]
        own = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        for key, got in given.items():
            if own[key] is None:
                continue
            each = values_of(got, params) if isinstance(got, Mapping) else [got] * len(found)
            for one, more in zip(each, found, strict=True):
                if one is not None:
                    more[key] = one
        return found

    def _kept(self, old: dict[str, Tensor], new: dict[str, Any], name: str) -> dict[str, Tensor]:
        """The optimizer's entries after its step, in the places that there are."""
        found = {key: got for key, got in new.items() if got is not None}
        for key, got in found.items():
            known = old.get(key)
            if known is None or not isinstance(got, Tensor) or got.shape != known.shape:
                raise ValueError(
                    f"{self!r}: the optimizer keeps {key!r} of parameter {name!r} in another form "
                    "than after its first step, and a state keeps its form; give the optimizer to "
                    "parq_fn.optim.QuantOptimizer"
                )
        return {**old, **{key: got.to(old[key].dtype) for key, got in found.items()}}


def _plain(got: Any, calls: Tensor) -> Any:
    """A hyperparameter as torch's optimizers take it: schedules and 0-d tensors as numbers."""
    scheduled = callable(got) and not isinstance(got, type)
    tensor = isinstance(got, Tensor) and got.dim() == 0
    return float(at(got, calls)) if scheduled or tensor else got


def as_link(optimizer: type[Optimizer], **hyperparameters: Any) -> OptimizerLink:
    """A torch.optim optimizer as a link: updates are what its step adds to copies of the params.

        p + update = p after optimizer.step(), bit for bit where a float is what must be added

    (which is so of every weight that no more than doubles or halves in a step; others may be off by
    the last place), and the state is the optimizer's, which gets it back from a parameter's second
    update on. Updates are made on the host: not under vmap, grad or a compiler.

    optimizer: the class. It may not take a closure (LBFGS does), nor sparse gradients.
    hyperparameters: as it takes them; 0-d tensors, and schedules of the count of updates so far,
        are given to it as numbers. The extra arguments `learning_rate` and `weight_decay` of
        `update` override them, for all leaves or by name.

    Raises TypeError for what is no class of optimizers, ValueError for one that cannot be a link,
    and as the optimizer does.

    >>> import torch
    >>> from parq_fn import apply_updates, as_link
    >>> link, params = as_link(torch.optim.Adagrad, lr=0.25), {"w": torch.ones(2)}
    >>> updates, state = link.update({"w": torch.ones(2)}, link.init(params), params)
    >>> apply_updates(params, updates), list(state.entries)
    ({'w': tensor([0.7500, 0.7500])}, ['step', 'sum'])
    """
    kind: Any = optimizer
    defaults: dict[str, Any] = {}
    if isinstance(kind, type) and issubclass(kind, Optimizer):
        known = inspect.signature(kind.__init__).parameters
        defaults = {key: known[key].default for key in ("lr", "weight_decay") if key in known}
    own = {**defaults, **hyperparameters}
    missing = [key for key in defaults if own[key] is inspect.Parameter.empty]
    if missing:
        raise TypeError(f"as_link: {kind.__name__} has no default for {missing[0]}; give one")
    rate, decay = own.pop("lr", None), own.pop("weight_decay", None)
    return OptimizerLink(kind, rate, decay, tuple(own.items()))
