"""What all finetunes share: trained weights, a layout, rows of tokens, and a few thousand steps (CogView, section 3).

In: any published folder of weights, of ours or imported, and token rows that were made with the tokenizers of these
weights. Out: weights in the same form. A job fills in `Finetuning` and calls `finetune`; what is special to it (a
look at held-out rows, batches of two images, changes to the model) is a function or a field there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogview.errors import ConfigError
from cogview.models.continued import continued, continued_config
from cogview.models.gpt import GPT, GPTConfig, count_parameters
from cogview.models.lora import LoRAConfig, add_lora, count_adapters, merge_adapters, save_adapters
from cogview.models.published import SETTINGS_NAME, load_model, read_settings, save_model, shape_of
from cogview.sampling.text_to_image import require_fingerprints
from cogview.sequences.batch import SequenceConfig
from cogview.sequences.layout import TASKS
from cogview.training.loop import LoopConfig
from cogview.training.precision import DTYPES
from cogview.training.ranks import Ranks
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.jobs import JobRun
from pipelines.runtime.plan import plan_lines
from pipelines.runtime.workers import train_and_score
from pipelines.tasks.language_model import (
    PRODUCERS,
    SCORES,
    Inputs,
    LanguageModelTask,
    LayOut,
    Look,
    Parts,
    TaskConfig,
    lay_out_rows,
)

SOURCES = {"checkpoint": "pretrain", **PRODUCERS}  # the fields of a finetune's config, for `fill_from_chain`


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What a worker builds a finetune from. Functions are those of a module, so that workers find them.

    checkpoint: the weights to start from; task: a name in TASKS; length: tokens of a full row before the shift, 0 for
    what the texts of pretraining need in this layout; text_loss_weight: of the labels whose input is not an image code.
    is_image_fixed: None for the rule of the checkpoint. Positions beyond its table are added to it, and
    model_changes are made (see `continued`). lora: with a rank, only adapters are trained; they are published beside
    weights that they are merged into.
    look, lay_out, other_grids: see `TaskConfig`; published: more entries for `model.json`, where `task` tells what was
    finetuned.
    """

    checkpoint: Path
    inputs: Inputs
    task: str
    loop: LoopConfig
    output: Path
    length: int = 0
    text_loss_weight: float = 1.0
    is_image_fixed: bool | None = None
    is_compiled: bool = False
    num_validation_rows: int = 256
    model_changes: Mapping[str, Any] = field(default_factory=dict)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    look: Look | None = None
    lay_out: LayOut = lay_out_rows
    other_grids: tuple[int, ...] = ()
    published: Mapping[str, Any] = field(default_factory=dict)

    def start(self) -> "Started":
        """The model as it was published, mapped to its file, the rows, and what will be done with them.

        Raises VocabularyError if the rows or tokenizers are not those of the checkpoint, ConfigError if adapters would
        have to teach new positions.
        """
        parts = self.inputs.load()
        gpt, settings = load_model(self.checkpoint)
        require_fingerprints(settings["fingerprints"], found=parts.fingerprints, where=self.checkpoint)
        sequence = self.sequence(settings, grid=parts.train.grid)
        num_positions = self.num_positions(sequence, grid=parts.train.grid)
        if self.lora.rank and num_positions > gpt.config.max_positions:
            raise ConfigError(
                f"lora.rank={self.lora.rank}: adapters teach no new positions, and these rows need {num_positions} "
                f"where the model has {gpt.config.max_positions}; shorten the rows, or train all weights with "
                "--lora.rank 0"
            )
        config = TaskConfig(
            layout=TASKS[self.task],
            sequence=sequence,
            loop=self.loop,
            output=self.output,
            num_validation_rows=self.num_validation_rows,
            look=self.look,
            lay_out=self.lay_out,
            other_grids=self.other_grids,
            published={"task": self.task, "started_from": settings["sha256"], **self._grids(), **self.published},
            save=partial(publish_adapters, base=self.checkpoint, lora=self.lora) if self.lora.rank else save_model,
        )
        shape = continued_config(gpt.config, min_positions=num_positions, changes=self.model_changes)
        return Started(gpt=gpt, shape=shape, parts=parts, config=config)

    def model(self, started: "Started") -> GPT:
        """The model to train: all of it in fp32, or adapters on frozen weights in the run's precision.

        So the frozen ones are never on a GPU in another; sharded ones stay in fp32, as all that is sharded.
        """
        gpt = continued(started.gpt, min_positions=started.shape.max_positions, changes=self.model_changes)
        if self.lora.rank:
            if self.loop.sharding == "none":
                gpt.to(DTYPES[self.loop.precision])
            add_lora(gpt, self.lora, seed=self.loop.seed)
        return gpt

    def sequence(self, settings: Mapping[str, Any], *, grid: int) -> SequenceConfig:
        """How rows are laid out. settings: `model.json` of the checkpoint; grid: of the rows."""
        is_image_fixed = self.is_image_fixed
        if is_image_fixed is None:
            is_image_fixed = bool(settings.get("is_image_fixed", False))
        return SequenceConfig(
            length=self.length or self.row_length(settings, grid=grid),
            text_loss_weight=self.text_loss_weight,
            is_image_fixed=is_image_fixed,
        )

    def row_length(self, settings: Mapping[str, Any], *, grid: int) -> int:
        """Tokens of a row with as much text as in pretraining, and the images of this layout."""
        trained_as = TASKS[settings.get("task", "text_to_image")]
        trained = image_tokens(settings["grid"], settings.get("other_grids", ()))
        budget = trained_as.text_budget(length=int(settings["length"]), num_image_tokens=trained)
        return budget + TASKS[self.task].overhead() + sum(image_tokens(grid, self.other_grids))

    def num_positions(self, sequence: SequenceConfig, *, grid: int) -> int:
        """Rows of the table of positions that these rows need."""
        layout, tokens = TASKS[self.task], image_tokens(grid, self.other_grids)
        budget = layout.text_budget(length=sequence.length, num_image_tokens=tokens)
        return layout.num_positions(budget=budget, num_image_tokens=tokens, is_image_fixed=sequence.is_image_fixed)

    def _grids(self) -> dict[str, Any]:
        return {"other_grids": list(self.other_grids)} if self.other_grids else {}


