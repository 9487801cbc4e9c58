"""One set of weights that draws, names and completes: CogLM on scenes with combinations that it never saw.

Command: make verify NAME=coglm [ARGS="--scenes 400 --root runs/coglm_smoke"]; unknown flags go to pretrain_coglm
A CogLM is trained by the smoke preset (or found finished). It draws held-out scenes from captions in both languages,
and writes captions in both for pictures of such scenes; readers that know the corpus say what is right. To complete, it
is given a picture in which a box hides a shape, and a caption that asks for another kind and colour in its place: what
is visible cannot tell the answer, so what is drawn into the box must come from the text. The captions are of scenes
that the corpus would have next; the same of held-out combinations, which ask it to compose besides, stands beside them,
and so does how well the same captions are drawn from nothing, which completion can hardly beat. `complete` draws
eight candidates and shows first the one for which the same weights find the caption likeliest; that one is judged as
well as a single candidate.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.captioning import judge as judge_captions
from benchmarks.chains import add_root, run_job, stage_folders
from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.evaluation.attributes import JudgedPicture, judge, score_attributes
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import from_pictures, to_pictures
from cogview.sampling.caption_search import BeamConfig, search_captions
from cogview.sampling.captioning import Language
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sampling.coglm_captioning import CogLMCaptioner
from cogview.scenes.reading import compare, read_scene
from cogview.scenes.scene import COLOURS, KINDS, RADIUS, Prompt, Scene, Shape, corpus, draw_scene, held_out_prompts
from pipelines import complete
from pipelines.runtime.chain import latest_output
from pipelines.scrape_pairs import PRESETS

SAMPLING = CogLMSampling(by_clusters=False, tokens=SamplingConfig(temperature=0.2, top_k=12))
TWO_SHAPE_SHARE = 0.2
BATCH = 50
COMPLETE = complete.PRESETS["smoke"]
BEST = f", best of {COMPLETE.candidates}"
LANGUAGES: tuple[Language, ...] = ("en", "zh")
SIDE = 64  # of which a scene's measures are parts
REACH = 1.2  # of a shape's outline, in radii
MODELS = ("train_text_tokenizer", "train_image_tokenizer")  # of the chain
BARS = (
    Bar(figure="drawing/attributes right", op=">=", value=0.85),
    Bar(figure="captions/attributes right", op=">=", value=0.85),
    Bar(figure="completion/colour and shape right", op=">=", value=0.8),
    Bar(figure=f"completion{BEST}/colour and shape right", op=">=", value=0.8),
)


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
    held_out = held_out_prompts(8 * scenes, seed=seed + 2, two_shape_share=TWO_SHAPE_SHARE)
    for name, prompts in (("completion", new_prompts(4 * scenes)), ("completion, held out", held_out)):
        some = list(itertools.islice(holes(prompts, grid=coglm.layout.grid), scenes))
        candidates = [fill(coglm, some, first_seed=number * scenes) for number in range(COMPLETE.candidates)]
        open_ones = [replace(hole, hidden=torch.ones_like(hole.hidden)) for hole in some]
        ways = {
            "": candidates[0],
            BEST: likeliest(coglm, candidates, [hole.caption for hole in some]),
            ", drawn whole": fill(coglm, open_ones),
        }
        for way, codes_Bhw in ways.items():
            judged_holes = completion_figures(pictures_of(coglm, codes_Bhw), some)
            say(f"{name}{way}: {judged_holes['colour and shape right']:.1%} right in colour and shape")
            figures |= {f"{name}{way}/{key}": value for key, value in judged_holes.items()}
    return figures


def completion_figures(filled: Sequence[Image.Image], some: Sequence[Hole]) -> dict[str, float]:
    """How many pictures show the kind and colour that were asked for where the box was, and in everything they show."""
    asked = [hole.asked.shapes[0] for hole in some]
    readings = [read_scene(picture) for picture in filled]
    pairs = [(one, shape_near(reading, one.centre)) for one, reading in zip(asked, readings, strict=True)]
    is_right = [there is not None and (one.kind, one.colour) == (there.kind, there.colour) for one, there in pairs]
    everything = [compare(hole.asked, reading) for hole, reading in zip(some, readings, strict=True)]
    answers = {
        "colour and shape right": is_right,
        "shape": [there is not None and one.kind == there.kind for one, there in pairs],
        "colour": [there is not None and one.colour == there.colour for one, there in pairs],
        "all shapes right": [marks["colour"] == marks["shape"] == 1 for marks in everything],
    }
    for count, name in ((1, "one shape"), (2, "two shapes")):
        of_them = [right for right, hole in zip(is_right, some, strict=True) if len(hole.asked.shapes) == count]
        answers |= {f"colour and shape right, {name}": of_them} if of_them else {}
    return {name: sum(right) / len(right) for name, right in answers.items()}


def shape_near(scene: Scene, centre: tuple[float, float]) -> Shape | None:
    """The shape whose centre is nearest to this one; None if there is none within a small shape's radius."""
    apart = {math.dist(shape.centre, centre): shape for shape in scene.shapes}
    nearest = min(apart, default=math.inf)
    return apart[nearest] if nearest <= RADIUS["small"] else None


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


