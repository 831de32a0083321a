"""The prox links of parameter groups as one link of a chain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from parq_fn.foundation.tree import ByName
from parq_fn.foundation.value import briefly
from parq_fn.optim.groups import check_group, is_quantized, link_of
from parq_fn.optim.state import Group
from parq_fn.transforms.partition import partition
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.transformation import Transformation, identity

_WHO = "prox_partition"


def prox_partition(groups: Iterable[Group], prox: Prox | None = None) -> partition:
    """The `partition` that maps every parameter as `QuantOptimizer(base(groups), prox)` does: the
    same bits, blocks and axes, as the last link of a chain.

    groups: such as `param_groups(module, rules)` makes, of (name, parameter) pairs. Of the keys of
        a group "prox" and those that begin with "quant_" count here; learning rates and weight
        decays are those of the chain's other links.
    prox: the link of groups that have "quant_bits" and none of their own.

    Labels are the numbers of the groups, "0", "1", ...; they name every parameter, frozen ones
    too, so that the params of `functional` and those of `TransformOptimizer` fit alike.

    Raises ValueError for groups without names, where nothing is quantized, and as `QuantOptimizer`
    does for what groups say; TypeError for what is no prox link.

    >>> from torch import nn
    >>> from parq_fn import adamw, chain, functional, hard_prox, integer, lsbq, per_channel
    >>> from parq_fn.optim import param_groups, prox_partition
    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    >>> groups = param_groups(net, {"0": hard_prox(integer(4), granularity=per_channel()), "1": 2})
    >>> link = prox_partition(groups, hard_prox(lsbq(3)))
    >>> link.transforms["1"]
    hard_prox(lsbq(2))
    >>> state = chain(adamw(1e-3), link).init(functional(net)[1])
    """
    if prox is not None and not isinstance(prox, Prox):
        raise TypeError(
            f"{_WHO}: expected a prox link such as parq_prox(lsbq(2), ...), got {briefly(prox)}"
        )
    transforms: dict[str, Transformation] = {}
    labels: dict[str, str] = {}
    for index, group in enumerate(groups):
        check_group({"lr": None, **group}, index, prox, {}, _WHO)
        label, named = str(index), _named(group, index)
        labels |= dict.fromkeys(named, label)
        transforms[label] = identity()
        own = group.get("prox")
        shown = {} if own is None else {"quant_prox": own}
        if is_quantized({**group, **shown}):
            link: Any = prox if own is None else own
            transforms[label] = link_of(link, {**group, "params": [*named.values()]}, _WHO)
    if not any(isinstance(link, Prox) for link in transforms.values()):
        raise ValueError(
            f"{_WHO}: no group is quantized; give one a prox link, or quant_bits below 16, as "
            "param_groups(module, rules) does"
        )
    return partition(transforms, ByName(labels))


def _named(group: Group, index: int) -> dict[str, Any]:
    pairs = [pair if isinstance(pair, tuple) else () for pair in group["params"]]
    if not all(len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ValueError(
            f"{_WHO}: group {index} has parameters without names; expected (name, parameter) "
            "pairs, as those of module.named_parameters()"
        )
    return dict(pairs)