@dataclass(frozen=True, kw_only=True)
class Started:
    """A finetune before its first step. gpt: as it was published; shape: of the model that will be trained."""

    gpt: GPT
    shape: GPTConfig
    parts: Parts
    config: TaskConfig


def image_tokens(grid: int, other_grids: Sequence[int]) -> list[int]:
    """How many codes each image of a row has: those at other grids come first."""
    return [side**2 for side in (*other_grids, grid)]


def finetune(settings: Finetuning, *, run: JobRun, num_workers: int) -> dict[str, float]:
    """Train on Ray to the end; the scores of the run are set, and the last values of all metrics returned."""
    started = settings.start()  # before Ray starts: whatever does not fit together is said now
    parts, config = started.parts, started.config
    weights = trained = count_parameters(started.shape)
    if settings.lora.rank:
        trained = count_adapters(started.shape, settings.lora)
        weights += trained
    run.tracker.log_inputs({"tokens": run.inputs.get("tokens", ""), "checkpoint": run.inputs.get("checkpoint", "")})
    run.say(
        f"{settings.task}: {len(parts.train):,} rows of up to {config.sequence.length} tokens, {weights:,} parameters"
        + (f", {trained:,} of them trained" if trained < weights else "")
    )
    last = train_and_score(
        build_task,
        settings,
        loop=settings.loop,
        num_workers=num_workers,
        run=run,
        scores=SCORES,
        started_from={"started_from": config.published["started_from"]},
    )
    run.scores.update(parameters=weights, trained_parameters=trained)
    run.tracker.log_artifact(run.output / SETTINGS_NAME)
    return last


def publish_adapters(gpt: GPT, output: Path, *, settings: Mapping[str, Any], base: Path, lora: LoRAConfig) -> None:
    """Write the adapters, and the base with the adapters merged in."""
    save_adapters(gpt, output, config=lora, settings=settings, base_sha256=settings["started_from"])
    merge_adapters(base, output, output)


def build_task(settings: Finetuning, ranks: Ranks) -> LanguageModelTask:
    """Runs on each worker."""
    torch.manual_seed(settings.loop.seed)
    started = settings.start()
    gpt = settings.model(started)
    if settings.is_compiled:
        gpt.compile_layers()
    return LanguageModelTask(gpt, parts=started.parts, config=started.config, ranks=ranks)


def finetuning_plan(settings: Finetuning, *, num_workers: int, gpus: GPUs) -> Iterator[str]:
    """What `--plan` tells of a finetune, from the shapes alone: the weights are not read."""
    stored = read_settings(settings.checkpoint)
    grid = settings.inputs.load().train.grid
    sequence = settings.sequence(stored, grid=grid)
    num_positions = settings.num_positions(sequence, grid=grid)
    return plan_lines(
        continued_config(shape_of(stored), min_positions=num_positions, changes=settings.model_changes),
        loop=settings.loop,
        length=sequence.length - 1,
        num_workers=num_workers,
        gpus=gpus,
        lora=settings.lora,
    )
