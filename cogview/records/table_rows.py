"""The rows of a table file, one mapping of column name -> value after the other, whatever the file is.

Parquet, CSV, TSV, JSON lines, a JSON array, COCO's captions JSON; on this machine or on a remote file system,
compressed or not. Rows are streamed; bad ones come out as empty rows, never as an error. What makes a whole file
unreadable is a ConfigError.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.errors import ConfigError
from cogview.locations import open_data, open_decompressed, suffix_of

TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
SEPARATED = (".csv", ".tsv", ".txt")
MAX_LINE = 1024 * 1024
MAX_JSON_BYTES = 2 * 2**30  # of a .json, which is read whole; COCO's largest has 92 MB
MAX_COLUMN_BYTES = 2**30  # of one column in one row group, decompressed
PROBED_ROWS = 100
_BATCH_ROWS = 4096

Row = Mapping[str, Any]


def table_rows(address: str, *, has_header: bool, columns: Sequence[str] | None) -> Iterator[Row]:
    """Every row of a table in order; of Parquet only the named columns are read (None: all)."""
    suffix = suffix_of(address)
    if suffix == ".parquet":
        return _parquet_rows(address, columns)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(address)
    if suffix == ".json":
        return _json_rows(address)
    if suffix in SEPARATED:
        return _separated_rows(address, has_header=has_header)
    raise ConfigError(f"data: {address} is no table; its name should end in {', '.join(TABLE_SUFFIXES)}")


def first_cells(address: str) -> tuple[list[str], list[str]]:
    """The cells of the first two lines of a CSV or TSV, of which the first may be a header."""
    first, second = itertools.islice(itertools.chain(_cells(address), [[], []]), 2)
    return first, second


def _parquet_rows(address: str, columns: Sequence[str] | None) -> Iterator[Row]:
    try:
        with open_data(address) as stream, pq.ParquetFile(stream) as parquet:
            names = parquet.schema_arrow.names
            if len(set(names)) != len(names):
                raise ConfigError(f"data: {address} has two columns of one name among {', '.join(names)}; rename one")
            wanted = [name for name in names if _is_plain(parquet.schema_arrow.field(name).type)]
            wanted = [name for name in wanted if columns is None or name in columns]
            _refuse_bombs(parquet, wanted, address=address)
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"data: {address} cannot be read as Parquet: {error}") from error


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values of this type are text, numbers or lists of them: an extension type may unpickle what it reads."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not isinstance(kind, pa.BaseExtensionType) and not pa.types.is_nested(kind)


def _refuse_bombs(parquet: pq.ParquetFile, columns: Sequence[str], *, address: str) -> None:
    metadata = parquet.metadata
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            if chunk.path_in_schema.split(".")[0] in columns and chunk.total_uncompressed_size > MAX_COLUMN_BYTES:
                raise ConfigError(
                    f"data: {address}: column {chunk.path_in_schema} takes {chunk.total_uncompressed_size} bytes in "
                    f"one row group, more than {MAX_COLUMN_BYTES}; write it with smaller row groups"
                )


def _json_lines(address: str) -> Iterator[Row]:
    for line in _lines(address):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = {}
        if row is not None:
            yield row if isinstance(row, dict) else {}


def _json_rows(address: str) -> Iterator[Row]:
    """A file that is one JSON document: an array of rows, or COCO's images and annotations; else JSON lines."""
    try:
        with open_decompressed(address) as stream:
            content = stream.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ConfigError(f"data: {address} has more than {MAX_JSON_BYTES} bytes; write it as JSON lines (.jsonl)")
        document = json.loads(content)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise ConfigError(f"data: {address} cannot be read as JSON: {error}") from error
        return _json_lines(address)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"data: {address} cannot be read as JSON: {error}") from error
    if isinstance(document, list):
        return (row if isinstance(row, dict) else {} for row in document)
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        return _coco_rows(document)
    return iter([document] if isinstance(document, dict) else [])


def _coco_rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """COCO captions: one row for each image, with all its captions and the name and address of its licence."""
    captions: dict[Any, list[Any]] = {}
    for annotation in _mappings(document.get("annotations")):
        captions.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
    licences = {str(licence.get("id")): licence for licence in _mappings(document.get("licenses"))}
    for image in _mappings(document["images"]):
        licence = licences.get(str(image.get("license")), {})
        addresses = {name: image[name] for name in ("coco_url", "flickr_url", "file_name") if image.get(name)}
        yield {
            **addresses,
            "captions": captions.get(str(image.get("id")), []),
            "license": licence.get("name"),
            "license_url": licence.get("url"),
        }


def _mappings(items: object) -> Iterator[Mapping[str, Any]]:
    return (item for item in (items if isinstance(items, list) else []) if isinstance(item, dict))


def _separated_rows(address: str, *, has_header: bool) -> Iterator[Row]:
    """Rows by column name. Cells beyond the last column belong to it: captions with unquoted commas."""
    cells = _cells(address)
    separator = "," if suffix_of(address) == ".csv" else " "
    names = next(cells, []) if has_header else []
    if not names:
        first = list(itertools.islice(cells, PROBED_ROWS))
        width = min((len(values) for values in first if len(values) > 1), default=1)
        names = [f"column_{index}" for index in range(1, width + 1)]
        cells = itertools.chain(first, cells)
    for values in cells:
        if values:
            last = len(names) - 1
            yield dict(zip(names, [*values[:last], separator.join(values[last:])], strict=False))


def _cells(address: str) -> Iterator[list[str]]:
    """Cells of each row. Tabs separate without quoting, as in the captions of the wild; commas with it."""
    if suffix_of(address) != ".csv":
        for line in _lines(address):
            yield line.rstrip("\r\n").split("\t")
        return
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(_lines(address))
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield [""]


def _lines(address: str) -> Iterator[str]:
    """Lines of text; what is longer than a megabyte becomes an empty one."""
    try:
        stream = open_decompressed(address)
        with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="") as file:
            while line := file.readline(MAX_LINE):
                if line.endswith("\n") or len(line) < MAX_LINE:
                    yield line.replace("\0", "")
                    continue
                while line and not line.endswith("\n"):
                    line = file.readline(MAX_LINE)
                yield "\n"
    except (OSError, EOFError, pa.ArrowException) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"data: {address} cannot be read: {words}") from error
