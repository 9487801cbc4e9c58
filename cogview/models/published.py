"""A trained model on disk: weights as safetensors, and a JSON with its shape and what it was trained with."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogview.errors import CheckpointError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.pivots import SparseConfig

WEIGHTS_NAME = "model.safetensors"
SETTINGS_NAME = "model.json"


def save_model(model: GPT, folder: Path, *, settings: Mapping[str, Any]) -> None:
    """Write the weights, and `settings` (fingerprints, grid, length, ...) with the model's config and sha256."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_weights(weights, folder, config=model.config, settings=settings)


def save_weights(
    weights: Mapping[str, Tensor], folder: Path, *, config: GPTConfig, settings: Mapping[str, Any]
) -> None:
    """The same for a model's tensors by name; what is mapped to a file is copied without being held in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / WEIGHTS_NAME)
    document = {**settings, "config": asdict(config), "sha256": file_sha256(folder / WEIGHTS_NAME)}
    (folder / SETTINGS_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def load_model(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """The model in evaluation mode and in the precision of its file, and its settings.

    It is laid out without memory and takes its weights from the file, to which they stay mapped until they are
    changed or moved: a large model is never held twice. CheckpointError when files are missing, damaged or do not fit.
    """
    settings = read_settings(folder)
    weights = read_tensors(folder / WEIGHTS_NAME, sha256=settings["sha256"])
    with torch.device("meta"):
        model = GPT(shape_of(settings))
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} does not fit {SETTINGS_NAME}: {error}") from error
    return model.eval(), settings


def read_settings(folder: Path, name: str = SETTINGS_NAME, *, what: str = "trained model") -> dict[str, Any]:
    """The JSON beside published weights. CheckpointError if there is none, or it does not tell their sha256."""
    try:
        settings: dict[str, Any] = json.loads((folder / name).read_text())
        settings["sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no {what} ({error}); give the output folder of pretrain, or of another training"
        ) from error
    return settings


def shape_of(settings: Mapping[str, Any]) -> GPTConfig:
    """The config of the model that these settings belong to."""
    shape = dict(settings["config"])
    return GPTConfig(**{**shape, "sparse": SparseConfig(**shape.get("sparse", {}))})


def read_tensors(path: Path, *, sha256: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped to it. CheckpointError if it is missing or is not the one published."""
    try:
        if file_sha256(path) != sha256:
            raise CheckpointError(f"{path} is damaged: its sha256 is not the one that was published with it")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} holds no weights ({error}); give the output folder of pretrain, or of another training"
        ) from error


def file_sha256(path: Path) -> str:
    """Of a file that may be large, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
