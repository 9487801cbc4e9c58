"""The menu of jobs, read from their source files: importing them would take torch and Ray."""

import ast
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogview.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
# The order of the menu is the order of the road; jobs that are not named here follow by name.
MENU_ORDER = (
    *("road", "scrape_pairs", "import_pairs", "score_pairs", "filter_pairs", "translate_pairs", "train_text_tokenizer"),
    *("train_image_tokenizer", "tokenize_pairs", "import_tokens", "export_tokens", "pretrain", "generate", "evaluate"),
    "machine_evaluation",
)
VERBS = {
    "status": "Stages, shards, scores and paths of a run (or the last), from the disk alone (--json: for programs).",
    "doctor": "Whether this machine, its GPUs, disks, ports and the data can do what jobs ask of them.",
    "dashboard": "Open MLflow's pages for the runs, on 127.0.0.1.",
}


@dataclass(frozen=True, kw_only=True)
class MenuItem:
    """A job as its source file describes it."""

    name: str
    title: str
    presets: tuple[str, ...]


def menu(package: Path = PACKAGE) -> list[MenuItem]:
    """The jobs in `pipelines/`, in the order of the road."""
    items = [_describe(path) for path in package.glob("*.py") if not path.name.startswith("__")]
    rank = {name: position for position, name in enumerate(MENU_ORDER)}
    return sorted(items, key=lambda item: (rank.get(item.name, len(rank)), item.name))


def menu_lines() -> list[str]:
    """The menu for people."""
    items = menu()
    width = max(len(name) for name in [*VERBS, *(item.name for item in items)])
    lines = ["python -m pipelines JOB [PRESET] [--root runs/NAME] [--flags]     (--help after a job: its flags)", ""]
    for item in items:
        presets = f"  [{', '.join(item.presets)}]" if item.presets else ""
        lines.append(f"  {item.name:<{width}}  {item.title}{presets}")
    return [*lines, "", *(f"  {name:<{width}}  {title}" for name, title in VERBS.items())]


def check_known(what: str, given: str, known: Sequence[str], *, remedy: str) -> None:
    """ConfigError with the nearest of `known` unless `given` is one of them."""
    if given not in known:
        near = nearest(given, known)
        hint = f": did you mean {near!r}?" if near else "."
        raise ConfigError(f"unknown {what} {given!r}{hint} {remedy}")


def nearest(given: str, known: Sequence[str]) -> str:
    """The most similar of `known`, or the empty string."""
    return next(iter(difflib.get_close_matches(given, known, n=1, cutoff=0.5)), "")


def _describe(path: Path) -> MenuItem:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = (ast.get_docstring(tree) or "").strip().splitlines()
    return MenuItem(name=path.stem, title=lines[0] if lines else "", presets=tuple(_preset_names(tree)))


def _preset_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, ast.Dict):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if [target.id for target in targets if isinstance(target, ast.Name)] == ["PRESETS"]:
            keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            yield from (key for key in keys if isinstance(key, str))
