"""Turn pairs into token rows: image codes and text ids, one row for each caption.

Command: python -m pipelines tokenize_pairs smoke --pairs ... --text-tokenizer ... --image-tokenizer ...
         for super-resolution, each picture at two sizes in one pass: --image-size 256 --other-image-sizes 128
Reads:   the tars of filter_pairs; the output folders of train_text_tokenizer and train_image_tokenizer (of any kind)
Writes:  train/shard-00000.arrow, validation/shard-00000.arrow, rejected/shard-00000.parquet, manifest.json
Time:    about 10 s for 2,000 pairs of 64 x 64 pixels on two cores, of which half is starting Ray
"""

import functools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cogview.config import digest_of, input_field, later_field, runtime_field
from cogview.errors import ConfigError
from cogview.records.captions import clean_captions
from cogview.records.images import decode_image
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.records.tars import read_pairs
from cogview.shards.manifest import MANIFEST_NAME, ShardEntry, atomic_file, read_manifest, shard_name
from cogview.shards.reader import TokenShards
from cogview.shards.schema import SPLITS, TokenOrigin
from cogview.shards.split import HASH_RANGE, key_hash, split_of
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.tokenizers.pixels import CENTRE, CropConfig, cut_square, pixel_batch
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from pipelines.runtime.cluster import usable_cpus
from pipelines.runtime.jobs import Job, JobRun, given_folders, plan_job
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry
from pipelines.runtime.shard_plan import ShardStep, shard_plan_lines, try_rows
from pipelines.tasks.origins import origin_of

REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "source", "reason", "detail")])
KEPT = [("status", "=", "ok")]  # of the candidates in a Parquet of filter_pairs
# Below so many expected validation pairs, none might fall under the threshold: e^-64 is never, e^-3 is one run in 20.
FEW_VALIDATION_PAIRS = 64
EXAMPLES = 20
TEXT_BYTES = 300  # of a row, about: key, text, its ids, source
GPU_DECODE_THREADS = 8  # a core decodes some 200 photos a second, a large GPU encodes thousands
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Config:
    """pairs, text_tokenizer, image_tokenizer: output folders of the jobs before.

    image_size: side in pixels of the square that is encoded, a multiple of the image tokenizer's stride;
    other_image_sizes: the same square is also encoded at these, for super-resolution; crop: which square;
    validation_fraction: share of the pairs that is held out, at least one pair (see `validation_threshold`);
    max_characters: longer captions are cut; batch_size: images of image_size encoded at once, fewer of larger ones,
    which may decide near-ties between codes and is therefore part of the digest; workers: shards at a time (0: as many
    as there are CPUs, or GPUs); device: cpu, or cuda for one GPU to each shard; decode_threads: of each worker beside
    its encoder (0: one, or with a GPU up to 8).
    """

    pairs: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    image_size: int = 256
    other_image_sizes: tuple[int, ...] = later_field(())
    crop: CropConfig = later_field(CENTRE)
    validation_fraction: float = 0.001
    max_characters: int = 2000
    batch_size: int = 32
    workers: int = runtime_field(0)
    device: str = runtime_field("cpu")
    decode_threads: int = runtime_field(0)

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}; give cpu or cuda")
        for name in ("image_size", "max_characters", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if len(set(self.image_sizes)) < len(self.image_sizes) or min(self.image_sizes) < 1:
            raise ConfigError(
                f"other_image_sizes are {list(self.other_image_sizes)} beside image_size {self.image_size}; each size "
                "must be at least 1 and be there once"
            )

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The main size, then the others."""
        return (self.image_size, *self.other_image_sizes)


PAPER = Config(image_size=256, batch_size=128, device="cuda")
SMOKE = replace(PAPER, image_size=64, validation_fraction=0.05, batch_size=32, device="cpu")
PRESETS: dict[str, Config] = {
    "paper": PAPER,  # 256 / 8 = 32 x 32 codes
    "super_resolution": replace(PAPER, other_image_sizes=(128,)),  # and 16 x 16
    "cogview2": replace(PAPER, image_size=160, other_image_sizes=(480,)),  # 20 x 20 and 60 x 60
    "smoke": SMOKE,  # 8 x 8 codes
    "super_resolution_smoke": replace(SMOKE, other_image_sizes=(32,)),  # and 4 x 4
}


def main(config: Config, run: JobRun) -> None:
    """Encode shard by shard, close the folder, and read back what was written."""
    inputs = require_inputs(config)
    origin = token_origin(inputs, image_sizes=config.image_sizes)
    shards = read_manifest(inputs.pairs)["shards"]
    threshold = validation_threshold(inputs.pairs, shards=shards, fraction=config.validation_fraction)
    num_gpus = 1.0 if config.device == "cuda" else 0.0
    work = TokenizeShard(config=config, inputs=inputs, origin=origin, threshold=threshold, output=run.output)
    tasks = [ShardTask(shard=shard["shard"], input_digest=digest_of(shard["files"])) for shard in shards]
    entries = run_shards(
        work,
        tasks,
        folder=run.output,
        run=run,
        workers=config.workers,
        num_gpus=num_gpus,
        as_actors=True,
        note="tokenized",
    )
    rows = {f"rows_{split}": sum(entry.extra[f"rows_{split}"] for entry in entries) for split in SPLITS}
    close_folder(run, entries, extra={**origin.stored, **rows})
    require_both_splits(rows, config=config)
    text_ids = sum(entry.extra["text_ids"] for entry in entries)
    image_tokens = sum(grid**2 for grid in origin.grids) * sum(rows.values())
    run.scores.update({**rows, "grid": origin.grid, "text_tokens": text_ids, "image_tokens": image_tokens})
    run.say(f"{rows['rows_train']:,} rows to train on, {rows['rows_validation']:,} held out")
    run.tracker.log_table(example_rows(run.output, text_tokenizer=inputs.text_tokenizer), "examples.json")


def plan(config: Config, *, root: Path) -> Iterator[str]:
    """What `--plan` tells: the shards, and an estimate from encoding a batch of grey pictures."""
    inputs, planned = require_inputs(config), plan_job(JOB, config, root=root)
    origin, manifest = token_origin(inputs, image_sizes=config.image_sizes), read_manifest(inputs.pairs)
    _, tokenizer = load_tokenizers(inputs.text_tokenizer, inputs.image_tokenizer, config.device)

    def encode_grey(rows: Sequence[int]) -> None:
        with torch.inference_mode():
            for size in config.image_sizes:
                tokenizer.encode(torch.zeros(len(rows), 3, size, size, device=config.device))

    bytes_out = sum(2 * grid**2 for grid in origin.grids) + TEXT_BYTES
    trial = try_rows(range(min(manifest["rows_out"], config.batch_size)), encode_grey, bytes_of=lambda _: bytes_out)
    tasks = [ShardTask(shard=shard["shard"], input_digest=digest_of(shard["files"])) for shard in manifest["shards"]]
    steps = [ShardStep(name="tokenized", tasks=tasks)]
    return shard_plan_lines(planned, rows=manifest["rows_out"], steps=steps, trial=trial, workers=config.workers)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The input folders, all given."""

    pairs: Path
    text_tokenizer: Path
    image_tokenizer: Path


def require_inputs(config: Config) -> Inputs:
    """The input folders. ConfigError names one that is not given."""
    producers = {
        "pairs": "filter_pairs",
        "text_tokenizer": "train_text_tokenizer",
        "image_tokenizer": "train_image_tokenizer",
    }
    return Inputs(**given_folders(config, producers))


def token_origin(inputs: Inputs, *, image_sizes: Sequence[int]) -> TokenOrigin:
    """What the rows are made with. ConfigError if an image size is no multiple of the tokenizer's stride."""
    text, image = TextTokenizer.load(inputs.text_tokenizer), load_image_tokenizer(inputs.image_tokenizer)
    for size in image_sizes:
        if size % image.stride:
            raise ConfigError(
                f"image_size is {size}; with this image tokenizer it must be a multiple of {image.stride}"
            )
    grid, *other_grids = (size // image.stride for size in image_sizes)
    return origin_of(text, image, grid=grid, other_grids=other_grids)


def validation_threshold(pairs: Path, *, shards: Sequence[dict[str, Any]], fraction: float) -> int:
    """Pairs whose key hashes below this are held out.

    It is `fraction` of the hash's range, so a pair's side does not depend on the other pairs. Only where so few are
    expected that there might be none, the keys are read, and the threshold is raised to take in the lowest hash.
    """
    threshold = int(fraction * HASH_RANGE)
    if fraction * sum(shard["rows_out"] for shard in shards) >= FEW_VALIDATION_PAIRS:
        return threshold
    tables = [pq.read_table(pairs / shard_name(shard["shard"], "parquet"), filters=KEPT) for shard in shards]
    lowest = min((key_hash(key) for table in tables for key in table["key"].to_pylist()), default=0)
    return max(threshold, lowest + 1)


@dataclass(frozen=True, kw_only=True)
class TokenizeShard:
    """The work on one shard; workers get it pickled, and load the tokenizers once per process."""

    config: Config
    inputs: Inputs
    origin: TokenOrigin
    threshold: int
    output: Path

    def __call__(self, task: ShardTask) -> ShardEntry:
        """Read the shard's tar, write its Arrow files and its rejects, and return their entry.

        Threads decode the next two batches while one is encoded.
        """
        config, tokenized = self.config, Tokenized(threshold=self.threshold)
        text, image = load_tokenizers(self.inputs.text_tokenizer, self.inputs.image_tokenizer, config.device)
        pairs = read_pairs(self.inputs.pairs / shard_name(task.shard, "tar"))
        decode = partial(decode_pair, config=config, text=text)
        with ThreadPoolExecutor(_decode_threads(config)) as threads:
            decoded = tokenized.without_failures(mapped_ahead(threads, decode, pairs, ahead=2 * config.batch_size))
            while batch := list(islice(decoded, config.batch_size)):
                codes = [self._encode(batch, place, image) for place in range(len(config.image_sizes))]
                tokenized.add(batch, codes=dict(zip(self.origin.grids, codes, strict=True)))
        return self._write(task, tokenized)

    def _encode(self, batch: list["DecodedPair"], place: int, image: AnyImageTokenizer) -> npt.NDArray[np.uint16]:
        """The codes at one of the sizes, uint16 [pairs, grid * grid]. ConfigError if a batch does not fit the GPU."""
        config, size = self.config, self.config.image_sizes[place]
        step = max(1, config.batch_size * config.image_size**2 // size**2)
        pixels = [pair.pixels[place] for pair in batch]
        try:
            with torch.inference_mode():
                parts = [
                    image.encode(pixel_batch(pixels[start : start + step], device=config.device)).flatten(1).cpu()
                    for start in range(0, len(pixels), step)
                ]
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"batch_size is {config.batch_size}; so many images of {config.image_size} px do not fit the GPU, "
                "give fewer"
            ) from error
        return torch.cat(parts).numpy().astype(np.uint16)

    def _write(self, task: ShardTask, tokenized: "Tokenized") -> ShardEntry:
        name = shard_name(task.shard, "arrow")
        for split, rows in tokenized.rows.items():
            write_token_shard(self.output / split / name, rows, origin=self.origin)
        rejects = f"rejected/{shard_name(task.shard, 'parquet')}"
        with atomic_file(self.output / rejects) as file:
            table = pa.Table.from_pylist([asdict(failure) for failure in tokenized.rejected], schema=REJECTED_SCHEMA)
            pq.write_table(table, file, compression="zstd")
        entry = shard_entry(
            self.output,
            task,
            rows_in=tokenized.num_pairs + len(tokenized.rejected),
            rows_out=tokenized.num_pairs,
            rejected=Counter(failure.reason for failure in tokenized.rejected),
            files=[*(f"{split}/{name}" for split in SPLITS), rejects],
        )
        counts = {f"rows_{split}": len(rows) for split, rows in tokenized.rows.items()}
        text_ids = sum(len(row.text_ids) for rows in tokenized.rows.values() for row in rows)
        return replace(entry, extra={**counts, "text_ids": text_ids})


@dataclass(frozen=True, kw_only=True)
class DecodedPair:
    """A pair that can be tokenized.

    captions: cleaned, at least one; text_ids: one list for each; pixels: uint8 [size, size, 3] for each image size.
    """

    key: str
    source: str
    captions: tuple[str, ...]
    text_ids: list[list[int]]
    pixels: list[npt.NDArray[np.uint8]]


@dataclass(kw_only=True)
class Tokenized:
    """What a shard has come to so far: rows by split, and the pairs that gave none."""

    threshold: int
    num_pairs: int = 0
    rows: dict[str, list[TokenRow]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    rejected: list[Failure] = field(default_factory=list)

    def without_failures(self, outcomes: Iterable[DecodedPair | Failure]) -> Iterator[DecodedPair]:
        """The pairs; failures are kept back in `rejected`."""
        for outcome in outcomes:
            if isinstance(outcome, DecodedPair):
                yield outcome
            else:
                self.rejected.append(outcome)

    def add(self, batch: Sequence[DecodedPair], *, codes: Mapping[int, npt.NDArray[np.uint16]]) -> None:
        """Add a row for each caption, all on the side where the image's key belongs. codes: by grid, the main first."""
        self.num_pairs += len(batch)
        grid, *other_grids = codes
        for number, pair in enumerate(batch):
            split = split_of(pair.key, threshold=self.threshold)
            for text, ids in zip(pair.captions, pair.text_ids, strict=True):
                self.rows[split].append(
                    TokenRow(
                        key=pair.key,
                        text=text,
                        text_ids=np.array(ids, np.int32),
                        image_codes=codes[grid][number],
                        source=pair.source,
                        other_codes={other: codes[other][number] for other in other_grids},
                    )
                )


def decode_pair(pair: TextImagePair, *, config: Config, text: TextTokenizer) -> DecodedPair | Failure:
    """The pair with its pixels and text ids, or why it gives no rows: no readable image, or no caption."""
    captions = clean_captions(caption[: config.max_characters] for caption in pair.captions)
    wanted = max(config.image_sizes) / config.crop.smallest
    image = decode_image(pair.image_bytes, short_side=round(wanted)) if captions else Unusable("caption_missing")
    if isinstance(image, Unusable):
        return Failure(key=pair.key, source=pair.source, reason=image.reason, detail=image.detail)
    cut = partial(cut_square, image, crop=config.crop, key=pair.key)
    return DecodedPair(
        key=pair.key,
        source=pair.source,
        captions=captions,
        text_ids=text.encode_batch(captions),
        pixels=[cut(image_size=size) for size in config.image_sizes],
    )


def mapped_ahead(
    threads: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[Result]:
    """The results in the order of the items, of which at most `ahead` are begun before their turn."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(threads.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@functools.lru_cache(maxsize=1)
def load_tokenizers(text: Path, image: Path, device: str) -> tuple[TextTokenizer, AnyImageTokenizer]:
    """Both tokenizers, once per process. One thread: there are as many workers as CPUs."""
    if device == "cpu":
        torch.set_num_threads(1)
    return TextTokenizer.load(text), load_image_tokenizer(image).to(device)


def _decode_threads(config: Config) -> int:
    if config.decode_threads or config.device == "cpu":
        return max(1, config.decode_threads)
    return min(GPU_DECODE_THREADS, usable_cpus())


def require_both_splits(rows: dict[str, int], *, config: Config) -> None:
    """ConfigError unless there are rows to train on and rows to validate with."""
    for name, count in rows.items():
        if count == 0:
            raise ConfigError(
                f"{name} is 0 with validation_fraction {config.validation_fraction}: {sum(rows.values())} rows are too "
                "few for both sides; give more pairs or change validation_fraction"
            )


def example_rows(folder: Path, *, text_tokenizer: Path) -> list[dict[str, Any]]:
    """The first held-out rows as people read them, through the reader that training uses."""
    shards = TokenShards.open(folder, split="validation")
    rows = shards.rows(np.arange(min(EXAMPLES, len(shards))))
    tokenizer = TextTokenizer.load(text_tokenizer)
    return [
        {"key": key, "text": text, "decoded": tokenizer.decode(ids.tolist()), "text_ids": len(ids), "codes": codes[:8]}
        for key, text, ids, codes in zip(rows.keys, rows.texts, rows.text_ids, rows.image_codes.tolist(), strict=True)
    ]


JOB = Job(name="tokenize_pairs", version=2, products=(MANIFEST_NAME,), main=main)
