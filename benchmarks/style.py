"""Style learning on emoji: new objects in a style that they were never seen in, named by a classifier of real ones.

Command: make verify NAME=style; with ARGS=--save also docs/styles.png
1,532 objects, most of them in six styles. For one object in four, its picture in one style is taken away before
anything is trained. A small model is pretrained on the rest, with captions that name the object and no style; then it
is finetuned as in section 3.3: every picture of a style has the same sentence, "An image of {style} style", and each
style is a finetune of its own; one of them is done again with adapters alone. What was taken away is then asked for, "A
{object} of {style} style", and a classifier that was trained on real pictures names the style of each generated one
(`named`). `best`: the same of one picture in four, that whose codes the finetuned model finds likelier by most than the
pretrained model does. `kept`: how often the pretrained model finds a picture likelier under the name of its own object
than under that of another; 0.5 is chance. The data lie beside the checkout, in ../shared/data/emoji.
"""

import hashlib
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.chains import run_job, stage_folders
from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.tar_files import add_file
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.evaluation.style_judge import StyleJudge, train_judge
from cogview.records.images import decode_image
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.records.styles import style_name
from cogview.records.tars import read_foreign_tar
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import LAYOUT, TextToImage
from cogview.sequences.batch import SequenceConfig, build_batch
from cogview.tokenizers.pixels import pixel_batch, square_pixels

