"""Finetune the model to draw a picture again at twice the size, from its codes at half of it.

Command: make finetune-super-resolution; python -m pipelines finetune_super_resolution paper --tokens FOLDER
Reads:   a trained model (pretrain) with its tokenizers; token rows of each picture at two sizes (tokenize_pairs, preset
         super_resolution), or scenes that it draws itself
Writes:  model.safetensors, model.json, metrics.jsonl, checkpoints/, samples/step_00001000.png; tokens/ of the scenes
Time:    smoke: about 5 minutes on two cores
Before:  --plan [--gpu-memory 80] [--gpu-tflops 300 --gpu-price 2.5] tells memory, tokens, steps, days and price
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.models.lora import LoRAConfig
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.super_resolution import Magnifier
from cogview.sampling.windows import SCALE
from cogview.sequences.batch import SequenceBatch
from cogview.shards.reader import TokenRows
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.loop import LoopConfig
from cogview.training.loss_scale import LossScaleConfig
from cogview.training.optimization import OptimizerConfig
from pipelines.runtime.chain import fill_from_chain
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.tasks.finetuning import SOURCES, Finetuning, finetune, finetuning_plan
from pipelines.tasks.language_model import Inputs, LanguageModelTask, TaskConfig, lay_out_rows
from pipelines.tasks.scene_squares import SceneSquares, write_scene_squares

LayoutName = Literal["paper", "released"]
TASK_OF: Mapping[LayoutName, str] = {"paper": "super_resolution", "released": "super_resolution_released"}
TOKENS_FOLDER = "tokens"
SQUARES_SHOWN = 18


@dataclass(frozen=True, kw_only=True)
class Config:
    """checkpoint: the model to start from; text_tokenizer, image_tokenizer: its own.

    tokens: rows with pictures of 2 `side` x 2 `side` codes, and besides of `side` x `side`; without them, squares of
    `scenes` are drawn. side: codes along the squares that the model reads when it magnifies.
    layout: "paper", or "released" with POS0 behind ROI2, as the released weights want it.
    length: tokens of a full row before the shift; 0 takes as much text as in pretraining.
    prompt_loss_weight: of caption and small picture, which are given when a picture is magnified; the release's is 1.
    lora: with a rank, only adapters on the linear layers are trained; they and the merged model are published.
    activation_checkpointing: trade time for memory.
    num_validation_rows: held-out rows scored during training; the first of them are drawn with each score.
    """

    checkpoint: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    side: int = 16
    layout: LayoutName = "paper"
    scenes: SceneSquares | None = None
    length: int = 0
    prompt_loss_weight: float = 1.0
    dropout: float = 0.1
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    loop: LoopConfig
    activation_checkpointing: bool = runtime_field(False)
    is_compiled: bool = runtime_field(False)
    num_workers: int = runtime_field(8)
    num_validation_rows: int = runtime_field(512)

    def __post_init__(self) -> None:
        if self.layout not in TASK_OF:
            raise ConfigError(f"layout={self.layout!r}: choose one of {', '.join(TASK_OF)}")
        if self.prompt_loss_weight < 0:
            raise ConfigError(f"prompt_loss_weight={self.prompt_loss_weight}: give 0 or more")
        if self.side < 2 or self.side % 2:
            raise ConfigError(f"side={self.side}: magnifying moves by half a square; choose an even side from 2 on")


# The released weights are those of step 20,000. Batch and learning rate were not published: these keep 12 rows on each
# of the 16 GPUs on which every finetune of the paper took less than a day, and a tenth of the pretraining's rate.
PAPER = Config(
    side=16,  # 128 pixels -> 256 pixels
    length=1345,  # the release's: 1089 of pretraining, and 256 codes; leaves 57 for the text
    loop=LoopConfig(
        num_steps=20_000,
        global_batch_size=192,
        optimizer=OptimizerConfig(learning_rate=3e-5),
        precision="fp16",
        sharding="full",  # 16 bytes a parameter are 63 GB, spread over the 16 GPUs
        loss_scale=LossScaleConfig(initial=2.0**16),
        checkpoint_every=1000,
        validate_every=1000,
    ),
    activation_checkpointing=True,
    num_workers=16,
)
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        length=0,
        side=4,  # 32 pixels -> 64 pixels, of pictures that are magnified from 64 to 128
        scenes=SceneSquares(),
        loop=LoopConfig(
            num_steps=1000,
            global_batch_size=16,
            optimizer=OptimizerConfig(learning_rate=5e-3, weight_decay=0.1, warmup_share=0.05, final_share=0.02),
            log_every=20,
            validate_every=500,
            checkpoint_every=100,
        ),
        prompt_loss_weight=0.0,  # with so few steps only what is drawn counts
        dropout=0.0,
        activation_checkpointing=False,
        num_workers=2,
        num_validation_rows=256,
    ),
}


def main(config: Config, run: JobRun) -> None:
    """Draw the squares of the scenes where no token rows are given, then train on Ray."""
    tokens = config.tokens or draw_scenes(config, run=run)
    finetune(settings_of(config, tokens=tokens, output=run.output), run=run, num_workers=config.num_workers)


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the folders that are not given from the chain that ran last under `root`."""
    producers = {name: job for name, job in SOURCES.items() if name != "tokens"}
    filled: Config = fill_from_chain(config, producers, root=root)
    return filled


