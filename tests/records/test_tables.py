import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogview.errors import ConfigError
from cogview.records.candidates import Candidate, count_candidates, read_candidates, write_candidates
from cogview.records.tables import TableColumns, inspect_table, read_table, require_captions


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
    path = shared_data / "url_lists" / "img2dataset_test_1000.txt"
    columns = inspect_table(path)
    assert columns == TableColumns(image="column_1", captions=(), is_web=True, has_header=False)
    assert sum(row.source.startswith("http") for row in read_table(path, columns)) == 1000
    with pytest.raises(ConfigError, match="list of images alone"):
        require_captions(columns, path=path)


def test_candidates_come_back_shard_by_shard(tmp_path: Path) -> None:
    rows = [Candidate(source=f"http://a.org/{n}", captions=("x",) * (n % 3), extra={"n": n}) for n in range(25)]
    for name in ("a.parquet", "b.parquet"):
        with open(tmp_path / name, "wb") as file:
            assert write_candidates(file, iter(rows), shard_size=10) == 25
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert count_candidates(tmp_path / "a.parquet") == (25, 3)
    assert [row for shard in range(3) for row in read_candidates(tmp_path / "a.parquet", shard=shard)] == rows


# --- kinds of tables


def test_laion_tables_keep_their_licence_and_what_is_asked_for(tmp_path: Path) -> None:
    rows = [
        {"SAMPLE_ID": 7, "URL": "http://a.org/1.jpg", "TEXT": "a dog", "LICENSE": "CC-BY", "similarity": 0.31},
        {"SAMPLE_ID": 8, "URL": "http://a.org/2.jpg", "TEXT": "a cat", "LICENSE": None, "similarity": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    columns = inspect_table(tmp_path / "t.parquet", extra_columns=("similarity",))
    assert (columns.image, columns.captions, columns.extra) == ("URL", ("TEXT",), ("LICENSE", "similarity"))
    assert [row.extra for row in read_table(tmp_path / "t.parquet", columns)] == [
        {"license": "CC-BY", "similarity": 0.31},
        {},
    ]
    with pytest.raises(ConfigError, match="no column nsfw; its columns are SAMPLE_ID"):
        inspect_table(tmp_path / "t.parquet", extra_columns=("nsfw",))


def test_coco_captions_are_gathered_by_image_with_their_licence(tmp_path: Path) -> None:
    document = {
        "info": {"year": 2017},
        "licenses": [{"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}],
        "images": [
            {"id": 9, "file_name": "9.jpg", "coco_url": "http://images.example.org/9.jpg", "license": 4},
            {"id": 8, "file_name": "8.jpg", "coco_url": "http://images.example.org/8.jpg", "license": 77},
            "nonsense",
        ],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "A dog."},
            {"image_id": 8, "id": 2, "caption": "A cat."},
            {"image_id": 9, "id": 3, "caption": "A brown dog. "},
            {"image_id": 1, "caption": "of no image"},
            3,
        ],
    }
    path = write(tmp_path / "captions_val2017.json", json.dumps(document))
    columns = inspect_table(path)
    assert columns.is_web
    first, second = read_table(path, columns)
    assert (first.source, first.captions) == ("http://images.example.org/9.jpg", ("A dog.", "A brown dog."))
    assert first.extra["license"] == "Attribution License"
    assert first.extra["license_url"].endswith("/by/2.0/")
    assert (second.captions, dict(second.extra)) == (("A cat.",), {})
    by_file = inspect_table(path, image_column="file_name")
    assert not by_file.is_web
    assert [row.source for row in read_table(path, by_file)] == ["9.jpg", "8.jpg"]


def test_a_json_file_may_be_an_array_or_lines(tmp_path: Path) -> None:
    rows = [{"url": "http://a.org/1.jpg", "caption": "dog"}, 5, {"url": "http://a.org/2.jpg", "caption": "cat"}]
    array = write(tmp_path / "a.json", json.dumps(rows))
    lines = write(tmp_path / "b.json", "\n".join(map(json.dumps, rows)))
    assert rows_of(array) == rows_of(lines) == [("http://a.org/1.jpg", ("dog",)), ("", ()), rows_of(array)[2]]
    for text in ("{broken", "[" * 100_000):
        with pytest.raises(ConfigError, match="cannot be read as JSON"):
            inspect_table(write(tmp_path / "c.json", text))


@pytest.mark.parametrize(("suffix", "codec"), [("gz", "gzip"), ("bz2", "bz2"), ("zst", "zstd")])
def test_compressed_tables_are_read_as_they_are(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"t.tsv.{suffix}"
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write("a dog\thttp://a.org/1.jpg\n狗\thttp://a.org/2.jpg\n".encode())
    assert rows_of(path) == [("http://a.org/1.jpg", ("a dog",)), ("http://a.org/2.jpg", ("狗",))]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="cannot be read"):
        rows_of(path)


# --- hostile Parquet


def test_nested_extension_and_strange_columns_are_not_touched(tmp_path: Path) -> None:
    deep: pa.DataType = pa.string()
    for _ in range(100):
        deep = pa.struct([("x", deep)])
    table = pa.table(
        {
            "url": pa.array(["http://a.org/1.jpg", None]),
            "caption": pa.array(["ok", "x"]).dictionary_encode(),
            "deep": pa.nulls(2, deep),
            "pickled": pa.ExtensionArray.from_storage(Canary(), pa.array([b"x", b"y"])),
            "when": pa.array([1, 2], pa.timestamp("s")),
        }
    )
    pa.register_extension_type(Canary())
    try:
        pq.write_table(table, tmp_path / "t.parquet")
        assert rows_of(tmp_path / "t.parquet") == [("http://a.org/1.jpg", ("ok",)), ("", ("x",))]
        with pytest.raises(ConfigError, match="no column pickled"):
            inspect_table(tmp_path / "t.parquet", caption_fields=("pickled",))
    finally:
        pa.unregister_extension_type(Canary().extension_name)


class CanaryScalar(pa.ExtensionScalar):
    def as_py(self, **options: object) -> object:
        raise AssertionError("an extension value was opened")


class Canary(pa.ExtensionType):
    """Stands for types whose values are unpickled when they are read."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "cogview.test.canary")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Canary":
        return Canary()

    def __arrow_ext_scalar_class__(self) -> type[pa.ExtensionScalar]:
        return CanaryScalar


def test_a_column_that_unpacks_to_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogview.records.table_rows.MAX_COLUMN_BYTES", 2**20)
    table = pa.table({"url": ["http://a.org/1.jpg"] * 3, "caption": ["x" * 2**20, "y", "z"]})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 10_000
    with pytest.raises(ConfigError, match=r"column caption takes .* smaller row groups"):
        inspect_table(tmp_path / "t.parquet")


def test_captions_that_are_file_names_are_no_column_of_images(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", "IMG_1234.jpg\thttp://a.org/1.jpg\nhttp://b.org\thttp://a.org/2.jpg\n")
    assert inspect_table(path).image == "column_2"
    path = write(tmp_path / "u.tsv", "a dog\ta.png\nDSC_1.jpg\tb.png\n")
    assert inspect_table(path).image == "column_2"
