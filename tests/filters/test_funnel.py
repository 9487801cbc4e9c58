import json
from dataclasses import replace

from PIL import Image

from cogview.filters.funnel import KEPT_SAMPLES, SAMPLES, Funnel, Samples, lowest_samples, read_funnel, thumbnail
from cogview.filters.verdicts import Rejected
from cogview.records.pair import TextImagePair
from tests.records.web_site import encode

PAIR = TextImagePair(
    key="k",
    captions=("a dog", "一只狗"),
    image_bytes=encode(Image.new("RGB", (300, 150), "red")),
    source="https://a.example.org/1.jpg",
    extra={"width": 300, "height": 150, "license": "CC-BY-4.0"},
)
SMALL = Rejected("image_too_small", "20x20", "min_side")


def small_funnel() -> Funnel:
    funnel = Funnel()
    funnel.add(PAIR, ("a dog",), None)
    funnel.add(replace(PAIR, source="folder/1.png", extra={}), PAIR.captions, SMALL)
    return funnel


def test_pairs_are_counted_as_they_came_and_as_they_stayed() -> None:
    funnel = small_funnel()
    assert (funnel.rows, funnel.rows_kept) == (2, 1)
    assert funnel.rejected == {("min_side", "image_too_small"): 1}
    assert funnel.given["caption characters"] == {"4-7": 2, "0-3": 2}
    assert funnel.kept["caption characters"] == {"4-7": 1}
    assert funnel.given["language"] == {"Latin script": 2, "Chinese": 2}
    assert funnel.given["host"] == {"a.example.org": 1, "files": 1}
    assert funnel.kept["licence"] == {"CC-BY-4.0": 1}
    assert funnel.given["licence"] == {"CC-BY-4.0": 1, "not told": 1}
    assert funnel.kept["shorter side"] == {"128-191": 1}
    assert funnel.kept["long : short side"] == {"2-3": 1}


def test_funnels_add_up_and_survive_json() -> None:
    total = Funnel()
    for _ in range(3):
        total.merge(read_funnel(json.loads(json.dumps(small_funnel().as_plain()))))
    assert (total.rows, total.rows_kept) == (6, 3)
    assert total.given["host"] == {"a.example.org": 3, "files": 3}
    assert total.rejected[("min_side", "image_too_small")] == 3


def test_rare_hosts_are_told_together() -> None:
    funnel = Funnel()
    for number in range(600):
        funnel.add(replace(PAIR, source=f"https://{number:03d}.example.org/"), (), None)
    plain = funnel.as_plain()
    assert plain["given"]["host"]["others"] == 100
    assert sum(plain["given"]["host"].values()) == 600


def test_samples_do_not_depend_on_the_order_or_the_shards() -> None:
    pairs = [replace(PAIR, key=f"k{number}") for number in range(300)]
    whole, halves = Samples(), (Samples(), Samples())
    for number, pair in enumerate(pairs):
        verdict = SMALL if number % 2 else None
        whole.add(pair, pair.captions, verdict)
        halves[number % 3 == 0].add(pair, pair.captions, verdict)
    expected = whole.rows()
    merged = lowest_samples([*halves[1].rows(), *halves[0].rows()])
    assert [row["key"] for row in merged] == [row["key"] for row in expected]
    assert sum(not row["reason"] for row in merged) == KEPT_SAMPLES
    assert sum(row["reason"] == "image_too_small" for row in merged) == SAMPLES
    assert expected[0]["caption"] == "a dog · 一只狗"


def test_what_cannot_be_decoded_has_no_thumbnail() -> None:
    assert thumbnail(b"<html>") is None
    small = thumbnail(PAIR.image_bytes)
    assert small is not None
    assert len(small) < 1000
