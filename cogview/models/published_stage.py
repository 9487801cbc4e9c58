"""A super-resolution model of CogView2 on disk: its backbone as any published model, and beside it what it has besides.

In: a trained model. Out: a folder with `model.safetensors` and `model.json`, which any reader of models understands,
`super_resolution.safetensors` with the tensors below `mixins` under the released names, and `super_resolution.json`.
The sha256 of a backbone tells whether two stages can share it in memory.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cogview.errors import CheckpointError
from cogview.models.gpt import GPT
from cogview.models.local_super_resolution import LocalSuperResolution, LocalSuperResolutionConfig, Stage
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME, file_sha256, load_model, read_settings, read_tensors

STAGE_WEIGHTS_NAME = "super_resolution.safetensors"
STAGE_SETTINGS_NAME = "super_resolution.json"
EXTRA_POSITIONS = "mixins.extra_position_embedding.position_embeddings.weight"
SECOND_ATTENTION = "mixins.attention_plus."
STAGE_FILES = (STAGE_WEIGHTS_NAME, STAGE_SETTINGS_NAME, WEIGHTS_NAME, SETTINGS_NAME)


def save_stage(model: LocalSuperResolution, folder: Path, *, settings: Mapping[str, Any]) -> None:
    """Write what the backbone does not have, beside a backbone that lies in the folder already.

    settings: what its readers need besides, such as the form of its context.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.mixin_tensors().items()}
    save_file(tensors, folder / STAGE_WEIGHTS_NAME)
    document = {
        **settings,
        "config": asdict(model.config),
        "sha256": file_sha256(folder / STAGE_WEIGHTS_NAME),
        "backbone": file_sha256(folder / WEIGHTS_NAME),
    }
    (folder / STAGE_SETTINGS_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def load_stage(
    folder: Path, *, backbones: Mapping[str, GPT] | None = None
) -> tuple[LocalSuperResolution, dict[str, Any]]:
    """The model in evaluation mode, and its settings.

    backbones: sha256 -> a model in memory, taken instead of reading the same weights again. CheckpointError when files
    are missing, damaged or do not fit together.
    """
    settings = read_settings(folder, STAGE_SETTINGS_NAME, what="super-resolution model of CogView2")
    found = read_settings(folder)["sha256"]
    if found != settings["backbone"]:
        raise CheckpointError(
            f"{folder}: {WEIGHTS_NAME} is {found[:12]}, but {STAGE_WEIGHTS_NAME} was trained on "
            f"{settings['backbone'][:12]}; fetch the folder again"
        )
    shared = (backbones or {}).get(found)
    gpt = shared if shared is not None else load_model(folder)[0]
    with torch.device("meta"):
        model = LocalSuperResolution(gpt, LocalSuperResolutionConfig.from_stored(settings["config"]))
    take_mixins(model, read_tensors(folder / STAGE_WEIGHTS_NAME, sha256=settings["sha256"]), where=folder)
    return model.eval(), settings


def stage_config(mixins: Mapping[str, Tensor], *, small_grid: int) -> LocalSuperResolutionConfig | None:
    """The stage whose tensors below `mixins` these are, with CogView2's windows; the direct one has an attention.

    None when they have no positions of a square grid of which `small_grid` is a part: they are of something else.
    """
    positions = mixins.get(EXTRA_POSITIONS)
    rows = 0 if positions is None else len(positions)
    grid = math.isqrt(rows)
    if not rows or grid**2 != rows or grid % small_grid:
        return None
    stage: Stage = "direct" if any(name.startswith(SECOND_ATTENTION) for name in mixins) else "iterative"
    return LocalSuperResolutionConfig(stage=stage, grid=grid, ratio=grid // small_grid)


def publish_mixins(
    mixins: Mapping[str, Tensor], folder: Path, *, config: LocalSuperResolutionConfig, settings: Mapping[str, Any]
) -> None:
    """Write released tensors beside the backbone that is in the folder already. CheckpointError unless they fit it."""
    gpt, _ = load_model(folder)
    with torch.device("meta"):
        model = LocalSuperResolution(gpt, config)
    take_mixins(model, mixins, where=folder)
    save_stage(model, folder, settings=settings)


def take_mixins(model: LocalSuperResolution, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Give a model its tensors below `mixins`. CheckpointError unless they are just those that it has."""
    wanted = {name: tuple(value.shape) for name, value in model.mixin_tensors().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} is {given.get(name, 'missing')}, and should be {wanted.get(name, 'absent')} in a "
            f"{model.config.stage} model of {model.config.grid} x {model.config.grid} codes"
        )
    model.load_state_dict(dict(tensors), strict=False, assign=True)
