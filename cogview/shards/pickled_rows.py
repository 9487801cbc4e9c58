"""Token rows in LMDB as the first tools of CogView wrote them: pickles, read without running anything in them.

Keys are "0", "1", ...; "length" says how many. A value is a pickle of (text, codes): a string or ids with the
vocabulary's offset, and an array or list of codes. A pickle may name any function to be called. Here every name stands
for one of three records that only remember what they are given; an array is then made from their bytes, if they are
those of integers. A pickle that names anything else is refused, and nothing of it is run.
"""

import io
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError, SchemaError

LENGTH_KEY = b"length"
PART = 2  # (text, codes)
# What hostile or damaged pickles make Python's reader raise; it calls nothing but what is below.
_DAMAGED = (EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError)


class _Dtype:
    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])

    def integer(self) -> np.dtype[Any]:
        """The numpy type. ValueError unless it is one of integers."""
        if not isinstance(self.code, str) or self.code.lstrip("<>|=") not in {"i1", "i2", "i4", "i8", "u1", "u2", "u4"}:
            raise ValueError(f"{self.code} is no type of integers")
        return np.dtype(self.code.lstrip("<>|=")).newbyteorder(">" if ">" in (self.order, self.code[:1]) else "<")


class _Array:
    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, data = state
        self.values = _integers(data, dtype, shape)


class _ArrayType:
    """Stands for `numpy.ndarray`, which is named and never called."""


def _integers(data: Any, dtype: Any, shape: Any, *_: object) -> npt.NDArray[np.integer[Any]]:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple):
        raise ValueError("no array of integers")
    values = np.frombuffer(data, dtype.integer())
    if math.prod(shape) != values.size:
        raise ValueError("an array of another size than its bytes")
    return values


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError("bytes of another encoding")
    return text.encode("latin1")


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _ArrayType,
    ("_codecs", "encode"): _encode,
    **{(module, "_reconstruct"): lambda *_: _Array() for module in _MULTIARRAY},
    **{(module, "_frombuffer"): _integers for module in _NUMERIC},
}


class _RowUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _KNOWN[module, name]


def read_pickled_row(data: bytes) -> tuple[str | list[int], npt.NDArray[np.int64]] | tuple[str]:
    """(text, codes) of a value; or (reason,): pickle_refused for one that names code, else pickle_damaged."""
    try:
        row = _RowUnpickler(io.BytesIO(data)).load()
        if not isinstance(row, tuple | list) or len(row) != PART:
            return ("pickle_damaged",)
        text = row[0] if isinstance(row[0], str) else _numbers(row[0]).tolist()
        return text, _numbers(row[1])
    except pickle.UnpicklingError as error:
        return ("pickle_refused" if str(error).startswith("it names") else "pickle_damaged",)
    except _DAMAGED:
        return ("pickle_damaged",)


def _numbers(value: Any) -> npt.NDArray[np.int64]:
    if isinstance(value, _Array):
        return value.values.astype(np.int64)
    values = np.asarray(value)
    if values.dtype.kind not in "iu":
        raise ValueError("no integers")
    return values.astype(np.int64).reshape(-1)


@contextmanager
def open_lmdb(path: Path) -> Iterator["PickledRows"]:
    """Open an LMDB folder or file for reading. ConfigError without the package `lmdb`, SchemaError if it is none."""
    try:
        import lmdb
    except ImportError as error:
        raise ConfigError("reading LMDB needs the package lmdb; pip install 'cogview[lmdb]'") from error
    try:
        environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, create=False)
    except lmdb.Error as error:
        raise SchemaError(f"{path} is no LMDB that can be read ({error})") from error
    with environment, environment.begin() as transaction:
        yield PickledRows(transaction, path=path)


class PickledRows:
    """The values of an open LMDB, by number."""

    def __init__(self, transaction: Any, *, path: Path) -> None:
        """Use `open_lmdb`. SchemaError if it does not say how many rows it has."""
        self._transaction = transaction
        length = transaction.get(LENGTH_KEY) or b""
        if not length.isdigit():
            raise SchemaError(f"{path} has no key 'length' with a number; it is no LMDB of CogView's rows")
        self._length = int(length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> bytes | None:
        """The pickle of a row; None if it is missing."""
        value = self._transaction.get(str(row).encode())
        return bytes(value) if value is not None else None
