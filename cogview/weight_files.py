"""Weight files that others have written, read without running anything that they bring along.

In: a file of torch (a zip, or the older form) or of safetensors. Out: what it holds, on the CPU. Tensors of zips and of
safetensors are mapped, not read: a file of 8 GB costs no memory until its numbers are used, and what was used can be
dropped again. The file must stay in place as long as its tensors are in use.

A torch file is a pickle, and a pickle may name any function to be called. Torch's weights-only reader calls only those
that rebuild tensors and plain values. Whatever else a file names (random states, schedulers, modules of a package that
is not here) is replaced by a `Shell`, which does nothing and keeps its attributes.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cogview.errors import CheckpointError

SAFETENSORS_SUFFIX = ".safetensors"
ZIP_START = b"PK"
UNPICKLER_PREFIX = "WeightsUnpickler error: "  # before the reason, in the midst of advice
# What torch's readers raise on bytes that are no file of theirs.
UNREADABLE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
)


class Shell:
    """Stands for an object whose class is not asked for, and keeps its attributes."""

    def __init__(self, *_: object, **__: object) -> None:
        """Takes whatever the file gives."""

    def __setstate__(self, state: object) -> None:
        """Keep the attributes of an ordinary object; what has another kind of state is left empty."""
        if isinstance(state, dict):
            self.__dict__.update(state)

    def state_dict(self, *, prefix: str = "") -> dict[str, Tensor]:
        """A pickled module's tensors and those of the modules below it, as `nn.Module.state_dict` names them."""
        own = {**self.__dict__.get("_parameters", {}), **self.__dict__.get("_buffers", {})}
        tensors = {f"{prefix}{name}": value.detach() for name, value in own.items() if isinstance(value, Tensor)}
        for name, module in self.__dict__.get("_modules", {}).items():
            if isinstance(module, Shell):
                tensors.update(module.state_dict(prefix=f"{prefix}{name}."))
        return tensors


def read_weight_file(path: Path, *, unsafe_pickle: bool = False) -> Any:
    """What a weight file holds: usually a dict of names and tensors, perhaps inside another dict, or a `Shell`.

    unsafe_pickle: read it as an ordinary pickle, which RUNS THE CODE that the file names; for files of someone you
    trust, when the safe reader has refused them. Raises CheckpointError for a file that is missing, cut short, no
    weight file, or that cannot be read without running code.
    """
    try:
        if path.suffix == SAFETENSORS_SUFFIX:
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)
        _check_start(path, is_zip=is_zip)
        if unsafe_pickle:
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=False)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        shells: list[Any] = [(Shell, name) for name in foreign]
        with torch.serialization.safe_globals(shells):
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}; fetch it again") from error
    except (AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{path} needs Python code that is not here ({error}); save its state_dict() where it is, and give that"
        ) from error
    except UNREADABLE as error:
        raise CheckpointError(_explained(path, error)) from error


def read_weights(path: Path, *, sha256: str = "", unsafe_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a weight file by name, see `state_of`; sha256: what the file's must be, if given.

    Raises CheckpointError as `read_weight_file` and `state_of` do, and for another sha256 before anything is read.
    """
    if sha256:
        require_sha256(path, sha256)
    return state_of(read_weight_file(path, unsafe_pickle=unsafe_pickle), path=path)


def require_sha256(path: Path, wanted: str = "") -> str:
    """The sha256 of a file. CheckpointError when another one is wanted."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if wanted and found != wanted.lower():
        raise CheckpointError(f"{path} has the sha256 {found}, not {wanted}; fetch it again, or correct the sha256")
    return found


def state_of(content: Any, *, path: Path) -> dict[str, Tensor]:
    """The tensors of what was read: those under `module` or `state_dict` if there is such a key, by their names without
    a `module.` that all of them begin with.

    CheckpointError when there are none. What is no tensor (counters of some writers) is passed over.
    """
    if isinstance(content, Shell):
        content = content.state_dict()
    for key in ("module", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not weights by name; give a state_dict()")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors (its keys: {', '.join(map(str, content)) or 'none'})")
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def check_layout(
    found: Mapping[str, Tensor], *, wanted: Mapping[str, Sequence[int]], path: Path, layout: str, shown: int = 5
) -> None:
    """CheckpointError naming tensors that are missing, unknown, or of another shape than wanted (name -> shape)."""
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name].shape) != tuple(shape)
        ],
    }
    parts = [
        f"{what}: {', '.join(names[:shown])}{f' and {len(names) - shown} more' if len(names) > shown else ''}"
        for what, names in wrong.items()
        if names
    ]
    if parts:
        raise CheckpointError(f"{path} is not in the layout of {layout}; {'; '.join(parts)}")


def _check_start(path: Path, *, is_zip: bool) -> None:
    with open(path, "rb") as file:
        start = file.read(len(ZIP_START))
    if start == ZIP_START and not is_zip:
        raise CheckpointError(f"{path} is cut short ({path.stat().st_size} bytes); fetch it again")


def _explained(path: Path, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return f"{path} cannot be read: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    refused = next((line for line in lines if "GLOBAL" in line), "")
    if not refused:
        reason = next((line for line in lines if UNPICKLER_PREFIX in line), lines[0]).removeprefix(UNPICKLER_PREFIX)
        return f"{path} is damaged or no weight file ({reason.strip(' .')}); fetch it again"
    name = refused.rpartition("GLOBAL ")[2].split()[0]
    return (
        f"{path} asks for {name}, which is Python code beyond tensors and numbers, and is not run. Only if you trust "
        "whoever made the file, read it with unsafe_pickle (--unsafe-pickle)"
    )
