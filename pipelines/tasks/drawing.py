"""Pictures drawn for prompts, shard by shard, in this process or on Ray (CogView, sections 2.3 and 3.2).

In: orders, each a prompt, a candidate's number and a seed, and the folders of trained weights. Out: a PNG of each, and
for each shard of orders a table with codes and, where there is a captioner, CapLoss. A picture is decided by its seed,
so it is the same wherever it is drawn; shards that are done are not drawn again.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cogview.config import digest_of
from cogview.evaluation.blur import with_contrast
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import to_pictures
from cogview.sampling.captioning import Captioner
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.shards.manifest import ShardEntry, atomic_file, read_entry, shard_name, write_entry
from pipelines.runtime.jobs import JobRun
from pipelines.runtime.shard_jobs import ShardTask, run_shards, shard_entry

SAMPLES_FOLDER, TABLES_FOLDER = "samples", "tables"
HERE_PICTURES = 2000  # up to so many, Ray's start would take longer than it saves
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
        ("cap_loss", pa.float64()),  # of the prompt for this picture; null without a captioner
        ("path", pa.string()),
        ("checkpoint", pa.string()),
    ]
)
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A caption to draw. kind: where it is from, `given`, `scene` or `validation`; scene: as JSON, if it is known."""

    text: str
    kind: str
    candidates: int = 1
    language: str = ""
    scene: str = ""
    latin: str = ""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One picture to draw. Its seed decides it, not what else is in the batch (but for the last bits of a sum).

    rewritten: the prompt as it is drawn, where that is not the one that was given.
    """

    prompt_index: int
    prompt: Prompt
    candidate: int
    seed: int
    rewritten: str = ""

    @property
    def text(self) -> str:
        """What the model is asked for."""
        return self.rewritten or self.prompt.text


@dataclass(frozen=True, kw_only=True)
class DrawShard:
    """The work on one shard; workers get it pickled, and load the weights once per process.

    contrast: of the pictures, 1 leaves them as the tokenizer decodes them; checkpoint_digest: goes into the table;
    is_recorded: see `GPT.record_steps`.
    """

    checkpoint: Path
    text_tokenizer: Path
    image_tokenizer: Path
    captioner: Path | None
    sampling: SamplingConfig
    scene_sampling: SamplingConfig
    contrast: float
    checkpoint_digest: str
    output: Path
    batch_size: int
    device: str
    threads: int
    is_recorded: bool

    def __call__(self, task: ShardTask, progress: Progress | None = None) -> ShardEntry:
        """Draw the shard's orders, write their pictures and their table, and return its entry."""
        torch.set_num_threads(self.threads)
        orders = list(_orders(task.inputs))
        rows: list[dict[str, Any]] = []
        for sampling, batch in self._batches(orders):
            rows += self._draw(batch, sampling=sampling, first=task.inputs["first"] + len(rows))
            if progress is not None:
                progress(rows[-1]["index"] + 1)
        table = f"{TABLES_FOLDER}/{shard_name(task.shard, 'parquet')}"
        with atomic_file(self.output / table) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA), file)
        files = [table, *(row["path"] for row in rows)]
        return shard_entry(self.output, task, rows_in=len(orders), rows_out=len(rows), rejected={}, files=files)

    def load(self) -> tuple[TextToImage, Captioner | None]:
        """The painter and, if there is one, the captioner. VocabularyError if tokenizers are not those of training."""
        models = self.checkpoint, self.captioner, self.text_tokenizer, self.image_tokenizer
        return _load(*models, self.device, self.is_recorded)

    def _batches(self, orders: Sequence[Order]) -> Iterator[tuple[SamplingConfig, Sequence[Order]]]:
        """The orders in their order, in batches that are drawn alike."""
        for is_scene, group in itertools.groupby(orders, key=lambda order: order.prompt.kind == "scene"):
            alike = list(group)
            for start in range(0, len(alike), self.batch_size):
                sampling = self.scene_sampling if is_scene else self.sampling
                yield sampling, alike[start : start + self.batch_size]

    def _draw(self, batch: Sequence[Order], *, sampling: SamplingConfig, first: int) -> list[dict[str, Any]]:
        painter, captioner = self.load()
        prompts = [order.text for order in batch]
        codes_Bhw = painter.codes(prompts, seeds=[order.seed for order in batch], sampling=sampling)
        losses: list[float | None] = [None] * len(batch)
        if captioner is not None:
            losses = [score.cap_loss for score in score_pairs(captioner, prompts, codes_Bhw)]
        codes = codes_Bhw.flatten(1).cpu().numpy().astype(np.uint16)
        rows = []
        for number, picture in enumerate(to_pictures(painter.decode(codes_Bhw))):
            order, path = batch[number], f"{SAMPLES_FOLDER}/{first + number:06d}.png"
            save_picture(with_contrast(picture, self.contrast), self.output / path)
            rows.append(
                {
                    "index": first + number,
                    "prompt_index": order.prompt_index,
                    "prompt": order.prompt.text,
                    "latin_prompt": order.prompt.latin or f"prompt {order.prompt_index}",
                    "kind": order.prompt.kind,
                    "language": order.prompt.language,
                    "scene": order.prompt.scene,
                    "candidate": order.candidate,
                    "seed": order.seed,
                    "codes": codes[number].tolist(),
                    "cap_loss": losses[number],
                    "path": path,
                    "checkpoint": self.checkpoint_digest,
                }
            )
        return rows


