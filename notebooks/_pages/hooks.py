"""What the pages need beside plugins: formulas without a script, and nothing fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(<(pre|code|script|style|textarea)\b.*?</\2>)", re.DOTALL)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])", re.DOTALL)
_UNESCAPED = {"&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": '"', "&#39;": "'"}


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Formulas become MathML before Markdown sees their backslashes."""
    del page, kwargs
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
