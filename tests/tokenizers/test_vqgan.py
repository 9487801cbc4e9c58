"""The VQGAN: 16x smaller codes, pixels back, and clear errors for what cannot be encoded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.residual_blocks import PyramidConfig
from cogview.tokenizers.tokenizer_files import SETTINGS_NAME, WEIGHTS_NAME
from cogview.tokenizers.vqgan import VQGANConfig, VQGANTokenizer

PYRAMID = PyramidConfig(
    channels=8, multipliers=(1, 1, 2, 2, 2), num_res_blocks=1, attention_levels=(4,), latent_channels=12, norm_groups=4
)
SMALL = VQGANConfig(pyramid=PYRAMID, codebook=CodebookConfig(num_codes=32, code_dim=8))


@pytest.fixture
def tokenizer() -> VQGANTokenizer:
    torch.manual_seed(0)
    return VQGANTokenizer(SMALL).eval()


def test_the_default_makes_50_by_50_codes_of_800_pixels() -> None:
    assert VQGANConfig().stride == 16
    assert 800 // VQGANConfig().stride == 50


def test_any_batch_and_any_multiple_of_the_stride_can_be_encoded(tokenizer: VQGANTokenizer) -> None:
    for batch, height, width in ((1, 16, 16), (3, 32, 80), (0, 48, 48)):
        codes = tokenizer.encode(torch.rand(batch, 3, height, width))
        assert codes.shape == (batch, height // 16, width // 16)
        decoded = tokenizer.decode(codes)
        assert decoded.shape == (batch, 3, height, width)
        assert bool(((decoded >= 0) & (decoded <= 1)).all())


def test_a_picture_has_the_same_codes_in_any_batch(tokenizer: VQGANTokenizer) -> None:
    images = torch.rand(4, 3, 32, 32)
    together = tokenizer.encode(images)
    assert all(torch.equal(together[i], tokenizer.encode(images[i : i + 1])[0]) for i in range(4))


def test_the_networks_see_pixels_from_minus_one_to_one(tokenizer: VQGANTokenizer) -> None:
    autoencoded = tokenizer(torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]))
    assert autoencoded.pixels_BCHW.flatten(1).mean(1).tolist() == [-1.0, 1.0]


def test_codes_decode_to_what_training_saw(tokenizer: VQGANTokenizer) -> None:
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        autoencoded = tokenizer(images)
    expected = tokenizer.pixels.restored(autoencoded.decoded_BCHW)
    assert torch.allclose(tokenizer.decode(tokenizer.encode(images)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_encode_and_decode(tokenizer: VQGANTokenizer, dtype: torch.dtype) -> None:
    for parameter in tokenizer.parameters():
        parameter.data = parameter.data.to(dtype)
    decoded = tokenizer.decode(tokenizer.encode(torch.rand(2, 3, 32, 32)))
    assert decoded.dtype == torch.float32
    assert bool(torch.isfinite(decoded).all())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 3, 24, 16), "multiples of 16"),
        (torch.rand(1, 3, 0, 0), "multiples of 16"),
        (torch.rand(1, 1, 16, 16), r"\[batch, 3, height, width\]"),
        (torch.full((1, 3, 16, 16), float("nan")), "NaN"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "give floats"),
    ],
)
def test_what_cannot_be_encoded_is_named(tokenizer: VQGANTokenizer, images: torch.Tensor, message: str) -> None:
    for use in (tokenizer.encode, tokenizer):
        with pytest.raises(ConfigError, match=message):
            use(images)


def test_codes_of_another_codebook_are_refused(tokenizer: VQGANTokenizer) -> None:
    with pytest.raises(VocabularyError, match="codebook of 32"):
        tokenizer.decode(torch.full((1, 2, 2), 32))
    with pytest.raises(ConfigError, match="batch, height, width"):
        tokenizer.decode(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ConfigError, match="give integers"):
        tokenizer.decode(torch.zeros(1, 2, 2))


def test_saving_and_loading_keeps_every_code(tokenizer: VQGANTokenizer, tmp_path: Path) -> None:
    fingerprint = tokenizer.save(tmp_path)
    loaded = VQGANTokenizer.load(tmp_path)
    images = torch.rand(4, 3, 32, 32)
    assert loaded.fingerprint == fingerprint
    assert loaded.config == SMALL
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))


def test_damaged_folders_are_named(tokenizer: VQGANTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    sound = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(sound[:-5] + bytes([sound[-5] ^ 4]) + sound[-4:])
    with pytest.raises(CheckpointError, match="damaged"):
        VQGANTokenizer.load(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(sound)
    settings = json.loads((tmp_path / SETTINGS_NAME).read_text())
    del settings["config"]["pyramid"]
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="another version"):
        VQGANTokenizer.load(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="no image tokenizer"):
        VQGANTokenizer.load(tmp_path)


def test_weights_that_are_not_finite_are_not_loaded(tokenizer: VQGANTokenizer, tmp_path: Path) -> None:
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias[0] = float("nan")
    tokenizer.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias"):
        VQGANTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multipliers": ()}, "multipliers"),
        ({"norm_groups": 3}, "norm_groups=3"),
        ({"attention_levels": (5,)}, "levels are 0 to 4"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
    ],
)
def test_networks_that_cannot_be_built_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PYRAMID, **change)
