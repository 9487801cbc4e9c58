"""CogView2's super-resolution stages with their tokenizers: captions and small pictures in, large pictures out.

In: the output folders of finetune_direct_sr and, if textures are to be drawn again, of finetune_iterative_sr. Out:
codes and pixels. On a GPU both stages use the memory of one transformer in turn.
"""

# B batch, g G grids of the small and the large pictures

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cogview.errors import CheckpointError
from cogview.models.gpt import GPT
from cogview.models.published_stage import load_stage
from cogview.models.shared_backbone import SharedBackbone
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import ClusterSampling, CogLMSampling, choose_codes
from cogview.sampling.hierarchy import LoPARConfig, StageModel, draw_directly, refine
from cogview.sampling.lopar import num_passes
from cogview.sampling.text_to_image import require_fingerprints
from cogview.sequences.coglm import CogLMLayout
from cogview.sequences.picture_context import ContextForm, gpt_form
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.tokenizers.code_clusters import CodeClusters
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary

COGLM_TASK = "coglm"  # in `model.json` of a CogLM; what a GPT was trained for is `text_to_image`


@dataclass(frozen=True, kw_only=True)
class HierarchicalSampling:
    """by_clusters: the direct stage draws codes as `clusters` says, as the release does, otherwise as `tokens` says.

    lopar: the passes of the iterative stage.
    """

    by_clusters: bool = True
    clusters: ClusterSampling = field(
        default_factory=lambda: ClusterSampling(temperature=1.0, top_clusters=100, temperature_inside=0.89)
    )
    tokens: SamplingConfig = field(default_factory=SamplingConfig)
    lopar: LoPARConfig = field(default_factory=LoPARConfig)

    @property
    def direct(self) -> CogLMSampling:
        """The choice of the direct stage."""
        return CogLMSampling(by_clusters=self.by_clusters, clusters=self.clusters, tokens=self.tokens)


