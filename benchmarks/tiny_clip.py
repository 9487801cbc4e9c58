"""A folder of CLIP as transformers saves it, small and untrained, and true in every file."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cogview.evaluation.clip_network import ClipNetwork
from cogview.evaluation.clip_text import END, START

MERGES = (("c", "a"), ("ca", "t</w>"), ("d", "o"), ("t", "h"), ("th", "e</w>"))
LENGTH = 12
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SHARED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def clip_vocabulary() -> dict[str, int]:
    """As CLIP's: a letter for each byte, the same at the end of a word, then the merges, then start and end."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain] + [chr(256 + place) for place in range(256 - len(plain))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, MERGES), START, END]
    return {piece: number for number, piece in enumerate(pieces)}


def write_clip(folder: Path) -> Path:
    """Write such a folder; returns it."""
    vocabulary = clip_vocabulary()
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n")
    text = {**TEXT, "vocab_size": len(vocabulary), "eos_token_id": vocabulary[END]}
    config = {"model_type": "clip", "text_config": text, "vision_config": VISION, "projection_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    network = ClipNetwork({**text, **SHARED}, {**VISION, **SHARED}, projection=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file({**state, "logit_scale": torch.tensor(2.66)}, folder / "model.safetensors")
    return folder
