"""The benchmark of word replacing: what it plants, what it asks, and what it would notice."""

import pytest

from benchmarks.fairness import (
    ASKED,
    BIASED_KIND,
    OPEN_SHARE,
    PLANTED,
    PLANTED_SHARE,
    asked_shares,
    biased_corpus,
    colour_shares,
    deviation,
    planted_share,
    plot_shares,
    prompts,
    write_lexicon,
)
from cogview.sampling.word_replacing import read_lexicon
from cogview.scenes.caption_reading import read_caption
from cogview.scenes.scene import COLOURS


def names_no_colour(text):
    return read_caption(text) is None


@pytest.fixture(scope="module")
def rows():
    return list(biased_corpus(3000, seed=11))


def test_the_bias_is_planted_where_no_colour_is_named(rows):
    assert planted_share(rows) == pytest.approx(PLANTED_SHARE, abs=0.05)
    open_rows = [row for row in rows if names_no_colour(row.texts[0])]
    assert len(open_rows) / len(rows) == pytest.approx(OPEN_SHARE, abs=0.03)
    assert all(names_no_colour(row.texts[1]) for row in open_rows)
    others = [row.scene.shapes[0].colour for row in open_rows if row.scene.shapes[0].kind != BIASED_KIND]
    assert others.count(PLANTED) / len(others) == pytest.approx(1 / len(COLOURS), abs=0.05)


def test_captions_that_name_a_colour_say_what_their_scene_shows(rows):
    named = [row for row in rows if not names_no_colour(row.texts[0])]
    for row in named[:300]:
        (said,), (shown,) = read_caption(row.texts[0]).shapes, row.scene.shapes
        assert (said.kind, said.colour, said.size) == (shown.kind, shown.colour, shown.size)
    red = [row.scene.shapes[0].colour for row in named if row.scene.shapes[0].kind == BIASED_KIND]
    assert red.count(PLANTED) / len(red) == pytest.approx(1 / len(COLOURS), abs=0.06)


def test_the_lexicon_turns_open_prompts_into_captions_of_the_corpus(tmp_path):
    write_lexicon(ASKED["four"], tmp_path / "lexicon.json")
    lexicon = read_lexicon(tmp_path / "lexicon.json")
    for number, (text, _) in enumerate(prompts(200, is_open=True)):
        assert names_no_colour(text)
        (shape,) = read_caption(lexicon.rewrite(text, seed=number).text).shapes
        assert shape.kind == BIASED_KIND
        assert ASKED["four"].get(shape.colour, 0) > 0
    for number, (text, colour) in enumerate(prompts(100, is_open=False)):
        assert lexicon.rewrite(text, seed=number).text == text
        assert read_caption(text).shapes[0].colour == colour


def test_what_prompts_ask_for_is_read_from_them(tmp_path):
    write_lexicon(ASKED["four"], tmp_path / "lexicon.json")
    lexicon = read_lexicon(tmp_path / "lexicon.json")
    texts = [(text, lexicon.rewrite(text, seed=n).text) for n, (text, _) in enumerate(prompts(2000, is_open=True))]
    shares = asked_shares(texts)
    assert shares["none"] == 0
    assert deviation(shares, ASKED["four"]) < 0.03
    assert asked_shares([(text, text) for text, _ in texts])["none"] == 1


def test_a_share_that_is_off_is_noticed():
    even = [colour for colour in COLOURS for _ in range(10)]
    assert deviation(colour_shares(even), ASKED["even"]) == 0
    assert deviation(colour_shares(["red"] * 80), ASKED["even"]) == pytest.approx(7 / 8)
    unread = colour_shares([*even, *[None] * 20])
    assert unread["none"] == 0.2
    assert deviation(unread, ASKED["even"]) == pytest.approx(0.025)
    assert len(plot_shares(dict.fromkeys(("before", "even", "four"), unread)).axes) == 3
