"""Checkpoints that are whole or not used: every file's sha256 stands in a manifest that is written last.

A checkpoint is a folder `step_00001000/` with `state.pt` (weights, optimizer, step), one `rank_0000.pt` for each worker
(its random state), and `manifest.json`; with sharded weights the workers' shares stand beside them. Files are read only
after their sha256 is checked, and as plain tensors, but for torch's own index of the shares.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.errors import CheckpointError, ManifestError
from cogview.shards.manifest import MANIFEST_NAME, atomic_file, file_record, move, read_sealed, write_sealed

logger = logging.getLogger(__name__)
STATE_NAME = "state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, the number of finished steps, and the identity of what was trained."""

    folder: Path
    step: int
    identity: Mapping[str, Any]

    def load(self, name: str) -> Any:
        """Read one of its files as plain tensors and numbers."""
        return torch.load(self.folder / name, map_location="cpu", weights_only=True)


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps lies."""
    return root / f"step_{step:08d}"


def pending_folder(root: Path, step: int) -> Path:
    """Where it is written before it is whole."""
    return root / f".step_{step:08d}.pending"


def discard_pending(root: Path, step: int) -> None:
    """Remove what a killed run left of this checkpoint, perhaps with more workers than there are now."""
    shutil.rmtree(pending_folder(root, step), ignore_errors=True)


def write_part(root: Path, step: int, name: str, state: Mapping[str, Any]) -> None:
    """Write one file of a pending checkpoint, synced. StorageError on a full disk."""
    with atomic_file(pending_folder(root, step) / name) as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch closes its archive nevertheless, which fails for want of what is missing
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def publish(root: Path, step: int, *, identity: Mapping[str, Any], keep: int) -> Path:
    """Close a pending checkpoint with its manifest, give it its name, and remove all but the `keep` newest."""
    pending, final = pending_folder(root, step), checkpoint_folder(root, step)
    files = {path.name: file_record(path) for path in sorted(pending.iterdir())}
    write_sealed(pending / MANIFEST_NAME, {"step": step, "identity": dict(identity), "files": files})
    if final.exists():
        shutil.rmtree(final)
    move(pending, final)
    for old in _folders(root)[keep:]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(root: Path, *, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None. A damaged one is named in the log and passed over.

    CheckpointError when a sound checkpoint belongs to another config, tokenizer or corpus.
    """
    for folder in _folders(root):
        try:
            checkpoint = read_checkpoint(folder)
        except (CheckpointError, ManifestError) as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
            continue
        for key, value in identity.items():
            if checkpoint.identity.get(key) != value:
                raise CheckpointError(
                    f"{folder} was trained with {key} = {checkpoint.identity.get(key)!r}, this run has {value!r}; "
                    "give this run another output folder, or restore the setting"
                )
        return checkpoint
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose every file matches its manifest. CheckpointError names the file that does not."""
    manifest = read_sealed(folder / MANIFEST_NAME)
    for name, record in manifest["files"].items():
        path = folder / Path(name).name
        if not path.is_file() or file_record(path) != record:
            raise CheckpointError(f"{path} does not match its manifest; delete {folder} to go on from an older one")
    return Checkpoint(folder, int(manifest["step"]), manifest["identity"])


def random_states(device: str) -> dict[str, Tensor]:
    """Of this process's generators: the CPU's, and that of the GPU it computes on."""
    states = {"random_state": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states["device_random_state"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], *, device: str) -> None:
    """Go on with the random numbers after those drawn before `random_states`."""
    torch.set_rng_state(states["random_state"])
    if "device_random_state" in states and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(states["device_random_state"], device)


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    return sorted(root.glob("step_????????"), reverse=True)
