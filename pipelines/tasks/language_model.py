"""The GPT as a training task: token rows of a layout as batches, held-out losses and a picture, published weights.

In: the output folders of tokenize_pairs and of both tokenizers, a GPT, and a layout of `cogview.sequences.layout`. Out:
a task for the training loop (CogView, sections 2.3 and 3). Pretraining builds it around new weights, finetuning
(`pipelines.tasks.finetuning`) around trained ones.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from cogview.evaluation.losses import held_out_losses
from cogview.models.gpt import GPT
from cogview.models.pivots import pivot_keys
from cogview.models.published import save_model
from cogview.sequences.batch import SequenceBatch, SequenceConfig, build_batch
from cogview.sequences.layout import SequenceLayout
from cogview.shards.order import sample_order
from cogview.shards.reader import TokenRows, TokenShards
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.language_model import LanguageModelLoss, weighted
from cogview.training.loop import LoopConfig, WeightedBatch
from cogview.training.ranks import Ranks
from cogview.training.step_cost import row_cost
from pipelines.runtime.jobs import given_folders
from pipelines.runtime.token_copies import local_copies
from pipelines.runtime.workers import PICTURE_KEY

PRODUCERS = {
    "tokens": "tokenize_pairs",
    "text_tokenizer": "train_text_tokenizer",
    "image_tokenizer": "train_image_tokenizer",
}
SCORES = ("loss", "image_loss", "text_loss", "validation_image_loss", "validation_text_loss", "skipped_steps")
VALIDATION_ROWS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The input folders, all given. tokens, more_tokens: corpora, also remote ones; shares: see `MixedOrder`."""

    tokens: str | Path
    text_tokenizer: Path
    image_tokenizer: Path
    more_tokens: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    def load(self) -> "Parts":
        """Open everything. VocabularyError if the tokens were made with other tokenizers."""
        text = TextTokenizer.load(self.text_tokenizer)
        image = load_image_tokenizer(self.image_tokenizer)
        corpora = local_copies([self.tokens, *self.more_tokens])
        parts = Parts(
            train=TokenShards.open_all(corpora, split="train"),
            validation=TokenShards.open_all(corpora, split="validation"),
            shares=self.shares,
            text_tokenizer=text,
            image_tokenizer=image,
            vocabulary=Vocabulary(image.num_codes, text.num_pieces),
        )
        parts.train.require(**parts.fingerprints)
        return parts


def require_inputs(config: Any) -> Inputs:
    """The input folders of a job's config, whose fields have these names. ConfigError names one that is not given."""
    return inputs_of(given_folders(config, PRODUCERS))


