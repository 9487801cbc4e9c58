"""CogLM's rows: text and image in one row, of which what is hidden is predicted in order (CogView2).

In: texts, image codes and a generator. Out: rows whose attention is told by two numbers for each token. A token sees
those of its own or an earlier *stage*, if they are of its *group* or of group 0. So context is one stage, in which all
see each other; hidden tokens are a stage each, in order; and a text in one language does not see that in another.

Kinds of rows, with the release's rules:

* drawing: one text, all of which is context, the start of the image, its codes one by one;
* understanding: hidden patches of the picture, then each text behind the token that begins its language. The texts see
  the whole picture and it sees none of them, so one row teaches captions and masked image modelling;
* text alone: hidden spans of it;
* completion, which the release does not train, but whose own completion asks for it: one text and the visible codes are
  context, then the hidden codes, each run of them led by a copy of the code before it.

A row without a text is a picture alone, drawn or understood; the release stops at such rows with an error.
"""

# L tokens of a row, G rows and columns of codes

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError, SchemaError
from cogview.sequences.hidden_regions import Hidden, PatchRule, hidden_box, hidden_patches, hidden_spans, runs
from cogview.sequences.layout import Codes, IdSequence
from cogview.tokenizers.bilingual_vocabulary import PAD_PIECE, BilingualVocabulary

Ints = npt.NDArray[np.int64]
PARTS = ("image", "patch", "completion", "english", "chinese")  # whose loss a label belongs to
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class CogLMLayout:
    """Where tokens stand. grid: codes along one side; max_text: the longest text; image_position: position of the
    token that begins an image, which the codes follow; a text's positions begin at 0 (the release: 20, 111, 512)."""

    grid: int = 20
    max_text: int = 111
    image_position: int = 512

    def __post_init__(self) -> None:
        if self.grid < 2 or self.max_text < 1:
            raise ConfigError(f"grid={self.grid}, max_text={self.max_text}: choose 2 or more, and 1 or more")
        if self.image_position <= self.max_text:
            raise ConfigError(
                f"image_position={self.image_position}: a text and the token before it take {self.max_text + 1} "
                f"positions; choose {self.max_text + 1} or more"
            )

    @property
    def num_positions(self) -> int:
        """Rows of the table of positions."""
        return self.image_position + 1 + self.grid**2

    @property
    def length(self) -> int:
        """Tokens of a full row of text and image: 512 in the release."""
        return self.max_text + 1 + self.grid**2


@dataclass(frozen=True, kw_only=True)
class CogLMTasks:
    """How rows are made of pairs; the defaults are the release's.

    understanding_share: of rows with a picture, 0.3 in the release (`image_caption_ratio`); completion_share: of the
    same, rows to complete, 0 in the release. text_only_share, image_only_share: of all pairs, those of which only the
    text or the picture is used; the release takes texts from files of their own.
    patch_rule, patch_share, patch_side: see `hidden_patches`; the paper's rule goes with a share of 0.75. box_shares:
    of completion, see `hidden_box`; span_mean, span_share: see `hidden_spans`.
    ends_text: a caption ends with `<pad>`; the release's captions have no end.
    """

    understanding_share: float = 0.3
    completion_share: float = 0.0
    text_only_share: float = 0.0
    image_only_share: float = 0.0
    patch_rule: PatchRule = "released"
    patch_share: float = 0.8
    patch_side: int = 4
    box_shares: tuple[float, float] = (0.25, 0.75)
    span_mean: float = 3.0
    span_share: float = 0.15
    ends_text: bool = True

    def __post_init__(self) -> None:
        for names in (("understanding_share", "completion_share"), ("text_only_share", "image_only_share")):
            values = [getattr(self, name) for name in names]
            if min(values) < 0 or sum(values) > 1:
                raise ConfigError(f"{names[0]}={values[0]}, {names[1]}={values[1]}: shares from 0, together up to 1")
        if self.patch_rule not in get_args(PatchRule):
            raise ConfigError(f"patch_rule={self.patch_rule!r}: choose {' or '.join(get_args(PatchRule))}")
        if not 0 < self.patch_share < 1 or not 0 < self.span_share < 1 or self.span_mean <= 0:
            raise ConfigError(
                f"patch_share={self.patch_share}, span_share={self.span_share}, span_mean={self.span_mean}: choose "
                "shares between 0 and 1, and a mean above 0"
            )
        if not 0 < self.box_shares[0] <= self.box_shares[1] <= 1:
            raise ConfigError(f"box_shares={self.box_shares}: choose two shares above 0, up to 1, the smaller first")


