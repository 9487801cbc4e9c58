"""Draw pictures again at twice the size, or at three times in seven calls, with a model that was finetuned for it.

Command: make super-resolve [SAMPLES=FOLDER]; python -m pipelines super_resolve smoke --pictures FOLDER
         make super-resolve-at-once [SAMPLES=FOLDER], that is preset cogview2_smoke
Reads:   the output of finetune_super_resolution, or those of finetune_direct_sr and finetune_iterative_sr, and both
         tokenizers; the output of generate (or of this job), or a folder of pictures with same-named .txt files
Writes:  samples/000000.png ..., samples.parquet (caption, seed, codes of each), sheet.png (before | enlarged | drawn)
Time:    smoke: about a minute for 400 pictures on two cores
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cogview.config import input_field, later_field, require_positive, runtime_field
from cogview.errors import ConfigError, VocabularyError
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.evaluation.sharpness import enlarged, mean_edge_sharpness
from cogview.records.folders import list_images, read_captions, read_image_file
from cogview.records.images import decode_image, fit_image
from cogview.records.pair import Unusable
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.hierarchical_magnifier import HierarchicalMagnifier, HierarchicalSampling
from cogview.sampling.super_resolution import SAMPLING, Magnifier
from cogview.sampling.windows import WindowOrder
from cogview.shards.manifest import atomic_file
from cogview.tokenizers.pixels import pixel_batch
from pipelines.runtime.chain import fill_from_chain, latest_output
from pipelines.runtime.jobs import COMPLETE_NAME, Job, JobRun, given_folders
from pipelines.tasks.completing import SMOKE_STAGES

SAMPLES_FOLDER = "samples"
TABLE_NAME = "samples.parquet"
SHEET_NAME = "sheet.png"
SHEET_TILES = 24
TOKENIZERS = {"text_tokenizer": "train_text_tokenizer", "image_tokenizer": "train_image_tokenizer"}
FINETUNE = "finetune_super_resolution"
DRAWN_BY = ["generate", "generate_coglm"]  # whose samples are magnified if none are given
STAGES = {"checkpoint": "finetune_direct_sr", "refiner": "finetune_iterative_sr"}  # CogView2's
FACTS = ("latin_prompt", "kind", "language", "scene")  # what a table of samples knows of a picture
SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("prompt", pa.string()),
        ("latin_prompt", pa.string()),
        ("kind", pa.string()),
        ("language", pa.string()),
        ("scene", pa.string()),
        ("seed", pa.int64()),
        ("codes", pa.list_(pa.uint16())),
        ("height", pa.int32()),  # of the picture, in codes
        ("width", pa.int32()),
        ("path", pa.string()),
        ("source", pa.string()),  # the picture before, in its folder
        ("checkpoint", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to magnify, with what; folders that are not given are those made last.

    checkpoint: output of finetune_super_resolution, or imported weights; text_tokenizer, image_tokenizer: its own.
    samples: output of generate, or of this job; pictures: a folder of pictures with captions instead, of which the
    short side is scaled down to `short_side` pixels, 0 for as it is. The release warns that only pictures of its own
    tokenizer magnify well. num_pictures: the first so many of them, 0 for all.
    layout: of imported weights, which do not say it: super_resolution_released. keeps_position: number ROI2 as the
    release's sampler does, not as its training does. order: of the windows, "centre" (the paper's) or "raster".
    is_hierarchical: CogView2's road: checkpoint is the output of finetune_direct_sr, `refiner` that of
    finetune_iterative_sr, and pictures have the size that they were trained on; refines: use the refiner. clusters:
    output of cluster_codes, for a choice by clusters; hierarchical: how codes are chosen.
    seed: of the whole run; each picture gets a seed of its own from it. batch_size, device, threads: the machine.
    """

    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    refiner: Path | None = input_field(default=None)
    clusters: Path | None = input_field(default=None)
    samples: Path | None = input_field(default=None)
    pictures: Path | None = input_field(default=None)
    short_side: int = 256
    num_pictures: int = 0
    layout: str = ""
    keeps_position: bool = False
    order: WindowOrder = "centre"
    sampling: SamplingConfig = field(default_factory=lambda: SAMPLING)
    is_hierarchical: bool = later_field(False)
    refines: bool = later_field(True)
    hierarchical: HierarchicalSampling = later_field(HierarchicalSampling())
    seed: int = 0
    batch_size: int = runtime_field(8)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "threads")
        for name in ("short_side", "num_pictures", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or more")
        if self.samples is not None and self.pictures is not None:
            raise ConfigError("samples and pictures are both given; magnify one after the other")


PAPER = Config(device="cuda", batch_size=12)
SMOKE = replace(
    PAPER,
    short_side=64,
    sampling=SamplingConfig(temperature=0.2, top_k=12),  # a small model is less sure of what it knows
    device="cpu",
    batch_size=50,
)
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": SMOKE,
    "cogview2": replace(PAPER, is_hierarchical=True),
    "cogview2_smoke": replace(SMOKE, is_hierarchical=True, hierarchical=SMOKE_STAGES),
}
AnyMagnifier = Magnifier | HierarchicalMagnifier


