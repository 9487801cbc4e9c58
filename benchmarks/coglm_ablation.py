"""What cluster sampling and attention upweighting do to CogLM's pictures: with and without each, on the same weights.

Command: make verify NAME=coglm_ablation [ARGS="--scenes 200 --root runs/coglm_smoke --emoji runs/coglm_emoji"]
A CogLM of the smoke preset (trained now, or found finished) draws held-out scenes with single codes or by clusters,
with or without weight on the text, once as boldly as the release does and once as surely as the smoke preset. The scene
reader says what is right; CapLoss, by the same weights, says how well the caption can be read off the picture. The root
of a finished chain with a CogLM on emoji can be given as well: there is no reader for those, so CapLoss stands alone.
The table goes to MLflow, into the experiment cogview/coglm_ablation. It has no bar: at this size either may come out
ahead.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.chains import add_root, run_job, stage_folders
from benchmarks.coglm import BATCH, TWO_SHAPE_SHARE, finished_coglm, trained_coglm
from benchmarks.harness import Figures, argument_parser, say, verify
from cogview.config import digest_of
from cogview.evaluation.attributes import judge, score_attributes
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import to_pictures
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import ClusterSampling, CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sampling.coglm_captioning import CogLMCaptioner
from cogview.scenes.scene import held_out_prompts
from cogview.shards.reader import TokenShards
from cogview.tokenizers.code_clusters import CodeClusters
from pipelines.runtime.chain import latest_output
from pipelines.runtime.tracking import open_tracker

NAME = "coglm_ablation"
BONUSES = (0.0, 1.4)
# Single codes and clusters at the same boldness: the release's temperatures, and those of the smoke preset.
STRENGTHS = {
    "bold": CogLMSampling(
        clusters=ClusterSampling(temperature=1.15, top_clusters=16), tokens=SamplingConfig(temperature=1.0, top_k=16)
    ),
    "sure": CogLMSampling(
        clusters=ClusterSampling(temperature=0.4, top_clusters=4, temperature_inside=0.2),
        tokens=SamplingConfig(temperature=0.2, top_k=12),
    ),
}
SHOWN = ("mean", "shape", "colour", "size", "background")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was measured, for the tracker."""

    scenes: int
    seed: int


def measure(*, root: Path, emoji: Path | None, scenes: int, seed: int) -> Figures:
    """Draw with every variant, and put the table into MLflow."""
    table = ablate_scenes(with_clusters(trained_coglm(root), root), scenes=scenes, seed=seed)
    if emoji is not None:
        table += ablate_captions(with_clusters(finished_coglm(emoji), emoji), root=emoji, number=scenes)
    track(table, root=root, settings=Settings(scenes=scenes, seed=seed))
    figures: dict[str, float | int | str] = {"scenes": scenes}
    for row in table:
        variant = f"{row['data']}/{row['strength']}/{row['codes']}, bonus {row['text bonus']:g}"
        figures |= {f"{variant}/{key}": row[key] for key in ("mean", "CapLoss") if row.get(key) is not None}
    return figures


def variants() -> Iterator[tuple[dict[str, Any], CogLMSampling]]:
    """Every combination, with what the table says of it."""
    for strength, sampling in STRENGTHS.items():
        for bonus in BONUSES:
            for codes in ("single codes", "clusters"):
                about = {"strength": strength, "codes": codes, "text bonus": bonus}
                yield about, replace(sampling, text_bonus=bonus, by_clusters=codes == "clusters")


def ablate_scenes(coglm: CogLM, *, scenes: int, seed: int) -> list[dict[str, Any]]:
    """Attributes right and CapLoss of each variant."""
    prompts = list(held_out_prompts(scenes, seed=seed, two_shape_share=TWO_SHAPE_SHARE))
    table = []
    for about, sampling in variants():
        codes_Bhw = drawn(coglm, [prompt.caption for prompt in prompts], sampling=sampling)
        pictures = to_pictures(coglm.decode(codes_Bhw))
        scores = score_attributes(
            [judge(picture, expected=prompt.scene) for picture, prompt in zip(pictures, prompts, strict=True)]
        )
        loss = cap_loss(coglm, [prompt.caption for prompt in prompts], codes_Bhw)
        table.append({"data": "scenes", **about, **{name: scores[name].value for name in SHOWN}, "CapLoss": loss})
        say(f"{about}: {scores['mean'].value:.1%} of the attributes right, CapLoss {loss:.3f}")
    return table


def ablate_captions(coglm: CogLM, *, root: Path, number: int) -> list[dict[str, Any]]:
    """CapLoss of each variant, for captions of held-out rows of a chain."""
    rows = TokenShards.open(stage_folders(root, "tokenize_pairs")["tokenize_pairs"], split="validation")
    places = np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(np.int64)
    captions = [text for text in rows.rows(places).texts if text.strip()]
    table = []
    for about, sampling in variants():
        loss = cap_loss(coglm, captions, drawn(coglm, captions, sampling=sampling))
        table.append({"data": "emoji", **about, **dict.fromkeys(SHOWN), "CapLoss": loss})
        say(f"emoji, {about}: CapLoss {loss:.3f}")
    return table


def drawn(coglm: CogLM, captions: Sequence[str], *, sampling: CogLMSampling) -> torch.Tensor:
    """One picture for each caption, with the same seeds for every variant."""
    return torch.cat(
        [
            coglm.draw(
                captions[start : start + BATCH],
                seeds=range(start, start + len(captions[start : start + BATCH])),
                sampling=sampling,
            )
            for start in range(0, len(captions), BATCH)
        ]
    )


def cap_loss(coglm: CogLM, captions: Sequence[str], codes_Bhw: torch.Tensor) -> float:
    """The mean over pictures."""
    scores = score_pairs(CogLMCaptioner.of(coglm), captions, codes_Bhw)
    return sum(score.cap_loss for score in scores) / len(scores)


def with_clusters(coglm: CogLM, root: Path) -> CogLM:
    """The same with the clusters of its codes, made now if they are not there yet."""
    run_job("cluster_codes", root=root)
    folder = latest_output("cluster_codes", flag="--clusters", root=root)
    return replace(coglm, clusters=CodeClusters.load(folder, image_tokenizer=coglm.image_tokenizer.fingerprint))


def track(table: Sequence[dict[str, Any]], *, root: Path, settings: Settings) -> None:
    """The table as an artifact of a run of its own."""
    digest = digest_of([settings, table])
    output = root / NAME / digest[:12]
    output.mkdir(parents=True, exist_ok=True)
    with open_tracker(job=NAME, output=output, config=settings, inputs={}, digest=digest, root=root) as tracker:
        tracker.log_table(table, "ablation.json")


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes of each variant (default: 200)")
    parser.add_argument("--seed", type=int, default=31, help="of the scenes (default: 31)")
    add_root(parser, preset="coglm_smoke")
    parser.add_argument("--emoji", type=Path, default=None, help="the root of a chain with a CogLM on emoji")
    flags = parser.parse_args()
    torch.set_num_threads(2)
    return verify(
        NAME,
        lambda: measure(root=flags.root, emoji=flags.emoji, scenes=flags.scenes, seed=flags.seed),
        bars=(),
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
