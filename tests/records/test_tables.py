import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogview.errors import ConfigError
from cogview.records.candidates import Candidate, count_candidates, read_candidates, write_candidates
from cogview.records.tables import TableColumns, inspect_table, read_table


def rows_of(path: Path, **given: object) -> list[tuple[str, tuple[str, ...]]]:
    columns = inspect_table(path, **given)  # type: ignore[arg-type]
    return [(row.source, row.captions) for row in read_table(path, columns)]


def write(path: Path, text: str, *, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path) -> None:
    records = [
        {"image": "a.png", "caption_en": "a, red dog", "caption_zh": "红狗", "caption_type": "label"},
        {"image": "b.png", "caption_en": 'a "blue" cat', "caption_zh": "", "caption_type": "label"},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "t.parquet")
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    write(tmp_path / "t.jsonl", "\n".join(json.dumps(record) for record in records))
    write(tmp_path / "t.tsv", "\n".join("\t".join(row) for row in (records[0], *(r.values() for r in records))))
    expected = [("a.png", ("a, red dog", "红狗")), ("b.png", ('a "blue" cat',))]
    for suffix in ("parquet", "csv", "jsonl", "tsv"):
        assert rows_of(tmp_path / f"t.{suffix}") == expected, suffix


def test_the_usual_names_are_found_in_any_case(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "SIMILARITY,URL,TEXT,width\n0.3,http://a.org/1.jpg,a dog,20\n")
    assert inspect_table(path) == TableColumns(image="URL", captions=("TEXT",), is_web=True)


def test_columns_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "was,link,wie\nein Hund,x.png,gut\n")
    assert rows_of(path, image_column="link", caption_fields=("was", "wie")) == [("x.png", ("ein Hund", "gut"))]


def test_a_table_without_a_header_is_understood(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", 'a "quoted dog\thttp://a.org/1.jpg\na cat\thttp://a.org/2.jpg\n')
    assert rows_of(path) == [("http://a.org/1.jpg", ('a "quoted dog',)), ("http://a.org/2.jpg", ("a cat",))]


def test_unquoted_commas_stay_in_the_caption(tmp_path: Path) -> None:
    headless = write(tmp_path / "a.csv", "a.png,red, green, blue\nb.png,plain\nc.png,\n")
    assert rows_of(headless) == [("a.png", ("red, green, blue",)), ("b.png", ("plain",)), ("c.png", ())]
    headed = write(tmp_path / "b.csv", "path,caption\na.png,red, green\n")
    assert rows_of(headed) == [("a.png", ("red, green",))]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "url,width\nhttp://a.org/1.jpg,3\n", "no caption column; its columns are url, width"),
        ("t.csv", "foo,bar\nhttp://a.org/1.jpg,3\n", "no caption column; its columns are foo, bar"),
        ("t.csv", "caption,width\na dog,3\n", "no column of image URLs or paths; its columns are caption, width"),
        ("t.txt", "http://a.org/1.jpg\nhttp://a.org/2.jpg\n", "no caption column"),
        ("t.jsonl", "", "has no rows"),
        ("t.csv", "", "has no rows"),
        ("t.jsonl", '{"caption": "x"}', "no column of image URLs or paths; its columns are caption"),
        ("t.parquet", "PAR1 this is no parquet PAR1", "cannot be read as Parquet"),
        ("t.parquet", "", "cannot be read as Parquet"),
    ],
)
def test_a_table_that_cannot_work_says_what_there_is(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        inspect_table(write(tmp_path / name, text))


def test_given_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "url,caption\nhttp://a.org/1.jpg,dog\n")
    with pytest.raises(ConfigError, match="no column title; its columns are url, caption"):
        inspect_table(path, caption_fields=("title",))
    with pytest.raises(ConfigError, match="no column link; its columns are url, caption"):
        inspect_table(path, image_column="link")


def test_bad_rows_are_rows_and_never_errors(tmp_path: Path) -> None:
    lines = [
        '{"url": "http://a.org/1.jpg", "caption": "ok"}',
        "{broken",
        "[1]",
        '{"url": 3, "caption": ["x", 4]}',
        "[" * 5000,
    ]
    lines += [
        '{"url": "http://a.org/2.jpg", "caption": "lone \\ud800"}',
        '{"url": "x\\ud800", "caption": "y"}',
        "",
        "9" * 9,
    ]
    path = write(tmp_path / "t.jsonl", "\n".join(lines))
    rows = rows_of(path)
    assert rows == [
        ("http://a.org/1.jpg", ("ok",)),
        ("", ()),
        ("", ()),
        ("", ("x",)),
        ("", ()),
        ("http://a.org/2.jpg", ("lone",)),
        ("x?", ("y",)),
        ("", ()),
    ]


def test_a_line_of_many_megabytes_costs_one_row(tmp_path: Path) -> None:
    text = (
        "url,caption\nhttp://a.org/1.jpg,ok\n" + "x" * 5_000_000 + "\nhttp://a.org/2.jpg,ok\r\nhttp://a.org/3.jpg,\0ok"
    )
    sources = [source for source, captions in rows_of(write(tmp_path / "t.csv", text)) if captions]
    assert sources == [f"http://a.org/{number}.jpg" for number in (1, 2, 3)]


def test_bytes_and_lists_in_parquet_are_text(tmp_path: Path) -> None:
    table = pa.table({"url": [b"http://a.org/1.jpg", None], "captions": [["one", "two", None], None]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert rows_of(tmp_path / "t.parquet") == [("http://a.org/1.jpg", ("one", "two")), ("", ())]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a.png"])] * 3, names=["url", "caption", "caption"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="two columns of one name"):
        inspect_table(tmp_path / "t.parquet")


def test_an_image_column_says_whether_it_holds_addresses(tmp_path: Path) -> None:
    local = write(tmp_path / "a.csv", "image,caption\nimages/a.png,x\n")
    web = write(tmp_path / "b.csv", "image,caption\nhttps://a.org/a.png,x\n")
    assert not inspect_table(local).is_web
    assert inspect_table(web).is_web


@pytest.mark.parametrize(
    ("name", "rows", "is_web", "without_caption"),
    [
        ("conceptual_captions_validation.tsv", 15_833, True, 0),
        ("img2dataset_test_1000.parquet", 1_000, True, 0),
        ("img2dataset_test_10000.parquet", 10_000, True, 0),
        ("unsplash_lite_manifest.csv", 328, False, 158),
    ],
)
def test_real_tables_are_read(shared_data: Path, name: str, rows: int, is_web: bool, without_caption: int) -> None:
    path = shared_data / "url_lists" / name
    columns = inspect_table(path)
    candidates = list(read_table(path, columns))
    assert columns.is_web == is_web
    assert len(candidates) == rows
    assert all(row.source for row in candidates)
    assert sum(not row.captions for row in candidates) == without_caption


def test_a_real_list_of_addresses_alone_is_refused(shared_data: Path) -> None:
    with pytest.raises(ConfigError, match="no caption column"):
        inspect_table(shared_data / "url_lists" / "img2dataset_test_1000.txt")


def test_candidates_come_back_shard_by_shard(tmp_path: Path) -> None:
    rows = [Candidate(source=f"http://a.org/{n}", captions=("x",) * (n % 3), extra={"n": n}) for n in range(25)]
    for name in ("a.parquet", "b.parquet"):
        with open(tmp_path / name, "wb") as file:
            assert write_candidates(file, iter(rows), shard_size=10) == 25
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert count_candidates(tmp_path / "a.parquet") == (25, 3)
    assert [row for shard in range(3) for row in read_candidates(tmp_path / "a.parquet", shard=shard)] == rows
