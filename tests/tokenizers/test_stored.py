"""Any image tokenizer from its folder."""

import json
from pathlib import Path

import pytest
import torch

from cogview.errors import CheckpointError
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.dvae import DVAEConfig, DVAETokenizer
from cogview.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from cogview.tokenizers.residual_blocks import PyramidConfig
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.tokenizer_files import SETTINGS_NAME
from cogview.tokenizers.vqgan import VQGANConfig, VQGANTokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig

PYRAMID = PyramidConfig(
    channels=4, multipliers=(1, 1, 1), num_res_blocks=1, attention_levels=(), latent_channels=4, norm_groups=2
)
CODEBOOK = CodebookConfig(num_codes=16, code_dim=4)
DVAE = DVAEConfig(num_codes=16, width=8, code_channels=4, blocks_per_group=1)


def tokenizers() -> list[AnyImageTokenizer]:
    return [
        ImageTokenizer(VQVAEConfig(widths=(4, 4), codebook=CODEBOOK)),
        VQGANTokenizer(VQGANConfig(pyramid=PYRAMID, codebook=CODEBOOK)),
        MultiScaleTokenizer(MultiScaleConfig(pyramid=PYRAMID, codebook=CODEBOOK, num_levels=2, main_level=0)),
    ]


@pytest.mark.parametrize("index", [0, 1, 2], ids=["vqvae", "vqgan", "multiscale"])
def test_a_folder_gives_back_the_kind_that_was_saved(tmp_path: Path, index: int) -> None:
    saved = tokenizers()[index].eval()
    fingerprint = saved.save(tmp_path)
    loaded = load_image_tokenizer(tmp_path)
    assert type(loaded) is type(saved)
    assert (loaded.fingerprint, loaded.num_codes, loaded.stride) == (fingerprint, 16, saved.stride)
    images = torch.rand(2, 3, 16, 16)
    codes = saved.encode(images)
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.decode(codes), saved.decode(codes))


@pytest.mark.parametrize(
    "tokenizer", [*tokenizers(), DVAETokenizer(DVAE)], ids=["vqvae", "vqgan", "multiscale", "dvae"]
)
def test_settings_of_another_version_are_named(tmp_path: Path, tokenizer: AnyImageTokenizer) -> None:
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / SETTINGS_NAME).read_text())
    settings["config"]["hologram"] = 1
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="is damaged, or of another version"):
        load_image_tokenizer(tmp_path)


def test_folders_without_a_known_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no image tokenizer"):
        load_image_tokenizer(tmp_path)
    tokenizers()[1].save(tmp_path)
    settings = json.loads((tmp_path / SETTINGS_NAME).read_text())
    with pytest.raises(CheckpointError, match="kind 'vqgan', not 'multiscale'"):
        MultiScaleTokenizer.load(tmp_path)
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(settings | {"kind": "hologram"}))
    with pytest.raises(CheckpointError, match="kind 'hologram'; known are dvae, icetk, multiscale, vqgan, vqvae"):
        load_image_tokenizer(tmp_path)
    (tmp_path / SETTINGS_NAME).write_text("[]")
    with pytest.raises(CheckpointError, match="not the settings"):
        load_image_tokenizer(tmp_path)
