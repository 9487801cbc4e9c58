import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cogview.errors import ConfigError
from cogview.records.fetch import Fetcher
from cogview.records.providers import PROVIDERS, Query, parse_results
from cogview.records.queries import Search, read_queries, search
from tests.records.web_site import HOST, Answer, reply, serve

TEA = Query(text="green tea", category="food")
ENDPOINTS = {"openverse": f"http://{HOST}/v1/images/", "wikimedia": f"http://{HOST}/w/api.php"}


def openverse(first: int, count: int, *, page: int = 1, pages: int = 1) -> dict[str, Any]:
    """An answer of /v1/images/ as its documentation describes it."""
    return {
        "result_count": count * pages,
        "page_count": pages,
        "page_size": 20,
        "page": page,
        "results": [
            {
                "id": f"uuid-{number}",
                "title": f"Tea number {number}",
                "foreign_landing_url": f"https://www.flickr.com/photos/a/{number}",
                "url": f"https://live.staticflickr.com/{number}.jpg",
                "creator": "A. Photographer",
                "creator_url": "https://www.flickr.com/photos/a",
                "license": "by-sa",
                "license_version": "2.0",
                "license_url": "https://creativecommons.org/licenses/by-sa/2.0/",
                "provider": "flickr",
                "source": "flickr",
                "filetype": "jpg",
                "tags": [{"name": "tea", "accuracy": None}, {"name": "green"}],
                "mature": False,
                "width": 1024,
                "height": 768,
            }
            for number in range(first, first + count)
        ],
    }


def commons(first: int, count: int, *, more: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """An answer of action=query with generator=search and prop=imageinfo (formatversion 2)."""
    metadata = {
        "LicenseShortName": {"value": "CC BY-SA 4.0", "source": "commons-desc-page"},
        "LicenseUrl": {"value": "https://creativecommons.org/licenses/by-sa/4.0"},
        "Artist": {"value": '<a href="//commons.wikimedia.org/wiki/User:B" title="User:B">B &amp; C</a>'},
        "ImageDescription": {"value": "A <b>cup</b> of tea"},
        "Credit": {"value": '<span class="int-own-work">Own work</span>'},
    }
    pages = [
        {
            "pageid": number,
            "ns": 6,
            "title": f"File:Cup of tea {number}.jpg",
            "index": number - first + 1,
            "imageinfo": [
                {
                    "url": f"https://upload.wikimedia.org/{number}.jpg",
                    "thumburl": f"https://upload.wikimedia.org/thumb/{number}.jpg/1024px",
                    "descriptionurl": f"https://commons.wikimedia.org/wiki/File:Cup_of_tea_{number}.jpg",
                    "mime": "image/jpeg",
                    "extmetadata": metadata,
                    **changes,
                }
            ],
        }
        for number in range(first, first + count)
    ]
    return {"batchcomplete": True, **({"continue": more} if more else {}), "query": {"pages": pages[::-1]}}


def find(
    answers: dict[str, list[dict[str, Any]] | bytes], *, providers: list[str], per_query: int = 100
) -> tuple[Search, list[str]]:
    """Search at a site that answers each provider's requests one after the other."""
    served: dict[str, Answer | list[Answer]] = {
        urlsplit(ENDPOINTS[name]).path: (
            given if isinstance(given, bytes) else [reply(json.dumps(page).encode()) for page in given]
        )
        for name, given in answers.items()
    }

    async def run() -> tuple[Search, list[str]]:
        async with serve(served) as site, Fetcher(site.settings(max_attempts=1)) as fetcher:
            found = await search(fetcher, [TEA], providers=providers, per_query=per_query, endpoints=ENDPOINTS)
            return found, site.requests

    return asyncio.run(run())


def asked(request: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(request).query).items()}


def test_openverse_gives_licence_author_and_source_with_every_picture() -> None:
    pages = [openverse(0, 20, page=1, pages=2), openverse(20, 20, page=2, pages=2)]
    found, requests = find({"openverse": pages}, providers=["openverse"], per_query=25)
    assert [row.source for row in found.candidates] == [f"https://live.staticflickr.com/{n}.jpg" for n in range(25)]
    first = found.candidates[0]
    assert first.captions == ("Tea number 0", "tea, green")
    assert first.extra == {
        "license": "BY-SA 2.0",
        "license_url": "https://creativecommons.org/licenses/by-sa/2.0/",
        "author": "A. Photographer",
        "author_url": "https://www.flickr.com/photos/a",
        "page": "https://www.flickr.com/photos/a/0",
        "provider": "openverse/flickr",
        "query": "green tea",
        "category": "food",
    }
    assert [asked(request) for request in requests] == [
        {"q": "green tea", "page_size": "20", "mature": "false"},
        {"q": "green tea", "page_size": "5", "mature": "false", "page": "2"},
    ]


