"""Parameter groups of a module by rules: which of its parameters are quantized, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from parq_fn.foundation.checks import NOT_NEGATIVE, check_numbers
from parq_fn.foundation.tree import matches
from parq_fn.foundation.value import briefly
from parq_fn.modules import check_module
from parq_fn.optim.groups import check_bits, cut_of
from parq_fn.optim.state import Group
from parq_fn.roles import BIAS, NORM, QUANTIZABLE, Role, check_dtype, check_outputs, roles
from parq_fn.transforms.prox_link import Prox

Pattern = str | re.Pattern[str]


class ParamGroups(list[Group]):
    """Groups for a torch.optim optimizer; prints as the table of `parq_fn.coverage`."""

    def __init__(self, groups: list[Group], module: nn.Module) -> None:
        super().__init__(groups)
        self._module = module

    def __str__(self) -> str:
        from parq_fn.covered import coverage  # which packs for its sizes

        return str(coverage(self._module, list(self)))

    __repr__ = __str__


def param_groups(
    module: nn.Module,
    rules: Mapping[Pattern, int | Prox | None] | None = None,
    *,
    weight_decay: float | None = None,
) -> ParamGroups:
    """Groups of (name, parameter) pairs for a base optimizer, which hold every parameter of the
    module once: those that a rule takes, with its bits or prox link, and the others.

    module: a torch.nn.Module.
    rules: {pattern: bits, a prox link, or None for full precision}; {"*": 2} where none are given.
        A string is a shell pattern for a parameter's name or for one of its parents, as in
        `weight_mask` ("lm_head", "*.mlp"), several parted by "|"; a compiled regular expression is
        searched for. The first rule that matches wins. A pattern chooses among what can be
        quantized: matrices and kernels of layers, experts, embeddings. A name in full takes that
        parameter whatever it is, if it is floating. What no rule takes stays in full precision.
    weight_decay: of all but norms, biases and other parameters of one dimension, which get 0; by
        default the base optimizer's own.

    Bits are for the prox link that `QuantOptimizer` is given. Groups carry "quant_axis", the
    dimensions whose index is the output, where it is not the first alone: in transposed layers,
    transformers' Conv1D and experts; levels are then by output, or by block of each. Tied
    parameters appear once. The result prints as the table of `coverage`.

    Raises TypeError for what is no module, pattern, bits or prox link, and for a name in full of a
    parameter to quantize that is not floating; ValueError for a weight decay below 0, for bits that
    there are none of, for blocks that do not divide a weight, for a part of a pattern that matches
    nothing, for a rule that takes nothing, or only what an earlier one took, and for a transposed
    convolution with groups, whose outputs are no dimensions of its weight, but for depthwise ones.

    >>> from parq_fn import lsbq, per_channel, parq_prox
    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> param_groups(net, {"0": 4, "*": 2})
    parameter  count  shape   weights  how               bytes
    0.weight          [9, 4]       36  4 bits                ?
    1.weight          [8, 4]       32  2 bits                ?
    1.bias            [8]           8  bias                 32
    2.weight          [8]           8  norm                 32
    2.bias            [8]           8  norm                 32
    3.weight          [2, 8]       16  2 bits                ?
    3.bias            [2]           2  bias                  8
    all            7              110  76.4 % quantized      ?
    """
    check_module("param_groups", module, "groups of parameters")
    if weight_decay is not None:
        check_numbers("param_groups", NOT_NEGATIVE, weight_decay=weight_decay)
    rules = {"*": 2} if rules is None else rules
    _check_rules(rules)
    found = roles(module)
    taken = _taken(found, rules)
    groups: dict[Any, Group] = {}
    for role in found:
        pattern = taken.get(role.name)
        how = None if pattern is None else rules[pattern]
        if pattern is not None and how is not None:
            check_dtype(f"param_groups: rule {_shown(pattern)}", role)
            check_outputs(f"param_groups: rule {_shown(pattern)}", role)
        undecayed = role.kind in (NORM, BIAS) or role.parameter.dim() < 2
        axis = role.axis if how is not None and role.axis != (0,) else None
        rank = role.parameter.dim() if axis else None
        key = pattern if how is not None else None, undecayed, axis, rank
        group = groups.setdefault(key, {"params": []})
        group["params"].append((role.name, role.parameter))
        if isinstance(how, Prox):
            try:
                cut_of(how, role.parameter, role.axis)
            except ValueError as error:
                raise ValueError(
                    f"param_groups: parameter {role.name!r}: {error}; or leave it in full precision"
                ) from None
            group["prox"] = how
        elif how is not None:
            group["quant_bits"] = how
        if axis is not None:
            group["quant_axis"] = axis[0] if len(axis) == 1 else axis
        if undecayed:
            group["weight_decay"] = 0.0
        elif weight_decay is not None:
            group["weight_decay"] = weight_decay
    return ParamGroups(list(groups.values()), module)


def _check_rules(rules: Any) -> None:
    if not isinstance(rules, Mapping) or not rules:
        raise TypeError(
            'param_groups: expected rules such as {"lm_head": None, "*": 2}, got '
            f"{briefly(rules)}"
        )
    for pattern, how in rules.items():
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(
                "param_groups: expected a rule's pattern to be a string such as 'lm_head', or a "
                f"compiled regular expression, got {briefly(pattern)}"
            )
        if how is not None and not isinstance(how, Prox):
            check_bits(f"param_groups: rule {_shown(pattern)}", how)


def _taken(found: list[Role], rules: Mapping[Pattern, Any]) -> dict[str, Pattern]:
    """{parameter: the pattern of the rule that takes it}."""
    taken: dict[str, Pattern] = {}
    for pattern in rules:
        parts = _parts(pattern, found)
        fits = [role for role in found if any(_fits(part, role) for part in parts)]
        mine = [role for role in fits if role.name not in taken]
        if not mine:
            _refuse(pattern, parts, fits, found, taken)
        taken |= {role.name: pattern for role in mine}
    return taken


def _parts(pattern: Pattern, found: list[Role]) -> list[Pattern]:
    """What a pattern is an "or" of; itself where a name has its bars."""
    names = [name for role in found for name in role.names]
    if not isinstance(pattern, str) or any(matches(pattern, name) for name in names):
        return [pattern]
    parts: list[Pattern] = [part.strip() for part in pattern.split("|")]
    for part in parts if len(parts) > 1 else ():
        if not any(matches(part, name) for name in names):
            raise ValueError(
                f"param_groups: part {part!r} of rule {_shown(pattern)} matches no parameter of "
                "the module; correct it, or leave it out"
            )
    return parts


def _fits(part: Pattern, role: Role) -> bool:
    if part in role.names:
        return True
    return role.kind in QUANTIZABLE and any(matches(part, name) for name in role.names)


def _refuse(
    pattern: Pattern,
    parts: list[Pattern],
    fits: list[Role],
    found: list[Role],
    taken: Mapping[str, Pattern],
) -> None:
    if fits:
        first = taken[fits[0].name]
        raise ValueError(
            f"param_groups: rule {_shown(pattern)} takes nothing: {fits[0].name!r} and all else "
            f"that it matches was taken by rule {_shown(first)}, which stands before it; put the "
            "narrower rule first"
        )
    others = [r for r in found if any(matches(part, n) for part in parts for n in r.names)]
    if others:
        raise ValueError(
            f"param_groups: rule {_shown(pattern)} takes nothing: {others[0].name!r} is "
            f"{others[0].kind!r}, which stays in full precision; name a parameter in full to "
            "quantize it all the same"
        )
    able = [role.name for role in found if role.kind in QUANTIZABLE]
    shown = ", ".join(able[:8]) + (", ..." if len(able) > 8 else "")
    raise ValueError(
        f"param_groups: rule {_shown(pattern)} matches no parameter of the module; those that can "
        f"be quantized are: {shown or 'none'}"
    )


def _shown(pattern: Pattern) -> str:
    return repr(pattern if isinstance(pattern, str) else pattern.pattern)
