"""A trained model taken up again: the same function, in fp32, with more positions and other switches."""

import pytest
import torch

from cogview.errors import ConfigError
from cogview.models.continued import continued
from cogview.models.gpt import GPT, GPTConfig

IDS = torch.arange(6)[None] % 5


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=8, max_positions=6, num_layers=1, hidden_size=8, num_heads=2, dropout=0.1)).eval()


def test_a_continued_model_computes_the_same_and_owns_its_weights() -> None:
    model = small_gpt()
    before = model(IDS, torch.arange(6)[None])
    copy = continued(model, min_positions=4, changes={}).eval()
    assert torch.equal(copy(IDS, torch.arange(6)[None]), before)
    with torch.no_grad():
        copy.word_embeddings.weight.zero_()
    assert torch.equal(model(IDS, torch.arange(6)[None]), before)


def test_new_positions_start_as_the_last_one() -> None:
    model = small_gpt()
    copy = continued(model, min_positions=9, changes={}).eval()
    assert copy.config.max_positions == 9
    beyond = copy(IDS, torch.tensor([[0, 1, 5, 6, 7, 8]]))
    clamped = model(IDS, torch.tensor([[0, 1, 5, 5, 5, 5]]))
    assert torch.equal(beyond, clamped)


def test_half_precision_is_trained_in_fp32_and_switches_reach_every_layer() -> None:
    copy = continued(small_gpt().half(), min_positions=0, changes={"dropout": 0.0, "attention": "plain"})
    assert {parameter.dtype for parameter in copy.parameters()} == {torch.float32}
    layer = copy.transformer.layers[0]
    assert layer.dropout.p == copy.dropout.p == 0.0
    assert layer.attention.config.attention == "plain"


def test_what_belongs_to_the_weights_cannot_change() -> None:
    with pytest.raises(ConfigError, match="num_layers belongs to the weights"):
        continued(small_gpt(), min_positions=0, changes={"num_layers": 2})
