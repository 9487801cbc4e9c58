"""A chain of jobs: each reads the outputs of earlier ones, and only what is not done yet is done.

In: stages in their order. Out: their output folders, and `<root>/chain.json`, which is written after every change and
is all that `status` and the report read. A chain that finds everything done writes nothing at all.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cogview.errors import ConfigError, ManifestError
from cogview.shards.manifest import read_json, write_json
from pipelines.runtime.display import Display, StageState
from pipelines.runtime.failures import first_line
from pipelines.runtime.jobs import COMPLETE_NAME, Finished, Job, plan_job, read_finished, work
from pipelines.runtime.locks import folder_lock

CHAIN_NAME = "chain.json"
TOKENIZERS = ("text_tokenizer", "image_tokenizer")
DEMO_DATA = "demo site"  # its `data` where the truth about every picture is known
FROM_CHAIN = Path("the-output-of-the-stage-before")  # stands in a chain's presets where a stage's output goes
SCORES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ChainStage:
    """A job of the chain. `reads`: path field of its config -> name of the earlier job whose output goes there."""

    job: Job
    config: Any
    reads: Mapping[str, str] = field(default_factory=dict)


def run_chain(
    stages: Sequence[ChainStage], *, root: Path, display: Display, facts: Mapping[str, str]
) -> dict[str, Finished]:
    """Run every stage that is not done, in order. `facts` are kept in chain.json as they are (preset, command).

    Raises what a stage raises; chain.json then says which one failed, and why.
    """
    finished: dict[str, Finished] = {}
    with ChainRecord(root, names=[stage.job.name for stage in stages], facts=facts) as record:
        for stage in stages:
            name = stage.job.name
            config = connect(stage, finished)
            plan = plan_job(stage.job, config, root=root)
            done = read_finished(stage.job, plan.output)
            if done is None:
                record.start(name, plan.output)
                display.start(name)
                done = work(plan, display=display)
            finished[name] = done
            record.finish(done)
            show_finished(display, done)
    return finished


def show_finished(display: Display, done: Finished) -> None:
    """Tell the display how a job ended."""
    state: StageState = "reused" if done.was_done else "done"
    display.finish(done.job, state=state, seconds=done.seconds, note=score_words(done.scores))


def connect(stage: ChainStage, finished: Mapping[str, Finished]) -> Any:
    """The stage's config with the outputs of earlier stages in its path fields. ConfigError if one was set by hand."""
    for name in stage.reads:
        if getattr(stage.config, name) not in (None, FROM_CHAIN):
            raise ConfigError(
                f"{stage.job.name}.{name}={getattr(stage.config, name)}: in a chain this is the output of "
                f"{stage.reads[name]}; leave it out, or run {stage.job.name} by itself"
            )
    return replace(stage.config, **{name: finished[source].output for name, source in stage.reads.items()})


