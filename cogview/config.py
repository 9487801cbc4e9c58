"""Configs are frozen dataclasses beside their owner; this module gives them roles, digests and a form on disk.

A config's digest decides whether finished work can be used again, so a field has one of four roles:
*semantic* (the default: a change makes other bytes), *input* (a path: its content's digest counts, not its spelling),
*runtime* (workers, logging, addresses: may change without making other bytes) and *later* (semantic, but came after the
first runs: its default is what they did, so that only another value changes the digest).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogview.errors import ConfigError

ROLE = "role"


def input_field(**kwargs: Any) -> Any:
    """A dataclass field that names an input: a path, or a tuple of paths, patterns and remote addresses.

    In the digest it stands for the digest of what lies there.
    """
    return dataclasses.field(metadata={ROLE: "input"}, **kwargs)


def runtime_field(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field that may change without making other bytes; it is left out of the digest."""
    return dataclasses.field(default=default, metadata={ROLE: "runtime"}, **kwargs)


def later_field(default: Any) -> Any:
    """A semantic field that older runs did not have. At its default, which was their way, the digest is theirs."""
    return dataclasses.field(default=default, metadata={ROLE: "later"})


def require_positive(config: Any, *names: str, prefix: str = "") -> None:
    """ConfigError for the first of these fields that is below 1. prefix: of its name in the message."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{prefix}{name}={getattr(config, name)}: choose 1 or more")


def to_plain(value: Any) -> Any:
    """The value as what JSON can hold: dataclasses as dicts with their class name, paths as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def flatten(value: Any, *, prefix: str = "") -> dict[str, Any]:
    """A config as `{"optimizer.learning_rate": 3e-4, ...}`, for trackers and tables."""
    plain = to_plain(value) if dataclasses.is_dataclass(value) else value
    if not isinstance(plain, dict):
        return {prefix: plain}
    flat: dict[str, Any] = {}
    for key, item in plain.items():
        if key != "class":
            flat.update(flatten(item, prefix=f"{prefix}.{key}" if prefix else key))
    return flat


def config_digest(config: Any, *, inputs: Mapping[str, str]) -> str:
    """sha256 over the semantic fields and the digests of the inputs (`inputs`: field path -> digest)."""
    return digest_of({"config": _semantic(config), "inputs": dict(sorted(inputs.items()))})


def digest_of(value: Any) -> str:
    """sha256, as hex, of a plain value's canonical JSON."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def input_paths(config: Any, *, prefix: str = "") -> dict[str, Path | tuple[str, ...] | None]:
    """Every input field of the config tree: field path -> path, or the addresses that it names."""
    found: dict[str, Path | tuple[str, ...] | None] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}.{field.name}" if prefix else field.name
        if field.metadata.get(ROLE) == "input":
            found[name] = value
        elif dataclasses.is_dataclass(value):
            found.update(input_paths(value, prefix=name))
    return found


def _semantic(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [field for field in dataclasses.fields(value) if _counts(field, getattr(value, field.name))]
        return {"class": type(value).__name__, **{f.name: _semantic(getattr(value, f.name)) for f in kept}}
    if isinstance(value, (list, tuple)):
        return [_semantic(item) for item in value]
    return to_plain(value)


def _counts(field: "dataclasses.Field[Any]", value: Any) -> bool:
    """Whether a field's value is part of the digest."""
    role = field.metadata.get(ROLE)
    return role is None or (role == "later" and value != field.default)
