"""The classifier of styles learns what tells real pictures apart, and is the same for the same seed."""

import torch

from cogview.evaluation.style_judge import train_judge


def pictures(number: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of random colour: flat ones, striped ones, and ones that fade."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(number, 3, 1, 1, generator=generator).expand(-1, -1, 16, 16)
    styles = torch.arange(number) % 3
    stripes = (torch.arange(16) % 2).float().view(1, 1, 1, 16)
    fading = torch.linspace(0, 1, 16).view(1, 1, 16, 1)
    kinds = torch.stack([colours, colours * stripes, colours * fading])
    return kinds[styles, torch.arange(number)], styles


def test_it_names_the_styles_of_new_pictures() -> None:
    images, styles = pictures(180, seed=0)
    judge = train_judge(images, styles, num_styles=3, epochs=10, seed=0)
    assert judge.accuracy(*pictures(90, seed=1)) > 0.9
    assert not judge.training


def test_the_same_seed_gives_the_same_judge() -> None:
    images, styles = pictures(64, seed=0)
    first, second = (train_judge(images, styles, num_styles=3, epochs=1, seed=5) for _ in range(2))
    assert torch.equal(first(images), second(images))
