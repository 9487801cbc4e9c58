"""Image to text, token by token (CogView, section 3.2): `BASE BOI1 codes EOI1 ROI1`, then the caption.

In: image codes. Out: scores of the next piece; `cogview.sampling.caption_search` makes captions of them. Our finetune
ends every caption with SEP, which the release's template does not have: a caption ends there, or at the longest text of
training. The released captioner knows no end of text and writes a fixed number of tokens, as its own scripts do.

A language is chosen by what may be written, not by asking: for `en` no piece with a Chinese character is allowed, for
`zh` none with a Latin letter. Pieces without letters belong to both.
"""

# B images, R rows (images x beams), P pieces of text, K = P + 1 choices: the pieces and the end, E hidden, h w grid

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self, get_args

import torch
from torch import Tensor

from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT, KeyValueCache
from cogview.sampling.autoregressive import read_prompts
from cogview.sampling.text_to_image import load_trained
from cogview.sequences.layout import TASKS
from cogview.tokenizers.stored import AnyImageTokenizer
from cogview.tokenizers.text import CHINESE_CHARACTER, TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary

LAYOUT = TASKS["captioning"]
END = "SEP"
RELEASED_TOKENS = 20  # of every caption of the released captioner
LATIN_LETTER = re.compile("[A-Za-z]")
Language = Literal["any", "en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """pieces: ids of the text tokenizer; log_probability: of these and of the end, in nats, whatever was allowed.

    is_whole: the model ended it; otherwise it was cut at the longest text, as always with the released captioner.
    """

    text: str
    pieces: tuple[int, ...]
    log_probability: float
    is_whole: bool


class CaptionModel(Protocol):
    """What writes and reads captions: a `Captioner`, or a CogLM in that role. Members are those of `Captioner`."""

    @property
    def model(self) -> GPT: ...
    @property
    def text_tokenizer(self) -> TextTokenizer: ...
    @property
    def image_tokenizer(self) -> AnyImageTokenizer: ...
    @property
    def first_text_id(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def max_text(self) -> int: ...
    @property
    def text_budget(self) -> int: ...
    @property
    def has_end(self) -> bool: ...
    @property
    def end(self) -> int: ...

    def allowed(self, language: Language) -> Tensor: ...
    def begin(self, codes_Bhw: Tensor, *, language: Language) -> "Reading": ...
    def advance(self, reading: "Reading", chosen_R: Tensor) -> None: ...
    def logits(self, reading: "Reading") -> Tensor: ...
    def caption(self, choices: Sequence[int], *, log_probability: float) -> Caption: ...
    def read_texts(self, texts_BT: Tensor, codes_Bhw: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """Model, tokenizers and vocabulary that belong together.

    grid: image codes along one side; max_text: pieces of the longest caption that it writes, text_budget: that it
    reads; has_end: captions end with SEP; is_image_fixed: positions are those of pretraining (see `SequenceLayout`).
    """

    model: GPT
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyImageTokenizer
    vocabulary: Vocabulary
    grid: int
    max_text: int
    text_budget: int
    has_end: bool = True
    is_image_fixed: bool = False

    @classmethod
    def load(cls, checkpoint: Path, *, text_tokenizer: Path, image_tokenizer: Path, device: str = "cpu") -> Self:
        """Load the output of finetune_captioning, or a released captioner that import_weights has imported.

        Raises VocabularyError if the tokenizers are not those of the checkpoint, CheckpointError for a damaged file or
        a model that was trained to draw.
        """
        trained = load_trained(
            checkpoint, text_tokenizer=text_tokenizer, image_tokenizer=image_tokenizer, device=device
        )
        settings = trained.settings
        is_ours, is_released = settings.get("task") == "captioning", "task" not in settings and "sources" in settings
        if not is_ours and not is_released:
            raise CheckpointError(f"{checkpoint} was not trained to caption; give the output of finetune_captioning")
        grid = int(settings["grid"])
        budget = LAYOUT.text_budget(length=int(settings["length"]) + is_released, num_image_tokens=grid**2)  # no SEP
        return cls(
            model=trained.model,
            text_tokenizer=trained.text_tokenizer,
            image_tokenizer=trained.image_tokenizer,
            vocabulary=trained.vocabulary,
            grid=grid,
            text_budget=budget,
            max_text=budget if is_ours else min(RELEASED_TOKENS, budget),
            has_end=is_ours,
            is_image_fixed=bool(settings.get("is_image_fixed", False)),
        )

    @property
    def image_size(self) -> int:
        """Pixels along one side of a picture."""
        return self.grid * self.image_tokenizer.stride

    def prompts(self, codes_Bhw: Tensor) -> list[list[int]]:
        """Everything before the first token of the text: `BASE BOI1 codes EOI1 ROI1`."""
        head = [self.vocabulary.command(name) for name in LAYOUT.segments[0].before]
        tail = [*LAYOUT.segments[0].after, *LAYOUT.segments[1].before]
        return [
            [*head, *codes, *(self.vocabulary.command(name) for name in tail)]
            for codes in codes_Bhw.flatten(1).tolist()
        ]

    def positions(self, *, num_text: int) -> list[int]:
        """Position ids of the prompt and of so many text tokens behind it."""
        places = LAYOUT.positions(
            num_text=num_text,
            num_image_tokens=self.grid**2,
            budget=self.text_budget,
            is_image_fixed=self.is_image_fixed,
        ).tolist()
        end = len(LAYOUT.segments[1].after)
        return list(places[:-end])

    def allowed(self, language: Language) -> Tensor:
        """bool [K], which choices a caption in this language may be made of."""
        device = self.model.word_embeddings.weight.device
        return allowed_choices(self.text_tokenizer, language=language, has_end=self.has_end).to(device)

    @property
    def end(self) -> int:
        """The choice that ends a caption: one past the last piece."""
        return len(self.vocabulary.text_ids)

    @property
    def first_text_id(self) -> int:
        """Ids from here on are no image codes; the pieces begin here."""
        return self.vocabulary.text_offset

    def begin(self, codes_Bhw: Tensor, *, language: Language = "any") -> "Reading":
        """Read the images, each different one once. The language changes nothing: no token asks for it."""
        prompts = self.prompts(codes_Bhw)
        places = [self.positions(num_text=0)] * len(prompts)
        hidden_BE, positions_B1, cache = read_prompts(
            self.model, prompts, places, pad=self.vocabulary.command("PAD"), num_tokens=self.max_text
        )
        return Reading(hidden_RE=hidden_BE, positions_R1=positions_B1, cache=cache)

    def advance(self, reading: "Reading", chosen_R: Tensor) -> None:
        """Read the chosen pieces, one for each row; a row that has ended may be fed anything."""
        ids_R = chosen_R.clamp(max=self.end - 1) + self.vocabulary.text_offset
        reading.positions_R1 = reading.positions_R1 + 1
        reading.hidden_RE = self.model(ids_R[:, None], reading.positions_R1, cache=reading.cache)[:, -1]

    def logits(self, reading: "Reading") -> Tensor:
        """Scores of every choice, float32 [R, K]: all pieces, then the end if there is one."""
        logits_RP = self.model.logits(reading.hidden_RE, ids=self.vocabulary.text_ids)
        if not self.has_end:
            return logits_RP.float()
        sep = self.vocabulary.command(END)
        return torch.cat([logits_RP, self.model.logits(reading.hidden_RE, ids=range(sep, sep + 1))], dim=-1).float()

    def caption(self, choices: Sequence[int], *, log_probability: float) -> Caption:
        """The caption of a row of choices; what follows the end is not part of it."""
        return as_caption(self.text_tokenizer, choices, end=self.end, log_probability=log_probability)

    def read_texts(self, texts_BT: Tensor, codes_Bhw: Tensor) -> Tensor:
        """The hidden states [B, T, E] that predict each piece of texts (int64 [B, T], all of one length)."""
        prompts = torch.tensor(self.prompts(codes_Bhw), device=texts_BT.device)
        ids_BL = torch.cat([prompts, texts_BT[:, :-1] + self.vocabulary.text_offset], dim=1)
        positions_L = self.positions(num_text=texts_BT.shape[1] - 1)
        positions_BL = torch.tensor(positions_L, device=texts_BT.device).expand_as(ids_BL)
        hidden_BTE: Tensor = self.model(ids_BL, positions_BL)[:, -texts_BT.shape[1] :]
        return hidden_BTE


@dataclass(kw_only=True)
class Reading:
    """How far a batch of captions has been read: last hidden states [R, E], last positions [R, 1], keys and values."""

    hidden_RE: Tensor
    positions_R1: Tensor
    cache: KeyValueCache

    def follow(self, parents_R: Tensor, *, captioner: CaptionModel) -> None:
        """Go on with other rows: row r continues row parents_R[r]."""
        storage = self.cache.storage
        cache = KeyValueCache(
            captioner.model.config,
            batch=len(parents_R),
            length=storage.shape[4],
            dtype=storage.dtype,
            device=storage.device,
        )
        cache.begin_with(self.cache, rows_B=parents_R)
        self.cache, self.hidden_RE = cache, self.hidden_RE[parents_R]
        self.positions_R1 = self.positions_R1[parents_R]


def allowed_choices(text_tokenizer: TextTokenizer, *, language: Language, has_end: bool) -> Tensor:
    """bool [K], which pieces, and the end if there is one, a caption in this language may be made of."""
    if language not in LANGUAGES:
        raise ConfigError(f"language={language!r}: choose one of {', '.join(LANGUAGES)}")
    foreign = {"any": None, "en": CHINESE_CHARACTER, "zh": LATIN_LETTER}[language]
    pieces = text_tokenizer.written_pieces()
    allowed = [bool(piece) and not (foreign and foreign.search(piece)) for piece in pieces]
    return torch.tensor(allowed + [True] * has_end)


def as_caption(text_tokenizer: TextTokenizer, choices: Sequence[int], *, end: int, log_probability: float) -> Caption:
    """The caption of a row of choices; what follows the end is not part of it."""
    is_whole = end in choices
    pieces = tuple(choices[: list(choices).index(end)] if is_whole else choices)
    text = text_tokenizer.decode(pieces)
    return Caption(text=text, pieces=pieces, log_probability=log_probability, is_whole=is_whole)