@dataclass(kw_only=True)
class CogLMRow:
    """One row. All int64 [L]; labels and parts are NO_LABEL where nothing is predicted, parts are places in PARTS."""

    ids: Ints
    positions: Ints
    stages: Ints
    groups: Ints
    labels: Ints
    parts: Ints


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes rows of texts (pieces of the text tokenizer) and codes (uint16 [G * G])."""

    vocabulary: BilingualVocabulary
    layout: CogLMLayout
    tasks: CogLMTasks = field(default_factory=CogLMTasks)

    def row(self, texts: Sequence[IdSequence], codes: Codes | None, *, generator: np.random.Generator) -> CogLMRow:
        """A row of a kind drawn by the tasks' shares. Empty texts are none. SchemaError where nothing is left."""
        texts = [text for text in texts if len(text)]
        if texts and codes is not None:
            draw = generator.random()
            if draw < self.tasks.text_only_share:
                codes = None
            elif draw < self.tasks.text_only_share + self.tasks.image_only_share:
                texts = []
        if codes is None:
            if not texts:
                raise SchemaError("a row without a text and without a picture has nothing to learn from")
            return self.text_alone(texts[generator.integers(len(texts))], generator=generator)
        draw = generator.random()
        if draw < self.tasks.understanding_share:
            return self.understanding(texts, codes, hidden_GG=self._patches(generator))
        text = texts[generator.integers(len(texts))] if texts else ()
        if draw < self.tasks.understanding_share + self.tasks.completion_share:
            box_GG = hidden_box(self.layout.grid, shares=self.tasks.box_shares, generator=generator)
            return self.completion(text, codes, hidden_GG=box_GG)
        return self.drawing(text, codes)

    def drawing(self, text: IdSequence, codes: Codes) -> CogLMRow:
        """Text to image: `text <start_of_image> codes`, of which every code is predicted."""
        row = _Row()
        self._add_text(row, text)
        self._add_hidden(row, codes, leads=[(0, len(codes))], stage=1, part="image")
        return row.closed()

    def understanding(self, texts: Sequence[IdSequence], codes: Codes, *, hidden_GG: Hidden) -> CogLMRow:
        """Image to text, and hidden patches: `codes`, then `<start_of_...> text` of each text.

        A code is predicted from the one left of it, if that is hidden too.
        """
        row, hidden_N = _Row(), hidden_GG.ravel()
        is_next_hidden_N = np.zeros_like(hidden_GG)
        is_next_hidden_N[:, :-1] = hidden_GG[:, :-1] & hidden_GG[:, 1:]
        labels = np.where(is_next_hidden_N.ravel(), np.roll(codes.astype(np.int64), -1), NO_LABEL)
        first = self.layout.image_position + 1
        row.add(
            codes.astype(np.int64),
            positions=np.arange(first, first + len(codes)),
            stages=np.where(hidden_N, np.cumsum(hidden_N), 0),
            labels=labels,
            part="patch",
        )
        stage = int(hidden_N.sum()) + 1
        for group, text in enumerate(texts, start=1):
            pieces = self._pieces(text)
            tongue = self.vocabulary.tongue_of(pieces.tolist())
            ids = np.concatenate([[self.vocabulary.start_of_text(tongue)], pieces + self.vocabulary.text_offset])
            end = self.vocabulary.pad if self.tasks.ends_text else NO_LABEL
            row.add(
                ids,
                positions=np.arange(len(ids)),
                stages=stage + np.arange(len(ids)),
                labels=np.concatenate([ids[1:], [end]]),
                part=tongue,
                group=group,
            )
        return row.closed()

    def completion(self, text: IdSequence, codes: Codes, *, hidden_GG: Hidden) -> CogLMRow:
        """A picture with a hole, told by a text: `text <start_of_image> visible codes`, then each run of hidden codes
        behind a copy of the code before it."""
        if hidden_GG.all():
            return self.drawing(text, codes)
        row = _Row()
        self._add_text(row, text)
        visible = np.flatnonzero(~hidden_GG.ravel())
        ids = np.concatenate([[self.vocabulary.start_of_image], codes[visible].astype(np.int64)])
        positions = self.layout.image_position + np.concatenate([[0], visible + 1])
        row.add(ids, positions=positions, stages=np.ones_like(ids))
        self._add_hidden(row, codes, leads=runs(hidden_GG), stage=2, part="completion")
        return row.closed()

    def text_alone(self, text: IdSequence, *, generator: np.random.Generator) -> CogLMRow:
        """Hidden spans of a text, each token predicted from the one before it, if that is hidden too."""
        pieces = self._pieces(text)
        hidden_L = hidden_spans(
            len(pieces), mean=self.tasks.span_mean, share=self.tasks.span_share, generator=generator
        )
        ids, row = pieces + self.vocabulary.text_offset, _Row()
        is_next_hidden_L = hidden_L & np.roll(hidden_L, -1)
        is_next_hidden_L[-1:] = False
        row.add(
            ids,
            positions=np.arange(len(ids)),
            stages=np.where(hidden_L, np.cumsum(hidden_L), 0),
            labels=np.where(is_next_hidden_L, np.roll(ids, -1), NO_LABEL),
            part=self.vocabulary.tongue_of(pieces.tolist()),
        )
        return row.closed()

    def _pieces(self, text: IdSequence) -> Ints:
        pieces = np.asarray(text, dtype=np.int64)
        kept: Ints = pieces[pieces != PAD_PIECE][: self.layout.max_text]
        return kept

    def _patches(self, generator: np.random.Generator) -> Hidden:
        tasks = self.tasks
        return hidden_patches(
            self.layout.grid,
            side=tasks.patch_side,
            rule=tasks.patch_rule,
            share=tasks.patch_share,
            generator=generator,
        )

    def _add_text(self, row: "_Row", text: IdSequence) -> None:
        ids = self._pieces(text) + self.vocabulary.text_offset
        row.add(ids, positions=np.arange(len(ids)), stages=np.zeros_like(ids))

    def _add_hidden(
        self, row: "_Row", codes: Codes, *, leads: Sequence[tuple[int, int]], stage: int, part: str
    ) -> None:
        """Runs of codes in the order in which they are predicted, each behind a copy of what stands before it."""
        for number, (first, end) in enumerate(leads):
            before = np.concatenate([[self.vocabulary.start_of_image], codes.astype(np.int64)])
            is_last = number == len(leads) - 1
            inputs = np.arange(first, end if is_last else end + 1)  # nobody sees the very last code
            labels = np.full(len(inputs), NO_LABEL)
            labels[: end - first] = codes[first:end]
            row.add(
                before[inputs],
                positions=self.layout.image_position + inputs,
                stages=stage + np.arange(len(inputs)),
                labels=labels,
                part=part,
            )
            stage += len(inputs)


class _Row:
    """A row in the making."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Ints, ...]] = []

    def add(
        self,
        ids: Ints,
        *,
        positions: Ints,
        stages: Ints,
        labels: Ints | None = None,
        part: str = "",
        group: int = 0,
    ) -> None:
        """Tokens behind those that are there."""
        labels = np.full(len(ids), NO_LABEL) if labels is None else labels
        parts = np.where(labels == NO_LABEL, NO_LABEL, PARTS.index(part) if part else NO_LABEL)
        self._pieces.append((ids, positions, stages, np.full(len(ids), group), labels, parts))

    def closed(self) -> CogLMRow:
        """The whole of it."""
        columns = [np.concatenate(column).astype(np.int64) for column in zip(*self._pieces, strict=True)]
        names = ("ids", "positions", "stages", "groups", "labels", "parts")
        return CogLMRow(**dict(zip(names, columns, strict=True)))
