"""CogView2's id space: image codes, then text pieces ordered by language, then the tokens that begin a segment.

In: how many codes and pieces there are, of each kind. Out: which id means what. The layout is icetk's: image codes,
common pieces (punctuation, digits, `<unk>`, `<pad>`), English, Chinese, rare ones (other scripts), and behind them the
three tokens that CogLM adds. With icetk's own numbers every id is the release's, up to its 150,010 embedding rows.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from cogview.errors import VocabularyError

Tongue = Literal["english", "chinese"]
PAD_PIECE = 3  # behind <unk>, <s> and </s>; also what ends a text
SPECIAL_NAMES = ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")  # in the order of their ids
ROW_MULTIPLE = 10  # the release has 150,010 rows for 150,003 ids


@dataclass(frozen=True, kw_only=True)
class TextRanges:
    """How many pieces of each kind a text tokenizer has, in the order of their ids. The defaults are icetk's."""

    common: int = 100
    english: int = 63_723
    chinese: int = 61_830
    rare: int = 4_347

    def __post_init__(self) -> None:
        if self.common <= PAD_PIECE or min(self.english, self.chinese, self.rare) < 0:
            raise VocabularyError(f"{self}: {PAD_PIECE + 1} common pieces or more, and none of a kind fewer than 0")

    @property
    def num_pieces(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


ICETK_RANGES = TextRanges()


@dataclass(frozen=True, kw_only=True)
class BilingualVocabulary:
    """The id layout for any codebook and any text tokenizer whose pieces are ordered so."""

    num_image_codes: int = 20_000
    text: TextRanges = ICETK_RANGES

    def __post_init__(self) -> None:
        if self.num_image_codes < 1:
            raise VocabularyError(f"num_image_codes is {self.num_image_codes}; a vocabulary needs at least 1")

    @property
    def image_ids(self) -> range:
        """Ids of image codes. They start at 0, so a code is its own id."""
        return range(self.num_image_codes)

    @property
    def text_ids(self) -> range:
        """Ids of text pieces of every kind: piece `p` of the text tokenizer has id `text_offset + p`."""
        return range(self.num_image_codes, self.num_image_codes + self.text.num_pieces)

    @property
    def common_ids(self) -> range:
        """Ids of what belongs to no language: specials, punctuation, digits."""
        return range(self.text_offset, self.text_offset + self.text.common)

    @property
    def english_ids(self) -> range:
        """Ids of English pieces."""
        return range(self.common_ids.stop, self.common_ids.stop + self.text.english)

    @property
    def chinese_ids(self) -> range:
        """Ids of Chinese pieces."""
        return range(self.english_ids.stop, self.english_ids.stop + self.text.chinese)

    @property
    def rare_ids(self) -> range:
        """Ids of pieces in other scripts."""
        return range(self.chinese_ids.stop, self.chinese_ids.stop + self.text.rare)

    @property
    def special_ids(self) -> range:
        """Ids of `SPECIAL_NAMES`, in their order."""
        return range(self.text_ids.stop, self.text_ids.stop + len(SPECIAL_NAMES))

    @property
    def text_offset(self) -> int:
        """What is added to a piece of the text tokenizer to make it an id."""
        return self.num_image_codes

    @property
    def pad(self) -> int:
        """The id that fills a row, and that ends a text."""
        return self.text_offset + PAD_PIECE

    @property
    def start_of_image(self) -> int:
        """The id before the codes of a picture that is drawn."""
        return self.special_ids[0]

    def start_of_text(self, tongue: Tongue) -> int:
        """The id before a text that is written in that language."""
        return self.special_ids[SPECIAL_NAMES.index(f"<start_of_{tongue}>")]

    def tongue_of(self, pieces: Sequence[int]) -> Tongue:
        """The language of a text: English if no piece of it comes behind the English ones, as in the release."""
        is_english = all(piece + self.text_offset < self.chinese_ids.start for piece in pieces)
        return "english" if is_english else "chinese"

    @property
    def num_ids(self) -> int:
        """How many ids have a meaning; those from here up to `size` are unused rows."""
        return self.special_ids.stop

    @property
    def size(self) -> int:
        """Rows of the embedding table, unused rows included."""
        return -(-self.num_ids // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def fingerprint(self) -> str:
        """sha256 over what each id means."""
        ranges = {
            name: getattr(self, f"{name}_ids") for name in ("image", "common", "english", "chinese", "rare", "special")
        }
        layout = [[name, ids.start, ids.stop] for name, ids in ranges.items()]
        return hashlib.sha256(json.dumps([layout, SPECIAL_NAMES], separators=(",", ":")).encode()).hexdigest()

    def describe(self, token_id: int) -> str:
        """What an id means, for people. VocabularyError for an id outside the table."""
        if token_id in self.image_ids:
            return f"image code {token_id}"
        for kind in ("common", "english", "chinese", "rare"):
            if token_id in getattr(self, f"{kind}_ids"):
                return f"{kind} text piece {token_id - self.text_offset}"
        if token_id in self.special_ids:
            return SPECIAL_NAMES[token_id - self.special_ids.start]
        if token_id in range(self.num_ids, self.size):
            return f"unused row {token_id}"
        raise VocabularyError(f"id {token_id} is outside the vocabulary, which has ids 0 to {self.size - 1}")