@dataclass(frozen=True, kw_only=True)
class Original:
    """A picture before. codes_hw: uint16; facts: what the table of samples says of it; source: its path in a folder."""

    picture: Image.Image
    codes_hw: npt.NDArray[np.uint16]
    caption: str
    source: str
    facts: Mapping[str, str]


def main(config: Config, run: JobRun) -> None:
    """Magnify every picture, then write the table and the sheet."""
    torch.set_num_threads(config.threads)
    magnifier = load_magnifier(config)
    originals = list(read_originals(config, magnifier, run=run))
    started = time.monotonic()
    rows, drawn = magnify(originals, magnifier, config=config, run=run)
    with atomic_file(run.output / TABLE_NAME) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    large = [enlarged(original.picture, size=after.size) for original, after in zip(originals, drawn, strict=True)]
    draw_before_and_after(originals, large, drawn, run=run)
    run.scores["samples"] = len(rows)
    run.scores["seconds_per_sample"] = (time.monotonic() - started) / len(rows)
    run.scores["edges_enlarged"] = sum(mean_edge_sharpness([picture]) for picture in large) / len(large)
    run.scores["edges_drawn"] = sum(mean_edge_sharpness([picture]) for picture in drawn) / len(drawn)
    columns = ("prompt", "kind", "seed", "path", "source")
    run.tracker.log_table([{key: row[key] for key in columns} for row in rows], "samples.json")
    run.say(f"{len(rows)} pictures: {run.output / SHEET_NAME}")


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in what is not given: the tokenizers of the chain, the finetuned model and the samples made last."""
    jobs = STAGES if config.is_hierarchical else {"checkpoint": FINETUNE}
    for name in jobs if config.refines else ["checkpoint"]:
        if getattr(config, name) is None:
            found: dict[str, Any] = {name: latest_output(jobs[name], flag=f"--{name}", root=root)}
            config = replace(config, **found)
    if config.is_hierarchical and config.hierarchical.by_clusters and config.clusters is None:
        config = replace(config, clusters=latest_output("cluster_codes", flag="--clusters", root=root))
    if config.samples is None and config.pictures is None:
        jobs_that_draw = [job for job in DRAWN_BY if any((root / job).glob(f"*/{COMPLETE_NAME}"))] or DRAWN_BY
        config = replace(config, samples=latest_output(jobs_that_draw[0], flag="--samples", root=root))
    filled: Config = fill_from_chain(config, TOKENIZERS, root=root)
    return filled


def load_magnifier(config: Config) -> AnyMagnifier:
    """The finetuned models with their tokenizers."""
    if config.is_hierarchical:
        stages = {name: job for name, job in STAGES.items() if name == "checkpoint" or config.refines}
        folders = given_folders(config, {**stages, **TOKENIZERS})
        return HierarchicalMagnifier.load(
            folders.pop("checkpoint"),
            folders.pop("refiner", None),
            **folders,
            clusters=config.clusters,
            device=config.device,
        )
    folders = given_folders(config, {"checkpoint": FINETUNE, **TOKENIZERS})
    return Magnifier.load(
        folders.pop("checkpoint"),
        **folders,
        device=config.device,
        layout=config.layout,
        keeps_position=config.keeps_position,
    )


def read_originals(config: Config, magnifier: AnyMagnifier, *, run: JobRun) -> Iterator[Original]:
    """The pictures to magnify. ConfigError when there is none."""
    if config.samples is not None:
        yield from _samples(config.samples, magnifier, config=config)
    elif config.pictures is not None:
        yield from _pictures(config.pictures, magnifier, config=config, run=run)
    else:
        raise ConfigError("samples is not given; name the output folder of generate with --samples, or give --pictures")


def magnify(
    originals: Sequence[Original], magnifier: AnyMagnifier, *, config: Config, run: JobRun
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Magnify in batches of one size, save each picture; the rows of the table, and the pictures, in their order."""
    rows: list[dict[str, Any]] = []
    drawn: list[Image.Image] = []
    for batch in _in_batches(originals, size=config.batch_size):
        seeds = [_seed(config.seed, len(rows) + number) for number in range(len(batch))]
        small_Bhw = torch.from_numpy(np.stack([original.codes_hw for original in batch]).astype(np.int64))
        progress = partial(_show, run=run, done=len(rows), new=len(batch), total=len(originals))
        captions = [original.caption for original in batch]
        if isinstance(magnifier, HierarchicalMagnifier):
            codes_Bhw = magnifier.magnify(
                captions, small_Bhw, seeds=seeds, sampling=config.hierarchical, progress=progress
            )
        else:
            codes_Bhw = magnifier.magnify(
                captions, small_Bhw, seeds=seeds, sampling=config.sampling, order=config.order, progress=progress
            )
        for original, seed, codes_hw, picture in zip(
            batch, seeds, codes_Bhw.cpu().numpy(), to_pictures(magnifier.decode(codes_Bhw)), strict=True
        ):
            rows.append(_row(original, index=len(rows), seed=seed, codes_hw=codes_hw, run=run))
            _save_picture(picture, run.output / rows[-1]["path"])
            drawn.append(picture)
    return rows, drawn