def inputs_of(folders: Mapping[str, Path]) -> Inputs:
    """The input folders by field."""
    return Inputs(
        tokens=folders["tokens"], text_tokenizer=folders["text_tokenizer"], image_tokenizer=folders["image_tokenizer"]
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Tokens, tokenizers and vocabulary that belong together. shares: of the corpora, where there are several."""

    train: TokenShards
    validation: TokenShards
    shares: tuple[float, ...] = ()
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyImageTokenizer
    vocabulary: Vocabulary

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint carries and every reader checks."""
        return {
            "text_tokenizer": self.text_tokenizer.fingerprint,
            "image_tokenizer": self.image_tokenizer.fingerprint,
            "vocabulary": self.vocabulary.fingerprint,
        }


Look = Callable[["LanguageModelTask", int], Mapping[str, Any]]
LayOut = Callable[[TokenRows, "TaskConfig", Vocabulary], SequenceBatch]


def lay_out_rows(rows: TokenRows, config: "TaskConfig", vocabulary: Vocabulary) -> SequenceBatch:
    """Token rows in the task's layout, for layouts of one text and the pictures at `other_grids`, then the main one."""
    images = [*(rows.other_codes[grid] for grid in config.other_grids), rows.image_codes]
    return build_batch(rows.text_ids, images, layout=config.layout, config=config.sequence, vocabulary=vocabulary)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a task does with rows and weights, whatever the weights start from. Functions are those of a module.

    look: called with the task and the step after the held-out losses of each validation; returns more scores, and
    under PICTURE_KEY a picture (see `save_sheet`). lay_out: makes the batches. other_grids: sizes at which the layout
    asks for the same picture before the main one. published: goes into `model.json`.
    save: writes the model with these settings, as `save_model` does.
    """

    layout: SequenceLayout
    sequence: SequenceConfig
    loop: LoopConfig
    output: Path
    num_validation_rows: int
    look: Look | None = None
    lay_out: LayOut = lay_out_rows
    other_grids: tuple[int, ...] = ()
    published: Mapping[str, Any] = field(default_factory=dict)
    save: Callable[..., None] = save_model


class LanguageModelTask:
    """The GPT as the training loop sees it."""

    def __init__(self, gpt: GPT, *, parts: Parts, config: TaskConfig, ranks: Ranks) -> None:
        self.gpt, self.parts, self.config, self.ranks = gpt, parts, config, ranks
        self.module: nn.Module = LanguageModelLoss(gpt)
        self.order = sample_order(
            parts.train.corpus_sizes,
            batch_size=config.loop.global_batch_size,
            seed=config.loop.seed,
            shares=parts.shares,
        )

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """This worker's rows of a step."""
        indices = ranks.share(self.order.indices(step))
        grids = self.config.other_grids
        batch = weighted(self.lay_out(self.parts.train.rows(indices, with_texts=False, other_grids=grids)))
        tensors = dict(batch.tensors)
        if self.gpt.config.attention == "sparse":
            tensors["pivot_keys"] = pivot_keys(torch.from_numpy(indices), seed=self.config.loop.seed, step=step)
        row = row_cost(self.gpt.config, length=tensors["ids"].shape[1])
        return WeightedBatch(tensors, batch.weight, operations=len(indices) * row.model)

    def validate(self, step: int) -> Mapping[str, Any]:
        """Text and image loss on held-out rows, and what the task's own look at the model tells.

        No worker of a sharded run has the whole model to look at; `generate` draws with what it publishes.
        """
        losses = held_out_losses(self.gpt, self.held_out_batches())
        is_whole = self.config.loop.sharding == "none"
        looks = self.config.look(self, step) if self.config.look and is_whole else {}
        return {**{f"validation_{part}_loss": loss.value for part, loss in losses.items()}, **looks}

    def publish(self, output: Path) -> None:
        """Write the weights with what they were trained with."""
        sequence = self.config.sequence
        settings = {
            "fingerprints": self.parts.fingerprints,
            "grid": self.parts.train.grid,
            "length": sequence.length,
            "is_image_fixed": sequence.is_image_fixed,
            "num_steps": self.config.loop.num_steps,
        }
        self.config.save(self.gpt, output, settings={**settings, **self.config.published})

    def lay_out(self, rows: TokenRows) -> SequenceBatch:
        """Token rows as the model reads them."""
        return self.config.lay_out(rows, self.config, self.parts.vocabulary)

    def held_out_batches(self) -> Iterator[SequenceBatch]:
        """Held-out rows of all shards, a few at a time, always the same ones."""
        rows, grids = self.spread_rows(self.config.num_validation_rows), self.config.other_grids
        for start in range(0, len(rows), VALIDATION_ROWS_AT_ONCE):
            indices = rows[start : start + VALIDATION_ROWS_AT_ONCE]
            yield self.lay_out(self.parts.validation.rows(indices, other_grids=grids))

    def spread_rows(self, number: int) -> npt.NDArray[np.int64]:
        """Numbers of up to `number` held-out rows, evenly spread, always the same ones."""
        total = len(self.parts.validation)
        return np.linspace(0, total - 1, min(number, total)).astype(np.int64)

    def save_sheet(self, sheet: Image.Image, step: int) -> dict[str, str]:
        """Write the picture of a validation; returns the entry that shows it."""
        name = f"samples/step_{step:08d}.png"
        (self.config.output / name).parent.mkdir(exist_ok=True)
        sheet.save(self.config.output / name)
        return {PICTURE_KEY: name}
