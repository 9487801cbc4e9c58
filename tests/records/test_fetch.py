import asyncio
import gzip
import itertools
import socket
import tracemalloc
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from cogview.errors import ConfigError
from cogview.records.fetch import AddressRefusedError, Fetched, Fetcher, FetchSettings, PolicyResolver
from cogview.records.opt_out import OptOut
from cogview.records.pace import HostGate
from cogview.records.pair import Unusable
from cogview.records.urls import AddressPolicy
from tests.records.web_site import HOST, Answer, Site, reply, serve

URL = f"http://{HOST}/a.jpg"


def fetch(
    answers: Mapping[str, Answer | list[Answer]], *, url: str = URL, **changes: Any
) -> tuple[Fetched | Unusable, Site]:
    async def run() -> tuple[Fetched | Unusable, Site]:
        async with serve(answers) as site, Fetcher(site.settings(**changes)) as fetcher:
            return await fetcher.fetch(url), site

    return asyncio.run(run())


def reason(answers: Mapping[str, Answer | list[Answer]], *, url: str = URL, **changes: Any) -> str:
    answer, _ = fetch(answers, url=url, **changes)
    assert isinstance(answer, Unusable), answer
    return answer.reason


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        writer.write(bytes(65536))
        await writer.drain()


async def slow_loris(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(5)


async def endless_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(100_000):
        writer.write(f"X-{number}: {'y' * 1000}\r\n".encode())
        await writer.drain()


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def test_a_body_comes_back_with_a_named_user_agent_and_no_cookies() -> None:
    first = reply(b"", status="302 Found", headers={"Location": "/b.jpg", "Set-Cookie": "id=1"})
    answer, site = fetch({"/a.jpg": first, "/b.jpg": reply(b"body")}, user_agent="TestBot/2 (+mailto:me)")
    assert answer == Fetched(url=f"http://{HOST}/b.jpg", body=b"body", content_type="")
    assert site.requests == ["/robots.txt", "/a.jpg", "/b.jpg"]
    assert all("User-Agent: TestBot/2 (+mailto:me)" in head for head in site.heads)
    assert not any("cookie" in head.lower() for head in site.heads)
    assert all(f"Host: {HOST}\r\n" in head for head in site.heads)


def test_compressed_bodies_are_decompressed() -> None:
    for encoding, body in (("gzip", gzip.compress(b"text")), ("deflate", zlib.compress(b"text"))):
        answer, _ = fetch({"/a.jpg": reply(body, headers={"Content-Encoding": encoding})})
        assert isinstance(answer, Fetched)
        assert answer.body == b"text"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (reply(b"no", status="403 Forbidden"), "http_403"),
        (reply(b"", status="204 No Content"), "http_204"),
        (reply(b"part", status="206 Partial Content"), "http_206"),
        (reply(b"", status="304 Not Modified"), "http_304"),
        (reply(b""), "body_empty"),
        (reply(b"x" * 2_000_000), "body_too_large"),
        (reply(b"x", headers={"Content-Length": "99999999999"}), "body_too_large"),
        (endless, "body_too_large"),
        (reply(gzip.compress(bytes(200_000_000), 1), headers={"Content-Encoding": "gzip"}), "body_too_large"),
        (reply(b"not gzip", headers={"Content-Encoding": "gzip"}), "body_damaged"),
        (reply(b"x", headers={"Content-Encoding": "br"}), "encoding_refused"),
        (reply(b"x", headers={"X-Robots-Tag": "noai, noimageai"}), "robots_tag"),
        (reply(b"x", headers={"x-robots-tag": "CogViewBot: NoAI"}), "robots_tag"),
        (reply(b"x", headers={"TDM-Reservation": "1"}), "tdm_reserved"),
        (reply(b"short", headers={"Content-Length": "500"}), "bad_response"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "bad_response"),
        (endless_headers, "bad_response"),
        (b"HTTP/1.1 200 OK\r\nX-Big: " + b"y" * 1_000_000 + b"\r\n\r\n", "bad_response"),
        (slow_loris, "timeout"),
        (silent, "timeout"),
        (reset, "connection_failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_bad_answer_is_a_reason(answer: Answer, expected: str) -> None:
    assert reason({"/a.jpg": answer}, max_attempts=1) == expected


def test_a_tag_for_another_robot_does_not_concern_us() -> None:
    answer, _ = fetch({"/a.jpg": reply(b"x", headers={"X-Robots-Tag": "otherbot: noai"})})
    assert isinstance(answer, Fetched)


def test_a_bomb_does_not_fill_the_memory() -> None:
    bomb = reply(gzip.compress(bytes(200_000_000), 1), headers={"Content-Encoding": "gzip"})
    tracemalloc.start()
    try:
        assert reason({"/a.jpg": bomb}) == "body_too_large"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20


# --- retries


def test_passing_trouble_is_tried_again() -> None:
    troubles: list[Answer] = [reply(b"", status="500 Oops"), reset, reply(b"body")]
    answer, site = fetch({"/a.jpg": troubles})
    assert isinstance(answer, Fetched)
    assert site.requests.count("/a.jpg") == 3


@pytest.mark.parametrize("wait", ["999999999", "9" * 40, "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-5"])
def test_no_retry_after_holds_us_for_long(wait: str) -> None:
    answer, site = fetch({"/a.jpg": reply(b"", status="429 Slow down", headers={"Retry-After": wait})})
    assert answer == Unusable("http_429")
    assert site.requests.count("/a.jpg") == 3
    assert site.times[-1] - site.times[0] < 2


def test_a_404_is_final() -> None:
    answer, site = fetch({})
    assert answer == Unusable("http_404")
    assert site.requests.count("/a.jpg") == 1


# --- addresses and redirects


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("http://127.0.0.1/secret", "address_refused"),
        ("http://169.254.169.254/latest/meta-data/", "address_refused"),
        ("http://[::ffff:127.0.0.1]/", "address_refused"),
        ("http://site.test:6379/", "port_refused"),
        ("file:///etc/passwd", "scheme_refused"),
        ("http://user@site.test/", "userinfo_refused"),
        ("/a.jpg", "redirect_limit"),
    ],
)
def test_redirects_are_checked_again(location: str, expected: str) -> None:
    answers = {"/a.jpg": reply(b"", status="302 Found", headers={"Location": location})}
    answer, site = fetch(answers)
    assert isinstance(answer, Unusable)
    assert answer.reason == expected
    assert len(site.requests) <= 1 + 6


