"""Merge the adapters of a finetune into the model that they belong to.

Command: python -m pipelines merge_adapters --checkpoint /model --adapters /folder
Reads:   a published model; lora.safetensors and lora.json, which finetune_style writes with --lora.rank
Writes:  model.safetensors, model.json: an ordinary model
Time:    seconds; the 4B model takes as long as reading and writing its file
"""

from dataclasses import dataclass
from pathlib import Path

from cogview.config import input_field
from cogview.models.lora import merge_adapters
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME
from pipelines.runtime.jobs import Job, JobRun, given_folders

SOURCES = {"checkpoint": "pretrain", "adapters": "finetune_style"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """checkpoint: the model that was finetuned; adapters: the folder with what was trained."""

    checkpoint: Path | None = input_field(default=None)
    adapters: Path | None = input_field(default=None)


PAPER = Config()
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": PAPER}


def main(config: Config, run: JobRun) -> None:
    """Add them and write the model. CheckpointError if they belong to other weights."""
    folders = given_folders(config, SOURCES)
    merge_adapters(folders["checkpoint"], folders["adapters"], run.output)
    run.say(f"an ordinary model: {run.output}")


JOB = Job(name="merge_adapters", version=1, products=(WEIGHTS_NAME, SETTINGS_NAME), main=main)
