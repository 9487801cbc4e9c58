"""Train a model for one domain at high resolution: codes of a VQGAN, long rows, three-region sparse attention.

Command: make finetune-fashion DATA=/folder
Reads:   the Arrow shards of tokenize_pairs; the text tokenizer and the VQGAN that made them; with --checkpoint a model
         that was trained with the same text tokenizer and any image tokenizer
Writes:  model.safetensors, model.json, metrics.jsonl, checkpoints/, samples/step_00001000.png
Time:    smoke: some minutes on two cores, after those for the VQGAN and the tokens
Before:  --plan [--gpu-memory 80] [--gpu-tflops 300 --gpu-price 2.5] tells memory, tokens, steps, days and price
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cogview.config import input_field, runtime_field
from cogview.errors import CheckpointError
from cogview.models.gpt import GPT, GPTConfig, count_parameters
from cogview.models.pivots import SparseConfig
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME, load_model
from cogview.models.sizes import SIZES
from cogview.models.transplanted import TokenPlaces, require_kin, transplant
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import PROMPT_COMMANDS, require_fingerprints
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.loop import LoopConfig
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines.runtime.chain import CHAIN_NAME, fill_from_chain
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.workers import train_and_score
from pipelines.tasks.language_model import PRODUCERS, SCORES, LanguageModelTask, Parts, require_inputs
from pipelines.tasks.new_weights import (
    LAYOUT,
    TaskSettings,
    fitted,
    start_from_codebook,
    task_around,
    training_plan,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """tokens: the output of tokenize_pairs; text_tokenizer, image_tokenizer: those that made the tokens.

    checkpoint: a trained model to go on from, of the same shape as `model`; without it the weights are new, as in the
    paper. Its image tokenizer may be another one: blocks, texts and positions are taken over, and the embeddings of
    codes start from the codebook. model: its vocabulary and positions are set from the tokens.
    max_text: text tokens of a row, longer captions are cut; is_image_fixed: as in pretrain.
    num_validation_rows: held-out rows scored during training; num_samples: pictures drawn, by `sampling`, with each
    score.
    """

    tokens: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    checkpoint: Path | None = input_field(default=None)
    model: GPTConfig = field(default_factory=lambda: SIZES["3b"])
    max_text: int = 61
    text_loss_weight: float = 1.0
    is_image_fixed: bool = False
    loop: LoopConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_workers: int = runtime_field(8)
    is_compiled: bool = runtime_field(False)
    num_validation_rows: int = runtime_field(512)
    num_samples: int = runtime_field(8)


PAPER = Config(
    # 50 x 50 codes and 61 text tokens: 2565 tokens, of which each sees at most 768 pivots and a window of 768.
    model=replace(SIZES["3b"], attention="sparse", activation_checkpointing=True),
    loop=LoopConfig(
        num_steps=60_000,  # the paper does not say; 12 times through its 10 million pairs
        global_batch_size=2048,
        optimizer=OptimizerConfig(learning_rate=2e-4),
        precision="bf16",
        sharding="full",
        checkpoint_every=500,
        validate_every=2000,
    ),
    num_workers=256,
)
SMOKE = replace(
    PAPER,
    # 16 x 16 codes; 64 pivots and a window of 96 tokens are to 284 tokens what the paper's numbers are to its rows.
    model=replace(
        SIZES["tiny"],
        num_heads=8,
        embedding_gradient=1.0,
        attention="sparse",
        sparse=SparseConfig(num_pivots=64, block_size=32, window_blocks=3),
    ),
    max_text=28,
    is_image_fixed=True,
    text_loss_weight=0.5,
    loop=LoopConfig(
        num_steps=800,
        global_batch_size=8,
        optimizer=OptimizerConfig(learning_rate=5e-3, weight_decay=0.1, warmup_share=0.05, final_share=0.02),
        log_every=20,
        validate_every=200,
        checkpoint_every=200,
    ),
    sampling=SamplingConfig(top_k=24),
    num_workers=2,
    num_validation_rows=64,
)
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": SMOKE}


def main(config: Config, run: JobRun) -> None:
    """Check that everything belongs together, then train on Ray."""
    settings = TaskSettings(config=config, output=run.output, inputs=require_inputs(config))
    parts = settings.inputs.load()
    shape = fitted(config.model, parts, max_text=config.max_text)
    old = given_model(config, parts)  # what does not fit is said before Ray starts
    weights = count_parameters(shape)
    run.tracker.log_inputs({name: run.inputs[name] for name in ("tokens", "checkpoint") if name in run.inputs})
    origin = f"from {config.checkpoint}" if config.checkpoint else "new"
    run.say(f"{len(parts.train):,} rows of up to {shape.max_positions:,} tokens, {weights:,} parameters, {origin}")
    train_and_score(
        build_task,
        settings,
        loop=config.loop,
        num_workers=config.num_workers,
        run=run,
        scores=SCORES,
        started_from=old.published if old else {},
    )
    run.scores.update(parameters=weights, grid=parts.train.grid)
    run.tracker.log_artifact(run.output / SETTINGS_NAME)


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in tokens and tokenizers from the chain that ran last under `root`, if one did."""
    filled: Config = fill_from_chain(config, PRODUCERS, root=root) if (root / CHAIN_NAME).is_file() else config
    return filled


