"""A trained model on disk: weights as safetensors, and a JSON with its shape and what it was trained with."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cogview.errors import CheckpointError
from cogview.models.gpt import GPT, GPTConfig

WEIGHTS_NAME = "model.safetensors"
SETTINGS_NAME = "model.json"


def save_model(model: GPT, folder: Path, *, settings: Mapping[str, Any]) -> None:
    """Write the weights, and `settings` (fingerprints, grid, length, ...) with the model's config and sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME)
    digest = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    document = {**settings, "config": asdict(model.config), "sha256": digest}
    (folder / SETTINGS_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def load_model(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """The model in evaluation mode, and its settings. CheckpointError when files are missing, damaged or do not fit."""
    try:
        settings: dict[str, Any] = json.loads((folder / SETTINGS_NAME).read_text())
        with open(folder / WEIGHTS_NAME, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no trained model ({error}); give the output folder of pretrain"
        ) from error
    if digest != settings["sha256"]:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} is damaged: its sha256 is not that of {SETTINGS_NAME}")
    model = GPT(GPTConfig(**settings["config"]))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} does not fit {SETTINGS_NAME}: {error}") from error
    return model.eval(), settings
