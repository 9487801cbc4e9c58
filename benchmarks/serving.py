"""200 clients at once, 1,000 at once, clients that leave, and bad requests, against the real server of the smoke model.

Command: make verify NAME=serving [ARGS="--root runs/smoke"]
Starts `python -m pipelines serve smoke` on a free port. Each of 200 clients asks for one picture, or a few, of its own
prompt and seed at the same moment, half of them as a stream; who is sent away with 429 comes again after the seconds
that the server names. An answer counts as its own if its codes are those that the model draws here alone, for that
prompt and seed, in a batch of one. Times are from a client's first try to its answer, waiting included.
"""

import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.chains import add_root
from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from cogview.errors import CogViewError
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.scenes.scene import held_out_prompts
from pipelines.runtime.chain import fill_from_chain
from pipelines.runtime.jobs import given_folders
from pipelines.serve import PRESETS, SOURCES

MAX_WAITING = 64
CLIENTS, BURST, LEAVING = 200, 1000, 20
PATIENCE = 600.0  # seconds for a phase
EVENTS = "text/event-stream"
GOOD = {"prompt": "a large red circle on a blue background"}
JSON = {"Content-Type": "application/json"}
BAD_BODIES: Mapping[str, Any] = {
    "a prompt of 1 MB": {"prompt": "x" * 10**6},
    "an empty prompt": {"prompt": "  "},
    "a million pictures": {**GOOD, "candidates": 10**6},
    "minus one picture": {**GOOD, "candidates": -1},
    "temperature NaN": {**GOOD, "temperature": float("nan")},
    "temperature -1": {**GOOD, "temperature": -1},
    "temperature infinite": {**GOOD, "temperature": float("inf")},
    "top-k 0": {**GOOD, "top_k": 0},
    "a seed of 2^70": {**GOOD, "seed": 2**70},
    "a path": {**GOOD, "checkpoint": "../../etc"},
    "a list": [GOOD],
    "a text": "draw",
}
BAD_HEADERS: Mapping[str, Mapping[str, str]] = {
    "a foreign host": {**JSON, "Host": "evil.example"},
    "a foreign page": {**JSON, "Origin": "https://evil.example"},
    "a form": {"Content-Type": "application/x-www-form-urlencoded"},
}
BARS = (
    Bar(figure="clients", op=">=", value=CLIENTS),
    Bar(figure="answers/lost", op="==", value=0),
    Bar(figure="answers/unlike_drawn_alone", op="==", value=0),
    Bar(figure="queue/longest", op="<=", value=MAX_WAITING),
    Bar(figure="burst/neither_drawn_nor_sent_away", op="==", value=0),
    Bar(figure="left/still_at_work", op="==", value=0),
    Bar(figure="bad_inputs/not_refused", op="==", value=0),
    Bar(figure="open_host_without_token/refused", op="==", value=1),
    Bar(figure="server/failures", op="==", value=0),
    Bar(figure="server/exit_code", op="==", value=0),
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client got: its pictures, after so many tries and seconds; none if it was lost."""

    pictures: list[dict[str, Any]] | None
    tries: int
    seconds: float


def measure(*, root: Path) -> Figures:
    """All phases against one server."""
    painter = load_painter(root)
    orders = client_orders()
    figures: dict[str, float | int | str] = {"clients": len(orders)}
    started = time.monotonic()
    with running_server(root) as (url, server):
        figures["server/seconds_to_start"] = time.monotonic() - started
        answers, more = asyncio.run(visit(url, orders))
        figures |= more
        server.send_signal(signal.SIGTERM)
        figures["server/exit_code"] = server.wait(timeout=PATIENCE)
    figures |= times(answers)
    figures["open_host_without_token/refused"] = int(is_refused(root))
    say("drawing every picture again, alone")
    figures["answers/unlike_drawn_alone"] = sum(
        answer.pictures is not None and not is_own(answer.pictures, order, painter)
        for order, answer in zip(orders, answers, strict=True)
    )
    figures["answers/compared"] = sum(len(answer.pictures or ()) for answer in answers)
    return figures


def load_painter(root: Path) -> TextToImage:
    """The model that the server has, here."""
    try:
        folders = given_folders(fill_from_chain(PRESETS["smoke"], SOURCES, root=root), SOURCES)
        return TextToImage.load(**folders, device="cpu")
    except CogViewError as error:
        raise UnmeasuredError(str(error)) from error


def client_orders() -> list[dict[str, Any]]:
    """What the clients ask for: all prompts differ; some want several pictures, or other sampling."""
    prompts = held_out_prompts(CLIENTS, seed=1, two_shape_share=0.2)
    return [
        {
            "prompt": prompt.caption,
            "seed": 1000 * number,
            "candidates": 4 if number % 10 == 0 else 1,
            "temperature": 0.5 if number % 7 == 0 else 1.0,
        }
        for number, prompt in enumerate(prompts)
    ]


@contextmanager
def running_server(root: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of a server of its own, and its process."""
    server = subprocess.Popen(serve_command(root), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("CogView: ")), "")
        if not line:
            raise UnmeasuredError(f"the server did not start; it ended with {server.wait()}")
        yield line.split()[1], server
    finally:
        server.kill()
        server.wait()


def serve_command(root: Path, *flags: str) -> list[str]:
    """The server on a free port, with a queue that 200 clients overflow."""
    settings = ("--root", str(root), "--port", "0", "--max-waiting", str(MAX_WAITING), "--timeout", str(PATIENCE))
    return [sys.executable, "-m", "pipelines", "serve", "smoke", *settings, *flags]


