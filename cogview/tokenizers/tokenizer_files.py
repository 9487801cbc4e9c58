"""An image tokenizer on disk: weights (safetensors) and settings (JSON) in one folder, with a digest over the weights.

In: the kind of a tokenizer, its config and its tensors. Out: the same, checked against the digest. `stored.py` knows
which kind is which class.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from cogview.errors import CheckpointError, ConfigError

WEIGHTS_NAME = "image_tokenizer.safetensors"
SETTINGS_NAME = "image_tokenizer.json"
FIRST_KIND = "vqvae"  # its settings say no kind
Config = TypeVar("Config")
Tokenizer = TypeVar("Tokenizer", bound=nn.Module)
Parts = Mapping[str, Callable[..., Any]]  # of a config: field -> the config that stands in it


@dataclass(frozen=True, kw_only=True)
class StoredTokenizer:
    """What a folder holds. config: plain values, with lists where the dataclass has tuples."""

    folder: Path
    kind: str
    config: Mapping[str, Any]
    weights: bytes
    fingerprint: str

    def rebuild(self, config_type: Callable[..., Config], *, parts: Parts) -> Config:
        """The config that the plain values make, with these configs inside. CheckpointError for values of others."""
        try:
            inside = {name: part(**with_tuples(self.config[name])) for name, part in parts.items()}
            return config_type(**(with_tuples(self.config) | inside))
        except (TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder / SETTINGS_NAME} is damaged, or of another version ({error!r}); copy it again"
            ) from error

    def fill(self, tokenizer: nn.Module) -> None:
        """Put the weights into a tokenizer of the stored config. CheckpointError where they do not fit, or are NaN."""
        try:
            tensors = load(self.weights)
            tokenizer.load_state_dict(tensors)
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / WEIGHTS_NAME} does not fit its settings: {error}") from error
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            path = self.folder / WEIGHTS_NAME
            raise CheckpointError(f"{path} has NaN or infinite numbers in {broken[0]}; train it again")


def write_tokenizer(folder: Path, *, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write both files; returns the fingerprint, which is the sha256 of the weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    digest = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    settings = {"kind": kind, "config": dict(config), "sha256": digest}
    (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return digest


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder. CheckpointError when there are none, or none that can be read."""
    try:
        settings = json.loads((folder / SETTINGS_NAME).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no image tokenizer ({error}); train one or give its folder") from error
    if not isinstance(settings, dict) or not {"config", "sha256"} <= set(settings):
        raise CheckpointError(f"{folder / SETTINGS_NAME} is not the settings of an image tokenizer; save it again")
    return settings


def read_tokenizer(folder: Path, *, kind: str) -> StoredTokenizer:
    """A tokenizer of this kind. CheckpointError when a file is missing or damaged, or the tokenizer of another kind."""
    settings = read_settings(folder)
    found = settings.get("kind", FIRST_KIND)
    if found != kind:
        raise CheckpointError(
            f"{folder} holds an image tokenizer of kind {found!r}, not {kind!r}; load it as that kind"
        )
    try:
        weights = (folder / WEIGHTS_NAME).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} holds no image tokenizer ({error}); train one or give its folder") from error
    digest = hashlib.sha256(weights).hexdigest()
    if digest != settings["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} is damaged: sha256 {digest[:12]}, not {settings['sha256'][:12]}"
        )
    return StoredTokenizer(folder=folder, kind=kind, config=settings["config"], weights=weights, fingerprint=digest)


def load_tokenizer(
    folder: Path, *, kind: str, config_type: Callable[..., Config], parts: Parts, build: Callable[[Config], Tokenizer]
) -> tuple[Tokenizer, str]:
    """A tokenizer of this kind in evaluation mode, and its fingerprint.

    CheckpointError when a file is missing, damaged or of other shapes.
    """
    stored = read_tokenizer(folder, kind=kind)
    tokenizer = build(stored.rebuild(config_type, parts=parts))
    stored.fill(tokenizer)
    return tokenizer.eval(), stored.fingerprint


def known_fingerprint(fingerprint: str | None) -> str:
    """The sha256 of the weights file that was saved or loaded. ConfigError before either."""
    if fingerprint is None:
        raise ConfigError("a tokenizer has a fingerprint once it is saved or loaded")
    return fingerprint


def with_tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as the configs have them: JSON knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
