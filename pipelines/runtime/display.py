"""What people see of a run: a live panel of its stages on a terminal, plain lines anywhere else.

In: the names of the stages, and what the running one says of its progress. Out: the screen. Everything else that would
write there (Ray, warnings, libraries, worker processes) goes to `<root>/log.txt` while the display is open.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LOG_NAME = "log.txt"
LINE_SECONDS = 15.0  # between two progress lines off a terminal
MIN_PACE_SECONDS = 3.0  # of work, before it tells how long the rest will take
MAX_SAID = 5  # lines of a job that stay in the panel
StageState = Literal["waiting", "running", "done", "reused", "failed"]
MARKS: dict[StageState, tuple[str, str]] = {
    "waiting": ("·", "dim"),
    "running": ("▶", "bold cyan"),
    "done": ("✓", "green"),
    "reused": ("=", "blue"),
    "failed": ("✗", "bold red"),
}


@dataclass(kw_only=True)
class Stage:
    """One line of the display. `done` and `total` are in the job's own units; `note` is short, such as a loss."""

    name: str
    state: StageState = "waiting"
    done: float = 0.0
    total: float = 0.0
    note: str = ""
    started: float = 0.0
    seconds: float = 0.0
    first: tuple[float, float] | None = None  # what was done at the first sign of progress, and when

    def keep(self, done: float, total: float, note: str, *, now: float) -> None:
        """Take over what the job says; work of another kind, such as after a stage's preparation, is timed anew."""
        if self.first is None or total != self.total or done < self.done:
            self.first = (done, now)
        self.done, self.total, self.note = done, total, note

    def seconds_left(self, *, now: float) -> float | None:
        """At the pace so far; None while that says nothing."""
        if self.first is None or not self.first[0] < self.done < self.total or now - self.first[1] < MIN_PACE_SECONDS:
            return None
        return (self.total - self.done) * (now - self.first[1]) / (self.done - self.first[0])


class Display(Protocol):
    """What a chain and a job tell people. `progress` and `say` belong to the stage that was started last."""

    def start(self, name: str) -> None: ...

    def finish(self, name: str, *, state: StageState, seconds: float, note: str = "") -> None: ...

    def progress(self, done: float, total: float, note: str = "") -> None: ...

    def say(self, line: str) -> None: ...


class PlainDisplay:
    """Lines for logs and pipes: one at the start and the end of a stage, and one of progress now and then."""

    def __init__(self, stages: Sequence[str], *, stream: IO[str]) -> None:
        self.stages = {name: Stage(name=name) for name in stages}
        self._current = Stage(name="")
        self.stream = stream
        self._last_line = 0.0

    def start(self, name: str) -> None:
        """The stage begins."""
        self._current = self.stages.setdefault(name, Stage(name=name))
        self._current.state = "running"
        self._current.started = self._last_line = time.monotonic()
        self._write(f"{name}: started")

    def finish(self, name: str, *, state: StageState, seconds: float, note: str = "") -> None:
        """The stage ended as `state` says."""
        stage = self.stages.setdefault(name, Stage(name=name))
        stage.state, stage.seconds, stage.note = state, seconds, note
        words = {"reused": "reused, nothing to do", "done": f"done in {duration(seconds)}"}
        self._write(f"{name}: {words.get(state, state)}{f' ({note})' if note else ''}")

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Keep the progress, and write it when the last line is old enough."""
        stage = self._current
        now = time.monotonic()
        stage.keep(done, total, note, now=now)
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._write(f"{stage.name}: {progress_words(stage, now=now)}")

    def say(self, line: str) -> None:
        """One line for people."""
        self._write(f"{self._current.name}: {line}" if self._current.name else line)

    def _write(self, line: str) -> None:
        self.stream.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        self.stream.flush()


class LiveDisplay:
    """A panel that repaints itself; it needs a terminal."""

    def __init__(self, stages: Sequence[str], *, title: str, console: Console) -> None:
        self.stages = {name: Stage(name=name) for name in stages}
        self._title = title
        self._current = Stage(name="")
        self._said: list[str] = []
        self._began = time.monotonic()
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4, redirect_stdout=False)

    def start(self, name: str) -> None:
        """The stage begins."""
        self._current = self.stages.setdefault(name, Stage(name=name))
        self._current.state, self._current.started = "running", time.monotonic()

    def finish(self, name: str, *, state: StageState, seconds: float, note: str = "") -> None:
        """The stage ended as `state` says."""
        stage = self.stages.setdefault(name, Stage(name=name))
        stage.state, stage.seconds, stage.note = state, seconds, note
        self.live.refresh()

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Keep the progress for the next repaint."""
        self._current.keep(done, total, note, now=time.monotonic())

    def say(self, line: str) -> None:
        """One line for people, below the stages."""
        self._said = [*self._said, line][-MAX_SAID:]

    def _render(self) -> RenderableType:
        now = time.monotonic()
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(width=20)
        table.add_column(no_wrap=True, justify="right", width=8)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for stage in self.stages.values():
            mark, style = MARKS[stage.state]
            seconds = now - stage.started if stage.state == "running" else stage.seconds
            clock = "" if stage.state == "waiting" else "reused" if stage.state == "reused" else duration(seconds)
            note = ", ".join(filter(None, [stage.note, left_words(stage, now=now) if stage.state == "running" else ""]))
            table.add_row(Text(mark, style), Text(stage.name, style), _bar(stage), Text(clock), Text(note, "dim"))
        said = [Text(line, "dim", no_wrap=True, overflow="ellipsis") for line in self._said]
        title = f"{self._title}  {duration(now - self._began)}"
        return Panel(Group(table, *said), title=Text(title, "bold"), title_align="left", border_style="dim")