def is_refused(root: Path) -> bool:
    """Whether the server declines to listen to other machines without a token."""
    command = serve_command(root, "--host", "0.0.0.0")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=PATIENCE)
    return done.returncode == 2 and "token" in done.stderr


async def visit(url: str, orders: list[dict[str, Any]]) -> tuple[list[Answer], Figures]:
    """All phases, one after another."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        say(f"{len(orders)} clients at once")
        answers = list(await asyncio.gather(*(ask(session, url, order, n) for n, order in enumerate(orders))))
        first = await state(session, url)
        say(f"{LEAVING} clients that leave")
        still = await leave(session, url)
        say(f"{BURST} clients at once, none of which comes again")
        burst = await asyncio.gather(*(once(session, url) for _ in range(BURST)))
        say("bad requests")
        not_refused = await bad_inputs(session, url)
        last = await state(session, url)
    return answers, {
        "queue/longest": last["longest_queue"],
        "queue/sent_away_of_200": first["refused"],
        "left/still_at_work": still,
        "burst/drawn": burst.count(200),
        "burst/sent_away": burst.count(429),
        "burst/neither_drawn_nor_sent_away": sum(status not in (200, 429) for status in burst),
        "bad_inputs/tried": len(BAD_BODIES) + len(BAD_HEADERS),
        "bad_inputs/not_refused": not_refused,
        "server/failures": last["failed"],
    }


async def ask(session: aiohttp.ClientSession, url: str, order: Mapping[str, Any], number: int) -> Answer:
    """One client: comes again when it is sent away."""
    headers = {"Accept": EVENTS if number % 2 else "application/json"}
    started, tries, pictures = time.monotonic(), 0, None
    while time.monotonic() - started < PATIENCE:
        tries += 1
        async with session.post(f"{url}/draw", json=order, headers=headers) as answer:
            if answer.status == 429:
                await asyncio.sleep(float(answer.headers["Retry-After"]))
                continue
            text = await answer.text()
            if answer.status == 200 and answer.content_type == EVENTS:
                name, data = text.strip().split("\n\n")[-1].split("\n")
                pictures = json.loads(data.removeprefix("data: ")).get("pictures") if name == "event: done" else None
            elif answer.status == 200:
                pictures = json.loads(text)["pictures"]
            break
    return Answer(pictures=pictures, tries=tries, seconds=time.monotonic() - started)


async def once(session: aiohttp.ClientSession, url: str) -> int:
    """The status of one good request; 0 when the connection failed."""
    try:
        async with session.post(f"{url}/draw", json={**GOOD, "seed": 1}) as answer:
            await answer.read()
            return answer.status
    except aiohttp.ClientError:
        return 0


async def leave(session: aiohttp.ClientSession, url: str) -> int:
    """Clients hang up after a moment; how many requests still wait or are at work when the server has noticed."""
    order = {**GOOD, "candidates": 8}
    leaving = [asyncio.create_task(session.post(f"{url}/draw", json=order)) for _ in range(LEAVING)]
    while not (await state(session, url))["waiting"]:
        await asyncio.sleep(0.01)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    before = (await state(session, url))["served"]
    async with session.post(f"{url}/draw", json=GOOD) as answer:  # its turn comes when the others are off the desk
        await answer.read()
    after = await state(session, url)
    say(f"{after['abandoned']} requests were given up, {after['served'] - before - 1} were drawn for nobody")
    return after["waiting"] + after["at_work"]


async def bad_inputs(session: aiohttp.ClientSession, url: str) -> int:
    """How many bad requests got anything but a 4xx with a sentence."""
    wrong = 0
    requests = [(name, json.dumps(body), JSON) for name, body in BAD_BODIES.items()]
    requests += [(name, json.dumps(GOOD), dict(headers)) for name, headers in BAD_HEADERS.items()]
    for name, body, headers in requests:
        async with session.post(f"{url}/draw", data=body, headers=headers) as answer:
            content = await answer.json()
            if not 400 <= answer.status < 500 or not content.get("error"):
                say(f"{name}: {answer.status} {content}")
                wrong += 1
    return wrong


async def state(session: aiohttp.ClientSession, url: str) -> dict[str, int]:
    """What the server says of its queue."""
    async with session.get(f"{url}/state") as answer:
        content: dict[str, int] = await answer.json()
        return content


def times(answers: list[Answer]) -> Figures:
    """How long the clients waited."""
    seconds = sorted(answer.seconds for answer in answers)
    return {
        "answers/lost": sum(answer.pictures is None for answer in answers),
        "seconds/median": statistics.median(seconds),
        "seconds/p95": seconds[int(0.95 * (len(seconds) - 1))],
        "seconds/longest": seconds[-1],
        "requests_per_second": len(answers) / seconds[-1],
        "tries/most": max(answer.tries for answer in answers),
    }


def is_own(pictures: list[dict[str, Any]], order: Mapping[str, Any], painter: TextToImage) -> bool:
    """Whether these are the pictures of this prompt, seed and sampling."""
    sampling = SamplingConfig(temperature=order["temperature"], top_k=PRESETS["smoke"].sampling.top_k)
    seeds = range(order["seed"], order["seed"] + order["candidates"])
    if [picture["seed"] for picture in pictures] != list(seeds):
        return False
    for seed, picture in zip(seeds, pictures, strict=True):
        alone = painter.codes([order["prompt"]], seeds=[seed], sampling=sampling)
        if alone.flatten().tolist() != picture["codes"]:
            return False
    return True


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    add_root(parser)
    flags = parser.parse_args()
    return verify("serving", lambda: measure(root=flags.root), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
