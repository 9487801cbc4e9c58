"""A small real CogLM with random weights."""

from dataclasses import asdict
from pathlib import Path

import torch

from cogview.models.gpt import GPT, GPTConfig
from cogview.models.published import save_model
from cogview.sampling.coglm import TASK, CogLM
from cogview.sequences.coglm import CogLMLayout
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig

GRID, NUM_CODES = 4, 24
TEXTS = ("a red dot", "a blue dot on white", "红色圆点", "白色背景上的蓝色圆点", "dots, dots")


def small_coglm(folder: Path, *, attention: str = "fused", ends_text: bool = True) -> CogLM:
    config = TextTokenizerConfig(num_pieces=60, exact=False, split_chinese=True, is_bilingual=True)
    train_text_tokenizer(TEXTS, config=config, output=folder)
    text = TextTokenizer.load(folder)
    torch.manual_seed(0)
    image = ImageTokenizer(VQVAEConfig(widths=(4, 4), codebook=CodebookConfig(num_codes=NUM_CODES, code_dim=4))).eval()
    vocabulary = BilingualVocabulary(num_image_codes=image.num_codes, text=text.ranges)
    layout = CogLMLayout(grid=GRID, max_text=16, image_position=20)
    model = GPT(
        GPTConfig(
            vocab_size=vocabulary.size,
            max_positions=layout.num_positions,
            num_layers=2,
            hidden_size=16,
            num_heads=2,
            dropout=0.0,
            attention=attention,  # type: ignore[arg-type]
        )
    ).eval()
    with torch.no_grad():  # at its initialisation a model is nearly indifferent
        model.word_embeddings.weight.mul_(30)
        model.transformer.position_embeddings.weight.mul_(30)
    return CogLM(
        model=model,
        text_tokenizer=text,
        image_tokenizer=image,
        vocabulary=vocabulary,
        layout=layout,
        ends_text=ends_text,
    )


def some_codes(number: int) -> torch.Tensor:
    return torch.randint(NUM_CODES, (number, GRID, GRID), generator=torch.Generator().manual_seed(1))


def write_small_coglm(root: Path) -> None:
    """The same as published folders: `text`, `image` and `checkpoint` below root."""
    coglm = small_coglm(root / "text")
    coglm.image_tokenizer.save(root / "image")
    fingerprints = {
        "text_tokenizer": coglm.text_tokenizer.fingerprint,
        "image_tokenizer": coglm.image_tokenizer.fingerprint,
        "vocabulary": coglm.vocabulary.fingerprint,
    }
    settings = {"task": TASK, "fingerprints": fingerprints, "grid": GRID, "layout": asdict(coglm.layout)}
    save_model(coglm.model, root / "checkpoint", settings={**settings, "ends_text": coglm.ends_text})
