"""From the words of a command line to a config: the job, its preset, the flags that all jobs share, then its own."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cogview.config import ROLE
from cogview.errors import ConfigError
from pipelines.runtime.gpus import FLAGS, UNKNOWN, GPUs, read_number
from pipelines.runtime.menu import VERBS, check_known, menu, nearest

DEFAULT_PRESET = "smoke"
RUNS = Path("runs")
SHARED_HELP = (
    "Every job also takes --root FOLDER (default: {root}) and --verbose (plain lines, and all that is logged)."
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a command line asks for, before the job's own flags are read.

    root: absolute; is_plan: only tell what the run would take; gpus: what the plan is made for.
    """

    job: str
    preset: str
    root: Path
    flags: tuple[str, ...]
    is_verbose: bool
    is_plan: bool = False
    gpus: GPUs = UNKNOWN

    @property
    def wants_help(self) -> bool:
        """Whether the flags are asked for rather than given."""
        return "-h" in self.flags or "--help" in self.flags


def read_order(words: Sequence[str]) -> Order:
    """Take job, preset and the shared flags off a command line. ConfigError suggests the nearest job or preset."""
    job, *rest = words
    job = job.replace("-", "_")
    items = {item.name: item for item in menu()}
    check_known("job", job, [*items, *VERBS], remedy="`python -m pipelines` lists the jobs.")
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else DEFAULT_PRESET
    if items[job].presets:
        check_known("preset", preset, items[job].presets, remedy=f"{job} has {', '.join(items[job].presets)}.")
    root, flags, is_verbose, is_plan, gpus = str(RUNS / preset), [], False, False, UNKNOWN
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--root":
            if not equals and (not rest or rest[0].startswith("-")):
                raise ConfigError("--root: give a folder, such as --root runs/mine")
            root = value if equals else rest.pop(0)
        elif name.removeprefix("--gpu-") in FLAGS and name.startswith("--gpu-"):
            known = name.removeprefix("--gpu-")
            gpus = dataclasses.replace(gpus, **{known: read_number(known, value if equals else "".join(rest[:1]))})
            del rest[: 0 if equals else 1]
        elif word == "--verbose":
            is_verbose = True
        elif word == "--plan":
            is_plan = True
        else:
            flags.append(word)
    if gpus.named and not is_plan:
        raise ConfigError(f"{gpus.named} is for a plan; give --plan as well")
    return Order(
        job=job,
        preset=preset,
        root=Path(os.path.abspath(root)),
        flags=tuple(flags),
        is_verbose=is_verbose,
        is_plan=is_plan,
        gpus=gpus,
    )


def read_config(order: Order, module: ModuleType) -> Any:
    """The preset with the flags applied; input paths are made absolute, since workers may live in other folders."""
    import tyro

    presets: Mapping[str, Any] = module.PRESETS
    check_known("preset", order.preset, list(presets), remedy=f"{order.job} has {', '.join(presets)}.")
    default = presets[order.preset]
    if not order.wants_help:
        check_flags(order.flags, default)
    shared = SHARED_HELP.format(root=RUNS / order.preset)
    config = tyro.cli(
        type(default),
        default=default,
        args=list(order.flags),
        prog=f"python -m pipelines {order.job} {order.preset}",
        description="\n\n".join([*_paragraphs(module.__doc__ or ""), shared]),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return _absolute_inputs(config)


def check_flags(flags: Sequence[str], default: Any) -> None:
    """ConfigError for a flag that no field of the config has, with the nearest that one has.

    tyro checks too, but it tells of missing flags first, and then suggests nothing for the one that was misspelled.
    """
    known = list(_flag_names(default))
    last_parts = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}  # `num-steps` -> `pretrain.num-steps`
    for word in flags:
        name = word[2:].split("=", 1)[0].replace("_", "-")
        if not word.startswith("--") or word == "--" or name in known or _without_no(name) in known:
            continue
        near = last_parts.get(name) or nearest(name, known)
        hint = f": did you mean --{near}?" if near else "."
        raise ConfigError(f"unknown flag --{name}{hint} --help lists the flags and their defaults.")


def _paragraphs(docstring: str) -> list[str]:
    """The lines of a docstring, those that go on with the line before joined to it: help is wrapped anew."""
    paragraphs: list[str] = []
    for line in docstring.strip().splitlines():
        if line.startswith(" ") and paragraphs:
            paragraphs[-1] += f" {line.strip()}"
        elif line.strip():
            paragraphs.append(line.strip())
    return paragraphs


def _flag_names(config: Any, *, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        name = f"{prefix}{field.name.replace('_', '-')}"
        yield name
        yield from (alias.lstrip("-") for note in _notes(field) for alias in getattr(note, "aliases", None) or ())
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flag_names(value, prefix=f"{name}.")


def _notes(field: "dataclasses.Field[Any]") -> tuple[Any, ...]:
    """What `Annotated[...]` says of a field, such as tyro's other spellings of its flag."""
    return getattr(field.type, "__metadata__", ())


def _without_no(name: str) -> str:
    """`sampling.no-cache` sets `sampling.cache` to False."""
    head, dot, last = name.rpartition(".")
    return f"{head}{dot}{last.removeprefix('no-')}"


def _absolute_inputs(config: Any) -> Any:
    from cogview.locations import absolute  # pyarrow's file systems, which a menu does not need

    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get(ROLE) == "input" and isinstance(value, Path):
            changes[field.name] = Path(os.path.abspath(value))
        elif field.metadata.get(ROLE) == "input" and isinstance(value, str):
            changes[field.name] = absolute(value)
        elif field.metadata.get(ROLE) == "input" and isinstance(value, tuple):
            changes[field.name] = tuple(absolute(address) for address in value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _absolute_inputs(value)
    return dataclasses.replace(config, **changes)
