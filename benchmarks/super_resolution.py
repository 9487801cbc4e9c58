"""Super-resolution on scenes: larger pictures that show what the small ones showed, with sharper edges.

Command: make verify NAME=super_resolution [ARGS="--root runs/smoke --scenes 200"]; with ARGS=--save also docs/
Unknown flags go to finetune_super_resolution.
The model of a finished chain is finetuned anew with the smoke preset, and magnifies the scenes that this chain drew for
captions that the corpus never showed, from 64 to 128 pixels. The scene reader reads both. Edges are compared with those
of bicubic enlargements of the same small pictures by `cogview.evaluation.sharpness.edge_sharpness`: gradient energy per
unit of gradient, that is the mean steepness of edges.
Scenes can be drawn at any size, so there is a truth: held-out scenes are drawn at 64 pixels, pass the tokenizer, and
are magnified. PSNR is against the same scene drawn at 128 pixels, beside the bicubic enlargement of what the tokenizer
kept at 64 pixels, and beside what it keeps at 128, which is the ceiling. The windows are compared with those of the
release, and for a thousand grids it is counted how often each code is drawn.
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.chains import add_root, model_folders, run_job, stage_folders
from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from cogview.evaluation.attributes import JudgedPicture, judge, scene_from_json, score_attributes
from cogview.evaluation.grids import Tile, draw_sheet, from_pictures, to_pictures
from cogview.evaluation.reconstruction import mean_psnr, reconstruct
from cogview.evaluation.sharpness import edge_sharpness, enlarged
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.super_resolution import Magnifier
from cogview.sampling.windows import SCALE, WindowOrder, new_codes, plan_windows
from cogview.scenes.scene import Scene, draw_scene, held_out_prompts
from cogview.shards.manifest import read_json
from pipelines.runtime.chain import latest_output
from pipelines.runtime.jobs import COMPLETE_NAME

JOB = "finetune_super_resolution"
RELEASED_WINDOWS = [
    *((0, 0, 18), (0, 1, 30), (0, 2, 30)),
    *((1, 1, 30), (1, 0, 30), (1, 2, 30)),
    *((2, 0, 32), (2, 1, 32), (2, 2, 32)),
]
RELEASED_NEW_CODES = [576, 672, 480, 512, 448, 256, 576, 288, 288]
BARS = (
    Bar(figure="attributes/kept", op=">=", value=0.98),
    Bar(figure="edges/ours to bicubic", op=">", value=1.0),
    Bar(figure="windows/as released", op="==", value=1),
    Bar(figure="windows/codes not drawn once", op="==", value=0),
)
GRIDS = 1000
BATCH = 50
SAMPLING = SamplingConfig(temperature=0.2, top_k=12)  # the smoke preset's
SHOWN = 12
PICTURE = REPOSITORY / "docs" / "super_resolution.png"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Small pictures with what they should show. codes: int64 [B, h, w]."""

    captions: list[str]
    scenes: list[Scene]
    codes_Bhw: torch.Tensor

    def __len__(self) -> int:
        return len(self.captions)


def measure(*, root: Path, runs: Path, scenes: int, save: bool, flags: Sequence[str]) -> Figures:
    """Finetune, magnify the chain's samples and drawn scenes, and check the windows."""
    folders = model_folders(root)
    samples = drawn_samples(root, limit=scenes)
    output = finetuned(folders, runs, flags)
    magnifier = Magnifier.load(
        output, text_tokenizer=folders["text_tokenizer"], image_tokenizer=folders["image_tokenizer"]
    )
    return {
        **window_figures(),
        **sample_figures(samples, magnifier, save=save),
        **truth_figures(magnifier, scenes=scenes),
        "seconds/finetuning": read_json(output / COMPLETE_NAME)["seconds"],
    }


def finetuned(folders: Mapping[str, Path], runs: Path, flags: Sequence[str]) -> Path:
    """The finetuned model under `runs`, trained now unless it is there."""
    inputs = [word for name, folder in folders.items() for word in (f"--{name.replace('_', '-')}", str(folder))]
    run_job(JOB, *inputs, *flags, root=runs)
    return latest_output(JOB, flag="--checkpoint", root=runs)


def drawn_samples(root: Path, *, limit: int) -> Samples:
    """The scenes that the chain drew for held-out captions."""
    table = pq.read_table(stage_folders(root, "generate")["generate"] / "samples.parquet").to_pylist()
    rows = [row for row in table if row["scene"]][:limit]
    if not rows:
        raise UnmeasuredError(f"{root}: the chain drew no scenes; run `make pretrain`")
    side = round(len(rows[0]["codes"]) ** 0.5)
    return Samples(
        captions=[row["prompt"] for row in rows],
        scenes=[scene_from_json(row["scene"]) for row in rows],
        codes_Bhw=torch.tensor([row["codes"] for row in rows]).view(-1, side, side),
    )


