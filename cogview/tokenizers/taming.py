"""VQGAN checkpoints of taming-transformers (Esser et al. 2021), read into a VQGANTokenizer.

In: a `.ckpt` as its trainer wrote it, with the weights under `state_dict`, or a bare state dict; pixels in [-1, 1], one
learned codebook (`quantize.embedding.weight`). Out: the same codes and pixels from our tokenizer. The settings follow
from the names and shapes of the weights; the losses' weights (`loss.*`) are left behind.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cogview.errors import CheckpointError
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.residual_blocks import PyramidConfig
from cogview.tokenizers.vqgan import VQGANConfig, VQGANTokenizer
from cogview.weight_files import read_weights

NORM_GROUPS = 32  # the same in every release; it leaves no trace in the shapes
CODEBOOK_NAME = "quantize.embedding.weight"
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
LEFT_BEHIND = ("loss.", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")


def load_taming(path: Path, *, sha256: str = "", unsafe_pickle: bool = False) -> VQGANTokenizer:
    """Read a VQGAN checkpoint, in evaluation mode. CheckpointError names what is missing, damaged or of another model.

    sha256: what the file's must be, if given; unsafe_pickle: see `read_weight_file`.
    """
    return from_taming(read_weights(path, sha256=sha256, unsafe_pickle=unsafe_pickle))


def is_taming(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the codebook of a VQGAN."""
    return CODEBOOK_NAME in weights


def from_taming(weights: Mapping[str, Tensor]) -> VQGANTokenizer:
    """The tokenizer of a state dict with taming's names. CheckpointError where it is no VQGAN with one codebook."""
    kept = {name: tensor for name, tensor in weights.items() if name.startswith(PARTS)}
    strange = sorted(set(weights) - set(kept) - {CODEBOOK_NAME})
    strange = [name for name in strange if not name.startswith(LEFT_BEHIND)]
    if strange:
        raise CheckpointError(f"{strange[0]} is no weight of a VQGAN with one learned codebook; that model is not read")
    codebook_KD = _named(weights, CODEBOOK_NAME).float()
    num_codes, code_dim = codebook_KD.shape
    config = VQGANConfig(
        pyramid=derive_pyramid(weights),
        codebook=CodebookConfig(num_codes=num_codes, code_dim=code_dim, start_after=None),
    )
    tokenizer = VQGANTokenizer(config)
    own = tokenizer.codebook.state_dict(prefix="codebook.")
    own |= {"codebook.codebook_KD": codebook_KD, "codebook.sums_KD": codebook_KD.clone()}
    try:
        tokenizer.load_state_dict(kept | own)
    except RuntimeError as error:
        raise CheckpointError(f"these are not the weights of a VQGAN: {error}") from error
    return tokenizer.eval()


def derive_pyramid(weights: Mapping[str, Tensor]) -> PyramidConfig:
    """The networks' settings, read off the names and shapes. CheckpointError for an encoder that is not taming's."""
    channels = len(_named(weights, "encoder.conv_in.weight"))
    num_levels = len(_numbers(weights, r"encoder\.down\.(\d+)\."))
    if not num_levels:
        raise CheckpointError("the weights have no encoder.down.0; give the checkpoint of a VQGAN")
    widths = [len(_named(weights, f"encoder.down.{level}.block.0.conv1.weight")) for level in range(num_levels)]
    if any(width % channels for width in widths):
        raise CheckpointError(f"the widths {widths} are not multiples of {channels}; this encoder is not taming's")
    return PyramidConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        num_res_blocks=len(_numbers(weights, r"encoder\.down\.0\.block\.(\d+)\.")),
        attention_levels=tuple(sorted(_numbers(weights, r"encoder\.down\.(\d+)\.attn\."))),
        latent_channels=len(_named(weights, "encoder.conv_out.weight")),
        norm_groups=NORM_GROUPS,
    )


def _named(weights: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = weights.get(name)
    if tensor is None or not tensor.dim():
        raise CheckpointError(f"the weights lack {name}; give the checkpoint of a VQGAN with one learned codebook")
    return tensor


def _numbers(weights: Mapping[str, Tensor], pattern: str) -> set[int]:
    return {int(found[1]) for found in (re.match(pattern, name) for name in weights) if found}
