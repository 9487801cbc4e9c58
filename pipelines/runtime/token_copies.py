"""Token shards that lie elsewhere, copied to a local disk once and read from there.

Training reads rows in a random order, two kilobytes at a time, which no object store answers quickly. So each machine
copies a remote folder of shards before it trains: into a folder named after the manifest's digest, so that other
content never takes the place of the old. Every file must have the sha256 that the manifest says. A copy that was
interrupted goes on with the files that are missing; the workers of one machine wait for the one that copies.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogview.errors import ConfigError, ManifestError
from cogview.locations import beside, is_remote, open_data
from cogview.shards.manifest import MANIFEST_NAME, atomic_file, listed_files, read_sealed
from pipelines.runtime.locks import folder_lock

logger = logging.getLogger(__name__)
DIGEST_LENGTH = 16
TRIES = 3
PAUSE_S = 1.0  # before the second try; twice as long before the third
BLOCK = 2**20


def local_copies(addresses: Sequence[str | Path], *, cache: Path | None = None) -> list[Path]:
    """The folders themselves, or where the copies of remote ones lie once this returns.

    cache: None for `tokens` in COGVIEW_CACHE, or else in ~/.cache/cogview. Raises ConfigError when an address cannot be
    read or the disk is too small, ManifestError when what came is not what the manifest says.
    """
    if cache is None:
        cache = Path(os.environ.get("COGVIEW_CACHE", "~/.cache/cogview")).expanduser() / "tokens"
    return [_copy(str(address), cache=cache) if is_remote(str(address)) else Path(address) for address in addresses]


def _copy(address: str, *, cache: Path) -> Path:
    manifest_address = f"{address.rstrip('/')}/{MANIFEST_NAME}"
    content = _read(manifest_address)
    folder = cache / hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, is_patient=True):
        with atomic_file(folder / MANIFEST_NAME) as file:
            file.write(content)
        records = listed_files(read_sealed(folder / MANIFEST_NAME), path=folder / MANIFEST_NAME)
        missing = {name: record for name, record in records.items() if not _is_there(folder / name, record)}
        _require_space(folder, missing, address=address)
        for number, (name, record) in enumerate(missing.items(), start=1):
            _fetch(beside(manifest_address, name), folder / name, record)
            logger.info("copied %s (%d of %d files of %s)", name, number, len(missing), address)
    return folder


def _is_there(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file was copied whole: it was checked before it got its name."""
    return path.is_file() and path.stat().st_size == record["bytes"]


def _require_space(folder: Path, missing: Mapping[str, Mapping[str, Any]], *, address: str) -> None:
    needed, free = sum(record["bytes"] for record in missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{address} needs {needed / 1e9:.1f} GB under {folder.parent}, where {free / 1e9:.1f} GB are free; set "
            "COGVIEW_CACHE to a folder on a larger disk"
        )


def _fetch(address: str, path: Path, record: Mapping[str, Any]) -> None:
    """Copy one file. ManifestError if it is not the one that the manifest knows."""
    for attempt in range(TRIES):
        try:
            with open_data(address) as stream, atomic_file(path) as file:
                digest, size = hashlib.sha256(), 0
                while block := stream.read(BLOCK):
                    digest.update(block)
                    size += file.write(block)
                if {"bytes": size, "sha256": digest.hexdigest()} != record:
                    raise ManifestError(
                        f"{address} has {size} bytes and sha256 {digest.hexdigest()[:12]}, its manifest says "
                        f"{record['bytes']} and {record['sha256'][:12]}; write the shards there again"
                    )
            return
        except OSError as error:
            _pause_or_raise(address, error, attempt)


def _read(address: str) -> bytes:
    for attempt in range(TRIES):
        try:
            with open_data(address) as stream:
                return stream.read()
        except OSError as error:
            _pause_or_raise(address, error, attempt)
    raise AssertionError("the last try returns or raises")


def _pause_or_raise(address: str, error: OSError, attempt: int) -> None:
    if isinstance(error, FileNotFoundError) or attempt + 1 == TRIES:
        raise ConfigError(f"{address} cannot be read: {error}") from error
    logger.warning("%s: %s; trying again", address, error)
    time.sleep(PAUSE_S * 2**attempt)
