"""Scenes: what the corpus draws, says, and keeps back."""

import random
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from cogview.errors import ConfigError
from cogview.scenes.scene import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    KINDS,
    SIZES,
    Scene,
    Shape,
    captions,
    corpus,
    draw_scene,
    held_out_prompts,
    is_held_out,
    names_position,
    random_scene,
)
from cogview.scenes.wording import CHINESE


def one_shape(*, kind="circle", colour="red", size="large", background="white", position="centre"):
    shape = Shape(kind=kind, colour=colour, size=size, position=position)
    return Scene(background=background, shapes=(shape,))


def combination(shape, background):
    return shape.kind, shape.colour, shape.size, background


ALL_COMBINATIONS = [
    one_shape(kind=kind, colour=colour, size=size, background=background)
    for kind in KINDS
    for colour in COLOURS
    for size in SIZES
    for background in BACKGROUNDS
]


def test_there_are_enough_attributes_to_compose():
    assert (len(KINDS), len(COLOURS), len(BACKGROUNDS), len(SIZES)) == (6, 8, 4, 2)


def test_no_two_colours_that_can_meet_are_close():
    fills, grounds = list(COLOUR_RGB.values()), list(BACKGROUND_RGB.values())
    pairs = [*combinations(fills, 2), *combinations(grounds, 2), *((a, b) for a in fills for b in grounds)]
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in pairs) > 100


def test_the_corpus_depends_on_seed_and_number_alone():
    rows = list(corpus(7, 50))
    assert rows == list(corpus(7, 50))
    assert rows[:20] == list(corpus(7, 20))
    assert [row.number for row in rows] == list(range(50))
    assert rows != list(corpus(8, 50))


def test_the_corpus_is_the_same_in_another_process():
    code = "from cogview.scenes.scene import corpus; import sys; sys.stdout.write(repr(list(corpus(7, 30))))"
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert output.stdout.decode() == repr(list(corpus(7, 30)))


def test_held_out_combinations_never_occur_in_the_corpus():
    seen = Counter()
    for row in corpus(0, 20_000):
        assert not is_held_out(row.scene)
        seen.update(combination(shape, row.scene.background) for shape in row.scene.shapes)
    held_out = {combination(s.shapes[0], s.background) for s in ALL_COMBINATIONS if is_held_out(s)}
    assert not held_out & set(seen)
    assert set(seen) | held_out == {combination(s.shapes[0], s.background) for s in ALL_COMBINATIONS}


def test_about_a_tenth_is_held_out_and_touches_every_attribute():
    held_out = [combination(s.shapes[0], s.background) for s in ALL_COMBINATIONS if is_held_out(s)]
    assert 0.08 < len(held_out) / len(ALL_COMBINATIONS) < 0.12
    for place, values in enumerate((KINDS, COLOURS, SIZES, BACKGROUNDS)):
        assert {names[place] for names in held_out} == set(values)


def test_a_larger_fraction_holds_out_a_superset():
    tenth = [is_held_out(scene, fraction=0.1) for scene in ALL_COMBINATIONS]
    third = [is_held_out(scene, fraction=0.3) for scene in ALL_COMBINATIONS]
    assert all(late for early, late in zip(tenth, third, strict=True) if early)
    assert sum(third) > sum(tenth)


def test_prompts_ask_for_held_out_combinations_in_both_languages():
    prompts = list(held_out_prompts(200, seed=1, two_shape_share=0.5))
    assert prompts == list(held_out_prompts(200, seed=1, two_shape_share=0.5))
    assert Counter(prompt.language for prompt in prompts) == {"en": 100, "zh": 100}
    assert all(prompt.caption.isascii() == (prompt.language == "en") for prompt in prompts)
    firsts = [Scene(background=p.scene.background, shapes=p.scene.shapes[:1]) for p in prompts]
    assert all(is_held_out(scene) for scene in firsts)
    assert 70 < sum(len(prompt.scene.shapes) == 2 for prompt in prompts) < 130


