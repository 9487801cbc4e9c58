"""Reconstructions and their PSNR, with a small untrained tokenizer."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.evaluation.grids import from_pictures
from cogview.evaluation.reconstruction import mean_psnr, psnr, reconstruct
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=16, code_dim=4))).eval()


def noise(count, *, size=16):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def test_reconstructions_are_what_the_tokenizer_decodes(tokenizer):
    pictures = noise(5)
    decoded = reconstruct(pictures, tokenizer=tokenizer, batch_size=2)
    expected_BCHW = tokenizer.decode(tokenizer.encode(from_pictures(pictures)))
    assert len(decoded) == 5
    assert torch.allclose(from_pictures(decoded), expected_BCHW, atol=0.51 / 255)


def test_no_pictures_have_no_reconstructions(tokenizer):
    assert reconstruct([], tokenizer=tokenizer) == []


def test_psnr_is_that_of_a_known_error():
    originals_BCHW = torch.full((2, 3, 4, 4), 0.5)
    images_BCHW = originals_BCHW + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(images_BCHW, originals_BCHW).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_equal_images_count_as_100_db():
    pictures = noise(2)
    assert mean_psnr(pictures, originals=pictures) == pytest.approx(100.0)
