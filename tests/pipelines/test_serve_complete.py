"""Completion over the web: what is answered and refused, and what a person does with the page."""

import asyncio
import base64
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.errors import ConfigError
from cogview.sampling.masks import Box
from pipelines import serve
from pipelines.serving.studio import Studio
from tests.pipelines.browser import Tab, open_tab
from tests.pipelines.served import SECONDS, Served, serving, without_skills, write_completer, write_config

BOX = [0.25, 0.25, 0.75, 0.75]
ORDER = {"prompt": "红色圆点", "box": BOX, "seed": 7}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> serve.Config:
    return write_config(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def studio(config: serve.Config, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    studio = serve.load_studio(config, root=tmp_path_factory.mktemp("root"))
    assert studio.completer is None
    return replace(
        studio, completer=write_completer(tmp_path_factory.mktemp("coglm")), hierarchical=config.hierarchical
    )


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def png_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


async def post(served: Served, data: bytes, order: object = ORDER, *, kind: str = "image/png") -> tuple[int, Any]:
    headers = {"Content-Type": kind, "X-Order": json.dumps(order)}
    async with served.session.post(f"{served.url}/complete", data=data, headers=headers) as answer:
        return answer.status, await answer.json()


def visit(studio: Studio, config: serve.Config, work: Callable[[Served], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(SECONDS), serving(studio, config) as served:
            await work(served)

    asyncio.run(run())


def best_of(studio: Studio, picture: Image.Image) -> np.ndarray:
    """Of eight drawings, with the seeds from 7 on, the one whose caption has the lowest loss."""
    assert studio.completer is not None
    drawn = studio.completer.complete(
        torch.from_numpy(np.array(picture)).permute(2, 0, 1),
        Box(top=0.25, left=0.25, bottom=0.75, right=0.75).mask(picture.height, picture.width),
        caption="红色圆点",
        seeds=range(7, 7 + 8),
        config=studio.completion,
        sampling=studio.hierarchical,
    )
    assert len(set(drawn.cap_losses)) > 1
    pixels: np.ndarray = drawn.pictures_BCHW[int(np.argmin(drawn.cap_losses))].permute(1, 2, 0).numpy()
    return pixels


def test_a_part_of_a_picture_comes_back_drawn_anew(studio: Studio, config: serve.Config) -> None:
    picture = noise(60, 40)

    async def work(served: Served) -> None:
        status, answer = await post(served, png_of(picture))
        assert (status, answer["seed"]) == (200, 7)
        drawn = Image.open(io.BytesIO(base64.b64decode(answer["png"])))
        assert drawn.text == {"prompt": "红色圆点", "seed": "7"}
        changed = (np.asarray(drawn) != np.asarray(picture)).any(axis=2)
        assert changed[10:30, 15:45].any()
        changed[10 - 6 : 30 + 6, 15 - 6 : 45 + 6] = False
        assert not changed.any()
        _, again = await post(served, png_of(picture))
        assert again["png"] == answer["png"]
        assert np.array_equal(np.asarray(drawn), best_of(studio, picture))

    visit(studio, config, work)


def test_bad_requests_get_a_reason(studio: Studio, config: serve.Config) -> None:
    data = png_of(noise(20, 20))
    bad: list[tuple[bytes, object, str, int, str]] = [
        (data, {**ORDER, "box": [0, 0, 1]}, "image/png", 422, "give top, left, bottom and right"),
        (data, {**ORDER, "box": [0, 0, True, 1]}, "image/png", 422, "give top, left, bottom and right"),
        (data, {**ORDER, "box": [0.5, 0, 0.5, 1]}, "image/png", 422, "give shares of the picture"),
        (data, {**ORDER, "box": [0, 0, 1e999, 1]}, "image/png", 422, "not a number"),
        (data, {**ORDER, "prompt": " "}, "image/png", 422, "say what to draw"),
        (data, {**ORDER, "more": 1}, "image/png", 422, "is no field"),
        (data, [1], "image/png", 400, "not an object"),
        (b"<html>", ORDER, "image/png", 422, "cannot be read"),
        (data, ORDER, "application/json", 415, "send a picture as it is"),
        (png_of(Image.new("RGB", (2049, 3))), ORDER, "image/png", 422, "2049 pixels along a side"),
    ]

    async def work(served: Served) -> None:
        for body, order, kind, wanted, said in bad:
            status, answer = await post(served, body, order, kind=kind)
            assert (status, said in answer["error"]) == (wanted, True), answer
        async with served.session.get(f"{served.url}/about") as answer:
            assert (await answer.json())["can"]["complete"]

    visit(studio, config, work)

    async def without(served: Served) -> None:
        status, answer = await post(served, data)
        assert (status, "make pretrain-coglm" in answer["error"]) == (404, True)

    visit(without_skills(studio), config, without)


def test_a_coglm_is_looked_for_beside_the_root(config: serve.Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `make pretrain-coglm` first"):
        serve.load_studio(replace(config, completer=tmp_path), root=tmp_path / "smoke")


def test_a_person_draws_a_box_and_compares(studio: Studio, config: serve.Config, tmp_path: Path) -> None:
    noise(64, 48).save(tmp_path / "photo.png")

    async def run() -> None:
        async with open_tab() as tab, serving(studio, config) as served:
            await use(tab, served)

    async def use(tab: Tab, served: Served) -> None:
        await tab.go(served.url)
        await tab.wait_for("!document.querySelector('#complete').hidden")
        await tab.choose_file("#photo", tmp_path / "photo.png")
        await tab.wait_for("!document.querySelector('#editor').hidden")
        assert await tab.evaluate("document.querySelector('#fill').disabled")
        frame = await tab.evaluate(
            "(e => { e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x, r.y, r.width, r.height]; })(document.querySelector('#before'))"
        )
        for kind, share in (("mousePressed", 0.25), ("mouseMoved", 0.5), ("mouseMoved", 0.75), ("mouseReleased", 0.75)):
            x, y = frame[0] + share * frame[2], frame[1] + share * frame[3]
            held = {"button": "left", "buttons": 1, "clickCount": 1}
            await tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)
        found = await tab.evaluate("box")
        assert np.allclose(found, BOX, atol=0.02)
        await tab.write("#wish", "a red dot 红")
        await tab.write("#complete_seed", "9")
        await tab.click("#fill")
        await tab.wait_for("!document.querySelector('#after').hidden")
        assert await tab.evaluate("document.querySelector('#after').naturalWidth") == 64
        assert await tab.evaluate("document.querySelector('#after').style.clipPath") == "inset(0px 0% 0px 0px)"
        await tab.evaluate(
            "(s => { s.value = 30; s.dispatchEvent(new Event('input')); })(document.querySelector('#share'))"
        )
        assert await tab.evaluate("document.querySelector('#after').style.clipPath") == "inset(0px 70% 0px 0px)"
        assert (await tab.evaluate("document.querySelector('#take').href")).startswith("data:image/png")
        await tab.click("#other")
        assert await tab.evaluate("document.querySelector('#editor').hidden")
        assert tab.complaints == []

    asyncio.run(run())
