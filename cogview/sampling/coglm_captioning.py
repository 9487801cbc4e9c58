"""CogLM as a captioner: `codes <start_of_english>` or `codes <start_of_chinese>`, then the text (CogView2).

It has what `caption_search` and CapLoss ask of a captioner, so the weights that draw pictures also write captions, and
order their own pictures by how well the caption can be read off them: inverse prompting, CogView2's post-selection.
"""

# B images, R rows (images x beams), P different images, N codes, L sequence, K choices: pieces and the end, E hidden

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cogview.models.attention import staged_mask
from cogview.models.gpt import GPT, KeyValueCache
from cogview.models.published import read_settings
from cogview.sampling.captioning import (
    RELEASED_TOKENS,
    Caption,
    Captioner,
    CaptionModel,
    Language,
    Reading,
    allowed_choices,
    as_caption,
)
from cogview.sampling.coglm import TASK, CogLM
from cogview.sequences.coglm import CogLMLayout
from cogview.tokenizers.bilingual_vocabulary import PAD_PIECE, BilingualVocabulary, Tongue
from cogview.tokenizers.stored import AnyImageTokenizer
from cogview.tokenizers.text import TextTokenizer

TONGUES: dict[Language, Tongue] = {"any": "chinese", "en": "english", "zh": "chinese"}  # the release asks in Chinese


