"""The wrong captions of the benchmark differ from the right ones by one attribute, and in nothing else."""

import pytest

from benchmarks.reranking import CHANGED, wrong_caption
from cogview.scenes.caption_reading import read_caption
from cogview.scenes.reading import ATTRIBUTES, compare
from cogview.scenes.scene import held_out_prompts

PROMPTS = list(held_out_prompts(60, seed=3, two_shape_share=0.3))


@pytest.mark.parametrize("attribute", CHANGED)
def test_a_wrong_caption_changes_one_attribute(attribute: str) -> None:
    changed = 0
    for number, prompt in enumerate(PROMPTS):
        text = wrong_caption(prompt, attribute, number=number)
        if not text:
            assert attribute == "size"
            assert len(prompt.scene.shapes) == 2
            continue
        wrong = read_caption(text)
        assert wrong is not None, text
        marks = compare(prompt.scene, wrong)
        assert [name for name in ATTRIBUTES if marks[name] < 1] == [attribute], text
        changed += 1
    assert changed > 30
