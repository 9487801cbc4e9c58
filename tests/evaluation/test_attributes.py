"""The attribute scores: right pictures score 1, wrong ones are wrong in the attribute that is wrong."""

from dataclasses import replace

import pytest

from cogview.errors import SchemaError
from cogview.evaluation.attributes import (
    judge,
    scene_from_json,
    scene_to_json,
    score_attributes,
    score_groups,
)
from cogview.scenes.scene import Scene, Shape, draw_scene, held_out_prompts

RED_CIRCLE = Scene(
    background="white",
    shapes=(Shape(kind="circle", colour="red", size="large", position="centre", jitter=(0.5, -0.5)),),
)


def judged_as(shown: Scene, *, expected: Scene):
    return judge(draw_scene(shown), expected=expected, language="en")


def with_shape(scene: Scene, **changes) -> Scene:
    return replace(scene, shapes=(replace(scene.shapes[0], **changes),))


def test_pictures_of_the_scenes_score_one():
    prompts = list(held_out_prompts(24, seed=3, two_shape_share=0.5))
    scores = score_attributes([judge(draw_scene(prompt.scene), expected=prompt.scene) for prompt in prompts])
    assert {name: score.value for name, score in scores.items()} == dict.fromkeys(scores, 1.0)
    assert scores["mean"].n == 24
    shapes = sum(len(prompt.scene.shapes) for prompt in prompts)
    assert scores["shape"].n == shapes > 24
    assert scores["background"].n == 24


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"kind": "star"}, {"shape"}),
        ({"colour": "blue"}, {"colour"}),
        ({"size": "small"}, {"size"}),
        ({"size": "small", "position": "left"}, {"size", "position"}),
    ],
)
def test_one_wrong_attribute_lowers_that_attribute_and_the_mean(changes, wrong):
    scores = score_attributes([judged_as(with_shape(RED_CIRCLE, **changes), expected=RED_CIRCLE)])
    assert {name for name, score in scores.items() if score.value == 0} == wrong
    assert scores["mean"].value == pytest.approx(1 - 0.25 * len(wrong - {"position"}))


def test_a_wrong_background_lowers_the_background():
    shown = replace(RED_CIRCLE, background="gray")
    scores = score_attributes([judged_as(shown, expected=RED_CIRCLE)])
    assert scores["background"].value == 0
    assert scores["shape"].value == 1


def test_intervals_hold_the_value_and_narrow_with_more_pictures():
    right = judged_as(RED_CIRCLE, expected=RED_CIRCLE)
    wrong = judged_as(with_shape(RED_CIRCLE, kind="star"), expected=RED_CIRCLE)
    few, many = score_attributes([right, wrong] * 4), score_attributes([right, wrong] * 100)
    for scores in (few, many):
        assert all(0 <= score.low <= score.value <= score.high <= 1 for score in scores.values())
    for name in ("mean", "shape"):
        assert many[name].high - many[name].low < few[name].high - few[name].low
    # Eight right answers of eight do not prove that all are right: Wilson's lower bound is n / (n + z^2).
    assert few["colour"].low == pytest.approx(8 / (8 + 1.959964**2))
    assert few["colour"].high == 1.0


def test_scores_depend_on_the_seed_alone():
    right = judged_as(RED_CIRCLE, expected=RED_CIRCLE)
    wrong = judged_as(with_shape(RED_CIRCLE, kind="star"), expected=RED_CIRCLE)
    assert score_attributes([right, wrong] * 9, seed=5) == score_attributes([right, wrong] * 9, seed=5)


def test_groups_part_shapes_and_languages():
    prompts = list(held_out_prompts(20, seed=1, two_shape_share=0.5))
    groups = score_groups(
        [judge(draw_scene(prompt.scene), expected=prompt.scene, language=prompt.language) for prompt in prompts]
    )
    assert set(groups) == {"all", "one shape", "two shapes", "English", "Chinese"}
    assert groups["one shape"]["mean"].n + groups["two shapes"]["mean"].n == groups["all"]["mean"].n == 20
    assert groups["English"]["mean"].n == groups["Chinese"]["mean"].n == 10


def test_no_pictures_make_no_scores():
    assert score_attributes([]) == {}
    assert score_groups([]) == {}


def test_scenes_survive_json():
    for prompt in held_out_prompts(10, seed=2, two_shape_share=0.5):
        assert scene_from_json(scene_to_json(prompt.scene)) == prompt.scene


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"background": "white", "shapes": [{"kind": "circle"}]}'])
def test_other_json_is_refused(text):
    with pytest.raises(SchemaError, match="not a scene"):
        scene_from_json(text)
