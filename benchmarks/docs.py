"""Every command of the pages, carried out in a fresh copy of the checkout, as somebody new to the project would.

Command: make verify NAME=docs [ARGS="--workspace /folder --only captioning"]
Every line of code of README.md, docs/, clusters/ and the other pages that calls make or a job, each once, in reading
order. The copy has the tracked files as they are, with changes that are not committed; the first command sets up its
`.venv`, and is the whole `make pretrain`. Of the others:

* what only the reader has (/data/photos, s3://bucket/web, /weights/cogview-base, an image search, ...) gets a stand-in,
  which `benchmarks/stand_ins.py` makes from the demo's scenes and random weights; remote folders are local ones here,
  and web sites are a server on the loopback address. `4be1...` is the folder that the last run of that job left;
* trainings are cut to a few steps, evaluations to a few captions, `make test` to one folder of tests, by the flags in
  `benchmarks/page_rules.py`. The roads before `make finetune-fashion` and `make pretrain-coglm` take no flags of ours,
  and run whole;
* what needs GPUs or a cluster runs with the preset `smoke`, on a Ray head of this machine; with --plan it runs as is;
* servers are asked for their page, where people judge for a vote as well, and then stopped by Ctrl-C.

A command that needs the outcome of another one is given it (`first` in the rules), as its page says.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.human_evaluation import free_port
from benchmarks.page_rules import DEMO, PHOTOS, Rule, rule_of, treated
from benchmarks.pages import PAGES, all_commands, broken_links, links
from benchmarks.processes import ProcessWatch, fresh_environment
from benchmarks.stand_ins import LOOPBACK, keep_outputs, web, write_inputs
from cogview.errors import ConfigError
from cogview.evaluation.human_votes import SCALES
from cogview.shards.manifest import read_json
from pipelines.runtime.chain import output_of

BARS = (
    Bar(figure="commands", op=">", value=50),
    Bar(figure="commands/failed", op="==", value=0),
    Bar(figure="commands/not run", op="==", value=0),
    Bar(figure="processes left", op="==", value=0),
    Bar(figure="links", op=">", value=50),
    Bar(figure="links/broken", op="==", value=0),
)
PATIENCE_S = 1200.0  # of one command
GRACE_S = 10.0  # for what a command started, after its own end
LONGEST = 10  # commands whose time is told
TAIL = 2000  # characters of a failed command's words
ROADS = r"make (pretrain|reproduce)( |$)|python -m pipelines road "
NEWEST = re.compile(r"(runs/\w+)/(\w+)/4be1\.\.\.")
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
STOPPED = (0, 130, -signal.SIGINT)  # a server that ended well, and make, which is interrupted as well


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a command. carried_out: the words that ran; error: why it failed, or empty."""

    command: str
    carried_out: str
    seconds: float
    error: str = ""


