"""Batches: labels are the next tokens, padding has no loss, and the release's rule says what counts as image."""

import numpy as np
import pytest
import torch

from cogview.errors import SchemaError
from cogview.sequences.batch import SequenceBatch, SequenceConfig, build_batch
from cogview.sequences.layout import TASKS
from cogview.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(16, 20)
CODES = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=np.uint16)


def batch(texts: list[list[int]], *, length: int = 20, text_weight: float = 1.0) -> SequenceBatch:
    config = SequenceConfig(length=length, text_loss_weight=text_weight)
    return build_batch(texts, CODES, layout=TASKS["text_to_image"], config=config, vocabulary=VOCABULARY)


def test_labels_are_the_tokens_one_place_on() -> None:
    built = batch([[0, 1, 2], [3]])
    assert built.ids.shape == (2, 3 + 4 + 4 - 1)
    assert torch.equal(built.ids[0, 1:], built.labels[0, :-1])
    assert built.labels[0, -1] == VOCABULARY.command("EOI1")
    assert built.positions[0].tolist() == list(range(10))


def test_padding_has_no_loss_and_lies_at_the_end() -> None:
    built = batch([[0, 1, 2], [3]])
    assert built.loss_weights[0].tolist() == [1.0] * 10
    assert built.loss_weights[1].tolist() == [1.0] * 8 + [0.0] * 2
    assert built.labels[1, 8:].tolist() == [VOCABULARY.command("PAD")] * 2


def test_the_input_token_decides_between_text_and_image_loss() -> None:
    built = batch([[0, 1, 2], [3]], text_weight=5.0)
    # Of ROI1 a b c BASE BOI1 | 1 2 3 4, the step from BOI1 to code 1 counts as text, that from code 4 to EOI1 as image.
    assert built.image_part[0].tolist() == [False] * 6 + [True] * 4
    assert built.loss_weights[0].tolist() == [5.0] * 6 + [1.0] * 4


def test_a_long_text_is_cut_before_any_image_token() -> None:
    built = batch([list(range(20)), [3]], length=12)
    assert built.ids.shape[1] == 11
    assert built.ids[0, -4:].tolist() == [1, 2, 3, 4]
    assert built.ids[0, 1:5].tolist() == [16, 17, 18, 19]


def test_texts_and_images_must_be_as_many() -> None:
    with pytest.raises(SchemaError, match="1 texts for 2 images"):
        batch([[1]])


def test_a_row_of_two_images_has_both_in_their_order() -> None:
    low, high = CODES[:, :1], CODES
    layout, config = TASKS["super_resolution"], SequenceConfig(length=30)
    built = build_batch([[0, 1], [3]], [low, high], layout=layout, config=config, vocabulary=VOCABULARY)
    names = ("ROI1", "BASE", "BOI1", "EOI1", "ROI2", "BOI2", "EOI2")
    roi1, base, boi1, eoi1, roi2, boi2, eoi2 = map(VOCABULARY.command, names)
    assert built.ids[0].tolist() == [roi1, 16, 17, base, boi1, 1, eoi1, roi2, base, boi2, 1, 2, 3, 4]
    assert built.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]
    assert built.labels[0, -1] == eoi2
    assert built.ids[1].tolist()[4:6] == [5, eoi1]
    with pytest.raises(SchemaError, match="2 texts for 1 images"):
        build_batch([[0], [1]], [low, high[:1]], layout=layout, config=config, vocabulary=VOCABULARY)
