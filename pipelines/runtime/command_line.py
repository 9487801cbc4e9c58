"""`python -m pipelines JOB [PRESET] [--flags]`: runs the job, and says in plain words what went wrong.

Exit codes: 0 done, 1 a defect of ours (with its traceback), 2 something that the user can mend, 130 interrupted.
"""

import importlib
import inspect
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, Self, TextIO

from cogview.errors import ConfigError
from pipelines.runtime import status
from pipelines.runtime.cluster import shutdown_ray
from pipelines.runtime.failures import find_cause, first_line
from pipelines.runtime.flags import RUNS, Order, read_config, read_order
from pipelines.runtime.menu import VERBS, menu_lines

DONE, DEFECT, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(words: Sequence[str]) -> int:
    """Run one command and return its exit code. Ray is down afterwards, whatever happened."""
    outcome = Outcome(words, err=sys.stderr)
    with outcome, _terminated_as_interrupt():
        _dispatch(list(words), sys.stdout)
    return outcome.code


class Outcome:
    """Turns whatever ends a command into an exit code, and into words where none have been said."""

    def __init__(self, words: Sequence[str], *, err: TextIO) -> None:
        self.code = DONE
        self._words = words
        self._err = err

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self.code = self._explain(error)
        shutdown_ray()
        return True

    def _explain(self, error: BaseException) -> int:
        if isinstance(error, SystemExit):  # tyro has printed help, or what is wrong
            return error.code if isinstance(error.code, int) else DONE if error.code is None else USER_ERROR
        if isinstance(error, KeyboardInterrupt):
            command = resume_command(self._words)
            self._err.write(f"\nInterrupted. Finished work is kept; this goes on where it stopped:\n  {command}\n")
            return INTERRUPTED
        cause = find_cause(error)
        if cause is not None:
            self._err.write(f"error: {cause}\n")
            return USER_ERROR
        traceback.print_exception(error, file=self._err)
        self._err.write(f"\ninternal error: {first_line(error)}\nThis is a defect of ours; finished work is kept.\n")
        return DEFECT


def resume_command(words: Sequence[str]) -> str:
    """The command that was given, as a line for the shell."""
    python, here = Path(sys.executable), Path.cwd()
    shown = str(python.relative_to(here)) if python.is_relative_to(here) else "python"
    return shlex.join([shown, "-m", "pipelines", *words])


def _dispatch(words: list[str], out: TextIO) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        out.write("\n".join(menu_lines()) + "\n")
        return
    if words[0] in VERBS:
        status.run_verb(words[0], words[1:], runs=RUNS, out=out)
        return
    order = read_order(words)
    module = importlib.import_module(f"pipelines.{order.job}")
    config = read_config(order, module)
    if order.is_plan:
        out.writelines(f"{line}\n" for line in _plan(order, module, config))
        return
    if hasattr(module, "JOB"):
        lines = _run_single(order, module, config)
    else:  # a chain of jobs
        lines = module.main(config, order=order, command=resume_command(words))
    out.write("\n".join(lines) + "\n")


def _plan(order: Order, module: ModuleType, config: Any) -> Iterator[str]:
    """The lines of a job's plan, which is told what it asks for: what is known of the GPUs, the folder of the run."""
    if not hasattr(module, "plan"):
        raise ConfigError(f"--plan: {order.job} has no plan; `python -m pipelines pretrain --plan` shows one")
    asked = inspect.signature(module.plan).parameters
    if order.gpus.named and "gpus" not in asked:
        raise ConfigError(f"{order.gpus.named}: {order.job} trains no model that has to fit; leave it away")
    if hasattr(module, "resolve"):
        config = module.resolve(config, root=order.root)
    known = {"gpus": order.gpus, "root": order.root}
    lines: Iterator[str] = module.plan(config, **{name: value for name, value in known.items() if name in asked})
    return lines


def _run_single(order: Order, module: ModuleType, config: Any) -> list[str]:
    from pipelines.runtime.chain import show_finished
    from pipelines.runtime.display import duration, open_display
    from pipelines.runtime.jobs import run_job

    if hasattr(module, "resolve"):  # fills in what depends on earlier runs
        config = module.resolve(config, root=order.root)
    job = module.JOB
    title = f"{job.name} {order.preset}"
    with open_display([job.name], title=title, root=order.root, is_verbose=order.is_verbose) as display:
        display.start(job.name)
        done = run_job(job, config, root=order.root, display=display)
        show_finished(display, done)
        shutdown_ray()
    how = "already done" if done.was_done else f"done in {duration(done.seconds)}"
    return [f"{job.name}: {how}", *status.score_lines(done.scores), f"output: {status.shown_path(done.output)}"]


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """A polite request to end (`kill`, a batch system) ends the run as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
