"""Sequence layouts as data: a task *is* the order of its segments (CogView, sections 2.3 and 3, figure 3).

In: text ids and image codes of a row. Out: one list of vocabulary ids. Command tokens are named here and put in by
id, so no caption, whatever it says, can produce one. The text is what is cut when a row is too long; image tokens
never are.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError
from cogview.tokenizers.vocabulary import Vocabulary

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
IdSequence = Sequence[int] | npt.NDArray[np.int32] | npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint16]
ImageTokens = int | Sequence[int]  # of each image of a layout, in order; one number where all have the same


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of text or image tokens between command tokens.

    loss_weight: multiplies the loss of these tokens and of the command tokens around them, where they are the label;
    restarts: position ids begin again at 0 with the segment's first command token.
    """

    kind: Literal["text", "image"]
    before: tuple[str, ...]
    after: tuple[str, ...] = ()
    loss_weight: float = 1.0
    restarts: bool = False


def text(*commands: str, loss_weight: float = 1.0) -> Segment:
    """A text segment: command tokens, then the text. The next command token ends it, or a SEP of its own."""
    before = tuple(name for name in commands if name != "SEP")
    after = tuple(name for name in commands if name == "SEP")
    return Segment(kind="text", before=before, after=after, loss_weight=loss_weight)


def image(*commands: str, loss_weight: float = 1.0, restarts: bool = False) -> Segment:
    """An image segment: command tokens, its codes row by row, then the command tokens whose names begin with EOI."""
    before = tuple(name for name in commands if not name.startswith("EOI"))
    after = tuple(name for name in commands if name.startswith("EOI"))
    return Segment(kind="image", before=before, after=after, loss_weight=loss_weight, restarts=restarts)


