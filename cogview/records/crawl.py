"""Start pages in; out come the candidates of their sites, in an order that depends on the sites alone.

The crawl goes level by level and stays on the hosts of the start pages. Pages of one level are fetched together, but
read in the order in which they were linked, so that speed and luck change nothing.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from cogview.errors import ConfigError
from cogview.records.candidates import Candidate
from cogview.records.fetch import Fetched, Fetcher
from cogview.records.pages import DEFAULT_WORDS, MAX_CAPTIONS, Page, Words, read_page
from cogview.records.pair import Unusable
from cogview.records.robots import product_token
from cogview.records.urls import normalise_url, origin_of

NO_LIMIT = 1_000_000
_BATCH = 64  # pages of a level asked for at once; the fetcher's own limits are stricter


@dataclass(frozen=True, kw_only=True)
class PageStatus:
    """What became of one page. reason: empty if it was read."""

    url: str
    images: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Crawl:
    """What a crawl found. candidates: one for each image URL, with the captions of all pages that show it."""

    candidates: tuple[Candidate, ...]
    pages: tuple[PageStatus, ...]


async def crawl(
    fetcher: Fetcher,
    start: Sequence[str],
    *,
    max_pages: int,
    max_depth: int = NO_LIMIT,
    words: Collection[Words] = DEFAULT_WORDS,
    sitemaps: bool = False,
    on_page: Callable[[int, int], None] | None = None,
) -> Crawl:
    """Walk the sites of the `start` pages, or of sitemaps, at most `max_pages` pages.

    max_depth: links followed from a start page (0: the start pages alone; a sitemap's pages are a link away); words:
    where captions may come from; sitemaps: also begin with those that the sites' robots.txt name; on_page: called with
    (pages read, pages known). ConfigError if a start address cannot be used or fetched.
    """
    first = [_start_url(url) for url in start]
    sites = {origin_of(url) for url in first}
    named = await _sitemaps_of(fetcher, sorted(sites)) if sitemaps else ()
    known = dict.fromkeys((*first, *named), 0)
    images: dict[str, Candidate] = {}
    statuses: list[PageStatus] = []
    queue = list(known)
    while queue and len(statuses) < max_pages:
        batch = queue[: min(_BATCH, max_pages - len(statuses))]
        queue = queue[len(batch) :]
        for url, answer in zip(batch, await asyncio.gather(*map(fetcher.fetch, batch)), strict=True):
            page, status = _read(url, answer, fetcher, words=words)
            if url in first and isinstance(answer, Unusable):
                raise ConfigError(f"pages: {url} cannot be read: {answer.reason} {answer.detail}".rstrip())
            statuses.append(status)
            _add_images(images, page, url)
            deeper = known[url] + 1
            links = page.links if deeper <= max_depth else ()
            new = [link for link in links if origin_of(link) in sites and link not in known]
            known.update(dict.fromkeys(new, deeper))
            queue.extend(new)
        if on_page is not None:
            on_page(len(statuses), min(len(known), max_pages))
    return Crawl(candidates=tuple(images.values()), pages=tuple(statuses))


async def _sitemaps_of(fetcher: Fetcher, sites: Sequence[str]) -> list[str]:
    """The sitemaps that robots.txt names, on whatever host: the site itself vouches for them."""
    found: dict[str, None] = {}
    for site in sites:
        rules = await fetcher.rules_of(f"{site}/")
        for url in () if isinstance(rules, Unusable) else rules.robots.sitemaps:
            normalised = normalise_url(url, base=f"{site}/")
            if isinstance(normalised, str):
                found[normalised] = None
    return list(found)


def _start_url(url: str) -> str:
    normalised = normalise_url(url)
    if isinstance(normalised, Unusable):
        raise ConfigError(f"pages: {url!r} is no address to start from ({normalised.reason}); give http(s)://host/path")
    return normalised


def _read(
    url: str, answer: Fetched | Unusable, fetcher: Fetcher, *, words: Collection[Words]
) -> tuple[Page, PageStatus]:
    if isinstance(answer, Unusable):
        return Page(), PageStatus(url=url, images=0, reason=answer.reason)
    if answer.content_type.lower().startswith(("image/", "video/", "audio/", "font/")):
        return Page(), PageStatus(url=url, images=0, reason="not_a_page")
    product = product_token(fetcher.settings.user_agent)
    page = read_page(answer.body, url=answer.url, content_type=answer.content_type, product=product, words=words)
    return page, PageStatus(url=url, images=len(page.images), reason="robots_tag" if page.refuses else "")


def _add_images(images: dict[str, Candidate], page: Page, url: str) -> None:
    for image in page.images:
        before = images.get(image.url)
        captions = (*before.captions, *image.captions) if before else image.captions
        extra = before.extra if before else {"page": url, "domain": urlsplit(url).hostname or ""}
        distinct = tuple(dict.fromkeys(captions))[:MAX_CAPTIONS]
        images[image.url] = Candidate(source=image.url, captions=distinct, extra=extra)
