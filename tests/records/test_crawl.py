import asyncio
import gzip
from typing import Any

import pytest

from cogview.errors import ConfigError
from cogview.records.candidates import Candidate
from cogview.records.crawl import Crawl, crawl
from cogview.records.fetch import Fetcher
from cogview.records.images import ImageSettings
from cogview.records.pair import Failure, TextImagePair
from cogview.records.scraping import scrape_pairs
from tests.records.test_images import RED_TO_BLUE
from tests.records.web_site import HOST, encode, reply, serve

HTML = {"Content-Type": "text/html"}
START = f"http://{HOST}/"


def html(text: str) -> bytes:
    return reply(text.encode(), headers=HTML)


SITE: dict[str, Any] = {
    "/": html('<a href="/1.html">1</a><a href="/2.html">2</a><a href="http://other.test/x">o</a><a href="/gone">g</a>'),
    "/1.html": html('<img src="/a.png" alt="one"><a href="/3.html">3</a><a href="/">back</a>'),
    "/2.html": html('<img src="/b.png" alt="b"><img src="/a.png" alt="again"><img src="/c.png" alt="">'),
    "/3.html": html('<img src="/cut.png" alt="cut"><img src="http://127.0.0.1/x.png" alt="inside">'),
    "/a.png": reply(encode(RED_TO_BLUE)),
    "/b.png": reply(encode(RED_TO_BLUE.rotate(90))),
    "/cut.png": reply(encode(RED_TO_BLUE, "JPEG")[:-200]),
}


def walk(max_pages: int = 100, start: str = START) -> tuple[Crawl, list[str]]:
    async def run() -> tuple[Crawl, list[str]]:
        async with serve(SITE) as site, Fetcher(site.settings()) as fetcher:
            return await crawl(fetcher, [start], max_pages=max_pages), site.requests

    return asyncio.run(run())


def test_a_site_is_walked_once_and_not_left() -> None:
    found, requests = walk()
    assert [page.url.removeprefix(START) for page in found.pages] == ["", "1.html", "2.html", "gone", "3.html"]
    assert [page.reason for page in found.pages] == ["", "", "", "http_404", ""]
    assert sorted(requests) == sorted(["/robots.txt", "/", "/1.html", "/2.html", "/gone", "/3.html"])


def test_candidates_have_the_captions_of_all_pages() -> None:
    found, _ = walk()
    assert [(row.source, row.captions) for row in found.candidates] == [
        (f"{START}a.png", ("one", "again")),
        (f"{START}b.png", ("b",)),
        (f"{START}c.png", ()),
        (f"{START}cut.png", ("cut",)),
        ("http://127.0.0.1/x.png", ("inside",)),
    ]
    assert found.candidates[0].extra == {"page": f"{START}1.html", "domain": HOST}


def test_a_page_budget_is_kept() -> None:
    found, _ = walk(max_pages=2)
    assert len(found.pages) == 2


def test_links_are_followed_to_a_depth() -> None:
    async def run(depth: int) -> list[str]:
        async with serve(SITE) as site, Fetcher(site.settings()) as fetcher:
            found = await crawl(fetcher, [START], max_pages=100, max_depth=depth)
            return [page.url.removeprefix(START) for page in found.pages]

    assert asyncio.run(run(0)) == [""]
    assert asyncio.run(run(1)) == ["", "1.html", "2.html", "gone"]
    assert asyncio.run(run(2)) == ["", "1.html", "2.html", "gone", "3.html"]


def test_sitemaps_of_robots_lead_to_pages_that_nobody_links() -> None:
    index = b"<sitemapindex><sitemap><loc>/map.xml.gz</loc></sitemap></sitemapindex>"
    pages = (
        b"<urlset><url><loc>http://site.test/lonely.html</loc></url><url><loc>http://else.test/</loc></url></urlset>"
    )
    answers = {
        "/robots.txt": reply(b"User-agent: *\nSitemap: http://site.test/index.xml\n"),
        "/index.xml": reply(index, headers={"Content-Type": "application/xml"}),
        "/map.xml.gz": reply(gzip.compress(pages), headers={"Content-Type": "application/gzip"}),
        "/": html("nothing"),
        "/lonely.html": html('<img src="/a.png" alt="lonely">'),
    }

    async def run() -> Crawl:
        async with serve(answers) as site, Fetcher(site.settings()) as fetcher:
            return await crawl(fetcher, [START], max_pages=100, sitemaps=True)

    found = asyncio.run(run())
    assert [row.captions for row in found.candidates] == [("lonely",)]
    assert [page.url.removeprefix(START) for page in found.pages] == ["", "index.xml", "map.xml.gz", "lonely.html"]


def test_a_start_page_that_cannot_be_read_stops_the_run() -> None:
    for start, words in (
        (f"{START}nowhere", "http_404"),
        ("ftp://x", "scheme_refused"),
        ("http://127.0.0.1/", "refused"),
    ):
        with pytest.raises(ConfigError, match=words):
            walk(start=start)


def test_scraping_keeps_the_order_and_accounts_for_every_candidate() -> None:
    async def run() -> list[TextImagePair | Failure]:
        async with serve(SITE) as site, Fetcher(site.settings(connections=1, max_attempts=1)) as fetcher:
            found = await crawl(fetcher, [START], max_pages=10)
            rows: list[Candidate] = [*found.candidates] * 3
            return [
                row async for row in scrape_pairs(enumerate(rows), shard=7, fetcher=fetcher, settings=ImageSettings())
            ]

    outcomes = asyncio.run(run())
    assert [row.key for row in outcomes] == [f"00007_{number:05d}" for number in range(15)]
    results = [row.reason if isinstance(row, Failure) else "ok" for row in outcomes]
    assert results == ["ok", "ok", "caption_missing", "image_truncated", "address_refused"] * 3
    first = outcomes[0]
    assert isinstance(first, TextImagePair)
    assert first.captions == ("one", "again")
    assert (first.extra["width"], first.extra["height"], first.extra["page"]) == (96, 64, f"{START}1.html")
