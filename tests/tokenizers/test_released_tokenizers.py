"""Released image tokenizers: the codes and pixels of plain forward passes, sizes from shapes, and what is refused."""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.dvae import DVAEConfig, DVAETokenizer
from cogview.tokenizers.released import load_released_dvae, load_released_vqvae, save_released_vqvae
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from cogview.weight_files import require_sha256

WIDTHS, CODE_DIM, NUM_CODES = (6, 8, 10), 5, 40
DVAE = DVAEConfig(num_codes=24, width=8, code_channels=6, blocks_per_group=2)


def vqvae_state() -> dict[str, Tensor]:
    """Random weights by their released names."""
    generator = torch.Generator().manual_seed(0)
    channels = {"enc_b": (3, *WIDTHS), "dec": (CODE_DIM, *reversed(WIDTHS))}
    state = {}
    for part, widths in channels.items():
        for layer in range(3):
            pair = (widths[layer], widths[layer + 1])
            shape = (*(pair if part == "dec" else pair[::-1]), 4, 4)
            state[f"{part}.blocks.{2 * layer}.weight"] = torch.randn(shape, generator=generator) * 0.2
            state[f"{part}.blocks.{2 * layer}.bias"] = torch.randn(pair[1], generator=generator) * 0.2
    for part, shape in (("enc_b", (CODE_DIM, WIDTHS[-1])), ("dec", (3, WIDTHS[0]))):
        state[f"{part}.blocks.6.weight"] = torch.randn(*shape, 1, 1, generator=generator)
        state[f"{part}.blocks.6.bias"] = torch.randn(shape[0], generator=generator) * 0.2
    state["quantize_t.embed"] = torch.randn(CODE_DIM, NUM_CODES, generator=generator) * 0.5
    state["quantize_t.embed_avg"] = torch.randn(CODE_DIM, NUM_CODES, generator=generator)
    state["quantize_t.cluster_size"] = torch.rand(NUM_CODES, generator=generator)
    return state


