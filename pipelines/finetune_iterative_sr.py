"""Finetune the model to draw masked codes of a large picture between known ones, for LoPAR (CogView2).

Command: make finetune-iterative-sr; python -m pipelines finetune_iterative_sr paper --tokens FOLDER
Reads:   a trained model that draws (pretrain, pretrain_coglm), with its tokenizers; token rows with each picture at
         two sizes, such as those of tokenize_pairs cogview2, or scenes that it draws itself
Writes:  model.safetensors, model.json (the backbone, trained further); super_resolution.safetensors and .json (what it
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
    """checkpoint: the model to start from, all of which is trained; text_tokenizer, image_tokenizer: its own.

    tokens: rows of which each picture is there as `model.grid` codes along a side; without them `scenes` are drawn.
    model: grid, ratio (to what the checkpoint draws) and window. max_text: text tokens that are read, longer captions
    are cut; the release reads 16. mask_shares: of the codes, one of them for each row and step.
    num_validation_rows: held-out rows scored during training.
    """

    checkpoint: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    model: LocalSuperResolutionConfig = field(default_factory=lambda: LocalSuperResolutionConfig(stage="iterative"))
    scenes: ScenePictures | None = None
    max_text: int = 16
    mask_shares: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9)
    dropout: float = 0.1
    loop: LoopConfig
    activation_checkpointing: bool = runtime_field(False)
    num_workers: int = runtime_field(8)
    num_validation_rows: int = runtime_field(512)

    def __post_init__(self) -> None:
        if self.model.is_direct:
            raise ConfigError(f"model.stage={self.model.stage!r}: this job trains the iterative one")
        if not self.mask_shares or not all(0 < share <= 1 for share in self.mask_shares):
            raise ConfigError(f"mask_shares={self.mask_shares}: give shares above 0, up to 1")
        if self.max_text < 0:
            raise ConfigError(f"max_text={self.max_text}: give 1 or more, or 0 for as many as in pretraining")


# 60 x 60 codes.
PAPER = Config(
    loop=PAPER_LOOP,
    activation_checkpointing=True,
    num_workers=16,
)
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        model=LocalSuperResolutionConfig(stage="iterative", grid=24, ratio=3),  # pictures of 192 pixels
        scenes=ScenePictures(),
        max_text=0,
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
        max_text=config.max_text,
        mask_shares=config.mask_shares,
        num_validation_rows=config.num_validation_rows,
        model_changes={"dropout": config.dropout, "activation_checkpointing": config.activation_checkpointing},
    )


JOB = Job(name="finetune_iterative_sr", version=1, products=STAGE_FILES, main=main)
