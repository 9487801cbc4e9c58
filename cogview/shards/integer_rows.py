"""Token rows as the releases of CogView and CogView2 store them: files of int32 rows, without a header.

* CogView's "CompactBinary": 64 text ids, -1 where there is none, then the codes of 32 x 32; command tokens are added
  when it is read. Text ids have the vocabulary's offset (8192) already.
* CogView2: 512 ids, of which 400 are the codes of 20 x 20. The text before them may be in two languages with a pad
  between, and has a pad at its end in any case.

In: such rows, or texts and codes. Out: the other one, checked. The numbers are little-endian, as on the machines that
wrote them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError, SchemaError

INT32 = np.dtype("<i4")
Layout = Literal["cogview", "cogview2"]
TEXT_SLOTS: dict[str, int] = {"cogview": 64, "cogview2": 112}
GRIDS: dict[str, int] = {"cogview": 32, "cogview2": 20}
PAD_PIECE = 3  # of icetk, whose <pad> is the id 20003


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """How a row is laid out. grid: codes along one side; num_image_codes: also the offset of text ids."""

    layout: Layout
    grid: int
    num_image_codes: int
    num_text_pieces: int

    def __post_init__(self) -> None:
        if self.layout not in TEXT_SLOTS:
            raise ConfigError(f"layout is {self.layout!r}; there are {' and '.join(TEXT_SLOTS)}")

    @property
    def text_slots(self) -> int:
        """Ids before the codes."""
        return TEXT_SLOTS[self.layout]

    @property
    def length(self) -> int:
        """Ids of a row: 1,088 in CogView, 512 in CogView2."""
        return self.text_slots + self.grid**2

    @property
    def max_text(self) -> int:
        """The longest text that a row takes; CogView2's have a pad behind."""
        return self.text_slots - (self.layout == "cogview2")

    @property
    def pad(self) -> int:
        """What stands where there is no text."""
        return -1 if self.layout == "cogview" else self.num_image_codes + PAD_PIECE


def map_rows(path: Path, *, layout: RowLayout) -> npt.NDArray[np.int32]:
    """The rows of a file, int32 [rows, length], mapped. SchemaError if its size is no whole number of rows."""
    size, row_bytes = path.stat().st_size, INT32.itemsize * layout.length
    if size == 0 or size % row_bytes:
        raise SchemaError(
            f"{path} has {size} bytes, no whole number of rows of {layout.length} int32; it is cut, or of another "
            "layout or grid"
        )
    return np.memmap(path, dtype=INT32, mode="r").reshape(-1, layout.length)


def read_row(row: npt.NDArray[np.int32], *, layout: RowLayout) -> tuple[list[list[int]], npt.NDArray[np.uint16]] | str:
    """The texts of a row, as pieces of the text tokenizer, and its codes; or why it has none.

    Reasons: codes_out_of_range, text_out_of_range, text_missing.
    """
    ids, codes = row[: layout.text_slots], row[layout.text_slots :]
    if int(codes.min()) < 0 or int(codes.max()) >= layout.num_image_codes:
        return "codes_out_of_range"
    is_text = ids != layout.pad
    pieces = ids[is_text] - layout.num_image_codes
    if not pieces.size:
        return "text_missing"
    if int(pieces.min()) < 0 or int(pieces.max()) >= layout.num_text_pieces:
        return "text_out_of_range"
    # A text begins wherever one id is text and the one before is not.
    begins = np.flatnonzero(is_text & ~np.concatenate([[False], is_text[:-1]]))
    numbers = np.searchsorted(begins, np.flatnonzero(is_text), side="right")
    texts = [pieces[numbers == number].tolist() for number in range(1, len(begins) + 1)]
    if layout.layout == "cogview":
        texts = [pieces.tolist()]
    return texts, codes.astype(np.uint16)


def write_rows(
    texts: Sequence[npt.NDArray[np.int32]], codes: npt.NDArray[np.uint16], *, layout: RowLayout
) -> npt.NDArray[np.int32]:
    """Rows, int32 [rows, length], of texts (pieces, cut to `max_text`) and codes uint16 [rows, grid * grid]."""
    rows = np.full((len(texts), layout.length), layout.pad, INT32)
    for row, pieces in zip(rows, texts, strict=True):
        kept = pieces[: layout.max_text]
        row[: len(kept)] = kept + layout.num_image_codes
    rows[:, layout.text_slots :] = codes
    return rows
