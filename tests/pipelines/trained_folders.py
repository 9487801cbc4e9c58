"""The finished folders that generate and evaluate read, written by the code that writes them in earnest.

The model and the image tokenizer are small and untrained: what they draw is noise, but every file is real.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cogview.evaluation.grids import from_pictures
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.published import save_model
from cogview.scenes.scene import corpus, draw_scene
from cogview.shards.manifest import ShardEntry, shard_name, write_manifest
from cogview.shards.schema import TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig

GRID = 4  # 32 pixels / 8
LENGTH = 64
ROWS = {"train": 6, "validation": 10}


@dataclass(frozen=True, kw_only=True)
class TrainedFolders:
    """Where everything lies; the fields have the names of the jobs' input fields."""

    checkpoint: Path
    text_tokenizer: Path
    image_tokenizer: Path
    tokens: Path


def write_trained_folders(root: Path, *, seed: int = 0, is_bilingual: bool = False) -> TrainedFolders:
    folders = TrainedFolders(
        checkpoint=root / "checkpoint",
        text_tokenizer=root / "text",
        image_tokenizer=root / "image",
        tokens=root / "tokens",
    )
    scenes = list(corpus(seed, 60))
    captions = [caption for scene in scenes for caption in (scene.english, scene.chinese)]
    train_text_tokenizer(
        captions,
        config=TextTokenizerConfig(num_pieces=200, exact=False, is_bilingual=is_bilingual),
        output=folders.text_tokenizer,
    )
    torch.manual_seed(seed)
    codebook = CodebookConfig(num_codes=32, code_dim=8)
    image = ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=codebook)).eval()
    image.save(folders.image_tokenizer)
    text = TextTokenizer.load(folders.text_tokenizer)
    vocabulary = Vocabulary(image.num_codes, text.num_pieces)
    fingerprints = {
        "text_tokenizer": text.fingerprint,
        "image_tokenizer": image.fingerprint,
        "vocabulary": vocabulary.fingerprint,
    }
    _write_model(folders.checkpoint, vocabulary, fingerprints)
    origin = TokenOrigin(**fingerprints, num_image_codes=image.num_codes, num_text_pieces=text.num_pieces, grid=GRID)
    _write_tokens(folders.tokens, [scene[1:] for scene in scenes], text, image, origin)
    return folders


def _write_model(folder: Path, vocabulary: Vocabulary, fingerprints: dict[str, str]) -> None:
    config = GPTConfig(
        vocab_size=vocabulary.size, max_positions=LENGTH, num_layers=2, hidden_size=32, num_heads=2, dropout=0.0
    )
    model = GPT(config)
    # At its initialisation a model is nearly indifferent; a sharper one makes different captions draw different codes.
    with torch.no_grad():
        model.word_embeddings.weight.mul_(30)
    save_model(model, folder, settings={"fingerprints": fingerprints, "grid": GRID, "length": LENGTH})
    lines = [{"step": step, "image_loss": 3.0 / step, "text_loss": 4.0 / step} for step in range(1, 6)]
    lines.append({"step": 5, "validation_image_loss": 0.9, "validation_text_loss": 1.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "im')


def _write_tokens(folder: Path, scenes: list, text: TextTokenizer, image: ImageTokenizer, origin: TokenOrigin) -> None:
    rows: dict[str, list[TokenRow]] = {split: [] for split in ROWS}
    remaining = iter(scenes)
    for split, count in ROWS.items():
        for number in range(count):
            scene, *captions = next(remaining)
            codes = image.encode(from_pictures([draw_scene(scene, image_size=8 * GRID)])).flatten()
            rows[split] += [
                TokenRow(
                    key=f"{split}{number}",
                    text=caption,
                    text_ids=np.array(text.encode(caption), np.int32),
                    image_codes=codes.numpy().astype(np.uint16),
                    source="https://example.org/",
                )
                for caption in captions
            ]
    names = {split: f"{split}/{shard_name(0, 'arrow')}" for split in ROWS}
    files = {names[split]: write_token_shard(folder / names[split], rows[split], origin=origin) for split in ROWS}
    entry = ShardEntry(shard=0, rows_in=sum(ROWS.values()), rows_out=sum(ROWS.values()), files=files)
    extra = {**asdict(origin), **{f"rows_{split}": len(split_rows) for split, split_rows in rows.items()}}
    write_manifest(folder, [entry], extra=extra)
