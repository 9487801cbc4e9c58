"""Image search with open licences: a query in, candidates with licence, author and source out.

The paper's channel 5 asked search engines for named entities and took the first hundred images of each. Here the
engines are two whose pictures may be used: Openverse and Wikimedia Commons, by their public JSON interfaces. A provider
is two functions: the address of one page of results, and the candidates in its answer.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from typing import Any
from urllib.parse import urlencode

from cogview.records.candidates import Candidate
from cogview.records.captions import clean_captions

_TAG = re.compile(r"<[^>]{0,2000}>")
_FILE_TITLE = re.compile(r"^File:|\.(jpe?g|png|gif|webp|tiff?|svg)$", re.IGNORECASE)
_RASTER = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
MAX_TEXT = 2000


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to search for. text: the entity's name; category: its kind, such as `food`."""

    text: str
    category: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """One page of results, in the provider's order. more: what the address of the next page needs; empty at the end."""

    candidates: tuple[Candidate, ...]
    more: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Provider:
    """A search interface.

    endpoint: its address; page_size: results to a request that everybody may ask for; parameters: of (query, count,
    `Results.more` of the page before); read: the answer of its JSON.
    """

    name: str
    endpoint: str
    page_size: int
    parameters: Callable[[Query, int, Mapping[str, str]], Mapping[str, str]]
    read: Callable[[Mapping[str, Any], Query], Results]

    def address(self, query: Query, *, count: int, more: Mapping[str, str]) -> str:
        """The URL of one page of results."""
        return f"{self.endpoint}?{urlencode(self.parameters(query, min(count, self.page_size), more))}"


def parse_results(body: bytes, *, provider: Provider, query: Query) -> Results | None:
    """The results in an answer; None if it is not what the provider documents."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or "error" in document:
        return None
    return provider.read(document, query)


def _openverse_parameters(query: Query, count: int, more: Mapping[str, str]) -> Mapping[str, str]:
    return {"q": query.text, "page_size": str(count), "mature": "false", **more}


def _openverse_results(document: Mapping[str, Any], query: Query) -> Results:
    """`results` of /v1/images/; `page` counts from one to `page_count`."""
    rows = [row for row in _mappings(document.get("results")) if row.get("url") and row.get("license")]
    candidates = []
    for row in rows:
        version = str(row.get("license_version") or "")
        rights = {
            "license": f"{row['license']} {version}".strip().upper(),
            "license_url": row.get("license_url"),
            "author": row.get("creator"),
            "author_url": row.get("creator_url"),
            "page": row.get("foreign_landing_url"),
            "provider": f"openverse/{row.get('source') or row.get('provider') or ''}".rstrip("/"),
        }
        tags = [tag.get("name") for tag in _mappings(row.get("tags"))][:8]
        words = (row.get("title"), ", ".join(tag for tag in tags if isinstance(tag, str)))
        candidates.append(_candidate(row["url"], words, rights, query))
    page, pages = _number(document.get("page"), 1), _number(document.get("page_count"), 1)
    more = {"page": str(page + 1)} if rows and page < pages else {}
    return Results(candidates=tuple(candidates), more=more)


def _commons_parameters(query: Query, count: int, more: Mapping[str, str]) -> Mapping[str, str]:
    return {
        "action": "query",
        "format": "json",
        "formatversion": "2",
        "generator": "search",
        "gsrsearch": f"filetype:bitmap {query.text}",
        "gsrnamespace": "6",  # files
        "gsrlimit": str(count),
        "prop": "imageinfo",
        "iiprop": "url|mime|size|extmetadata",
        "iiextmetadatafilter": "ImageDescription|ObjectName|LicenseShortName|LicenseUrl|Artist|Credit",
        "iiurlwidth": "1024",
        "maxlag": "5",
        **more,
    }


def _commons_results(document: Mapping[str, Any], query: Query) -> Results:
    """`query.pages` of the action interface; `index` is the place in the search, `continue` leads to the next page."""
    found = document.get("query")
    pages = list(_mappings(found.get("pages") if isinstance(found, dict) else None))
    candidates = []
    for page in sorted(pages, key=lambda page: _number(page.get("index"), 0)):
        info: Mapping[str, Any] = next(_mappings(page.get("imageinfo")), {})
        url = info.get("thumburl") or info.get("url")
        given = info.get("extmetadata")
        about: Mapping[str, Any] = given if isinstance(given, dict) else {}
        licence = _value(about, "LicenseShortName")
        if not url or not licence or info.get("mime") not in _RASTER:
            continue
        rights = {
            "license": licence,
            "license_url": _value(about, "LicenseUrl"),
            "author": _value(about, "Artist"),
            "credit": _value(about, "Credit"),
            "page": info.get("descriptionurl"),
            "original_url": info.get("url"),
            "provider": "wikimedia_commons",
        }
        title = _FILE_TITLE.sub("", _FILE_TITLE.sub("", str(page.get("title") or "")).replace("_", " "))
        words = (_value(about, "ImageDescription"), _value(about, "ObjectName") or title)
        candidates.append(_candidate(url, words, rights, query))
    more = document.get("continue")
    going_on = {str(name): str(value) for name, value in more.items()} if isinstance(more, dict) and pages else {}
    return Results(candidates=tuple(candidates), more=going_on)


PROVIDERS: Mapping[str, Provider] = {
    "openverse": Provider(
        name="openverse",
        endpoint="https://api.openverse.org/v1/images/",
        page_size=20,  # of those who have not registered
        parameters=_openverse_parameters,
        read=_openverse_results,
    ),
    "wikimedia": Provider(
        name="wikimedia",
        endpoint="https://commons.wikimedia.org/w/api.php",
        page_size=50,
        parameters=_commons_parameters,
        read=_commons_results,
    ),
}


def _candidate(url: object, words: Sequence[object], rights: Mapping[str, object], query: Query) -> Candidate:
    """A result with its words as captions; the query itself where the author wrote none."""
    captions = clean_captions([word[:MAX_TEXT] if isinstance(word, str) else word for word in words])
    kept = {name: value[:MAX_TEXT] for name, value in rights.items() if isinstance(value, str) and value}
    extra = {**kept, "query": query.text, "category": query.category}
    return Candidate(source=str(url), captions=captions or clean_captions([query.text]), extra=extra)


def _value(about: Mapping[str, Any], name: str) -> str:
    """A field of extmetadata, which is HTML, as words."""
    field = about.get(name)
    value = field.get("value") if isinstance(field, dict) else None
    return " ".join(unescape(_TAG.sub(" ", value)).split()) if isinstance(value, str) else ""


def _mappings(items: object) -> Iterator[dict[str, Any]]:
    return (item for item in (items if isinstance(items, list) else []) if isinstance(item, dict))


def _number(value: object, default: int) -> int:
    return value if isinstance(value, int) else default
