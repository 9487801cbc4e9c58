"""CLIP (Radford et al., 2021), read from a folder as transformers saves it: how well do picture and caption agree?

In: pictures and captions. Out: the CLIP score of each pair, 100 times the cosine of the two embeddings, at least 0. The
folder has `config.json`, the weights (`model.safetensors` or `pytorch_model.bin`), `vocab.json` and `merges.txt`.
"""

# B batch, L sequence, E hidden, H heads, D head size, P embedding of both, C channels, S side

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from cogview.errors import CheckpointError
from cogview.evaluation.clip_text import ClipText
from cogview.weight_files import check_layout, read_weights, require_sha256

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# What transformers leaves out of config.json where it is the value of the first published model.
TEXT_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
SHARED_DEFAULTS: Mapping[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
    "gelu": functional.gelu,
}
NOT_WEIGHTS = ("position_ids", "logit_scale")


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The sizes of one of the two transformers."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


class ClipScorer:
    """CLIP with its tokenizer. name, sha256: of its folder and its weights."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """CheckpointError for a folder that holds no sound CLIP."""
        path = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
        if path is None:
            raise CheckpointError(
                f"{folder} has no {' or '.join(WEIGHT_NAMES)}; give a folder of CLIP as transformers saves it"
            )
        text, vision, projection = _read_config(folder / "config.json")
        self.name, self.sha256 = folder.resolve().name, require_sha256(path)
        self._network = ClipNetwork(text, vision, projection=projection)
        found = {name: tensor.float() for name, tensor in read_weights(path).items() if not name.endswith(NOT_WEIGHTS)}
        wanted = {name: tuple(tensor.shape) for name, tensor in self._network.state_dict().items()}
        check_layout(found, wanted=wanted, path=path, layout="CLIP as transformers saves it")
        self._network.load_state_dict(found)
        self._network.to(device).eval().requires_grad_(False)
        self._text = ClipText.load(folder, length=int(text["max_position_embeddings"]))
        self._side, self._device = int(vision["image_size"]), device

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """The score of each pair of a square picture and a caption."""
        images_BP = functional.normalize(self._network.see(self.pixels(pictures)), dim=-1)
        texts_BP = functional.normalize(self._network.read(self._text(captions).to(self._device)), dim=-1)
        return [float(score) for score in (100 * (images_BP * texts_BP).sum(dim=-1)).clamp_min(0)]

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Square pictures as the network takes them, float32 [B, 3, S, S]: Pillow's bicubic, then its own range."""
        size = (self._side, self._side)
        resized = [picture.convert("RGB").resize(size, Image.Resampling.BICUBIC) for picture in pictures]
        pixels_BCSS = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        return ((pixels_BCSS.float() / 255 - mean) / std).to(self._device)


class ClipNetwork(nn.Module):
    """Both towers and their projections, with the names of the weight file."""

    def __init__(self, text: Mapping[str, Any], vision: Mapping[str, Any], *, projection: int) -> None:
        """Random weights."""
        super().__init__()
        self.text_model = _TextTower(
            _tower(text), vocabulary=text["vocab_size"], length=text["max_position_embeddings"]
        )
        self.vision_model = _VisionTower(_tower(vision), side=vision["image_size"], patch=vision["patch_size"])
        self.text_projection = nn.Linear(text["hidden_size"], projection, bias=False)
        self.visual_projection = nn.Linear(vision["hidden_size"], projection, bias=False)

    def read(self, ids_BL: Tensor) -> Tensor:
        """Embeddings [B, P] of captions."""
        embedded_BP: Tensor = self.text_projection(self.text_model(ids_BL))
        return embedded_BP

    def see(self, pixels_BCSS: Tensor) -> Tensor:
        """Embeddings [B, P] of pictures."""
        embedded_BP: Tensor = self.visual_projection(self.vision_model(pixels_BCSS))
        return embedded_BP


