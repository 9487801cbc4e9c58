"""The project's pages: the commands in their code, and the links in their text.

In: Markdown files of a checkout. Out: the lines that call make or the jobs, and the links that lead nowhere.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from benchmarks.harness import REPOSITORY

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```\w*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# In reading order: what everybody reads first, then the pages that it leads to.
PAGES = (
    REPOSITORY / "README.md",
    *sorted(path for path in REPOSITORY.glob("*.md") if path.name != "README.md"),
    *sorted(REPOSITORY.glob("docs/*.md")),
    *sorted(REPOSITORY.glob("clusters/*.md")),
)


def commands(page: Path) -> list[str]:
    """The lines of a page's code that call make or the jobs, without their comments, one for each part of `a && b`."""
    lines = [line for block in FENCE.findall(page.read_text()) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.sub(r"\s#\s.*", "", line).split("&&")]
    return [part for part in parts if part.startswith(("make ", "python -m pipelines "))]


def all_commands() -> list[str]:
    """The commands of all pages in reading order, each once."""
    return list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def links(page: Path) -> list[str]:
    """Where a page's links lead, as they are written."""
    return LINK.findall(page.read_text())


def broken_links(page: Path, *, root: Path = REPOSITORY) -> Iterator[str]:
    """What is wrong with a page's links, in words. Those to other hosts are not followed; they must be encrypted."""
    for link in links(page):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if link.startswith("http:"):
            yield f"{link} is not encrypted"
        elif not target.exists():
            yield f"{page.name} links to {link}"
        elif root.resolve() not in (target, *target.parents):
            yield f"{link} leads out of the project"
        elif anchor and anchor not in _anchors(target):
            yield f"{page.name} links to {link}, and there is no such heading"


def _anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
