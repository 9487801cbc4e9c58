"""The server: every answer is that of its own request, bad ones get a reason, others stay out, nothing piles up."""

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

from cogview.errors import ConfigError
from cogview.evaluation.grids import to_pictures
from cogview.sampling.choice import SamplingConfig
from pipelines import serve
from pipelines.serving import desk
from pipelines.serving.gate import SECURITY
from pipelines.serving.listening import read_token
from pipelines.serving.orders import MagnifyOrder
from pipelines.serving.studio import Studio
from tests.pipelines.served import SECONDS, Served, paused, serving, until, without_skills, write_config
from tests.pipelines.trained_folders import GRID

PROMPTS = (
    "a large red circle on a blue background",
    "白色背景上的一个大红色圆形",
    "a star",
    "<script>alert(1)</script>",
)
TOKEN = "a-secret-for-this-test"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> serve.Config:
    return write_config(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def studio(config: serve.Config, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return serve.load_studio(config, root=tmp_path_factory.mktemp("root"))


def visit(
    studio: Studio,
    config: serve.Config,
    work: Callable[[Served], Awaitable[None]],
    *,
    is_working: bool = True,
    **gate: str,
) -> None:
    async def run() -> None:
        async with asyncio.timeout(SECONDS), serving(studio, config, is_working=is_working, **gate) as served:
            await work(served)

    asyncio.run(run())


async def post(served: Served, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    async with served.session.post(served.url + path, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


def alone(studio: Studio, prompt: str, seed: int, sampling: SamplingConfig) -> list[int]:
    codes: list[int] = studio.painter.codes([prompt], seeds=[seed], sampling=sampling).flatten().tolist()
    return codes


def test_every_answer_is_that_of_its_prompt_and_seed(studio: Studio, config: serve.Config) -> None:
    orders = [
        {"prompt": PROMPTS[n % 4], "seed": 100 * n, "candidates": 1 + n % 3, "top_k": 12 if n % 5 else 3}
        for n in range(16)
    ]

    async def work(served: Served) -> None:
        answers = await asyncio.gather(*(post(served, "/draw", order) for order in orders))
        for order, (status, answer) in zip(orders, answers, strict=True):
            assert status == 200
            assert [picture["seed"] for picture in answer["pictures"]] == [
                order["seed"] + number for number in range(order["candidates"])
            ]
            sampling = SamplingConfig(top_k=order["top_k"])
            for picture in answer["pictures"]:
                assert picture["codes"] == alone(studio, order["prompt"], picture["seed"], sampling)
            ranked = sorted(answer["pictures"], key=lambda picture: picture["rank"])
            assert [picture["rank"] for picture in ranked] == list(range(order["candidates"]))
            assert [picture["cap_loss"] for picture in ranked] == sorted(picture["cap_loss"] for picture in ranked)
        assert served.desk.state()["served"] == 16
        assert served.desk.state()["longest_queue"] <= 16

    visit(studio, config, work)


def test_a_picture_carries_what_it_takes_to_draw_it_again(studio: Studio, config: serve.Config) -> None:
    async def work(served: Served) -> None:
        _, answer = await post(served, "/draw", {"prompt": PROMPTS[1]})
        (picture,) = answer["pictures"]
        image = Image.open(io.BytesIO(base64.b64decode(picture["png"])))
        assert image.text["prompt"] == PROMPTS[1]
        assert image.text["seed"] == str(picture["seed"])
        codes_1hw = studio.painter.codes([PROMPTS[1]], seeds=[picture["seed"]], sampling=config.sampling)
        expected = to_pictures(studio.painter.decode(codes_1hw))[0]
        assert np.array_equal(np.asarray(image), np.asarray(expected))

    visit(studio, config, work)


def test_a_stream_shows_the_rows_as_they_are_drawn(studio: Studio, config: serve.Config) -> None:
    async def work(served: Served) -> None:
        order = {"prompt": PROMPTS[0], "seed": 7, "candidates": 2}
        async with served.session.post(
            f"{served.url}/draw", json=order, headers={"Accept": "text/event-stream"}
        ) as answer:
            assert answer.content_type == "text/event-stream"
            text = await answer.text()
        events = [part.split("\n") for part in text.strip().split("\n\n")]
        assert [name for name, _ in events] == ["event: queued", *["event: rows"] * (GRID - 1), "event: done"]
        values = [json.loads(data.removeprefix("data: ")) for _, data in events]
        assert values[0] == {"seeds": [7, 8]}
        for rows, value in enumerate(values[1:-1], start=1):
            sizes = {Image.open(io.BytesIO(base64.b64decode(png))).size for png in value["pngs"]}
            assert sizes == {(8 * GRID, 8 * rows)}
            assert len(value["pngs"]) == 2
        _, whole = await post(served, "/draw", order)
        assert values[-1] == whole

    visit(studio, config, work)


GOOD: dict[str, Any] = {"prompt": "a star"}
BAD_INPUTS: dict[str, tuple[Any, int, str]] = {
    "a prompt of 1 MB": ({"prompt": "x" * 10**6}, 413, "too large"),
    "a long prompt": ({"prompt": "x" * 1001}, 413, "1001 characters"),
    "no prompt": ({}, 422, "prompt=null"),
    "an empty prompt": ({"prompt": " \n"}, 422, "say what to draw"),
    "a prompt of numbers": ({"prompt": 5}, 422, "prompt=5"),
    "a million pictures": ({**GOOD, "candidates": 10**6}, 422, "candidates=1000000: give a whole number from 1 to 8"),
    "no picture": ({**GOOD, "candidates": 0}, 422, "candidates=0"),
    "true pictures": ({**GOOD, "candidates": True}, 422, "candidates=true"),
    "temperature NaN": ({**GOOD, "temperature": float("nan")}, 422, "NaN is not a number"),
    "temperature infinite": ('{"prompt": "a", "temperature": 1e999}', 422, "temperature=Infinity"),
    "temperature -1": ({**GOOD, "temperature": -1}, 422, "temperature=-1: give a number from 0 to 10"),
    "a huge temperature": (f'{{"prompt": "a", "temperature": {10**400}}}', 422, "temperature=1000"),
    "top-k 0": ({**GOOD, "top_k": 0}, 422, "top_k=0: give a whole number from 1 to 32"),
    "top-k of a half": ({**GOOD, "top_k": 0.5}, 422, "top_k=0.5"),
    "top-p 2": ({**GOOD, "top_p": 2}, 422, "top_p=2"),
    "a seed of 2^70": ({**GOOD, "seed": 2**70}, 422, "seed=1180591620717411303424"),
    "a field that is none": ({**GOOD, "path": "../../etc/passwd"}, 422, '"path" is no field'),
    "no JSON": ("{", 400, "not JSON"),
    "a list": ([1], 400, "not an object"),
    "endless brackets": ("[" * 60_000, 400, "RecursionError"),
    "bytes": (b"\xff\xfe\x00", 400, "not JSON"),
}


def test_bad_inputs_get_a_reason_and_harm_nobody(studio: Studio, config: serve.Config) -> None:
    async def work(served: Served) -> None:
        for name, (body, status, words) in BAD_INPUTS.items():
            data = body if isinstance(body, (str, bytes)) else json.dumps(body)
            async with served.session.post(
                f"{served.url}/draw", data=data, headers={"Content-Type": "application/json"}
            ) as answer:
                assert answer.status == status, name
                assert words in (await answer.json())["error"], name
                assert SECURITY.items() <= answer.headers.items()
        status, _ = await post(served, "/draw", {"prompt": "\ud800 \x00 \x1b[31m\u202e" + "[ROI1]" * 3})
        assert status == 200
        state = served.desk.state()
        assert (state["served"], state["failed"], state["waiting"]) == (1, 0, 0)

    visit(studio, config, work)


def test_only_requests_that_are_meant_for_this_server_are_answered(studio: Studio, config: serve.Config) -> None:
    async def work(served: Served) -> None:
        port = served.url.rpartition(":")[2]
        for host, status in {"evil.example": 421, f"10.0.0.1:{port}": 421, f"localhost:{port}": 200, "": 421}.items():
            assert (await post(served, "/draw", GOOD, Host=host))[0] == status, host
        for origin, status in {"https://evil.example": 403, "null": 403, served.url: 200}.items():
            assert (await post(served, "/draw", GOOD, Origin=origin))[0] == status, origin
        async with served.session.post(f"{served.url}/draw", data={"prompt": "a form"}) as answer:
            assert answer.status == 415
        for path in ("/pipelines/serve.py", "/../../etc/passwd", "/%2e%2e/page.js", "/page.js/x"):
            url = aiohttp.client.URL(served.url + path, encoded=True)
            async with served.session.get(url) as answer:
                assert answer.status == 404
                assert SECURITY.items() <= answer.headers.items()
        async with served.session.get(f"{served.url}/draw") as answer:
            assert answer.status == 405
        async with served.session.get(served.url) as answer:
            assert answer.content_type == "text/html"
            assert "script-src 'self'" in answer.headers["Content-Security-Policy"]

    visit(studio, config, work)


def test_other_addresses_need_the_token(studio: Studio, config: serve.Config, tmp_path: Path) -> None:
    async def work(served: Served) -> None:
        for given, status in {"": 401, "Bearer wrong": 401, "Bearer é": 401, f"Bearer {TOKEN}": 200}.items():
            assert (await post(served, "/draw", GOOD, Authorization=given, Host="10.0.0.1:80"))[0] == status
        assert (await post(served, "/draw", GOOD, Authorization=f"Bearer {TOKEN}", Host="evil.example"))[0] == 421
        async with served.session.get(f"{served.url}/about") as answer:
            assert answer.status == 401
        async with served.session.get(f"{served.url}/page.js") as answer:
            assert answer.status == 200

    visit(studio, config, work, token=TOKEN)
    with pytest.raises(ConfigError, match="give --token-file FILE"):
        replace(config, host="0.0.0.0")
    short = tmp_path / "token"
    short.write_text("short")
    with pytest.raises(ConfigError, match="give 16 characters or more"):
        read_token(short)
    short.write_text(f"{TOKEN}\n")
    assert read_token(short) == TOKEN
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "nothing")


def test_a_full_queue_sends_away_and_loses_nothing(studio: Studio, config: serve.Config) -> None:
    async def work(served: Served) -> None:
        waiting = [asyncio.create_task(post(served, "/draw", {**GOOD, "seed": seed})) for seed in range(3)]
        await until(lambda: served.desk.state()["waiting"] == 3)
        async with served.session.post(f"{served.url}/draw", json=GOOD) as answer:
            assert answer.status == 429
            assert int(answer.headers["Retry-After"]) == desk.SOON  # nothing was drawn yet
            assert "3 requests are waiting already" in (await answer.json())["error"]
        served.desk._seconds_each = 10.0
        told = set()
        for _ in range(40):
            async with served.session.post(f"{served.url}/draw", json=GOOD) as answer:
                told.add(int(answer.headers["Retry-After"]))
        assert len(told) > 1  # not all at once
        assert 1 <= min(told) <= max(told) <= 30
        served.desk.__enter__()
        for seed, (status, answer) in enumerate(await asyncio.gather(*waiting)):
            assert status == 200
            assert answer["pictures"][0]["codes"] == alone(studio, "a star", seed, config.sampling)
        state = served.desk.state()
        assert (state["served"], state["refused"], state["longest_queue"]) == (3, 41, 3)

    visit(studio, replace(config, max_waiting=3), work, is_working=False)


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_work_stops_when_the_client_goes_away(studio: Studio, config: serve.Config, accept: str) -> None:
    slow = paused(studio)

    async def work(served: Served) -> None:
        drawing = asyncio.create_task(post(served, "/draw", {**GOOD, "candidates": 8}, Accept=accept))
        await until(slow.reached.is_set)
        queued = asyncio.create_task(post(served, "/draw", {**GOOD, "top_k": 3}))
        await until(lambda: served.desk.state()["waiting"] == 1)
        (at_work,) = served.desk._at_work
        drawing.cancel()
        queued.cancel()
        await until(lambda: at_work.is_cancelled and served.desk.state()["waiting"] == 0)
        slow.go_on.set()
        await until(lambda: served.desk.state()["abandoned"] == 2)
        assert (await post(served, "/draw", GOOD))[0] == 200
        assert served.desk.state()["served"] == 1

    visit(slow, config, work)


def test_what_takes_too_long_is_given_up(studio: Studio, config: serve.Config) -> None:
    slow = paused(studio)

    async def work(served: Served) -> None:
        status, answer = await post(served, "/draw", GOOD)
        assert status == 504
        assert "not drawn within 0.3 s" in answer["error"]
        slow.go_on.set()
        await until(lambda: served.desk.state()["abandoned"] == 1)
        assert served.desk.state()["at_work"] == 0

    visit(slow, replace(config, timeout=0.3), work)


def test_pictures_are_captioned_and_enlarged(studio: Studio, config: serve.Config) -> None:
    async def work(served: Served) -> None:
        _, drawn = await post(served, "/draw", {**GOOD, "seed": 3})
        (picture,) = drawn["pictures"]
        wanted = {"prompt": "a star", "codes": picture["codes"], "seed": 3}
        status, large = await post(served, "/magnify", wanted)
        assert status == 200
        assert Image.open(io.BytesIO(base64.b64decode(large["png"]))).size == (16 * GRID, 16 * GRID)
        assert (await post(served, "/magnify", wanted))[1] == large
        for codes, words in (([0] * 3, "give the 16 codes"), ([32] * 16, "whole numbers below 32"), ("x", '"x"')):
            status, answer = await post(served, "/magnify", {**wanted, "codes": codes})
            assert status == 422
            assert words in answer["error"]
        png = base64.b64decode(picture["png"])
        for data, kind, status in (
            (png, "image/png", 200),
            (b"GIF89a", "image/gif", 422),
            (png, "text/plain", 415),
            (bytes(9 * 2**20), "image/png", 413),
        ):
            async with served.session.post(
                f"{served.url}/caption", data=data, headers={"Content-Type": kind}
            ) as answer:
                assert answer.status == status
                if status == 200:
                    assert set((await answer.json())["captions"]) <= {"en", "zh"}

    visit(studio, config, work)


def test_a_server_without_finetunes_says_how_to_get_them(
    studio: Studio, config: serve.Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def work(served: Served) -> None:
        async with served.session.get(f"{served.url}/about") as answer:
            assert (await answer.json())["can"] == dict.fromkeys(("rank", "caption", "magnify", "complete"), False)
        for path in ("/magnify", "/caption"):
            status, answer = await post(served, path, GOOD)
            assert status == 404
            assert "make finetune-" in answer["error"]
        _, drawn = await post(served, "/draw", {**GOOD, "candidates": 2})
        assert [picture["rank"] for picture in drawn["pictures"]] == [None, None]

    visit(without_skills(studio), config, work)
    loaded = serve.load_studio(replace(config, captioner=None, magnifier=None), root=tmp_path)
    assert (loaded.captioner, loaded.magnifier) == (None, None)
    assert capsys.readouterr().out == ""


def test_an_order_that_fails_leaves_the_worker_at_work(
    studio: Studio, config: serve.Config, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(served: Served) -> None:
        codes_hw = np.zeros((GRID, GRID), np.uint16)
        ticket = served.desk.submit(MagnifyOrder(prompt="a star", seed=0, codes_hw=codes_hw))
        event = await ticket.events.get()
        assert event.name == "failed"
        assert event.value.status == 500
        assert (await post(served, "/draw", GOOD))[0] == 200
        assert served.desk.state()["failed"] == 1

    visit(without_skills(studio), config, work)
    assert "an order failed" in caplog.text


def test_the_command_serves_until_it_is_asked_to_end(config: serve.Config, tmp_path: Path) -> None:
    flags = [
        word
        for name in ("checkpoint", "text_tokenizer", "image_tokenizer", "captioner", "magnifier")
        for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))
    ]
    command = [sys.executable, "-m", "pipelines", "serve", "smoke", "--root", str(tmp_path), "--port", "0", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("CogView: http://127.0.0.1:")

        async def work() -> None:
            async with aiohttp.ClientSession() as session, session.post(f"{line.split()[1]}/draw", json=GOOD) as answer:
                assert answer.status == 200

        asyncio.run(work())
        server.send_signal(signal.SIGTERM)
        closing, _ = server.communicate(timeout=SECONDS)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 0
    assert closing.startswith("serve: ended; requests: served 1,")