DATA = Path("../shared/data/emoji")
ROOT = Path("runs/style")
PICTURES = ROOT / "pictures"
DOCS = REPOSITORY / "docs"
ASKED = 300  # pictures drawn and judged
CANDIDATES = 4
AT_ONCE = 50
JUDGE_EPOCHS = 20
ADAPTED = "noto"
ADAPTERS = ("--lora.rank", "16", "--loop.optimizer.learning-rate", "5e-3")
OBJECTS = ("red apple", "cat face", "pizza", "rocket", "mushroom", "key")
BARS = (
    Bar(figure="all weights/named", op=">=", value=0.8),
    Bar(figure="seconds/total", op="<", value=1200),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What decides the time it takes. side: of pictures, in pixels; widths: of the image tokenizer, a halving each.

    The default has 12 x 12 codes of 4 x 4 pixels: coarser ones lose what tells the styles apart.
    """

    side: int = 48
    widths: tuple[str, ...] = ("32", "96")
    tokenizer_steps: int = 3000
    pretraining_steps: int = 2500
    finetuning_steps: int = 200
    temperature: float = 0.8

    def road_flags(self) -> tuple[str, ...]:
        """For everything up to the pretrained model."""
        side = str(self.side)
        return (
            *("--data", str(PICTURES), "--caption-columns", "captions", "--until", "pretrain"),
            *("--import-pairs.image.image-size", side, "--tokenize-pairs.image-size", side),
            *("--train-image-tokenizer.image-size", side, "--train-image-tokenizer.model.widths", *self.widths),
            *("--train-image-tokenizer.loop.num-steps", str(self.tokenizer_steps)),
            *("--pretrain.loop.num-steps", str(self.pretraining_steps)),
        )

    @property
    def sampling(self) -> SamplingConfig:
        """Of all pictures."""
        return SamplingConfig(temperature=self.temperature, top_k=12)


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One picture: what it shows, in which style, as pixels uint8 [H, W, 3]; is_asked: it was taken away."""

    name: str
    style: str
    pixels: Any
    is_asked: bool


def measure(sizes: Sizes, *, save: bool) -> Figures:
    """Split, pretrain and finetune anew; then draw and judge."""
    if not (REPOSITORY / DATA).is_dir():
        raise UnmeasuredError(f"{DATA} does not exist; put tars of emoji with a JSON field style there")
    shutil.rmtree(REPOSITORY / ROOT, ignore_errors=True)
    started = time.monotonic()
    emoji = list(split_data(side=sizes.side))
    shown, asked = ([item for item in emoji if item.is_asked == is_asked] for is_asked in (False, True))
    asked = sorted(asked, key=lambda item: digest(f"order:{item.name}:{item.style}"))[:ASKED]
    styles = sorted({item.style for item in emoji})
    run_job("road", *sizes.road_flags(), root=ROOT)
    base = stage_folders(REPOSITORY / ROOT)
    steps = ("--loop.num-steps", str(sizes.finetuning_steps))
    finetuned = {
        "all weights": {style: finetune(tar_of(style), *steps) for style in styles},
        "adapters": {ADAPTED: finetune(tar_of(ADAPTED), *steps, *ADAPTERS)},
        "before": dict.fromkeys(styles, base["pretrain"]),
    }
    say(f"training a classifier of {', '.join(styles)}")
    judge = train_judge(pixels_of(shown), labels_of(shown, styles), num_styles=len(styles), epochs=JUDGE_EPOCHS, seed=0)
    pretrained, labels_B = load_painter(base["pretrain"], base), labels_of(asked, styles)
    figures: dict[str, float | str] = {
        "judge/real": judge.accuracy(pixels_of(asked), labels_B),
        "judge/reconstructed": judge.accuracy(reconstructed(asked, pretrained), labels_B),
    }
    for way, folders in finetuned.items():
        painters = {style: load_painter(folder, base) for style, folder in folders.items()}
        drawn = [item for item in asked if item.style in painters]
        codes_BChw = draw(painters, drawn, sampling=sizes.sampling)
        found = judged(codes_BChw, drawn, styles, judge=judge, painters=painters, pretrained=pretrained)
        figures |= {f"{way}/{name}": value for name, value in found.items()}
        say(f"{way}: {found}")
        if way == "all weights":
            draw_objects(painters, pretrained, sampling=sizes.sampling).save(REPOSITORY / ROOT / "styles.png")
    if save:
        shutil.copy(REPOSITORY / ROOT / "styles.png", DOCS / "styles.png")
    counts = {"pictures": len(shown), "asked": len(asked), "styles": len(styles)}
    return {**figures, **counts, "seconds/total": time.monotonic() - started, "sheet": str(ROOT / "styles.png")}


def split_data(*, side: int) -> Iterator[Emoji]:
    """Write a tar for each style without the pictures that are asked for later, captioned with names alone.

    Yields all pictures.
    """
    (REPOSITORY / PICTURES).mkdir(parents=True)
    with ExitStack() as files:
        tars: dict[str, tarfile.TarFile] = {}
        for path in sorted((REPOSITORY / DATA).glob("*.tar")):
            for sample in read_foreign_tar(path, caption_fields=("caption_en",)):
                item = None if isinstance(sample, Failure) else read_emoji(sample, side=side)
                if isinstance(sample, Failure) or item is None:
                    continue
                yield item
                if not item.is_asked:
                    if item.style not in tars:
                        tars[item.style] = files.enter_context(tarfile.open(REPOSITORY / tar_of(item.style), "w"))
                    document = {"captions": [item.name, f"A {item.name}"], "style": item.style}
                    add_file(tars[item.style], f"{sample.key}.png", sample.image_bytes)
                    add_file(tars[item.style], f"{sample.key}.json", json.dumps(document).encode())


def tar_of(style: str) -> Path:
    """The pictures of one style."""
    return PICTURES / f"{style.replace(' ', '_')}.tar"


def read_emoji(sample: TextImagePair, *, side: int) -> Emoji | None:
    """A picture, small; one object in four is taken away in one of its styles."""
    image = decode_image(sample.image_bytes, short_side=side)
    if isinstance(image, Unusable):
        return None
    style, shown = str(sample.extra["style"]), str(sample.extra["id"])
    styles = ("fluent_3d", "fluent_flat", "fluent_high_contrast", "noto", "twemoji", "blob")
    is_asked = digest(f"object:{shown}") % 4 == 0 and styles[digest(f"style:{shown}") % len(styles)] == style
    pixels = square_pixels(image, image_size=side)
    return Emoji(name=sample.text, style=style_name(style), pixels=pixels, is_asked=is_asked)


def draw(painters: Mapping[str, TextToImage], asked: Sequence[Emoji], *, sampling: SamplingConfig) -> Tensor:
    """Some pictures of each object in its style, by the model of that style: codes int64 [B, CANDIDATES, h, w]."""
    codes: dict[int, Tensor] = {}
    for style, painter in painters.items():
        numbers = [number for number, item in enumerate(asked) if item.style == style for _ in range(CANDIDATES)]
        parts = []
        for start in range(0, len(numbers), AT_ONCE):
            captions = [captions_of([asked[number]])[0] for number in numbers[start : start + AT_ONCE]]
            seeds = list(range(start, start + len(captions)))
            parts.append(painter.codes(captions, seeds=seeds, sampling=sampling))
        by_picture = torch.split(torch.cat(parts), CANDIDATES)
        codes |= dict(zip(numbers[::CANDIDATES], by_picture, strict=True))
    return torch.stack([codes[number] for number in range(len(asked))])


def judged(
    codes_BChw: Tensor,
    asked: Sequence[Emoji],
    styles: Sequence[str],
    *,
    judge: StyleJudge,
    painters: Mapping[str, TextToImage],
    pretrained: TextToImage,
) -> dict[str, float]:
    """How often the style is named, of the first and the best picture, and by style; how often the object is kept."""
    labels_B, first_Bhw = labels_of(asked, styles), codes_BChw[:, 0]
    gains_BC = torch.empty(codes_BChw.shape[:2])
    for style, painter in painters.items():
        rows = [number for number, item in enumerate(asked) if item.style == style]
        items = [asked[number] for number in rows]
        for candidate in range(CANDIDATES):
            codes_Nhw = codes_BChw[rows, candidate]
            before_N = picture_losses(pretrained, names_of(items), codes_Nhw)
            gains_BC[rows, candidate] = before_N - picture_losses(painter, captions_of(items), codes_Nhw)
    best_Bhw = codes_BChw[torch.arange(len(asked)), gains_BC.argmax(dim=1)]
    is_right_B, is_best_right_B = (
        (judge.name(pretrained.decode(codes_Bhw).clamp(0, 1)) == labels_B).float()
        for codes_Bhw in (first_Bhw, best_Bhw)
    )
    of_style = {
        f"named/{style}": float(is_right_B[labels_B == number].mean())
        for number, style in enumerate(styles)
        if style in painters
    }
    total = {"named": float(is_right_B.mean()), "best": float(is_best_right_B.mean())}
    return {**total, "kept": kept(pretrained, asked, first_Bhw), **of_style}


def captions_of(asked: Sequence[Emoji]) -> list[str]:
    """What is asked for."""
    return [f"A {item.name} of {item.style} style" for item in asked]


def names_of(asked: Sequence[Emoji]) -> list[str]:
    """The same without the style."""
    return [f"A {item.name}" for item in asked]


def kept(pretrained: TextToImage, asked: Sequence[Emoji], codes_Bhw: Tensor) -> float:
    """How often a picture is likelier under the name of its object than under the next one's."""
    names = names_of(asked)
    own_B, other_B = (picture_losses(pretrained, texts, codes_Bhw) for texts in (names, [*names[1:], names[0]]))
    return float((own_B < other_B).float().mean())


def draw_objects(
    painters: Mapping[str, TextToImage], pretrained: TextToImage, *, sampling: SamplingConfig
) -> Image.Image:
    """A row for each object: as the pretrained model draws it, then in each style."""
    ways = {"A {}": pretrained, **{f"A {{}} of {style} style": painter for style, painter in painters.items()}}
    tiles = []
    for seed, name in enumerate(OBJECTS):
        for template, painter in ways.items():
            caption = template.format(name)
            codes_Bhw = painter.codes([caption], seeds=[seed], sampling=sampling)
            tiles.append(Tile(images=tuple(to_pictures(painter.decode(codes_Bhw))), caption=caption))
    return draw_sheet(tiles, columns=len(ways), picture_side=128)


@torch.inference_mode()
def picture_losses(painter: TextToImage, captions: Sequence[str], codes_Bhw: Tensor) -> Tensor:
    """How unlikely the model finds each picture under its caption, float [B]: the sum of its codes' losses."""
    texts = [painter.text_tokenizer.encode(caption) for caption in captions]
    batch = build_batch(
        [np.array(text, np.int32) for text in texts],
        codes_Bhw.flatten(1).numpy().astype(np.uint16),
        layout=LAYOUT,
        config=SequenceConfig(length=painter.length, is_image_fixed=painter.is_image_fixed),
        vocabulary=painter.vocabulary,
    )
    logits_BLV = painter.model.logits(painter.model(batch.ids, batch.positions))
    losses_BL = nn.functional.cross_entropy(logits_BLV.transpose(1, 2), batch.labels, reduction="none")
    losses_B: Tensor = (losses_BL * batch.image_part * (batch.loss_weights > 0)).sum(dim=1)
    return losses_B


@torch.inference_mode()
def reconstructed(emoji: Sequence[Emoji], painter: TextToImage) -> Tensor:
    """Real pictures as the image tokenizer gives them back."""
    parts = torch.split(pixels_of(emoji), 64)
    return torch.cat([painter.decode(painter.image_tokenizer.encode(part)).clamp(0, 1) for part in parts])


def pixels_of(emoji: Sequence[Emoji]) -> Tensor:
    """Float [B, 3, H, W] in [0, 1]."""
    return pixel_batch([item.pixels for item in emoji])


def labels_of(emoji: Sequence[Emoji], styles: Sequence[str]) -> Tensor:
    """The number of each picture's style, int64 [B]."""
    return torch.tensor([styles.index(item.style) for item in emoji])


def load_painter(checkpoint: Path, base: Mapping[str, Path]) -> TextToImage:
    """A model with the tokenizers of the road."""
    return TextToImage.load(
        checkpoint, text_tokenizer=base["train_text_tokenizer"], image_tokenizer=base["train_image_tokenizer"]
    )


def finetune(data: Path, *flags: str) -> Path:
    """Teach the pretrained model the styles of these pictures; the output folder."""
    jobs = REPOSITORY / ROOT / "finetune_style"
    before = set(jobs.iterdir()) if jobs.is_dir() else set()
    run_job("finetune_style", "--data", str(data), *flags, root=ROOT)
    (output,) = set(jobs.iterdir()) - before
    return output


def digest(text: str) -> int:
    """A number that is the same for a text on any machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def main() -> int:
    """The command line."""
    parser, default = argument_parser(__doc__), Sizes()
    parser.add_argument("--side", type=int, default=default.side, help="pixels of a picture (default: %(default)s)")
    parser.add_argument("--widths", nargs="+", default=default.widths, help="of the image tokenizer, a halving each")
    for name in ("tokenizer_steps", "pretraining_steps", "finetuning_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--temperature", type=float, default=default.temperature)
    flags = vars(parser.parse_args())
    save = flags.pop("save")
    return verify("style", lambda: measure(Sizes(**flags), save=save), bars=BARS, save=save)


if __name__ == "__main__":
    sys.exit(main())