def draw_before_and_after(
    originals: Sequence[Original], large: Sequence[Image.Image], drawn: Sequence[Image.Image], *, run: JobRun
) -> None:
    """Write `sheet.png`: pictures as they were, enlarged by bicubic interpolation, and drawn anew."""
    tiles = [
        Tile(
            images=(original.picture.resize(after.size, Image.Resampling.NEAREST), before, after),
            caption=original.caption,
            fallback=original.facts["latin_prompt"],
        )
        for original, before, after in list(zip(originals, large, drawn, strict=True))[:SHEET_TILES]
    ]
    sheet = draw_sheet(tiles, title="before | enlarged | drawn", picture_side=192)
    _save_picture(sheet, run.output / SHEET_NAME)
    run.tracker.log_image(sheet, SHEET_NAME)


def _samples(folder: Path, magnifier: AnyMagnifier, *, config: Config) -> Iterator[Original]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(folder / TABLE_NAME).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"samples={folder}: no whole {TABLE_NAME} ({error}); give the output of generate") from error
    if not rows:
        raise ConfigError(f"samples={folder}: {TABLE_NAME} has no rows; there is nothing to magnify")
    for row in rows[: config.num_pictures or len(rows)]:
        codes = np.array(row["codes"], np.uint16)
        known = magnifier.image_tokenizer.num_codes
        if codes.max() >= known:
            raise VocabularyError(
                f"samples={folder} has the code {codes.max()}, but the image tokenizer has {known} codes; give the one "
                "that the samples were drawn with"
            )
        codes_hw = codes.reshape(row.get("height") or math.isqrt(len(codes)), -1)
        codes_1hw = torch.from_numpy(codes_hw.astype(np.int64))[None].to(config.device)
        yield Original(
            picture=to_pictures(magnifier.decode(codes_1hw))[0],
            codes_hw=codes_hw,
            caption=row["prompt"],
            source=row["path"],
            facts={name: row.get(name) or "" for name in FACTS},
        )


