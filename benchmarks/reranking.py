"""Does the captioner know which of several pictures shows what was asked for? Self-reranking (section 3.2, figure 9).

Command: make verify NAME=reranking [ARGS="--prompts 200 --candidates 16"]; unknown flags go to finetune_captioning
For scenes that the corpus never showed, `rank_candidates` lets the model of a finished chain draw candidates, at the
temperature of the release and at the one of the smoke preset's scenes. The captioner that is finetuned from it scores
them by CapLoss, and the scene reader, which neither of them knows, says how many attributes each has wrong. Then, for
drawn scenes, the right caption competes with the same one with one attribute changed. With --save the curves go to
docs/reranking.png and the candidates of one prompt, in their order, to docs/candidates.png.
"""

import csv
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.captioner import held_out_scenes, load_captioner, scene_codes
from benchmarks.chains import add_root, run_job
from benchmarks.harness import REPOSITORY, Bar, Figures, argument_parser, verify
from cogview.evaluation.caption_loss import score_pairs
from cogview.sampling.captioning import Captioner
from cogview.scenes.scene import BACKGROUNDS, COLOURS, KINDS, SIZES, Prompt, Scene, captions
from pipelines.rank_candidates import POWERS
from pipelines.runtime.chain import latest_output

BARS = (
    Bar(figure="attribute error, best of 8 / one", op="<=", value=0.5),
    Bar(figure="steps of n at which CapLoss falls", op="==", value=1.0),
    Bar(figure="right caption below a wrong one", op=">=", value=0.95),
)
TEMPERATURES = ("1", "0.2")
BARRED = "1"
BEST_OF = 8
CAP_LOSS, ERROR = "CapLoss of the best by CapLoss", "wrong attributes of the best by CapLoss"
LEAST_ERROR = "wrong attributes of the best by the reader"
CHANGED = ("shape", "colour", "size", "background")
WORDINGS = 12  # there are six templates for one shape, and four for two
DOCS = REPOSITORY / "docs"


def measure(*, root: Path, prompts: int, candidates: int, pairs: int, save: bool, flags: Sequence[str]) -> Figures:
    """Draw, score, read; then the pairs of captions."""
    captioner = load_captioner(root, flags)
    figures: dict[str, float | int | str] = {"prompts": prompts, "candidates": candidates}
    for temperature in TEMPERATURES:
        folder = rank(root, "--num-scenes", prompts, "--candidates", candidates, "--sampling.temperature", temperature)
        with open(folder / "curves.csv", newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        figures |= curve_figures(rows, temperature=temperature)
        if temperature == BARRED:
            figures |= barred_figures(rows)
            if save:
                shutil.copyfile(folder / "curves.png", DOCS / "reranking.png")
                shutil.copyfile(folder / "candidates.png", DOCS / "candidates.png")
    return figures | pair_figures(captioner, held_out_scenes(pairs, seed=29))


def rank(root: Path, *flags: object) -> Path:
    """The output of rank_candidates with these flags."""
    run_job("rank_candidates", "--seed", "23", *map(str, flags), root=root)
    return latest_output("rank_candidates", flag="--root", root=root)


def barred_figures(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the bars are on."""
    errors = [row[ERROR] for row in rows]
    falls = [after[CAP_LOSS] < before[CAP_LOSS] for before, after in pairwise(rows)]
    return {
        "attribute error, best of 8 / one": errors[BEST_OF - 1] / errors[0],
        "steps of n at which CapLoss falls": sum(falls) / len(falls),
    }


def curve_figures(rows: Sequence[Mapping[str, float]], *, temperature: str) -> dict[str, float]:
    """CapLoss and attribute error of the best of n, and the error if the reader itself had chosen."""
    figures = {}
    for row in rows:
        if row["n"] in POWERS:
            best = f"best of {row['n']:.0f}"
            figures[f"temperature {temperature}/CapLoss, {best}"] = row[CAP_LOSS]
            figures[f"temperature {temperature}/error, {best}"] = row[ERROR]
            figures[f"temperature {temperature}/error, the reader chooses of {row['n']:.0f}"] = row[LEAST_ERROR]
    return figures


def pair_figures(captioner: Captioner, scenes: Sequence[Prompt]) -> dict[str, float]:
    """How often the right caption of a drawn scene has the lower CapLoss than one with one attribute changed."""
    codes_Bhw = scene_codes(scenes, captioner=captioner)
    right = [score.cap_loss for score in score_pairs(captioner, [prompt.caption for prompt in scenes], codes_Bhw)]
    figures, shares = {}, []
    for attribute in CHANGED:
        wrong = [wrong_caption(prompt, attribute, number=number) for number, prompt in enumerate(scenes)]
        usable = [number for number, text in enumerate(wrong) if text]
        scores = score_pairs(captioner, [wrong[number] for number in usable], codes_Bhw[usable])
        wins = [right[number] < score.cap_loss for number, score in zip(usable, scores, strict=True)]
        figures[f"right caption below a wrong {attribute}"] = sum(wins) / len(wins)
        shares += wins
    return {"right caption below a wrong one": sum(shares) / len(shares), "caption pairs": len(shares), **figures}


def wrong_caption(prompt: Prompt, attribute: str, *, number: int) -> str:
    """The caption in the same words, but for one attribute of the first shape or of the background; "" if none is left.

    A scene of two shapes has small ones only, so its size cannot be changed into another scene of the corpus.
    """
    scene, rng = prompt.scene, random.Random(f"{attribute}:{number}")
    first = scene.shapes[0]
    if attribute == "size" and len(scene.shapes) > 1:
        return ""
    wrong = {
        "shape": replace(first, kind=rng.choice([name for name in KINDS if name != first.kind])),
        "colour": replace(first, colour=rng.choice([name for name in COLOURS if name != first.colour])),
        "size": replace(first, size=rng.choice([name for name in SIZES if name != first.size])),
    }
    changed = replace(scene, shapes=(wrong.get(attribute, first), *scene.shapes[1:]))
    if attribute == "background":
        changed = replace(scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))
    return next((text for said, text in phrasings(scene, changed) if said == prompt.caption), "")


def phrasings(scene: Scene, other: Scene) -> Iterator[tuple[str, str]]:
    """Every wording of the scene, with the same wording of the other one."""
    for place in range(WORDINGS):
        rng = _Always((place + 0.5) / WORDINGS)
        yield from zip(captions(scene, rng=rng), captions(other, rng=rng), strict=True)


@dataclass(frozen=True)
class _Always:
    """A source of one number, which picks one template."""

    value: float

    def random(self) -> float:
        return self.value


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="held-out scenes to draw (default: 200)")
    parser.add_argument("--candidates", type=int, default=16, help="pictures of each prompt (default: 16)")
    parser.add_argument("--pairs", type=int, default=400, help="scenes with a right and wrong captions (default: 400)")
    add_root(parser)
    flags, others = parser.parse_known_args()
    torch.set_num_threads(2)
    return verify(
        "reranking",
        lambda: measure(
            root=flags.root,
            prompts=flags.prompts,
            candidates=flags.candidates,
            pairs=flags.pairs,
            save=flags.save,
            flags=others,
        ),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
