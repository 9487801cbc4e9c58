"""Five people judge in five browsers at once while the server is killed again and again: no vote lost, none doubled.

Command: make verify NAME=human_evaluation [ARGS="--root runs/smoke --kills 3"]
Starts `python -m pipelines human_evaluation smoke` on the pictures that a finished chain has drawn, beside blurred
drawings of the same scenes as another system's and the truth through the image tokenizer. In each of five headless
Chromiums, every one a browser of its own, the real page is filled in and sent, with scores that follow from evaluator
and place. The server gets SIGKILL in the middle of this and is started anew; the pages are left to themselves. What
each page saw acknowledged is written down by the page as it arrives, and is looked for in the database afterwards.
"""

import asyncio
import json
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import ImageFilter

from benchmarks.browser import Tab, find_browser, open_tab
from benchmarks.chains import add_root, stage_folders
from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from cogview.evaluation.attributes import scene_from_json
from cogview.evaluation.human_votes import SCALES
from cogview.scenes.scene import draw_scene
from pipelines.judging.ballots import VOTES_FOLDER, VOTES_NAME
from pipelines.runtime.chain import latest_output

BROWSERS, EACH, REPEATED, PLANTED = 5, 16, 2, 2
TOTAL = BROWSERS * (EACH + REPEATED + PLANTED)
GROUPS = 40
PATIENCE = 600.0  # seconds after which the measurement has failed
LOOK_SECONDS = 0.05  # between two looks at a page
Key = tuple[str, int]
Said = tuple[list[tuple[int, ...]], tuple[int, ...]]
BARS = (
    Bar(figure="browsers", op="==", value=BROWSERS),
    Bar(figure="kills", op=">=", value=3),
    Bar(figure="votes/acknowledged", op="==", value=TOTAL),
    Bar(figure="votes/sent more than once", op=">=", value=1),  # else no kill has met a vote
    Bar(figure="votes/lost", op="==", value=0),
    Bar(figure="votes/doubled", op="==", value=0),
    Bar(figure="votes/different", op="==", value=0),
    Bar(figure="votes/beyond those sent", op="==", value=0),
    Bar(figure="database/damage", op="==", value=0),
)
# Written down before the page hears of it: what was sent, what was acknowledged, and how long that took.
LISTENER = """
window.sent = []; window.acknowledged = []; window.milliseconds = [];
const plainFetch = window.fetch;
window.fetch = async (path, options) => {
  const began = performance.now();
  if (path === "/vote") window.sent.push(options.body);
  const answer = await plainFetch(path, options);
  if (path === "/vote" && answer.ok) {
    window.acknowledged.push(options.body);
    window.milliseconds.push(performance.now() - began);
  }
  return answer;
};
"""
# Fills in the group that is shown, by its place and the evaluator, sends it, and tells what the page has seen so far.
JUDGE = """
(() => {
  const isShown = !$("ballot").hidden && ballot && cards.length === ballot.pictures.length;
  if (isShown && window.judged !== ballot.place) {
    window.judged = ballot.place;
    const start = ballot.place * 7 + me.name.charCodeAt(me.name.length - 1);
    cards.forEach((card, number) => Object.entries(about.scales).forEach(([scale, highest], line) => {
      const value = 1 + (start + 3 * number + line) % highest;
      document.querySelector(`input[name="${scale}-${number}"][value="${value}"]`).click();
    }));
    document.querySelectorAll("button.best")[start % cards.length].click();
    $("next").click();
  }
  const { sent, acknowledged, milliseconds } = window;
  return { sent, acknowledged, milliseconds, done: !$("done").hidden };
})()
"""


