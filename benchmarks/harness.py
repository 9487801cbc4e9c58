"""What every benchmark shares: figures against bars, a table for people, one JSON line for programs, committed results.

In: a function that measures. Out: the table and, as the last line of standard output,
`{"name": ..., "figures": {...}, "bars": [...], "pass": true}`; exit code 0 if every bar is met, else 1. With `--save`
the same goes to `benchmarks/results/NAME.json` and `.md`, with the date, the machine and the versions.
"""

import argparse
import json
import operator
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.runtime.machine import machine, machine_words

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
INDEX_NAME = "README.md"  # of the results, written with each of them
SAVED = ("benchmarks/results", "docs")  # what `--save` writes: saving one result leaves the next one's commit clean
COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    ">=": operator.ge,
    ">": operator.gt,
}

Figures = Mapping[str, float | int | str]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a figure must be, such as `Bar(figure="seconds/total", op="<", value=600)`. A missing figure fails."""

    figure: str
    op: str
    value: float

    def is_met(self, figures: Figures) -> bool:
        """Whether the figure is there and compares as `op` says."""
        measured = figures.get(self.figure)
        return isinstance(measured, (int, float)) and COMPARISONS[self.op](measured, self.value)


class UnmeasuredError(Exception):
    """The measurement could not be made; the message says why, and what to do about it."""


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/")
    return parser


def verify(name: str, measure: Callable[[], Figures], *, bars: Sequence[Bar], save: bool = False) -> int:
    """Measure, show, and return the exit code. A measurement that could not be made does not pass."""
    result: dict[str, Any] = {"name": name, "figures": {}, "bars": [asdict(bar) for bar in bars], "pass": False}
    try:
        figures = measure()
    except UnmeasuredError as error:
        result["error"] = str(error)
    else:
        result["figures"] = {key: _rounded(value) for key, value in figures.items()}
        result["pass"] = all(bar.is_met(figures) for bar in bars)
    show(result)
    if save and "error" not in result:
        save_result(result)
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return 0 if result["pass"] else 1


def show(result: Mapping[str, Any], *, console: Console | None = None) -> None:
    """The figures as a table, those with a bar first."""
    console = console or Console()
    if "error" in result:
        console.print(f"{result['name']}: not measured: {result['error']}", style="bold red", markup=False)
        return
    table = Table("figure", "measured", "bar", "", title=f"make verify NAME={result['name']}", title_justify="left")
    for row in _rows(result):
        table.add_row(*row, style={"below": "bold red", "met": "green"}.get(row[-1], ""))
    console.print(table)


def save_result(result: Mapping[str, Any], *, folder: Path = RESULTS) -> None:
    """Write `NAME.json` and `NAME.md`: figures, bars, date, machine, versions and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    full = {**result, "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "commit": commit()}
    (folder / f"{result['name']}.json").write_text(json.dumps(full, indent=2, ensure_ascii=False) + "\n")
    lines = [
        f"# {result['name']}: {'passed' if result['pass'] else 'below the bar'}",
        "",
        f"{full['date']}, commit {full['commit']}, {machine_words(full['machine'])}.",
        f"Again: `{again(result['name'], sys.argv[1:])}`.",
        "",
        "| figure | measured | bar | |",
        "|---|---:|---:|---|",
        *(f"| {' | '.join(row)} |" for row in _rows(result)),
    ]
    (folder / f"{result['name']}.md").write_text("\n".join(lines) + "\n")
    (folder / INDEX_NAME).write_text("\n".join(_index(folder)) + "\n")


def again(name: str, flags: Sequence[str]) -> str:
    """The command that measures the same."""
    given = shlex.join(flag for flag in flags if flag != "--save")
    return f'make verify NAME={name} ARGS="{given}"' if given else f"make verify NAME={name}"


def _index(folder: Path) -> Iterator[str]:
    """All saved results as a table: what was met, and what was not."""
    yield "# What was measured\n"
    yield "Each line again: `make verify NAME=...`. A figure without an aim is told for its own sake.\n"
    yield "| check | date | aims met | missed |"
    yield "|---|---|---|---|"
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        bars = [Bar(**bar) for bar in result["bars"]]
        missed = [bar for bar in bars if not bar.is_met(result["figures"])]
        words = "; ".join(
            f"{bar.figure} {result['figures'].get(bar.figure)}, not {bar.op} {bar.value}" for bar in missed
        )
        met = f"{len(bars) - len(missed)} of {len(bars)}" if bars else "no aim"
        yield f"| [{result['name']}]({result['name']}.md) | {result['date']} | {met} | {words} |"


def commit() -> str:
    """The checked-out commit, marked `-dirty` when files differ from it, saved results aside; or `unknown`."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in SAVED))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def say(line: str) -> None:
    """A line for people while a measurement runs; standard output is kept for the result."""
    print(line, file=sys.stderr, flush=True)


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    figures = dict(result["figures"])
    rows = []
    for bar in result["bars"]:
        measured = figures.pop(bar["figure"], None)
        is_met = Bar(**bar).is_met(result["figures"])
        shown = "missing" if measured is None else str(measured)
        rows.append((bar["figure"], shown, f"{bar['op']} {bar['value']}", "met" if is_met else "below"))
    return [*rows, *((name, str(value), "", "") for name, value in figures.items())]


def _rounded(value: float | int | str) -> float | int | str:
    return float(f"{value:.5g}") if isinstance(value, float) else value
