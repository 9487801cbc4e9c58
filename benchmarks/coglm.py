"""One set of weights that draws, names and completes: CogLM on scenes with combinations that it never saw.

Command: make verify NAME=coglm [ARGS="--scenes 400 --root runs/coglm_smoke"]; unknown flags go to pretrain_coglm
A CogLM is trained by the smoke preset (or found finished). It draws held-out scenes from captions in both languages,
and writes captions in both for pictures of such scenes; readers that know the corpus say what is right. To complete, it
is given a picture in which a box hides a shape, and a caption that asks for another kind and colour in its place: what
is visible cannot tell the answer, so what is drawn into the box must come from the text. Beside it stands how well the
same captions are drawn from nothing, which completion can hardly beat.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.captioning import judge as judge_captions
from benchmarks.chains import add_root, run_job, stage_folders
from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.evaluation.attributes import JudgedPicture, judge, score_attributes
from cogview.evaluation.grids import from_pictures, to_pictures
from cogview.sampling.caption_search import BeamConfig, search_captions
from cogview.sampling.captioning import Language
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sampling.coglm_captioning import CogLMCaptioner
from cogview.scenes.scene import COLOURS, KINDS, RADIUS, Prompt, Scene, draw_scene, held_out_prompts
from pipelines.runtime.chain import latest_output

BARS = (
    Bar(figure="drawing/attributes right", op=">=", value=0.85),
    Bar(figure="captions/attributes right", op=">=", value=0.85),
    Bar(figure="completion/colour and shape right", op=">=", value=0.8),
)
SAMPLING = CogLMSampling(by_clusters=False, tokens=SamplingConfig(temperature=0.2, top_k=12))
TWO_SHAPE_SHARE = 0.2
BATCH = 50
LANGUAGES: tuple[Language, ...] = ("en", "zh")
SIDE = 64  # of which a scene's measures are parts
REACH = 1.2  # of a shape's outline, in radii
MODELS = ("train_text_tokenizer", "train_image_tokenizer")  # of the chain


@dataclass(frozen=True, kw_only=True)
class Hole:
    """A picture to complete. hidden: bool [h, w]; asked: what a right picture shows; caption: of that."""

    picture: Scene
    hidden: Tensor
    asked: Scene
    caption: str


def measure(*, root: Path, scenes: int, seed: int, flags: Sequence[str]) -> Figures:
    """Train, or find trained, and let it do all three."""
    coglm = trained_coglm(root, flags)
    return {"scenes": scenes, **skills(coglm, scenes=scenes, seed=seed)}


def trained_coglm(root: Path, flags: Sequence[str] = ()) -> CogLM:
    """The CogLM under this root, with its chain, trained now if it is not there yet."""
    run_job("road", root=root, preset="coglm_smoke")
    run_job("pretrain_coglm", *flags, root=root)
    return finished_coglm(root)


def finished_coglm(root: Path) -> CogLM:
    """The CogLM that was trained last under a root, with the tokenizers of the chain."""
    folders = stage_folders(root, *MODELS)
    return CogLM.load(
        latest_output("pretrain_coglm", flag="--checkpoint", root=root),
        text_tokenizer=folders["train_text_tokenizer"],
        image_tokenizer=folders["train_image_tokenizer"],
    )


def skills(coglm: CogLM, *, scenes: int, seed: int) -> dict[str, float]:
    """The figures of a model, whatever trained it."""
    figures: dict[str, float] = {}
    asked = list(held_out_prompts(scenes, seed=seed, two_shape_share=TWO_SHAPE_SHARE))
    drawn = score_attributes(draw(coglm, asked))
    say(f"drawing: {drawn['mean'].value:.1%} of the attributes right")
    figures |= {"drawing/attributes right": drawn["mean"].value}
    figures |= {f"drawing/{name}": drawn[name].value for name in ("shape", "colour", "size", "background", "position")}
    shown = list(held_out_prompts(scenes, seed=seed + 1, two_shape_share=TWO_SHAPE_SHARE))
    judged = {language: judge_captions(shown, write(coglm, shown, language)) for language in LANGUAGES}
    named = score_attributes([one for some in judged.values() for one in some])
    say(f"captions: {named['mean'].value:.1%} of the attributes right")
    figures |= {"captions/attributes right": named["mean"].value}
    figures |= {f"captions/{name}": named[name].value for name in ("shape", "colour", "size", "background", "position")}
    figures |= {f"captions/{language}": score_attributes(judged[language])["mean"].value for language in LANGUAGES}
    some = holes(scenes, grid=coglm.layout.grid, seed=seed + 2)
    figures |= {f"completion/{name}": value for name, value in completion_figures(fill(coglm, some), some).items()}
    say(f"completion: {figures['completion/colour and shape right']:.1%} right in colour and shape")
    whole = fill(coglm, [replace(hole, hidden=torch.ones_like(hole.hidden)) for hole in some])
    figures |= {f"the same drawn whole/{name}": value for name, value in completion_figures(whole, some).items()}
    return figures


def completion_figures(filled: Sequence[JudgedPicture], some: Sequence[Hole]) -> dict[str, float]:
    """How many pictures are right in the kind and colour of all that they show, and in each."""
    both = [one.marks["colour"] == one.marks["shape"] == 1 for one in filled]
    single = [is_right for is_right, hole in zip(both, some, strict=True) if len(hole.asked.shapes) == 1]
    figures = {"colour and shape right": sum(both) / len(both), "of one shape": sum(single) / max(1, len(single))}
    return figures | {name: sum(one.marks[name] for one in filled) / len(filled) for name in ("shape", "colour")}


def draw(coglm: CogLM, prompts: Sequence[Prompt]) -> list[JudgedPicture]:
    """What each caption makes it draw, read back."""
    judged = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        seeds = range(start, start + len(some))
        codes_Bhw = coglm.draw([prompt.caption for prompt in some], seeds=seeds, sampling=SAMPLING)
        pictures = to_pictures(coglm.decode(codes_Bhw))
        judged += [judge(picture, expected=prompt.scene) for picture, prompt in zip(pictures, some, strict=True)]
    return judged


def write(coglm: CogLM, prompts: Sequence[Prompt], language: Language) -> list[str]:
    """A caption for the picture of each scene, by beam search."""
    texts: list[str] = []
    for start in range(0, len(prompts), BATCH):
        codes_Bhw = encoded(coglm, [prompt.scene for prompt in prompts[start : start + BATCH]])
        found = search_captions(CogLMCaptioner.of(coglm), codes_Bhw, beams=BeamConfig(), language=language)
        texts += [captions[0].text for captions in found]
    return texts


def fill(coglm: CogLM, some: Sequence[Hole]) -> list[JudgedPicture]:
    """What each hole is filled with, read back."""
    judged = []
    for start in range(0, len(some), BATCH):
        batch = some[start : start + BATCH]
        codes_Bhw = coglm.fill(
            [hole.caption for hole in batch],
            encoded(coglm, [hole.picture for hole in batch]),
            torch.stack([hole.hidden for hole in batch]),
            seeds=range(start, start + len(batch)),
            sampling=SAMPLING,
        )
        pictures = to_pictures(coglm.decode(codes_Bhw))
        judged += [judge(picture, expected=hole.asked) for picture, hole in zip(pictures, batch, strict=True)]
    return judged


def holes(number: int, *, grid: int, seed: int) -> list[Hole]:
    """Pictures with a small shape under a box, asked to show a held-out one of another kind and colour in its place.

    A large shape touches nearly every code: with it hidden there would be no picture left to complete. Scenes of two
    have small ones only, and so are a third of the pictures; the second stays visible, as far as the box leaves it.
    """
    prompts = held_out_prompts(8 * number, seed=seed, two_shape_share=TWO_SHAPE_SHARE)
    small = [prompt for prompt in prompts if prompt.scene.shapes[0].size == "small"][:number]
    found = []
    for place, prompt in enumerate(small):
        shape, *others = prompt.scene.shapes
        kinds = [kind for kind in KINDS if kind not in {one.kind for one in prompt.scene.shapes}]
        colours = [colour for colour in COLOURS if colour not in {one.colour for one in prompt.scene.shapes}]
        there = replace(shape, kind=kinds[place % len(kinds)], colour=colours[place % len(colours)])
        found.append(
            Hole(
                picture=replace(prompt.scene, shapes=(there, *others)),
                hidden=box_around(shape.centre, reach=REACH * RADIUS[shape.size], grid=grid),
                asked=prompt.scene,
                caption=prompt.caption,
            )
        )
    return found


def box_around(centre: tuple[float, float], *, reach: float, grid: int) -> Tensor:
    """bool [grid, grid], True for the codes that a shape touches."""
    code = SIDE / grid
    hidden_GG = torch.zeros(grid, grid, dtype=torch.bool)
    columns, rows = (slice(max(0, math.floor((at - reach) / code)), math.ceil((at + reach) / code)) for at in centre)
    hidden_GG[rows, columns] = True
    return hidden_GG


@torch.inference_mode()
def encoded(coglm: CogLM, scenes: Sequence[Scene]) -> Tensor:
    """Image codes of drawn scenes, int64 [scenes, grid, grid]."""
    return coglm.image_tokenizer.encode(from_pictures([draw_scene(one, image_size=coglm.image_size) for one in scenes]))


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes of each skill (default: 400)")
    parser.add_argument("--seed", type=int, default=21, help="of the scenes (default: 21)")
    add_root(parser, preset="coglm_smoke")
    flags, others = parser.parse_known_args()
    torch.set_num_threads(2)
    return verify(
        "coglm",
        lambda: measure(root=flags.root, scenes=flags.scenes, seed=flags.seed, flags=others),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
