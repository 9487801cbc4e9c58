"""CogLM's rows: who sees whom, against a slow construction from the roles of tokens, and what is predicted where."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogview.errors import ConfigError, SchemaError
from cogview.models.attention import staged_mask
from cogview.models.gpt import GPT, GPTConfig
from cogview.sequences.coglm import NO_LABEL, PARTS, CogLMLayout, CogLMRow, CogLMTasks, RowMaker
from cogview.sequences.coglm_batch import collate
from cogview.sequences.hidden_regions import runs
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary, TextRanges

VOCABULARY = BilingualVocabulary(num_image_codes=200, text=TextRanges(common=5, english=10, chinese=10, rare=2))
GRID, MAX_TEXT, FIRST = 4, 8, 20
LAYOUT = CogLMLayout(grid=GRID, max_text=MAX_TEXT, image_position=FIRST)
MAKER = RowMaker(vocabulary=VOCABULARY, layout=LAYOUT, tasks=CogLMTasks(patch_side=2))
CODES = np.arange(100, 100 + GRID**2).astype(np.uint16)  # every code tells its place
ENGLISH, CHINESE = [5, 6, 7, 8], [15, 16, 17]

masks = st.lists(st.booleans(), min_size=GRID**2, max_size=GRID**2).map(
    lambda cells: np.array(cells).reshape(GRID, GRID)
)
texts = st.lists(st.integers(4, VOCABULARY.text.num_pieces - 1), max_size=MAX_TEXT)


@dataclass(frozen=True)
class Token:
    """What a token is, told by the one who lays out a row by hand. place: among the codes, or in its text."""

    role: str  # text, start, visible, hidden, copy, caption
    place: int
    text: int = 0


def sees(one: Token, other: Token, *, order: dict[int, int]) -> bool:
    """The rules of the paper and the release, one by one. order: when a hidden code's turn is."""
    if one == other:
        return True
    if one.role == "text":
        return other.role == "text"
    if one.role == "caption":
        is_own = other.role == "caption" and other.text == one.text and other.place < one.place
        return other.role in ("visible", "hidden") or is_own
    if one.role in ("start", "visible"):
        return other.role in ("text", "start", "visible")
    if other.role in ("text", "start", "visible"):
        return True
    return other.role != "caption" and _turn(other, order) < _turn(one, order)


def _turn(token: Token, order: dict[int, int]) -> float:
    """A hidden code's turn; a copy leads the code behind it."""
    return order[token.place] if token.role == "hidden" else order[token.place + 1] - 0.5


def seen_by(row: CogLMRow) -> np.ndarray:
    stages, groups = torch.from_numpy(row.stages)[None], torch.from_numpy(row.groups)[None]
    return staged_mask(stages, groups)[0, 0].numpy()


def slow(tokens: list[Token], hidden: list[int]) -> np.ndarray:
    order = {place: turn for turn, place in enumerate(hidden)}
    return np.array([[sees(one, other, order=order) for other in tokens] for one in tokens])


def hidden_tokens(hidden: list[int]) -> list[Token]:
    """Each run behind a copy of what stands before it; nobody sees the last code."""
    tokens = []
    for place in hidden:
        if place - 1 not in hidden:
            tokens.append(Token("copy", place - 1))
        tokens.append(Token("hidden", place))
    return tokens[:-1]


@given(text=texts)
def test_a_drawing_sees_its_text_and_what_is_drawn(text: list[int]) -> None:
    row = MAKER.drawing(text, CODES)
    tokens = [Token("text", place) for place in range(len(text))] + hidden_tokens(list(range(GRID**2)))
    assert np.array_equal(seen_by(row), slow(tokens, list(range(GRID**2))))
    assert row.labels[len(text) :].tolist() == CODES.tolist()
    assert set(row.labels[: len(text)]) <= {NO_LABEL}


@given(text=texts, hidden_GG=masks)
def test_a_hole_is_seen_by_what_comes_after_it_only(text: list[int], hidden_GG: np.ndarray) -> None:
    hidden = np.flatnonzero(hidden_GG).tolist()
    if not hidden or hidden_GG.all():
        return
    row = MAKER.completion(text, CODES, hidden_GG=hidden_GG)
    visible = [Token("visible", place) for place in range(GRID**2) if place not in hidden]
    tokens = [Token("text", place) for place in range(len(text))] + [
        Token("start", -1),
        *visible,
        *hidden_tokens(hidden),
    ]
    assert np.array_equal(seen_by(row), slow(tokens, hidden))
    assert row.labels[row.labels != NO_LABEL].tolist() == CODES[hidden].tolist()