def fill(coglm: CogLM, some: Sequence[Hole], *, first_seed: int = 0) -> Tensor:
    """The pictures' codes with their holes filled, int64 [holes, grid, grid]."""
    filled = []
    for start in range(0, len(some), BATCH):
        batch = some[start : start + BATCH]
        codes_Bhw = coglm.fill(
            [hole.caption for hole in batch],
            encoded(coglm, [hole.picture for hole in batch]),
            torch.stack([hole.hidden for hole in batch]),
            seeds=range(first_seed + start, first_seed + start + len(batch)),
            sampling=COMPLETE.filling,
        )
        filled.append(codes_Bhw)
    return torch.cat(filled)


def likeliest(coglm: CogLM, candidates: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
    """Of several candidates (codes [B, h, w] each) the one for which CogLM itself finds the caption likeliest."""
    captioner = CogLMCaptioner.of(coglm)
    losses = torch.tensor(
        [[score.cap_loss for score in score_pairs(captioner, captions, codes_Bhw)] for codes_Bhw in candidates]
    )
    return torch.stack(list(candidates))[losses.argmin(dim=0), torch.arange(len(captions))]


def pictures_of(coglm: CogLM, codes_Bhw: Tensor) -> list[Image.Image]:
    """Codes as pictures."""
    starts = range(0, len(codes_Bhw), BATCH)
    return [picture for start in starts for picture in to_pictures(coglm.decode(codes_Bhw[start : start + BATCH]))]


def new_prompts(number: int) -> Iterator[Prompt]:
    """Scenes that the demo's corpus would have next, each unlike all before, with English and Chinese in turn."""
    demo = PRESETS["smoke"].demo
    assert demo is not None
    longer = corpus(demo.seed, demo.num_scenes + number, two_shape_share=demo.two_shape_share)
    for place, found in enumerate(itertools.islice(longer, demo.num_scenes, None)):
        is_english = place % 2 == 0
        yield Prompt(found.scene, found.english if is_english else found.chinese, "en" if is_english else "zh")


def holes(prompts: Iterable[Prompt], *, grid: int) -> Iterator[Hole]:
    """Pictures with a small shape under a box, asked to show another kind in another colour in its place.

    A large shape touches nearly every code: with it hidden there would be no picture left to complete. Scenes of two
    have small ones only, and so are more frequent than in the corpus; the second stays visible, as far as the box
    leaves it.
    """
    small = (prompt for prompt in prompts if prompt.scene.shapes[0].size == "small")
    for place, prompt in enumerate(small):
        shape, *others = prompt.scene.shapes
        kinds = [kind for kind in KINDS if kind not in {one.kind for one in prompt.scene.shapes}]
        colours = [colour for colour in COLOURS if colour not in {one.colour for one in prompt.scene.shapes}]
        there = replace(shape, kind=kinds[place % len(kinds)], colour=colours[place % len(colours)])
        yield Hole(
            picture=replace(prompt.scene, shapes=(there, *others)),
            hidden=box_around(shape.centre, reach=REACH * RADIUS[shape.size], grid=grid),
            asked=prompt.scene,
            caption=prompt.caption,
        )


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
