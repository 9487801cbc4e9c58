"""The pictures that CogLM completes: the box hides all of a shape, and what is asked for is not to be seen in them."""

import itertools
from dataclasses import replace

import numpy as np

from benchmarks.coglm import SIDE, Hole, completion_figures, holes, new_prompts
from cogview.scenes.scene import corpus, draw_scene, held_out_prompts, is_held_out

GRID = 8


def some_holes() -> list[Hole]:
    return list(itertools.islice(holes(held_out_prompts(480, seed=5, two_shape_share=0.2), grid=GRID), 60))


def test_a_box_hides_the_whole_shape_and_leaves_some_of_the_picture() -> None:
    for hole in some_holes():
        before, after = (np.asarray(draw_scene(one, image_size=SIDE)).astype(int) for one in (hole.picture, hole.asked))
        differs = (before != after).any(axis=2)
        hidden = hole.hidden.numpy().repeat(SIDE // GRID, axis=0).repeat(SIDE // GRID, axis=1)
        assert differs.any()
        assert not differs[~hidden].any(), "nothing outside of the box tells one shape from the other"
        assert 0.2 < hidden.mean() < 0.7


def test_another_kind_and_colour_are_asked_for_in_a_combination_that_was_held_out() -> None:
    some = some_holes()
    assert len(some) == 60
    for hole in some:
        there, asked = hole.picture.shapes[0], hole.asked.shapes[0]
        assert there.kind != asked.kind
        assert there.colour != asked.colour
        assert (there.size, there.position) == (asked.size, asked.position)
        assert hole.picture.shapes[1:] == hole.asked.shapes[1:]
        assert is_held_out(hole.asked)
    assert {len(hole.asked.shapes) for hole in some} == {1, 2}


def test_new_scenes_are_none_of_the_corpus() -> None:
    known = {one.scene for one in corpus(0, 8000, two_shape_share=0.4)}
    fresh = list(new_prompts(50))
    assert len(fresh) == 50
    assert not known & {prompt.scene for prompt in fresh}
    assert not any(is_held_out(prompt.scene) for prompt in fresh)


def test_what_is_right_is_what_stands_where_the_box_was() -> None:
    two = next(hole for hole in some_holes() if len(hole.asked.shapes) == 2)
    first, second = two.asked.shapes
    wrong_elsewhere = replace(two.asked, shapes=(first, replace(second, kind=first.kind)))
    scenes = [two.asked, two.picture, wrong_elsewhere, replace(two.asked, shapes=(second,))]
    figures = completion_figures([draw_scene(one, image_size=SIDE) for one in scenes], [two] * 4)
    shares = {"colour and shape right": 0.5, "shape": 0.5, "colour": 0.5, "all shapes right": 0.25}
    assert figures == {**shares, "colour and shape right, two shapes": 0.5}