def test_captions_name_every_attribute_in_few_words():
    for row in corpus(3, 3000, two_shape_share=0.4):
        assert f"{row.scene.background} background" in row.english
        assert CHINESE[row.scene.background] + "背景" in row.chinese
        for shape in row.scene.shapes:
            assert f"{shape.size} {shape.colour} {shape.kind}" in row.english
            assert CHINESE[shape.size] + CHINESE[shape.colour] + CHINESE[shape.kind] in row.chinese
        assert len(row.english.split()) <= 16
        assert len(row.chinese) <= 32


def test_there_are_several_templates_per_language():
    rng = random.Random(0)
    for scene in (one_shape(), next(r.scene for r in corpus(0, 50) if len(r.scene.shapes) == 2)):
        english, chinese = zip(*(captions(scene, rng=rng) for _ in range(200)), strict=True)
        assert len(set(english)) >= 4
        assert len(set(chinese)) >= 4


def test_two_shape_captions_say_which_is_where():
    row = next(r for r in corpus(0, 200) if " to the left of " in r.english)
    left, right = row.scene.shapes
    assert (left.position, right.position) == ("left", "right")
    assert row.english.index(f"{left.colour} {left.kind}") < row.english.index(f"{right.colour} {right.kind}")
    assert all(names_position(r.english) and names_position(r.chinese) for r in corpus(0, 500, two_shape_share=1.0))


def test_only_captions_with_a_position_name_one():
    assert names_position("a small green star at the left of a white background")
    assert names_position("蓝色背景左侧有一个小红色圆形")
    assert not names_position("a large red circle on a blue background")
    assert not names_position("蓝色背景上的一个大红色圆形")


def test_shapes_of_a_pair_differ_and_are_small():
    for row in corpus(5, 500, two_shape_share=1.0):
        first, second = row.scene.shapes
        assert (first.kind, first.colour) != (second.kind, second.colour)
        assert first.size == second.size == "small"


def test_two_shape_share_is_kept():
    assert all(len(row.scene.shapes) == 1 for row in corpus(0, 200, two_shape_share=0.0))
    pairs = sum(len(row.scene.shapes) == 2 for row in corpus(0, 2000, two_shape_share=0.25))
    assert 400 < pairs < 600


def test_both_kinds_of_generator_draw_scenes():
    assert random_scene(random.Random(1)) == random_scene(random.Random(1))
    assert random_scene(np.random.default_rng(1)) == random_scene(np.random.default_rng(1))


def test_drawing_is_deterministic_and_scales():
    scene = next(corpus(0, 1)).scene
    assert draw_scene(scene).tobytes() == draw_scene(scene).tobytes()
    small = np.asarray(draw_scene(scene), dtype=float)
    large = np.asarray(draw_scene(scene, image_size=128).reduce(2), dtype=float)
    assert draw_scene(scene, image_size=128).size == (128, 128)
    assert np.abs(small - large).mean() < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_fills_are_plain_and_edges_soft(kind):
    pixels = np.asarray(draw_scene(one_shape(kind=kind, colour="blue"))).reshape(-1, 3)
    colours = Counter(map(tuple, pixels.tolist()))
    assert {name for name, _ in colours.most_common(2)} == {COLOUR_RGB["blue"], BACKGROUND_RGB["white"]}
    assert 2 < len(colours) < 40


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_stay_inside_the_image(kind):
    for size, positions in (("large", ["centre"]), ("small", ["left", "right", "top", "bottom"])):
        for position in positions:
            for jitter in ((-1, -1), (1, 1)) if size == "small" else ((-1.5, -1.5), (1.5, 1.5)):
                shape = Shape(kind=kind, colour="red", size=size, position=position, jitter=jitter)
                pixels = np.asarray(draw_scene(Scene(background="white", shapes=(shape,))))
                border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
                assert (border == 255).all()


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: next(corpus(0, 1, two_shape_share=1.5)), "two_shape_share=1.5"),
        (lambda: next(corpus(0, 1, held_out_fraction=1.0)), "held_out_fraction=1.0"),
        (lambda: next(held_out_prompts(1, seed=0, held_out_fraction=0.0)), "held_out_fraction=0.0"),
        (lambda: draw_scene(one_shape(), image_size=4), "image_size=4"),
    ],
)
def test_settings_that_cannot_work_are_named(call, key):
    with pytest.raises(ConfigError, match=key):
        call()
