"""Layouts: CogView's template token for token, and text that gives way to image tokens, never the other way round."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogview.errors import ConfigError
from cogview.sequences.layout import TASKS
from cogview.tokenizers.vocabulary import Vocabulary

RELEASED = Vocabulary()
LAYOUT = TASKS["text_to_image"]
CODES = np.arange(1024, dtype=np.uint16)


def test_text_to_image_is_the_released_template() -> None:
    ids = LAYOUT.fill([7, 8], [CODES], vocabulary=RELEASED, budget=61)
    assert ids[:3].tolist() == [58199, 8199, 8200]  # ROI1, then the text, moved behind the image codes
    assert ids[3:5].tolist() == [58208, 58193]  # BASE, BOI1
    assert ids[5:1029].tolist() == list(range(1024))
    assert ids[1029:].tolist() == [58196]  # EOI1


def test_a_prompt_ends_where_the_codes_begin() -> None:
    prompt = LAYOUT.prompt_ids([7, 8], vocabulary=RELEASED, max_text=61)
    assert prompt == [58199, 8199, 8200, 58208, 58193]


def test_the_released_length_leaves_61_text_tokens() -> None:
    assert LAYOUT.overhead() == 4
    assert LAYOUT.text_budget(length=1089, num_image_tokens=1024) == 61
    with pytest.raises(ConfigError, match="at least 1029 long"):
        LAYOUT.text_budget(length=1028, num_image_tokens=1024)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 61))
def test_text_is_cut_and_image_tokens_never_are(num_text: int, budget: int) -> None:
    ids = LAYOUT.fill(list(range(num_text)), [CODES], vocabulary=RELEASED, budget=budget)
    assert len(ids) == min(num_text, budget) + 1028
    assert ids[-1025:-1].tolist() == list(range(1024))
    assert ids[1 : 1 + min(num_text, budget)].tolist() == [8192 + i for i in range(min(num_text, budget))]


def test_positions_run_through_or_give_the_image_a_fixed_place() -> None:
    running = LAYOUT.positions(num_text=2, num_image_tokens=4, budget=5, is_image_fixed=False)
    assert running.tolist() == list(range(10))
    fixed = LAYOUT.positions(num_text=2, num_image_tokens=4, budget=5, is_image_fixed=True)
    assert fixed.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11, 12]  # ROI1 a b | BASE BOI1 c c c c EOI1
    full = LAYOUT.positions(num_text=5, num_image_tokens=4, budget=5, is_image_fixed=True)
    assert full[-7:].tolist() == fixed[-7:].tolist()


def test_captioning_puts_image_before_text_and_ends_it_with_sep() -> None:
    ids = TASKS["captioning"].fill([7, 8], [CODES], vocabulary=RELEASED, budget=60)
    assert ids[:2].tolist() == [58208, 58193]  # BASE, BOI1
    assert ids[2:1026].tolist() == list(range(1024))
    assert ids[1026:].tolist() == [58196, 58199, 8199, 8200, 58202]  # EOI1, ROI1, the text, SEP
    weights = TASKS["captioning"].loss_weights(num_text=2, num_image_tokens=1024)
    assert weights.tolist() == [0.0] * 1027 + [1.0] * 4


def test_captioning_may_keep_every_token_where_it_stood_in_pretraining() -> None:
    layout = TASKS["captioning"]
    running = layout.positions(num_text=2, num_image_tokens=4, budget=5, is_image_fixed=False)
    assert running.tolist() == list(range(11))
    kept = layout.positions(num_text=2, num_image_tokens=4, budget=5, is_image_fixed=True)
    trained = LAYOUT.positions(num_text=2, num_image_tokens=4, budget=5, is_image_fixed=True)
    assert kept[:7].tolist() == trained[3:].tolist()  # BASE BOI1 c c c c EOI1
    assert kept[7:10].tolist() == trained[:3].tolist()  # ROI1 a b; SEP is only a label


LOW, HIGH = np.arange(256, dtype=np.uint16), np.arange(1024, dtype=np.uint16)
BOTH = (256, 1024)


def test_super_resolution_is_the_released_magnify_template() -> None:
    ids = TASKS["super_resolution_released"].fill([7, 8], [LOW, HIGH], vocabulary=RELEASED, budget=56)
    assert ids[:5].tolist() == [58199, 8199, 8200, 58208, 58193]  # ROI1, the text, BASE (not SMALL), BOI1
    assert ids[5:261].tolist() == list(range(256))
    assert ids[261:266].tolist() == [58196, 58200, 58210, 58208, 58194]  # EOI1, ROI2, POS0, BASE, BOI2
    assert ids[266:1290].tolist() == list(range(1024))
    assert ids[1290:].tolist() == [58197]  # EOI2


def test_the_paper_has_no_place_in_super_resolution() -> None:
    released = TASKS["super_resolution_released"].fill([7, 8], [LOW, HIGH], vocabulary=RELEASED, budget=56)
    paper = TASKS["super_resolution"].fill([7, 8], [LOW, HIGH], vocabulary=RELEASED, budget=57)
    assert paper.tolist() == [token for token in released.tolist() if token != RELEASED.command("POS0")]


def test_a_prompt_of_super_resolution_ends_behind_boi2() -> None:
    for name in ("super_resolution", "super_resolution_released"):
        prompt = TASKS[name].prompt_ids([7, 8], [LOW], vocabulary=RELEASED, max_text=56)
        row = TASKS[name].fill([7, 8], [LOW, HIGH], vocabulary=RELEASED, budget=56)
        assert prompt == row[:-1025].tolist()
        assert prompt[-1] == RELEASED.command("BOI2")


@pytest.mark.parametrize(("name", "overhead"), [("super_resolution", 8), ("super_resolution_released", 9)])
def test_positions_begin_again_at_roi2_and_fit_into_the_released_table(name: str, overhead: int) -> None:
    layout = TASKS[name]
    budget = layout.text_budget(length=1345, num_image_tokens=BOTH)
    assert budget == 1345 - 256 - 1024 - overhead
    places = layout.positions(num_text=2, num_image_tokens=BOTH, budget=budget, is_image_fixed=False).tolist()
    roi2 = 1 + 2 + 2 + 256 + 1
    assert places == [*range(roi2), *range(overhead - 4 + 1024)]
    assert layout.num_positions(budget=budget, num_image_tokens=BOTH, is_image_fixed=False) <= 1089


@pytest.mark.parametrize("name", ["super_resolution", "super_resolution_released"])
def test_two_sizes_of_a_picture_may_stand_where_pretraining_has_it(name: str) -> None:
    layout, sizes = TASKS[name], (4, 16)
    trained = LAYOUT.positions(num_text=2, num_image_tokens=16, budget=5, is_image_fixed=True).tolist()
    places = layout.positions(num_text=2, num_image_tokens=sizes, budget=5, is_image_fixed=True).tolist()
    assert places[:5] == trained[:5]  # ROI1 a b BASE BOI1
    codes = trained[5:21]
    assert places[5:9] == [codes[0], codes[2], codes[8], codes[10]]  # the first of the four codes that each stands for
    assert places[9] == trained[21]  # EOI1
    assert places[10] == 0  # ROI2
    assert places[-19:] == trained[3:]  # BASE BOI2, the codes, EOI2
    # EOI1 of the small picture is read, so the table has a row for it, which pretraining has and does not use.
    assert layout.num_positions(budget=5, num_image_tokens=sizes, is_image_fixed=True) == trained[-1] + 1


def test_a_table_of_positions_has_a_row_for_all_but_the_last_token() -> None:
    assert LAYOUT.num_positions(budget=61, num_image_tokens=1024, is_image_fixed=False) == 1088
    # 4 + 1024 + 1 tokens from ROI2 on, the last of which is only a label; the first part is shorter.
    assert TASKS["super_resolution"].num_positions(budget=57, num_image_tokens=BOTH, is_image_fixed=False) == 1027


def test_a_layout_of_two_images_wants_two_numbers_of_tokens() -> None:
    with pytest.raises(ConfigError, match="the layout has 2 images"):
        TASKS["super_resolution"].text_budget(length=1345, num_image_tokens=(256,))
