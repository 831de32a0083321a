"""Folders are floors: imports go down only, and by names that are not private.

The table says which rooms of the package there are, lowest first, and what each may import.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import parq_fn

ROOT = Path(parq_fn.__file__).parent
LONGEST = 400  # lines of a file

#: Numbers, and no trees.
_NUMBERS = tuple(f"foundation.{name}" for name in ("value", "scalar", "checks", "traits", "memory"))
_FUNCTIONAL = ("foundation", "schedules", "proxmaps", "quantizers", "transforms")

#: {room: what it may import besides itself}: modules, folders with all in them. The most exact
#: entry counts, as of `export.packing`.
TABLE: dict[str, tuple[str, ...]] = {
    "foundation": (),
    "schedules": _NUMBERS,
    "proxmaps": _NUMBERS,
    # levels are found in one way, by a search or by rounding
    "quantizers": (*_NUMBERS, "proxmaps.levels", "proxmaps.even"),
    "transforms": _FUNCTIONAL,
    "roles": ("foundation",),
    "modules": ("foundation", "roles"),
    "convergence": _FUNCTIONAL,
    "optim.engine": _FUNCTIONAL,
    "optim": (*_FUNCTIONAL, "optim.engine"),
    # by groups as QuantOptimizer reads them
    "covered": (*_FUNCTIONAL, "roles", "modules", "export.codes", "optim.groups"),
    "sensitivities": (*_FUNCTIONAL, "roles", "modules", "export.codes", "optim.groups"),
    "allocation": ("foundation", "quantizers.bits", "sensitivities"),
    # of a module, by the roles of what is in it
    "optim.param_groups": (*_FUNCTIONAL, "optim", "roles", "modules", "covered"),
    "export": (*_FUNCTIONAL, "modules"),
    "export.packing": (
        *_FUNCTIONAL,
        "modules",
        "export",
        "optim",
    ),  # packs what an optimizer trained
    "export.sources": (*_FUNCTIONAL, "optim"),  # of what an optimizer trained
    "integrations": (*_FUNCTIONAL, "optim"),  # training stacks
    "show": (*_FUNCTIONAL, "sensitivities", "allocation"),
    "testing": (*_FUNCTIONAL, "parq_fn"),  # whose operators are all that the package exports
    "moved": (),  # imports by name what is asked for
    "parq_fn": ("",),  # the package itself: everything
}

#: What may import torch.optim: adapters, and what they are exported with.
KNOW_OPTIMIZERS = ("foundation.torch_private", "optim", "export.packing", "export.sources")

LONG: dict[str, str] = {}

#: Private attributes of others that are read.
PRIVATE = {
    "foundation.command": {"_exit": "ends a program whose imports were stopped, with a status"},
    "export.packed_layer": {
        "_apply": "what converts a module: layers keep codes and order in memory"
    },
    "export.hugging_face": {
        "_keys_to_ignore_on_load_unexpected": "the empty weight that stops other programs",
        "_tied_weights_keys": "which of a transformers model's are tied",
        "_is_hf_initialized": "that transformers draws no weights for a layer",
    },
}


class Import(NamedTuple):
    module: str  # that imports
    line: int
    target: str  # a module of the package, without "parq_fn.", or "parq_fn"; or any other
    name: str | None  # of what is taken from it, where that is no module
    own: bool  # whether the target is of the package
    early: bool  # whether it is imported as the module is

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name or 'the module'} of {self.target}"


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "parq_fn"


FILES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


@cache
def _early(module: str) -> set[ast.AST]:
    """The nodes that run as the module is imported."""
    found: set[ast.AST] = set()
    todo: list[ast.AST] = [_tree(module)]
    while todo:
        node = todo.pop()
        checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, ast.FunctionDef | ast.Lambda) and not checked:
            found.add(node)
            todo.extend(ast.iter_child_nodes(node))
    return found


def imports(module: str) -> Iterator[Import]:
    """All imports of a module, those in functions and for checkers of types among them."""
    for node in ast.walk(_tree(module)):
        early = node in _early(module)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _import(module, node.lineno, alias.name, None, early)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                yield _import(module, node.lineno, node.module or "", alias.name, early)


def _import(module: str, line: int, target: str, name: str | None, early: bool) -> Import:
    if target.split(".")[0] != "parq_fn":
        return Import(module, line, target, name, False, early)
    target = target.removeprefix("parq_fn").removeprefix(".")
    inner = f"{target}.{name}".removeprefix(".")
    if name is not None and inner in FILES:
        target, name = inner, None
    return Import(module, line, target or "parq_fn", name, True, early)


def _within(module: str, folder: str) -> bool:
    return not folder or module == folder or module.startswith(f"{folder}.")


def room(module: str) -> str:
    """The entry of the table that a module falls under."""
    return max((entry for entry in TABLE if _within(module, entry)), key=len, default="")


def test_every_module_is_on_the_table() -> None:
    assert [module for module in FILES if not room(module)] == []
    assert [entry for entry in TABLE if not any(_within(m, entry) for m in FILES)] == []


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down_only(module: str) -> None:
    mine = room(module)
    up = [
        str(one)
        for one in imports(module)
        if one.own and not any(_within(one.target, lower) for lower in (mine, *TABLE[mine]))
    ]
    assert not up


def test_modules_import_each_other_in_no_circle() -> None:
    below = {m: {one.target for one in imports(m) if one.own and one.early} for m in FILES}
    below["parq_fn"] = set()  # is imported before all of them, and asks for them in its order
    while free := {m for m, targets in below.items() if not targets & below.keys() - {m}}:
        below = {m: targets for m, targets in below.items() if m not in free}
    assert not below


@pytest.mark.parametrize("module", FILES)
def test_nothing_private_is_imported(module: str) -> None:
    if module == "foundation.torch_private":
        return
    private = [
        str(one)
        for one in imports(module)
        if one.target != "__future__"
        and any(part.startswith("_") for part in (*one.target.split("."), one.name or ""))
    ]
    assert not private


@pytest.mark.parametrize("module", FILES)
def test_private_attributes_are_ones_own(module: str) -> None:
    """Of torch too, but for one file."""
    if module == "foundation.torch_private":
        return
    allowed = {"_replace", "_make", "_fields", "_asdict", "_repr_html_", *PRIVATE.get(module, {})}
    others = [
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in allowed
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]
    assert not others


def test_the_functional_core_knows_nothing_of_torch_optim() -> None:
    known = [
        str(one)
        for module in FILES
        for one in imports(module)
        if f"{one.target}.{one.name}".startswith("torch.optim")
        and not any(_within(module, folder) for folder in KNOW_OPTIMIZERS)
    ]
    assert not known


def test_files_are_short() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in FILES.values()
    }
    assert {name for name, n in lines.items() if n > LONGEST} == LONG.keys()


def test_no_test_module_imports_another() -> None:
    """What two of them need stands in a module of its own, such as tests/helpers.py."""
    for path in Path(__file__).parent.rglob("*.py"):
        imported = re.findall(r"^(?:from|import) (tests\.[\w.]*test_\w+)", path.read_text(), re.M)
        assert imported == [], path.name
