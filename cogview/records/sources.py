"""What kind of data a user's paths hold: WebDataset tars, pictures with texts, or tables; and the files of it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogview.errors import ConfigError
from cogview.locations import DataFile, addresses_of, find_files, is_remote, local_folder, suffix_of
from cogview.records.folders import list_images
from cogview.records.table_rows import TABLE_SUFFIXES

SourceKind = Literal["tars", "images", "table"]
# In a folder a .txt is the caption of a picture, and a .json may be anything's statistics.
TABLES_IN_FOLDERS = tuple(suffix for suffix in TABLE_SUFFIXES if suffix not in (".txt", ".json"))

Given = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A user's data. files: tars or tables, in order; folder: of pictures."""

    kind: SourceKind
    files: tuple[DataFile, ...] = ()
    folder: Path = Path()


def detect_source(data: Given) -> Source:
    """The kind of a user's data and its files: one path or several, folders, globs, remote addresses.

    ConfigError says what is missing, what is mixed, and what would do.
    """
    addresses = addresses_of(data)
    path = local_folder(addresses)
    if path is not None and not path.exists():
        raise ConfigError(f"data: {path} does not exist; give an existing file or folder")
    if path is not None and path.is_dir():
        return _detect_folder(path)
    files = find_files(addresses, suffixes=(".tar", *TABLES_IN_FOLDERS), setting="data")
    if any(suffix_of(file.address) == ".tar" for file in files):  # its tables are what img2dataset writes beside tars
        given = {str(Path(item).absolute()) for item in addresses if not is_remote(item)}
        files = [file for file in files if suffix_of(file.address) == ".tar" or file.address in given]
    kinds = {_kind_of(file) for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"data: {', '.join(addresses)} has tars and tables; import one kind at a time")
    return Source(kind=kinds.pop(), files=tuple(files))


def find_tables(tables: Given) -> list[DataFile]:
    """The tables that are meant by paths, folders, globs and remote addresses. ConfigError where there are none."""
    files = find_files(addresses_of(tables), suffixes=TABLES_IN_FOLDERS, setting="table")
    wrong = [file.name for file in files if suffix_of(file.address) not in TABLE_SUFFIXES]
    if wrong:
        raise ConfigError(
            f"table: {wrong[0]} is no table ({', '.join(TABLE_SUFFIXES)}); give tables of addresses alone"
        )
    return files


def _detect_folder(path: Path) -> Source:
    if not any(path.iterdir()):
        raise ConfigError(f"data: {path} is an empty folder; put tars, pictures with .txt files or a table there")
    names = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith((".", "_")))
    tars = [str(item) for item in names if item.suffix.lower() == ".tar"]
    tables = [str(item) for item in names if suffix_of(item.name) in TABLES_IN_FOLDERS]
    if tars:
        return Source(kind="tars", files=tuple(find_files(tars, suffixes=(".tar",), setting="data")))
    if tables and not any(path.glob("*.txt")):
        return Source(kind="table", files=tuple(find_files(tables, suffixes=TABLE_SUFFIXES, setting="data")))
    list_images(path)
    return Source(kind="images", folder=path)


def _kind_of(file: DataFile) -> SourceKind:
    suffix = suffix_of(file.address)
    if suffix == ".tar":
        return "tars"
    if suffix in TABLE_SUFFIXES:
        return "table"
    raise ConfigError(
        f"data: {file.name} is neither a .tar nor a table ({', '.join(TABLE_SUFFIXES)}); "
        "for a single picture give the folder that holds it and its .txt"
    )
