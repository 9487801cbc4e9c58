"""Tables of images and captions: which column of a table holds what, and its rows as candidates.

Columns are found by their usual names (LAION, img2dataset, COCO, ...) or given. A file without a header (Conceptual
Captions: caption<TAB>url) is understood from its first rows. Who made a picture, and under what licence it may be used,
travels on with its row.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview.errors import ConfigError
from cogview.locations import suffix_of
from cogview.records.candidates import Candidate
from cogview.records.captions import clean_caption, clean_captions
from cogview.records.table_rows import PROBED_ROWS, SEPARATED, Row, first_cells, table_rows
from cogview.records.tars import IMAGE_SUFFIXES, usual_caption_fields

IMAGE_COLUMNS = (
    "url",
    "image_url",
    "img_url",
    "coco_url",
    "flickr_url",
    "image_path",
    "image",
    "path",
    "file",
    "filename",
    "file_name",
    "img",
    "src",
)
# Whose picture it is and what may be done with it. The letter case of a column's name is not kept.
_RIGHTS = re.compile(
    r"^(licen[cs]e|creator|author|artist|photographer|credit|attribution|copyright|rights|owner|page|provider)"
    r"([_ ](name|url|link|version|id))?$|^(foreign_landing_url|page_title|domain)$",
    re.IGNORECASE,
)
_LOOKS_LIKE_IMAGE = re.compile(rf"^https?://|\.({'|'.join(IMAGE_SUFFIXES)})$", re.IGNORECASE)
_WEB = re.compile(r"^\s*https?://", re.IGNORECASE)
_OURS = frozenset({"source", "captions", "sha256", "width", "height", "key"})  # fields of a pair that are written anew
_KEPT_TYPES = (str, int, float, bool)
_MAX_EXTRA = 2000  # characters of a kept text


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Where a table keeps what. captions: none in a bare list of addresses; is_web: its images are URLs; has_header: of
    CSV and TSV; extra: columns that travel with the pair, such as its licence."""

    image: str
    captions: tuple[str, ...]
    is_web: bool
    has_header: bool = True
    extra: tuple[str, ...] = ()


def inspect_table(
    path: Path | str, *, image_column: str = "", caption_fields: Sequence[str] = (), extra_columns: Sequence[str] = ()
) -> TableColumns:
    """Find the columns of a table from its first rows. ConfigError lists the columns that there are.

    extra_columns: to keep besides those about rights.
    """
    address = str(path)
    has_header = suffix_of(address) not in SEPARATED or _has_header(address, image_column, caption_fields)
    rows = list(itertools.islice(table_rows(address, has_header=has_header, columns=None), PROBED_ROWS))
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    if not rows:
        raise ConfigError(f"data: {path} has no rows")
    image = _image_column(address, names, rows, image_column)
    captions = tuple(caption_fields) or tuple(usual_caption_fields(name for name in names if name != image))
    if not captions and not has_header:
        captions = tuple(name for name in names if name != image)
    missing = [name for name in (*captions, *extra_columns) if name not in names]
    if missing or not (captions or len(names) == 1):
        wanted = f"no column {', '.join(missing)}" if missing else "no caption column"
        raise ConfigError(
            f"caption_fields: {path} has {wanted}; its columns are {', '.join(names)}; name those that hold captions"
        )
    values = [str(row[image]) for row in rows if row.get(image)]
    is_web = sum(bool(_WEB.match(value)) for value in values) * 2 >= max(1, len(values))
    rights = tuple(name for name in names if _RIGHTS.match(name.strip()) and name not in (image, *captions))
    extra = tuple(dict.fromkeys((*rights, *extra_columns)))
    return TableColumns(image=image, captions=captions, is_web=is_web, has_header=has_header, extra=extra)


def require_captions(columns: TableColumns, *, path: Path | str) -> TableColumns:
    """The columns, if pairs can be made of them. ConfigError for a bare list of addresses or paths."""
    if not columns.captions:
        raise ConfigError(
            f"caption_fields: {path} has no caption column: it is a list of images alone, and a pair needs words; give "
            "a table with captions, or scrape the pages that show these images (--pages)"
        )
    return columns


def read_table(path: Path | str, columns: TableColumns) -> Iterator[Candidate]:
    """Every row of a table as a candidate, in order; one without a readable image has the source ""."""
    wanted = (columns.image, *columns.captions, *columns.extra)
    for row in table_rows(str(path), has_header=columns.has_header, columns=wanted):
        source = row.get(columns.image)
        texts: list[object] = []
        for name in columns.captions:
            value = _text(row.get(name))
            texts.extend(map(_text, value) if isinstance(value, list) else [value])
        cleaned = source.strip() if isinstance(source := _text(source), str) else ""
        encodable = cleaned.encode("utf-8", errors="replace").decode()  # a lone surrogate would fail the whole file
        yield Candidate(source=encodable, captions=clean_captions(texts), extra=_extra(row, columns.extra))


def _extra(row: Row, names: Sequence[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name in names:
        value = _text(row.get(name))
        if isinstance(value, str):
            value = clean_caption(value)[:_MAX_EXTRA]
        if isinstance(value, _KEPT_TYPES) and value != "":
            field = name.strip().lower().replace(" ", "_")
            kept[f"original_{field}" if field in _OURS else field] = value
    return kept


def _has_header(address: str, image_column: str, caption_fields: Sequence[str]) -> bool:
    """Whether the first row names columns: it holds a known or given name, or no image while the second row does."""
    first, second = first_cells(address)
    given = {image_column, *caption_fields} - {""}
    if given & set(first) or any(cell.strip().lower() in IMAGE_COLUMNS for cell in first):
        return True
    return not _has_image(first) and (_has_image(second) or bool(usual_caption_fields(first)))


def _has_image(cells: Iterable[str]) -> bool:
    return any(_LOOKS_LIKE_IMAGE.search(cell.strip()) for cell in cells)


def _image_column(address: str, names: Sequence[str], rows: Sequence[Row], given: str) -> str:
    if given and given in names:
        return given
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    usual = next((by_lower[name] for name in IMAGE_COLUMNS if name in by_lower), "")
    looking = _most_like_images(names, rows)
    if given or not (usual or looking):
        wanted = f"no column {given}" if given else "no column of image URLs or paths"
        raise ConfigError(f"image_column: {address} has {wanted}; its columns are {', '.join(names)}")
    return usual or looking


def _most_like_images(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The column with the most addresses, else with the most names of pictures: captions may be file names too."""
    scores = {}
    for name in names:
        values = [str(row.get(name, "")).strip() for row in rows]
        scores[name] = (sum(bool(_WEB.match(value)) for value in values), sum(_has_image([value]) for value in values))
    best = max(scores, key=scores.__getitem__, default="")
    return best if best and any(scores[best]) else ""


def _text(value: object) -> object:
    """Text of a cell that a writer stored as bytes; anything else as it is."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
