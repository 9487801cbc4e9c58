import http.server
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow.parquet as pq
import pytest

from cogview.errors import ConfigError
from cogview.records.fetch import FetchSettings
from cogview.records.images import ImageSettings
from cogview.records.tars import read_pairs
from cogview.records.urls import AddressPolicy
from cogview.scenes.site import DemoSite, SiteConfig, expected_outcomes
from cogview.shards.manifest import read_manifest
from pipelines.runtime.jobs import run_job
from pipelines.scrape_pairs import DEMO_HOST, JOB, PRESETS, Config, main
from tests.pipelines.job_runs import ShownRun, open_run
from tests.pipelines.pair_folders import QuietDisplay
from tests.records.test_images import RED_TO_BLUE
from tests.records.web_site import encode

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SITE = SiteConfig(num_scenes=60, images_per_page=20)
SMALL = replace(PRESETS["smoke"], demo=SITE, shard_size=40)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.glob("*"))
        if path.suffix in (".tar", ".parquet", ".json")
    }


@contextmanager
def counted_requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DemoSite]]:
    """The demo sites that are opened meanwhile."""
    opened: list[DemoSite] = []
    enter = DemoSite.__enter__

    def remember(self: DemoSite) -> DemoSite:
        opened.append(self)
        return enter(self)

    monkeypatch.setattr(DemoSite, "__enter__", remember)
    yield opened


def results(query: str) -> bytes:
    """An answer of Openverse; every query finds the same pictures."""
    rows = [
        {
            "title": f"{query} {number}",
            "url": f"http://{DEMO_HOST}/images/{number}.png",
            "license": "cc0",
            "license_version": "1.0",
            "creator": "Ann",
        }
        for number in range(3)
    ]
    return json.dumps({"result_count": 3, "page_count": 1, "page": 1, "results": rows}).encode()


@contextmanager
def flaky_site(failing: Mapping[str, str]) -> Iterator[tuple[list[str], FetchSettings]]:
    """A site of the same picture everywhere, but for the paths that fail; what was asked, and how to reach it."""
    picture = encode(RED_TO_BLUE)
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status = failing.get(self.path, "200 OK" if "images" in self.path else "404 None")
            body = picture if status == "200 OK" else b""
            if self.path.startswith("/openverse/"):
                status, body = "200 OK", results(parse_qs(urlsplit(self.path).query)["q"][0])
            self.send_response(int(status.split()[0]))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    policy = AddressPolicy(resolve={f"{DEMO_HOST}:80": f"127.0.0.1:{server.server_address[1]}"})
    yield asked, FetchSettings(host_rate=1000.0, max_wait_s=0.1, policy=policy)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> ShownRun:
    run = open_run(tmp_path_factory.mktemp("scraped"))
    main(SMALL, run)
    return run


def test_every_link_of_the_demo_site_is_accounted_for(scraped: ShownRun) -> None:
    expected = expected_outcomes(SITE)
    manifest = read_manifest(scraped.output, deep=True)
    assert manifest["rows_in"] == sum(expected.values())
    assert manifest["rejected"] == {
        "http_404": expected["missing"],
        "image_truncated": expected["truncated"],
        "image_is_html": expected["html"],
        "caption_missing": expected["uncaptioned"],
        "robots_disallowed": expected["disallowed"],
    }
    assert manifest["rows_out"] == manifest["rows_in"] - sum(manifest["rejected"].values())
    assert scraped.scores["rows_out"] == manifest["rows_out"]
    assert f"         {expected['missing']}  http_404" in "\n".join(scraped.lines)


def test_pairs_have_both_captions_and_a_source_without_a_port(scraped: ShownRun) -> None:
    pairs = [pair for tar in sorted(scraped.output.glob("*.tar")) for pair in read_pairs(tar)]
    assert len({pair.key for pair in pairs}) == len(pairs) == scraped.scores["rows_out"]
    assert all(pair.source.startswith(f"http://{DEMO_HOST}/") for pair in pairs)
    scenes = [pair for pair in pairs if "/images/0" in pair.source]
    assert all(len(pair.captions) == 2 and not pair.captions[1].isascii() for pair in scenes)
    assert all(pair.image_bytes.startswith(b"\x89PNG") and pair.extra["width"] == 64 for pair in scenes)


