"""The multi-scale tokenizer: one encoder and one codebook for 4x, 8x and 16x smaller codes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogview.errors import ConfigError, VocabularyError
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.multiscale import MultiScaleConfig, MultiScaleObjective, MultiScaleTokenizer, MultiScaleTraining
from cogview.tokenizers.residual_blocks import PyramidConfig

SMALL = MultiScaleConfig(
    pyramid=PyramidConfig(channels=8, multipliers=(1, 1, 2, 2, 2), num_res_blocks=1, latent_channels=8, norm_groups=1),
    codebook=CodebookConfig(num_codes=32, code_dim=8),
)


@pytest.fixture
def tokenizer() -> MultiScaleTokenizer:
    torch.manual_seed(0)
    return MultiScaleTokenizer(SMALL).eval()


def test_the_default_is_cogview2s_codebook_and_compressions() -> None:
    config = MultiScaleConfig()
    assert config.strides == (4, 8, 16)
    assert (config.codebook.num_codes, config.codebook.code_dim) == (20_000, 256)
    assert config.strides[config.main_level] == 8  # 160 pixels are 20 x 20 codes, 480 are 60 x 60


@pytest.mark.parametrize("level", [0, 1, 2])
def test_each_level_has_its_size_and_its_decoder(tokenizer: MultiScaleTokenizer, level: int) -> None:
    stride = 4 * 2**level
    images = torch.rand(2, 3, 2 * stride, 3 * stride)
    codes = tokenizer.encode(images, level=level)
    assert codes.shape == (2, 2, 3)
    assert tokenizer.decode(codes, level=level).shape == images.shape
    assert tokenizer.encode(images[:0], level=level).shape == (0, 2, 3)


def test_without_a_level_the_main_one_is_used(tokenizer: MultiScaleTokenizer) -> None:
    images = torch.rand(2, 3, 24, 24)
    codes = tokenizer.encode(images)
    assert tokenizer.stride == 8
    assert torch.equal(codes, tokenizer.encode(images, level=1))
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(codes, level=1))


def test_training_and_encoding_see_the_same_codes(tokenizer: MultiScaleTokenizer) -> None:
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        decoded, quantized = tokenizer(images)
    assert quantized.codes_N.shape == (2 * (64 + 16 + 4),)
    for level, decoded_BCHW in enumerate(decoded):
        again = tokenizer.decode(tokenizer.encode(images, level=level), level=level)
        assert torch.allclose(again, decoded_BCHW.clamp(0, 1), atol=1e-5)


def test_bad_input_is_named(tokenizer: MultiScaleTokenizer) -> None:
    with pytest.raises(ConfigError, match="multiples of 16"):
        tokenizer.encode(torch.rand(1, 3, 24, 24), level=2)
    with pytest.raises(ConfigError, match="levels 0 to 2"):
        tokenizer.encode(torch.rand(1, 3, 32, 32), level=3)
    with pytest.raises(ConfigError, match="levels 0 to 2"):
        tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.long), level=-1)
    with pytest.raises(VocabularyError, match="codebook of 32"):
        tokenizer.decode(torch.full((1, 2, 2), 40))
    with pytest.raises(ConfigError, match="num_levels=5"):
        replace(SMALL, num_levels=5)
    with pytest.raises(ConfigError, match="main_level=3"):
        replace(SMALL, main_level=3)


def test_saving_and_loading_keeps_every_level(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    fingerprint = tokenizer.save(tmp_path)
    loaded = MultiScaleTokenizer.load(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert (loaded.fingerprint, loaded.config) == (fingerprint, SMALL)
    for level in range(3):
        assert torch.equal(loaded.encode(images, level=level), tokenizer.encode(images, level=level))


def test_every_level_learns() -> None:
    torch.manual_seed(0)
    config = replace(
        SMALL,
        pyramid=replace(SMALL.pyramid, multipliers=(1, 1, 1, 1), attention_levels=()),
        codebook=replace(SMALL.codebook, start_after=10, decay=0.9, revive_below=0.3),
        commitment_weight=1.0,
    )
    objective = MultiScaleObjective(MultiScaleTraining(tokenizer=config, num_scales=1)).train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    images = torch.rand(8, 3, 2, 2).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    history = []
    for _ in range(45):
        loss = objective(images)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        history.append(loss.parts)
    unused = [name for name, parameter in objective.named_parameters() if parameter.grad is None]
    assert unused == []  # data-parallel training waits for every one
    for stride in (2, 4, 8):
        assert history[-1][f"l1_{stride}x"] < 0.75 * history[0][f"l1_{stride}x"]


def test_pictures_too_small_for_the_similarity_are_named() -> None:
    objective = MultiScaleObjective(MultiScaleTraining(tokenizer=SMALL))
    with pytest.raises(ConfigError, match="need sides of 161"):
        objective(torch.rand(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="num_scales=6"):
        MultiScaleTraining(num_scales=6)
