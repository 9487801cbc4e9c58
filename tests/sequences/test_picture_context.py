"""What stands before a picture: the tokens of pretraining, at their positions, behind padding."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from cogview.sequences.batch import SequenceConfig, build_batch
from cogview.sequences.layout import TASKS
from cogview.sequences.picture_context import ContextForm, build_context, gpt_form
from cogview.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(10, 20)
TEXTS = [[1, 2, 3], [4], [5] * 40]
CODES = np.arange(12, dtype=np.uint16).reshape(3, 4) % 10
COGLM = ContextForm(text_offset=10, max_text=5, image_position=8, is_causal=False, mask_id=30, pad_id=13)


@pytest.mark.parametrize("is_image_fixed", [False, True])
def test_a_gpt_reads_the_beginning_of_its_pretraining_rows(is_image_fixed: bool) -> None:
    form = gpt_form(VOCABULARY, length=16, grid=2, is_image_fixed=is_image_fixed)
    context = build_context(TEXTS, CODES, form=form)
    batch = build_batch(
        TEXTS,
        CODES,
        layout=TASKS["text_to_image"],
        config=SequenceConfig(length=16, is_image_fixed=is_image_fixed),
        vocabulary=VOCABULARY,
    )
    for row in range(3):
        length = 3 + min(len(TEXTS[row]), form.max_text) + 4
        assert context.ids[row, -length:].tolist() == batch.ids[row, :length].tolist()
        assert context.positions[row, -length:].tolist() == batch.positions[row, :length].tolist()
        assert set(context.ids[row, :-length].tolist()) <= {VOCABULARY.command("PAD")}
        width = context.ids.shape[1]
        assert context.seen[row].nonzero()[:, 0].tolist() == list(range(width - length, width - 4 - 2))
    assert form.first_position == 1 + form.max_text + 2


@pytest.mark.parametrize("is_causal", [False, True])
def test_who_sees_whom(is_causal: bool) -> None:
    context = build_context(TEXTS, CODES, form=replace(COGLM, is_causal=is_causal))
    length = context.ids.shape[1]
    assert length == 5 + 4
    for row, text in enumerate(TEXTS):
        num_text = min(len(text), 5)
        stages = [-1] * (5 - num_text) + [0] * num_text + [1] * 4
        for query in range(length):
            for key in range(length):
                is_before = key <= query if is_causal else stages[key] <= stages[query]
                expected = key == query or (stages[key] >= 0 and is_before)
                assert bool(context.allowed[row, query, key]) == expected


def test_a_caption_alone_has_no_codes_behind_it() -> None:
    context = build_context([[1, 2], []], None, form=COGLM)
    assert context.ids.tolist() == [[11, 12], [13, 13]]
    assert context.seen.tolist() == [[True, True], [False, False]]
    nothing = build_context([[]], None, form=COGLM)
    assert (nothing.ids.tolist(), nothing.seen.tolist()) == ([[13]], [[False]])
    assert nothing.allowed.all()


def test_a_form_comes_back_from_its_settings() -> None:
    form = gpt_form(VOCABULARY, length=16, grid=2, is_image_fixed=True)
    stored = asdict(form)
    assert ContextForm.from_stored({**stored, "before_text": list(form.before_text)}) == form
