"""Pretrain the GPT on token shards: text and image tokens in one sequence.

Command: python -m pipelines pretrain smoke --tokens ... --text-tokenizer ... --image-tokenizer ...
Reads:   the Arrow shards of tokenize_pairs; both tokenizers, for the sample grids and the fingerprints
Writes:  model.safetensors, model.json, metrics.jsonl, checkpoints/, samples/step_00001000.png
Time:    smoke: about 5 minutes on two cores
Before:  --plan [--gpu-memory 80] [--gpu-tflops 300 --gpu-price 2.5] tells memory, tokens, steps, days and price
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cogview.config import input_field, later_field, runtime_field
from cogview.models.gpt import GPT, GPTConfig, count_parameters
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME
from cogview.models.sizes import SIZES
from cogview.training.loop import LoopConfig
from cogview.training.loss_scale import LossScaleConfig
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.workers import train_and_score
from pipelines.tasks.language_model import SCORES, LanguageModelTask, require_inputs
from pipelines.tasks.new_weights import TaskSettings, fitted, start_from_codebook, task_around, training_plan


@dataclass(frozen=True, kw_only=True)
class Config:
    """tokens: the output of tokenize_pairs; text_tokenizer, image_tokenizer: those that made the tokens.

    more_tokens: further corpora of the same tokenizers. shares: of each corpus in what is shown, in their order, such
    as 3 1; none: by their rows. Corpora may lie at remote addresses (s3://bucket/tokens): every machine copies them to
    its disk first (under COGVIEW_CACHE, ~/.cache/cogview).
    model: its vocabulary and positions are set from the tokens.
    embeddings_from_codebook: the embeddings of image codes start as a random projection of the codebook's vectors, so
    that codes that look alike start alike.
    max_text: text tokens of a row, longer captions are cut.
    is_image_fixed: image tokens have the same positions after any caption, as in CogLM; with CogView's own rule the
    model must learn to count the caption's tokens before it knows where in the picture it is.
    is_compiled: run the layers through torch.compile (needs a C++ compiler; the first step takes a minute more).
    num_validation_rows: held-out rows scored during training; num_samples: pictures of the grid drawn with each score.
    """

    tokens: str | Path | None = input_field(default=None)
    more_tokens: tuple[str, ...] = input_field(default=())
    shares: tuple[float, ...] = later_field(())
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    model: GPTConfig = field(default_factory=lambda: SIZES["4b"])
    embeddings_from_codebook: bool = False
    max_text: int = 61
    text_loss_weight: float = 1.0
    is_image_fixed: bool = False
    loop: LoopConfig
    num_workers: int = runtime_field(8)
    is_compiled: bool = runtime_field(False)
    num_validation_rows: int = runtime_field(512)
    num_samples: int = runtime_field(16)


PAPER = Config(
    model=replace(SIZES["4b"], activation_checkpointing=True),
    max_text=61,  # 1089 positions - 1024 codes - 4 command tokens
    loop=LoopConfig(
        num_steps=144_000,
        global_batch_size=6144,  # 12 rows on each of 512 GPUs
        optimizer=OptimizerConfig(learning_rate=3e-4),
        precision="fp16",  # with fp32 master weights, the paper's "almost O2"
        sharding="full",  # 16 bytes a parameter are 63 GB; the paper spreads optimizer states (ZeRO), this all of it
        loss_scale=LossScaleConfig(initial=2.0**32),  # the release starts very high; the first steps find the scale
        checkpoint_every=500,
        is_checkpoint_async=True,
        validate_every=2000,
    ),
    num_workers=512,
)
SMOKE = replace(
    PAPER,
    # The shrink steadies deep models; this one is shallow. Many narrow heads tell more words apart than few wide ones.
    model=replace(SIZES["tiny"], num_heads=8, embedding_gradient=1.0),
    embeddings_from_codebook=True,
    max_text=28,
    is_image_fixed=True,
    text_loss_weight=0.5,  # with so few steps the pictures are worth more than the captions
    loop=LoopConfig(
        num_steps=2200,
        global_batch_size=16,
        # So strong a decay makes the model compose shapes and colours that it never saw together; without it, it learns
        # by heart those that it did.
        optimizer=OptimizerConfig(learning_rate=5e-3, weight_decay=1.0, warmup_share=0.05, final_share=0.02),
        log_every=20,
        validate_every=1100,
        checkpoint_every=500,
    ),
    num_workers=2,
    num_validation_rows=256,
)
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": SMOKE}


def main(config: Config, run: JobRun) -> None:
    """Check that tokens and tokenizers belong together, then train on Ray."""
    inputs = replace(require_inputs(config), more_tokens=config.more_tokens, shares=config.shares)
    settings = TaskSettings(config=config, output=run.output, inputs=inputs)
    parts = inputs.load()
    run.tracker.log_inputs({"tokens": run.inputs.get("tokens", "")})
    weights = count_parameters(fitted(config.model, parts, max_text=config.max_text))
    run.say(f"{len(parts.train):,} rows, {config.model.num_layers} layers, {weights:,} parameters")
    last = train_and_score(
        build_task,
        settings,
        loop=config.loop,
        num_workers=config.num_workers,
        run=run,
        scores=SCORES,
    )
    tokens = config.loop.num_steps * config.loop.global_batch_size * last["tokens_per_row"]
    run.scores.update(tokens=round(tokens), parameters=weights)
    run.tracker.log_artifact(run.output / SETTINGS_NAME)


def plan(config: Config, *, gpus: GPUs) -> Iterator[str]:
    """What `--plan` tells; with the inputs given, of the vocabulary and length that they need."""
    return training_plan(config, gpus=gpus)


def build_task(settings: TaskSettings, ranks: Ranks) -> LanguageModelTask:
    """A new GPT as a task for the training loop; runs on each worker."""
    config, parts = settings.config, settings.inputs.load()
    torch.manual_seed(config.loop.seed)
    gpt = GPT(fitted(config.model, parts, max_text=config.max_text))
    if config.embeddings_from_codebook:
        start_from_codebook(gpt, parts)
    return task_around(gpt, settings, parts=parts, ranks=ranks)


JOB = Job(name="pretrain", version=1, products=(WEIGHTS_NAME, SETTINGS_NAME), main=main)
