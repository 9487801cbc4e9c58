"""Held-out losses: the release's parts, the whole vocabulary, and independence of batches."""

import math

import numpy as np
import pytest
import torch

from cogview.evaluation.losses import held_out_losses
from cogview.models.gpt import GPT, GPTConfig
from cogview.sequences.batch import SequenceConfig, build_batch
from cogview.sequences.layout import TASKS
from cogview.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(16, 40)
CODES_PER_IMAGE = 9
LENGTH = 24


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=VOCABULARY.size, max_positions=LENGTH, num_layers=2, hidden_size=32, num_heads=2, dropout=0.1
    )
    return GPT(config)


def rows(count):
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 40, generator.integers(1, 9), dtype=np.int32) for _ in range(count)]
    return texts, generator.integers(0, 16, (count, CODES_PER_IMAGE), dtype=np.uint16)


def batches(texts, codes, *, size):
    config = SequenceConfig(length=LENGTH)
    for start in range(0, len(texts), size):
        part = slice(start, start + size)
        yield build_batch(texts[part], codes[part], layout=TASKS["text_to_image"], config=config, vocabulary=VOCABULARY)


def test_every_token_counts_once_in_its_part(model):
    texts, codes = rows(7)
    losses = held_out_losses(model, batches(texts, codes, size=3))
    # Inputs that are image codes: all nine, the last of which predicts EOI1. The rest: ROI1, the text, BASE, BOI1.
    assert losses["image"].n == 7 * CODES_PER_IMAGE
    assert losses["text"].n == sum(map(len, texts)) + 7 * 3


def test_losses_are_the_mean_of_the_cross_entropies(model):
    texts, codes = rows(5)
    losses = held_out_losses(model, batches(texts, codes, size=5))
    model.eval()
    sums, counts = {"text": 0.0, "image": 0.0}, {"text": 0, "image": 0}
    for text, code in zip(texts, codes, strict=True):
        row = TASKS["text_to_image"].fill(text, [code], vocabulary=VOCABULARY, budget=99)
        ids_BL = torch.from_numpy(row)[None]
        with torch.no_grad():
            hidden_BLE = model(ids_BL[:, :-1], torch.arange(len(row) - 1)[None])
            log_p = model.logits(hidden_BLE)[0].double().log_softmax(-1)
        for place, label in enumerate(row[1:]):
            part = "image" if row[place] < 16 else "text"
            sums[part] -= log_p[place, label].item()
            counts[part] += 1
    for part, total in sums.items():
        assert losses[part].value == pytest.approx(total / counts[part], rel=1e-5)


def test_batch_size_changes_nothing(model):
    texts, codes = rows(8)
    one, many = (held_out_losses(model, batches(texts, codes, size=size)) for size in (1, 8))
    for part in ("text", "image"):
        assert one[part].n == many[part].n
        assert one[part].value == pytest.approx(many[part].value, rel=1e-5)


def test_a_model_without_preference_loses_the_logarithm_of_the_vocabulary(model):
    with torch.no_grad():
        model.word_embeddings.weight.zero_()
    losses = held_out_losses(model, batches(*rows(4), size=4))
    for loss in losses.values():
        assert loss.value == pytest.approx(math.log(VOCABULARY.size), rel=1e-6)


def test_no_rows_make_no_losses(model):
    assert held_out_losses(model, []) == {}
