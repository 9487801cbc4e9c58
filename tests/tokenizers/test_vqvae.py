"""The image tokenizer: the paper's shapes, codes and pixels back, and clear errors for what cannot be encoded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.tokenizers.codebook import RULES, CodebookConfig, Rule
from cogview.tokenizers.tokenizer_files import SETTINGS_NAME, WEIGHTS_NAME
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig

SMALL = VQVAEConfig(widths=(8, 12, 16), codebook=CodebookConfig(num_codes=32, code_dim=8, start_after=5, decay=0.9))


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(SMALL).eval()


def test_the_papers_network_has_the_released_number_of_weights() -> None:
    with torch.device("meta"):
        released = ImageTokenizer(VQVAEConfig())
    encoder = sum(parameter.numel() for parameter in released.encoder.parameters())
    decoder = sum(parameter.numel() for parameter in released.decoder.parameters())
    assert (encoder, decoder) == (8_546_048, 10_488_835)
    assert released.codebook.codebook_KD.numel() == 8192 * 256
    assert released.stride == 8


def test_training_learns_to_draw_flat_pictures() -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SMALL).train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    images = torch.rand(16, 3, 1, 1).expand(16, 3, 32, 32).contiguous()
    losses = []
    for _ in range(300):
        loss = tokenizer(images)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.mse.item())
    assert losses[-1] < losses[0] / 5
    decoded = tokenizer.eval().decode(tokenizer.encode(images))
    error = (decoded - images).abs().mean()
    assert error < 0.1


def test_any_batch_and_any_multiple_of_the_stride_can_be_encoded(tokenizer: ImageTokenizer) -> None:
    for batch, height, width in ((1, 8, 8), (3, 16, 40), (0, 24, 24)):
        codes = tokenizer.encode(torch.rand(batch, 3, height, width))
        assert codes.shape == (batch, height // 8, width // 8)
        assert tokenizer.decode(codes).shape == (batch, 3, height, width)


def test_a_picture_has_the_same_codes_in_any_batch(tokenizer: ImageTokenizer) -> None:
    images = torch.rand(5, 3, 32, 32)
    together = tokenizer.encode(images)
    assert all(torch.equal(together[i], tokenizer.encode(images[i : i + 1])[0]) for i in range(5))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 3, 20, 16), "multiples of 8"),
        (torch.rand(1, 3, 0, 0), "multiples of 8"),
        (torch.rand(1, 1, 16, 16), r"\[batch, 3, height, width\]"),
        (torch.full((1, 3, 16, 16), float("nan")), "NaN"),
        (torch.full((1, 3, 16, 16), float("-inf")), "infinite"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"torch.uint8: give floats in \[0, 1\]"),
    ],
)
def test_what_cannot_be_encoded_is_named(tokenizer: ImageTokenizer, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenizer.encode(images)


def test_codes_of_another_codebook_are_refused(tokenizer: ImageTokenizer) -> None:
    for code in (32, -1):
        with pytest.raises(VocabularyError, match="codebook of 32"):
            tokenizer.decode(torch.full((1, 2, 2), code))
    for codes in (torch.zeros(4, dtype=torch.long), torch.zeros(1, 2, 2)):
        with pytest.raises(ConfigError, match="batch, height, width"):
            tokenizer.decode(codes)
    with pytest.raises(VocabularyError, match="from 0 to 700"):  # as shards hold them
        tokenizer.decode(torch.tensor([[[0, 700]]], dtype=torch.uint16).to(torch.int32))


def test_saving_and_loading_keeps_every_code(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    fingerprint = tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    images = torch.rand(4, 3, 32, 32)
    assert loaded.fingerprint == fingerprint
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_saves_and_loads(rule: Rule, tmp_path: Path) -> None:
    torch.manual_seed(0)
    codebook = replace(SMALL.codebook, rule=rule, start_after=1, gumbel_hard=False, kl_weight=0.1)
    tokenizer = ImageTokenizer(replace(SMALL, codebook=codebook)).train()
    images = torch.rand(4, 3, 32, 32)
    for _ in range(3):
        loss = tokenizer(images)
        loss.total.backward()
    assert loss.total > 0
    assert loss.commitment > 0
    assert ("temperature" in loss.parts) == (rule == "gumbel")
    tokenizer.eval().save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.config.codebook.rule == rule
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    settings = json.loads((tmp_path / SETTINGS_NAME).read_text())["config"]["codebook"]
    assert CodebookConfig(**settings) == loaded.config.codebook
    assert ("kl_weight" in settings) == (rule == "gumbel")


def test_settings_of_before_there_were_rules_mean_the_moving_average(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / SETTINGS_NAME).read_text())["config"]["codebook"]
    of_before = {"code_dim", "decay", "epsilon", "num_codes", "revive_below", "revive_every", "start_after"}
    assert settings.keys() == of_before
    assert ImageTokenizer.load(tmp_path).config.codebook.rule == "moving_average"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_16_bits_take_and_give_pixels_of_32(tokenizer: ImageTokenizer, dtype: torch.dtype) -> None:
    images = torch.rand(4, 3, 32, 32)
    in_fp32 = tokenizer.encode(images)
    tokenizer.encoder.to(dtype)
    tokenizer.decoder.to(dtype)
    codes = tokenizer.encode(images)
    assert (codes == in_fp32).float().mean() > 0.8
    assert tokenizer.decode(codes).dtype == torch.float32
    loss = tokenizer.train()(images.to(dtype))
    loss.total.backward()
    assert loss.total.dtype == torch.float32


def _change_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / SETTINGS_NAME).read_text())
    settings["config"]["codebook"].update(changes)
    (folder / SETTINGS_NAME).write_text(json.dumps(settings))


def test_a_codebook_of_another_size_than_the_settings_is_refused(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    for changes in ({"code_dim": 16}, {"num_codes": 64}):
        tokenizer.save(tmp_path)
        _change_settings(tmp_path, **changes)
        with pytest.raises(CheckpointError, match="does not fit its settings"):
            ImageTokenizer.load(tmp_path)


def test_settings_that_cannot_be_read_are_named(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    _change_settings(tmp_path, colour="red")
    with pytest.raises(CheckpointError, match="colour"):
        ImageTokenizer.load(tmp_path)
    for text in ("{}", "[1]"):
        (tmp_path / SETTINGS_NAME).write_text(text)
        with pytest.raises(CheckpointError, match="not the settings of an image tokenizer"):
            ImageTokenizer.load(tmp_path)
    (tmp_path / SETTINGS_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="no image tokenizer"):
        ImageTokenizer.load(tmp_path)


def test_weights_of_nan_are_refused(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    with torch.no_grad():
        tokenizer.encoder[0].weight[0, 0, 0, 0] = float("nan")
    tokenizer.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"encoder\.0\.weight"):
        ImageTokenizer.load(tmp_path)


def test_a_flipped_bit_or_a_missing_file_is_named(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    data = bytearray((tmp_path / WEIGHTS_NAME).read_bytes())
    data[-5] ^= 4
    (tmp_path / WEIGHTS_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        ImageTokenizer.load(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="no image tokenizer"):
        ImageTokenizer.load(tmp_path)