def _pictures(folder: Path, magnifier: AnyMagnifier, *, config: Config, run: JobRun) -> Iterator[Original]:
    names = list_images(folder)
    found = 0
    for name in names:
        picture = _readable(folder, name, config=config, magnifier=magnifier)
        captions = read_captions(folder, name)
        unusable = next((thing for thing in (picture, captions) if isinstance(thing, Unusable)), None)
        if unusable is not None or isinstance(picture, Unusable) or isinstance(captions, Unusable):
            run.say(f"left out: {name} ({unusable.reason if unusable else ''})")
            continue
        if min(picture.size) < magnifier.side * magnifier.image_tokenizer.stride:
            run.say(f"left out: {name} (smaller than the squares that the model reads)")
            continue
        found += 1
        with torch.inference_mode():
            images_BCHW = pixel_batch([np.asarray(picture)]).to(config.device)
            codes_hw = magnifier.image_tokenizer.encode(images_BCHW)[0].cpu().numpy().astype(np.uint16)
        facts = {"latin_prompt": name, "kind": "picture", "language": "", "scene": ""}
        yield Original(picture=picture, codes_hw=codes_hw, caption=captions[0], source=name, facts=facts)
        if found == config.num_pictures:
            break
    if not found:
        raise ConfigError(f"pictures={folder}: none of its {len(names)} pictures can be used; the lines above say why")


def _readable(folder: Path, name: str, *, config: Config, magnifier: AnyMagnifier) -> Image.Image | Unusable:
    """The picture with its short side scaled down, and cut in the middle to whole codes, or to CogView2's square."""
    stride = magnifier.image_tokenizer.stride
    short_side = magnifier.side * stride if config.is_hierarchical else config.short_side
    data = read_image_file(folder / name)
    image = data if isinstance(data, Unusable) else decode_image(data, short_side=short_side)
    if isinstance(image, Unusable):
        return image
    image = fit_image(image, image_size=short_side)
    width, height = (side // stride * stride for side in image.size)
    if config.is_hierarchical:
        width = height = min(width, height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _in_batches(originals: Sequence[Original], *, size: int) -> Iterator[list[Original]]:
    """Neighbours of one size, at most `size` together."""
    for _, group in groupby(originals, key=lambda original: original.codes_hw.shape):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _row(original: Original, *, index: int, seed: int, codes_hw: npt.NDArray[np.int64], run: JobRun) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": original.caption,
        **original.facts,
        "seed": seed,
        "codes": codes_hw.ravel().tolist(),
        "height": codes_hw.shape[0],
        "width": codes_hw.shape[1],
        "path": f"{SAMPLES_FOLDER}/{index:06d}.png",
        "source": original.source,
        "checkpoint": run.inputs["checkpoint"],
    }


def _show(window: int, windows: int, *, run: JobRun, done: int, new: int, total: int) -> None:
    """Progress in pictures: all of a batch pass through the same window."""
    run.progress(done + new * window / windows, total, "pictures")


def _seed(seed: int, index: int) -> int:
    """48 bits: exact in JSON and in any table."""
    return int.from_bytes(hashlib.sha256(f"magnify:{seed}:{index}".encode()).digest()[:6], "big")


def _save_picture(picture: Image.Image, path: Path) -> None:
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


JOB = Job(name="super_resolve", version=1, products=(TABLE_NAME, SHEET_NAME), main=main)
