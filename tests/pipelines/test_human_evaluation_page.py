"""The pages of `human_evaluation` in a real browser: by mouse, by keys, on a phone, and when the server goes away."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from pipelines.judging.ballots import Ballots
from pipelines.judging.booth import Booth
from pipelines.judging.study import Study
from pipelines.serving.gate import Gate
from tests.pipelines.browser import Tab, open_tab
from tests.pipelines.studies import open_ballots, write_study

KEY, TOKEN = "the-key-of-the-results", "a-secret-for-this-test"
HOSTILE = "<img src=x onerror='window.broken=1'>蓝色 & \"a star\""
KEYS = {"Enter": ("\r", 13), "ArrowRight": ("", 39), "ArrowLeft": ("", 37), "ArrowUp": ("", 38)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = write_study(tmp_path_factory.mktemp("study"))
    groups = {name: replace(group, caption=HOSTILE) for name, group in study.groups.items()}
    return replace(study, groups=groups)


@pytest.fixture
def ballots(study: Study, tmp_path: Path) -> Ballots:
    return open_ballots(tmp_path, study)


@asynccontextmanager
async def served(ballots: Ballots, *, port: int = 0, token: str = "") -> AsyncIterator[str]:
    booth = Booth(ballots._study, ballots, gate=Gate(token=token), results_key=KEY)
    runner = web.AppRunner(booth.app(), shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def browse(ballots: Ballots, work: Callable[[str, Tab], Awaitable[None]]) -> None:
    async def run() -> None:
        async with open_tab() as tab, served(ballots) as url:
            await work(url, tab)

    asyncio.run(run())


async def join(tab: Tab, url: str, name: str) -> None:
    await tab.go(url)
    await tab.wait_for("!document.querySelector('#join').hidden")
    await tab.write("#name", name)
    await tab.click("#begin")
    await tab.wait_for("document.querySelectorAll('.card img').length === 4")


async def press(tab: Tab, key: str) -> None:
    text, code = KEYS.get(key, (key, ord(key.upper()[0])))
    for kind in ("keyDown", "keyUp"):
        params = {"type": kind, "key": key, "windowsVirtualKeyCode": code}
        await tab.call("Input.dispatchKeyEvent", **params, **({"text": text} if text and kind == "keyDown" else {}))


async def fill(tab: Tab, value: int = 3) -> None:
    """Give every score with the mouse, and choose the second picture."""
    for picture in range(4):
        for scale in ("overall", "clarity", "texture", "relevance"):
            await tab.evaluate(f'document.querySelector(\'input[name="{scale}-{picture}"][value="{value}"]\').click()')
    await tab.click(".card:nth-child(2) .best")


def place(number: int) -> str:
    return f"document.querySelector('#place').textContent.startsWith('Group {number} ')"


def test_a_person_judges_with_the_mouse_and_finds_the_page_as_they_left_it(ballots: Ballots) -> None:
    async def work(url: str, tab: Tab) -> None:
        await join(tab, url, "Ada <b>")
        assert (await tab.evaluate("document.querySelector('#who').textContent")).startswith("Ada <b> · code ")
        captions = await tab.evaluate("document.querySelector('#caption').textContent")
        first = ballots.next_ballot(ballots.evaluator("Ada <b>", code=await code_of(tab)))
        assert first is not None
        assert captions == first.group.caption
        assert await tab.evaluate("window.broken === undefined")
        assert await tab.evaluate("document.querySelector('#next').disabled")
        await tab.click(".card:nth-child(3) .best")
        await tab.click("label:has(input[name='overall-1'][value='7'])")
        missing = await tab.evaluate("document.querySelector('#missing').textContent")
        assert missing == "Missing: 15 scores"
        await tab.go(url)  # closed in the middle of a group, and opened again
        await tab.wait_for("document.querySelectorAll('.card.chosen').length === 1")
        assert await tab.evaluate('document.querySelector(\'input[name="overall-1"][value="7"]\').checked')
        assert await tab.evaluate("document.querySelector('#missing').textContent") == missing
        await fill(tab)
        await tab.click("#next")
        await tab.wait_for(place(2))
        (vote,) = ballots.votes()
        assert vote.best == first.models[1]
        assert {tuple(scores.values()) for scores in vote.scores.values()} == {(3, 3, 3, 3)}
        assert await tab.evaluate("document.querySelector('#next').disabled && !document.querySelector('.chosen')")
        for number in range(2, 7):
            await tab.wait_for(place(number))
            await fill(tab)
            await tab.click("#next")
        await tab.wait_for("!document.querySelector('#done').hidden")
        assert "You have judged 6 groups" in await tab.evaluate("document.querySelector('#thanks').textContent")
        assert tab.complaints == []

    browse(ballots, work)
    assert len(ballots.votes()) == 6


async def code_of(tab: Tab) -> str:
    return str(json.loads(await tab.evaluate("localStorage.getItem('evaluator')"))["code"])


def test_keys_alone_are_enough(ballots: Ballots) -> None:
    async def work(url: str, tab: Tab) -> None:
        await join(tab, url, "Bob")
        first = ballots.next_ballot(ballots.evaluator("Bob", code=await code_of(tab)))
        assert first is not None
        await tab.evaluate("document.activeElement.blur()")
        for overall in "5678":
            for key in (overall, "1", "2", "3"):
                await press(tab, key)
        await press(tab, "ArrowLeft")
        await press(tab, "b")
        await press(tab, "ArrowRight")
        for _ in range(3):
            await press(tab, "ArrowUp")
        await press(tab, "0")  # overall of the last picture, once more
        assert await tab.evaluate("document.querySelector('#missing').textContent") == "Complete"
        await press(tab, "z")
        assert await tab.evaluate("document.querySelector('#large').open")
        await press(tab, "z")
        assert not await tab.evaluate("document.querySelector('#large').open")
        await press(tab, "Enter")
        await tab.wait_for(place(2))
        (vote,) = ballots.votes()
        assert vote.best == first.models[2]
        assert [vote.scores[model]["overall"] for model in first.models] == [5, 6, 7, 10]
        assert [vote.scores[model]["texture"] for model in first.models] == [2, 2, 2, 2]

    browse(ballots, work)


def test_a_name_that_is_taken_goes_on_elsewhere_with_its_code(ballots: Ballots) -> None:
    code = ballots.join("Ada").code

    async def work(url: str, tab: Tab) -> None:
        await tab.go(url)
        await tab.wait_for("!document.querySelector('#join').hidden")
        await tab.write("#name", "Ada")
        await tab.click("#begin")
        await tab.wait_for("document.querySelector('#message').textContent.includes('the name Ada is taken')")
        await tab.write("#code", code)
        await tab.click("#begin")
        await tab.wait_for(place(1))
        evaluator = ballots.evaluator("Ada", code=code)
        scores = [{"overall": 1, "clarity": 1, "texture": 1, "relevance": 1}] * 4
        ballots.vote(evaluator, place=0, best=0, scores=scores, seconds=1)  # on another device
        await fill(tab)
        await tab.click("#next")
        await tab.wait_for(place(2))
        await tab.wait_for("document.querySelector('#message').textContent.includes('has its vote, which stays')")
        await tab.click("#who button")
        await tab.wait_for("document.querySelector('#join') && !document.querySelector('#join').hidden")

    browse(ballots, work)


def test_a_phone_shows_one_picture_below_the_other(ballots: Ballots) -> None:
    async def work(url: str, tab: Tab) -> None:
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        await tab.call("Emulation.setDeviceMetricsOverride", **size)
        await join(tab, url, "Di")
        lefts = await tab.evaluate("[...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().left)")
        assert len(set(lefts)) == 1
        assert await tab.evaluate("document.documentElement.scrollWidth") <= 390
        heights = await tab.evaluate("[...document.querySelectorAll('.steps label')].map(l => l.offsetHeight)")
        assert min(heights) >= 38
        await fill(tab, value=5)
        await tab.click("#next")
        await tab.wait_for(place(2))

    browse(ballots, work)
    assert len(ballots.votes()) == 1


def test_a_vote_is_sent_again_by_itself_until_the_server_is_back(ballots: Ballots) -> None:
    async def run() -> None:
        async with open_tab() as tab:
            async with served(ballots) as url:
                await join(tab, url, "Cy")
                await fill(tab)
            await tab.click("#next")
            await tab.wait_for("document.querySelector('#message').textContent.includes('Nothing is lost')")
            assert ballots.votes() == []
            async with served(ballots, port=int(url.rpartition(":")[2])):
                await tab.wait_for(place(2))
                assert await tab.evaluate("document.querySelector('#message').hidden")
                assert len(ballots.votes()) == 1

    asyncio.run(run())


def test_the_token_and_the_key_come_with_the_address(ballots: Ballots) -> None:
    async def run() -> None:
        async with open_tab() as tab, served(ballots, token=TOKEN) as url:
            await tab.go(url)
            await tab.wait_for("document.querySelector('#message').textContent.includes('wants its token')")
            await tab.go("about:blank")
            await join(tab, f"{url}/#token={TOKEN}", "Ada")
            await tab.go("about:blank")
            await tab.go(f"{url}/results#key={KEY}&token={TOKEN}")
            await tab.wait_for("document.querySelector('#lead').textContent.startsWith('0 votes')")
            assert await tab.evaluate("location.hash") == ""

    asyncio.run(run())


def test_results_are_shown_to_the_holder_of_the_key(ballots: Ballots) -> None:
    evaluator = ballots.join("Ada")
    while (ballot := ballots.next_ballot(evaluator)) is not None:
        scores = [{"overall": 8, "clarity": 4, "texture": 3, "relevance": 2}] * 4
        best = ballot.models.index("ours") if "ours" in ballot.models else 0
        ballots.vote(evaluator, place=ballot.place, best=best, scores=scores, seconds=2)

    async def work(url: str, tab: Tab) -> None:
        await tab.go(f"{url}/results")
        await tab.wait_for("document.querySelector('#message').textContent.includes('results need their key')")
        await tab.go("about:blank")
        await tab.go(f"{url}/results#key={KEY}")
        await tab.wait_for("document.querySelectorAll('.panel').length === 5")
        assert await tab.evaluate("location.hash") == ""
        titles = await tab.evaluate("[...document.querySelectorAll('.panel h2')].map(h => h.textContent)")
        assert titles[:2] == ["Chosen as the best", "Overall, 1 to 10"]
        first = await tab.evaluate("document.querySelector('.panel .row').textContent")
        assert first == "ours100.0 %"
        assert await tab.evaluate("document.querySelector('.panel .track i').style.width") == "100%"
        assert "4 votes of 1 evaluator on" in await tab.evaluate("document.querySelector('#lead').textContent")
        assert "Ada" in await tab.evaluate("document.querySelector('#evaluators').textContent")

    browse(ballots, work)