def plan(config: Config, *, gpus: GPUs) -> Iterator[str]:
    """What `--plan` tells; with the inputs given, of the vocabulary and length that they need."""
    return training_plan(config, gpus=gpus)


def build_task(settings: TaskSettings, ranks: Ranks) -> LanguageModelTask:
    """Runs on each worker."""
    config, parts = settings.config, settings.inputs.load()
    torch.manual_seed(config.loop.seed)
    gpt = GPT(fitted(config.model, parts, max_text=config.max_text))
    start_from_codebook(gpt, parts)
    old = given_model(config, parts)
    if old is not None:
        transplant(old.gpt, gpt, old_places=old.old_places, new_places=old.new_places)
    published = old.published if old else {}
    return task_around(gpt, settings, parts=parts, ranks=ranks, sampling=config.sampling, published=published)


@dataclass(frozen=True, kw_only=True)
class Given:
    """A checkpoint to go on from, mapped to its file, and where its tokens and those of the new model lie."""

    gpt: GPT
    old_places: TokenPlaces
    new_places: TokenPlaces
    published: dict[str, str]


def given_model(config: Config, parts: Parts) -> Given | None:
    """The checkpoint of the config, if there is one; raises what does not fit."""
    if config.checkpoint is None:
        return None
    gpt, settings = load_model(config.checkpoint)
    text_alone = {"text_tokenizer": parts.fingerprints["text_tokenizer"]}
    require_fingerprints(settings["fingerprints"], found=text_alone, where=config.checkpoint)
    old_places = places_of(gpt, settings, parts, where=config.checkpoint)
    new_places = TokenPlaces(
        image_ids=parts.vocabulary.image_ids,
        num_others=parts.vocabulary.num_ids - len(parts.vocabulary.image_ids),
        first_image=config.max_text + PROMPT_COMMANDS,
        grid=parts.train.grid,
    )
    shape = fitted(config.model, parts, max_text=config.max_text)
    require_kin(gpt.config, shape, old_places=old_places, new_places=new_places)
    return Given(gpt=gpt, old_places=old_places, new_places=new_places, published={"started_from": settings["sha256"]})


def places_of(old: GPT, settings: Mapping[str, Any], parts: Parts, *, where: Path) -> TokenPlaces:
    """Where the tokens lie in a checkpoint, which tells its number of image codes among its attention's settings."""
    vocabulary = Vocabulary(old.config.sparse.num_image_ids, parts.text_tokenizer.num_pieces)
    if vocabulary.fingerprint != settings["fingerprints"]["vocabulary"]:
        raise CheckpointError(
            f"{where}: sparse.num_image_ids={old.config.sparse.num_image_ids} in {SETTINGS_NAME} is not the number of "
            "image codes that it was trained with; write the right one there"
        )
    grid = int(settings["grid"])
    first_image = settings["length"] - grid**2 - (LAYOUT.overhead() - PROMPT_COMMANDS)
    return TokenPlaces(
        image_ids=vocabulary.image_ids,
        num_others=vocabulary.num_ids - len(vocabulary.image_ids),
        first_image=int(first_image),
        grid=grid,
    )


JOB = Job(name="finetune_fashion", version=1, products=(WEIGHTS_NAME, SETTINGS_NAME), main=main)