@dataclass(kw_only=True)
class Server:
    """The server as a user would start it, on one port; it can be killed and started again."""

    words: list[str]
    port: int
    process: "subprocess.Popen[str] | None" = None
    seconds_to_start: list[float] = field(default_factory=list)

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        started = time.monotonic()
        self.process = await asyncio.to_thread(self._start)
        self.seconds_to_start.append(time.monotonic() - started)

    def kill(self) -> None:
        """SIGKILL: nothing that it would still like to do is done."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(self.words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if not any(line.startswith("Evaluators: ") for line in process.stdout):
            raise UnmeasuredError(f"the server did not start; it ended with {process.wait()}")
        return process


@dataclass(kw_only=True)
class Page:
    """What one page has seen so far: the bodies of votes that it sent, and of those that were acknowledged."""

    sent: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    is_done: bool = False


def measure(*, root: Path, kills: int) -> Figures:
    """Judge, kill, and compare what was acknowledged with what is on the disk."""
    if find_browser() is None:
        raise UnmeasuredError("no Chromium is installed; install one, such as the package chromium")
    folders = stage_folders(root, "generate", "train_image_tokenizer")
    with tempfile.TemporaryDirectory(prefix="cogview-human-evaluation-") as name:
        folder = Path(name)
        blur_scenes(folders["generate"], folder / "other")
        port = free_port()
        words = [sys.executable, "-m", "pipelines", "human_evaluation", "smoke", f"--root={folder / 'runs' / 'smoke'}"]
        words += ["--models", f"CogView={folders['generate']}", f"blurred drawings={folder / 'other'}"]
        words += [f"--image-tokenizer={folders['train_image_tokenizer']}", f"--port={port}", f"--num-groups={GROUPS}"]
        words += [f"--each={EACH}", f"--repeated={REPEATED}", f"--planted={PLANTED}"]
        server = Server(words=words, port=port)
        started = time.monotonic()
        pages = asyncio.run(judge(server, kills=kills))
        seconds = time.monotonic() - started
        study = latest_output("human_evaluation", flag="--study", root=folder / "runs" / "smoke")
        database = study / VOTES_FOLDER / VOTES_NAME
        milliseconds = sorted(value for page in pages for value in page.milliseconds)
        return {
            "browsers": BROWSERS,
            "kills": kills,
            **compare(pages, stored_votes(database)),
            "database/damage": damage(database),
            "seconds/median of a vote": statistics.median(milliseconds) / 1000,
            "seconds/longest of a vote": milliseconds[-1] / 1000,
            "seconds/median to start the server again": statistics.median(server.seconds_to_start[1:] or [0.0]),
            "seconds/everything": seconds,
        }


def blur_scenes(drawn: Path, folder: Path) -> None:
    """The scenes that the chain was asked for, drawn and blurred: the folder of another system, named by captions."""
    folder.mkdir(parents=True)
    for row in pq.read_table(drawn / "samples.parquet").to_pylist():
        picture = draw_scene(scene_from_json(row["scene"])).filter(ImageFilter.GaussianBlur(2))
        picture.save(folder / f"{row['prompt'].replace(' ', '_')}.png")


async def judge(server: Server, *, kills: int) -> list[Page]:
    """All five judge to their end; the server is killed whenever another share of the votes is acknowledged."""
    await server.start()
    pages = [Page() for _ in range(BROWSERS)]
    try:
        async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
            tabs = [await stack.enter_async_context(open_tab()) for _ in range(BROWSERS)]
            say(f"{BROWSERS} browsers are open")
            async with asyncio.TaskGroup() as group:
                for number, (tab, page) in enumerate(zip(tabs, pages, strict=True)):
                    group.create_task(judge_all(tab, page, name=f"evaluator {number}", port=server.port))
                for number in range(1, kills + 1):
                    await until_voting(pages, TOTAL * number // (kills + 1))
                    await asyncio.to_thread(server.kill)
                    say(f"killed after {sum(len(page.acknowledged) for page in pages)} votes; starting again")
                    await server.start()
    finally:
        server.kill()
    return pages


async def judge_all(tab: Tab, page: Page, *, name: str, port: int) -> None:
    """One evaluator, from joining to the end."""
    await tab.call("Page.addScriptToEvaluateOnNewDocument", source=LISTENER)
    await tab.go(f"http://127.0.0.1:{port}/")
    await tab.wait_for("!document.querySelector('#join').hidden")
    await tab.write("#name", name)
    await tab.click("#begin")
    while not page.is_done:
        state = await tab.evaluate(JUDGE)
        page.sent, page.acknowledged = state["sent"], state["acknowledged"]
        page.milliseconds, page.is_done = state["milliseconds"], state["done"]
        await asyncio.sleep(LOOK_SECONDS)


async def until_voting(pages: Sequence[Page], wanted: int) -> None:
    """Until so many votes are acknowledged, and at the last look a page waited for the answer to one."""
    while sum(len(page.acknowledged) for page in pages) < wanted or not any(
        len(set(page.sent)) > len(page.acknowledged) for page in pages
    ):
        if all(page.is_done for page in pages):
            raise UnmeasuredError("everything was judged before the server could be killed; raise EACH")
        await asyncio.sleep(LOOK_SECONDS / 10)


def stored_votes(database: Path) -> dict[Key, list[Said]]:
    """(evaluator, place) -> what is in the file, read without the code that wrote it."""
    found: dict[Key, list[Said]] = {}
    with closing(sqlite3.connect(database)) as connection:
        votes = connection.execute(
            "SELECT number, name, place, best FROM votes JOIN evaluators ON evaluators.id = evaluator"
        ).fetchall()
        for number, name, place, best in votes:
            rows = connection.execute(f"SELECT model, {', '.join(SCALES)} FROM scores WHERE vote = ?", (number,))
            scores = {model: tuple(values) for model, *values in rows}
            found.setdefault((name, place), []).append((sorted(scores.values()), scores[best]))
    return found


def compare(pages: Sequence[Page], stored: Mapping[Key, Sequence[Said]]) -> dict[str, float]:
    """Acknowledged votes that are not in the file, are there twice, or say something else there.

    Scores are compared in sorted order: in which order the pictures were shown is the server's to know.
    """
    acknowledged = [json.loads(body) for page in pages for body in page.acknowledged]
    sent = [json.loads(body) for page in pages for body in page.sent]
    keys = {key_of(body) for body in acknowledged}
    return {
        "votes/acknowledged": len(keys),
        "votes/sent more than once": len(sent) - len({key_of(body) for body in sent}),
        "votes/in the file": sum(map(len, stored.values())),
        "votes/lost": sum(key not in stored for key in keys),
        "votes/doubled": sum(len(own) - 1 for own in stored.values()),
        "votes/different": sum(said(body) not in stored.get(key_of(body), [said(body)]) for body in acknowledged),
        "votes/beyond those sent": len(stored.keys() - {key_of(body) for body in sent}),
    }


def key_of(body: Mapping[str, Any]) -> Key:
    """Whose vote this is, and on which of their groups."""
    return body["name"], body["place"]


def said(body: Mapping[str, Any]) -> Said:
    """A vote's scores, sorted, and those of its best picture."""
    scores = [tuple(own[name] for name in SCALES) for own in body["scores"]]
    return sorted(scores), scores[body["best"]]


def damage(database: Path) -> int:
    """What SQLite's own check of the file has to say, in lines; 0 for a sound file."""
    with closing(sqlite3.connect(database)) as connection:
        lines = [row[0] for row in connection.execute("PRAGMA integrity_check")]
        broken = connection.execute("PRAGMA foreign_key_check").fetchall()
    return len([line for line in lines if line != "ok"]) + len(broken)


def free_port() -> int:
    """A port that nobody listens on just now; the server takes it again after each kill."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    add_root(parser)
    parser.add_argument("--kills", type=int, default=3, help="of the server, with SIGKILL (default: 3)")
    flags = parser.parse_args()
    return verify(
        "human_evaluation",
        lambda: measure(root=flags.root, kills=flags.kills),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
