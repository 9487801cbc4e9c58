"""Does the captioner know which of several pictures shows what was asked for? Self-reranking (section 3.2, figure 9).

Command: make verify NAME=reranking [ARGS="--prompts 200 --candidates 16"]; unknown flags go to finetune_captioning
For scenes that the corpus never showed, the model of a finished chain draws candidates, the captioner that is finetuned
from it scores them by CapLoss, and the scene reader, which neither of them knows, says how many attributes each has
wrong. The best of n is the exact mean over all choices of n among the candidates. Then, for drawn scenes, the
right caption competes with the same one with one attribute changed. With --save the curves go to docs/reranking.png
and the candidates of one prompt, in their order, to docs/candidates.png.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from benchmarks.captioner import BATCH, held_out_scenes, load_captioner, scene_codes
from benchmarks.chains import model_folders
from benchmarks.harness import REPOSITORY, Bar, Figures, argument_parser, say, verify
from cogview.evaluation.attributes import judge
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.evaluation.reranking import Floats, best_of, ranking
from cogview.sampling.captioning import Captioner
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.scenes.reading import ATTRIBUTES
from cogview.scenes.scene import BACKGROUNDS, COLOURS, KINDS, SIZES, Prompt, Scene, captions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = (
    Bar(figure="attribute error, best of 8 / one", op="<=", value=0.5),
    Bar(figure="steps of n at which CapLoss falls", op="==", value=1.0),
    Bar(figure="right caption below a wrong one", op=">=", value=0.95),
)
# The temperature of the release, and the one at which the smoke preset draws its scenes.
SAMPLINGS = {"1": SamplingConfig(temperature=1.0, top_k=12), "0.2": SamplingConfig(temperature=0.2, top_k=12)}
BARRED = "1"
BEST_OF = 8
CHANGED = ("shape", "colour", "size", "background")
SHEET_CANDIDATES = 24
WORDINGS = 12  # there are six templates for one shape, and four for two
DOCS = REPOSITORY / "docs"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """CapLoss and the share of wrong attributes of every candidate, [prompts, candidates]."""

    losses_PM: Floats
    errors_PM: Floats

    def curve(self, values_PM: Floats, *, by: Floats) -> list[float]:
        """The mean value of the best of 1, 2, ... by the lowest of `by`."""
        return [best_of(by, values_PM, n=n) for n in range(1, by.shape[1] + 1)]


def measure(*, root: Path, prompts: int, candidates: int, pairs: int, save: bool, flags: Sequence[str]) -> Figures:
    """Draw, score, read; then the pairs of captions."""
    captioner, folders = load_captioner(root, flags), model_folders(root)
    painter = TextToImage.load(
        folders["checkpoint"],
        text_tokenizer=folders["text_tokenizer"],
        image_tokenizer=folders["image_tokenizer"],
    )
    asked = held_out_scenes(prompts, seed=23)
    figures: dict[str, float | int | str] = {"prompts": prompts, "candidates": candidates}
    found = {}
    for name, sampling in SAMPLINGS.items():
        found[name] = draw_candidates(painter, captioner, asked, number=candidates, sampling=sampling)
        figures |= curve_figures(found[name], temperature=name)
        if name == BARRED:
            figures |= barred_figures(found[name])
    figures |= pair_figures(captioner, held_out_scenes(pairs, seed=29))
    if save:
        plot_curves(found).savefig(DOCS / "reranking.png", dpi=110)
        draw_ordered(painter, captioner, asked[0]).save(DOCS / "candidates.png")
    return figures


def draw_candidates(
    painter: TextToImage, captioner: Captioner, asked: Sequence[Prompt], *, number: int, sampling: SamplingConfig
) -> Candidates:
    """Draw `number` pictures for each prompt, and score each by the captioner and by the reader."""
    orders = [prompt for prompt in asked for _ in range(number)]
    losses, errors = [], []
    for start in range(0, len(orders), BATCH):
        some = orders[start : start + BATCH]
        texts = [prompt.caption for prompt in some]
        codes_Bhw = painter.codes(texts, seeds=list(range(start, start + len(some))), sampling=sampling)
        losses += [score.cap_loss for score in score_pairs(captioner, texts, codes_Bhw)]
        pictures = to_pictures(painter.decode(codes_Bhw))
        errors += [1 - judge(picture, expected=p.scene).mean for picture, p in zip(pictures, some, strict=True)]
        if start % (10 * BATCH) == 0:
            say(f"temperature {sampling.temperature:g}: {start + len(some)} of {len(orders)} candidates")
    shape = (len(asked), number)
    return Candidates(losses_PM=np.array(losses).reshape(shape), errors_PM=np.array(errors).reshape(shape))


def barred_figures(found: Candidates) -> dict[str, float]:
    """What the bars are on."""
    errors = found.curve(found.errors_PM, by=found.losses_PM)
    losses = found.curve(found.losses_PM, by=found.losses_PM)
    falls = [after < before for before, after in pairwise(losses)]
    return {
        "attribute error, best of 8 / one": errors[BEST_OF - 1] / errors[0],
        "steps of n at which CapLoss falls": sum(falls) / len(falls),
    }


def curve_figures(found: Candidates, *, temperature: str) -> dict[str, float]:
    """CapLoss and attribute error of the best of n, and the error if the reader itself had chosen."""
    figures = {}
    for n in (1, 2, 4, 8, 16, 32, 64):
        if n <= found.losses_PM.shape[1]:
            figures[f"temperature {temperature}/CapLoss, best of {n}"] = best_of(found.losses_PM, found.losses_PM, n=n)
            figures[f"temperature {temperature}/error, best of {n}"] = best_of(found.losses_PM, found.errors_PM, n=n)
            figures[f"temperature {temperature}/error, the reader chooses of {n}"] = best_of(
                found.errors_PM, found.errors_PM, n=n
            )
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


def draw_ordered(painter: TextToImage, captioner: Captioner, prompt: Prompt) -> Image.Image:
    """Candidates of one prompt in the order of CapLoss, with what the reader says of each: figure 6."""
    texts, seeds = [prompt.caption] * SHEET_CANDIDATES, list(range(SHEET_CANDIDATES))
    codes_Bhw = painter.codes(texts, seeds=seeds, sampling=SAMPLINGS[BARRED])
    losses = [score.cap_loss for score in score_pairs(captioner, texts, codes_Bhw)]
    pictures = to_pictures(painter.decode(codes_Bhw))
    tiles = []
    for number in ranking(losses):
        marks = judge(pictures[number], expected=prompt.scene).marks
        wrong = [name for name in ATTRIBUTES if marks[name] < 1]
        note = f"wrong: {', '.join(wrong)}" if wrong else "all right"
        tiles.append(Tile(images=(pictures[number],), caption=f"CapLoss {losses[number]:.3f}", note=note))
    return draw_sheet(tiles, title=prompt.caption, columns=8, picture_side=112)


def plot_curves(found: dict[str, Candidates]) -> "Figure":
    """CapLoss and attribute error against the number of candidates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, some), colour in zip(found.items(), ("#d1495b", "#3b6ea5"), strict=True):
        numbers = np.arange(1, some.losses_PM.shape[1] + 1)
        left.plot(numbers, some.curve(some.losses_PM, by=some.losses_PM), color=colour)
        errors = 100 * np.array(some.curve(some.errors_PM, by=some.losses_PM))
        right.plot(numbers, errors, color=colour, label=f"self-reranking, temperature {name}")
        oracle = 100 * np.array(some.curve(some.errors_PM, by=some.errors_PM))
        right.plot(numbers, oracle, ":", color=colour, label=f"the reader chooses, temperature {name}")
    left.set(title="CapLoss of the best", xlabel="candidates", ylabel="nats per token")
    right.set(title="Wrong attributes of the best", xlabel="candidates", ylabel="%", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e2e5ea", linewidth=0.8)
    figure.legend(handles=right.get_lines(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="held-out scenes to draw (default: 200)")
    parser.add_argument("--candidates", type=int, default=16, help="pictures of each prompt (default: 16)")
    parser.add_argument("--pairs", type=int, default=400, help="scenes with a right and wrong captions (default: 400)")
    parser.add_argument("--root", type=Path, default=REPOSITORY / "runs" / "smoke", help="a finished chain")
    flags, others = parser.parse_known_args()
    torch.set_num_threads(2)
    return verify(
        "reranking",
        lambda: measure(
            root=flags.root.resolve(),
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
