"""One id space for image codes, text pieces and command tokens.

In: how many codes the image tokenizer has, and how many pieces the text tokenizer. Out: which id means what. The
layout is CogView's: image codes first, then text pieces, then 27 command tokens in a fixed order, then unused rows that
pad the embedding table to a multiple of 128 for each model-parallel part. With CogView's sizes (8192 codes, 50,000
pieces) every id is that of the released checkpoints.
"""

import difflib
import hashlib
import json
from dataclasses import dataclass

from cogview.errors import VocabularyError

# The order is that of the released checkpoints: a command token's place in it is its id.
COMMAND_NAMES: tuple[str, ...] = (
    *("PAD", "BOI1", "BOI2", "BOI3", "EOI1", "EOI2", "EOI3", "ROI1", "ROI2", "ROI3"),
    *("SEP", "MASK", "CLS", "ENC"),
    *("TINY", "SMALL", "BASE", "BIG"),  # image sizes of 8x8, 16x16, 32x32, 64x64 codes
    *(f"POS{index}" for index in range(9)),  # places of the parts of a larger image
)
ROW_MULTIPLE = 128  # embedding rows of each model-parallel part are a multiple of this


@dataclass(frozen=True)
class Vocabulary:
    """The id layout for any codebook and any text tokenizer.

    num_image_codes: size of the codebook; num_text_pieces: pieces of the text tokenizer, its own specials included;
    model_parallel_size: over how many parts the embedding table is cut, which matters for the padding only.
    Raises VocabularyError for a size below 1.
    """

    num_image_codes: int = 8192
    num_text_pieces: int = 50_000
    model_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_image_codes", "num_text_pieces", "model_parallel_size"):
            if getattr(self, name) < 1:
                raise VocabularyError(f"{name} is {getattr(self, name)}; a vocabulary needs at least 1")

    @property
    def image_ids(self) -> range:
        """Ids of image codes. They start at 0, so a code is its own id."""
        return range(self.num_image_codes)

    @property
    def text_ids(self) -> range:
        """Ids of text pieces: piece `p` of the text tokenizer has id `text_offset + p`."""
        return range(self.num_image_codes, self.num_image_codes + self.num_text_pieces)

    @property
    def command_ids(self) -> range:
        """Ids of the command tokens, in the order of `command_names`."""
        return range(self.text_ids.stop, self.text_ids.stop + len(COMMAND_NAMES))

    @property
    def text_offset(self) -> int:
        """What is added to a piece of the text tokenizer to make it an id."""
        return self.num_image_codes

    @property
    def command_names(self) -> tuple[str, ...]:
        """Names of the command tokens, in the order of their ids."""
        return COMMAND_NAMES

    def command(self, name: str) -> int:
        """The id of a command token, such as `command("ROI1")`. VocabularyError for a name that there is not."""
        if name in COMMAND_NAMES:
            return self.command_ids[COMMAND_NAMES.index(name)]
        near = difflib.get_close_matches(name.upper(), COMMAND_NAMES, n=1, cutoff=0.0)[0]
        raise VocabularyError(
            f"there is no command token {name!r}; did you mean {near!r}? All: {', '.join(COMMAND_NAMES)}"
        )

    @property
    def num_ids(self) -> int:
        """How many ids have a meaning; those from here up to `size` are unused rows."""
        return self.command_ids.stop

    @property
    def size(self) -> int:
        """Rows of the embedding table, unused rows included."""
        multiple = ROW_MULTIPLE * self.model_parallel_size
        return -(-self.num_ids // multiple) * multiple

    @property
    def fingerprint(self) -> str:
        """sha256 over what each id means. The padding is left out: it changes no token."""
        layout = [
            ["image", self.image_ids.start, self.image_ids.stop],
            ["text", self.text_ids.start, self.text_ids.stop],
            ["command", self.command_ids.start, list(COMMAND_NAMES)],
        ]
        return hashlib.sha256(json.dumps(layout, separators=(",", ":")).encode()).hexdigest()

    def describe(self, token_id: int) -> str:
        """What an id means, for people: `[BASE]`, `image code 17`. VocabularyError for an id outside the table."""
        if token_id in self.image_ids:
            return f"image code {token_id}"
        if token_id in self.text_ids:
            return f"text piece {token_id - self.text_offset}"
        if token_id in self.command_ids:
            return f"[{COMMAND_NAMES[token_id - self.command_ids.start]}]"
        if token_id in range(self.num_ids, self.size):
            return f"unused row {token_id}"
        raise VocabularyError(f"id {token_id} is outside the vocabulary, which has ids 0 to {self.size - 1}")