def test_statuses_name_every_candidate_once(scraped: ShownRun) -> None:
    rows = [row for path in sorted(scraped.output.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]
    candidates = pq.read_table(scraped.output / "candidates.parquet")["source"].to_pylist()
    assert [row["source"] for row in rows] == candidates
    assert Counter(row["reason"] for row in rows if row["reason"]) == read_manifest(scraped.output)["rejected"]


def test_a_second_scrape_gives_the_same_bytes_from_another_port(scraped: ShownRun, tmp_path: Path) -> None:
    again = open_run(tmp_path)
    main(replace(SMALL, workers=1), again)
    assert bytes_of(again.output) == bytes_of(scraped.output)


def test_only_missing_shards_are_fetched_again(
    scraped: ShownRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(scraped.output, tmp_path / "copy")
    (output / "shard-00001.tar").write_bytes(b"cut short")
    with counted_requests(monkeypatch) as opened:
        main(SMALL, open_run(output))
    assert bytes_of(output) == bytes_of(scraped.output)
    paths = opened[0].requests.paths
    assert "/index.html" not in paths
    assert "/" not in paths
    of_shard = pq.read_table(output / "shard-00001.parquet")["source"].to_pylist()
    asked = {f"http://{DEMO_HOST}{path}" for path in paths if path.startswith(("/images/0", "/mirror"))}
    assert asked
    assert asked <= set(of_shard)


def test_a_finished_scrape_makes_no_request(run_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, demo=replace(SITE, num_scenes=20))
    first = run_job(JOB, config, root=run_root, display=QuietDisplay())
    with counted_requests(monkeypatch) as opened:
        second = run_job(JOB, replace(config, workers=1), root=run_root, display=QuietDisplay())
    assert second.was_done
    assert second.digest == first.digest
    assert opened == []


def test_pages_and_tables_of_addresses_are_scraped(tmp_path: Path, scraped: ShownRun) -> None:
    with DemoSite(SITE) as site:
        resolve = {f"{DEMO_HOST}:80": site.url.removeprefix("http://")}
        base = FetchSettings(host_rate=1000.0)
        fetch = replace(base, policy=replace(base.policy, resolve=resolve))
        common = replace(SMALL, demo=None, fetch=fetch)
        pages = open_run(tmp_path / "pages")
        main(
            replace(common, pages=(f"http://{DEMO_HOST}/gallery/000.html",), max_pages=3), pages
        )  # the index lies between them
        table = tmp_path / "t.tsv"
        rows = [f"caption {n}\thttp://{DEMO_HOST}/images/{n:06d}.png" for n in range(5)]
        table.write_text("\n".join([*rows, "inside\thttp://127.0.0.1/x.png", "bad\thttp://"]))
        listed = open_run(tmp_path / "table")
        main(replace(common, table=table), listed)
    assert pages.scores["rows_in"] == 2 * SITE.images_per_page
    assert listed.scores["rows_out"] == 5
    assert listed.scores["rejected_address_refused"] == 1
    assert listed.scores["rejected_url_invalid"] == 1


def test_failed_rows_are_retried_alone_and_the_rest_is_taken_over(tmp_path: Path) -> None:
    names = [f"/images/{number:06d}.png" for number in range(6)]
    failing = {names[1]: "503 Busy", names[3]: "404 Gone", names[4]: "500 Oops"}
    config = replace(SMALL, demo=None, shard_size=4, workers=1)
    first = open_run(tmp_path / "first")
    with flaky_site(failing) as (site, fetch):
        table = tmp_path / "t.tsv"
        table.write_text("".join(f"caption {name}\thttp://{DEMO_HOST}{name}\n" for name in names))
        main(replace(config, table=(str(table),), fetch=fetch), first)
    assert first.scores["rejected"] == 3
    again = open_run(tmp_path / "again")
    del failing[names[1]]
    out = tmp_path / "out.txt"
    out.write_text(f"http://{DEMO_HOST}{names[0]}\n")
    with flaky_site(failing) as (site, fetch):
        main(replace(config, retry=first.output, fetch=fetch, opt_out=(str(out),)), again)
        assert [path for path in site if "images" in path] == [names[1], *[names[4]] * 3]
    assert (again.scores["retried"], again.scores["recovered"]) == (2, 1)
    rows = [row for path in sorted(again.output.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["reason"] for row in rows] == ["opted_out", "", "", "http_404", "http_500", ""]
    assert [row["source"] for row in rows] == [f"http://{DEMO_HOST}{name}" for name in names]
    before, after = (
        {pair.key: pair for tar in sorted(run.output.glob("*.tar")) for pair in read_pairs(tar)}
        for run in (first, again)
    )
    assert list(after) == ["00000_00001", "00000_00002", "00001_00001"]
    assert all(after[key] == before[key] for key in ("00000_00002", "00001_00001"))
    assert read_manifest(again.output, deep=True)["rows_in"] == 6
    with pytest.raises(ConfigError, match="image-size 64"):
        main(replace(config, retry=first.output, image=ImageSettings(image_size=32)), open_run(tmp_path / "no"))


def test_entities_are_searched_for_and_their_licences_kept(tmp_path: Path) -> None:
    (tmp_path / "entities.tsv").write_text("food\tgreen tea\nscenic\tWest Lake\n")
    output = open_run(tmp_path / "searched")
    with flaky_site({}) as (site, fetch):
        endpoints = {"openverse": f"http://{DEMO_HOST}/openverse/"}
        config = replace(
            SMALL, demo=None, queries=(str(tmp_path / "entities.tsv"),), per_query=3, fetch=fetch, workers=1
        )
        main(replace(config, providers=("openverse",), endpoints=endpoints), output)
        assert sum(path.startswith("/openverse/") for path in site) == 2
    pairs = [pair for tar in sorted(output.output.glob("*.tar")) for pair in read_pairs(tar)]
    assert [pair.captions for pair in pairs] == [("green tea 0",), ("green tea 1",), ("green tea 2",)]
    assert {pair.extra["license"] for pair in pairs} == {"CC0 1.0"}
    assert {(pair.extra["category"], pair.extra["author"]) for pair in pairs} == {("food", "Ann")}
    asked = pq.read_table(output.output / "queries.parquet").to_pylist()
    assert [(row["category"], row["query"], row["images"]) for row in asked] == [
        ("food", "green tea", 3),
        ("scenic", "West Lake", 3),
    ]


def test_a_loopback_site_is_refused_unless_it_is_named(tmp_path: Path) -> None:
    with DemoSite(SITE) as site:
        config = replace(SMALL, demo=None, pages=(f"{site.url}/",))
        with pytest.raises(ConfigError, match=r"port_refused|address_refused"):
            main(config, open_run(tmp_path))
        assert site.requests.total == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"demo": None}, "none of them is given"),
        ({"pages": ("http://a.org/",)}, "demo and pages of them is given"),
        ({"demo": None, "pages": ("nonsense",)}, "no address to start from"),
    ],
)
def test_a_config_that_cannot_work_says_why(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        main(replace(SMALL, **changes), open_run(tmp_path))  # type: ignore[arg-type]


def test_a_table_of_files_is_sent_to_the_other_job(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\na.png,x\n")
    with pytest.raises(ConfigError, match="import_pairs --data"):
        main(replace(SMALL, demo=None, table=tmp_path / "t.csv"), open_run(tmp_path))


def test_a_shard_size_beyond_the_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="shard_size=0"):
        Config(shard_size=0)
    with pytest.raises(ConfigError, match="shard_size=100001"):
        Config(shard_size=100_001)
