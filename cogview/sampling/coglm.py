"""A trained CogLM with its tokenizers: captions to pictures, and holes in pictures filled by captions.

In: the output folder of pretrain_coglm, or imported weights, with both tokenizers and, for cluster sampling, the
clusters of the codebook. Out: codes and pictures. The same weights write captions (`coglm_captioning`).
"""

# B batch, K codes, h w grid

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cogview.errors import CheckpointError
from cogview.models.gpt import GPT
from cogview.models.published import load_model
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.text_guided_filling import fill_hidden_codes
from cogview.sampling.text_to_image import require_fingerprints
from cogview.sequences.coglm import CogLMLayout
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.tokenizers.code_clusters import CodeClusters
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer

TASK = "coglm"  # in model.json
DEFAULT_SAMPLING = CogLMSampling()


@dataclass(frozen=True, kw_only=True)
class CogLM:
    """Model, tokenizers and vocabulary that belong together. clusters: of the codes, None without.

    ends_text: whether captions end with `<pad>`; the release's have no end.
    """

    model: GPT
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyImageTokenizer
    vocabulary: BilingualVocabulary
    layout: CogLMLayout
    clusters: CodeClusters | None = field(default=None)
    ends_text: bool = True

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        *,
        text_tokenizer: Path,
        image_tokenizer: Path,
        clusters: Path | None = None,
        device: str = "cpu",
    ) -> Self:
        """Load the published weights and both tokenizers, ready to sample.

        Raises VocabularyError if tokenizers or clusters are not those of the checkpoint, CheckpointError for a damaged
        file or a model that is no CogLM.
        """
        model, settings = load_model(checkpoint)
        if settings.get("task") != TASK:
            raise CheckpointError(f"{checkpoint} holds no CogLM; give the output of pretrain_coglm, or an imported one")
        text, image = TextTokenizer.load(text_tokenizer), load_image_tokenizer(image_tokenizer)
        vocabulary = BilingualVocabulary(num_image_codes=image.num_codes, text=text.ranges)
        found = {
            "text_tokenizer": text.fingerprint,
            "image_tokenizer": image.fingerprint,
            "vocabulary": vocabulary.fingerprint,
        }
        require_fingerprints(settings["fingerprints"], found=found, where=checkpoint)
        return cls(
            model=model.to(device).eval(),
            text_tokenizer=text,
            image_tokenizer=image.to(device).eval(),
            vocabulary=vocabulary,
            layout=CogLMLayout(**settings["layout"]),
            clusters=CodeClusters.load(clusters, image_tokenizer=image.fingerprint) if clusters else None,
            ends_text=bool(settings["ends_text"]),
        )

    @property
    def image_size(self) -> int:
        """Pixels along one side of a picture."""
        return self.layout.grid * self.image_tokenizer.stride

    def draw(
        self,
        captions: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: CogLMSampling = DEFAULT_SAMPLING,
        progress: Callable[[int, int], None] | None = None,
        watch: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> Tensor:
        """Image codes int64 [B, h, w], a picture for each caption and seed (progress, watch: `fill_hidden_codes`)."""
        shape = (len(captions), self.layout.grid, self.layout.grid)
        hidden_Bhw = torch.ones(shape, dtype=torch.bool)
        empty_Bhw = torch.zeros(shape, dtype=torch.int64)
        return self.fill(
            captions, empty_Bhw, hidden_Bhw, seeds=seeds, sampling=sampling, progress=progress, watch=watch
        )

    def fill(
        self,
        captions: Sequence[str],
        codes_Bhw: Tensor,
        hidden_Bhw: Tensor,
        *,
        seeds: Sequence[int],
        sampling: CogLMSampling = DEFAULT_SAMPLING,
        progress: Callable[[int, int], None] | None = None,
        watch: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> Tensor:
        """Codes int64 [B, h, w]: `codes_Bhw` with those drawn, by the captions, that the mask `hidden_Bhw` hides."""
        labels_K = self.clusters.labels_K.to(self.model.word_embeddings.weight.device) if self.clusters else None
        return fill_hidden_codes(
            self.model,
            [self.text_tokenizer.encode(caption) for caption in captions],
            codes_Bhw,
            hidden_Bhw,
            vocabulary=self.vocabulary,
            layout=self.layout,
            sampling=sampling,
            seeds=seeds,
            labels_K=labels_K,
            progress=progress,
            watch=watch,
        )

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Pictures float [B, 3, H, W] in [0, 1]."""
        return self.image_tokenizer.decode(codes_Bhw)
