"""Word replacing: what is left open is decided by the distribution asked for, what is said stays as it is."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.sampling.word_replacing import Lexicon, Rule, read_lexicon

REPOSITORY = Path(__file__).parents[2]
COLOURS = {"red": 1.0, "blue": 1.0, "orange": 2.0}


def lexicon(**changes):
    return Lexicon([Rule(**{"name": "circles", "words": ("circle",), "choices": COLOURS, **changes})])


def test_the_draw_depends_on_seed_and_prompt_alone():
    texts = [lexicon().rewrite("a small circle", seed=seed).text for seed in range(40)]
    assert texts == [lexicon().rewrite("a small circle", seed=seed).text for seed in range(40)]
    assert set(texts) == {f"a small {colour} circle" for colour in COLOURS}
    others = [lexicon().rewrite("a large circle", seed=seed).replacements[0].choice for seed in range(40)]
    assert others != [text.split()[2] for text in texts]


def test_the_shares_are_those_that_were_asked_for():
    rule = lexicon()
    drawn = Counter(rule.rewrite("a circle", seed=seed).replacements[0].choice for seed in range(8000))
    assert {choice: drawn[choice] / 8000 for choice in COLOURS} == pytest.approx(rule.rules[0].shares, abs=0.02)


def test_a_weight_of_zero_is_never_drawn():
    rule = lexicon(choices={"red": 0, "blue": 1, "green": 0})
    assert {rule.rewrite("a circle", seed=seed).text for seed in range(50)} == {"a blue circle"}


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "A RED circle",
        "an orange circle",
        "circles",
        "a semicircle",
        "",
        "a circle, quite Blue in colour",
    ],
)
def test_what_is_said_already_or_not_meant_stays_as_it_is(prompt):
    done = lexicon().rewrite(prompt, seed=1)
    assert (done.text, done.replacements) == (prompt, ())


def test_within_reach_only_counts_what_stands_near():
    near = lexicon(reach=2, choices={"blue": 1}, unless=("red",))
    assert near.rewrite("a red star above a small circle", seed=1).text == "a red star above a small blue circle"
    assert near.rewrite("a small red circle", seed=1).replacements == ()
    assert near.rewrite("a circle, red", seed=1).replacements == ()
    assert near.rewrite("a circle, very red", seed=1).text == "a blue circle, very red"
    assert near.rewrite("a circle that is not red", seed=1).text == "a blue circle that is not red"


def test_every_occurrence_has_a_draw_of_its_own():
    pairs = [lexicon().rewrite("a circle and a circle", seed=seed).replacements for seed in range(200)]
    assert len({(first.choice, second.choice) for first, second in pairs}) == 9


@pytest.mark.parametrize(
    ("prompt", "choice", "expected"),
    [
        ("a circle", "orange", "an orange circle"),
        ("An  circle", "red", "A  red circle"),
        ("A circle", "orange", "An orange circle"),
        ("AN circle", "orange", "AN orange circle"),
        ("the pizza circle", "orange", "the pizza orange circle"),
    ],
)
def test_the_article_follows(prompt, choice, expected):
    assert lexicon(choices={choice: 1}).rewrite(prompt, seed=0).text == expected


def test_chinese_words_are_found_inside_a_text():
    rule = lexicon(words=("圆形", "医生"), choices={"红色": 1}, template="{choice}{word}")
    assert rule.rewrite("白色背景上的一个大圆形", seed=0).text == "白色背景上的一个大红色圆形"
    assert rule.rewrite("白色背景上的一个大红色圆形", seed=0).replacements == ()
    near = lexicon(words=("圆形",), choices={"红色": 1}, unless=("蓝色",), template="{choice}{word}", reach=1)
    assert near.rewrite("一个大圆形，蓝色背景", seed=0).text == "一个大红色圆形，蓝色背景"
    assert near.rewrite("蓝色圆形", seed=0).replacements == ()
    assert rule.rewrite("医生doctor", seed=0).text == "红色医生doctor"


def test_an_empty_choice_leaves_the_word():
    texts = {lexicon(choices={"": 1, "red": 1}).rewrite("a circle", seed=seed).text for seed in range(40)}
    assert texts == {"a circle", "a red circle"}


def test_the_longest_of_several_words_is_the_one_that_counts():
    rules = [
        Rule(name="one", words=("chief",), choices={"x": 1}),
        Rule(name="two", words=("fire chief",), choices={"y": 1}, template="{word} ({choice})"),
    ]
    assert Lexicon(rules).rewrite("a Fire Chief, a chief", seed=0).text == "a Fire Chief (y), a x chief"


def test_files_are_read_as_toml_and_as_json(tmp_path):
    content = {"rules": [{"name": "r", "words": ["circle"], "choices": {"red": 3, "": 1}, "reach": 2}]}
    (tmp_path / "l.json").write_text(json.dumps(content))
    (tmp_path / "l.toml").write_text(
        '[[rules]]\nname = "r"\nwords = ["circle"]\nreach = 2\nchoices = { red = 3, "" = 1 }\n', encoding="utf-8-sig"
    )
    (from_json,), (from_toml,) = (read_lexicon(tmp_path / name).rules for name in ("l.json", "l.toml"))
    assert from_json == from_toml
    assert from_toml.shares == {"red": 0.75, "": 0.25}


def test_the_example_of_the_documentation_qualifies_both_languages():
    example = read_lexicon(REPOSITORY / "docs" / "lexicon.toml")
    drawn = Counter(example.rewrite("a photo of a doctor", seed=seed).text for seed in range(200))
    assert set(drawn) == {"a photo of a female doctor", "a photo of a male doctor"}
    assert example.rewrite("一位医生在工作", seed=0).text in ("一位女医生在工作", "一位男医生在工作")
    assert example.rewrite("a man, a doctor", seed=0).replacements == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no list of rules"),
        ("rules = []", "there is no rule"),
        ("rules = [1]", "has no list of rules"),
        ("[[rules]", "cannot be read"),
        ('lexicon = 1\n[[rules]]\nwords = ["a"]\nchoices = { b = 1 }', "'lexicon' is unknown"),
        ('[[rules]]\nwords = ["a"]', "rule 1: choices is missing"),
        ('[[rules]]\nword = ["a"]\nwords = ["a"]\nchoices = { b = 1 }', "'word' is unknown; a rule has choices"),
        ('[[rules]]\nwords = "a"\nchoices = { b = 1 }', "words='a': give a list"),
        ('[[rules]]\nwords = []\nchoices = { b = 1 }', "words="),
        ('[[rules]]\nwords = [" a"]\nchoices = { b = 1 }', "' a' is no word"),
        ('[[rules]]\nwords = ["a"]\nchoices = { b = -1 }', "'b' = -1: give a word a weight"),
        ('[[rules]]\nwords = ["a"]\nchoices = { b = nan }', "'b' = nan"),
        ('[[rules]]\nwords = ["a"]\nchoices = { b = true }', "'b' = True"),
        ('[[rules]]\nwords = ["a"]\nchoices = { b = 0 }', "all weights are 0"),
        ('[[rules]]\nwords = ["a"]\nchoices = ["b"]', "give words with their weights"),
        ('[[rules]]\nwords = ["a"]\nchoices = { b = 1 }\ntemplate = "x"', "needs {choice} once"),
        ('[[rules]]\nwords = ["a"]\nchoices = { b = 1 }\nreach = -1', "reach=-1"),
        ('[[rules]]\nwords = ["a"]\nchoices = { c = 1 }\n[[rules]]\nwords = ["A"]\nchoices = { c = 1 }', "keep one"),
    ],
)  # fmt: skip
def test_a_lexicon_that_cannot_work_is_refused_with_a_remedy(tmp_path, text, message):
    (tmp_path / "lexicon.toml").write_text(text)
    with pytest.raises(ConfigError, match=message.replace("{", r"\{")):
        read_lexicon(tmp_path / "lexicon.toml")


def test_a_missing_file_and_bytes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lexicon(tmp_path / "none.toml")
    (tmp_path / "l.json").write_text('{"rules": [{"words": ["a"], "choices": {"b": 1' + "0" * 400 + "}}]}")
    with pytest.raises(ConfigError, match="give a word a weight from 0 to 1e\\+09"):
        read_lexicon(tmp_path / "l.json")
    (tmp_path / "l.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lexicon(tmp_path / "l.toml")
