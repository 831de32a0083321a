"""README and pages: their code runs as written, commands are those of pyproject and CI, links lead
somewhere."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from parq_fn.testing import table
from tests.helpers import python_blocks, run_blocks
from tests.processes import on_processes

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
README = (ROOT / "README.md").read_text()
KIT = (ROOT / "parq_fn" / "testing" / "README.md").read_text()
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(NOTEBOOKS.rglob("*.md"))]
WITH_CODE = [
    path
    for path in (ROOT / "README.md", ROOT / "parq_fn" / "testing" / "README.md", *PAGES)
    if python_blocks(path.read_text())
]
#: Of these, which take ten seconds and more.
LONG = ("parq_fn/testing/README.md", "notebooks/howto/functional_loop.md")
#: Modules of parq_fn.export that need a package of an extra; where it is absent their code is left
#: out here, and run by tests/integrations.
FORMATS = {
    "torchao": "torchao",
    "onnx": "onnxscript",
    "gguf": "gguf",
    "hugging_face": "transformers",
}
#: What code of the page on engines imports; it is run by tests/integrations, on ranks or workers.
ENGINES = re.compile(
    r"^(?:from|import) (?:accelerate|transformers|lightning|torchtitan|ray)\b", re.MULTILINE
)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _on_a_rank(blocks: list[str]) -> None:
    """Of a script for torchrun, all but the lines that begin and end the processes' group."""
    begins = r"^dist\.(init|destroy)_process_group\(.*$"
    run_blocks([re.sub(begins, "", block, flags=re.M) for block in blocks])


@pytest.mark.slow
@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.rare] if _name(path) in LONG else [])
        for path in WITH_CODE
    ],
    ids=_name,
)
def test_the_code_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = [b for b in python_blocks(path.read_text()) if not ENGINES.search(b)]
    if path.stem == "sharded":
        on_processes(_on_a_rank, 2, tmp_path, blocks)
        return
    absent = {of for of, package in FORMATS.items() if find_spec(package) is None}
    run_blocks([b for b in blocks if absent.isdisjoint(re.findall(r"export\.(\w+) import", b))])


def test_the_tables_of_laws_are_those_of_the_traits() -> None:
    """Mend with: python -m parq_fn.testing.table, for all from the first table on."""
    assert KIT.rstrip().endswith(table.document())


def test_the_commands_are_ci_s_word_for_word() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    texts = [README, *(path.read_text() for path in PAGES)]
    commands = {c for text in texts for c in re.findall(r"pip install [^\n`]* && [^\n`]+", text)}
    assert len(commands) >= 5
    assert not [c for c in commands if c not in ci]


def test_every_extra_that_is_installed_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", project, re.DOTALL)
    assert extras is not None
    named = {line.partition(" = ")[0] for line in extras[1].splitlines()}
    assert {"test", "examples", "notebooks", "docs", "dev"} <= named
    for text in (README, *(path.read_text() for path in PAGES)):
        assert set(re.findall(r"pip install [^\n`]*'\.\[(\w+)\]'", text)) <= named


def test_every_test_that_a_page_names_exists() -> None:
    faults = (ROOT / "tests" / "test_published_faults.py").read_text()
    named = re.findall(r"`(test_\w+)`$", (NOTEBOOKS / "differences.md").read_text(), re.M)
    assert len(named) == 11
    for name in named:
        assert re.search(rf"def {name}", faults), name


def test_what_is_pinned_is_what_some_extra_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    pinned = re.findall(r"^([\w-]+)==", (ROOT / ".ci" / "tested.txt").read_text(), re.MULTILINE)
    asked = set(re.findall(r'"([\w-]+)(?:\[\w+\])?>=', project))
    assert set(pinned) >= asked - {"setuptools", "nox"}
    assert set(pinned) <= asked


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=_name)
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text):
        target = "".join(link).partition("#")[0]
        if target.startswith("https://") or not target:
            continue
        assert (path.parent / target).exists(), target
        if path.is_relative_to(NOTEBOOKS):  # the root of the pages: mkdocs shows no file above it
            assert (path.parent / target).resolve().is_relative_to(NOTEBOOKS), target


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", ["../README", "index", "concepts", "choosing"])
def test_sentences_of_the_first_pages_are_short(page: str) -> None:
    text = (NOTEBOOKS / f"{page}.md").read_text()
    prose = re.sub(r"```.*?```|^    .*$|^\|.*$|^#.*$|<img[^>]*>", "", text, flags=re.S | re.M)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    for sentence in re.split(r"(?<=[.?!:])\s+|\n", prose):
        assert len(sentence.split()) <= 30, sentence
