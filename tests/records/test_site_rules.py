import asyncio
from unittest.mock import patch

from cogview.records import site_rules
from cogview.records.fetch import Fetched, Fetcher
from cogview.records.pair import Unusable
from cogview.records.robots import parse_robots
from cogview.records.site_rules import KnownRules, SiteRules
from tests.records.web_site import HOST, reply, serve

ROBOTS = b"User-agent: *\nDisallow: /private/\nCrawl-delay: 0.2\n"
RULES = SiteRules(robots=parse_robots(ROBOTS, product="CogViewBot"))


def test_a_site_is_asked_for_its_rules_once_for_many_fetchers() -> None:
    known = KnownRules()

    async def run() -> tuple[list[str], float]:
        async with serve({"/robots.txt": reply(ROBOTS), "/a": reply(b"a"), "/b": reply(b"b")}) as site:
            async with Fetcher(site.settings(), known=known) as first:
                assert isinstance(await first.fetch(f"http://{HOST}/a"), Fetched)
            async with Fetcher(site.settings(), known=known) as second:
                assert await second.fetch(f"http://{HOST}/private/x") == Unusable("robots_disallowed")
                started = asyncio.get_running_loop().time()
                await asyncio.gather(*(second.fetch(f"http://{HOST}/b") for _ in range(3)))
                seconds = asyncio.get_running_loop().time() - started
            return site.requests, seconds

    requests, seconds = asyncio.run(run())
    assert requests.count("/robots.txt") == 1
    assert requests.count("/b") == 3
    assert seconds > 0.38  # two gaps of 0.2 s: the crawl delay is remembered with the rules


def test_what_could_not_be_learned_is_asked_again() -> None:
    known = KnownRules()

    async def run() -> list[str]:
        answers = [reply(b"", status="500 Oops"), reply(ROBOTS)]
        async with serve({"/robots.txt": answers, "/a": reply(b"a")}) as site:
            settings = site.settings(max_attempts=1)
            async with Fetcher(settings, known=known) as first:
                assert isinstance(await first.fetch(f"http://{HOST}/a"), Unusable)
            async with Fetcher(settings, known=known) as second:
                assert isinstance(await second.fetch(f"http://{HOST}/a"), Fetched)
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
