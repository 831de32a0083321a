"""What the pages need beside plugins: formulas without a script, a table of names at the head of
each API page, and nothing fetched."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(<(pre|code|script|style|textarea)\b.*?</\2>)", re.DOTALL)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])", re.DOTALL)
_UNESCAPED = {"&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": '"', "&#39;": "'"}


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Formulas become MathML before Markdown sees their backslashes."""
    del kwargs
    if page.file.src_path.startswith("api/"):
        markdown = _with_summary(markdown)
    return _outside_code(markdown, re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL))


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Formulas of notebooks, which are HTML when they get here."""
    del kwargs
    return _outside_code(html, _CODE) if page.file.src_path.endswith(".ipynb") else html


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Scripts that a notebook's template fetches are not needed: there are no formulas left."""
    del kwargs
    if page.file.src_path.endswith(".ipynb"):
        output = re.sub(r'<script[^>]*src="https?://[^"]*"[^>]*>\s*</script>', "", output)
    return output


def on_post_build(config: Any, **kwargs: Any) -> None:
    """Raises ValueError where a page asks for something from another host."""
    del kwargs
    elsewhere = r"(?:https?:)?//"
    asked = re.compile(
        rf'<(?:script|img|iframe)[^>]*\ssrc="{elsewhere}|'
        rf'<link[^>]*rel="stylesheet"[^>]*href="{elsewhere}'
    )
    for path in sorted(Path(config["site_dir"]).rglob("*.html")):
        if found := asked.search(path.read_text()):
            raise ValueError(f"{path.name} fetches from elsewhere: {found[0]}")


def _with_summary(markdown: str) -> str:
    """An API page with a table before the first name: every name, and what its docstring says
    first."""
    names = re.findall(r"^::: (\S+)$", markdown, re.MULTILINE)
    if not names:
        return markdown
    lines = ["| name | what it is |", "|---|---|"]
    for name in names:
        lines.append(f"| [`{name.rpartition('.')[2]}`](#{name}) | {_first_sentence(name)} |")
    first = re.search(r"^(## |::: )", markdown, re.MULTILINE)
    assert first is not None
    table = "\n".join(lines)
    return f"{markdown[: first.start()]}{table}\n\n{markdown[first.start() :]}"


def _first_sentence(name: str) -> str:
    """Of the docstring of a name, or of the `#:` comment above it, as the text of a table.

    Raises ValueError for a name that its module does not define, or that says nothing of itself.
    """
    folder, _, short = name.rpartition(".")
    path = Path(*folder.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    own = Path(*name.split(".")).with_suffix(".py")
    if path.name == "__init__.py" and own.exists():
        path, short = own, ""  # the name is a module
    text = path.read_text()
    module = ast.parse(text)
    said = ast.get_docstring(module) if not short else None
    for node in module.body if short else ():
        if getattr(node, "name", None) == short:
            assert isinstance(node, ast.ClassDef | ast.FunctionDef)
            said = ast.get_docstring(node)
    if said is None and (comment := re.search(rf"((?:^#: .*\n)+){short}\b", text, re.MULTILINE)):
        said = comment[1].replace("#: ", "")
    for node in module.body if not said else ():  # defined elsewhere
        if isinstance(node, ast.ImportFrom) and any(a.name == short for a in node.names):
            return _first_sentence(f"{node.module}.{short}")
    if not said:
        raise ValueError(
            f"{name} has no docstring in {path}, and no comment that begins with '#: '"
        )
    sentence = re.split(r"(?<=[.:])\s+(?=[A-Z])", " ".join(said.split("\n\n")[0].split()))[0]
    parts = sentence.rstrip(":").split("`")  # code between
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", p).replace("<", "&lt;") for p in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def _outside_code(text: str, code: re.Pattern[str]) -> str:
    """The text with formulas as MathML, but for code."""
    parts, at = [], 0
    for match in code.finditer(text):
        parts += [_MATH.sub(_mathml, text[at : match.start()]), match[0]]
        at = match.end()
    return "".join([*parts, _MATH.sub(_mathml, text[at:])])


def _mathml(match: re.Match[str]) -> str:
    display, tex = match[1] is not None, (match[1] or match[2]).strip()
    for escaped, plain in _UNESCAPED.items():
        tex = tex.replace(escaped, plain)
    tex = tex.replace(r"\arg\min", r"\operatorname{argmin}")
    made = convert(tex, display="block" if display else "inline").replace("\n", " ")
    return f"\n\n<div class='formula'>{made}</div>\n\n" if display else made
