"""Sampling with the cache: the tokens of a full recomputation, only image codes, and no influence of the neighbours."""

import copy

import pytest
import torch

from cogview.errors import ConfigError
from cogview.models import products
from cogview.models.gpt import GPT, Block, GPTConfig
from cogview.sampling.autoregressive import generate_codes
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws
from cogview.sequences.layout import TASKS
from cogview.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(32, 20)
SAMPLING = SamplingConfig(top_k=12)


@pytest.fixture(autouse=True, params=[True, False], ids=["onednn", "torch"])
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are copied in one way where products are oneDNN's, and in another where they are torch's."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=VOCABULARY.size, max_positions=40, num_layers=3, hidden_size=32, num_heads=4, init_std=0.3
    )
    return GPT(config).eval()


def prompt(*text_ids: int) -> list[int]:
    return TASKS["text_to_image"].prompt_ids(list(text_ids), vocabulary=VOCABULARY, max_text=20)


def generate(model: GPT, prompts: list[list[int]], seeds: list[int]) -> torch.Tensor:
    return generate_codes(model, prompts, vocabulary=VOCABULARY, grid=4, sampling=SAMPLING, seeds=seeds)


def test_the_cache_draws_the_tokens_of_a_full_recomputation(model: GPT) -> None:
    for seed in range(20):
        ids = prompt(3, seed % 20)
        draws = uniform_draws([seed], length=16, device=torch.device("cpu"))
        with torch.no_grad():
            for token in range(16):
                hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])[:, -1]
                logits = model.logits(hidden)[:, VOCABULARY.image_ids.start : VOCABULARY.image_ids.stop]
                ids = [*ids, int(choose(logits, draws[:, token], config=SAMPLING))]
        assert generate(model, [prompt(3, seed % 20)], [seed]).flatten().tolist() == ids[-16:]


def test_a_sample_does_not_depend_on_its_neighbours(model: GPT) -> None:
    prompts = [prompt(1), prompt(2, 3, 4, 5), prompt(6, 7)]
    together = generate(model, prompts, [10, 11, 12])
    for index in range(3):
        assert torch.equal(together[index], generate(model, prompts[index : index + 1], [10 + index])[0])


def test_candidates_of_one_prompt_share_its_reading(model: GPT) -> None:
    read: list[tuple[int, ...]] = []
    watch = model.register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape)))
    prompts = [prompt(1), prompt(2, 3, 4)]
    together = generate(model, [prompts[0], prompts[1], prompts[0], prompts[0]], [5, 6, 7, 8])
    watch.remove()
    assert read[0] == (2, 6)
    assert set(read[1:]) == {(4, 1)}
    for row, ids, seed in ((0, prompts[0], 5), (1, prompts[1], 6), (3, prompts[0], 8)):
        assert torch.equal(together[row], generate(model, [ids], [seed])[0])


def test_only_image_codes_are_drawn_and_seeds_differ(model: GPT) -> None:
    codes = generate(model, [prompt(1)] * 30, list(range(30)))
    assert codes.shape == (30, 4, 4)
    assert codes.min() >= 0
    assert codes.max() < 32
    assert len({tuple(row.flatten().tolist()) for row in codes}) > 20


def test_a_prompt_without_room_is_refused(model: GPT) -> None:
    with pytest.raises(ConfigError, match="41 positions; the model has 40"):
        generate_codes(model, [prompt(*range(14))], vocabulary=VOCABULARY, grid=5, sampling=SAMPLING, seeds=[1])
    with pytest.raises(ConfigError, match="2 seeds for 1 prompts"):
        generate(model, [prompt(1)], [1, 2])


def test_given_positions_are_those_that_the_model_sees(model: GPT) -> None:
    ids = prompt(1, 2)
    apart = [0, 1, 2, 9, 10]
    drawn = generate_codes(
        model, [ids], vocabulary=VOCABULARY, grid=4, sampling=SAMPLING, seeds=[3], prompts_positions=[apart]
    ).flatten()
    draws = uniform_draws([3], length=16, device=torch.device("cpu"))
    known, places = list(ids), list(apart)
    with torch.no_grad():
        for token in range(16):
            hidden = model(torch.tensor([known]), torch.tensor([places]))[:, -1]
            logits = model.logits(hidden)[:, : VOCABULARY.image_ids.stop]
            known.append(int(choose(logits, draws[:, token], config=SAMPLING)))
            places.append(places[-1] + 1)
    assert drawn.tolist() == known[-16:]


def test_the_short_way_of_one_token_is_left_where_layers_are_wrapped(model: GPT) -> None:
    ids = [prompt(1), prompt(2, 3, 4)]
    short = generate(model, ids, [5, 6])
    wrapped = copy.deepcopy(model)
    called: list[int] = []
    for layer in wrapped.transformer.layers:
        layer.__class__ = type("WrappedBlock", (Block,), {})
        layer.register_forward_hook(lambda module, inputs, output: called.append(inputs[0].shape[1]))
    assert torch.equal(generate(wrapped, ids, [5, 6]), short)
    assert called.count(1) == 3 * 15
