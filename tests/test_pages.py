"""The API pages name everything public, and the navigation every page."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typing_extensions import is_protocol

from tests.helpers import python_blocks

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
API = {path.stem: path.read_text() for path in sorted((NOTEBOOKS / "api").glob("*.md"))}
IDENTIFIERS = [name for text in API.values() for name in re.findall(r"^::: (\S+)$", text, re.M)]
#: Modules that cannot be imported without the package that is named here.
NEEDS = dict.fromkeys(
    ("parq_fn.export.hugging_face", "parq_fn.integrations.trainer"), "transformers"
)

#: Modules of public names: what `__all__` says, else what a module defines without underscore.
PUBLIC = [
    "parq_fn",
    "parq_fn.schedules",
    "parq_fn.proxmaps",
    "parq_fn.quantizers",
    "parq_fn.transforms.estimators",
    "parq_fn.optim",
    "parq_fn.export",
    "parq_fn.testing",
    "parq_fn.testing.strategies",
    "parq_fn.show.plot",
    "parq_fn.convergence",
]


def _shown(identifier: str) -> Any:
    module, _, name = identifier.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _public(module: ModuleType) -> dict[str, Any]:
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, one in vars(module).items()
            if getattr(one, "__module__", None) == module.__name__
            and (inspect.isclass(one) or inspect.isfunction(one))
            and not name.startswith("_")
        ]
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_on_an_api_page(name: str) -> None:
    absent = tuple(module for module, needed in NEEDS.items() if find_spec(needed) is None)
    shown = [_shown(x) for x in IDENTIFIERS if not absent or not x.startswith(absent)]
    pages = {module.__name__ for module in shown if isinstance(module, ModuleType)}
    for short, one in _public(importlib.import_module(name)).items():
        if isinstance(one, ModuleType) and one.__name__ not in pages:
            inside = _public(one).values()  # a module whose names are shown one by one
            assert any(one is other for one in inside for other in shown), (name, short)
            continue
        assert any(one is other for other in shown), (
            f"{name}.{short} is on no page of notebooks/api"
        )


def test_every_name_that_the_pages_import_is_on_an_api_page() -> None:
    absent = tuple(module for module, needed in NEEDS.items() if find_spec(needed) is None)
    shown = [_shown(x) for x in IDENTIFIERS if not absent or not x.startswith(absent)]
    for path in (ROOT / "README.md", *NOTEBOOKS.rglob("*.md")):
        for block in python_blocks(path.read_text()):
            for node in ast.walk(ast.parse(block)):
                module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                if not module.startswith("parq_fn") or (absent and module.startswith(absent)):
                    continue
                for alias in node.names:
                    if hasattr(importlib.import_module(module), alias.name):
                        one = _shown(f"{module}.{alias.name}")
                        known = isinstance(one, ModuleType) or any(one is x for x in shown)
                        assert known, f"{path.name}: {module}.{alias.name} is on no API page"


def test_every_name_of_an_api_page_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table at the head of an API page, which is made as the pages are built."""
    monkeypatch.chdir(ROOT)
    hooks: dict[str, Any] = {}
    code = (NOTEBOOKS / "_pages" / "hooks.py").read_text()
    exec(code.replace("from latex2mathml.converter import convert", ""), hooks)
    for text in API.values():
        names = re.findall(r"^::: (\S+)$", text, re.M)
        rows = re.findall(
            r"^\| \[`(\w+)`\]\(#(\S+)\) \| \S.* \|$", hooks["_with_summary"](text), re.M
        )
        assert rows == [(name.rpartition(".")[2], name) for name in names]


def _described(one: Any, name: str) -> bool:
    """Whether the source says what a field or an argument is, where the pages read it: in lines
    above with #:, in a comment beside it, or in the docstring's line "name: ..."."""
    line = inspect.getmro(one) if inspect.isclass(one) else (one,)
    for place in (p for p in line if p.__module__.startswith("parq_fn")):
        comment = rf"^ *#: .*\n +{name}(:| =) |^ +{name}: .*  # \S"
        entry = rf"^ *(\w+, )*{name}(, \w+)*: \S"
        if inspect.isclass(place) and re.search(comment, inspect.getsource(place), re.M):
            return True
        if re.search(entry, inspect.getdoc(place) or "", re.M):
            return True
    return False


@pytest.mark.parametrize("page", [page for page in API if page != "index"])
def test_every_row_of_a_table_of_parameters_says_what_it_is(page: str) -> None:
    """All fields of every public value and class; of a function or method all, or none."""
    for identifier in re.findall(r"^::: (\S+)$", API[page], re.M):
        if identifier.startswith(tuple(m for m, needed in NEEDS.items() if not find_spec(needed))):
            continue
        shown = _shown(identifier)
        methods = vars(shown).values() if inspect.isclass(shown) else ()
        for one in (shown, *(m for m in methods if inspect.isfunction(m) and m.__name__[0] != "_")):
            if not (inspect.isclass(one) or inspect.isfunction(one)) or is_protocol(one):
                continue
            names = {n for n in inspect.signature(one).parameters if n[0] != "_"}
            names -= {"self", "args", "kwargs"}
            silent = sorted(name for name in names if not _described(one, name))
            if inspect.isclass(one) or len(silent) < len(names):
                assert not silent, f"{identifier}, {one}: no description of {', '.join(silent)}"


def test_every_term_that_a_page_sets_in_bold_is_in_the_glossary() -> None:
    """Where a term is said for the first time it is bold, in the README and the first pages."""
    glossary = (NOTEBOOKS / "glossary.md").read_text()
    entries = {
        term for row in re.findall(r"^\| ([^|]+) \|", glossary, re.M) for term in row.split(", ")
    }
    pages = ["../README", "index", "concepts", "choosing", "howto/torch_loop", "howto/sharded"]
    for page in pages:
        text = re.sub(r"```.*?```", "", (NOTEBOOKS / f"{page}.md").read_text(), flags=re.DOTALL)
        for term in re.findall(r"\*\*([^*]+)\*\*", text):
            assert {term.lower(), term.lower().removesuffix("s")} & entries, (page, term)


def test_the_index_names_what_the_pages_show() -> None:
    for page, text in API.items():
        for identifier in re.findall(r"^::: (\S+)$", text, re.M):
            assert f"`{identifier.rpartition('.')[2]}`" in API["index"], (page, identifier)


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[:-] (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.M))
    there = {
        str(path.relative_to(NOTEBOOKS))
        for kind in ("*.md", "*.ipynb")
        for path in NOTEBOOKS.rglob(kind)
        if ".ipynb_checkpoints" not in path.parts
    }
    assert listed == there