@given(hidden_GG=masks, first=texts, second=texts)
def test_texts_see_the_whole_picture_and_not_each_other(
    hidden_GG: np.ndarray, first: list[int], second: list[int]
) -> None:
    row = MAKER.understanding([first, second], CODES, hidden_GG=hidden_GG)
    hidden = np.flatnonzero(hidden_GG).tolist()
    tokens = [Token("hidden" if place in hidden else "visible", place) for place in range(GRID**2)]
    for number, text in enumerate((first, second)):
        tokens += [Token("caption", place, number) for place in range(len(text) + 1)]
    assert np.array_equal(seen_by(row), slow(tokens, hidden))


@given(data=st.data())
@settings(max_examples=200)
def test_no_position_can_learn_its_own_target(data: st.DataObject) -> None:
    """Whatever is drawn: through any number of layers, nothing that a label is read from has seen the label."""
    tasks = CogLMTasks(
        understanding_share=0.4,
        completion_share=0.3,
        text_only_share=0.2,
        image_only_share=0.2,
        patch_side=data.draw(st.integers(1, 3)),
        patch_rule=data.draw(st.sampled_from(["released", "paper"])),
        span_share=0.5,
    )
    chosen = data.draw(st.lists(texts, max_size=2))
    has_picture = data.draw(st.booleans()) or not any(chosen)
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    row = replace(MAKER, tasks=tasks).row(chosen, CODES if has_picture else None, generator=generator)
    seen = seen_by(row)
    through_layers = (seen.astype(int) @ seen.astype(int)) > 0
    assert np.array_equal(through_layers, seen), "what others tell is what could be seen anyway"
    for place in np.flatnonzero(row.labels != NO_LABEL):
        # A label's own position is the next one, of the picture or of the same text.
        is_target = (row.positions == row.positions[place] + 1) & (row.groups == row.groups[place])
        is_image = row.labels[place] < VOCABULARY.text_offset
        is_target &= (row.ids < VOCABULARY.text_offset) == is_image
        assert not (seen[place] & is_target).any()


def test_a_model_predicts_a_hidden_code_without_it() -> None:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=VOCABULARY.size, max_positions=64, num_layers=3, hidden_size=16, num_heads=2)
    ).eval()
    hidden_GG = np.zeros((GRID, GRID), dtype=bool)
    hidden_GG[1:3, 1:4] = True
    for make in (
        MAKER.completion,
        lambda text, codes, hidden_GG: MAKER.understanding([text], codes, hidden_GG=hidden_GG),
    ):
        before = make(ENGLISH, CODES, hidden_GG=hidden_GG)
        place = int(np.flatnonzero(before.labels == CODES[6])[0])  # the second of the first hidden row
        other = CODES.copy()
        other[6:] = 199
        other[~hidden_GG.ravel()] = CODES[~hidden_GG.ravel()]
        after = make(ENGLISH, other, hidden_GG=hidden_GG)
        states = []
        for row in (before, after):
            batch = collate([row], pad=VOCABULARY.pad, weights={})
            states.append(model(batch.ids, batch.positions, allowed=staged_mask(batch.stages, batch.groups))[0])
        assert torch.equal(states[0][place], states[1][place])
        assert not torch.equal(states[0][-1], states[1][-1]) or make is MAKER.completion


def test_the_releases_rows_have_its_positions_and_length() -> None:
    maker = RowMaker(vocabulary=BilingualVocabulary(), layout=CogLMLayout())
    codes = np.arange(400).astype(np.uint16)
    row = maker.drawing(list(range(100, 300)), codes)
    assert maker.layout.length == len(row.ids) + 1 == 512, "the last code is only a label"
    assert row.positions[:111].tolist() == list(range(111))
    assert row.positions[111:].tolist() == list(range(512, 912))
    assert row.ids[111] == 150_000
    assert maker.layout.num_positions == 913
    generator = np.random.default_rng(0)
    for _ in range(200):
        row = maker.row([list(range(100, 120))], codes, generator=generator)
        patches = row.parts == PARTS.index("patch")
        if patches.any():
            break
    hidden = row.stages[:400] > 0
    assert 0.45 < hidden.mean() < 0.75, "twenty squares of sixteen, some of them overlapping"
    start = row.ids[400]
    assert start == 150_001
    assert row.positions[400:402].tolist() == [0, 1]
    assert row.labels[-1] == 20_003
    assert row.labels[400:-1].tolist() == row.ids[401:].tolist()


