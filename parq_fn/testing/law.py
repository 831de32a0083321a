"""A law as a value: its name, statement, formula and tolerance, and the claims it makes.

The claims of a law are a function of the operator and of the inputs it names as parameters
(see `parq_fn.testing.cases` for the inputs there are), giving one `Claim` or several.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import hypothesis
import optree
import torch
from torch import Tensor

from parq_fn.foundation.value import Value, value


class Claim(NamedTuple):
    """left == right, or left <= right, element by element, within the law's tolerance.

    Tensors and trees of them are compared; anything else by ==. The tolerance is taken relative
    to the sides where they are larger than 1.
    """

    left: Any  # what was computed
    relation: str  # "==" or "<="
    right: Any  # what it is compared with
    inputs: Mapping[str, Any] = MappingProxyType({})  # made from those that the law was given


def equal(left: Any, right: Any, **inputs: Any) -> Claim:
    """left == right; NaN equals NaN."""
    return Claim(left, "==", right, inputs)


def at_most(left: Any, right: Any, **inputs: Any) -> Claim:
    """left <= right."""
    return Claim(left, "<=", right, inputs)


class Violation(AssertionError):
    """A law that does not hold: `law`, `inputs`, `left` and `right`; `others` broken too.

    Where the operator raised instead, that is its `error`, and there are no sides.

    law: that does not hold.
    inputs: by name, those that it does not hold on.
    claim: what does not hold; None where the operator raised.
    operator: what was checked.
    error: what the operator raised.
    """

    def __init__(
        self,
        law: Law,
        inputs: Mapping[str, Any],
        claim: Claim | None,
        operator: Any = None,
        error: Exception | None = None,
    ):
        self.law, self.operator, self.error = law, operator, error
        self.left, self.relation, self.right, own = claim or Claim(None, "==", None)
        shown = {**inputs, **own}
        self.inputs = {k: v for k, v in shown.items() if k != "traits" and v is not None}
        self.others: tuple[str, ...] = ()
        if law.kind == "proxmap" and claim is not None and "f(u)" not in self.inputs:
            self._show_weights()
        super().__init__(law.name)

    def _show_weights(self) -> None:
        names = (("u",), ("levels", "any_levels"), ("c", "any_c"))
        u, q, c = (next((self.inputs[n] for n in ns if n in self.inputs), None) for ns in names)
        if isinstance(u, Tensor) and isinstance(q, Tensor):
            with contextlib.suppress(Exception):
                self.inputs["f(u)"] = self.operator(u.clone(), q.clone(), c)

    def __str__(self) -> str:
        law = self.law
        who = _name(self.operator) if self.operator is not None else "it"
        head = f"{who} breaks the law {law.name!r}"
        sides = _sides(Claim(self.left, self.relation, self.right), law.tolerance, self.inputs)
        if self.error is not None:
            raised = f"{type(self.error).__name__}: {self.error}"
            where = raised_at(self.error)
            head, sides = f"{who} raised {raised}{where}\n\non input of the law {law.name!r}", []
        lines = [
            head,
            "",
            f"    {law.statement}",
            f"    {law.formula}",
            f"    (held to {law.tolerance:g}: {law.reason})",
            "",
            "counterexample",
            *(f"    {name} = {show_tree(got, _SHOWN)}" for name, got in self.inputs.items()),
            *sides,
        ]
        if any("... " in line for line in lines):
            lines += ["", "numbers that are left out stand in the attribute `inputs` of this error"]
        if self.others:
            lines += ["", f"also broken: {', '.join(self.others)}"]
        return "\n".join(lines)


@value
class Law(Value):
    """A law of one kind of operator.

    kind: "proxmap", "quantizer", "schedule" or "transformation".
    name: what `check` and errors call it.
    statement: one line.
    formula: plain text.
    tolerance, reason: what both sides may differ by, relative where they exceed 1, and why.
    needs: the traits that it is made from.
    applies: traits -> whether an operator that declares those and these is held to it.
    claims: (operator, inputs ...) -> claims.
    """

    kind: str
    name: str
    statement: str
    formula: str
    tolerance: float
    reason: str
    needs: tuple[str, ...]
    applies: Callable[[Any], bool]
    claims: Callable[..., Claim | Iterable[Claim]]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that the law is checked on."""
        return tuple(inspect.signature(self.claims).parameters)[1:]

    def missing(self, traits: Any) -> list[str]:
        """The traits that the law needs and the operator does not declare."""
        declared = ((name, getattr(traits, name)) for name in self.needs)
        return [name for name, got in declared if got is None or got is False]

    def check(self, operator: Any, /, **inputs: Any) -> None:
        """Raises Violation unless the law holds for the operator on these inputs."""
        # tensors as copies, for an operator may change them
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        got = self.claims(operator, **own)
        for claim in [got] if isinstance(got, Claim) else got:
            if not holds(claim, self.tolerance):
                raise Violation(self, inputs, claim, operator)


def _always(traits: Any) -> bool:
    del traits
    return True


class Collection(list[Law]):
    """The laws of a kind, in the order of their definition; a decorator adds one.

    kind: as that of `Law`.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def law(
        self,
        statement: str,
        formula: str,
        *,
        needs: tuple[str, ...] = (),
        applies: Callable[[Any], bool] = _always,
        tolerance: float = 0.0,
        reason: str = "the same values: bit for bit",
    ) -> Callable[[Callable[..., Any]], Law]:
        """Decorator: makes the claims a law by the function's name, and adds it."""

        def add(claims: Callable[..., Any]) -> Law:
            name = claims.__name__
            made = Law(
                self.kind, name, statement, formula, tolerance, reason, needs, applies, claims
            )
            self.append(made)
            return made

        return add


# Comparing and printing


