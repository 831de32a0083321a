"""The API pages name everything public, and the navigation every page."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
API = {path.stem: path.read_text() for path in sorted((NOTEBOOKS / "api").glob("*.md"))}
IDENTIFIERS = [name for text in API.values() for name in re.findall(r"^::: (\S+)$", text, re.M)]
#: Modules that cannot be imported without the package that is named here.
NEEDS = {"parq_fn.export.hugging_face": "transformers"}

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
