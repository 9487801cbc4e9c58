"""Tables of images and captions: Parquet, CSV, TSV and JSON lines, with an image URL or path and caption columns.

Columns are found by their usual names or given. A file without a header (Conceptual Captions: caption<TAB>url) is
understood from its first rows. Rows are streamed; bad ones come out as rows without an image, never as an error.
"""

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.errors import ConfigError
from cogview.records.candidates import Candidate
from cogview.records.captions import clean_captions
from cogview.records.tars import IMAGE_SUFFIXES, usual_caption_fields

TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".txt")
IMAGE_COLUMNS = (
    "url",
    "image_url",
    "img_url",
    "image_path",
    "image",
    "path",
    "file",
    "filename",
    "file_name",
    "img",
    "src",
)
MAX_LINE = 1024 * 1024
_PROBED_ROWS = 100
_BATCH_ROWS = 4096
_LOOKS_LIKE_IMAGE = re.compile(rf"^https?://|\.({'|'.join(IMAGE_SUFFIXES)})$", re.IGNORECASE)
_WEB = re.compile(r"^\s*https?://", re.IGNORECASE)

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Where a table keeps what. is_web: its images are URLs; has_header: of CSV and TSV."""

    image: str
    captions: tuple[str, ...]
    is_web: bool
    has_header: bool = True


def inspect_table(path: Path, *, image_column: str = "", caption_fields: Sequence[str] = ()) -> TableColumns:
    """Find the columns of a table from its first rows. ConfigError lists the columns that there are."""
    has_header = path.suffix.lower() not in (".csv", ".tsv", ".txt") or _has_header(path, image_column, caption_fields)
    rows = list(itertools.islice(_rows(path, has_header=has_header, columns=None), _PROBED_ROWS))
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    if not rows:
        raise ConfigError(f"data: {path} has no rows")
    image = _image_column(path, names, rows, image_column)
    captions = tuple(caption_fields) or tuple(usual_caption_fields(name for name in names if name != image))
    if not captions and not has_header:
        captions = tuple(name for name in names if name != image)
    missing = [name for name in captions if name not in names]
    if missing or not captions:
        wanted = f"no column {', '.join(missing)}" if missing else "no caption column"
        raise ConfigError(
            f"caption_fields: {path} has {wanted}; its columns are {', '.join(names)}; name those that hold captions"
        )
    values = [str(row[image]) for row in rows if row.get(image)]
    is_web = sum(bool(_WEB.match(value)) for value in values) * 2 >= max(1, len(values))
    return TableColumns(image=image, captions=captions, is_web=is_web, has_header=has_header)


def read_table(path: Path, columns: TableColumns) -> Iterator[Candidate]:
    """Every row of a table as a candidate, in order; one without a readable image has the source ""."""
    wanted = (columns.image, *columns.captions)
    for row in _rows(path, has_header=columns.has_header, columns=wanted):
        source = row.get(columns.image)
        texts: list[object] = []
        for name in columns.captions:
            value = _text(row.get(name))
            texts.extend(map(_text, value) if isinstance(value, list) else [value])
        cleaned = source.strip() if isinstance(source := _text(source), str) else ""
        encodable = cleaned.encode("utf-8", errors="replace").decode()  # a lone surrogate would fail the whole file
        yield Candidate(source=encodable, captions=clean_captions(texts))


def _rows(path: Path, *, has_header: bool, columns: Sequence[str] | None) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix == ".jsonl":
        return _json_rows(path)
    if suffix in TABLE_SUFFIXES:
        return _separated_rows(path, has_header=has_header)
    raise ConfigError(f"data: {path} is no table; its name should end in {', '.join(TABLE_SUFFIXES)}")


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            if len(set(names)) != len(names):
                raise ConfigError(f"data: {path} has two columns of one name among {', '.join(names)}; rename one")
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"data: {path} cannot be read as Parquet: {error}") from error


def _json_rows(path: Path) -> Iterator[Row]:
    for line in _lines(path):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = {}
        if row is not None:
            yield row if isinstance(row, dict) else {}


def _separated_rows(path: Path, *, has_header: bool) -> Iterator[Row]:
    """Rows by column name. Cells beyond the last column belong to it: captions with unquoted commas."""
    cells = _cells(path)
    separator = "," if path.suffix.lower() == ".csv" else " "
    names = next(cells, []) if has_header else []
    if not names:
        first = list(itertools.islice(cells, _PROBED_ROWS))
        width = min((len(values) for values in first if len(values) > 1), default=1)
        names = [f"column_{index}" for index in range(1, width + 1)]
        cells = itertools.chain(first, cells)
    for values in cells:
        if values:
            last = len(names) - 1
            yield dict(zip(names, [*values[:last], separator.join(values[last:])], strict=False))


def _cells(path: Path) -> Iterator[list[str]]:
    """Cells of each row. Tabs separate without quoting, as in the captions of the wild; commas with it."""
    if path.suffix.lower() != ".csv":
        for line in _lines(path):
            yield line.rstrip("\r\n").split("\t")
        return
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(_lines(path))
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield [""]


def _lines(path: Path) -> Iterator[str]:
    """Lines of text; what is longer than a megabyte becomes an empty one."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            while line := file.readline(MAX_LINE):
                if line.endswith("\n") or len(line) < MAX_LINE:
                    yield line.replace("\0", "")
                    continue
                while line and not line.endswith("\n"):
                    line = file.readline(MAX_LINE)
                yield "\n"
    except OSError as error:
        raise ConfigError(f"data: {path} cannot be read: {error.strerror}") from error


def _has_header(path: Path, image_column: str, caption_fields: Sequence[str]) -> bool:
    """Whether the first row names columns: it holds a known or given name, or no image while the second row does."""
    first, second = itertools.islice(itertools.chain(_cells(path), [[], []]), 2)
    given = {image_column, *caption_fields} - {""}
    if given & set(first) or any(cell.strip().lower() in IMAGE_COLUMNS for cell in first):
        return True
    return not _has_image(first) and (_has_image(second) or bool(usual_caption_fields(first)))


def _has_image(cells: Iterable[str]) -> bool:
    return any(_LOOKS_LIKE_IMAGE.search(cell.strip()) for cell in cells)


def _image_column(path: Path, names: Sequence[str], rows: Sequence[Row], given: str) -> str:
    if given and given in names:
        return given
    by_lower = {name.strip().lower(): name for name in reversed(names)}
    usual = next((by_lower[name] for name in IMAGE_COLUMNS if name in by_lower), "")
    looking = next((name for name in names if _has_image([str(row.get(name, "")) for row in rows])), "")
    if given or not (usual or looking):
        wanted = f"no column {given}" if given else "no column of image URLs or paths"
        raise ConfigError(f"image_column: {path} has {wanted}; its columns are {', '.join(names)}")
    return usual or looking


def _text(value: object) -> object:
    """Text of a cell that a writer stored as bytes; anything else as it is."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