def test_commons_answers_are_followed_in_the_order_of_the_search() -> None:
    more = {"gsroffset": 2, "continue": "gsroffset||"}
    found, requests = find(
        {"wikimedia": [commons(0, 2, more=more), commons(2, 2)]}, providers=["wikimedia"], per_query=60
    )
    assert [row.source.split("/")[-2] for row in found.candidates] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    first = found.candidates[0]
    assert first.captions == ("A cup of tea", "Cup of tea 0")
    assert first.extra == {
        "license": "CC BY-SA 4.0",
        "license_url": "https://creativecommons.org/licenses/by-sa/4.0",
        "author": "B & C",
        "credit": "Own work",
        "page": "https://commons.wikimedia.org/wiki/File:Cup_of_tea_0.jpg",
        "original_url": "https://upload.wikimedia.org/0.jpg",
        "provider": "wikimedia_commons",
        "query": "green tea",
        "category": "food",
    }
    assert asked(requests[0])["gsrsearch"] == "filetype:bitmap green tea"
    assert (asked(requests[0])["gsrlimit"], asked(requests[0])["gsrnamespace"]) == ("50", "6")
    assert asked(requests[1])["gsroffset"] == "2"


def test_pictures_without_a_licence_or_of_another_kind_are_left_out() -> None:
    for changes in (
        {"extmetadata": {}},
        {"mime": "image/svg+xml"},
        {"url": None, "thumburl": None},
        {"extmetadata": 3},
    ):
        found, _ = find({"wikimedia": [commons(0, 2, **changes)]}, providers=["wikimedia"])
        assert found.candidates == ()
    document = openverse(0, 2)
    document["results"][0]["license"] = ""
    document["results"].append(None)
    found, _ = find({"openverse": [document]}, providers=["openverse"])
    assert [row.source[-5:] for row in found.candidates] == ["1.jpg"[-5:]]


def test_one_image_of_two_providers_comes_once_and_silence_is_written_down() -> None:
    same = openverse(0, 1)
    same["results"][0]["url"] = "https://upload.wikimedia.org/thumb/0.jpg/1024px"
    both = {"openverse": [same], "wikimedia": [commons(0, 1)]}
    found, _ = find(both, providers=["openverse", "wikimedia"])
    assert len(found.candidates) == 1
    assert [(s.provider, s.images, s.reason) for s in found.statuses] == [("openverse", 1, ""), ("wikimedia", 1, "")]
    for broken, reason in ((reply(b"[1]"), "answer_damaged"), (reply(status="429 Slow"), "http_429")):
        found, _ = find({"openverse": broken, "wikimedia": [commons(0, 1)]}, providers=["openverse", "wikimedia"])
        assert [status.reason for status in found.statuses] == [reason, ""]
        with pytest.raises(ConfigError, match=f"none of openverse answered .{reason}"):
            find({"openverse": broken}, providers=["openverse"])
    with pytest.raises(ConfigError, match="there are openverse and wikimedia"):
        find({}, providers=["bing"])


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"{", b'{"error": {"code": "maxlag"}}', b'{"results": {"a": 1}}', b'{"query": [{"pages": 3}]}'),
        *(b'{"query": {"pages": [{"imageinfo": "x"}]}, "continue": 3}', b"[" * 100_000),
    ],
)
def test_no_answer_of_another_shape_breaks_the_search(body: bytes) -> None:
    for provider in PROVIDERS.values():
        results = parse_results(body, provider=provider, query=TEA)
        assert results is None or results.candidates == ()


def test_queries_are_lists_of_category_and_entity(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("food\tgreen tea\nscenic\tWest Lake\nfood\tgreen tea\n\n")
    (tmp_path / "b.csv").write_text("id,Query,category\n1, 长城 ,scenic\n2,,food\n")
    (tmp_path / "c.txt").write_text("panda\n")
    assert read_queries([str(tmp_path)]) == [
        TEA,
        Query(text="West Lake", category="scenic"),
        Query(text="长城", category="scenic"),
        Query(text="panda", category=""),
    ]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="category<TAB>query"):
        read_queries([str(tmp_path / "empty.txt")])
