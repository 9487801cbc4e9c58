"""Turn pairs into token rows: image codes and text ids, one row for each caption.

Command: python -m pipelines tokenize_pairs smoke --pairs ... --text-tokenizer ... --image-tokenizer ...
Reads:   the tars of filter_pairs; the output folders of train_text_tokenizer and train_image_tokenizer
Writes:  train/shard-00000.arrow, validation/shard-00000.arrow, rejected/shard-00000.parquet, manifest.json
Time:    about 10 s for 2,000 pairs of 64 x 64 pixels on two cores, of which half is starting Ray
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cogview.config import digest_of, input_field, runtime_field
from cogview.errors import ConfigError
from cogview.records.captions import clean_captions
from cogview.records.images import decode_image
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.records.tars import read_pairs
from cogview.shards.manifest import MANIFEST_NAME, ShardEntry, atomic_file, read_manifest, shard_name
from cogview.shards.reader import TokenShards
from cogview.shards.schema import SPLITS, TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.tokenizers.pixels import pixel_batch, square_pixels
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry

REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "source", "reason", "detail")])
KEPT = [("status", "=", "ok")]  # of the candidates in a Parquet of filter_pairs
HASH_RANGE = 1 << 64
# Below so many expected validation pairs, none might fall under the threshold: e^-64 is never, e^-3 is one run in 20.
FEW_VALIDATION_PAIRS = 64
EXAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """pairs, text_tokenizer, image_tokenizer: output folders of the jobs before.

    image_size: side in pixels of the square that is encoded, a multiple of the image tokenizer's stride;
    validation_fraction: share of the pairs that is held out, at least one pair (see `validation_threshold`);
    max_characters: longer captions are cut; batch_size: images encoded at once, which may decide near-ties between
    codes and is therefore part of the digest; workers: shards at a time (0: as many as there are CPUs, or GPUs);
    device: cpu, or cuda for one GPU to each shard.
    """

    pairs: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    image_size: int = 256
    validation_fraction: float = 0.001
    max_characters: int = 2000
    batch_size: int = 32
    workers: int = runtime_field(0)
    device: str = runtime_field("cpu")

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}; give cpu or cuda")
        for name in ("image_size", "max_characters", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


PAPER = Config(image_size=256, device="cuda")
PRESETS: dict[str, Config] = {
    "paper": PAPER,  # 256 / 8 = 32 x 32 codes
    "smoke": replace(PAPER, image_size=64, validation_fraction=0.05, device="cpu"),  # 8 x 8 codes
}


def main(config: Config, run: JobRun) -> None:
    """Encode shard by shard, close the folder, and read back what was written."""
    inputs = require_inputs(config)
    origin = token_origin(inputs, image_size=config.image_size)
    shards = read_manifest(inputs.pairs)["shards"]
    threshold = validation_threshold(inputs.pairs, shards=shards, fraction=config.validation_fraction)
    num_gpus = 1.0 if config.device == "cuda" else 0.0
    work = TokenizeShard(config=config, inputs=inputs, origin=origin, threshold=threshold, output=run.output)
    tasks = [ShardTask(shard=shard["shard"], input_digest=digest_of(shard["files"])) for shard in shards]
    entries = run_shards(
        work, tasks, folder=run.output, run=run, workers=config.workers, num_gpus=num_gpus, note="tokenized"
    )
    rows = {f"rows_{split}": sum(entry.extra[f"rows_{split}"] for entry in entries) for split in SPLITS}
    close_folder(run, entries, extra={**asdict(origin), **rows})
    require_both_splits(rows, config=config)
    text_ids = sum(entry.extra["text_ids"] for entry in entries)
    image_tokens = origin.grid**2 * sum(rows.values())
    run.scores.update({**rows, "grid": origin.grid, "text_tokens": text_ids, "image_tokens": image_tokens})
    run.say(f"{rows['rows_train']:,} rows to train on, {rows['rows_validation']:,} held out")
    run.tracker.log_table(example_rows(run.output, text_tokenizer=inputs.text_tokenizer), "examples.json")


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


def token_origin(inputs: Inputs, *, image_size: int) -> TokenOrigin:
    """What the rows are made with. ConfigError if the image size is no multiple of the tokenizer's stride."""
    text, image = TextTokenizer.load(inputs.text_tokenizer), load_image_tokenizer(inputs.image_tokenizer)
    if image_size % image.stride:
        raise ConfigError(
            f"image_size is {image_size}; with this image tokenizer it must be a multiple of {image.stride}"
        )
    return TokenOrigin(
        text_tokenizer=text.fingerprint,
        image_tokenizer=image.fingerprint,
        vocabulary=Vocabulary(image.num_codes, text.num_pieces).fingerprint,
        num_image_codes=image.num_codes,
        num_text_pieces=text.num_pieces,
        grid=image_size // image.stride,
    )


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