def plan(config: Config, *, gpus: GPUs) -> Iterator[str]:
    """What `--plan` tells; it needs the inputs."""
    if config.tokens is None:
        raise ConfigError("tokens is not given; a plan needs to know the rows: give --tokens FOLDER")
    settings = settings_of(config, tokens=config.tokens, output=Path())
    return finetuning_plan(settings, num_workers=config.num_workers, gpus=gpus)


def draw_scenes(config: Config, *, run: JobRun) -> Path:
    """The folder of token rows drawn from scenes. ConfigError when there is nothing to draw either."""
    if config.scenes is None:
        raise ConfigError(
            "tokens is not given; give --tokens FOLDER, an output of tokenize_pairs super_resolution that has each "
            f"picture as {SCALE * config.side} x {SCALE * config.side} codes and as {config.side} x {config.side}"
        )
    folders = given_folders(config, {name: SOURCES[name] for name in ("text_tokenizer", "image_tokenizer")})
    folder = run.output / TOKENS_FOLDER
    write_scene_squares(config.scenes, folder, side=config.side, progress=run.progress, **folders)
    return folder


def settings_of(config: Config, *, tokens: Path, output: Path) -> Finetuning:
    """What workers build their task from. ConfigError for rows of other grids than the model is to read and draw."""
    folders = given_folders(config, {name: job for name, job in SOURCES.items() if name != "tokens"})
    inputs = Inputs(tokens=tokens, text_tokenizer=folders["text_tokenizer"], image_tokenizer=folders["image_tokenizer"])
    found = inputs.load().train
    if found.grid != SCALE * config.side or config.side not in found.other_grids:
        raise ConfigError(
            f"tokens: {tokens} holds pictures of {found.grid} x {found.grid} codes, and besides of "
            f"{list(found.other_grids)}; with side={config.side} they must be {SCALE * config.side} x "
            f"{SCALE * config.side}, and besides {config.side} x {config.side}"
        )
    return Finetuning(
        checkpoint=folders["checkpoint"],
        inputs=inputs,
        task=TASK_OF[config.layout],
        loop=config.loop,
        output=output,
        length=config.length,
        is_compiled=config.is_compiled,
        num_validation_rows=config.num_validation_rows,
        model_changes={"dropout": config.dropout, "activation_checkpointing": config.activation_checkpointing},
        lora=config.lora,
        look=look_at_squares,
        lay_out=partial(lay_out_squares, prompt_loss_weight=config.prompt_loss_weight),
        other_grids=(config.side,),
    )


def lay_out_squares(
    rows: TokenRows, config: TaskConfig, vocabulary: Vocabulary, *, prompt_loss_weight: float
) -> SequenceBatch:
    """Token rows in their layout, with a weight of its own for all that comes before the picture to draw."""
    batch = lay_out_rows(rows, config, vocabulary)
    is_prompt_BL = (batch.ids == vocabulary.command("ROI2")).cumsum(dim=1) == 0
    weights_BL = torch.where(is_prompt_BL, prompt_loss_weight * batch.loss_weights, batch.loss_weights)
    return replace(batch, loss_weights=weights_BL)


def look_at_squares(task: LanguageModelTask, step: int) -> Mapping[str, Any]:
    """Held-out squares: what the model reads, enlarged; what it draws; and what it should have drawn."""
    held_out, side = task.parts.validation, task.config.other_grids[0]
    rows = held_out.rows(task.spread_rows(SQUARES_SHOWN), other_grids=(side,))
    sequence, device = task.config.sequence, task.ranks.device
    magnifier = Magnifier(
        model=task.gpt,
        text_tokenizer=task.parts.text_tokenizer,
        image_tokenizer=task.parts.image_tokenizer.to(device),
        vocabulary=task.parts.vocabulary,
        layout=task.config.layout,
        side=side,
        text_budget=task.config.layout.text_budget(
            length=sequence.length, num_image_tokens=(side**2, held_out.grid**2)
        ),
        is_image_fixed=sequence.is_image_fixed,
    )
    small_Bhw = torch.from_numpy(rows.other_codes[side].astype(np.int64)).view(-1, side, side).to(device)
    right_Bhw = torch.from_numpy(rows.image_codes.astype(np.int64)).view(-1, held_out.grid, held_out.grid).to(device)
    drawn_Bhw = magnifier.magnify(
        rows.texts, small_Bhw, seeds=list(range(len(rows))), sampling=SamplingConfig(temperature=0)
    )
    of_codes = (to_pictures(magnifier.decode(codes_Bhw)) for codes_Bhw in (small_Bhw, drawn_Bhw, right_Bhw))
    tiles = [
        Tile(images=three, caption=text) for three, text in zip(zip(*of_codes, strict=True), rows.texts, strict=True)
    ]
    sheet = draw_sheet(tiles, title="read | drawn | right")
    right_share = (drawn_Bhw == right_Bhw).float().mean().item()
    return {"validation_codes_right": right_share, **task.save_sheet(sheet, step)}


JOB = Job(name="finetune_super_resolution", version=1, products=(WEIGHTS_NAME, SETTINGS_NAME), main=main)