def plain_pass(state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and pixels, written out."""
    mean = torch.tensor([0.79093, 0.76271, 0.75340]).view(1, 3, 1, 1)
    std = torch.tensor([0.30379, 0.32279, 0.32800]).view(1, 3, 1, 1)

    def layer(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    x = (images - mean) / std
    for index in (0, 2, 4):
        x = functional.conv2d(x, *layer(f"enc_b.blocks.{index}"), stride=2, padding=1).relu()
    x = functional.conv2d(x, *layer("enc_b.blocks.6")).permute(0, 2, 3, 1)
    embed = state["quantize_t.embed"]
    distances = x.pow(2).sum(-1, keepdim=True) - 2 * x @ embed + embed.pow(2).sum(0)
    codes = (-distances).max(-1).indices
    y = embed.T[codes].permute(0, 3, 1, 2)
    for index in (0, 2, 4):
        y = functional.conv_transpose2d(y, *layer(f"dec.blocks.{index}"), stride=2, padding=1).relu()
    return codes, (functional.conv2d(y, *layer("dec.blocks.6")) * std + mean).clamp(0, 1)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 48, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("legacy", [False, True])
def test_an_imported_vqvae_gives_the_released_codes_and_pixels(
    prefix: str, legacy: bool, images: Tensor, tmp_path: Path
) -> None:
    state, path = vqvae_state(), tmp_path / "vqvae.pt"
    named = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(named, path, _use_new_zipfile_serialization=not legacy)
    tokenizer = load_released_vqvae(path)
    codes, pixels = plain_pass(state, images)
    assert len(codes.unique()) > 10
    assert torch.equal(tokenizer.encode(images), codes)
    assert torch.equal(tokenizer.decode(codes), pixels)
    assert tokenizer.config.widths == WIDTHS
    assert (tokenizer.num_codes, tokenizer.stride, tokenizer.training) == (NUM_CODES, 8, False)
    tokenizer.save(tmp_path / "ours")
    assert torch.equal(ImageTokenizer.load(tmp_path / "ours").encode(images), codes)


def test_the_released_sizes_follow_from_the_shapes(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ImageTokenizer(VQVAEConfig()).state_dict().items()}
    assert shapes["encoder.0.weight"] == (512, 3, 4, 4)
    assert shapes["decoder.0.weight"] == (256, 512, 4, 4)
    assert shapes["codebook.codebook_KD"] == (8192, 256)


def test_equal_codes_go_to_the_lowest_index(images: Tensor, tmp_path: Path) -> None:
    state = vqvae_state()
    state["quantize_t.embed"][:, 20:] = state["quantize_t.embed"][:, :20]
    torch.save(state, tmp_path / "x.pt")
    assert int(load_released_vqvae(tmp_path / "x.pt").encode(images).max()) < 20


def test_an_exported_vqvae_comes_back_and_only_the_papers_rule_can_be(images: Tensor, tmp_path: Path) -> None:
    torch.save(vqvae_state(), tmp_path / "x.pt")
    tokenizer = load_released_vqvae(tmp_path / "x.pt")
    save_released_vqvae(tokenizer, tmp_path / "y.pt")
    written = torch.load(tmp_path / "y.pt", weights_only=True)
    assert written.keys() == vqvae_state().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in vqvae_state().items())
    other = VQVAEConfig(widths=(4,), codebook=CodebookConfig(num_codes=8, code_dim=4, rule="fixed"))
    with pytest.raises(ConfigError, match="rule='fixed'"):
        save_released_vqvae(ImageTokenizer(other), tmp_path / "z.pt")


def test_training_goes_on_from_the_imported_codebook(images: Tensor, tmp_path: Path) -> None:
    torch.save(vqvae_state(), tmp_path / "x.pt")
    tokenizer = load_released_vqvae(tmp_path / "x.pt").train()
    tokenizer(images)
    expected = vqvae_state()
    counts = expected["quantize_t.cluster_size"] * 0.99
    counts += 0.01 * torch.bincount(plain_pass(expected, images)[0].flatten(), minlength=NUM_CODES)
    assert torch.allclose(tokenizer.codebook.counts_K, counts, atol=1e-5)


def test_vqvae_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    cases = {
        r"missing: dec\.blocks\.6\.bias": {"dec.blocks.6.bias": None},
        r"unknown: enc_b\.blocks\.5\.conv\.1\.weight": {"enc_b.blocks.5.conv.1.weight": torch.ones(1)},
        r"quantize_t\.embed_avg \[5, 39\] instead of \[5, 40\]": {"quantize_t.embed_avg": torch.ones(5, 39)},
        r"dec\.blocks\.0\.weight \[10, 5, 4, 4\] instead of \[5, 10, 4, 4\]": {
            "dec.blocks.0.weight": torch.ones(10, 5, 4, 4)
        },
        "no enc_b.blocks.0.weight or no quantize_t.embed": {"quantize_t.embed": None},
    }
    for message, changes in cases.items():
        state = {**vqvae_state(), **changes}
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
        with pytest.raises(CheckpointError, match=message):
            load_released_vqvae(path)
    torch.save(vqvae_state(), path)
    assert load_released_vqvae(path, sha256=require_sha256(path)).num_codes == NUM_CODES
    with pytest.raises(CheckpointError, match="sha256"):
        load_released_vqvae(path, sha256="0" * 64)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="cut short"):
        load_released_vqvae(path)


class Conv2d(nn.Module):
    """As the released dVAE has it: its weights are called `w` and `b`."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.w, self.b = convolution.weight, convolution.bias


def released_form(network: nn.Module) -> nn.Module:
    """The network as nested modules with the released names."""
    if isinstance(network, nn.Conv2d):
        return Conv2d(network)
    form = nn.Module()
    for name, child in network.named_children():
        form.add_module(name, released_form(child))
    return form


def write_dvae(tokenizer: DVAETokenizer, folder: Path, *, as_modules: bool) -> tuple[Path, Path]:
    """encoder.pkl and decoder.pkl, as modules of classes that are gone when they are read, or as state dicts."""
    paths = (folder / "encoder.pkl", folder / "decoder.pkl")
    for path in paths:
        whole = nn.Module()
        whole.add_module("blocks", released_form(tokenizer.get_submodule(path.stem)))
        torch.save(whole if as_modules else whole.state_dict(), path)
    return paths


@pytest.fixture
def dvae() -> DVAETokenizer:
    torch.manual_seed(0)
    tokenizer = DVAETokenizer(DVAE).eval()
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tokenizer


@pytest.mark.parametrize("as_modules", [True, False])
def test_an_imported_dvae_comes_from_modules_or_state_dicts(
    dvae: DVAETokenizer, as_modules: bool, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.ModuleType("dall_e_as_released")
    package.Conv2d = Conv2d
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(Conv2d, "__module__", package.__name__)
    paths = write_dvae(dvae, tmp_path, as_modules=as_modules)
    monkeypatch.delitem(sys.modules, package.__name__)
    tokenizer = load_released_dvae(*paths)
    assert tokenizer.config == DVAE
    codes = tokenizer.encode(images)
    assert codes.shape == (6, 6, 4)
    assert torch.equal(codes, dvae.encode(images))
    assert torch.equal(tokenizer.decode(codes), dvae.decode(codes))


@torch.no_grad()
def test_the_dvae_is_the_plain_network(dvae: DVAETokenizer, images: Tensor) -> None:
    """One group of the encoder, and the ends of the decoder, written out."""
    state = dvae.state_dict()

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    x = conv(0.8 * images + 0.1, "encoder.input")
    for block in (1, 2):
        y = x
        for layer in (1, 2, 3, 4):
            y = conv(y.relu(), f"encoder.group_1.block_{block}.res_path.conv_{layer}")
        x = x + y / 64  # (4 groups of 2 blocks) squared
    x = functional.max_pool2d(x, 2)
    assert torch.allclose(dvae.encoder.group_1(dvae.encoder.input(0.8 * images + 0.1)), x, atol=1e-5)
    codes = torch.randint(24, (2, 3, 5), generator=torch.Generator().manual_seed(2))
    first = conv(functional.one_hot(codes, 24).permute(0, 3, 1, 2).float(), "decoder.input")
    likely = dvae.decoder[1:](first)[:, :3].sigmoid()
    assert torch.allclose(dvae.decode(codes), ((likely - 0.1) / 0.8).clamp(0, 1), atol=1e-6)


def test_the_released_dvae_has_its_known_sizes() -> None:
    with torch.device("meta"):
        released = DVAETokenizer(DVAEConfig())
    assert released.encoder.output.conv.weight.shape == (8192, 2048, 1, 1)
    assert released.decoder.input.weight.shape == (128, 8192, 1, 1)
    assert released.decoder.output.conv.weight.shape == (6, 256, 1, 1)


def test_a_dvae_is_saved_loaded_and_refuses_what_it_cannot_code(dvae: DVAETokenizer, images, tmp_path: Path) -> None:
    fingerprint = dvae.save(tmp_path)
    loaded = DVAETokenizer.load(tmp_path)
    assert loaded.fingerprint == fingerprint
    assert torch.equal(loaded.encode(images), dvae.encode(images))
    with pytest.raises(ConfigError, match="multiples of 8"):
        loaded.encode(images[..., :20])
    with pytest.raises(VocabularyError, match="codebook of 24"):
        loaded.decode(torch.full((1, 2, 2), 24))


def test_dvae_files_that_do_not_fit_are_named(dvae: DVAETokenizer, tmp_path: Path) -> None:
    encoder, decoder = write_dvae(dvae, tmp_path, as_modules=False)
    with pytest.raises(CheckpointError, match=r"encoder\.pkl is not in the layout of DALL-E's released dVAE"):
        load_released_dvae(encoder, encoder)
    state = torch.load(decoder, weights_only=True)
    del state["blocks.group_3.block_2.res_path.conv_4.b"]
    torch.save(state, decoder)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.group_3\.block_2\.res_path\.conv_4\.b"):
        load_released_dvae(encoder, decoder)
    torch.save({"x": torch.ones(1)}, encoder)
    with pytest.raises(CheckpointError, match=r"no blocks\.input\.w"):
        load_released_dvae(encoder, decoder)
