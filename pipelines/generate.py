"""Draw pictures for captions with a trained model.

Command: make generate PROMPT="a large red circle on a blue background"
Reads:   the outputs of pretrain, train_text_tokenizer, train_image_tokenizer (and tokenize_pairs for held-out captions)
Writes:  samples/000000.png ..., samples.parquet (prompt, seed, codes, checkpoint of each), grid.png, prompts.json
Time:    about 20 s for 200 pictures of 64 x 64 pixels on two cores
"""

import hashlib
import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.attributes import scene_to_json
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.scenes.scene import Scene, captions, held_out_prompts
from cogview.shards.manifest import atomic_file, write_json
from cogview.shards.reader import TokenShards
from pipelines.runtime.chain import fill_from_chain
from pipelines.runtime.jobs import Job, JobRun

SAMPLES_FOLDER = "samples"
SOURCES = {
    "checkpoint": "pretrain",
    "text_tokenizer": "train_text_tokenizer",
    "image_tokenizer": "train_image_tokenizer",
    "tokens": "tokenize_pairs",
}
GRID_TILES = 48
CANDIDATES_SHOWN = 8
SAMPLE_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("prompt_index", pa.int32()),
        ("prompt", pa.string()),
        ("latin_prompt", pa.string()),  # what stands under the picture where no font has the prompt's letters
        ("kind", pa.string()),
        ("language", pa.string()),
        ("scene", pa.string()),  # what a right picture shows, as JSON; empty when that is not known
        ("candidate", pa.int32()),
        ("seed", pa.int64()),
        ("codes", pa.list_(pa.uint16())),
        ("path", pa.string()),
        ("checkpoint", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to draw, with what: given prompts (`prompt`, `prompts_file`) first, then scenes, then held-out captions.

    checkpoint, text_tokenizer, image_tokenizer: output folders; without them, those of the chain that ran last.
    prompt: captions; prompts_file: a text file with a caption on every line; candidates: pictures of each given prompt.
    num_scenes: captions of the demo corpus that it never showed, one picture each, of which a share of two_shape_share
    asks for two shapes; num_validation_prompts: captions from the held-out rows of `tokens`.
    sampling, and scene_sampling for the scenes: a scene has few right pictures, other captions have many.
    seed: of the whole run; each picture gets a seed of its own from it. batch_size, device, threads: the machine.
    """

    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    prompt: tuple[str, ...] = ()
    prompts_file: Path | None = input_field(default=None)
    candidates: int = 4
    num_scenes: int = 0
    two_shape_share: float = 0.2
    num_validation_prompts: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scene_sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    batch_size: int = runtime_field(8)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)

    def __post_init__(self) -> None:
        for name in ("candidates", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give 1 or more")
        for name in ("num_scenes", "num_validation_prompts", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or more")


PAPER = Config(candidates=60, device="cuda", batch_size=12)  # 60 candidates for each caption, section 3.3
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        candidates=4,
        num_scenes=400,
        sampling=SamplingConfig(top_k=12),  # of 512 codes, as the release keeps 200 of 8192
        scene_sampling=SamplingConfig(temperature=0.2, top_k=12),  # a small model is less sure of what it knows
        device="cpu",
        batch_size=50,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A caption to draw, and where it comes from: `given`, `scene` or `validation`."""

    text: str
    kind: str
    candidates: int = 1
    language: str = ""
    scene: Scene | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """One picture to draw. Its seed decides it, not what else is in the batch (but for the last bits of a sum)."""

    prompt_index: int
    prompt: Prompt
    candidate: int
    seed: int


def main(config: Config, run: JobRun) -> None:
    """Draw every picture that is asked for, then write the table and the sheet."""
    torch.set_num_threads(config.threads)
    painter = load_painter(config)
    prompts = collect_prompts(config)
    orders = list(place_orders(prompts, seed=config.seed))
    started = time.monotonic()
    table = draw(orders, painter, config=config, run=run)
    with atomic_file(run.output / "samples.parquet") as file:
        pq.write_table(pa.Table.from_pylist(table, schema=SAMPLE_SCHEMA), file)
    write_json(run.output / "prompts.json", [prompt.text for prompt in prompts])
    sheet = draw_grid(run.output, table)
    _save_picture(sheet, run.output / "grid.png")
    run.tracker.log_image(sheet, "grid.png")
    columns = ("prompt", "kind", "candidate", "seed", "path")
    run.tracker.log_table([{key: row[key] for key in columns} for row in table], "samples.json")
    run.scores["samples"] = len(table)
    run.scores["seconds_per_sample"] = (time.monotonic() - started) / len(table)
    run.say(f"{len(table)} pictures: {run.output / 'grid.png'}")


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the folders that are not given from the chain that ran last under `root` (`chain.json`).

    Given prompts are then all that is drawn. ConfigError when no chain has trained a model yet.
    """
    if config.prompt or config.prompts_file:
        config = replace(config, num_scenes=0, num_validation_prompts=0)
    producers = {name: job for name, job in SOURCES.items() if name != "tokens" or config.num_validation_prompts}
    filled: Config = fill_from_chain(config, producers, root=root)
    return filled


def load_painter(config: Config) -> TextToImage:
    """Load the model with its tokenizers. VocabularyError if they are not those that it was trained with."""
    folders = {name: getattr(config, name) for name in ("checkpoint", "text_tokenizer", "image_tokenizer")}
    for name, folder in folders.items():
        if folder is None:
            flag = f"--{name.replace('_', '-')} FOLDER"
            raise ConfigError(f"{name} is not given; run `make pretrain` first, or give {flag}")
    return TextToImage.load(**folders, device=config.device)


def collect_prompts(config: Config) -> list[Prompt]:
    """All prompts in the order in which they are drawn. ConfigError when there is none, or an empty one."""
    given = [*config.prompt, *(_file_prompts(config.prompts_file) if config.prompts_file else ())]
    if any(not text.strip() for text in given):
        raise ConfigError(f"prompt={given}: an empty caption asks for nothing; leave it out")
    prompts = [
        *(Prompt(text=text.strip(), kind="given", candidates=config.candidates) for text in given),
        *(
            Prompt(text=asked.caption, kind="scene", language=asked.language, scene=asked.scene)
            for asked in held_out_prompts(config.num_scenes, seed=config.seed, two_shape_share=config.two_shape_share)
        ),
        *(Prompt(text=text, kind="validation") for text in _validation_texts(config)),
    ]
    if not prompts:
        raise ConfigError("nothing to draw; give --prompt, --prompts-file, --num-scenes or --num-validation-prompts")
    return prompts


def place_orders(prompts: Sequence[Prompt], *, seed: int) -> Iterator[Order]:
    """One order for each candidate of each prompt. A picture's seed comes from (seed, prompt, candidate) alone."""
    for index, prompt in enumerate(prompts):
        for candidate in range(prompt.candidates):
            digest = hashlib.sha256(f"sample:{seed}:{index}:{candidate}".encode()).digest()
            yield Order(
                prompt_index=index,
                prompt=prompt,
                candidate=candidate,
                seed=int.from_bytes(digest[:6], "big"),  # 48 bits: exact in JSON and in any table
            )


def draw(orders: Sequence[Order], painter: TextToImage, *, config: Config, run: JobRun) -> list[dict[str, Any]]:
    """Draw batch by batch, save each picture, and return the rows of the table of samples."""
    rows: list[dict[str, Any]] = []
    for sampling, batch in in_batches(orders, config=config):
        codes_Bhw = painter.codes(
            [order.prompt.text for order in batch], seeds=[order.seed for order in batch], sampling=sampling
        )
        pictures = to_pictures(painter.decode(codes_Bhw))
        for order, codes_hw, picture in zip(batch, codes_Bhw.cpu().numpy().astype(np.uint16), pictures, strict=True):
            rows.append(_sample_row(order, index=len(rows), codes_hw=codes_hw, checkpoint=run.inputs["checkpoint"]))
            _save_picture(picture, run.output / rows[-1]["path"])
        run.progress(len(rows), len(orders), "pictures")
    return rows


def in_batches(orders: Sequence[Order], *, config: Config) -> Iterator[tuple[SamplingConfig, Sequence[Order]]]:
    """The orders in their order, in batches that are drawn alike."""
    for is_scene, group in itertools.groupby(orders, key=lambda order: order.prompt.kind == "scene"):
        alike = list(group)
        for start in range(0, len(alike), config.batch_size):
            sampling = config.scene_sampling if is_scene else config.sampling
            yield sampling, alike[start : start + config.batch_size]


def draw_grid(folder: Path, table: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The sheet of the first prompts, every candidate of a prompt side by side over its caption."""
    tiles = []
    for _, group in itertools.groupby(table, key=lambda row: row["prompt_index"]):
        rows = list(group)[:CANDIDATES_SHOWN]
        pictures = tuple(Image.open(folder / row["path"]).convert("RGB") for row in rows)
        tiles.append(Tile(images=pictures, caption=rows[0]["prompt"], fallback=rows[0]["latin_prompt"]))
    return draw_sheet(tiles[:GRID_TILES])


def _sample_row(order: Order, *, index: int, codes_hw: np.ndarray, checkpoint: str) -> dict[str, Any]:
    scene = order.prompt.scene
    return {
        "index": index,
        "prompt_index": order.prompt_index,
        "prompt": order.prompt.text,
        "latin_prompt": _latin_prompt(order),
        "kind": order.prompt.kind,
        "language": order.prompt.language,
        "scene": scene_to_json(scene) if scene else "",
        "candidate": order.candidate,
        "seed": order.seed,
        "codes": codes_hw.ravel().tolist(),
        "path": f"{SAMPLES_FOLDER}/{index:06d}.png",
        "checkpoint": checkpoint,
    }


def _latin_prompt(order: Order) -> str:
    if order.prompt.scene is None:
        return f"prompt {order.prompt_index}"
    english, _ = captions(order.prompt.scene, rng=random.Random(1))  # draws 0.13: the first, plainest template
    return f"{order.prompt.language}: {english}"


def _save_picture(picture: Image.Image, path: Path) -> None:
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def _file_prompts(path: Path) -> list[str]:
    """The captions of a UTF-8 text file, one on a line; empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts_file={path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"prompts_file={path} holds no caption; write one on each line")
    return texts


def _validation_texts(config: Config) -> list[str]:
    """Captions of held-out rows, each of another image and no text twice, chosen by the seed."""
    if not config.num_validation_prompts:
        return []
    if config.tokens is None:
        raise ConfigError("num_validation_prompts needs token rows; give --tokens, the output folder of tokenize_pairs")
    shards = TokenShards.open(config.tokens, split="validation")
    chosen: dict[str, str] = {}  # text -> key of its image
    for number in np.random.default_rng(config.seed).permutation(len(shards)):
        row = shards.rows(np.array([number]))
        if row.texts[0].strip() and row.texts[0] not in chosen and row.keys[0] not in chosen.values():
            chosen[row.texts[0]] = row.keys[0]
        if len(chosen) == config.num_validation_prompts:
            break
    return list(chosen)


JOB = Job(name="generate", version=1, products=("samples.parquet", "grid.png", "prompts.json"), main=main)
