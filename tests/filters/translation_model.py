"""A tiny model that CTranslate2 runs: a transformer whose weights are set by hand to translate word by word.

Positions and words have dimensions of their own. The decoder's attention finds the source word at its own position, and
what it takes from there is the word's translation.
"""

import io
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import sentencepiece

WORDS = {"a": "一只", "red": "红色的", "black": "黑色的", "dog": "狗", "cat": "猫"}
LONGEST = 24
SPECIALS = ("<unk>", "<s>", "</s>")
SHARPNESS = 60.0


def write_translation_model(folder: Path) -> Path:
    """Write the model and its SentencePiece models."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = [f"▁{word}" for word in WORDS], [f"▁{word}" for word in WORDS.values()]
    for name, pieces in (("source", source), ("target", target)):
        (folder / f"{name}.spm").write_bytes(_word_pieces(pieces))
    spec = _spec(len(SPECIALS) + len(WORDS))
    spec.register_source_vocabulary([*SPECIALS, *source])
    spec.register_target_vocabulary([*SPECIALS, *target])
    spec.config.add_source_eos = True
    spec.validate()
    spec.optimize(quantization=None)
    spec.save(str(folder))
    return folder


def _spec(words: int) -> Any:
    """Dimensions: words of the source, words of the target, positions."""
    size = 2 * words + LONGEST
    of_source, of_target, of_place = np.arange(words), words + np.arange(words), 2 * words + np.arange(LONGEST)
    spec = ctranslate2.specs.TransformerSpec.from_config(1, 1, pre_norm=True)
    places = np.zeros((LONGEST, size), np.float32)
    places[np.arange(LONGEST), of_place] = 1
    embeddings, projection = np.zeros((2, words, size), np.float32)
    embeddings[np.arange(words), of_source] = 1 / np.sqrt(size)
    projection[np.arange(words), of_target] = SHARPNESS
    query, key, value, out = np.zeros((4, size, size), np.float32)
    query[of_place, of_place] = SHARPNESS
    key[of_place, of_place] = 1
    value[of_target, of_source] = 1
    out[np.arange(size), np.arange(size)] = 1
    encoder, decoder = spec.encoder, spec.decoder
    encoder.embeddings[0].weight, decoder.embeddings.weight = embeddings, np.zeros_like(embeddings)
    encoder.position_encodings.encodings = decoder.position_encodings.encodings = places
    decoder.projection.weight = projection
    for layer in (encoder.layer[0], decoder.layer[0]):
        _silence(layer, size)
    attention = decoder.layer[0].attention
    attention.linear[0].weight, attention.linear[2].weight = query, out
    attention.linear[1].weight = np.concatenate([key, value])
    for norm in (attention.layer_norm, encoder.layer_norm, decoder.layer_norm):
        _set_norm(norm, size)
    return spec


def _silence(layer: Any, size: int) -> None:
    """Self-attention and feed-forward that add nothing."""
    layer.self_attention.linear[0].weight = np.zeros((3 * size, size), np.float32)
    layer.self_attention.linear[1].weight = np.zeros((size, size), np.float32)
    layer.ffn.linear_0.weight = np.zeros((4, size), np.float32)
    layer.ffn.linear_1.weight = np.zeros((size, 4), np.float32)
    for norm in (layer.self_attention.layer_norm, layer.ffn.layer_norm):
        _set_norm(norm, size)


def _set_norm(norm: Any, size: int) -> None:
    norm.gamma, norm.beta = np.ones(size, np.float32), np.zeros(size, np.float32)


def _word_pieces(pieces: list[str]) -> bytes:
    buffer = io.BytesIO()
    words = [piece.removeprefix("▁") for piece in pieces]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 3),
        model_writer=buffer,
        model_type="word",
        vocab_size=len(words) + len(SPECIALS),
        minloglevel=2,
    )
    return buffer.getvalue()
