"""A job's contract: what goes in is digested, what comes out is recorded, and finished work is never done twice.

The output folder of a job is `<root>/<job>/<digest>`, where the digest covers the semantic config and the content of
the inputs. So a changed setting makes a new folder and touches nothing else, going back to the old setting is a no-op,
and an interrupted job finds its own unfinished folder again.
"""

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cogview.config import config_digest, input_paths, to_plain
from cogview.errors import ConfigError, ManifestError
from cogview.shards.manifest import (
    MANIFEST_NAME,
    file_record,
    listed_files,
    read_json,
    read_manifest,
    read_sealed,
    write_json,
)
from pipelines.runtime.locks import folder_lock
from pipelines.runtime.tracking import Tracker, open_tracker

COMPLETE_NAME = "complete.json"
CONFIG_NAME = "config.json"
MODEL_NAME = "model.safetensors"  # a product that is a model; its room brings torch, which a menu does not need
DIGEST_LENGTH = 12  # characters of a digest in a folder name; complete.json has all of them
DEEP_BYTES = 2 * 2**30  # up to here shards are verified by sha256 (seconds), beyond by their size


class StageDisplay(Protocol):
    """Where a running job shows how far it is (see `pipelines.runtime.display`)."""

    def progress(self, done: float, total: float, note: str = "") -> None: ...

    def say(self, line: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job file says of itself.

    name: also its MLflow experiment and its folder; version: raised whenever the same config makes other bytes;
    products: file names in the output folder that later jobs and people read, in the order of importance.
    """

    name: str
    version: int
    products: tuple[str, ...]
    main: Callable[[Any, "JobRun"], None]


@dataclass(kw_only=True)
class JobRun:
    """A job at work: where it writes, what it has scored, and whom it tells."""

    output: Path
    digest: str
    inputs: Mapping[str, str]
    display: StageDisplay
    tracker: Tracker
    scores: dict[str, Any] = field(default_factory=dict)

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Show `done` of `total`, with a short note such as the loss."""
        self.display.progress(done, total, note)

    def say(self, line: str) -> None:
        """One line for people."""
        self.display.say(line)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job with its config, before any work: where the output belongs, and the digests that say so."""

    job: Job
    config: Any
    root: Path
    output: Path
    digest: str
    inputs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A job's finished output. `digest` is that of its products: the input digest of whoever reads them."""

    job: str
    output: Path
    digest: str
    scores: Mapping[str, Any]
    seconds: float
    was_done: bool


def run_job(job: Job, config: Any, *, root: Path, display: StageDisplay) -> Finished:
    """Run a job, or find it done. Raises CogViewError on anything that the user can mend."""
    plan = plan_job(job, config, root=root)
    return read_finished(job, plan.output) or work(plan, display=display)


def plan_job(job: Job, config: Any, *, root: Path) -> Plan:
    """Digest the inputs and find the job's folder; nothing is written. ConfigError when an input is not there."""
    paths = {name: path for name, path in input_paths(config).items() if path}
    inputs = {name: digest_input(path, field_name=name) for name, path in paths.items()}
    digest = config_digest(config, inputs={**inputs, "job": f"{job.name}/{job.version}"})
    output = root / job.name / digest[:DIGEST_LENGTH]
    return Plan(job=job, config=config, root=root, output=output, digest=digest, inputs=inputs)


def work(plan: Plan, *, display: StageDisplay) -> Finished:
    """Do a planned job, from where an interrupted run of the same plan stopped. One process at a time may do so."""
    job, output = plan.job, plan.output
    output.mkdir(parents=True, exist_ok=True)
    with folder_lock(output):
        done = read_finished(job, output)  # another process may have been at it until just now
        if done is not None:
            return done
        _discard_damaged(output)
        _write_config(plan)
        with open_tracker(
            job=job.name, output=output, config=plan.config, inputs=plan.inputs, digest=plan.digest, root=plan.root
        ) as tracker:
            run = JobRun(output=output, digest=plan.digest, inputs=plan.inputs, display=display, tracker=tracker)
            started = time.monotonic()
            job.main(plan.config, run)
            seconds = time.monotonic() - started
            tracker.log_scores(run.scores)
            _write_complete(job, run, seconds=seconds)
            finished = read_finished(job, output)
            if finished is not None:
                tracker.log_output(finished.digest)
                if MODEL_NAME in job.products:
                    tracker.log_model(f"cogview-{job.name}", output, digest=finished.digest)
    if finished is None:
        raise ManifestError(f"{output}: the job ended, but its products {job.products} do not verify; run it again")
    return replace(finished, was_done=False)


def given_folders(config: Any, producers: Mapping[str, str]) -> dict[str, Path]:
    """The input folders of a config, all given (`producers`: field -> the job that writes it).

    Raises ConfigError naming one that is not.
    """
    for name, job in producers.items():
        if getattr(config, name) is None:
            raise ConfigError(f"{name} is not given; name the output folder of {job} with --{name.replace('_', '-')}")
    return {name: getattr(config, name) for name in producers}


def read_finished(job: Job, output: Path) -> Finished | None:
    """The finished output in this folder, or None if it was never finished or its files no longer verify."""
    complete = _read_complete(output)
    if complete is None or set(complete["products"]) != set(job.products) or damaged_files(output):
        return None
    return Finished(
        job=job.name,
        output=output,
        digest=complete["output_digest"],
        scores=complete["scores"],
        seconds=complete["seconds"],
        was_done=True,
    )


def restore_complete(output: Path, *, journal: Path) -> None:
    """Call an output finished again whose products were changed on purpose. journal: its old `complete.json`."""
    complete = read_json(journal)
    products = {name: file_record(output / name) for name in complete["products"]}
    write_json(output / COMPLETE_NAME, {**complete, "products": products, "output_digest": _digest_of(products)})
    journal.unlink()


def damaged_files(output: Path) -> list[Path]:
    """The files of a finished output that are missing or altered: products, and the shards that a manifest lists."""
    complete = _read_complete(output)
    if complete is None:
        return []
    damaged = []
    for name, record in complete["products"].items():
        path = output / name
        if not path.is_file() or file_record(path) != record:
            damaged.append(path)
        elif path.name == MANIFEST_NAME:
            damaged += _damaged_shards(path.parent)
    return damaged


def digest_input(path: Path | tuple[str, ...], *, field_name: str) -> str:
    """The digest of what lies at an input path, or at several addresses (files, folders, patterns, remote ones).

    A finished output of ours stands for its products, which must still verify. Anything else is listed: relative
    paths, sizes and modification times of all files, which is quick for terabytes and changes when the data does.
    """
    from cogview.locations import addresses_of, local_folder  # brings pyarrow, which a menu does not need

    if not isinstance(path, Path):
        folder = local_folder(addresses_of(path))
        return _digest_of_addresses(path, field_name) if folder is None else digest_input(folder, field_name=field_name)
    if not path.exists():
        raise ConfigError(f"{field_name}: {path} does not exist; give an existing file or folder")
    complete = _read_complete(path)
    if complete is not None:
        damaged = damaged_files(path)
        if damaged:
            job = complete["job"]
            raise ManifestError(f"{field_name}: {damaged[0]} is missing or altered; run the job {job} again")
        return str(complete["output_digest"])
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    if not files:
        raise ConfigError(f"{field_name}: {path} is an empty folder; put data there or give another path")
    listing = hashlib.sha256()
    for file in files:
        status = file.stat()
        listing.update(f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return listing.hexdigest()


def _digest_of_addresses(addresses: tuple[str, ...], field_name: str) -> str:
    listing = [line for address in addresses for line in _content_of(address, field_name)]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def _content_of(address: str, field_name: str) -> list[str]:
    """What stands for an address in a digest: of a finished output its own digest, of anything else a list of files."""
    from cogview.locations import find_files, is_remote, open_data

    if not is_remote(address) and (Path(address) / COMPLETE_NAME).is_file():
        return [digest_input(Path(address), field_name=field_name)]
    files = find_files((address,), suffixes=(), setting=field_name)
    if is_remote(address) and any(file.name == COMPLETE_NAME for file in files):
        with open_data(f"{address.rstrip('/')}/{COMPLETE_NAME}") as stream:
            return [str(json.load(stream)["output_digest"])]
    return [f"{file.name}\0{file.size}\0{file.modified}" for file in files]


def _read_complete(output: Path) -> dict[str, Any] | None:
    """What `complete.json` says, or None when there is none or it is damaged: the job is then not finished."""
    if not (output / COMPLETE_NAME).is_file():
        return None
    try:
        complete = read_json(output / COMPLETE_NAME)
    except ManifestError:
        return None
    wanted = {"job", "output_digest", "products", "scores", "seconds"}
    return complete if isinstance(complete, dict) and wanted <= complete.keys() else None


def _damaged_shards(folder: Path) -> list[Path]:
    records = _shard_records(folder)
    is_deep = sum(record["bytes"] for record in records.values()) <= DEEP_BYTES
    try:
        read_manifest(folder, deep=is_deep)
    except ManifestError:
        return [folder / name for name, record in records.items() if not _is_intact(folder / name, record)]
    return []


def _shard_records(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST_NAME
    return listed_files(read_sealed(path), path=path)


def _is_intact(path: Path, record: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == record["bytes"] and file_record(path) == dict(record)


def _discard_damaged(output: Path) -> None:
    """Remove what no longer verifies, so that a job that goes on where it stopped does not take it for done."""
    damaged = damaged_files(output)
    for path in damaged:
        path.unlink(missing_ok=True)
    if damaged:
        (output / MANIFEST_NAME).unlink(missing_ok=True)
    (output / COMPLETE_NAME).unlink(missing_ok=True)


def _write_config(plan: Plan) -> None:
    content = {"job": plan.job.name, "digest": plan.digest, "inputs": plan.inputs, "config": to_plain(plan.config)}
    write_json(plan.output / CONFIG_NAME, content)


def _write_complete(job: Job, run: JobRun, *, seconds: float) -> None:
    missing = [name for name in job.products if not (run.output / name).is_file()]
    if missing:
        raise ManifestError(f"{run.output}: the job ended without writing {missing}; this is a defect of the job")
    products = {name: file_record(run.output / name) for name in job.products}
    write_json(
        run.output / COMPLETE_NAME,
        {
            "job": job.name,
            "digest": run.digest,
            "output_digest": _digest_of(products),
            "products": products,
            "scores": run.scores,
            "seconds": round(seconds, 2),
            "version": importlib.metadata.version("cogview"),
            "process": os.getpid(),
        },
    )


def _digest_of(products: Mapping[str, Mapping[str, Any]]) -> str:
    listing = "\n".join(f"{name} {products[name]['sha256']}" for name in sorted(products))
    return hashlib.sha256(listing.encode()).hexdigest()
