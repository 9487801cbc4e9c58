"""The models of text-guided completion, from their folders: what the job and the web page load alike.

In: the folders of a CogLM, its tokenizers and, where they were trained on it, of both super-resolution stages. Out: a
`Completer` (CogView2).
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cogview.evaluation.caption_loss import score_pairs
from cogview.sampling.captioning import CaptionModel
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sampling.coglm_captioning import CogLMCaptioner
from cogview.sampling.completion import Completer
from cogview.sampling.hierarchical_magnifier import HierarchicalMagnifier, HierarchicalSampling
from cogview.sampling.hierarchy import LoPARConfig
from pipelines.runtime.chain import fill_from_chain, latest_output
from pipelines.runtime.jobs import COMPLETE_NAME, given_folders

TOKENIZERS = {"text_tokenizer": "train_text_tokenizer", "image_tokenizer": "train_image_tokenizer"}
STAGES = {"direct": "finetune_direct_sr", "iterative": "finetune_iterative_sr"}
PAINTER = "pretrain_coglm"
# Small models are drawn from surely, but holes so boldly that candidates differ and there is something to choose from.
SMOKE_FILLING = CogLMSampling(by_clusters=False, tokens=SamplingConfig(temperature=0.5, top_k=12))
SMOKE_STAGES = HierarchicalSampling(
    by_clusters=False,
    tokens=SamplingConfig(temperature=0.2, top_k=12),
    lopar=LoPARConfig(top_k=(12,), temperature=0.2),
)


@dataclass(frozen=True, kw_only=True)
class CompleterFolders:
    """checkpoint: a CogLM; clusters: of its codes; direct, iterative: stages trained on it, or None."""

    checkpoint: Path | None = None
    text_tokenizer: Path | None = None
    image_tokenizer: Path | None = None
    clusters: Path | None = None
    direct: Path | None = None
    iterative: Path | None = None

    @classmethod
    def of(cls, config: Any) -> "CompleterFolders":
        """Those of a config that has fields of these names."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def find_folders(given: CompleterFolders, *, root: Path, magnifies: bool, needs_clusters: bool) -> CompleterFolders:
    """With what is not given found under a root: what was made last. Stages are left out where there are none.

    ConfigError when there is no CogLM, or no clusters where they are needed.
    """
    found: dict[str, Path] = {}
    if given.checkpoint is None:
        found["checkpoint"] = latest_output(PAINTER, flag="--checkpoint", root=root)
    if needs_clusters and given.clusters is None:
        found["clusters"] = latest_output("cluster_codes", flag="--clusters", root=root)
    if magnifies and given.direct is None and _is_done("finetune_direct_sr", root=root):
        stages = {name: job for name, job in STAGES.items() if _is_done(job, root=root)}
        found |= {name: latest_output(job, flag=f"--{name}", root=root) for name, job in stages.items()}
    known = {field.name: getattr(given, field.name) for field in fields(given)}
    filled: CompleterFolders = fill_from_chain(CompleterFolders(**{**known, **found}), TOKENIZERS, root=root)
    return filled


def load_completer(folders: CompleterFolders, *, filling: CogLMSampling, device: str) -> Completer:
    """The models. filling: how CogLM draws hidden codes. ConfigError names a folder that is missing."""
    needed = given_folders(folders, {"checkpoint": PAINTER, **TOKENIZERS})
    checkpoint, text, image = needed["checkpoint"], needed["text_tokenizer"], needed["image_tokenizer"]
    coglm = CogLM.load(checkpoint, text_tokenizer=text, image_tokenizer=image, clusters=folders.clusters, device=device)
    magnifier = None
    if folders.direct is not None:
        magnifier = HierarchicalMagnifier.load(
            folders.direct,
            folders.iterative,
            text_tokenizer=text,
            image_tokenizer=image,
            clusters=folders.clusters,
            device=device,
        )
    return Completer(
        fill=partial(coglm.fill, sampling=filling),
        image_tokenizer=coglm.image_tokenizer,
        grid=coglm.layout.grid,
        magnifier=magnifier,
        judge=partial(caption_losses, CogLMCaptioner.of(coglm)),
    )


def caption_losses(captioner: CaptionModel, caption: str, codes_Bgg: Tensor) -> list[float]:
    """CapLoss of a caption for each picture; nan for a caption without a token, which cannot be read off anything."""
    if not captioner.text_tokenizer.encode(caption):
        return [math.nan] * len(codes_Bgg)
    return [score.cap_loss for score in score_pairs(captioner, [caption] * len(codes_Bgg), codes_Bgg)]


def _is_done(job: str, *, root: Path) -> bool:
    return any((root / job).glob(f"*/{COMPLETE_NAME}"))