def holds(claim: Claim, tolerance: float) -> bool:
    """Whether the claim holds within the tolerance.

    >>> holds(equal(torch.tensor(1.0), torch.tensor(1.0 + 1e-6)), 1e-3)
    True
    """
    left, relation, right, _ = claim
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return _tensors_hold(left, relation, right, tolerance)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return _tensors_hold(torch.as_tensor(left), relation, torch.as_tensor(right), tolerance)
    if _is_tree(left) and _is_tree(right):
        (a, spec), (b, other) = (optree.tree_flatten(t, none_is_leaf=True) for t in (left, right))
        if spec != other:
            return False
        return all(holds(Claim(x, relation, y), tolerance) for x, y in zip(a, b, strict=True))
    if relation == "<=":
        return bool(left <= right + tolerance * max(1.0, abs(left), abs(right)))
    if isinstance(left, float) and isinstance(right, float):
        both_nan = left != left and right != right
        return (
            both_nan
            or left == right
            or abs(left - right) <= tolerance * max(1.0, abs(left), abs(right))
        )
    return bool(left == right)


def _is_tree(got: Any) -> bool:
    return isinstance(got, dict | list | tuple)


def _tensors_hold(left: Tensor, relation: str, right: Tensor, tolerance: float) -> bool:
    if left.shape != right.shape or (left.dtype != right.dtype and tolerance == 0):
        return False
    a, b = left.double(), right.double()
    same = (a == b) | (a.isnan() & b.isnan())
    slack = tolerance * torch.maximum(a.abs(), b.abs()).clamp(min=1.0)
    near = a - b <= slack if relation == "<=" else (a - b).abs() <= slack
    finite = a.isfinite() & b.isfinite()
    if relation == "<=":
        return bool((same | (near & finite) | (a <= b)).all())
    return bool((same | (near & finite)).all())


def _sides(claim: Claim, tolerance: float, inputs: Mapping[str, Any]) -> list[str]:
    """Both sides and their difference: of long tensors the entry, of trees the leaf, that
    breaks the claim most; with that entry of the inputs that have it."""
    left, relation, right, _ = claim
    where = ""
    if _is_tree(left) and _is_tree(right):
        (a, spec), (b, other) = (optree.tree_flatten(t, none_is_leaf=True) for t in (left, right))
        if spec == other:
            names = optree.tree_paths(left, none_is_leaf=True)
            for name, x, y in zip(names, a, b, strict=True):
                if not holds(Claim(x, relation, y), tolerance):
                    left, right, where = x, y, f" of leaf {'.'.join(map(str, name))}"
                    break
    gap, lines = None, []
    if isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape:
        if left.numel() > 6 and left.dtype == right.dtype:
            slots = zip(left.flatten(), right.flatten(), strict=True)
            bad = [not holds(Claim(x, relation, y), tolerance) for x, y in slots]
            index = torch.tensor(bad).reshape(left.shape).nonzero()[0].tolist()
            alike = {k: x for k, x in inputs.items() if getattr(x, "shape", None) == left.shape}
            left, right = left[tuple(index)], right[tuple(index)]
            where += f" at {index}"
            lines = [f"    {k} at {index} = {show_tree(x[tuple(index)])}" for k, x in alike.items()]
        gap = left.double() - right.double()
    elif isinstance(left, float) and isinstance(right, float):
        gap = torch.tensor(left - right)
    lines.append(f"    left side{where}  = {show_tree(left, _SHOWN)}")
    lines.append(f"    right side{where} = {show_tree(right, _SHOWN)}")
    return lines if gap is None else [*lines, f"    difference = {show_tree(gap, _SHOWN)}"]


#: Of a row's numbers, how many a violation shows.
_SHOWN = 8


def show_tree(got: Any, most: int | None = None) -> str:
    """A tensor as nested lists with all its digits, and its dtype unless float64.

    most: of a longer row so many numbers, and how many more there are.

    >>> show_tree({"w": torch.tensor([1.0, 0.5])})
    "{'w': [1.0, 0.5] (float32)}"
    >>> show_tree(torch.arange(9), 2)
    '[0, 1, ... 7 more]'
    """
    if isinstance(got, Tensor):
        told = repr(got.tolist())
        if most is not None and got.dim() and got.shape[-1] > most:
            more = f", ... {got.shape[-1] - most} more]"
            told = re.sub(r"(?<=[^\]])\]", more, repr(got[..., :most].tolist()))
        if got.dtype in (torch.float64, torch.int64, torch.bool):
            return told
        return f"{told} ({str(got.dtype).removeprefix('torch.')})"
    if isinstance(got, dict):
        return "{" + ", ".join(f"{k!r}: {show_tree(v, most)}" for k, v in got.items()) + "}"
    if isinstance(got, list | tuple):
        inner = ", ".join(show_tree(x, most) for x in got)
        if hasattr(got, "_fields"):
            return f"{type(got).__name__}({inner})"
        return f"[{inner}]" if isinstance(got, list) else f"({inner})"
    return repr(got)


#: Files that are not the operator's: of this kit, and of the libraries that it is called through.
_NOT_OWN = tuple(
    str(Path(module.__file__).parent) for module in (hypothesis, torch, optree) if module.__file__
) + (str(Path(__file__).parent),)


def raised_at(error: BaseException) -> str:
    """The file and line of the operator that raised, the deepest outside of torch and the kit."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_OWN)]
    if not own:
        return ""
    return f"\n    {own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: {own[-1].line}"


def _name(operator: Any) -> str:
    return str(getattr(operator, "__name__", None) or repr(operator))


def vmapped(f: Callable[..., Any]) -> Callable[..., Any]:
    """torch.vmap, without its warning of operations that it runs as a loop."""

    def run(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.vmap(f)(*args)

    return run
