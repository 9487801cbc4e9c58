"""Text-guided completion: what changes outside of a mask, at borders, in tiny masks and in whole pictures.

Command: make verify NAME=completion [ARGS="--pictures 20"]
Pictures of random sizes, with noise that no tokenizer can keep, so that a pixel which was touched is seen. Each is
completed under masks of every kind: in the middle, at each border, in corners, of one pixel, stripes, all of it, and
boxes at random; by a small CogLM and both super-resolution stages, whose weights are new: what is drawn has no bearing
on what stays. Beyond the seam every byte must be the picture's; in the mask and in the seam the new picture shows. How
visible a seam is: the mean step between neighbouring pixels across the border of the mask in a plain grey picture, with
the seam and without it.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.local_super_resolution import LocalSuperResolution, LocalSuperResolutionConfig
from cogview.models.published import save_model
from cogview.models.published_stage import save_stage
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import TASK, CogLM
from cogview.sampling.completion import Completer, CompletionConfig
from cogview.sampling.hierarchical_magnifier import HierarchicalMagnifier, HierarchicalSampling, form_of
from cogview.sampling.masks import Box, square_around
from cogview.scenes.scene import corpus
from cogview.sequences.coglm import CogLMLayout
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig

GRID, RATIO = 8, 3
BARS = (
    Bar(figure="outside/bytes changed beyond the seam", op="==", value=0),
    Bar(figure="inside/masks in which nothing changed", op="==", value=0),
    Bar(figure="masks/not completed", op="==", value=0),
    Bar(figure="seam/step beside that without a seam", op="<", value=1),
)
BOXES = {
    "middle": (0.3, 0.3, 0.7, 0.6),
    "top": (0.0, 0.3, 0.2, 0.7),
    "bottom": (0.9, 0.2, 1.0, 0.6),
    "left": (0.4, 0.0, 0.7, 0.1),
    "right": (0.4, 0.8, 0.7, 1.0),
    "first corner": (0.0, 0.0, 0.3, 0.3),
    "last corner": (0.7, 0.7, 1.0, 1.0),
    "one pixel": (0.5, 0.5, 0.50001, 0.50001),
    "corner pixel": (0.99999, 0.99999, 1.0, 1.0),
    "stripe": (0.45, 0.0, 0.55, 1.0),
    "all": (0.0, 0.0, 1.0, 1.0),
}
SEAM = CompletionConfig().seam


def measure(*, pictures: int) -> Figures:
    """Complete every picture under every mask, and count."""
    with tempfile.TemporaryDirectory(prefix="cogview-completion-") as folder:
        completer = write_models(Path(folder))
    generator = np.random.default_rng(0)
    changed = unchanged_masks = masks = stages = failed = completions = 0
    steps: list[tuple[float, float]] = []
    kinds: dict[str, int] = {}
    started = time.monotonic()
    for number in range(pictures):
        height, width = (int(side) for side in generator.integers(40, 260, size=2))
        picture = torch.from_numpy(generator.integers(0, 256, (3, height, width), np.uint8))
        for name, box in boxes(generator):
            mask = box.mask(height, width)
            drawn, hard = (complete(completer, picture, mask, seam=seam, seed=number) for seam in (SEAM, 0))
            masks, completions = masks + 1, completions + 2
            kinds[name] = kinds.get(name, 0) + 1
            failed += int(drawn.shape != picture.shape)
            changed += int((drawn != picture)[:, ~within(mask, SEAM)].sum()) + int((hard != picture)[:, ~mask].sum())
            unchanged_masks += int(not (hard != picture)[:, mask].any())
            side = square_around(mask, context=CompletionConfig().context, smallest=completer.small_side).side
            stages += int(side > completer.small_side)
            if number == 0 and not mask.all():
                completions += 2
                plain = torch.full_like(picture, 128)  # on noise every step is large; a plain picture shows the seam's
                soft, hard = (complete(completer, plain, mask, seam=seam, seed=number) for seam in (SEAM, 0))
                steps.append((border_step(soft, mask), border_step(hard, mask)))
        say(f"{number + 1} of {pictures} pictures, {masks} masks")
    soft_step, hard_step = np.mean(steps, axis=0)
    return {
        "outside/bytes changed beyond the seam": changed,
        "inside/masks in which nothing changed": unchanged_masks,
        "masks/not completed": failed,
        "seam/step beside that without a seam": float(soft_step / hard_step),
        "seam/pixels": SEAM,
        "masks": masks,
        "masks/kinds": len(kinds),
        "masks/with both super-resolution stages": stages,
        "pictures": pictures,
        "seconds/completion": (time.monotonic() - started) / completions,
    }


def complete(completer: Completer, picture: Tensor, mask: Tensor, *, seam: int, seed: int) -> Tensor:
    """One completion, uint8 [3, H, W]."""
    drawn = completer.complete(
        picture,
        mask,
        caption="a large red circle",
        seeds=[seed],
        config=CompletionConfig(seam=seam),
        sampling=HierarchicalSampling(by_clusters=False),
    )
    return drawn.pictures_BCHW[0]


def boxes(generator: np.random.Generator) -> Iterator[tuple[str, Box]]:
    """The boxes with names, and one at random."""
    for name, (top, left, bottom, right) in BOXES.items():
        yield name, Box(top=top, left=left, bottom=bottom, right=right)
    (top, bottom), (left, right) = (np.sort(generator.random(2)) for _ in range(2))
    yield "random", Box(top=top, left=left, bottom=bottom, right=right)


def within(mask: Tensor, pixels: int) -> Tensor:
    """The mask, and what lies so near to it, bool [H, W]; by another way than `fading` goes."""
    kernel = torch.ones(1, 1, 2 * pixels + 1, 2 * pixels + 1)
    near: Tensor = nn.functional.conv2d(mask[None, None].float(), kernel, padding=pixels)[0, 0] > 0.5
    return near


def border_step(picture: Tensor, mask: Tensor) -> float:
    """The mean difference of pixels side by side of which one lies in the mask."""
    values, found = picture.float(), []
    for first, second in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        crosses = mask[first] != mask[second]
        found.append((values[:, *_rows(first)] - values[:, *_rows(second)]).abs()[:, crosses].flatten())
    return float(torch.cat(found).mean())


def _rows(place: slice | tuple[slice, ...]) -> tuple[slice, ...]:
    return place if isinstance(place, tuple) else (place,)


def write_models(root: Path) -> Completer:
    """A small CogLM and both stages on it, from published folders as jobs write them."""
    captions = [caption for scene in corpus(0, 60) for caption in (scene.english, scene.chinese)]
    pieces = TextTokenizerConfig(num_pieces=200, exact=False, split_chinese=True, is_bilingual=True)
    train_text_tokenizer(captions, config=pieces, output=root / "text")
    text = TextTokenizer.load(root / "text")
    torch.manual_seed(0)
    codebook = CodebookConfig(num_codes=64, code_dim=8)
    image = ImageTokenizer(VQVAEConfig(widths=(16, 16, 16), codebook=codebook)).eval()
    image.save(root / "image")
    vocabulary = BilingualVocabulary(num_image_codes=image.num_codes, text=text.ranges)
    layout = CogLMLayout(grid=GRID, max_text=24, image_position=25)
    shape = GPTConfig(
        vocab_size=vocabulary.size,
        max_positions=layout.num_positions,
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        dropout=0.0,
        init_std=0.3,
    )
    settings = {"task": TASK, "grid": GRID, "layout": asdict(layout), "ends_text": True}
    form, fingerprints = form_of(settings, text=text, image=image)
    settings["fingerprints"] = fingerprints
    for name in ("coglm", "direct", "iterative"):
        gpt = GPT(shape)
        save_model(gpt, root / name, settings=settings)
        if name != "coglm":
            stage = LocalSuperResolutionConfig(stage="direct" if name == "direct" else "iterative", grid=GRID * RATIO)
            model = LocalSuperResolution(gpt, stage)
            model.start_from_backbone(first_position=form.first_position)
            save_stage(model, root / name, settings={"form": asdict(form), "fingerprints": fingerprints})
    coglm = CogLM.load(root / "coglm", text_tokenizer=root / "text", image_tokenizer=root / "image")
    return Completer(
        fill=partial(coglm.fill, sampling=CogLMSampling(by_clusters=False, tokens=SamplingConfig(top_k=0))),
        image_tokenizer=coglm.image_tokenizer,
        grid=GRID,
        magnifier=HierarchicalMagnifier.load(
            root / "direct", root / "iterative", text_tokenizer=root / "text", image_tokenizer=root / "image"
        ),
    )


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=4, help="pictures, each under twelve masks (default: 4)")
    flags = parser.parse_args()
    torch.set_num_threads(1)  # a second one waits for whatever else the machine does
    return verify("completion", lambda: measure(pictures=flags.pictures), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
