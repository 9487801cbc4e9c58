"""Finetune the model to draw a picture at three times its side at once, from its codes (CogView2).

Command: make finetune-direct-sr; python -m pipelines finetune_direct_sr paper --tokens FOLDER
Reads:   a trained model that draws (pretrain, pretrain_coglm), with its tokenizers; token rows with each picture at
         two sizes, such as those of tokenize_pairs cogview2, or scenes that it draws itself
Writes:  model.safetensors, model.json (the backbone, as it was); super_resolution.safetensors and .json (what it
         has besides); metrics.jsonl, checkpoints/, samples/step_00001000.png; tokens/ of the scenes
Time:    smoke: under 20 minutes on two cores
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.models.local_super_resolution import LocalSuperResolutionConfig
from cogview.models.published_stage import STAGE_FILES
from cogview.training.loop import LoopConfig
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.tasks.hierarchy import (
    PAPER_LOOP,
    PRODUCERS,
    SMOKE_LOOP,
    StageFinetuning,
    fill_backbone,
    finetune_stage,
)
from pipelines.tasks.language_model import inputs_of
from pipelines.tasks.scene_pictures import ScenePictures, scenes_or_tokens


@dataclass(frozen=True, kw_only=True)
class Config:
    """checkpoint: the model to start from, which is not changed; text_tokenizer, image_tokenizer: its own.

    tokens: rows of which each picture is there as `model.grid` and, `model.ratio` times smaller, as the codes that the
    checkpoint draws; without them `scenes` are drawn. model: grid, ratio and windows.
    dropout: of the backbone's branches, where the new attention learns. num_validation_rows: held-out rows scored
    during training.
    """

    checkpoint: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    model: LocalSuperResolutionConfig = field(default_factory=LocalSuperResolutionConfig)
    scenes: ScenePictures | None = None
    dropout: float = 0.1
    loop: LoopConfig
    activation_checkpointing: bool = runtime_field(False)
    num_workers: int = runtime_field(8)
    num_validation_rows: int = runtime_field(512)

    def __post_init__(self) -> None:
        if not self.model.is_direct:
            raise ConfigError(f"model.stage={self.model.stage!r}: this job trains the direct one")


# 20 x 20 codes to 60 x 60 with windows of 5 x 5 and 9 x 5.
PAPER = Config(
    loop=PAPER_LOOP,
    activation_checkpointing=True,
    num_workers=16,
)
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        model=LocalSuperResolutionConfig(grid=24, ratio=3),  # 64 pixels -> 192 pixels
        scenes=ScenePictures(),
        loop=SMOKE_LOOP,
        dropout=0.0,
        activation_checkpointing=False,
        num_workers=2,
        num_validation_rows=48,
    ),
}


def main(config: Config, run: JobRun) -> None:
    """Draw the scenes where no token rows are given, then train on Ray."""
    tokens = scenes_or_tokens(config, folders=given_folders(config, PRODUCERS), ratio=config.model.ratio, run=run)
    finetune_stage(settings_of(config, tokens=tokens, output=run.output), run=run, num_workers=config.num_workers)


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the folders that are not given: the CogLM made last under `root`, or else the model of its chain."""
    filled: Config = fill_backbone(config, root=root)
    return filled


def settings_of(config: Config, *, tokens: Path, output: Path) -> StageFinetuning:
    """What workers build their task from."""
    folders = given_folders(config, PRODUCERS)
    checkpoint = folders.pop("checkpoint")
    return StageFinetuning(
        checkpoint=checkpoint,
        inputs=inputs_of({**folders, "tokens": tokens}),
        model=config.model,
        loop=config.loop,
        output=output,
        num_validation_rows=config.num_validation_rows,
        model_changes={"dropout": config.dropout, "activation_checkpointing": config.activation_checkpointing},
    )


JOB = Job(name="finetune_direct_sr", version=1, products=STAGE_FILES, main=main)
