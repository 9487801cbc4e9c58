"""What stopped a run, in one sentence: Ray wraps a worker's error in its own, several times over."""

import errno
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from cogview.errors import CogViewError, StorageError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
RAY_DATA_NOTE = "Failed to apply UDF transform after"  # what Ray Data appends to the words of an error


def find_cause(error: BaseException) -> CogViewError | None:
    """The error of ours at the root of `error`, also when it comes from a worker; None for a defect.

    A full disk counts as ours whoever met it.
    """
    for found in _causes(error):
        if isinstance(found, CogViewError) and not hasattr(found, "cause"):  # Ray's double of ours has a cause
            words, note, _ = str(found).partition(RAY_DATA_NOTE)
            return type(found)(words.rstrip()) if note else found
        if isinstance(found, OSError) and found.errno in FULL_DISK:
            where = f"cannot write {found.filename}" if found.filename else "cannot write"
            return StorageError(f"{where}: {found.strerror}; free space or choose another --root")
    return None


def first_line(error: BaseException) -> str:
    """An error for a table or a file: ours by its message, others by their name and first line."""
    cause = find_cause(error)
    if cause is not None:
        return str(cause)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Isolated:
    """A block whose error stays in it, as `error`: for libraries that raise errors of every kind. Interrupts go on."""

    error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all errors behind it, each once, the nearest first."""
    waiting: list[BaseException] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        behind = [current.__cause__, current.__context__, getattr(current, "cause", None)]
        behind += [getattr(current, name, None) for name in ("training_failure", "controller_failure")]
        failures = getattr(current, "worker_failures", None)  # of Ray Train: rank -> error
        behind += list(failures.values()) if isinstance(failures, dict) else []
        waiting += [item for item in behind if isinstance(item, BaseException)]
