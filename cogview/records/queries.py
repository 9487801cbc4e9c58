"""Queries and providers in, candidates out: the first images that each provider has for each query, each image once."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cogview.errors import ConfigError
from cogview.locations import find_files, suffix_of
from cogview.records.candidates import Candidate
from cogview.records.captions import clean_caption
from cogview.records.fetch import Fetcher
from cogview.records.pair import Unusable
from cogview.records.providers import PROVIDERS, Provider, Query, parse_results
from cogview.records.table_rows import SEPARATED, first_cells, table_rows
from cogview.records.urls import normalise_url

QUERY_SUFFIXES = (".tsv", ".csv", ".txt", ".jsonl", ".parquet")
CATEGORIES = ("food", "regions", "species", "people", "scenic", "products", "artworks")  # of the paper


@dataclass(frozen=True, kw_only=True)
class SearchStatus:
    """What became of one query at one provider. reason: empty if it was answered to the end."""

    provider: str
    query: Query
    images: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found. candidates: one for each image URL, in the order of queries and results."""

    candidates: tuple[Candidate, ...]
    statuses: tuple[SearchStatus, ...]


def read_queries(addresses: Sequence[str]) -> list[Query]:
    """The queries in tables with the columns `query` and `category`, or in lists of `category<TAB>query`.

    ConfigError where there are none.
    """
    queries: dict[Query, None] = {}
    for file in find_files(addresses, suffixes=QUERY_SUFFIXES, setting="queries"):
        queries.update(dict.fromkeys(_queries_of(file.address)))
    if not queries:
        raise ConfigError(
            f"queries: {', '.join(addresses)} has none; give lines of category<TAB>query, or columns of these names"
        )
    return list(queries)


async def search(
    fetcher: Fetcher,
    queries: Sequence[Query],
    *,
    providers: Sequence[str],
    per_query: int,
    endpoints: Mapping[str, str],
    on_query: Callable[[int, int], None] | None = None,
) -> Search:
    """Ask every provider for the first `per_query` images of every query.

    endpoints: other addresses than the public ones, by the provider's name. Providers are asked at once, each for one
    query after the other; the fetcher keeps their pace. ConfigError for an unknown provider, or if none answers at all.
    """
    chosen = [_provider(name, endpoints) for name in providers]
    done = 0

    async def ask_all(provider: Provider) -> list[tuple[SearchStatus, list[Candidate]]]:
        nonlocal done
        answers = []
        for query in queries:
            answers.append(await _ask(fetcher, provider, query, count=per_query))
            done += 1
            if on_query is not None:
                on_query(done, len(queries) * len(chosen))
        return answers

    columns = await asyncio.gather(*map(ask_all, chosen))
    found: dict[str, Candidate] = {}
    statuses = []
    for row in zip(*columns, strict=True):
        for status, candidates in row:
            statuses.append(status)
            for candidate in candidates:
                found.setdefault(candidate.source, candidate)
    if statuses and all(status.reason for status in statuses):
        raise ConfigError(f"providers: none of {', '.join(providers)} answered ({statuses[0].reason}); try again later")
    return Search(candidates=tuple(found.values()), statuses=tuple(statuses))


async def _ask(
    fetcher: Fetcher, provider: Provider, query: Query, *, count: int
) -> tuple[SearchStatus, list[Candidate]]:
    found: dict[str, Candidate] = {}
    more: Mapping[str, str] = {}
    reason = ""
    for _ in range(-(-count // provider.page_size) + 2):  # some results of a page may be no pictures
        answer = await fetcher.call(provider.address(query, count=count - len(found), more=more))
        if isinstance(answer, Unusable):
            reason = answer.reason
            break
        results = parse_results(answer.body, provider=provider, query=query)
        if results is None:
            reason = "answer_damaged"
            break
        for candidate in results.candidates:
            url = normalise_url(candidate.source)
            if isinstance(url, str):
                found.setdefault(url, candidate)
        more = results.more
        if len(found) >= count or not more:
            break
    candidates = list(found.values())[:count]
    return SearchStatus(provider=provider.name, query=query, images=len(candidates), reason=reason), candidates


def _provider(name: str, endpoints: Mapping[str, str]) -> Provider:
    if name not in PROVIDERS:
        raise ConfigError(f"providers: {name!r} is unknown; there are {' and '.join(PROVIDERS)}")
    known = PROVIDERS[name]
    return Provider(
        name=name,
        endpoint=endpoints.get(name, known.endpoint),
        page_size=known.page_size,
        parameters=known.parameters,
        read=known.read,
    )


def _queries_of(address: str) -> Iterator[Query]:
    has_header = suffix_of(address) not in SEPARATED or "query" in map(str.lower, first_cells(address)[0])
    for row in table_rows(address, has_header=has_header, columns=None):
        by_name = {str(name).strip().lower(): value for name, value in row.items()}
        values = [str(value) for value in row.values() if value is not None]
        text = by_name.get("query") if has_header else values[-1] if values else None
        category = by_name.get("category") if has_header else values[0] if len(values) > 1 else None
        cleaned = clean_caption(text) if isinstance(text, str) else ""
        if cleaned:
            yield Query(text=cleaned, category=clean_caption(str(category or "")))