@dataclass(frozen=True, init=False)
class SequenceLayout:
    """The segments of a task in their order."""

    segments: tuple[Segment, ...] = field(default_factory=tuple)

    def __init__(self, *segments: Segment) -> None:
        object.__setattr__(self, "segments", segments)

    def overhead(self) -> int:
        """How many command tokens the layout has."""
        return sum(len(segment.before) + len(segment.after) for segment in self.segments)

    def text_budget(self, *, length: int, num_image_tokens: ImageTokens) -> int:
        """How many text tokens fit into sequences of `length`. ConfigError when not even one does.

        CogView's 1089 tokens leave 61 for the text: 1089 - 1024 codes - 4 command tokens.
        """
        num_codes = sum(self._image_lengths(num_image_tokens))
        budget = length - self.overhead() - num_codes
        if budget < 1:
            raise ConfigError(
                f"sequences of {length} tokens leave {budget} for the text beside {num_codes} image tokens and "
                f"{self.overhead()} command tokens; make them at least {length - budget + 1} long"
            )
        return budget

    def prompt_ids(
        self, text_ids: IdSequence, codes: Sequence[Codes] = (), *, vocabulary: Vocabulary, max_text: int
    ) -> list[int]:
        """Everything up to the first token of the last segment. `codes`: one flat array for each image before it.

        For `text_to_image`: ROI1, the text, BASE, BOI1; the codes are then generated.
        """
        ids: list[int] = []
        images = iter(codes)
        for segment in self.segments[:-1]:
            ids += [vocabulary.command(name) for name in segment.before]
            if segment.kind == "text":
                ids += _text_tokens(text_ids, vocabulary=vocabulary, budget=max_text).tolist()
            else:
                ids += next(images).tolist()
            ids += [vocabulary.command(name) for name in segment.after]
        return ids + [vocabulary.command(name) for name in self.segments[-1].before]

    def positions(self, *, num_text: int, num_image_tokens: ImageTokens, budget: int, is_image_fixed: bool) -> Ids:
        """Position ids of a whole row with `num_text` text tokens.

        They run through, as in CogView, but for a segment that restarts. Or, as in CogLM, what follows the text stands
        where it would after a text of `budget` tokens, so that an image token's position tells its place in the picture
        whatever the caption's length; also with the picture first, and in pictures of several sizes.
        """
        if is_image_fixed and self.segments[0].kind == "image":
            return self._swapped_positions(num_text=num_text, num_image_tokens=num_image_tokens, budget=budget)
        if is_image_fixed and any(segment.restarts for segment in self.segments):
            return self._matched_positions(num_text=num_text, num_image_tokens=num_image_tokens, budget=budget)
        parts, start = [], 0
        for segment, length in self._lengths(num_text, num_image_tokens):
            start = 0 if segment.restarts else start
            parts.append(np.arange(start, start + length))
            start += length + (budget - num_text if is_image_fixed and segment.kind == "text" else 0)
        return np.concatenate(parts)

    def num_positions(self, *, budget: int, num_image_tokens: ImageTokens, is_image_fixed: bool) -> int:
        """Rows of the table of positions that a row with the longest text needs; its last token is only a label."""
        places = self.positions(
            num_text=budget, num_image_tokens=num_image_tokens, budget=budget, is_image_fixed=is_image_fixed
        )
        return int(places[:-1].max()) + 1

    def loss_weights(self, *, num_text: int, num_image_tokens: ImageTokens) -> Weights:
        """float32, the weight of each token of a whole row as a label."""
        segments = self._lengths(num_text, num_image_tokens)
        return np.concatenate([np.full(length, segment.loss_weight, np.float32) for segment, length in segments])

    def fill(self, text_ids: IdSequence, codes: Sequence[Codes], *, vocabulary: Vocabulary, budget: int) -> Ids:
        """The whole row of ids. `codes`: one flat array for each image segment, in order."""
        parts: list[Ids] = []
        images = iter(codes)
        for segment in self.segments:
            parts.append(_commands(segment.before, vocabulary))
            if segment.kind == "text":
                parts.append(_text_tokens(text_ids, vocabulary=vocabulary, budget=budget))
            else:
                parts.append(next(images).astype(np.int64))
            parts.append(_commands(segment.after, vocabulary))
        return np.concatenate(parts)

    def _swapped_positions(self, *, num_text: int, num_image_tokens: ImageTokens, budget: int) -> Ids:
        """Of an image before its text: all tokens stand where they stood in pretraining, the text from 0, the image
        behind the longest text. Only their order in the row is another."""
        (_, image_length), (text, text_length) = self._lengths(num_text, num_image_tokens)
        start = len(text.before) + budget
        return np.concatenate([np.arange(start, start + image_length), np.arange(text_length)])

    def _matched_positions(self, *, num_text: int, num_image_tokens: ImageTokens, budget: int) -> Ids:
        """Of a text and pictures of one thing at several sizes: the largest stands where pretraining has its picture,
        a code of a smaller one where the first of the codes is that it stands for. ROI2 begins at 0, as ROI1 does."""
        text, *images = self.segments
        parts = [np.arange(len(text.before) + num_text)]
        lengths = self._image_lengths(num_image_tokens)
        first, side = len(text.before) + budget + len(images[0].before), math.isqrt(max(lengths))
        for segment, length in zip(images, lengths, strict=True):
            before = np.arange(first - len(segment.before), first)
            before[: int(segment.restarts)] = 0
            steps = np.arange(0, side, side // math.isqrt(length))
            codes = first + (side * steps[:, None] + steps).ravel()
            parts += [before, codes, first + side**2 + np.arange(len(segment.after))]
        return np.concatenate(parts)

    def _lengths(self, num_text: int, num_image_tokens: ImageTokens) -> Iterator[tuple[Segment, int]]:
        """Each segment with the number of its tokens, command tokens included."""
        images = iter(self._image_lengths(num_image_tokens))
        for segment in self.segments:
            content = num_text if segment.kind == "text" else next(images)
            yield segment, len(segment.before) + content + len(segment.after)

    def _image_lengths(self, num_image_tokens: ImageTokens) -> Sequence[int]:
        num_images = sum(segment.kind == "image" for segment in self.segments)
        lengths = [num_image_tokens] * num_images if isinstance(num_image_tokens, int) else num_image_tokens
        if len(lengths) != num_images:
            raise ConfigError(f"num_image_tokens={num_image_tokens}: the layout has {num_images} images")
        return lengths


# A task is a line. text_to_image is the pretraining template of the paper and of the release. captioning is the
# release's too, but for SEP: the released captioner has no end of text, and writes a fixed number of tokens.
# super_resolution is the paper's; in the form that was released, POS0 stands before the size of the larger picture.
TASKS: dict[str, SequenceLayout] = {
    "text_to_image": SequenceLayout(text("ROI1"), image("BASE", "BOI1", "EOI1")),
    "captioning": SequenceLayout(image("BASE", "BOI1", "EOI1", loss_weight=0.0), text("ROI1", "SEP")),
    "super_resolution": SequenceLayout(
        text("ROI1"), image("BASE", "BOI1", "EOI1"), image("ROI2", "BASE", "BOI2", "EOI2", restarts=True)
    ),
    "super_resolution_released": SequenceLayout(
        text("ROI1"), image("BASE", "BOI1", "EOI1"), image("ROI2", "POS0", "BASE", "BOI2", "EOI2", restarts=True)
    ),
}


@functools.lru_cache
def _commands(names: tuple[str, ...], vocabulary: Vocabulary) -> Ids:
    """Ids of command tokens, which every row has; not to be written to."""
    return np.array([vocabulary.command(name) for name in names], dtype=np.int64)


def _text_tokens(text_ids: IdSequence, *, vocabulary: Vocabulary, budget: int) -> Ids:
    return np.asarray(text_ids[:budget], dtype=np.int64) + vocabulary.text_offset
