"""Where data lies: local paths, globs of them, and addresses of file systems (s3://, gs://, hdfs://, http:// ...).

In: what a user types. Out: the files behind it, in a fixed order, and streams to read them. File systems that pyarrow
brings are taken from there, all others from fsspec, if its package for them is installed.
"""

import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from cogview.errors import ConfigError

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_REMOTE = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:(//|:)")
_WILD = re.compile(r"[*?\[]")
_HIDDEN = ("_", ".")  # `_SUCCESS`, `.crc`: what writers leave beside the data


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file. address: absolute path or URI; size: bytes, -1 if the file system does not say; modified: ns, or 0."""

    address: str
    size: int
    modified: int

    @property
    def name(self) -> str:
        return self.address.rstrip("/").rpartition("/")[2]


def addresses_of(given: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None) -> tuple[str, ...]:
    """One path, several or none as a tuple of strings."""
    if given is None:
        return ()
    if isinstance(given, (str, os.PathLike)):
        return (os.fspath(given),)
    return tuple(os.fspath(item) for item in given)


def is_remote(address: str) -> bool:
    """Whether this names a file system of its own, such as s3://bucket/key or zip::/archive.zip."""
    return bool(_REMOTE.match(address))


def absolute(address: str) -> str:
    """A local path made absolute; a remote address as it is."""
    return address.rstrip("/") if is_remote(address) else os.path.abspath(address)


def local_folder(addresses: Sequence[str]) -> Path | None:
    """The one local path that is meant, if it is one and has no wildcards."""
    if len(addresses) != 1 or is_remote(addresses[0]):
        return None
    path = Path(addresses[0])
    return path if path.exists() or not _WILD.search(addresses[0]) else None


def find_files(addresses: Sequence[str], *, suffixes: Sequence[str], setting: str) -> list[DataFile]:
    """The files that are meant: those given in their order, those of a folder or a glob by name.

    suffixes: of the files taken from folders (none: all); a compressed one counts as what it holds. ConfigError names
    the address where there is nothing, or whose file system does not answer.
    """
    found: dict[str, DataFile] = {}
    for address in addresses:
        files = _find(absolute(address), suffixes=suffixes, setting=setting)
        found.update((file.address, file) for file in files)
    return list(found.values())


def open_data(address: str) -> BinaryIO:
    """Open a file for reading, seekable. OSError as usual."""
    if not is_remote(address):
        return open(address, "rb")
    system, path = _system(address, setting="data")
    stream = cast(Any, io.BufferedReader(system.open_input_file(path)))
    stream.system = system  # some file systems close their files when nobody holds them any more
    return cast(BinaryIO, stream)


def open_decompressed(address: str) -> BinaryIO:
    """Open a file for reading from start to end, decompressed if its name says so."""
    stream = open_data(address)
    codec = COMPRESSIONS.get(os.path.splitext(address)[1].lower())
    if codec is None:
        return stream
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream), codec)))


def suffix_of(address: str) -> str:
    """`.csv` of `/data/List.CSV.gz`: the lower-case suffix of what is inside."""
    stem, suffix = os.path.splitext(address.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def beside(address: str, name: str) -> str:
    """The address of `name` (a relative path) in the folder that holds the file `address`."""
    own, archive, outer = address.partition("::")
    folder, slash, _ = own.rpartition("/")
    return f"{folder}{slash}{name}{archive}{outer}"


def _find(address: str, *, suffixes: Sequence[str], setting: str) -> list[DataFile]:
    system, path = _system(address, setting=setting)
    by_path = partial(_data_file, address=address, path=path)
    try:
        info = system.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [by_path(info)]
        if info.type == pafs.FileType.Directory:
            infos = system.get_file_info(pafs.FileSelector(path))
            wanted = [item for item in infos if _is_wanted(item, suffixes)]
        elif _WILD.search(path):
            wanted = _matching(system, path)
        else:
            raise ConfigError(f"{setting}: {address} does not exist; give existing files, folders or patterns")
    except (OSError, pa.ArrowException, ImportError) as error:
        raise ConfigError(f"{setting}: {address} cannot be listed: {error}") from error
    if not wanted:
        kinds = f" ending in {', '.join(suffixes)}" if suffixes else ""
        raise ConfigError(f"{setting}: {address} holds no files{kinds}")
    return [by_path(item) for item in sorted(wanted, key=lambda item: item.path)]


def _matching(system: pafs.FileSystem, pattern: str) -> list[pafs.FileInfo]:
    wild = _WILD.search(pattern)
    base = (pattern[: wild.start()] if wild else pattern).rpartition("/")[0]
    is_deep = "/" in pattern[len(base) + 1 :]
    selector = pafs.FileSelector(base or "/", recursive=is_deep, allow_not_found=True)
    matches = re.compile(_expression(pattern)).fullmatch
    files = (info for info in system.get_file_info(selector) if info.type == pafs.FileType.File)
    return [info for info in files if matches(info.path)]


def _expression(pattern: str) -> str:
    """A shell pattern as a regular expression: `*` and `?` stop at a slash, `**/` is any number of folders."""
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(known.get(part) or (_character_set(part) if _is_set(part) else re.escape(part)) for part in parts)


def _is_set(part: str) -> bool:
    return part.startswith("[") and part.endswith("]")


def _character_set(part: str) -> str:
    negated = part[1] == "!"
    inside = part[2 if negated else 1 : -1].replace("\\", r"\\").replace("^", r"\^").replace("[", r"\[")
    return f"[{'^' if negated else ''}{inside}]"


def _system(address: str, *, setting: str) -> tuple[pafs.FileSystem, str]:
    if not is_remote(address):
        return pafs.LocalFileSystem(), address
    try:
        return cast(tuple[pafs.FileSystem, str], pafs.FileSystem.from_uri(address))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass  # none of pyarrow's own
    except OSError as error:
        raise ConfigError(f"{setting}: {address} cannot be reached: {error}") from error
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(address)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"{setting}: {address} cannot be reached: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), path


def _is_wanted(info: pafs.FileInfo, suffixes: Sequence[str]) -> bool:
    is_file = info.type == pafs.FileType.File
    is_data = not suffixes or suffix_of(info.path) in suffixes
    return is_file and is_data and not info.base_name.startswith(_HIDDEN)


def _data_file(info: pafs.FileInfo, *, address: str, path: str) -> DataFile:
    """A file below the address that was given, addressed in the same way."""
    found, asked = (info.path, path) if path in address else (quote(info.path), quote(path))
    size = info.size if info.size is not None else -1
    return DataFile(address=address.replace(asked, found, 1), size=size, modified=info.mtime_ns or 0)