class Room:
    """A fresh copy of the checkout with all that a reader has; commands are carried out in it, one after the other."""

    def __init__(self, folder: Path, *, web_port: int) -> None:
        self.checkout, self.inputs, self.logs = folder / "checkout", folder / "inputs", folder / "logs"
        self._kept = folder / "outcomes.json"  # by which an interrupted call goes on
        self.outcomes = (
            {row["command"]: Outcome(**row) for row in read_json(self._kept)} if self._kept.is_file() else {}
        )
        self.outcomes = {command: outcome for command, outcome in self.outcomes.items() if not outcome.error}
        self.kept = frozenset(self.outcomes)
        self._watch = ProcessWatch(environment_of(folder / "home", bin_folder=self.checkout / ".venv" / "bin"))
        self._environment = dict(self._watch.environment)
        self._web_port = web_port
        self._road = ""  # the command whose chain ran last
        self.processes_left = 0
        self.logs.mkdir(parents=True, exist_ok=True)
        copy_checkout(self.checkout)
        if not self.inputs.is_dir():
            say("making stand-ins")
            write_inputs(self.inputs)

    def carry_out(self, command: str) -> Outcome:
        """Carry out what a command needs, and the command; the outcome of its first time is kept, or of its failure."""
        rule = rule_of(command)
        for needed in rule.first:
            if needed != self._road if needed in (DEMO, PHOTOS) else needed not in self.outcomes:
                self.carry_out(needed)
        outcome = self._run(command, rule=rule)
        if outcome.error or command not in self.outcomes:
            self.outcomes[command] = outcome
            self._kept.write_text(json.dumps([asdict(one) for one in self.outcomes.values()], ensure_ascii=False))
        if re.match(ROADS, command):
            self._road = command
        if command == DEMO and not outcome.error and not (self.inputs / "own").exists():
            keep_outputs(self.checkout / "runs" / "smoke", self.inputs)
        return self.outcomes[command]

    def _run(self, command: str, *, rule: Rule) -> Outcome:
        log = self.logs / f"{len(list(self.logs.iterdir())):03d}.txt"
        started, words = time.monotonic(), command
        try:
            with self._cluster() if rule.is_cluster else nullcontext("") as cluster:
                places = {"web": self._web_port, "port": free_port(), "cluster": cluster}
                words = self._folders_named(treated(command, inputs=self.inputs, places=places))
                say(f"{log.name}: {words}")
                error = self._ask(words, log) if rule.is_server else self._finish(words, log)
        except (UnmeasuredError, ConfigError) as reason:
            error = str(reason)
        self.end_processes(seconds=GRACE_S)
        if error:
            say(f"FAILED {command}: {error}")
            say(log.read_text(errors="replace")[-TAIL:] if log.is_file() else "")
        return Outcome(command=command, carried_out=words, seconds=time.monotonic() - started, error=error)

    def _start(self, words: str, log: Path) -> subprocess.Popen[bytes]:
        with open(log, "wb") as file:
            return subprocess.Popen(
                shlex.split(words),
                cwd=self.checkout,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _finish(self, words: str, log: Path) -> str:
        """Run to the end; what went wrong."""
        process = self._start(words, log)
        try:
            code = process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"not done after {PATIENCE_S:.0f} s"
        return f"ended with {code}" if code else ""

    def _ask(self, words: str, log: Path) -> str:
        """Start a server, ask for its page, vote if there is something to judge, press Ctrl-C; what went wrong."""
        process = self._start(words, log)
        error = "no page within its time"
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            found = ADDRESS.search(log.read_text(errors="replace"))
            if found and page_status(found[0]) == 200:
                if "human-evaluation" in words:
                    vote(found[0])
                error = ""
                break
            time.sleep(0.5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            code = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            return "does not end by Ctrl-C"
        if code not in STOPPED or "Traceback" in log.read_text(errors="replace"):
            error = error or f"ended with {code} after Ctrl-C"
        return error

    def end_processes(self, *, seconds: float) -> None:
        """End what a command left behind after some seconds of grace, and count it."""
        for process in self._watch.wait_for_end(seconds=seconds):
            self.processes_left += 1
            say(f"left behind: {process}")
            process.kill()

    def _folders_named(self, words: str) -> str:
        """`runs/smoke/generate/4be1...` as the folder of that job in the chain that ran last, or else the newest."""

        def folder(found: re.Match[str]) -> str:
            return str(output_of(found[2], flag="--root", root=self.checkout / found[1]))

        return NEWEST.sub(folder, words)

    @contextmanager
    def _cluster(self) -> Iterator[str]:
        """A Ray head with its dashboard; yields the address that jobs are submitted to."""
        log = self.logs / "cluster.txt"
        if error := self._finish("make .venv/.ready-cluster", log):
            raise UnmeasuredError(f"the extra for clusters cannot be installed: {error}")
        port = free_port()
        self._environment["RAY_AUTH_MODE"] = "token"  # Ray made one in the home when it ran for the first time
        head = self._start(
            f"ray start --head --block --port {free_port()} --dashboard-host {LOOPBACK} --dashboard-port {port}"
            " --disable-usage-stats",
            log,
        )
        address = f"http://{LOOPBACK}:{port}"
        deadline = time.monotonic() + 120
        try:
            while not page_status(address):
                if head.poll() is not None or time.monotonic() > deadline:
                    raise UnmeasuredError(f"no Ray head: {log.read_text()[-TAIL:]}")
                time.sleep(1)
            yield address
        finally:
            del self._environment["RAY_AUTH_MODE"]
            head.terminate()
            head.wait(timeout=60)


def environment_of(home: Path, *, bin_folder: Path) -> dict[str, str]:
    """A newcomer's environment, in which `python` and `ray` are the copy's as soon as it has them."""
    fresh = fresh_environment(home)
    kept = {name: os.environ[name] for name in ("TORCH", "PYTHON") if name in os.environ}
    return {**fresh, **kept, "PATH": f"{bin_folder}{os.pathsep}{fresh['PATH']}"}


def copy_checkout(target: Path) -> None:
    """The tracked files as they are now. UnmeasuredError outside a checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    names = [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]
    if listed.returncode or not names:
        raise UnmeasuredError(f"{REPOSITORY} is no checkout of git: {listed.stderr.strip()}")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target / name)


def page_status(address: str) -> int:
    """The HTTP status of a page; 0 if nobody answers."""
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return int(answer.status)
    except OSError as error:
        return int(getattr(error, "code", 0))


def vote(address: str) -> None:
    """Judge every group that an evaluator is shown, as the page does: the first picture is the best."""

    def post(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{address}{path}", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    joined = post("/join", {"name": "Ada"})
    who = {"name": "Ada", "code": joined["code"]}
    while "place" in (ballot := post("/ballot", who)):
        scores = [dict.fromkeys(SCALES, 3) for _ in ballot["pictures"]]
        post("/vote", {**who, "place": ballot["place"], "best": 0, "scores": scores, "seconds": 2.0})


def measure(*, workspace: Path | None, only: str) -> Figures:
    """Check the links, carry out the commands, and count."""
    started = time.monotonic()
    found = all_commands()
    for command in found:
        rule_of(command)  # better known before the first one runs
    folder = workspace or Path(tempfile.mkdtemp(prefix="cogview-docs-"))
    broken = [words for page in PAGES for words in broken_links(page)]
    for words in broken:
        say(f"broken link: {words}")
    with web() as port:
        room = Room(folder.absolute(), web_port=port)
        try:
            outcomes = [room.outcomes.get(command) or room.carry_out(command) for command in found if only in command]
        finally:
            room.end_processes(seconds=0)
    failed = [outcome for outcome in outcomes if outcome.error]
    if workspace is None and not failed:
        shutil.rmtree(folder, ignore_errors=True)
    elif failed:
        say(f"the logs are in {room.logs}")
    return {
        **counted(found, outcomes),
        "processes left": room.processes_left,
        "commands/carried out by an earlier call": sum(only in command for command in room.kept),
        "links": sum(len(links(page)) for page in PAGES),
        "links/broken": len(broken),
        "seconds/total": time.monotonic() - started,
        **longest(outcomes),
    }


def counted(found: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many commands there are, and what became of them."""
    as_written = sum(outcome.carried_out == outcome.command for outcome in outcomes)
    return {
        "commands": len(found),
        "commands/as they stand": as_written,
        "commands/with stand-ins or cut": len(outcomes) - as_written,
        "commands/not run": len(found) - len(outcomes),
        "commands/failed": sum(bool(outcome.error) for outcome in outcomes),
    }


def longest(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The seconds of those that took longest."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.seconds, reverse=True)[:LONGEST]
    return {f"seconds/{outcome.command}": outcome.seconds for outcome in ordered}


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--workspace", type=Path, help="folder of the copy, where a later call goes on (default: a new one)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="carry out only commands with this text")
    flags = parser.parse_args()
    # Begun in the background by a shell, this process would ignore Ctrl-C, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return verify("docs", lambda: measure(workspace=flags.workspace, only=flags.only), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
