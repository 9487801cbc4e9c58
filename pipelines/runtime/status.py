"""What is known of past runs, from the disk alone: it needs neither Ray nor a running chain.

In: `<root>/chain.json`, and the shards below the root. Out: the text or JSON of `status`, the closing words of a chain,
and MLflow's pages.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cogview.errors import ConfigError, ManifestError
from pipelines.runtime.chain import CHAIN_NAME, read_chain, score_words
from pipelines.runtime.display import duration
from pipelines.runtime.locks import is_locked
from pipelines.runtime.mlflow_run import DATABASE_NAME, artifact_folder, runs_folder, tracking_uri
from pipelines.runtime.shard_status import plain_progress, shard_lines, shard_progress

REPORT_NAME = "report.html"
GRID_NAME = "grid.png"
DASHBOARD_ENVIRONMENT = {  # pages only: no statistics for others, no workers for jobs of MLflow's own
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
START_PAGE = "/#/experiments?workflowType=machine_learning"  # else MLflow shows its charts of language agents first
HEADLINE_JOB = "evaluate"  # its scores are those of the whole chain


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What to show.

    root: a run such as runs/smoke, also as the first word (default: the one that started last); json: for programs.
    """

    root: Path | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class DashboardConfig:
    """What to serve. root: any run beside the database (default: the one that started last); port: on 127.0.0.1."""

    root: Path | None = None
    port: int = 5000


def run_verb(verb: str, words: Sequence[str], *, runs: Path, out: TextIO) -> None:
    """Run `status`, `doctor` or `dashboard` with its flags."""
    import tyro

    prog = f"python -m pipelines {verb}"
    if verb == "doctor":
        from pipelines.runtime import doctor

        doctor.show_findings(tyro.cli(doctor.DoctorConfig, args=list(words), prog=prog), out=out)
        return
    if verb == "dashboard":
        dashboard = tyro.cli(DashboardConfig, args=list(words), prog=prog)
        serve_dashboard(dashboard.root or latest_root(runs), port=dashboard.port, out=out)
        return
    given = ["--root", *words] if words and not words[0].startswith("-") else list(words)
    config = tyro.cli(StatusConfig, args=given, prog=prog)
    root = (config.root or latest_root(runs)).resolve()
    show_status(root, as_json=config.json, out=out)


def show_status(root: Path, *, as_json: bool, out: TextIO) -> None:
    """The chain under a root, and how far each of its shard jobs is; shards alone where jobs ran without a chain."""
    shards = shard_progress(root)
    chain = current_chain(root) if (root / CHAIN_NAME).is_file() or not shards else None
    if as_json:
        plain = as_plain(chain, root=root) if chain else {"root": str(root)}
        out.write(json.dumps({**plain, "shards": plain_progress(shards)}, indent=2, ensure_ascii=False) + "\n")
        return
    lines = chain_lines(chain, root=root) if chain else [f"{shown_path(root)}: no chain has run here, but jobs have"]
    out.write("\n".join([*lines, *(["shards:"] if shards else []), *shard_lines(shards)]) + "\n")


def latest_root(runs: Path) -> Path:
    """The run whose chain started last. ConfigError when none ever did."""
    started: list[tuple[str, Path]] = []
    for path in runs.glob(f"*/{CHAIN_NAME}"):
        try:
            started.append((str(read_chain(path.parent)["started"]), path.parent))
        except ManifestError:
            continue  # a damaged run does not hide the others
    if not started:
        raise ConfigError(f"{runs} has no run yet; run `make pretrain`, or give --root")
    return max(started)[1]


def current_chain(root: Path) -> dict[str, Any]:
    """The chain under `root`. One that says it is running, though no process holds its lock, was killed."""
    chain = read_chain(root)
    if chain["state"] == "running" and not is_locked(root):
        chain["state"] = "interrupted"
        for stage in chain["stages"]:
            if stage["state"] == "running":
                stage["state"] = "interrupted"
    return chain


def as_plain(chain: Mapping[str, Any], *, root: Path) -> dict[str, Any]:
    """The chain for programs: absolute paths, the headline scores, and where everything lies."""
    stages = [
        {**stage, "output": str(root / stage["output"]) if stage.get("output") else None} for stage in chain["stages"]
    ]
    return {**chain, "root": str(root), "stages": stages, "scores": headline_scores(chain), "paths": products(root)}


