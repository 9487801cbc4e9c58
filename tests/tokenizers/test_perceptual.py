"""The perceptual distance: the values of an independent forward pass, and files that it cannot be made from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cogview.errors import CheckpointError, ConfigError
from cogview.tokenizers.perceptual import PerceptualConfig, PerceptualDistance
from cogview.weight_files import require_sha256

WIDTHS = (4, 6, 8, 10, 10)  # VGG16: 64, 128, 256, 512, 512


def vgg16_layers() -> nn.Sequential:
    """Thin, but with torchvision's numbering of layers."""
    layers: list[nn.Module] = []
    entry = 3
    for width, depth in zip(WIDTHS, (2, 2, 3, 3, 3), strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(entry, width, 3, padding=1), nn.ReLU()]
            entry = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return vgg16_layers()


@pytest.fixture(scope="module")
def config(layers: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> PerceptualConfig:
    folder = tmp_path_factory.mktemp("lpips")
    vgg16 = {f"features.{name}": tensor for name, tensor in layers.state_dict().items()}
    torch.save(vgg16 | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    heads = {f"lin{index}.model.1.weight": torch.rand(1, width, 1, 1) for index, width in enumerate(WIDTHS)}
    torch.save(heads, folder / "vgg.pth")
    return PerceptualConfig(weight=1.0, vgg16=folder / "vgg16.pth", heads=folder / "vgg.pth")


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first = torch.rand(2, 3, 32, 40, generator=generator) * 2 - 1
    return first, (first + 0.3 * torch.randn(first.shape, generator=generator)).clamp(-1, 1)


def test_the_distance_is_that_of_an_independent_pass(layers: nn.Sequential, config: PerceptualConfig) -> None:
    assert config.heads is not None
    heads = torch.load(config.heads, weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    expected = torch.zeros(2)
    with torch.no_grad():
        maps = [(pixels - shift) / scale for pixels in pair()]
        slice_ends = iter(enumerate((3, 8, 15, 22, 29)))
        index, end = next(slice_ends)
        for number, layer in enumerate(layers):
            maps = [layer(values) for values in maps]
            if number == end:
                first, second = (values / (values.norm(dim=1, keepdim=True) + 1e-10) for values in maps)
                weighted = (first - second) ** 2 * heads[f"lin{index}.model.1.weight"]
                expected += weighted.sum(1).mean((1, 2))
                index, end = next(slice_ends, (5, 99))
    found = PerceptualDistance.from_files(config)(*pair())
    assert found.shape == (2,)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_equal_pictures_are_at_no_distance_and_black_ones_have_a_gradient(config: PerceptualConfig) -> None:
    distance = PerceptualDistance.from_files(config)
    first, second = pair()
    assert distance(first, first).tolist() == [0.0, 0.0]
    black = torch.full_like(first, -1.0).requires_grad_()
    distance(black, second).sum().backward()
    assert black.grad is not None
    assert bool(torch.isfinite(black.grad).all())


def test_its_weights_are_neither_trained_nor_saved(config: PerceptualConfig) -> None:
    distance = PerceptualDistance.from_files(config)
    assert list(distance.parameters()) == []
    assert distance.state_dict() == {}


def test_one_safetensors_file_may_hold_both(config: PerceptualConfig, tmp_path: Path) -> None:
    assert config.vgg16 is not None
    assert config.heads is not None
    both = torch.load(config.vgg16, weights_only=True) | torch.load(config.heads, weights_only=True)
    save_file(both, tmp_path / "lpips.safetensors")
    joined = replace(config, vgg16=tmp_path / "lpips.safetensors", heads=tmp_path / "lpips.safetensors")
    distances = [PerceptualDistance.from_files(each)(*pair()) for each in (config, joined)]
    assert torch.equal(*distances)


def test_a_weight_without_files_is_refused() -> None:
    assert PerceptualConfig().weight == 0
    with pytest.raises(ConfigError, match="vgg16 is not given"):
        PerceptualConfig(weight=1.0)
    with pytest.raises(ConfigError, match="heads is not given"):
        PerceptualConfig(weight=1.0, vgg16=Path("vgg16.pth"))
    with pytest.raises(ConfigError, match="weight=-1"):
        PerceptualConfig(weight=-1.0)


def test_files_that_do_not_fit_are_named(config: PerceptualConfig, tmp_path: Path) -> None:
    assert config.vgg16 is not None
    right = require_sha256(config.vgg16)
    PerceptualDistance.from_files(replace(config, vgg16_sha256=right))
    with pytest.raises(CheckpointError, match="sha256"):
        PerceptualDistance.from_files(replace(config, vgg16_sha256="0" * 64))
    with pytest.raises(CheckpointError, match="absent"):
        PerceptualDistance.from_files(replace(config, heads=tmp_path / "absent.pth"))
    with pytest.raises(CheckpointError, match="lack lin0"):
        PerceptualDistance.from_files(replace(config, heads=config.vgg16))
    weights = torch.load(config.vgg16, weights_only=True)
    torch.save(weights | {"features.5.weight": torch.zeros(6, 5, 3, 3)}, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"features.5.weight has shape \(6, 5, 3, 3\)"):
        PerceptualDistance.from_files(replace(config, vgg16=tmp_path / "wide.pth"))
