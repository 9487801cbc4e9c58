"""Does a captioner name what is in the picture? Scenes with combinations that it never saw, in both languages.

Command: make verify NAME=captioning [ARGS="--scenes 400 --root runs/smoke"]; unknown flags go to finetune_captioning
A captioner is finetuned from the model of a finished chain (or found finished). It writes an English and a Chinese
caption for pictures of held-out scenes, and the caption reader, which knows the templates of the corpus and guesses
nothing, reads them back: a caption that follows none of them is wrong in everything. The bar is on captions by beam
search; greedy and drawn ones stand beside them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.captioner import BATCH, held_out_scenes, load_captioner, scene_codes
from benchmarks.chains import add_root
from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.evaluation.attributes import JudgedPicture, score_attributes
from cogview.sampling.caption_search import BeamConfig, draw_captions, search_captions
from cogview.sampling.captioning import Captioner, Language
from cogview.sampling.choice import SamplingConfig
from cogview.scenes.caption_reading import read_caption
from cogview.scenes.reading import ATTRIBUTES, compare
from cogview.scenes.scene import Prompt, Scene

BARS = (Bar(figure="attributes named right", op=">=", value=0.9),)
METHODS = ("beam", "greedy", "sampled")
LANGUAGES: tuple[Language, ...] = ("en", "zh")
NOTHING = {name: 0.0 for name in (*ATTRIBUTES, "position", "count")}


def measure(*, root: Path, scenes: int, seed: int, flags: Sequence[str]) -> Figures:
    """Caption held-out scenes with each method and read the captions back."""
    captioner = load_captioner(root, flags)
    prompts = held_out_scenes(scenes, seed=seed)
    codes_Bhw = scene_codes(prompts, captioner=captioner)
    figures: dict[str, float | int | str] = {"scenes": scenes, "captions of each method": 2 * scenes}
    for method in METHODS:
        judged = {language: judge(prompts, write(captioner, codes_Bhw, method, language)) for language in LANGUAGES}
        scores = score_attributes([one for some in judged.values() for one in some])
        if method == "beam":
            figures |= {"attributes named right": scores["mean"].value}
            figures |= {"attributes named right, from": scores["mean"].low, "to": scores["mean"].high}
        say(f"{method}: {scores['mean'].value:.1%} of the attributes named right")
        figures |= {f"{method}/{name}": scores[name].value for name in ("mean", *ATTRIBUTES, "count")}
        for language, some in judged.items():
            figures[f"{method}/{language}"] = score_attributes(some)["mean"].value
        unread = [one for some in judged.values() for one in some if one.marks is NOTHING]
        figures[f"{method}/no caption of the corpus"] = len(unread) / (2 * scenes)
    return figures


def write(captioner: Captioner, codes_Bhw: Tensor, method: str, language: Language) -> list[str]:
    """The captions of all images in one language."""
    texts: list[str] = []
    for start in range(0, len(codes_Bhw), BATCH):
        some = codes_Bhw[start : start + BATCH]
        if method == "beam":
            found = search_captions(captioner, some, beams=BeamConfig(), language=language)
            texts += [captions[0].text for captions in found]
        else:
            sampling = SamplingConfig(temperature=0.0 if method == "greedy" else 1.0)
            seeds = list(range(start, start + len(some)))
            drawn = draw_captions(captioner, some, sampling=sampling, seeds=seeds, language=language)
            texts += [caption.text for caption in drawn]
    return texts


def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[JudgedPicture]:
    """What each caption says against what the picture shows."""
    return [JudgedPicture(expected=p.scene, marks=marks(p.scene, text)) for p, text in zip(prompts, texts, strict=True)]


def marks(scene: Scene, text: str) -> Mapping[str, float]:
    """Fractions right by attribute; a caption that cannot be read has NOTHING right."""
    reading = read_caption(text)
    return NOTHING if reading is None else compare(scene, reading)


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes (default: 400)")
    parser.add_argument("--seed", type=int, default=11, help="of the scenes (default: 11)")
    add_root(parser)
    flags, others = parser.parse_known_args()
    torch.set_num_threads(2)
    return verify(
        "captioning",
        lambda: measure(root=flags.root, scenes=flags.scenes, seed=flags.seed, flags=others),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