class ChainRecord:
    """`chain.json` in the making. The root is locked, and the file written, as soon as there is something to do."""

    def __init__(self, root: Path, *, names: Sequence[str], facts: Mapping[str, str]) -> None:
        self._root = root
        self._held = ExitStack()
        self._is_held = False
        self._began = time.monotonic()
        self._stages: dict[str, dict[str, Any]] = {name: {"job": name, "state": "waiting"} for name in names}
        self._content: dict[str, Any] = {
            **facts,
            "state": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "process": os.getpid(),
            "stages": list(self._stages.values()),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end(error)
        finally:
            self._held.close()

    def start(self, name: str, output: Path) -> None:
        """The stage is about to work. ConfigError when another process works under the same root."""
        self._stages[name].update(state="running", output=str(output.relative_to(self._root)))
        self._write()

    def finish(self, done: Finished) -> None:
        """The stage is done, now or before."""
        self._stages[done.job].update(
            state="done",
            output=str(done.output.relative_to(self._root)),
            digest=done.digest,
            seconds=done.seconds,
            was_done=done.was_done,
            scores=dict(done.scores),
        )
        if self._is_held:
            self._write()

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self._content["state"] = "done"
            if self._is_held or not self._says_the_same():
                self._write()
            return
        state = "failed" if isinstance(error, Exception) else "interrupted"
        self._content.update(state=state, error=first_line(error))
        unfinished = [stage for stage in self._stages.values() if stage["state"] != "done"]
        if unfinished:
            unfinished[0].update(state=state, error=first_line(error))
        if self._is_held:  # else nothing was done, or another process is at work here
            self._write()

    def _write(self) -> None:
        if not self._is_held:
            self._root.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(folder_lock(self._root))
            self._is_held = True
        self._content["seconds"] = round(time.monotonic() - self._began, 1)
        write_json(self._root / CHAIN_NAME, self._content)

    def _says_the_same(self) -> bool:
        """Whether the file already tells of these very outputs, finished."""
        try:
            there = read_chain(self._root)
        except (ConfigError, ManifestError):
            return False
        return there["state"] == "done" and _outputs(there) == _outputs(self._content)


def read_chain(root: Path) -> dict[str, Any]:
    """What `chain.json` under `root` says. ConfigError when no chain ran there, ManifestError when it is damaged."""
    if not (root / CHAIN_NAME).is_file():
        raise ConfigError(
            f"{root} has no {CHAIN_NAME}: no chain has run there; run `make pretrain`, or give another --root"
        )
    content = read_json(root / CHAIN_NAME)
    if not isinstance(content, dict) or not {"state", "started", "stages"} <= content.keys():
        raise ManifestError(f"{root / CHAIN_NAME} is damaged; delete it and run the chain again")
    return content


def fill_from_chain(config: Any, producers: Mapping[str, str], *, root: Path) -> Any:
    """The config with input folders that are not given taken from the chain that ran last under `root`.

    What was imported together belongs together: tokenizers beside the checkpoint are taken first.
    producers: field -> the job that writes it. ConfigError when such a job is not done.
    """
    checkpoint = getattr(config, "checkpoint", None)
    if checkpoint is not None:
        missing_tokenizers = [name for name in producers if name in TOKENIZERS and getattr(config, name) is None]
        beside = {name: checkpoint.parent / name for name in missing_tokenizers}
        config = replace(config, **{name: folder for name, folder in beside.items() if folder.is_dir()})
    missing = {name: job for name, job in producers.items() if getattr(config, name) is None}
    if not missing:
        return config
    outputs = chain_outputs(root)
    for name, job in missing.items():
        if job not in outputs or not outputs[job].is_dir():
            flag = f"--{name.replace('_', '-')} FOLDER"
            raise ConfigError(f"{root / CHAIN_NAME}: no {job} is done; run `make pretrain` first, or give {flag}")
    return replace(config, **{name: outputs[job] for name, job in missing.items()})


def chain_outputs(root: Path) -> dict[str, Path]:
    """Job -> the output of each finished stage of the chain that ran last under `root`."""
    return {stage["job"]: root / stage["output"] for stage in read_chain(root)["stages"] if stage["state"] == "done"}


def latest_output(job: str, *, flag: str, root: Path) -> Path:
    """The output folder of a job that ended last under `root`, for jobs outside the chain.

    ConfigError when there is none; flag: by which the user can name another folder.
    """
    done = [path for path in (root / job).glob(f"*/{COMPLETE_NAME}") if path.is_file()]
    if not done:
        target = job.replace("_", "-")
        raise ConfigError(f"{root}: no {job} is done; run `make {target}` first, or give {flag} FOLDER")
    return max(done, key=lambda path: path.stat().st_mtime_ns).parent


def output_of(job: str, *, flag: str, root: Path) -> Path:
    """The output folder of a job in the chain that ran last under `root`, else of its last run (`latest_output`).

    What was run by hand since then is not the chain's.
    """
    in_chain = chain_outputs(root).get(job) if (root / CHAIN_NAME).is_file() else None
    return in_chain or latest_output(job, flag=flag, root=root)


def score_words(scores: Mapping[str, Any]) -> str:
    """The first few scores as `psnr 24.1, dead_codes 3`."""
    shown = list(scores.items())[:SCORES_SHOWN]
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown)


def _outputs(content: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [(stage["job"], stage.get("output"), stage.get("digest")) for stage in content["stages"]]
