"""Features of many pictures, in files of a few thousand rows each, read in pieces: memory does not grow with them.

In: `.npy` files of float32 [rows, D]. Out: batches in their order, or rows by number. A file is mapped only while rows
are taken from it.
"""

# N pictures, D feature, B rows of a batch

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cogview.errors import SchemaError

Features = npt.NDArray[np.float32]
BATCH = 2048


class FeatureRows:
    """The rows of several files as one table [N, D]. An array may stand for a file."""

    def __init__(self, parts: Sequence[Path | Features]) -> None:
        """SchemaError for parts of different widths, for a file that is no table of float32, and without a row."""
        self._parts = list(parts)
        shapes = [_open(part).shape for part in self._parts]
        widths = {shape[1] for shape in shapes}
        if len(widths) > 1:
            raise SchemaError(f"features of {' and '.join(map(str, sorted(widths)))} numbers; one extractor has one")
        self._ends = np.cumsum([shape[0] for shape in shapes], dtype=np.int64)
        if not len(self):
            raise SchemaError("there are no features: no picture could be read; look into the reasons of the shards")
        self.dim = int(widths.pop())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def batches(self, *, size: int = BATCH) -> Iterator[Features]:
        """All rows in their order, [B, D] each, `size` together but for the last; files may be smaller."""
        waiting: list[Features] = []
        for part in self._parts:
            rows, start = _open(part), 0
            while start < len(rows):
                stop = start + size - sum(map(len, waiting))
                waiting.append(np.array(rows[start:stop]))
                start = stop
                if sum(map(len, waiting)) == size:
                    yield np.concatenate(waiting)
                    waiting = []
            del rows
        if waiting:
            yield np.concatenate(waiting)

    def take(self, numbers: npt.NDArray[np.int64]) -> Features:
        """The rows with these numbers, in this order."""
        taken = np.empty((len(numbers), self.dim), np.float32)
        owners = np.searchsorted(self._ends, numbers, side="right")
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            rows = _open(self._parts[owner])
            taken[places] = rows[numbers[places] - (int(self._ends[owner]) - len(rows))]
            del rows
        return taken


def _open(part: Path | Features) -> Features:
    if isinstance(part, Path):
        try:
            rows: Features = np.load(part, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise SchemaError(f"{part} is no table of features ({error}); delete it and run the job again") from error
    else:
        rows = part
    if rows.ndim != 2 or rows.dtype != np.float32:
        raise SchemaError(f"features are {rows.dtype} {list(rows.shape)}, not float32 [rows, numbers]")
    return rows
