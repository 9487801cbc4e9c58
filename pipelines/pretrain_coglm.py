"""Pretrain CogLM, CogView2's model: it draws, captions and completes pictures with one set of weights.

Command: make pretrain-coglm [DATA=/folder]
Reads:   the Arrow shards of tokenize_pairs, made with a bilingual text tokenizer (train_text_tokenizer bilingual), and
         both tokenizers
Writes:  model.safetensors, model.json, metrics.jsonl, checkpoints/, samples/step_00001000.png
Time:    smoke: ten minutes on two fast cores, half an hour on slow ones
Before:  --plan [--gpu-memory 80] [--gpu-tflops 300 --gpu-price 2.5] tells memory, tokens, steps, days and price
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.models.gpt import GPT, GPTConfig, count_parameters
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME
from cogview.models.sizes import SIZES
from cogview.sequences.coglm import PARTS, CogLMLayout, CogLMTasks
from cogview.training.loop import LoopConfig
from cogview.training.loss_scale import LossScaleConfig
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines.runtime.chain import CHAIN_NAME, fill_from_chain
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.plan import plan_lines
from pipelines.runtime.workers import train_and_score
from pipelines.tasks.coglm import CogLMTask, CogLMTaskConfig, vocabulary_of
from pipelines.tasks.language_model import PRODUCERS, Parts, require_inputs
from pipelines.tasks.new_weights import TaskSettings, start_from_codebook

SCORES = ("loss", "skipped_steps", *(f"validation_{part}_loss" for part in PARTS))


@dataclass(frozen=True, kw_only=True)
class Config:
    """tokens: the output of tokenize_pairs; text_tokenizer, image_tokenizer: those that made the tokens.

    model: its vocabulary and positions are set from the tokens. embeddings_from_codebook: as in pretrain.
    max_text: text tokens of a row, longer captions are cut; image_position: that of the token that begins an image (0:
    right behind the longest text). tasks: what pairs are made into. text_loss_weight: beside 1 of image codes.
    is_compiled: run the layers through torch.compile (needs a C++ compiler; the first step takes a minute more).
    num_validation_rows: held-out rows scored during training; num_samples: pictures of the grid drawn with each score.
    """

    tokens: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    model: GPTConfig = field(default_factory=lambda: SIZES["6b"])
    embeddings_from_codebook: bool = False
    max_text: int = 111
    image_position: int = 0
    tasks: CogLMTasks = field(default_factory=CogLMTasks)
    text_loss_weight: float = 1.0
    loop: LoopConfig
    num_workers: int = runtime_field(8)
    is_compiled: bool = runtime_field(False)
    num_validation_rows: int = runtime_field(512)
    num_samples: int = runtime_field(16)


PAPER = Config(
    model=replace(SIZES["6b"], activation_checkpointing=True),
    max_text=111,  # 512 tokens - 400 codes - the start of the image
    image_position=512,
    loop=LoopConfig(
        num_steps=300_000,
        global_batch_size=4096,
        optimizer=OptimizerConfig(learning_rate=1e-4),  # by the authors' word; the paper does not say
        precision="fp16",
        sharding="full",
        loss_scale=LossScaleConfig(initial=2.0**32),
        checkpoint_every=500,
        validate_every=2000,
    ),
    num_workers=512,
)
SMOKE = replace(
    PAPER,
    model=replace(SIZES["tiny"], num_heads=8, embedding_gradient=1.0),
    embeddings_from_codebook=True,
    max_text=28,
    image_position=0,
    tasks=CogLMTasks(
        understanding_share=0.15,  # with captions in two languages each
        completion_share=0.55,  # beyond the release: so that a hole is filled from the text,
        box_shares=(0.375, 0.875),  # large enough to hide a whole shape: what is left of one would tell the answer
        patch_side=2,  # of 8 x 8 codes, about what 4 is of 20 x 20
    ),
    text_loss_weight=2.0,  # one row in seven has captions
    loop=LoopConfig(
        num_steps=9000,
        global_batch_size=16,
        optimizer=OptimizerConfig(learning_rate=5e-3, weight_decay=1.0, warmup_share=0.05, final_share=0.02),
        log_every=20,
        validate_every=1000,
        checkpoint_every=500,
    ),
    num_workers=2,
    num_validation_rows=256,
)
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": SMOKE,
    "paper_patches": replace(PAPER, tasks=CogLMTasks(patch_rule="paper", patch_share=0.75)),
}


def main(config: Config, run: JobRun) -> None:
    """Check that tokens and tokenizers belong together, then train on Ray."""
    settings = TaskSettings(config=config, output=run.output, inputs=require_inputs(config))
    parts = settings.inputs.load()
    run.tracker.log_inputs({"tokens": run.inputs.get("tokens", "")})
    weights = count_parameters(fitted(config, parts))
    run.say(f"{len(parts.train):,} rows, {config.model.num_layers} layers, {weights:,} parameters")
    train_and_score(
        build_task,
        settings,
        loop=config.loop,
        num_workers=config.num_workers,
        run=run,
        scores=SCORES,
    )
    run.scores.update(parameters=weights)
    run.tracker.log_artifact(run.output / SETTINGS_NAME)


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in tokens and tokenizers from the chain that ran last under `root`, if one did."""
    filled: Config = fill_from_chain(config, PRODUCERS, root=root) if (root / CHAIN_NAME).is_file() else config
    return filled


def plan(config: Config, *, gpus: GPUs) -> Iterator[str]:
    """What `--plan` tells; with the inputs given, of the vocabulary and length that they need."""
    model, length = config.model, CogLMLayout(max_text=config.max_text).length
    if config.tokens and config.text_tokenizer and config.image_tokenizer:
        parts = require_inputs(config).load()
        model, length = fitted(config, parts), layout_of(config, parts).length
    return plan_lines(model, loop=config.loop, length=length, num_workers=config.num_workers, gpus=gpus)


def build_task(settings: TaskSettings, ranks: Ranks) -> CogLMTask:
    """A new GPT as a task for the training loop; runs on each worker."""
    config, parts = settings.config, settings.inputs.load()
    torch.manual_seed(config.loop.seed)
    gpt = GPT(fitted(config, parts))
    if config.embeddings_from_codebook:
        start_from_codebook(gpt, parts)
    if config.is_compiled:
        gpt.compile_layers()
    task = CogLMTaskConfig(
        layout=layout_of(config, parts),
        tasks=config.tasks,
        text_loss_weight=config.text_loss_weight,
        loop=config.loop,
        output=settings.output,
        num_validation_rows=config.num_validation_rows,
        num_samples=config.num_samples,
    )
    return CogLMTask(gpt, parts=parts, config=task, ranks=ranks)


def layout_of(config: Config, parts: Parts) -> CogLMLayout:
    """Where tokens stand in rows of these tokens. ConfigError where there is no room."""
    position = config.image_position or config.max_text + 1
    return CogLMLayout(grid=parts.train.grid, max_text=config.max_text, image_position=position)


def fitted(config: Config, parts: Parts) -> GPTConfig:
    """The model's config with the vocabulary that the tokens need, and the positions if they need more.

    ConfigError for sparse attention, whose regions are causal.
    """
    if config.model.attention == "sparse":
        raise ConfigError("model.attention='sparse' is causal, and CogLM's masks are not; choose fused or pb_relax")
    needed = layout_of(config, parts).num_positions
    positions = max(needed, config.model.max_positions) if config.image_position else needed
    return replace(config.model, vocab_size=vocabulary_of(parts).size, max_positions=positions)


JOB = Job(name="pretrain_coglm", version=1, products=(WEIGHTS_NAME, SETTINGS_NAME), main=main)
