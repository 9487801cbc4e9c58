"""Finetune a pretrained GPT to write captions: the image first, then its text (CogView, section 3.2).

Command: make finetune-captioning
Reads:   the outputs of pretrain (or a released GPT, imported), tokenize_pairs and of both tokenizers
Writes:  model.safetensors, model.json, metrics.jsonl, checkpoints/, samples/step_00000500.png
Time:    smoke: about 5 minutes on two cores
Before:  --plan [--gpu-memory 80] [--gpu-tflops 300 --gpu-price 2.5] tells memory, tokens, steps, days and price
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogview.config import input_field, runtime_field
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME
from cogview.sampling.caption_search import draw_captions
from cogview.sampling.captioning import Captioner
from cogview.sampling.choice import SamplingConfig
from cogview.training.loop import LoopConfig
from cogview.training.loss_scale import LossScaleConfig
from cogview.training.optimization import OptimizerConfig
from pipelines.runtime.chain import fill_from_chain
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.tasks.finetuning import SOURCES, Finetuning, finetune, finetuning_plan
from pipelines.tasks.language_model import LanguageModelTask, require_inputs

TASK = "captioning"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Input folders that are not given are those of the chain that ran last.

    checkpoint: the weights to start from, of pretrain or import_weights; tokens: the output of tokenize_pairs, made
    with text_tokenizer and image_tokenizer, which must be those of the checkpoint.
    activation_checkpointing: trade time for memory.
    num_validation_rows: held-out rows scored during training; num_samples: held-out pictures captioned with each score.
    """

    checkpoint: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    dropout: float = 0.1
    loop: LoopConfig
    activation_checkpointing: bool = runtime_field(False)
    is_compiled: bool = runtime_field(False)
    num_workers: int = runtime_field(8)
    num_validation_rows: int = runtime_field(512)
    num_samples: int = runtime_field(24)


PAPER = Config(
    # The paper says of its finetunes that each took less than a day on one DGX-2; these settings are ours.
    loop=LoopConfig(
        num_steps=20_000,
        global_batch_size=64,  # 4 rows on each of 16 GPUs
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_share=0.01),
        precision="fp16",
        loss_scale=LossScaleConfig(initial=2.0**16),
        checkpoint_every=1000,
        validate_every=1000,
    ),
    activation_checkpointing=True,
    num_workers=16,
)
SMOKE = replace(
    PAPER,
    dropout=0.0,
    loop=LoopConfig(
        num_steps=2000,
        global_batch_size=16,
        # As in pretraining, so strong a decay makes the model name combinations that it never saw together.
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1.0, warmup_share=0.05, final_share=0.02),
        log_every=20,
        validate_every=500,
        checkpoint_every=100,
    ),
    activation_checkpointing=False,
    num_workers=2,
    num_validation_rows=256,
)
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": SMOKE}


def main(config: Config, run: JobRun) -> None:
    """Train on Ray from the checkpoint."""
    finetune(finetuning(config, output=run.output), run=run, num_workers=config.num_workers)


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the folders that are not given from the chain that ran last under `root` (`chain.json`)."""
    filled: Config = fill_from_chain(config, SOURCES, root=root)
    return filled


def plan(config: Config, *, gpus: GPUs) -> Iterator[str]:
    """What `--plan` tells; it needs the inputs, from which the model's shape and the length of rows follow."""
    settings = finetuning(config, output=Path())
    return finetuning_plan(settings, num_workers=config.num_workers, gpus=gpus)


def finetuning(config: Config, *, output: Path) -> Finetuning:
    """What is special to captioning. ConfigError names an input that is not given."""
    return Finetuning(
        checkpoint=given_folders(config, SOURCES)["checkpoint"],
        inputs=require_inputs(config),
        task=TASK,
        loop=config.loop,
        output=output,
        is_compiled=config.is_compiled,
        num_validation_rows=config.num_validation_rows,
        model_changes={"dropout": config.dropout, "activation_checkpointing": config.activation_checkpointing},
        look=partial(write_captions, number=config.num_samples),
    )


@torch.no_grad()
def write_captions(task: LanguageModelTask, step: int, *, number: int) -> Mapping[str, Any]:
    """CapLoss of held-out pairs, and their pictures over the captions that the model writes for them."""
    rows = task.parts.validation.rows(task.spread_rows(number))
    grid, device = task.parts.validation.grid, task.ranks.device
    budget = task.config.layout.text_budget(length=task.config.sequence.length, num_image_tokens=grid**2)
    captioner = Captioner(
        model=task.gpt,
        text_tokenizer=task.parts.text_tokenizer,
        image_tokenizer=task.parts.image_tokenizer.to(device),
        vocabulary=task.parts.vocabulary,
        grid=grid,
        max_text=budget,
        text_budget=budget,
        is_image_fixed=task.config.sequence.is_image_fixed,
    )
    codes_Bhw = torch.from_numpy(rows.image_codes.astype("int64")).view(-1, grid, grid).to(device)
    greedy = SamplingConfig(temperature=0.0)
    written = draw_captions(captioner, codes_Bhw, sampling=greedy, seeds=[0] * len(rows))
    pictures = to_pictures(captioner.image_tokenizer.decode(codes_Bhw))
    tiles = [
        Tile(images=(picture,), caption=caption.text, note=f"was: {text}")
        for picture, caption, text in zip(pictures, written, rows.texts, strict=True)
    ]
    losses = [score.cap_loss for score in score_pairs(captioner, rows.texts, codes_Bhw)]
    return {"validation_cap_loss": sum(losses) / len(losses), **task.save_sheet(draw_sheet(tiles), step)}


JOB = Job(name="finetune_captioning", version=2, products=(WEIGHTS_NAME, SETTINGS_NAME), main=main)
