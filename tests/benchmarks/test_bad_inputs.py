import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bad_inputs import fetch_settings
from benchmarks.hostile.cases import Case, Verdict, wrong
from benchmarks.hostile.files import file_verdicts
from benchmarks.hostile.texts import text_verdicts
from benchmarks.hostile.web import INSIDE, LYING_RESOLVER, HostileSite, Site, web_cases
from cogview.records.candidates import Candidate
from cogview.records.fetch import Fetcher
from cogview.records.images import ImageSettings
from cogview.records.pair import Failure
from cogview.records.scraping import scrape_pairs

SLOW = ("/slow", "/silent", "rebinds")  # the benchmark has these too
connections: list[str] = []


def record(event: str, given: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(given[1], tuple):
        connections.append(f"{given[1][0]}:{given[1][1]}")


sys.addaudithook(record)


def scrape(site: Site, cases: list[Case]) -> list[Verdict]:
    async def run() -> list[Verdict]:
        candidates = [Candidate(source=case.given, captions=("x",)) for case in cases]
        async with Fetcher(fetch_settings(site)) as fetcher:
            outcomes = scrape_pairs(
                enumerate(candidates), shard=0, fetcher=fetcher, settings=ImageSettings(image_size=64)
            )
            found = [row.reason if isinstance(row, Failure) else "ok" async for row in outcomes]
        return [Verdict(case=case, found=reason) for case, reason in zip(cases, found, strict=True)]

    return asyncio.run(run())


def test_bad_files_get_their_reasons_and_run_no_code(tmp_path: Path) -> None:
    assert wrong(file_verdicts(tmp_path)) == []


def test_bad_captions_become_plain_words(tmp_path: Path) -> None:
    assert wrong(text_verdicts(tmp_path)) == []


def test_a_hostile_site_gets_one_reason_a_row_and_nothing_inside_is_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", socket.getaddrinfo)  # given back after the lies
    exec(LYING_RESOLVER, {})
    cases = [case for case in web_cases(large=False) if not any(word in f"{case.name} {case.given}" for word in SLOW)]
    with HostileSite(tmp_path, large=False) as site:
        connections.clear()
        verdicts = scrape(site, cases)
        made = list(connections)
    assert wrong(verdicts) == []
    assert len(INSIDE) >= 40
    assert len(made) > 50
    assert set(made) <= set(site.resolve.values())
