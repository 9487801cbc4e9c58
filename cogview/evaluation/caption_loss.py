"""CapLoss: how surprised a captioner is by a caption for a picture (CogView, section 3.2).

In: a captioner, captions and image codes. Out: CapLoss(x, t), the mean of -log p(t_i | x, t_<i) over the tokens of the
text, lower is better; and the score of the release's post-selection, the sum of log p, higher is better. As in the
release, image ids are left out of the softmax. Within one prompt both order candidates alike.
"""

# B pairs, T tokens of a text, N text tokens of all pairs, E hidden, V ids that are not image codes, h w grid

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview.errors import ConfigError, SchemaError
from cogview.sampling.captioning import CaptionModel

TOKENS_AT_ONCE = 1024  # scores of so many tokens: 1024 x 50,048 ids x 4 bytes = 205 MB


@dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """log_probability: the sum over `num_tokens` text tokens, in nats: the release's score."""

    log_probability: float
    num_tokens: int

    @property
    def cap_loss(self) -> float:
        """The mean of -log p."""
        return -self.log_probability / self.num_tokens


def score_pairs(
    captioner: CaptionModel, captions: Sequence[str], codes_Bhw: Tensor, *, batch_size: int = 64
) -> list[CaptionScore]:
    """Score each caption for its image. Captions of one length are scored together, so nothing is computed for padding.

    Captions are cut to the longest that the captioner reads. SchemaError unless there are as many images as captions,
    ConfigError for a caption without a single token.
    """
    if len(captions) != len(codes_Bhw):
        raise SchemaError(f"{len(captions)} captions for {len(codes_Bhw)} images; a pair has one of each")
    budget = captioner.text_budget
    texts = [tuple(pieces[:budget]) for pieces in captioner.text_tokenizer.encode_batch(captions)]
    for caption, pieces in zip(captions, texts, strict=True):
        if not pieces:
            raise ConfigError(f"caption={caption!r} has no token to score; give a text")
    scores: dict[int, CaptionScore] = {}
    for numbers in _batches(texts, batch_size=batch_size):
        sums = _log_probabilities(captioner, [texts[n] for n in numbers], codes_Bhw[numbers]).sum(dim=1)
        for number, total in zip(numbers, sums.tolist(), strict=True):
            scores[number] = CaptionScore(log_probability=total, num_tokens=len(texts[number]))
    return [scores[number] for number in range(len(texts))]


def _batches(texts: Sequence[tuple[int, ...]], *, batch_size: int) -> Iterator[list[int]]:
    """Numbers of texts, those of one length and then of one wording together."""
    order = sorted(range(len(texts)), key=lambda number: (len(texts[number]), texts[number], number))
    start = 0
    while start < len(order):
        length = len(texts[order[start]])
        stop = start + 1
        while stop < min(start + batch_size, len(order)) and len(texts[order[stop]]) == length:
            stop += 1
        yield order[start:stop]
        start = stop


@torch.inference_mode()
def _log_probabilities(captioner: CaptionModel, texts: Sequence[tuple[int, ...]], codes_Bhw: Tensor) -> Tensor:
    """log p of every text token, float64 [B, tokens]; the texts have the same length."""
    model = captioner.model
    texts_BT = torch.tensor(texts, device=model.word_embeddings.weight.device)
    hidden_NE = captioner.read_texts(texts_BT, codes_Bhw).flatten(0, 1)
    ids = range(captioner.first_text_id, model.config.vocab_size)
    found = []
    for start in range(0, len(hidden_NE), TOKENS_AT_ONCE):
        logits_NV = model.logits(hidden_NE[start : start + TOKENS_AT_ONCE], ids=ids).float()
        labels_N1 = texts_BT.flatten()[start : start + TOKENS_AT_ONCE, None]  # the pieces are the first of these ids
        found.append(logits_NV.log_softmax(dim=-1).gather(1, labels_N1)[:, 0].double())
    return torch.cat(found).view(texts_BT.shape)
