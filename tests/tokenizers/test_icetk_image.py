"""icetk's image tokenizer, from random files in its layout: codes and pixels at three compressions, kept to the bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cogview.errors import CheckpointError, ConfigError
from cogview.tokenizers.icetk_image import IcetkConfig, IcetkImageTokenizer, from_icetk, is_icetk
from cogview.tokenizers.residual_blocks import Decoder, Encoder
from cogview.tokenizers.stored import load_image_tokenizer
from pipelines.import_weights import Config, main
from tests.pipelines.job_runs import open_run

SMALL = IcetkConfig(channels=32, latent_channels=32, num_codes=50)
MEAN, STD = torch.tensor([0.79093, 0.76271, 0.75340]), torch.tensor([0.30379, 0.32279, 0.32800])


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random numbers under the names of `ice_image.pt`, the released file's buffers included."""
    torch.manual_seed(0)
    shapes = {
        f"{prefix}.{name}": tensor.shape
        for prefix, network in networks().items()
        for name, tensor in network.state_dict().items()
    }
    for number in range(2):
        shapes |= {
            f"down_samplers.{number}.conv_down_sampler.conv.weight": torch.Size((32, 32, 3, 3)),
            f"down_samplers.{number}.conv_down_sampler.conv.bias": torch.Size((32,)),
        }
    shapes |= {"quantize.proj.weight": torch.Size((32, 32, 1, 1)), "quantize.proj.bias": torch.Size((32,))}
    shapes |= {"quantize.embed.weight": torch.Size((50, 32)), "quantize.embed_avg": torch.Size((50, 32))}
    shapes |= {"quantize.cluster_size": torch.Size((50,))}
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def networks() -> dict[str, Encoder | Decoder]:
    """The encoder, and the decoders as the file counts them: the coarsest level's is decs.0, and it alone attends."""
    found: dict[str, Encoder | Decoder] = {"enc": Encoder(SMALL.pyramid(level=0, num_res_blocks=2))}
    for number, level in enumerate((2, 1, 0)):
        found[f"decs.{number}"] = Decoder(SMALL.pyramid(level=level, num_res_blocks=1), more_blocks=0)
    return found


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 1, 2])
def test_codes_and_pixels_are_those_of_the_files_own_arithmetic(weights: dict[str, Tensor], level: int) -> None:
    tokenizer, parts = from_icetk(weights, path=Path("ice_image.pt")), networks()
    for prefix, network in parts.items():
        network.load_state_dict(
            {name.removeprefix(f"{prefix}."): x for name, x in weights.items() if name.startswith(f"{prefix}.")}
        )
    images = torch.rand(2, 3, 32, 32)
    latent = parts["enc"]((images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    for number in range(level):
        name = f"down_samplers.{number}.conv_down_sampler.conv"
        strided = functional.conv2d(
            functional.pad(latent, (0, 1, 0, 1)), weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2
        )
        latent = functional.avg_pool2d(latent, 2) + strided
    vectors = functional.conv2d(latent, weights["quantize.proj.weight"], weights["quantize.proj.bias"])
    distances = torch.cdist(vectors.permute(0, 2, 3, 1).flatten(0, 2), weights["quantize.embed.weight"])
    codes = tokenizer.encode(images, level=level)
    side = 32 // (4 * 2**level)
    assert codes.shape == (2, side, side)
    assert torch.equal(codes.flatten(), distances.argmin(dim=1))
    mapped = weights["quantize.embed.weight"][codes].permute(0, 3, 1, 2)
    expected = parts[f"decs.{2 - level}"](mapped) * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)
    assert torch.allclose(tokenizer.decode(codes, level=level), expected.clamp(0, 1), atol=1e-5)


def test_the_released_sizes_are_the_default() -> None:
    config = IcetkConfig()
    assert config.strides == (4, 8, 16)
    assert config.pyramid(level=2, num_res_blocks=1).multipliers == (1, 1, 1, 2, 4)
    assert config.pyramid(level=2, num_res_blocks=1).attention_levels == (4,)
    assert config.pyramid(level=1, num_res_blocks=1).attention_levels == ()
    with torch.device("meta"):
        tokenizer = IcetkImageTokenizer(config)
    assert (tokenizer.stride, tokenizer.num_codes) == (8, 20_000)
    assert tokenizer.codebook.codebook_KD.shape == (20_000, 256)


def test_a_users_file_is_imported_and_loaded_again(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"module": weights}, tmp_path / "ice_image.pt")
    main(Config(image_tokenizer=tmp_path / "ice_image.pt"), open_run(tmp_path / "out"))
    loaded = load_image_tokenizer(tmp_path / "out" / "image_tokenizer")
    images = torch.rand(1, 3, 32, 32)
    direct = from_icetk(weights, path=tmp_path)
    assert isinstance(loaded, IcetkImageTokenizer)
    assert torch.equal(loaded.encode(images), direct.encode(images))
    assert loaded.encode(images[:0]).shape == (0, 4, 4)
    with pytest.raises(ConfigError, match="levels 0 to 2"):
        loaded.encode(images, level=3)


def test_what_does_not_fit_is_named(weights: dict[str, Tensor]) -> None:
    assert is_icetk(weights)
    assert not is_icetk({"quantize.embed.weight": weights["quantize.embed.weight"]})
    lacking = {name: x for name, x in weights.items() if name != "decs.1.conv_out.bias"}
    with pytest.raises(CheckpointError, match=r"decs\.1\.conv_out\.bias"):
        from_icetk(lacking, path=Path("ice_image.pt"))
    with pytest.raises(CheckpointError, match="its ice_image"):
        from_icetk({name: x for name, x in weights.items() if name != "enc.conv_in.weight"}, path=Path("a.pt"))