@contextmanager
def open_display(
    stages: Sequence[str], *, title: str, root: Path, stream: IO[str] | None = None, is_verbose: bool = False
) -> Iterator[Display]:
    """The display for a run under `root`: live when `stream` (default: standard output) is a terminal, else plain.

    While it is open the process's own output goes to `<root>/log.txt`; is_verbose: plain, and nothing is redirected.
    """
    if is_verbose:
        yield PlainDisplay(stages, stream=stream or sys.stdout)
        return
    with quiet_process(root / LOG_NAME) as screen:
        stream = stream or screen
        console = Console(file=stream)
        if not console.is_terminal or console.is_dumb_terminal:
            yield PlainDisplay(stages, stream=stream)
            return
        display = LiveDisplay(stages, title=title, console=console)
        with display.live:
            yield display


@contextmanager
def quiet_process(log: Path) -> Iterator[IO[str]]:
    """Send what this process and its children write to a log, and yield the true standard output.

    This works on file descriptors: Ray's C++ core and its daemons do not ask Python where to write.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    log_descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    handler = logging.FileHandler(log, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(True)
    logging.getLogger().addHandler(handler)
    for room in ("cogview", "pipelines"):
        logging.getLogger(room).setLevel(logging.INFO)
    screen = open(kept[0], "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 (closed below)
    try:
        os.dup2(log_descriptor, 1)
        os.dup2(log_descriptor, 2)
        yield screen
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        screen.close()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, log_descriptor):
            os.close(descriptor)
        logging.getLogger().removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()


def duration(seconds: float) -> str:
    """`7.4 s`, `3:07`, `2:03:07`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_words(stage: Stage, *, now: float) -> str:
    """`120 of 600 (20 %), loss 3.2, 0:40, 2:40 left`; without a total just the note and the time."""
    words = []
    if stage.total > 0:
        words.append(f"{stage.done:g} of {stage.total:g} ({100 * stage.done / stage.total:.0f} %)")
    if stage.note:
        words.append(stage.note)
    return ", ".join(filter(None, [*words, duration(now - stage.started), left_words(stage, now=now)]))


def left_words(stage: Stage, *, now: float) -> str:
    """`2:40 left`, or nothing while that is not known."""
    seconds = stage.seconds_left(now=now)
    return "" if seconds is None else f"{duration(seconds)} left"


def _bar(stage: Stage) -> RenderableType:
    if stage.state == "running":
        return ProgressBar(total=stage.total or None, completed=stage.done, pulse=stage.total <= 0, width=20)
    return Text("")
