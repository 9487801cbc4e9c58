"""The page of `serve` in a real browser: what a person does, and what nobody must be able to."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from PIL import Image

from pipelines import serve
from pipelines.serving.studio import Studio
from tests.pipelines.browser import Tab, open_tab
from tests.pipelines.served import Served, paused, serving, until, without_skills, write_config
from tests.pipelines.trained_folders import GRID

HOSTILE = "<img src=x onerror='window.broken=1'>蓝色 & \"a star\""
DONE = "document.querySelectorAll('#gallery figure:not(.busy)').length"
TOKEN = "a-secret-for-this-test"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> serve.Config:
    return write_config(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def studio(config: serve.Config, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return serve.load_studio(config, root=tmp_path_factory.mktemp("root"))


def browse(
    studio: Studio, config: serve.Config, work: Callable[[Served, Tab], Awaitable[None]], *, token: str = ""
) -> None:
    async def run() -> None:
        async with open_tab() as tab, serving(studio, config, token=token) as served:
            await work(served, tab)

    asyncio.run(run())


def test_a_person_draws_ranks_enlarges_captions_and_takes_a_picture_home(
    studio: Studio, config: serve.Config, tmp_path: Path
) -> None:
    async def work(served: Served, tab: Tab) -> None:
        await tab.go(served.url)
        await tab.wait_for("!document.querySelector('#draw').disabled")
        shown = await tab.evaluate("document.querySelector('#about').textContent")
        assert shown == "32 × 32 pixels · draws, ranks its pictures, enlarges, captions"
        await tab.write("#prompt", HOSTILE)
        await tab.write("#seed", "40")
        await tab.click("#draw")
        await tab.wait_for(f"{DONE} === 4")
        assert await tab.evaluate("document.querySelector('.group h2').textContent") == HOSTILE
        assert await tab.evaluate("window.broken === undefined && !document.querySelector('#gallery [src=x]')")
        widths = "[...document.querySelectorAll('#gallery img')].map(i => i.naturalWidth)"
        assert await tab.evaluate(widths) == [8 * GRID] * 4
        ranks = "[...document.querySelectorAll('#gallery .rank')].map(r => r.textContent)"
        assert await tab.evaluate(ranks) == ["best", "2.", "3.", "4."]
        seeds = await tab.evaluate("[...document.querySelectorAll('#gallery .seed')].map(s => s.textContent)")
        assert sorted(seeds) == [f"seed {seed}" for seed in range(40, 44)]
        await tab.click("#gallery .seed")
        assert await tab.evaluate("document.querySelector('#seed').value") == seeds[0].removeprefix("seed ")
        name = await tab.evaluate("document.querySelector('.save').download")
        assert name == f"img_src_x_onerror_window_broken_1_蓝色_a_star_{seeds[0].replace(' ', '_')}.png"
        await tab.click("#gallery .magnify")
        await tab.wait_for(f"document.querySelector('#gallery img').naturalWidth === {16 * GRID}")
        assert (await tab.evaluate("document.querySelector('.save').download")).endswith("_large.png")
        await tab.click("#gallery .caption")
        await tab.wait_for("!document.querySelector('#gallery .words').hidden")
        Image.new("RGB", (90, 60), "red").save(tmp_path / "red.jpg")
        await tab.choose_file("#file", tmp_path / "red.jpg")
        await tab.wait_for("document.querySelector('#captions').textContent !== '…'")
        assert await tab.evaluate("document.querySelector('#given').naturalWidth") == 90
        (tmp_path / "no.png").write_text("<html>")
        await tab.choose_file("#file", tmp_path / "no.png")
        await tab.wait_for("document.querySelector('#message').textContent.includes('cannot be read')")
        refused = [line for line in tab.complaints if "422" not in line]
        assert refused == []

    browse(studio, config, work)


def test_a_person_sees_the_rows_and_stops_the_drawing(studio: Studio, config: serve.Config) -> None:
    slow = paused(studio)

    async def work(served: Served, tab: Tab) -> None:
        await tab.go(served.url)
        await tab.wait_for("!document.querySelector('#draw').disabled")
        assert await tab.evaluate("document.querySelector('#describe').hidden")
        await tab.write("#prompt", "a star")
        await tab.click("#draw")
        await until(slow.reached.is_set)
        await tab.wait_for("document.querySelectorAll('.busy').length === 4")
        (ticket,) = served.desk._at_work
        await tab.click("#stop")
        await until(lambda: ticket.is_cancelled)
        slow.go_on.set()
        await tab.wait_for("!document.querySelector('#draw').disabled && !document.querySelector('.group')")
        await until(lambda: served.desk.state()["abandoned"] == 1)
        await tab.click("#draw")
        await tab.wait_for(f"{DONE} === 4")
        hidden = "[...document.querySelectorAll('.magnify, .caption, .rank')].every(part => part.hidden)"
        assert await tab.evaluate(hidden)

    browse(slow, config, work)


def test_the_page_takes_the_token_from_its_address_and_says_when_it_is_missing(
    studio: Studio, config: serve.Config
) -> None:
    async def work(served: Served, tab: Tab) -> None:
        await tab.go(served.url)
        await tab.wait_for("document.querySelector('#message').textContent.includes('wants its token')")
        await tab.go("about:blank")
        await tab.go(f"{served.url}/#token={TOKEN}")
        await tab.wait_for("!document.querySelector('#draw').disabled")
        assert await tab.evaluate("location.hash") == ""

    browse(without_skills(studio), config, work, token=TOKEN)
