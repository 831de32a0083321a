"""The README as a package index shows it: without the repository beside it.

Links and pictures of the README are paths in the repository. Where pyproject.toml gives its
address (Repository in [project.urls]), they are made absolute; where it gives none, a link becomes
its text and a picture its description, so that nothing leads nowhere.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def description(text: str, address: str | None) -> str:
    """The README's Markdown with no path left in it."""

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        if re.match(r"https?://|#", target):
            return match[0]
        return f"[{label}]({address}/blob/main/{target})" if address else label

    def picture(match: re.Match[str]) -> str:
        source, described = match.groups()
        if address:
            return f'<img src="{address}/raw/main/{source}" alt="{described}">'
        return f"*{described}*"

    text = re.sub(r'<img src="([^"]*)" alt="([^"]*)">', picture, text)
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)]*)\)", link, text)


if __name__ == "__main__":
    project = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^Repository = "(.*?)/?"$', project, re.MULTILINE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=description(readme, found and found[1]),
        long_description_content_type="text/markdown",
    )
