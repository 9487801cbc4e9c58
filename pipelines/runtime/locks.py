"""One writer for each output folder: two commands on the same run do not mix their bytes."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogview.errors import ConfigError

LOCK_NAME = ".lock"


@contextmanager
def folder_lock(folder: Path, *, is_patient: bool = False) -> Iterator[None]:
    """Hold the folder, or raise ConfigError if another live process does. The lock dies with its process.

    is_patient: wait for the other process instead.
    """
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
        except BlockingIOError as error:
            owner = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            raise ConfigError(f"{folder} is being written by process {owner}; wait for it or stop it") from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a live process holds the folder. Nothing is written."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
