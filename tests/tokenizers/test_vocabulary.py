"""The id layout of the released checkpoints, and the same layout at other sizes."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview.errors import VocabularyError
from cogview.tokenizers.vocabulary import COMMAND_NAMES, Vocabulary

RELEASED_COMMANDS = {
    "PAD": 58192,
    "BOI1": 58193,
    "BOI2": 58194,
    "BOI3": 58195,
    "EOI1": 58196,
    "EOI2": 58197,
    "EOI3": 58198,
    "ROI1": 58199,
    "ROI2": 58200,
    "ROI3": 58201,
    "SEP": 58202,
    "MASK": 58203,
    "CLS": 58204,
    "ENC": 58205,
    "TINY": 58206,
    "SMALL": 58207,
    "BASE": 58208,
    "BIG": 58209,
    **{f"POS{index}": 58210 + index for index in range(9)},
}
sizes = st.builds(Vocabulary, st.integers(1, 70_000), st.integers(1, 70_000), st.integers(1, 8))


def test_default_ids_are_those_of_the_released_checkpoints() -> None:
    vocabulary = Vocabulary()
    assert {name: vocabulary.command(name) for name in vocabulary.command_names} == RELEASED_COMMANDS
    assert vocabulary.image_ids == range(8192)
    assert vocabulary.text_ids == range(8192, 58192)
    assert vocabulary.command_ids == range(58192, 58219)
    assert vocabulary.text_offset == 8192
    assert vocabulary.size == 58240
    assert len(COMMAND_NAMES) == 27


def test_table_is_padded_for_each_model_parallel_part() -> None:
    assert Vocabulary(model_parallel_size=4).size == 58368  # the next multiple of 512
    assert Vocabulary(model_parallel_size=4).fingerprint == Vocabulary().fingerprint


@given(sizes)
def test_ranges_meet_without_gap_and_fit_the_table(vocabulary: Vocabulary) -> None:
    assert vocabulary.image_ids.start == 0
    assert vocabulary.image_ids.stop == vocabulary.text_ids.start
    assert vocabulary.text_ids.stop == vocabulary.command_ids.start
    assert vocabulary.command_ids.stop == vocabulary.num_ids <= vocabulary.size
    multiple = 128 * vocabulary.model_parallel_size
    assert vocabulary.size % multiple == 0
    assert vocabulary.size - vocabulary.num_ids < multiple


def test_unknown_command_names_the_nearest() -> None:
    with pytest.raises(VocabularyError, match="did you mean 'ROI1'"):
        Vocabulary().command("[ROI1]")
    with pytest.raises(VocabularyError, match="did you mean 'BASE'"):
        Vocabulary().command("base")


@pytest.mark.parametrize("sizes", [(0, 10, 1), (10, 0, 1), (10, 10, 0), (-1, 10, 1)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(VocabularyError, match="at least 1"):
        Vocabulary(*sizes)


def test_describe_reads_every_kind_of_id() -> None:
    vocabulary = Vocabulary()
    assert vocabulary.describe(0) == "image code 0"
    assert vocabulary.describe(8192) == "text piece 0"
    assert vocabulary.describe(58208) == "[BASE]"
    assert vocabulary.describe(58219) == "unused row 58219"
    for outside in (-1, 58240):
        with pytest.raises(VocabularyError, match="outside"):
            vocabulary.describe(outside)


def test_fingerprint_follows_the_layout() -> None:
    layouts = {Vocabulary(), Vocabulary(8191, 50_001), Vocabulary(8192, 49_999), Vocabulary(256, 512)}
    assert len({vocabulary.fingerprint for vocabulary in layouts}) == 4
    # The published layout's digest must not move: shards and checkpoints carry it.
    assert Vocabulary().fingerprint == pickle.loads(pickle.dumps(Vocabulary())).fingerprint
    assert Vocabulary().fingerprint.startswith("36fd87b22c41fdcc")