@dataclass(frozen=True, kw_only=True)
class CogLMCaptioner:
    """A CogLM that writes and reads captions; see `cogview.sampling.captioning.Captioner` for what the members mean."""

    model: GPT
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyImageTokenizer
    vocabulary: BilingualVocabulary
    layout: CogLMLayout
    has_end: bool

    @classmethod
    def of(cls, coglm: CogLM) -> Self:
        """The same weights in this role."""
        return cls(
            model=coglm.model,
            text_tokenizer=coglm.text_tokenizer,
            image_tokenizer=coglm.image_tokenizer,
            vocabulary=coglm.vocabulary,
            layout=coglm.layout,
            has_end=coglm.ends_text,
        )

    @property
    def image_size(self) -> int:
        """Pixels along one side of a picture."""
        return self.layout.grid * self.image_tokenizer.stride

    @property
    def text_budget(self) -> int:
        """Pieces of the longest caption that it reads."""
        return self.layout.max_text

    @property
    def max_text(self) -> int:
        """Pieces of the longest caption that it writes; without an end as many as CogView's captioner."""
        return self.layout.max_text if self.has_end else min(RELEASED_TOKENS, self.layout.max_text)

    @property
    def first_text_id(self) -> int:
        """Ids from here on are no image codes; the pieces begin here."""
        return self.vocabulary.text_offset

    @property
    def end(self) -> int:
        """The choice that ends a caption: one past the last piece. It stands for `<pad>`."""
        return len(self.vocabulary.text_ids)

    def allowed(self, language: Language) -> Tensor:
        """bool [K], which choices a caption in this language may be made of."""
        device = self.model.word_embeddings.weight.device
        return allowed_choices(self.text_tokenizer, language=language, has_end=self.has_end).to(device)

    def begin(self, codes_Bhw: Tensor, *, language: Language = "any") -> Reading:
        """Read the images, each different one once, and the token that begins a text in the language."""
        parameter = self.model.word_embeddings.weight
        codes_PN, rows_B = torch.unique(codes_Bhw.flatten(1).to(parameter.device), dim=0, return_inverse=True)
        starts_P1 = torch.full_like(codes_PN[:, :1], self.vocabulary.start_of_text(TONGUES[language]))
        ids_PL, positions_PL, allowed = self._row(codes_PN, starts_P1)
        images, length = ids_PL.shape

        def empty_cache(batch: int, length: int) -> KeyValueCache:
            dtype, device = parameter.dtype, parameter.device
            return KeyValueCache(self.model.config, batch=batch, length=length, dtype=dtype, device=device)

        read = empty_cache(images, length)
        read.is_padded = False
        hidden_PE = self.model(ids_PL, positions_PL, cache=read, allowed=allowed)[:, -1]
        cache = empty_cache(len(rows_B), length + self.max_text)
        cache.begin_with(read, rows_B=rows_B)
        return Reading(hidden_RE=hidden_PE[rows_B], positions_R1=positions_PL[rows_B, -1:], cache=cache)

    def advance(self, reading: Reading, chosen_R: Tensor) -> None:
        """Read the chosen pieces, one for each row; a row that has ended may be fed anything."""
        ids_R = chosen_R.clamp(max=self.end - 1) + self.vocabulary.text_offset
        reading.positions_R1 = reading.positions_R1 + 1
        reading.hidden_RE = self.model(ids_R[:, None], reading.positions_R1, cache=reading.cache)[:, -1]

    def logits(self, reading: Reading) -> Tensor:
        """Scores of every choice, float32 [R, K]: all pieces, then the end if there is one."""
        logits_RP = self.model.logits(reading.hidden_RE, ids=self.vocabulary.text_ids).float()
        if not self.has_end:
            return logits_RP
        ends_R1 = logits_RP[:, PAD_PIECE : PAD_PIECE + 1]
        pieces_RP = logits_RP.index_fill(1, torch.tensor([PAD_PIECE], device=logits_RP.device), -torch.inf)
        return torch.cat([pieces_RP, ends_R1], dim=-1)

    def caption(self, choices: Sequence[int], *, log_probability: float) -> Caption:
        """The caption of a row of choices; what follows the end is not part of it."""
        return as_caption(self.text_tokenizer, choices, end=self.end, log_probability=log_probability)

    def read_texts(self, texts_BT: Tensor, codes_Bhw: Tensor) -> Tensor:
        """The hidden states [B, T, E] that predict each piece of texts (int64 [B, T], all of one length).

        Each text stands behind the token of its own language.
        """
        tongues = [self.vocabulary.tongue_of(pieces) for pieces in texts_BT.tolist()]
        starts_B1 = torch.tensor([[self.vocabulary.start_of_text(tongue)] for tongue in tongues])
        behind_BT = torch.cat([starts_B1.to(texts_BT.device), texts_BT[:, :-1] + self.vocabulary.text_offset], dim=1)
        ids_BL, positions_BL, allowed = self._row(codes_Bhw.flatten(1).to(texts_BT.device), behind_BT)
        hidden_BTE: Tensor = self.model(ids_BL, positions_BL, allowed=allowed)[:, -texts_BT.shape[1] :]
        return hidden_BTE

    def _row(self, codes_BN: Tensor, texts_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [B, L], positions [B, L] and mask [B, 1, L, L] of pictures that see themselves, and texts behind them."""
        num_codes, num_text = codes_BN.shape[1], texts_BT.shape[1]
        ids_BL = torch.cat([codes_BN, texts_BT], dim=1)
        codes_N = torch.arange(num_codes, device=ids_BL.device)
        text_T = torch.arange(num_text, device=ids_BL.device)
        positions_L = torch.cat([self.layout.image_position + 1 + codes_N, text_T])
        stages_BL = torch.cat([torch.zeros_like(codes_N), 1 + text_T]).expand_as(ids_BL)
        return ids_BL, positions_L.expand_as(ids_BL), staged_mask(stages_BL, torch.zeros_like(ids_BL))


def load_captioner(
    checkpoint: Path, *, text_tokenizer: Path, image_tokenizer: Path, device: str = "cpu"
) -> CaptionModel:
    """Whatever writes captions: the output of finetune_captioning, a released captioner, or a CogLM."""
    tokenizers = {"text_tokenizer": text_tokenizer, "image_tokenizer": image_tokenizer}
    if read_settings(checkpoint).get("task") == TASK:
        return CogLMCaptioner.of(CogLM.load(checkpoint, device=device, **tokenizers))
    return Captioner.load(checkpoint, device=device, **tokenizers)
