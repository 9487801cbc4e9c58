"""A page of figures with a table: what a job that looks into a model leaves for people to read.

In: a headline, pictures on disk, rows of numbers. Out: one HTML file that holds everything and needs no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.runtime.html import image_url, write_html

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
        return image_url(self.path.read_bytes())


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """A further table with a sentence on how to read it; rows: all with the same columns."""

    title: str
    note: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """headline: label -> value; rows: of the table, all with the same columns; tables: further ones after it."""

    title: str
    lead: str
    headline: Mapping[str, str]
    figures: Sequence[PageFigure]
    table_title: str  # "" leaves the table out
    rows: Sequence[Mapping[str, Any]]
    tables: Sequence[PageTable] = ()


def write_page(page: Page, output: Path) -> None:
    """Write a page to `output`."""
    write_html(output, template=TEMPLATE, values=vars(page))