def key_hash(key: str) -> int:
    """A number in [0, 2^64) that is the same for a key on any machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


@dataclass(frozen=True, kw_only=True)
class TokenizeShard:
    """The work on one shard; workers get it pickled, and load the tokenizers once per process."""

    config: Config
    inputs: Inputs
    origin: TokenOrigin
    threshold: int
    output: Path

    def __call__(self, task: ShardTask) -> ShardEntry:
        """Read the shard's tar, write its Arrow files and its rejects, and return their entry."""
        tokenized = Tokenized(threshold=self.threshold)
        pairs = read_pairs(self.inputs.pairs / shard_name(task.shard, "tar"))
        images = decoded_images(pairs, tokenized, config=self.config)
        while batch := list(islice(images, self.config.batch_size)):
            self._encode(batch, tokenized)
        return self._write(task, tokenized)

    def _encode(self, batch: list["DecodedPair"], tokenized: "Tokenized") -> None:
        text, image = load_tokenizers(self.inputs.text_tokenizer, self.inputs.image_tokenizer, self.config.device)
        with torch.inference_mode():
            codes_Bhw = image.encode(pixel_batch([pair.pixels for pair in batch]).to(self.config.device))
        codes = codes_Bhw.flatten(1).cpu().numpy().astype(np.uint16)
        for pair, pair_codes in zip(batch, codes, strict=True):
            tokenized.add(pair, codes=pair_codes, text_ids=text.encode_batch(pair.captions))

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
    """A pair that can be tokenized. captions: cleaned, at least one; pixels: uint8 [image_size, image_size, 3]."""

    key: str
    source: str
    captions: tuple[str, ...]
    pixels: npt.NDArray[np.uint8]


@dataclass(kw_only=True)
class Tokenized:
    """What a shard has come to so far: rows by split, and the pairs that gave none."""

    threshold: int
    num_pairs: int = 0
    rows: dict[str, list[TokenRow]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    rejected: list[Failure] = field(default_factory=list)

    def add(self, pair: DecodedPair, *, codes: npt.NDArray[np.uint16], text_ids: Sequence[Sequence[int]]) -> None:
        """Add a row for each caption, all on the side where the image's key belongs."""
        self.num_pairs += 1
        split = "validation" if key_hash(pair.key) < self.threshold else "train"
        for text, ids in zip(pair.captions, text_ids, strict=True):
            self.rows[split].append(
                TokenRow(
                    key=pair.key,
                    text=text,
                    text_ids=np.array(ids, np.int32),
                    image_codes=codes,
                    source=pair.source,
                )
            )


def decoded_images(pairs: Iterable[TextImagePair], tokenized: Tokenized, *, config: Config) -> Iterator[DecodedPair]:
    """The pairs with their pixels; those without a readable image or a caption go to `tokenized.rejected`."""
    for pair in pairs:
        captions = clean_captions(caption[: config.max_characters] for caption in pair.captions)
        image = (
            decode_image(pair.image_bytes, short_side=config.image_size) if captions else Unusable("caption_missing")
        )
        if isinstance(image, Unusable):
            failure = Failure(key=pair.key, source=pair.source, reason=image.reason, detail=image.detail)
            tokenized.rejected.append(failure)
            continue
        pixels = square_pixels(image, image_size=config.image_size)
        yield DecodedPair(key=pair.key, source=pair.source, captions=captions, pixels=pixels)


@functools.lru_cache(maxsize=1)
def load_tokenizers(text: Path, image: Path, device: str) -> tuple[TextTokenizer, AnyImageTokenizer]:
    """Both tokenizers, once per process. One thread: there are as many workers as CPUs."""
    if device == "cpu":
        torch.set_num_threads(1)
    return TextTokenizer.load(text), load_image_tokenizer(image).to(device)


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


JOB = Job(name="tokenize_pairs", version=1, products=(MANIFEST_NAME,), main=main)