def test_a_code_is_predicted_from_the_one_left_of_it_where_both_are_hidden() -> None:
    hidden_GG = np.zeros((GRID, GRID), dtype=bool)
    hidden_GG[0, 2:] = hidden_GG[1, :2] = True
    row = MAKER.understanding([], CODES, hidden_GG=hidden_GG)
    assert np.flatnonzero(row.labels != NO_LABEL).tolist() == [2, 4], "not across the border of a row"
    assert row.labels[[2, 4]].tolist() == [103, 105]


def test_languages_are_told_by_ids_and_have_losses_of_their_own() -> None:
    row = MAKER.understanding([ENGLISH, CHINESE], CODES, hidden_GG=np.zeros((GRID, GRID), dtype=bool))
    english, chinese = PARTS.index("english"), PARTS.index("chinese")
    assert row.parts[GRID**2 :].tolist() == [english] * 5 + [chinese] * 4
    assert row.ids[GRID**2] == VOCABULARY.start_of_text("english")
    assert row.ids[GRID**2 + 5] == VOCABULARY.start_of_text("chinese")
    endless = replace(MAKER, tasks=CogLMTasks(ends_text=False))
    row = endless.understanding([ENGLISH], CODES, hidden_GG=np.zeros((GRID, GRID), dtype=bool))
    assert row.labels[-1] == NO_LABEL
    assert row.labels[-2] == 8 + VOCABULARY.text_offset


def test_shares_are_kept_and_one_language_is_chosen() -> None:
    tasks = CogLMTasks(understanding_share=0.3, completion_share=0.2, patch_side=2)
    maker, generator = replace(MAKER, tasks=tasks), np.random.default_rng(1)
    rows = [maker.row([ENGLISH, CHINESE], CODES, generator=generator) for _ in range(1000)]
    kinds = [
        "understanding" if row.groups.any() else "completion" if (row.parts == 2).any() else "drawing" for row in rows
    ]
    assert abs(kinds.count("understanding") - 300) < 50
    assert abs(kinds.count("completion") - 200) < 45
    drawings = [row for row, kind in zip(rows, kinds, strict=True) if kind == "drawing"]
    chosen = [row.ids[0] == ENGLISH[0] + VOCABULARY.text_offset for row in drawings]
    assert 0.4 < np.mean(chosen) < 0.6


def test_a_picture_alone_and_a_text_alone_are_rows_too() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        row = MAKER.row([[]], CODES, generator=generator)
        assert (row.ids < VOCABULARY.text_offset).sum() >= GRID**2 - 1
        assert set(row.parts) <= {NO_LABEL, PARTS.index("image"), PARTS.index("patch")}
    text = MAKER.row([ENGLISH * 2], None, generator=generator)
    assert (text.labels != NO_LABEL).any()
    hidden = text.stages > 0
    assert all(end - first >= 2 for first, end in runs(hidden))
    with pytest.raises(SchemaError, match="nothing to learn"):
        MAKER.row([[]], None, generator=generator)


def test_a_batch_is_padded_with_what_nobody_sees_and_weighed_by_part() -> None:
    rows = [MAKER.drawing(ENGLISH, CODES), MAKER.drawing([], CODES)]
    batch = collate(rows, pad=VOCABULARY.pad, weights={"image": 0.5})
    assert batch.ids[1, -4:].tolist() == [VOCABULARY.pad] * 4
    assert not staged_mask(batch.stages, batch.groups)[1, 0, :-4, -4:].any()
    assert batch.loss_weights[1].tolist() == [0.5] * 16 + [0.0] * 4
    with pytest.raises(ConfigError, match="no part of the loss"):
        collate(rows, pad=VOCABULARY.pad, weights={"text": 1.0})


@pytest.mark.parametrize(
    "wrong",
    [
        {"understanding_share": 0.8, "completion_share": 0.4},
        {"patch_rule": "mine"},
        {"patch_share": 1.0},
        {"box_shares": (0.8, 0.2)},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        CogLMTasks(**wrong)
    with pytest.raises(ConfigError, match="image_position"):
        CogLMLayout(grid=4, max_text=8, image_position=8)