@dataclass(frozen=True, kw_only=True)
class HierarchicalMagnifier:
    """direct, iterative: the stages; labels_K: the cluster of each code; backbone: where stages take turns."""

    direct: StageModel
    iterative: StageModel | None
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyImageTokenizer
    labels_K: Tensor | None = None
    backbone: SharedBackbone | None = None

    @classmethod
    def load(
        cls,
        direct: Path,
        iterative: Path | None = None,
        *,
        text_tokenizer: Path,
        image_tokenizer: Path,
        clusters: Path | None = None,
        device: str = "cpu",
    ) -> Self:
        """Load published stages and the tokenizers.

        Raises CheckpointError for folders of something else or stages that do not follow each other, VocabularyError
        for tokenizers that are not theirs.
        """
        text, image = TextTokenizer.load(text_tokenizer), load_image_tokenizer(image_tokenizer).to(device).eval()
        found = {"text_tokenizer": text.fingerprint, "image_tokenizer": image.fingerprint}
        backbones: dict[str, GPT] = {}
        stages: dict[str, StageModel] = {}
        for name, folder in (("direct", direct), ("iterative", iterative)):
            if folder is None:
                continue
            model, settings = load_stage(folder, backbones=backbones)
            if model.config.stage != name:
                raise CheckpointError(
                    f"{folder} is of the {model.config.stage} stage; give the output of finetune_{name}_sr"
                )
            require_fingerprints(settings["fingerprints"], found=found, where=folder)
            backbones[settings["backbone"]] = model.gpt
            form = ContextForm.from_stored(settings["form"])
            stages[name] = StageModel(model=model, form=form, image_ids=range(image.num_codes))
        if "iterative" in stages and stages["iterative"].model.config.grid != stages["direct"].model.config.grid:
            raise CheckpointError(
                f"{iterative} draws {stages['iterative'].model.config.grid} codes along a side, {direct} "
                f"{stages['direct'].model.config.grid}; give stages that were trained for one size"
            )
        labelled = CodeClusters.load(clusters, image_tokenizer=image.fingerprint) if clusters else None
        return cls(
            direct=stages["direct"],
            iterative=stages.get("iterative"),
            text_tokenizer=text,
            image_tokenizer=image,
            labels_K=labelled.labels_K.to(device) if labelled else None,
            backbone=_onto_device(stages, device=device),
        )

    @property
    def side(self) -> int:
        """Codes along a side of the small pictures."""
        return self.direct.model.config.small_grid

    @property
    def scale(self) -> int:
        """Codes that are drawn along a side for each that is read."""
        return self.direct.model.config.ratio

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.direct.device

    def magnify(
        self,
        captions: Sequence[str],
        codes_Bgg: Tensor,
        *,
        seeds: Sequence[int],
        sampling: HierarchicalSampling,
        known_BGG: Tensor | None = None,
        inside_BGG: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Codes int64 [B, G, G] of the pictures with codes [B, g, g], drawn with a seed for each.

        inside_BGG: bool, the part of each picture that is drawn; `known_BGG` has the codes of the rest. progress:
        called with (calls of a model done, calls). ConfigError for pictures of another size.
        """
        texts = [self.text_tokenizer.encode(caption) for caption in captions]
        calls = 1 + (num_passes(sampling.lopar.ranks) if self.iterative else 0)
        self._use("direct")
        choose = partial(choose_codes, labels_K=self.labels_K, sampling=sampling.direct)
        codes_BGG = draw_directly(self.direct, texts, codes_Bgg, seeds=seeds, choose=choose)
        if inside_BGG is not None:
            assert known_BGG is not None
            codes_BGG = torch.where(inside_BGG.to(self.device), codes_BGG, known_BGG.to(self.device))
        if progress is not None:
            progress(1, calls)
        if self.iterative is None:
            return codes_BGG
        self._use("iterative")
        return refine(
            self.iterative,
            texts,
            codes_BGG,
            seeds=[seed + 1 for seed in seeds],  # other numbers than the direct stage's
            config=sampling.lopar,
            inside_BGG=inside_BGG,
            progress=(lambda done, _: progress(1 + done, calls)) if progress is not None else None,
        )

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Pictures float [B, 3, H, W] in [0, 1]."""
        return self.image_tokenizer.decode(codes_Bhw)

    def _use(self, stage: str) -> None:
        if self.backbone is not None:
            self.backbone.use(stage)


def form_of(
    settings: Mapping[str, Any], *, text: TextTokenizer, image: AnyImageTokenizer
) -> tuple[ContextForm, dict[str, str]]:
    """How a published backbone reads captions and pictures, and the fingerprints of what it reads with.

    settings: its `model.json`. ConfigError for a length that leaves no room for text.
    """
    vocabulary: Vocabulary | BilingualVocabulary
    if settings.get("task") == COGLM_TASK:
        vocabulary = BilingualVocabulary(num_image_codes=image.num_codes, text=text.ranges)
        layout = CogLMLayout(**settings["layout"])
        form = ContextForm(
            text_offset=vocabulary.text_offset,
            max_text=layout.max_text,
            image_position=layout.image_position + 1,
            is_causal=False,
            mask_id=vocabulary.start_of_image,
            pad_id=vocabulary.pad,
        )
    else:
        vocabulary = Vocabulary(image.num_codes, text.num_pieces)
        form = gpt_form(
            vocabulary,
            length=int(settings["length"]),
            grid=int(settings["grid"]),
            is_image_fixed=bool(settings.get("is_image_fixed", False)),
        )
    found = {
        "text_tokenizer": text.fingerprint,
        "image_tokenizer": image.fingerprint,
        "vocabulary": vocabulary.fingerprint,
    }
    return form, found


def _onto_device(stages: Mapping[str, StageModel], *, device: str) -> SharedBackbone | None:
    """Move the stages to their device; where that is not the machine's memory, different backbones take turns there."""
    direct, iterative = stages["direct"].model, stages["iterative"].model if "iterative" in stages else None
    if iterative is None or iterative.gpt is direct.gpt or device == "cpu":
        for stage in stages.values():
            stage.model.to(device)
        return None
    weights = {name: dict(stage.model.gpt.state_dict()) for name, stage in stages.items()}
    direct.to(device)
    shared = SharedBackbone(direct.gpt, weights, holds="direct")
    iterative.gpt = direct.gpt
    iterative.to(device)
    return shared
