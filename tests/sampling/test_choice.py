"""Drawing a token: the asked distribution, the asked cuts, and one seed for each sample."""

import pytest
import torch

from cogview.errors import ConfigError
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
EVERYTHING = SamplingConfig(top_k=0)


def frequencies(config: SamplingConfig, number: int = 20_000) -> torch.Tensor:
    draws = torch.linspace(0, 1, number + 1, dtype=torch.float64)[:-1]
    chosen = choose(LOGITS.expand(number, -1), draws, config=config)
    return torch.bincount(chosen, minlength=4) / number


def test_tokens_are_drawn_with_their_probability() -> None:
    assert torch.allclose(frequencies(EVERYTHING), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=1e-3)


def test_temperature_flattens_and_zero_takes_the_likeliest() -> None:
    flattened = torch.softmax(LOGITS / 2, dim=0)
    assert torch.allclose(frequencies(SamplingConfig(temperature=2.0, top_k=0)), flattened, atol=1e-3)
    assert frequencies(SamplingConfig(temperature=0.0))[0] == 1.0


def test_top_k_and_top_p_cut_the_tail() -> None:
    two_likeliest = torch.tensor([0.625, 0.375, 0, 0])
    assert torch.allclose(frequencies(SamplingConfig(top_k=2)), two_likeliest, atol=1e-3)
    assert torch.allclose(frequencies(SamplingConfig(top_k=0, top_p=0.6)), two_likeliest, atol=1e-3)
    assert frequencies(SamplingConfig(top_k=0, top_p=1e-9))[0] == 1.0


def test_the_largest_draw_never_picks_an_impossible_token() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert choose(logits, torch.tensor([1.0], dtype=torch.float64), config=EVERYTHING).item() == 1


def test_a_rows_draws_depend_on_its_seed_alone() -> None:
    device = torch.device("cpu")
    together = uniform_draws([5, 6, 7], length=9, device=device)
    assert torch.equal(together[1], uniform_draws([6], length=9, device=device)[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("settings", [{"temperature": float("nan")}, {"temperature": -1}, {"top_k": -1}, {"top_p": 2}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SamplingConfig(**settings)