def test_the_loopback_address_itself_is_never_connected_to() -> None:
    async def run() -> list[str]:
        async with serve({"/a.jpg": reply(b"secret")}) as site:
            settings = site.settings(policy=AddressPolicy(ports=(80, 443, site.port)))
            hosts = ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "127.1", "[::ffff:127.0.0.1]", "0")
            async with Fetcher(settings) as fetcher:
                answers = [await fetcher.fetch(f"http://{host}:{site.port}/a.jpg") for host in hosts]
            assert site.requests == []
            return [answer.reason for answer in answers if isinstance(answer, Unusable)]

    assert asyncio.run(run()) == ["address_refused"] * 8


def test_a_name_with_any_inside_address_is_refused_and_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def answer(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        asked.append(host)
        public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))
        private = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))
        return [public, private] if host == "mixed.example" else [public]

    async def run() -> Fetched | Unusable:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(type(loop), "getaddrinfo", answer)
        resolver = PolicyResolver(AddressPolicy())
        with pytest.raises(AddressRefusedError):
            await resolver.resolve("mixed.example", 80)
        pinned = await resolver.resolve("good.example", 80)
        assert [(item["host"], item["port"]) for item in pinned] == [("93.184.216.34", 80)]
        async with Fetcher(FetchSettings(max_attempts=1)) as fetcher:
            return await fetcher.fetch("http://mixed.example/")

    answered = asyncio.run(run())
    assert isinstance(answered, Unusable)
    assert answered.reason == "address_refused"
    assert asked == ["mixed.example", "good.example", "mixed.example"]


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert isinstance(fetch({"/a.jpg": reply(b"x")})[0], Fetched)


# --- robots.txt


