"""Reading taming-transformers' VQGAN checkpoints: the codes and pixels of an independent forward pass over the file."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cogview.errors import CheckpointError
from cogview.tokenizers.taming import load_taming
from cogview.tokenizers.vqgan import VQGANTokenizer
from tests.tokenizers.taming_layout import (
    ATTENTION_LEVEL,
    CHANNELS,
    COARSEST,
    CODES,
    LATENT,
    MULTIPLIERS,
    WIDTHS,
    Weights,
    make_weights,
)


class Reference:
    """The forward pass written anew, straight from the names."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def conv(self, name: str, x: Tensor, **settings: int) -> Tensor:
        return functional.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **settings)

    def norm(self, name: str, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        groups = x.reshape(batch, 32, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
        scale, shift = (self.weights[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return groups.reshape(batch, channels, height, width) * scale + shift

    def active(self, name: str, x: Tensor) -> Tensor:
        x = self.norm(name, x)
        return x * torch.sigmoid(x)

    def block(self, name: str, x: Tensor) -> Tensor:
        hidden = self.conv(f"{name}.conv1", self.active(f"{name}.norm1", x), padding=1)
        hidden = self.conv(f"{name}.conv2", self.active(f"{name}.norm2", hidden), padding=1)
        has_shortcut = f"{name}.nin_shortcut.weight" in self.weights
        return hidden + (self.conv(f"{name}.nin_shortcut", x) if has_shortcut else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        normed = self.norm(f"{name}.norm", x)
        query, key, value = (self.conv(f"{name}.{part}", normed).reshape(batch, channels, -1) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", query, key) / channels**0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(dim=2), value).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x))
        return self.block(f"{name}.block_2", x)

    def encode(self, images: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", images * 2 - 1, padding=1)
        for level in range(len(WIDTHS)):
            for index in range(2):
                x = self.block(f"encoder.down.{level}.block.{index}", x)
                x = self.attention(f"encoder.down.{level}.attn.{index}", x) if level == ATTENTION_LEVEL else x
            if level < COARSEST:
                padded = functional.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.down.{level}.downsample.conv", padded, stride=2)
        x = self.active("encoder.norm_out", self.middle("encoder.mid", x))
        vectors = self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1)).permute(0, 2, 3, 1)
        distances = (vectors.unsqueeze(-2) - self.weights["quantize.embedding.weight"]).square().sum(-1)
        return distances.argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        vectors = self.weights["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", vectors), padding=1)
        x = self.middle("decoder.mid", x)
        for level in reversed(range(len(WIDTHS))):
            for index in range(3):
                x = self.block(f"decoder.up.{level}.block.{index}", x)
                x = self.attention(f"decoder.up.{level}.attn.{index}", x) if level == ATTENTION_LEVEL else x
            if level:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        x = self.conv("decoder.conv_out", self.active("decoder.norm_out", x), padding=1)
        return ((x + 1) / 2).clamp(0, 1)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights()


@pytest.fixture(scope="module")
def checkpoint(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taming") / "last.ckpt"
    torch.save({"state_dict": weights, "epoch": 3, "global_step": 1000, "optimizer_states": []}, path)
    return path


def test_no_code_differs_in_10_000_and_the_pixels_are_the_same(weights: Weights, checkpoint: Path) -> None:
    tokenizer, reference = load_taming(checkpoint), Reference(weights)
    images = torch.rand(10, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        codes, expected = tokenizer.encode(images), reference.encode(images)
        assert expected.numel() > 10_000
        assert len(expected.unique()) > CODES / 4
        assert int((codes != expected).sum()) == 0
        assert torch.allclose(tokenizer.decode(codes[:2]), reference.decode(expected[:2]), atol=1e-5)


def test_settings_follow_from_the_shapes(checkpoint: Path) -> None:
    tokenizer = load_taming(checkpoint)
    pyramid = tokenizer.config.pyramid
    assert (pyramid.channels, pyramid.multipliers, pyramid.num_res_blocks) == (CHANNELS, MULTIPLIERS, 2)
    assert (pyramid.attention_levels, pyramid.latent_channels) == ((ATTENTION_LEVEL,), LATENT)
    assert (tokenizer.stride, tokenizer.num_codes) == (2, CODES)


def test_a_read_tokenizer_can_be_saved_as_ours(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_taming(checkpoint)
    tokenizer.save(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(VQGANTokenizer.load(tmp_path).encode(images), tokenizer.encode(images))


def test_further_training_starts_from_the_read_codes(checkpoint: Path, weights: Weights) -> None:
    tokenizer = load_taming(checkpoint).train()
    tokenizer(torch.rand(4, 3, 32, 32))
    moved = (tokenizer.codebook.codebook_KD - weights["quantize.embedding.weight"]).norm(dim=1)
    assert float((moved / weights["quantize.embedding.weight"].norm(dim=1)).median()) < 0.2


def test_classes_of_the_trainer_are_not_needed(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("pytorch_lightning_of_old")
    callback: Any = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    path = tmp_path / "last.ckpt"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        instance = callback()
        instance.best = 1.5
        torch.save({"state_dict": weights, "callbacks": {callback: {"best": instance}}}, path)
    assert load_taming(path).num_codes == CODES


class Booby:
    """A pickle that would make a file."""

    def __init__(self, call: Any, argument: Any) -> None:
        self.call, self.argument = call, argument

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return self.call, (self.argument,)


@pytest.mark.parametrize("call", [exec, os.system], ids=["exec", "system"])
def test_nothing_in_the_file_is_run(weights: Weights, tmp_path: Path, call: Any) -> None:
    trace = tmp_path / "trace"
    command = f"touch {trace}" if call is os.system else f"open({str(trace)!r}, 'w')"
    torch.save({"state_dict": weights, "trap": Booby(call, command)}, tmp_path / "last.ckpt")
    if call is os.system:
        with pytest.raises(CheckpointError, match=r"asks for .*system.* is not run"):
            load_taming(tmp_path / "last.ckpt")
    else:
        assert load_taming(tmp_path / "last.ckpt").num_codes == CODES
    assert not trace.exists()


def test_other_models_and_damaged_files_are_named(weights: Weights, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    without = {name: tensor for name, tensor in weights.items() if name != "quantize.embedding.weight"}
    foreign = without | {"quantize.embed.weight": torch.zeros(4, 4), "quantize.proj.weight": torch.zeros(4, 4, 1, 1)}
    cut = {name: tensor for name, tensor in weights.items() if name != "decoder.up.0.block.2.conv2.bias"}
    cases = {
        "is no weight of a VQGAN": {"state_dict": foreign},
        "lack quantize.embedding.weight": {"state_dict": without},
        "decoder.up.0.block.2.conv2.bias": {"state_dict": cut},
        "holds no tensors": {"state_dict": {"epoch": 3}},
        "lack encoder.conv_in.weight": {"quantize.embedding.weight": torch.zeros(4, 4)},
    }
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            load_taming(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="is cut short"):
        load_taming(path)
    with pytest.raises(CheckpointError, match="has the sha256"):
        load_taming(checkpoint, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_taming(tmp_path / "absent.ckpt")
