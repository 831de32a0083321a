"""Mutants of a module: its source with one small change each, made on the syntax tree.

Left out are
- docstrings, annotations, strings and what an error says (no behaviour, or another's concern),
- `__repr__`, `__all__`, decorators, imports, and what is there for type checkers alone,
- traits (what an operator declares for the test kit, which holds the operator to them: a weaker
  declaration asks less and breaks nothing),
- the sign of -1: the axes -1 and 1 of rows [r, n] are one (-2 and 0 are tried),
- `del` of unused arguments, and `strict` of a zip whose lengths are checked elsewhere.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

#: Names whose definitions are left out.
LEFT_OUT = {"__repr__", "__all__", "traits", "_path", "_UNDECLARED", "_follows_levels"}

_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_PAIRS = [
    ("minimum", "maximum"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("min", "max"),
    ("lo", "hi"),
    ("low", "high"),
    ("start", "end"),
    ("sinh", "cosh"),
    ("all", "any"),
    ("zeros_like", "ones_like"),
    ("below", "above"),
]
_SWAPS = dict(_PAIRS) | {b: a for a, b in _PAIRS}
#: Methods that x.method(...) may lose.
_DROPPED = {"abs", "clamp", "contiguous", "detach", "flip", "reshape", "square", "to"}


class Mutant(NamedTuple):
    """The whole source, and what tells it from the original: the lines as `ast` prints them."""

    function: str
    before: str
    after: str
    alike: int  # how many came before that read the same, at another place
    source: str

    @property
    def key(self) -> str:
        again = f" ({self.alike + 1})" if self.alike else ""
        return f"{self.function}: {self.before} -> {self.after}{again}"


def printed(source: str) -> str:
    """The module as mutants print it, one statement a line."""
    return "\n".join(map(ast.unparse, ast.parse(source).body))


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text; equal ones once."""
    statements = ast.parse(source).body
    texts = [ast.unparse(statement) for statement in statements]
    original = printed(source)
    found: dict[str, Mutant] = {}
    for i, statement in enumerate(statements):
        alone = ast.Module([statement], [])  # the others stay as they are
        for function, holder, place, new in _changes(alone, ""):
            old = _get(holder, place)
            _set(holder, place, new)
            text = "\n".join([*texts[:i], ast.unparse(alone), *texts[i + 1 :]])
            _set(holder, place, old)
            if text != original and text not in found:
                before, after = _difference(original, text)
                alike = sum(m[:3] == (function, before, after) for m in found.values())
                found[text] = Mutant(function, before, after, alike, text)
    return list(found.values())


def _difference(a: str, b: str) -> tuple[str, str]:
    """The lines that differ."""
    before, after = a.splitlines(), b.splitlines()
    shortest = min(len(before), len(after))
    head = next((i for i in range(shortest) if before[i] != after[i]), shortest)
    tail = next((i for i in range(shortest - head) if before[-1 - i] != after[-1 - i]), 0)
    parts = before[head : len(before) - tail], after[head : len(after) - tail]
    first, second = (" / ".join(line.strip() for line in part) for part in parts)
    return first, second


def _get(holder: Any, place: Any) -> Any:
    return holder[place] if isinstance(holder, list) else getattr(holder, place)


def _set(holder: Any, place: Any, new: Any) -> None:
    if isinstance(holder, list):
        holder[place] = new
    else:
        setattr(holder, place, new)


def _changes(node: ast.AST, function: str) -> Iterator[tuple[str, Any, Any, ast.AST]]:
    """(function, holder, place, new): the node at a place of its holder, and what replaces it."""
    assigned: set[str] = set()
    if isinstance(node, ast.FunctionDef):
        assigned = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
    for name, content in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        holder, places = (
            (content, range(len(content))) if isinstance(content, list) else (node, [name])
        )
        for place in places:
            child = _get(holder, place)
            if not isinstance(child, ast.AST) or _left_out(child):
                continue
            for new in _replacements(child, assigned):
                yield function, holder, place, new
            inner = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{function}.{child.name}".lstrip(".")
            if not isinstance(child, ast.Raise):
                yield from _changes(child, inner)
            if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
                assigned.add(child.targets[0].id)


def _left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.JoinedStr | ast.Delete | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    names = [getattr(node, "name", None)]
    if isinstance(node, ast.Assign):
        names = [getattr(target, "id", None) for target in node.targets]
    return any(name in LEFT_OUT for name in names)


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    new = copy.copy(node)
    for name, content in fields.items():
        setattr(new, name, content)
    return new


def _replaced(items: list[Any], i: int, new: Any) -> list[Any]:
    return [*items[:i], new, *items[i + 1 :]]


def _replacements(node: ast.AST, assigned: set[str]) -> Iterator[ast.AST]:
    """What a node may become; statements that set a variable for the first time stay."""
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for other in _COMPARE[type(op)]:
                    yield _with(node, ops=_replaced(ops, i, other()))
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC and not _is_type(node):
            yield _with(node, op=_ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(1))):
            return
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(flag)):
            yield ast.Constant(not flag)
        case ast.Constant(value=int(number) | float(number)):
            yield ast.Constant(number + 1)
            yield ast.Constant(number - 1)
        case ast.Name(id=name, ctx=ast.Load()) if name in _SWAPS:
            yield _with(node, id=_SWAPS[name])
        case ast.Attribute(attr=name) if name in _SWAPS:
            yield _with(node, attr=_SWAPS[name])
        case ast.keyword(arg=name) if name in _SWAPS:
            yield _with(node, arg=_SWAPS[name])
        case ast.Call(func=function, keywords=keywords):
            for i, keyword in enumerate(keywords):
                flag = isinstance(keyword.value, ast.Constant) and keyword.value.value in (
                    True,
                    False,
                )
                if keyword.arg not in (None, "strict") and not flag:  # flags are flipped
                    yield _with(node, keywords=[*keywords[:i], *keywords[i + 1 :]])
            if isinstance(function, ast.Attribute) and function.attr in _DROPPED:
                yield function.value
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, ast.Compare) or len(test.ops) > 1:
                yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[test]):
            yield _with(node, ifs=[ast.UnaryOp(ast.Not(), test)])
            yield _with(node, ifs=[])
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)]) if name in assigned:
            yield ast.Pass()


def _is_type(node: ast.BinOp) -> bool:
    """Whether it is a union of types, as in `float | Tensor`."""
    return isinstance(node.op, ast.BitOr) and any(
        isinstance(n, ast.Name) and n.id in ("Tensor", "float", "list") for n in ast.walk(node)
    )
