"""A small real captioner with random weights, and codes for it."""

from pathlib import Path

import torch

from cogview.models.gpt import GPT, GPTConfig
from cogview.sampling.captioning import Captioner
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig

GRID = 2
TEXTS = ("a red dot", "a blue dot", "红色圆点", "蓝色圆点", "dots, dots")


def small_captioner(
    folder: Path, *, max_text: int, has_end: bool = True, is_image_fixed: bool = False, seed: int = 0
) -> Captioner:
    train_text_tokenizer(TEXTS, config=TextTokenizerConfig(num_pieces=30, exact=False), output=folder)
    text = TextTokenizer.load(folder)
    torch.manual_seed(seed)
    image = ImageTokenizer(VQVAEConfig(widths=(4, 4), codebook=CodebookConfig(num_codes=16, code_dim=4))).eval()
    vocabulary = Vocabulary(image.num_codes, text.num_pieces)
    config = GPTConfig(
        vocab_size=vocabulary.size, max_positions=40, num_layers=2, hidden_size=16, num_heads=2, dropout=0.0
    )
    model = GPT(config).eval()
    with torch.no_grad():  # at its initialisation a model is nearly indifferent
        model.word_embeddings.weight.mul_(20)
    return Captioner(
        model=model,
        text_tokenizer=text,
        image_tokenizer=image,
        vocabulary=vocabulary,
        grid=GRID,
        max_text=max_text,
        text_budget=12,
        has_end=has_end,
        is_image_fixed=is_image_fixed,
    )


def some_codes(number: int) -> torch.Tensor:
    return torch.randint(16, (number, GRID, GRID), generator=torch.Generator().manual_seed(1))
