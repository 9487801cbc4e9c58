"""Captions read back: every template in both languages, and nothing that is only nearly a caption."""

import random

import pytest

from cogview.scenes import wording
from cogview.scenes.caption_reading import read_caption
from cogview.scenes.reading import ATTRIBUTES, compare
from cogview.scenes.scene import corpus, names_position
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer

SCENES = list(corpus(3, 400))


def test_every_caption_of_the_corpus_reads_back_as_its_scene() -> None:
    for row in SCENES:
        for caption in (row.english, row.chinese):
            reading = read_caption(caption)
            assert reading is not None, caption
            marks = compare(row.scene, reading)
            wanted = [*ATTRIBUTES, "count", *(["position"] if names_position(caption) else [])]
            assert all(marks[name] == 1 for name in wanted), caption


def test_every_template_is_met() -> None:
    tables = ("ENGLISH_ONE", "ENGLISH_BESIDE", "ENGLISH_ABOVE", "CHINESE_ONE", "CHINESE_BESIDE", "CHINESE_ABOVE")
    for template in (template for name in tables for template in getattr(wording, name)):
        is_chinese = template in (*wording.CHINESE_ONE, *wording.CHINESE_BESIDE, *wording.CHINESE_ABOVE)
        a, b = ("小红色圆形", "小蓝色正方形") if is_chinese else ("small red circle", "small blue square")
        names = wording.CHINESE if is_chinese else wording.ENGLISH
        background = wording.CHINESE["gray"] if is_chinese else "gray"
        reading = read_caption(template.format(a=a, b=b, background=background, position=names["left"]))
        assert reading is not None, template
        assert reading.background == "gray"
        assert (reading.shapes[0].kind, reading.shapes[0].colour) == ("circle", "red")
        assert len(reading.shapes) == (2 if "{b}" in template else 1)


def test_what_a_text_tokenizer_folds_is_read_all_the_same(tmp_path) -> None:
    texts = [caption for row in SCENES for caption in (row.english, row.chinese)]
    train_text_tokenizer(texts, config=TextTokenizerConfig(num_pieces=300, exact=False), output=tmp_path)
    tokenizer = TextTokenizer.load(tmp_path)
    sample = random.Random(0).sample(texts, 60)
    assert [read_caption(tokenizer.decode(tokenizer.encode(text))) for text in sample] == [
        read_caption(text) for text in sample
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle on a blue background",  # no size
        "a small red circle on a blue background with",
        "a small crimson circle on a blue background",
        "a small red circle on a red background",
        "白色背景上的一个红色圆形",
    ],
)
def test_what_is_nearly_a_caption_is_none(text: str) -> None:
    assert read_caption(text) is None
