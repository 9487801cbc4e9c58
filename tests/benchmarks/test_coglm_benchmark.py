"""The pictures that CogLM completes: the box hides all of a shape, and what is asked for is not to be seen in them."""

import numpy as np

from benchmarks.coglm import SIDE, holes
from cogview.scenes.scene import draw_scene, is_held_out

GRID = 8


def test_a_box_hides_the_whole_shape_and_leaves_some_of_the_picture() -> None:
    for hole in holes(60, grid=GRID, seed=5):
        before, after = (np.asarray(draw_scene(one, image_size=SIDE)).astype(int) for one in (hole.picture, hole.asked))
        differs = (before != after).any(axis=2)
        hidden = hole.hidden.numpy().repeat(SIDE // GRID, axis=0).repeat(SIDE // GRID, axis=1)
        assert differs.any()
        assert not differs[~hidden].any(), "nothing outside of the box tells one shape from the other"
        assert 0.2 < hidden.mean() < 0.7


def test_another_kind_and_colour_are_asked_for_in_a_combination_that_was_held_out() -> None:
    some = holes(60, grid=GRID, seed=5)
    assert len(some) == 60
    for hole in some:
        there, asked = hole.picture.shapes[0], hole.asked.shapes[0]
        assert there.kind != asked.kind
        assert there.colour != asked.colour
        assert (there.size, there.position) == (asked.size, asked.position)
        assert hole.picture.shapes[1:] == hole.asked.shapes[1:]
        assert is_held_out(hole.asked)
    assert {len(hole.asked.shapes) for hole in some} == {1, 2}