class _TextTower(nn.Module):
    def __init__(self, tower: Tower, *, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(vocabulary, tower.hidden_size)
        self.embeddings.position_embedding = nn.Embedding(length, tower.hidden_size)
        self.encoder = _Encoder(tower)
        self.final_layer_norm = nn.LayerNorm(tower.hidden_size, eps=tower.layer_norm_eps)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """The state at the first end token, which has the highest id, [B, E]."""
        tokens, places = (self.embeddings.get_submodule(f"{name}_embedding") for name in ("token", "position"))
        hidden_BLE = tokens(ids_BL) + places(torch.arange(ids_BL.shape[1], device=ids_BL.device))
        hidden_BLE = self.final_layer_norm(self.encoder(hidden_BLE, is_causal=True))
        pooled_BE: Tensor = hidden_BLE[torch.arange(len(ids_BL), device=ids_BL.device), ids_BL.argmax(dim=1)]
        return pooled_BE


class _VisionTower(nn.Module):
    def __init__(self, tower: Tower, *, side: int, patch: int) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(tower.hidden_size))
        self.embeddings.patch_embedding = nn.Conv2d(3, tower.hidden_size, patch, patch, bias=False)
        self.embeddings.position_embedding = nn.Embedding((side // patch) ** 2 + 1, tower.hidden_size)
        self.pre_layrnorm = nn.LayerNorm(tower.hidden_size, eps=tower.layer_norm_eps)  # the file's own spelling
        self.encoder = _Encoder(tower)
        self.post_layernorm = nn.LayerNorm(tower.hidden_size, eps=tower.layer_norm_eps)

    def forward(self, pixels_BCSS: Tensor) -> Tensor:
        """The state at the class token, [B, E]."""
        patches_BEhw = self.embeddings.get_submodule("patch_embedding")(pixels_BCSS)
        first_BLE = self.embeddings.get_parameter("class_embedding").expand(len(pixels_BCSS), 1, -1)
        hidden_BLE = torch.cat([first_BLE, patches_BEhw.flatten(2).transpose(1, 2)], dim=1)
        hidden_BLE = hidden_BLE + self.embeddings.get_parameter("position_embedding.weight")
        hidden_BLE = self.encoder(self.pre_layrnorm(hidden_BLE), is_causal=False)
        pooled_BE: Tensor = self.post_layernorm(hidden_BLE[:, 0])
        return pooled_BE


class _Encoder(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(tower) for _ in range(tower.num_hidden_layers))

    def forward(self, hidden_BLE: Tensor, *, is_causal: bool) -> Tensor:
        for layer in self.layers:
            hidden_BLE = layer(hidden_BLE, is_causal=is_causal)
        return hidden_BLE


class _Layer(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        size, eps = tower.hidden_size, tower.layer_norm_eps
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(size, size) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, tower.intermediate_size)})
        self.mlp["fc2"] = nn.Linear(tower.intermediate_size, size)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(size, eps=eps), nn.LayerNorm(size, eps=eps)
        self._heads, self._activation = tower.num_attention_heads, ACTIVATIONS[tower.hidden_act]

    def forward(self, hidden_BLE: Tensor, *, is_causal: bool) -> Tensor:
        normed_BLE = self.layer_norm1(hidden_BLE)
        q_BHLD, k_BHLD, v_BHLD = (self._split(name, normed_BLE) for name in ("q_proj", "k_proj", "v_proj"))
        attended_BHLD = functional.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=is_causal)
        hidden_BLE = hidden_BLE + self.self_attn["out_proj"](attended_BHLD.transpose(1, 2).flatten(2))
        inner = self._activation(self.mlp["fc1"](self.layer_norm2(hidden_BLE)))
        changed_BLE: Tensor = hidden_BLE + self.mlp["fc2"](inner)
        return changed_BLE

    def _split(self, name: str, hidden_BLE: Tensor) -> Tensor:
        projected_BLE: Tensor = self.self_attn[name](hidden_BLE)
        return projected_BLE.reshape(*projected_BLE.shape[:2], self._heads, -1).transpose(1, 2)


def _tower(config: Mapping[str, Any]) -> Tower:
    return Tower(**{name: config[name] for name in Tower.__dataclass_fields__})


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(text, vision, size of the common embedding). CheckpointError for what is no config of CLIP."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text = {**SHARED_DEFAULTS, **TEXT_DEFAULTS, **config["text_config"]}
        vision = {**SHARED_DEFAULTS, **VISION_DEFAULTS, **config["vision_config"]}
        projection = int(config.get("projection_dim", 512))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no config of CLIP ({error}); give a folder as transformers saves it"
        ) from error
    for tower in (text, vision):
        if tower["hidden_act"] not in ACTIVATIONS:
            raise CheckpointError(f"{path}: hidden_act is {tower['hidden_act']!r}; known are {', '.join(ACTIVATIONS)}")
    return text, vision, projection
