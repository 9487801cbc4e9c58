"""Released image tokenizers: CogView's VQ-VAE (`vqvae_hard_biggerset_011.pt`) and DALL-E's discrete VAE.

In: the user's files. Out: tokenizers of ours that give the codes and pixels of the released code, and can be saved. All
sizes follow from the shapes of the weights. And back: a VQ-VAE in the released layout.
"""

# K codes, D code dimension

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cogview.errors import CheckpointError, ConfigError
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.dvae import DVAEConfig, DVAETokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from cogview.weight_files import check_layout, read_weights

# Our names begin with -> theirs. Below that the names agree: both count the layers of a sequence.
VQVAE_NAMES = {
    "encoder.": "enc_b.blocks.",
    "decoder.": "dec.blocks.",
    "codebook.codebook_KD": "quantize_t.embed",
    "codebook.counts_K": "quantize_t.cluster_size",
    "codebook.sums_KD": "quantize_t.embed_avg",
}
TRANSPOSED = ("codebook.codebook_KD", "codebook.sums_KD")  # theirs are [D, K]
NOT_RELEASED = "codebook.num_batches"
VQVAE_LAYOUT = "CogView's released VQ-VAE"
DVAE_LAYOUT = "DALL-E's released dVAE"


def load_released_vqvae(path: Path, *, sha256: str = "", unsafe_pickle: bool = False) -> ImageTokenizer:
    """CogView's VQ-VAE from its file, in evaluation mode.

    sha256: what the file's must be, if given; unsafe_pickle: see `read_weight_file`. Raises CheckpointError for another
    file, and for tensors that are missing, unknown or of another shape.
    """
    return from_released_vqvae(read_weights(path, sha256=sha256, unsafe_pickle=unsafe_pickle), path=path)


def from_released_vqvae(theirs: Mapping[str, Tensor], *, path: Path) -> ImageTokenizer:
    """The tokenizer of a state dict that was read from `path`, see `load_released_vqvae`."""
    tokenizer = ImageTokenizer(_vqvae_config(theirs, path=path))
    state = tokenizer.state_dict()
    # Training would put the codebook onto its first batch, but these codes are learned.
    ours: dict[str, Tensor] = {NOT_RELEASED: torch.ones_like(state.pop(NOT_RELEASED))}
    wanted = {_vqvae_name(name): _turned(name, tensor).shape for name, tensor in state.items()}
    check_layout(theirs, wanted=wanted, path=path, layout=VQVAE_LAYOUT)
    ours |= {name: _turned(name, theirs[_vqvae_name(name)]).float().contiguous() for name in state}
    tokenizer.load_state_dict(ours)
    return tokenizer.eval()


def save_released_vqvae(tokenizer: ImageTokenizer, path: Path) -> None:
    """Write a VQ-VAE in the released layout, one flat dict. ConfigError for another rule than the paper's."""
    rule = tokenizer.config.codebook.rule
    if rule != "moving_average":
        raise ConfigError(f"rule={rule!r}: the released layout holds the sums of a moving average; save it in ours")
    state = {name: tensor.detach().cpu() for name, tensor in tokenizer.state_dict().items() if name != NOT_RELEASED}
    torch.save({_vqvae_name(name): _turned(name, tensor).contiguous() for name, tensor in state.items()}, path)


def load_released_dvae(encoder: Path, decoder: Path, *, unsafe_pickle: bool = False) -> DVAETokenizer:
    """DALL-E's dVAE from its two files, in evaluation mode: pickled modules, or state dicts of these.

    The modules' classes are neither needed nor run. Raises CheckpointError as `load_released_vqvae` does.
    """
    paths = {"encoder": encoder, "decoder": decoder}
    states = {part: read_weights(path, unsafe_pickle=unsafe_pickle) for part, path in paths.items()}
    tokenizer = DVAETokenizer(_dvae_config(states, paths=paths))
    for part, theirs in states.items():
        network = tokenizer.get_submodule(part)
        names = {name: f"blocks.{_dvae_name(name)}" for name in network.state_dict()}
        wanted = {names[name]: tensor.shape for name, tensor in network.state_dict().items()}
        check_layout(theirs, wanted=wanted, path=paths[part], layout=f"{DVAE_LAYOUT} ({part})")
        network.load_state_dict({name: theirs[names[name]].float() for name in names})
    return tokenizer.eval()


def _vqvae_config(theirs: Mapping[str, Tensor], *, path: Path) -> VQVAEConfig:
    """The released settings with the sizes of these weights."""
    layers = sorted(
        int(found[1]) for found in (re.match(r"enc_b\.blocks\.(\d+)\.weight$", name) for name in theirs) if found
    )
    embed = theirs.get("quantize_t.embed")
    if len(layers) < 2 or embed is None or embed.dim() != 2:
        raise CheckpointError(
            f"{path} is not in the layout of {VQVAE_LAYOUT}: it has no enc_b.blocks.0.weight or no quantize_t.embed; "
            f"its tensors: {', '.join(list(theirs)[:4])}, ..."
        )
    code_dim, num_codes = embed.shape
    return VQVAEConfig(
        widths=tuple(len(theirs[f"enc_b.blocks.{layer}.weight"]) for layer in layers[:-1]),
        codebook=CodebookConfig(num_codes=num_codes, code_dim=code_dim),
    )


def _vqvae_name(name: str) -> str:
    ours, theirs = next((ours, theirs) for ours, theirs in VQVAE_NAMES.items() if name.startswith(ours))
    return theirs + name.removeprefix(ours)


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name in TRANSPOSED and tensor.dim() == 2 else tensor


def _dvae_config(states: Mapping[str, Mapping[str, Tensor]], *, paths: Mapping[str, Path]) -> DVAEConfig:
    first = {}
    for part, state in states.items():
        if "blocks.input.w" not in state or state["blocks.input.w"].dim() != 4:
            raise CheckpointError(
                f"{paths[part]} is not in the layout of {DVAE_LAYOUT} ({part}): it has no blocks.input.w; "
                f"its tensors: {', '.join(list(state)[:4])}, ..."
            )
        first[part] = state["blocks.input.w"].shape
    blocks = {
        found[1] for found in (re.match(r"blocks\.group_1\.(block_\d+)\.", name) for name in states["encoder"]) if found
    }
    return DVAEConfig(
        num_codes=first["decoder"][1],
        code_channels=first["decoder"][0],
        width=first["encoder"][0],
        blocks_per_group=max(1, len(blocks)),
    )


def _dvae_name(name: str) -> str:
    """Theirs are called `w` and `b`."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}.{kind[0]}"