def chain_lines(chain: Mapping[str, Any], *, root: Path) -> list[str]:
    """The chain for people: a line for each stage, the scores, the paths."""
    width = max(len(stage["job"]) for stage in chain["stages"])
    lines = [f"{shown_path(root)}: {chain['state']}, started {chain['started']}, {duration(chain['seconds'])}"]
    for stage in chain["stages"]:
        seconds = duration(stage["seconds"]) if "seconds" in stage else ""
        note = stage.get("error") or score_words(stage.get("scores", {}))
        lines.append(f"  {stage['job']:<{width}}  {stage['state']:<11}  {seconds:>8}  {note}".rstrip())
    if chain["state"] in ("failed", "interrupted") and chain.get("command"):
        lines.append(f"continue with: {chain['command']}")
    return [*lines, *product_lines(chain, root=root)]


def product_lines(chain: Mapping[str, Any], *, root: Path) -> list[str]:
    """The scores of a chain and where its pictures, report and MLflow pages are."""
    paths = products(root)
    names = {"grid": "sample grid", "report": "report", "mlflow": "MLflow"}
    lines = score_lines(headline_scores(chain))
    for name, title in names.items():
        if name in paths:
            hint = "  (make dashboard opens its pages on 127.0.0.1)" if name == "mlflow" else ""
            lines.append(f"{title + ':':<13}{shown_path(Path(paths[name])) if name != 'mlflow' else paths[name]}{hint}")
    return lines


def products(root: Path) -> dict[str, str]:
    """What there is to look at under a root: name -> absolute path, or the address of MLflow's store."""
    found = {"grid": root / GRID_NAME, "report": root / REPORT_NAME, "log": root / "log.txt"}
    paths = {name: str(path) for name, path in found.items() if path.is_file()}
    if os.environ.get("MLFLOW_TRACKING_URI") or (runs_folder(root) / DATABASE_NAME).is_file():
        paths["mlflow"] = tracking_uri(root)
    return paths


def headline_scores(chain: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the evaluation, or of the last stage that has any."""
    scored = [stage for stage in chain["stages"] if stage.get("scores")]
    headline = [stage for stage in scored if stage["job"] == HEADLINE_JOB] or scored[-1:]
    return dict(headline[0]["scores"]) if headline else {}


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """One aligned line for each score."""
    width = max((len(name) for name in scores), default=0)
    return [
        f"  {name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in scores.items()
    ]


def shown_path(path: Path) -> str:
    """A path as short as it can be copied: relative below the current folder, else absolute."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


def serve_dashboard(root: Path, *, port: int, out: TextIO) -> None:
    """Run MLflow's server for the runs beside `root`, on 127.0.0.1 only, until Ctrl-C or `kill`.

    ConfigError when nothing is there, or when the server ends by itself.
    """
    uri = tracking_uri(root)
    if uri.startswith(("http://", "https://")):
        out.write(f"MLFLOW_TRACKING_URI names a server, which has its own pages: {uri}\n")
        return
    database = runs_folder(root) / DATABASE_NAME
    if not os.environ.get("MLFLOW_TRACKING_URI") and not database.is_file():
        raise ConfigError(
            f"{database} does not exist: nothing was tracked there yet; run `make pretrain`, or give --root"
        )
    _check_port(port)
    out.write(f"MLflow: http://127.0.0.1:{port}{START_PAGE}  (Ctrl-C ends it)\n")
    out.flush()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", uri, "--default-artifact-root", artifact_folder(root).as_uri()),
    ]
    # In a session of its own: Ctrl-C reaches this process alone, for the server would answer it with a traceback.
    server = subprocess.Popen(command, env={**os.environ, **DASHBOARD_ENVIRONMENT}, start_new_session=True)
    try:
        code = server.wait()
    except KeyboardInterrupt:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        out.write("dashboard: ended\n")
    else:
        raise ConfigError(f"MLflow's server ended by itself with {code}; its words stand above")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port={port}: {error}; give another --port") from error