SITE_FILES = {"ask_ai_txt": True, "ask_tdmrep": True}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ""),
        ({"/ai.txt": b"User-Agent: *\nDisallow: *.jpg\n"}, "ai_txt_disallowed"),
        ({"/ai.txt": b"User-Agent: *\nDisallow: *.png\n"}, ""),
        ({"/ai.txt": b"User-Agent: cogviewbot\nDisallow: /\n"}, "ai_txt_disallowed"),
        ({"/.well-known/tdmrep.json": b'[{"location": "/*", "tdm-reservation": 1}]'}, "tdm_reserved"),
        ({"/.well-known/tdmrep.json": b'[{"location": "/b*", "tdm-reservation": 1}]'}, ""),
        ({"/robots.txt": b"User-agent: *\nDisallow: /", "/ai.txt": b"User-Agent: *\nAllow: /"}, "robots_disallowed"),
    ],
)
def test_what_a_site_reserves_is_left_alone(files: dict[str, bytes], expected: str) -> None:
    answers = {"/a.jpg": reply(b"x"), **{path: reply(body) for path, body in files.items()}}
    answer, site = fetch(answers, **SITE_FILES)
    assert (answer.reason if isinstance(answer, Unusable) else "") == expected
    assert ("/a.jpg" in site.requests) == (not expected)


def test_a_page_in_place_of_a_rule_file_says_nothing() -> None:
    page = reply(b"User-agent: *\nDisallow: /", headers={"Content-Type": "text/html; charset=utf-8"})
    answer, _ = fetch({"/a.jpg": reply(b"x"), "/ai.txt": page}, **SITE_FILES)
    assert isinstance(answer, Fetched)
    answer, site = fetch({"/a.jpg": reply(b"x"), "/ai.txt": reply(b"", status="503 No")}, **SITE_FILES)
    assert isinstance(answer, Fetched)
    assert site.requests[0] == "/robots.txt"


def test_who_opted_out_is_not_asked_also_after_a_redirect() -> None:
    moved = reply(b"", status="302 Found", headers={"Location": "http://other.test/b.jpg"})

    async def run(listed: OptOut) -> tuple[Fetched | Unusable, list[str]]:
        answers = {"/a.jpg": moved, "/b.jpg": reply(b"x")}
        async with serve(answers) as site, Fetcher(site.settings(), opt_out=listed) as fetcher:
            return await fetcher.fetch(URL), site.requests

    for listed, asked in (
        (OptOut(domains=frozenset({HOST})), []),
        (OptOut(urls=frozenset({URL})), []),
        (OptOut(domains=frozenset({"other.test"})), ["/robots.txt", "/a.jpg"]),
    ):
        assert asyncio.run(run(listed)) == (Unusable("opted_out"), asked)


def robots(text: str | bytes) -> bytes:
    return reply(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: cogviewbot\nDisallow: /\n\nUser-agent: *\nDisallow:", False),
        ("User-agent: otherbot\nDisallow: /", True),
        ("User-agent: *\nDisallow: /*.jpg$", False),
        ("User-agent: *\nDisallow: /*.png$", True),
        ("User-agent: *\nDisallow: /\nAllow: /a.jpg", True),
        (b"\xef\xbb\xbfUser-agent: *\r\nDisallow: /\r\n", False),
        ("User-agent: *\nDisallow: /\n" + "# padding\n" * 100_000, False),
        (b"\x00\xff\xfe garbage", True),
        ("", True),
    ],
)
def test_robots_rules_are_kept(rules: str | bytes, allowed: bool) -> None:
    answer, site = fetch({"/robots.txt": robots(rules), "/a.jpg": reply(b"x")})
    assert isinstance(answer, Fetched) == allowed
    assert ("/a.jpg" in site.requests) == allowed
    if not allowed:
        assert answer == Unusable("robots_disallowed")


def test_a_missing_robots_file_allows_and_a_failing_one_defers() -> None:
    for status, expected in (("404 No", "x"), ("403 No", "x"), ("500 No", "robots_unavailable")):
        answers = {"/robots.txt": reply(b"", status=status), "/a.jpg": reply(b"x")}
        answer, site = fetch(answers, max_attempts=1)
        got = answer.body.decode() if isinstance(answer, Fetched) else answer.reason
        assert got == expected
        assert ("/a.jpg" in site.requests) == (expected == "x")


def test_robots_are_asked_for_once_and_before_everything() -> None:
    async def run() -> list[str]:
        async with (
            serve({"/robots.txt": robots("User-agent: *\nDisallow: /no")}) as site,
            Fetcher(site.settings()) as fetcher,
        ):
            await asyncio.gather(*(fetcher.fetch(f"http://{HOST}/{number}") for number in range(20)))
            return site.requests

    requests = asyncio.run(run())
    assert requests[0] == "/robots.txt"
    assert requests.count("/robots.txt") == 1
    assert len(requests) == 21


