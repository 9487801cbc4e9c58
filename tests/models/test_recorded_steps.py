"""Steps by one token through tensors that stay where they are: the same numbers, and on a GPU as one command."""

import pytest
import torch

from cogview.models import recorded_steps
from cogview.models.gpt import GPT, GPTConfig, KeyValueCache
from cogview.sampling.autoregressive import generate_codes
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.text_guided_filling import fill_hidden_codes
from cogview.sequences.coglm import CogLMLayout
from cogview.sequences.layout import TASKS
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary, TextRanges
from cogview.tokenizers.vocabulary import Vocabulary

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")),
]
GRID = 6


@pytest.fixture(autouse=True)
def _short_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture goes over the end of several."""
    monkeypatch.setattr(recorded_steps, "ROUND", 16)


@pytest.fixture(params=DEVICES)
def model(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=120, max_positions=80, num_layers=3, hidden_size=32, num_heads=4, init_std=0.3)
    return GPT(config).to(request.param).eval()


def test_recorded_steps_draw_the_same_codes(model: GPT) -> None:
    vocabulary = Vocabulary(32, 20)
    prompts = [
        TASKS["text_to_image"].prompt_ids(text, vocabulary=vocabulary, max_text=20)
        for text in ([3], [1, 2, 3, 4, 5], [7, 8], [7, 8])
    ]

    def draw() -> torch.Tensor:
        return generate_codes(
            model, prompts, vocabulary=vocabulary, grid=GRID, sampling=SamplingConfig(top_k=12), seeds=[1, 2, 3, 4]
        )

    plain = draw()
    model.record_steps()
    assert torch.equal(draw(), plain)
    assert torch.equal(draw(), plain)


def test_what_is_added_to_scores_is_kept(model: GPT) -> None:
    text = TextRanges(common=20, english=6, chinese=6, rare=2)
    vocabulary = BilingualVocabulary(num_image_codes=32, text=text)
    hidden = torch.zeros(2, GRID, GRID, dtype=torch.bool)
    hidden[0, 1:4, 2:5] = hidden[1, 3:] = True
    codes = torch.arange(2 * GRID * GRID).view(2, GRID, GRID) % 32

    def fill() -> torch.Tensor:
        return fill_hidden_codes(
            model,
            [[20, 21, 22], [27]],
            codes,
            hidden,
            vocabulary=vocabulary,
            layout=CogLMLayout(grid=GRID, max_text=8, image_position=9),
            sampling=CogLMSampling(by_clusters=False, text_bonus=1.4, tokens=SamplingConfig(top_k=12)),
            seeds=[1, 2],
        )

    plain = fill()
    model.record_steps()
    assert torch.equal(fill(), plain)


@torch.inference_mode()
def test_several_tokens_may_be_read_between_steps_and_a_cache_begun_anew(model: GPT) -> None:
    device = model.word_embeddings.weight.device
    ids = torch.arange(1, 41, device=device)[None]
    places = torch.arange(40, device=device)[None]
    whole = model(ids, places)
    model.record_steps()
    cache = KeyValueCache(model.config, batch=1, length=40, dtype=whole.dtype, device=device)
    for _ in range(2):
        parts = [(0, 5), (5, 6), (6, 7), (7, 19), (19, 20), (20, 21), (21, 40)]
        read = [model(ids[:, first:end], places[:, first:end], cache=cache) for first, end in parts]
        torch.testing.assert_close(torch.cat(read, dim=1), whole, rtol=1e-4, atol=1e-5)
        cache.filled = 0