def draw_orders(orders: Sequence[Order], work: DrawShard, *, shard_size: int, workers: int, run: JobRun) -> pa.Table:
    """Draw what is not drawn yet; returns the table of all pictures, SAMPLE_SCHEMA.

    workers: 1 draws in this process, more on Ray; 0 decides by the number of pictures, and takes one for each CPU.
    """
    tasks = [
        _task(number, orders[start : start + shard_size], first=start)
        for number, start in enumerate(range(0, len(orders), shard_size))
    ]
    if workers == 1 or (workers == 0 and len(orders) <= HERE_PICTURES):
        for task in tasks:
            if read_entry(work.output, task.shard, input_digest=task.input_digest) is None:
                entry = work(task, lambda done: run.progress(done, len(orders), "pictures"))
                write_entry(work.output, entry)
    num_gpus = 1.0 if work.device.startswith("cuda") else 0.0
    on_ray = replace(work, threads=1)
    entries = run_shards(
        on_ray, tasks, folder=work.output, run=run, workers=workers, num_gpus=num_gpus, note="shards of pictures"
    )
    tables = [f"{TABLES_FOLDER}/{shard_name(entry.shard, 'parquet')}" for entry in entries]
    return pa.concat_tables([pq.read_table(work.output / name, schema=SAMPLE_SCHEMA) for name in tables])


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG that is there whole or not at all."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG")


def _task(number: int, orders: Sequence[Order], *, first: int) -> ShardTask:
    """A shard as plain values: each prompt once, then who is to be drawn, and what was rewritten."""
    prompts = {str(order.prompt_index): asdict(order.prompt) for order in orders}
    places = [
        [order.prompt_index, order.candidate, order.seed, *([order.rewritten] if order.rewritten else [])]
        for order in orders
    ]
    inputs: Mapping[str, Any] = {"first": first, "prompts": prompts, "orders": places}
    return ShardTask(shard=number, input_digest=digest_of(inputs), inputs=inputs)


def _orders(inputs: Mapping[str, Any]) -> Iterator[Order]:
    prompts = {int(index): Prompt(**prompt) for index, prompt in inputs["prompts"].items()}
    for index, candidate, seed, *rewritten in inputs["orders"]:
        yield Order(
            prompt_index=index, prompt=prompts[index], candidate=candidate, seed=seed, rewritten="".join(rewritten)
        )


@functools.lru_cache(maxsize=1)
def _load(
    checkpoint: Path,
    captioner: Path | None,
    text_tokenizer: Path,
    image_tokenizer: Path,
    device: str,
    is_recorded: bool,
) -> tuple[TextToImage, Captioner | None]:
    painter = TextToImage.load(
        checkpoint, text_tokenizer=text_tokenizer, image_tokenizer=image_tokenizer, device=device
    )
    if is_recorded:
        painter.model.record_steps()
    if captioner is None:
        return painter, None
    return painter, Captioner.load(
        captioner, text_tokenizer=text_tokenizer, image_tokenizer=image_tokenizer, device=device
    )
