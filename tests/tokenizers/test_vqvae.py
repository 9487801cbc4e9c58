"""The image tokenizer: the paper's shapes, codes and pixels back, and clear errors for what cannot be encoded."""

from pathlib import Path

import pytest
import torch

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.vqvae import WEIGHTS_NAME, ImageTokenizer, VQVAEConfig

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
    ],
)
def test_what_cannot_be_encoded_is_named(tokenizer: ImageTokenizer, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenizer.encode(images)


def test_codes_of_another_codebook_are_refused(tokenizer: ImageTokenizer) -> None:
    with pytest.raises(VocabularyError, match="codebook of 32"):
        tokenizer.decode(torch.full((1, 2, 2), 32))
    with pytest.raises(ConfigError, match="batch, height, width"):
        tokenizer.decode(torch.zeros(4, dtype=torch.long))


def test_saving_and_loading_keeps_every_code(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    fingerprint = tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    images = torch.rand(4, 3, 32, 32)
    assert loaded.fingerprint == fingerprint
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))


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
