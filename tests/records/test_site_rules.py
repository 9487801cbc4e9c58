import asyncio
from unittest.mock import patch

import pytest

from cogview.records import fetch, site_rules
from cogview.records.fetch import Fetched, Fetcher
from cogview.records.pair import Unusable
from cogview.records.robots import parse_robots
from cogview.records.site_rules import KnownRules, SiteRules
from tests.records.web_site import HOST, reply, serve

ROBOTS = b"User-agent: *\nDisallow: /private/\nCrawl-delay: 0.2\n"
RULES = SiteRules(robots=parse_robots(ROBOTS, product="CogViewBot"))


@pytest.mark.parametrize("max_hosts", [10, 0])
def test_a_site_is_asked_for_its_rules_once_and_kept_to_them_afterwards(
    max_hosts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_HOSTS", max_hosts)  # 0: the host's pace is forgotten, but not its rules

    async def run() -> tuple[list[str], float]:
        async with (
            serve({"/robots.txt": reply(ROBOTS), "/a": reply(b"a"), "/b": reply(b"b")}) as site,
            Fetcher(site.settings()) as fetcher,
        ):
            assert isinstance(await fetcher.fetch(f"http://{HOST}/a"), Fetched)
            fetcher.refresh()
            assert await fetcher.fetch(f"http://{HOST}/private/x") == Unusable("robots_disallowed")
            started = asyncio.get_running_loop().time()
            await asyncio.gather(*(fetcher.fetch(f"http://{HOST}/b") for _ in range(3)))
            return site.requests, asyncio.get_running_loop().time() - started

    requests, seconds = asyncio.run(run())
    assert requests.count("/robots.txt") == 1
    assert requests.count("/b") == 3
    assert seconds > 0.38  # two gaps of 0.2 s at least: the crawl delay is remembered with the rules


def test_a_crawl_delay_holds_across_a_refresh() -> None:
    async def run() -> float:
        delayed = {"/robots.txt": reply(b"User-agent: *\nCrawl-delay: 0.5\n"), "/a": reply(b"a"), "/b": reply(b"b")}
        async with serve(delayed) as site, Fetcher(site.settings()) as fetcher:
            assert isinstance(await fetcher.fetch(f"http://{HOST}/a"), Fetched)
            started = asyncio.get_running_loop().time()
            fetcher.refresh()
            assert isinstance(await fetcher.fetch(f"http://{HOST}/b"), Fetched)
            return asyncio.get_running_loop().time() - started

    assert asyncio.run(run()) > 0.4


def test_what_could_not_be_learned_is_asked_again() -> None:
    async def run() -> list[str]:
        answers = [reply(b"", status="500 Oops"), reply(ROBOTS)]
        async with (
            serve({"/robots.txt": answers, "/a": reply(b"a")}) as site,
            Fetcher(site.settings(max_attempts=1)) as fetcher,
        ):
            assert isinstance(await fetcher.fetch(f"http://{HOST}/a"), Unusable)
            fetcher.refresh()
            assert isinstance(await fetcher.fetch(f"http://{HOST}/a"), Fetched)
            return site.requests

    assert asyncio.run(run()).count("/robots.txt") == 2


def test_rules_count_for_a_day() -> None:
    known = KnownRules()
    with patch.object(site_rules.time, "monotonic", return_value=1000.0):
        known.add("http://a.test", RULES)
    with patch.object(site_rules.time, "monotonic", return_value=1000.0 + site_rules.MAX_AGE_S - 1):
        known.add("http://a.test", RULES)  # found, not asked for: that does not make it younger
        assert known.find("http://a.test") is RULES
    with patch.object(site_rules.time, "monotonic", return_value=1000.0 + site_rules.MAX_AGE_S + 1):
        assert known.find("http://a.test") is None


def test_the_memory_of_rules_is_bounded() -> None:
    known = KnownRules()
    for number in range(site_rules.MAX_ORIGINS + 10):
        known.add(f"http://h{number}.test", RULES)
    assert known.find("http://h9.test") is None
    assert known.find("http://h10.test") is RULES
