import http.server
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.locations import beside, find_files, open_data, open_decompressed, suffix_of

CSV = (".csv",)


def names(addresses: list[str], root: Path) -> list[str]:
    return [file.address.removeprefix(f"{root}/") for file in find_files(addresses, suffixes=CSV, setting="data")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in ("b.csv", "a.csv.gz", "c.txt", "_done.csv", "deep/er/d.csv", "deep/e[1].csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def web(corpus: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(corpus)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_files_folders_and_patterns_are_found_in_a_fixed_order(corpus: Path) -> None:
    assert names([str(corpus)], corpus) == ["a.csv.gz", "b.csv"]
    assert names([str(corpus / "c.txt"), str(corpus)], corpus) == ["c.txt", "a.csv.gz", "b.csv"]
    assert names([f"{corpus}/*.csv"], corpus) == ["_done.csv", "b.csv"]
    assert names([f"{corpus}/**/*.csv"], corpus) == ["_done.csv", "b.csv", "deep/e[1].csv", "deep/er/d.csv"]
    assert names([f"{corpus}/deep/*/[c-e].csv"], corpus) == ["deep/er/d.csv"]
    assert names([f"{corpus}/[!_]*.c?v*"], corpus) == ["a.csv.gz", "b.csv"]
    assert names([f"{corpus}/b.csv", f"{corpus}/*.csv"], corpus) == ["b.csv", "_done.csv"]
    assert names([f"{corpus}/deep/e[1].csv"], corpus) == ["deep/e[1].csv"]


def test_remote_file_systems_are_read_like_folders(corpus: Path, web: str) -> None:
    with zipfile.ZipFile(corpus / "x.zip", "w") as archive:
        archive.writestr("t/1.csv", "one")
        archive.writestr("t/2.csv", "two")
    for address in (f"zip://t/*.csv::{corpus}/x.zip", f"zip://t::{corpus}/x.zip"):
        files = find_files([address], suffixes=CSV, setting="data")
        assert [open_data(file.address).read() for file in files] == [b"one", b"two"]
    assert open_data(beside(files[0].address, "2.csv")).read() == b"two"
    (found,) = find_files([f"{web}/b.csv"], suffixes=CSV, setting="data")
    assert (found.name, found.size) == ("b.csv", 5)
    assert open_data(found.address).read() == b"b.csv"
    (local,) = find_files([f"file://{corpus}/b.csv"], suffixes=CSV, setting="data")
    assert open_decompressed(local.address).read() == b"b.csv"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("{0}/none.csv", "none.csv does not exist"),
        ("{0}/*.parquet", "holds no files ending in .csv"),
        ("nosuch://bucket/x.csv", "nosuch://bucket/x.csv cannot be reached"),
    ],
)
def test_what_is_not_there_is_named(corpus: Path, address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_files([address.format(corpus)], suffixes=CSV, setting="data")


def test_a_suffix_is_that_of_the_content() -> None:
    assert [suffix_of(name) for name in ("a.TSV.gz", "a.tar", "a.parquet", "s3://b/a.csv.zst")] == [
        ".tsv",
        ".tar",
        ".parquet",
        ".csv",
    ]