def sample_figures(samples: Samples, magnifier: Magnifier, *, save: bool) -> dict[str, float]:
    """Attributes read from small and large pictures, and the steepness of edges."""
    before = decoded(samples.codes_Bhw, magnifier)
    started = time.monotonic()
    after = magnified(samples, magnifier)
    seconds = (time.monotonic() - started) / len(samples)
    copies = [enlarged(picture, size=after[0].size) for picture in before]
    in_raster_order = magnified(samples, magnifier, order="raster")
    small, large, raster = (attributes(pictures, samples) for pictures in (before, after, in_raster_order))
    say(f"{small:.1%} of the attributes right before, {large:.1%} after")
    ours, bicubic = edges(after), edges(copies)
    if save:
        tiles = [
            Tile(images=(copy, picture), caption=caption)
            for copy, picture, caption in list(zip(copies, after, samples.captions, strict=True))[: 2 * SHOWN : 2]
        ]
        draw_sheet(tiles, title="enlarged by bicubic interpolation | magnified", columns=3).save(PICTURE)
    return {
        "samples": len(samples),
        "attributes/before": small,
        "attributes/after": large,
        "attributes/after, raster order": raster,
        "attributes/kept": large / small,
        "edges/bicubic": float(bicubic.mean()),
        "edges/ours": float(ours.mean()),
        "edges/ours to bicubic": float(ours.mean() / bicubic.mean()),
        "edges/pictures that are sharper": float((ours > bicubic).float().mean()),
        "seconds/a picture": seconds,
    }


def truth_figures(magnifier: Magnifier, *, scenes: int) -> dict[str, float]:
    """PSNR of magnified drawings against the scenes drawn large, in dB, and the steepness of their edges."""
    prompts = list(held_out_prompts(scenes, seed=3, two_shape_share=0.25))
    side = SCALE * magnifier.side * magnifier.image_tokenizer.stride  # the size of the chain's pictures
    small, truth = ([draw_scene(prompt.scene, image_size=size) for prompt in prompts] for size in (side, SCALE * side))
    codes = [
        magnifier.image_tokenizer.encode(from_pictures(small[start : start + BATCH]))
        for start in range(0, scenes, BATCH)
    ]
    samples = Samples(
        captions=[prompt.caption for prompt in prompts],
        scenes=[prompt.scene for prompt in prompts],
        codes_Bhw=torch.cat(codes),
    )
    before = decoded(samples.codes_Bhw, magnifier)
    pictures = {
        "bicubic": [enlarged(picture, size=truth[0].size) for picture in before],
        "ours": magnified(samples, magnifier),
        "ours, raster order": magnified(samples, magnifier, order="raster"),
        "tokenizer at 128 pixels": reconstruct(truth, tokenizer=magnifier.image_tokenizer),
    }
    return {
        **{f"truth/psnr/{name}": mean_psnr(found, originals=truth) for name, found in pictures.items()},
        **{f"truth/edges/{name}": float(edges(found).mean()) for name, found in pictures.items()},
        "truth/edges/drawn": float(edges(truth).mean()),
        "truth/attributes/before": attributes(before, samples),
        "truth/attributes/ours": attributes(pictures["ours"], samples),
    }


def window_figures() -> dict[str, int]:
    """Whether the windows for 32 x 32 codes are the release's, and how many codes of random grids miss being once."""
    windows = plan_windows(32, 32, side=16)
    found = [(window.row, window.column, window.rows) for window in windows]
    new = [int(is_new.sum()) for is_new in new_codes(windows, height=32, width=32)]
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(GRIDS):
        side = 2 * int(generator.integers(1, 11))
        height, width = (int(length) for length in side + generator.integers(0, 60, size=2))
        times = np.zeros((SCALE * height, SCALE * width), int)
        for window, is_new in zip(
            plan := plan_windows(height, width, side=side), new_codes(plan, height=height, width=width), strict=True
        ):
            times[window.drawn] += is_new
        wrong += int((times != 1).sum())
    return {
        "windows/as released": int(found == RELEASED_WINDOWS and new == RELEASED_NEW_CODES),
        "windows/grids": GRIDS,
        "windows/codes not drawn once": wrong,
    }


def magnified(samples: Samples, magnifier: Magnifier, *, order: WindowOrder = "centre") -> list[Image.Image]:
    """The pictures at twice their size."""
    pictures: list[Image.Image] = []
    for start in range(0, len(samples), BATCH):
        some = slice(start, start + BATCH)
        captions = samples.captions[some]
        seeds = list(range(start, start + len(captions)))
        codes_Bhw = magnifier.magnify(captions, samples.codes_Bhw[some], seeds=seeds, sampling=SAMPLING, order=order)
        pictures += decoded(codes_Bhw, magnifier)
    return pictures


@torch.inference_mode()
def decoded(codes_Bhw: torch.Tensor, magnifier: Magnifier) -> list[Image.Image]:
    """What the tokenizer makes of codes."""
    return [
        picture
        for start in range(0, len(codes_Bhw), BATCH)
        for picture in to_pictures(magnifier.decode(codes_Bhw[start : start + BATCH]))
    ]


def attributes(pictures: Sequence[Image.Image], samples: Samples) -> float:
    """The share of attributes that the scene reader finds right."""
    judged: list[JudgedPicture] = [
        judge(picture, expected=scene) for picture, scene in zip(pictures, samples.scenes, strict=True)
    ]
    return score_attributes(judged)["mean"].value


def edges(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """The steepness of edges of each picture."""
    return edge_sharpness(from_pictures(pictures))


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=400, help="scenes of each kind (default: 400)")
    add_root(parser)
    parser.add_argument("--runs", type=Path, help="where to finetune, and to find what was finetuned (default: anew)")
    flags, others = parser.parse_known_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="cogview-magnify-") as fresh:
        runs, root = (flags.runs or Path(fresh)).resolve(), flags.root
        return verify(
            "super_resolution",
            lambda: measure(root=root, runs=runs, scenes=flags.scenes, save=flags.save, flags=others),
            bars=BARS,
            save=flags.save,
        )


if __name__ == "__main__":
    sys.exit(main())
