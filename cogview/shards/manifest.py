"""Files that are whole or absent, and the manifest that says which of them are done.

Law of the doors: a shard is written under a temporary name, synced, renamed, and only then entered in a manifest of its
own (`_manifest/shard-00042.json`). Done means that the entry verifies. `manifest.json` closes a folder: it lists every
shard with its rows, rejects and sha256, and its own digest is the digest of the folder's content. Entries and manifests
are sealed: they hold a sha256 of the rest of themselves, so that no bit of them changes unseen.
"""

import errno
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from cogview.errors import ManifestError, StorageError

ENTRY_FOLDER = "_manifest"
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
TEMPORARY = ".tmp"
READ_AT_ONCE = 2**20
SEAL = "sha256_of_the_rest"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What is known of one finished shard. `rows_in == rows_out + sum(rejected.values())` unless rows are expanded."""

    shard: int
    rows_in: int
    rows_out: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> {"bytes": int, "sha256": str}
    input_digest: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def shard_name(shard: int, suffix: str) -> str:
    """`shard_name(42, "arrow")` is `shard-00042.arrow`."""
    return f"shard-{shard:05d}.{suffix}"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file, to be written from its start to its end, that appears under `path` whole and synced, or not at all.

    StorageError on a full disk, or where it reads back differently from what was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            checked = _Checked(file)
            yield cast(BinaryIO, checked)
            file.flush()
            os.fsync(file.fileno())
        checked.require(temporary, name=path)
        move(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise StorageError(f"cannot write {path}: {error.strerror}; free space or choose another output") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Rename, in the place of what is there. StorageError where the file system only says that it did."""
    os.replace(source, target)
    if source.exists():
        raise StorageError(f"{source} was not renamed to {target}; do not trust this file system")


class _Checked(io.BufferedIOBase):
    """A file on its way to the disk, with a checksum of what should arrive there."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._checksum = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._checksum = zlib.crc32(data, self._checksum)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def require(self, path: Path, *, name: Path) -> None:
        """StorageError unless the file at `path` holds what was written. name: that it will have."""
        found = 0
        with open(path, "rb") as file:
            while piece := file.read(READ_AT_ONCE):
                found = zlib.crc32(piece, found)
        if found != self._checksum:
            raise StorageError(f"{name} reads back differently from what was written; its disk or memory is failing")


def remove_temporary(folder: Path) -> None:
    """Remove what killed writers have left below a folder. No other process may be writing there."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        if not path.name.endswith(f".{os.getpid()}{TEMPORARY}"):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as readable JSON, atomically."""
    with atomic_file(path) as file:
        file.write(_json_bytes(value))


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain data as readable JSON with a sha256 of itself, atomically."""
    with atomic_file(path) as file:
        file.write(_sealed_bytes(values))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without the seal. ManifestError when a single byte of it has changed."""
    content, values = _read(path)
    if not isinstance(values, dict) or _sealed_bytes(values) != content:
        raise ManifestError(f"{path} is damaged or of an older version; delete its folder and run the job again")
    del values[SEAL]
    return values


def read_json(path: Path) -> Any:
    """Read JSON; ManifestError when the file is missing or cut."""
    return _read(path)[1]


def _read(path: Path) -> tuple[bytes, Any]:
    """A file's bytes, and what they mean as JSON."""
    try:
        content = path.read_bytes()
        return content, json.loads(content)
    except (FileNotFoundError, ValueError) as error:
        raise ManifestError(
            f"{path} is missing or damaged ({error}); delete its folder and run the job again"
        ) from error


def _sealed_bytes(values: Mapping[str, Any]) -> bytes:
    content = {name: value for name, value in values.items() if name != SEAL}
    digest = hashlib.sha256(_json_bytes(content)).hexdigest()
    return _json_bytes({**content, SEAL: digest})


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def file_record(path: Path) -> dict[str, Any]:
    """`{"bytes": ..., "sha256": ...}` of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_entry(folder: Path, entry: ShardEntry) -> None:
    """Enter a finished shard. Its files must lie in `folder` already."""
    write_sealed(folder / ENTRY_FOLDER / f"shard-{entry.shard:05d}.json", asdict(entry))


def write_plan(folder: Path, digests: Mapping[int, str], *, note: str) -> None:
    """Leave word of which shards there will be (number -> input digest), and of what is done to them."""
    write_json(folder / ENTRY_FOLDER / PLAN_NAME, {"note": note, "shards": digests})


def read_entry(folder: Path, shard: int, *, input_digest: str = "", deep: bool = False) -> ShardEntry | None:
    """The entry of a shard that is done, or None: absent, damaged, of another input, or its files do not match.

    deep: compare sha256 as well as sizes.
    """
    try:
        entry = ShardEntry(**read_sealed(folder / ENTRY_FOLDER / f"shard-{shard:05d}.json"))
    except (ManifestError, TypeError):  # absent, damaged or of an older version: the shard is made again
        return None
    if input_digest and entry.input_digest != input_digest:
        return None
    return entry if all(_matches(folder, name, record, deep) for name, record in entry.files.items()) else None


def write_manifest(folder: Path, entries: Sequence[ShardEntry], *, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Close a folder: totals, every entry, and what travels with the shards (`extra`: fingerprints, grid, ...)."""
    rejected: dict[str, int] = {}
    for entry in entries:
        for reason, count in entry.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    manifest = {
        "rows_in": sum(entry.rows_in for entry in entries),
        "rows_out": sum(entry.rows_out for entry in entries),
        "rejected": rejected,
        "shards": [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.shard)],
        "extra": dict(extra),
    }
    write_sealed(folder / MANIFEST_NAME, manifest)
    return manifest


def read_manifest(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """The folder's manifest after checking that every file it names is there. ManifestError names what is not."""
    path = folder / MANIFEST_NAME
    manifest = read_sealed(path)
    for name, record in listed_files(manifest, path=path).items():
        if not _matches(folder, name, record, deep):
            raise ManifestError(
                f"{folder / name} does not match {path.name} ({record}); delete it and run the job again"
            )
    return manifest


def listed_files(manifest: Any, *, path: Path) -> dict[str, dict[str, Any]]:
    """The files of all shards, relative to the manifest's folder, with their `file_record`.

    ManifestError, which names the manifest's path, if it is no manifest, or names a file outside its folder.
    """
    try:
        files = [item for entry in manifest["shards"] for item in entry["files"].items()]
        records = {name: {"bytes": int(record["bytes"]), "sha256": str(record["sha256"])} for name, record in files}
        manifest["extra"].keys()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{path} is not a manifest of shards; give the output folder of a job") from error
    outside = next((name for name in records if not _is_inside(name)), None)
    if outside is not None:
        raise ManifestError(f"{path} names {outside!r}, which is outside its folder; give the output folder of a job")
    return records


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _matches(folder: Path, name: str, record: Mapping[str, Any], deep: bool) -> bool:
    path = folder / name
    if not _is_inside(name) or not path.is_file() or path.stat().st_size != record["bytes"]:
        return False
    return not deep or file_record(path)["sha256"] == record["sha256"]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