def test_a_redirect_to_another_site_asks_its_robots() -> None:
    answers = {
        "/a.jpg": reply(b"", status="301 Moved", headers={"Location": "http://other.test/b.jpg"}),
        "/b.jpg": reply(b"x"),
    }
    _, site = fetch(answers)
    assert site.requests == ["/robots.txt", "/a.jpg", "/robots.txt", "/b.jpg"]


# --- pace


def gate_of(settings: FetchSettings) -> HostGate:
    return HostGate(rate=settings.host_rate, connections=settings.host_connections, sharers=settings.sharers)


def departures(settings: FetchSettings, *, count: int, crawl_delay: float = 0.0) -> list[float]:
    """When a host's gate lets requests go that all come at once. Arrivals would show the network's jitter as well."""

    async def run() -> list[float]:
        gate, times = gate_of(settings), []
        gate.slow_down(crawl_delay)

        async def ask() -> None:
            async with gate.turn():
                times.append(asyncio.get_running_loop().time())

        await asyncio.gather(*(ask() for _ in range(count)))
        return times

    return asyncio.run(run())


def test_a_host_is_asked_at_its_pace() -> None:
    times = departures(FetchSettings(host_rate=10.0, host_connections=10), count=8)
    assert min(later - earlier for earlier, later in itertools.pairwise(times)) > 0.099


def test_a_crawl_delay_slows_us_down_and_never_hurries_us() -> None:
    slow = departures(FetchSettings(host_rate=1000.0), count=4, crawl_delay=0.2)
    assert min(later - earlier for earlier, later in itertools.pairwise(slow)) > 0.198
    already_slower = departures(FetchSettings(host_rate=5.0), count=3, crawl_delay=0.01)
    assert min(later - earlier for earlier, later in itertools.pairwise(already_slower)) > 0.198


def test_a_long_crawl_delay_is_kept_however_often_it_is_read() -> None:
    async def run() -> int:
        gate, gone = gate_of(FetchSettings()), 0

        async def ask() -> None:
            nonlocal gone
            gate.slow_down(3600.0)
            async with gate.turn():
                gone += 1

        waiting = [asyncio.create_task(ask()) for _ in range(4)]
        await asyncio.sleep(0.5)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return gone

    assert asyncio.run(run()) == 1


def test_sharers_have_pace_and_crawl_delay_together() -> None:
    alone = FetchSettings(host_rate=20.0, host_connections=8)
    shared = departures(replace(alone, sharers=4), count=4)
    assert min(later - earlier for earlier, later in itertools.pairwise(shared)) > 0.198  # 4 x 1/20 s
    delayed = departures(replace(alone, sharers=4), count=3, crawl_delay=0.1)
    assert min(later - earlier for earlier, later in itertools.pairwise(delayed)) > 0.398  # 4 x 0.1 s


def test_no_more_than_the_allowed_requests_are_under_way_at_one_host() -> None:
    under_way, most = 0, 0

    async def slow_answer(writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        writer.write(reply(b"x"))

    async def run() -> None:
        async with (
            serve({f"/{n}": slow_answer for n in range(12)}) as site,
            Fetcher(site.settings(host_connections=3)) as fetcher,
        ):
            await asyncio.gather(*(fetcher.fetch(f"http://{HOST}/{n}") for n in range(12)))

    asyncio.run(run())
    assert most == 3


def test_the_crawl_delay_of_robots_reaches_the_gate() -> None:
    async def run() -> float:
        async with (
            serve({"/robots.txt": robots("User-agent: *\nCrawl-delay: 0.3")}) as site,
            Fetcher(site.settings()) as fetcher,
        ):
            started = asyncio.get_running_loop().time()
            await asyncio.gather(*(fetcher.fetch(f"http://{HOST}/{number}") for number in range(3)))
            return asyncio.get_running_loop().time() - started

    assert asyncio.run(run()) > 0.59  # three pages, two gaps of 0.3 s at least


@pytest.mark.parametrize("field", ["host_rate", "connections", "max_bytes", "max_attempts"])
def test_settings_that_let_nothing_through_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        FetchSettings(**{field: 0})
