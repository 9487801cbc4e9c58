"""A page of figures with a table: what a job that looks into a model leaves for people to read.

In: a headline, pictures on disk, rows of numbers. Out: one HTML file that holds everything and needs no network.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from cogview.shards.manifest import atomic_file
from pipelines.runtime.report import format_number

TEMPLATE = "page.html"


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """A PNG on disk with its title, and a sentence on how to read it."""

    path: Path
    title: str
    note: str

    @property
    def data(self) -> str:
        """The picture inside a URL."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True, kw_only=True)
class Page:
    """headline: label -> value; rows: of the table, all with the same columns."""

    title: str
    lead: str
    headline: Mapping[str, str]
    figures: Sequence[PageFigure]
    table_title: str
    rows: Sequence[Mapping[str, Any]]


def write_page(page: Page, output: Path) -> None:
    """Write a page to `output`. Every text is escaped, and a content security policy forbids scripts."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=format_number)
    html = environment.get_template(TEMPLATE).render(vars(page))
    with atomic_file(output) as file:
        file.write(html.encode())
