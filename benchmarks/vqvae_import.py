"""The released VQ-VAE's layout, imported: the same codes and pixels as a plain forward pass written here.

Command: make verify NAME=vqvae_import
A file in the layout and with the sizes of the released one is made here from random weights, with a codebook of the
encoder's own outputs so that codes are near one another, and read once with and once without `module.` before its
names. The plain pass takes the file's tensors by name and computes distances as the released code does,
|x|^2 - 2 x e + |e|^2, of which the lowest index of the smallest is taken.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.tokenizers.released import load_released_vqvae
from cogview.tokenizers.vqvae import ImageTokenizer

# B batch, C channels, H W image, h w codes, N vectors, D code dimension, K codes

WIDTH, CODE_DIM, NUM_CODES = 512, 256, 8192
IMAGE_SIZE = 256
CODEBOOK_IMAGES, TESTED_IMAGES, DECODED_IMAGES = 8, 10, 2  # 32 x 32 codes each
MEAN, STD = (0.79093, 0.76271, 0.75340), (0.30379, 0.32279, 0.32800)
BARS = (
    Bar(figure="codes", op=">=", value=10_000),
    Bar(figure="different_codes/plain_names", op="==", value=0),
    Bar(figure="different_codes/module_names", op="==", value=0),
    Bar(figure="different_codes/saved_and_loaded", op="==", value=0),
    Bar(figure="different_pixels", op="==", value=0),
    Bar(figure="distinct_codes", op=">=", value=1000),
)


def measure() -> Figures:
    """Make the file, import it in three ways, and count what differs."""
    generator = torch.Generator().manual_seed(0)
    state = make_weights(generator)
    state["quantize_t.embed"] = make_codebook(state, generator)
    state["quantize_t.embed_avg"] = state["quantize_t.embed"].clone()
    images_BCHW = make_images(TESTED_IMAGES, generator)
    say("plain forward pass")
    wanted_Bhw = torch.cat([plain_codes(state, image_1CHW) for image_1CHW in torch.split(images_BCHW, 1)])
    wanted_pixels = plain_pixels(state, wanted_Bhw[:DECODED_IMAGES])
    figures: dict[str, float | int | str] = {
        "codes": wanted_Bhw.numel(),
        "distinct_codes": len(set(wanted_Bhw.flatten().tolist())),
        "near_ties": count_near_ties(state, images_BCHW[:2]),
    }
    with tempfile.TemporaryDirectory(prefix="cogview-vqvae-") as folder:
        tokenizers = import_in_three_ways(state, Path(folder))
    for name, tokenizer in tokenizers.items():
        say(f"imported: {name}")
        codes_Bhw = torch.cat([tokenizer.encode(image_1CHW) for image_1CHW in torch.split(images_BCHW, 1)])
        figures[f"different_codes/{name}"] = int((codes_Bhw != wanted_Bhw).sum())
    pixels = tokenizers["plain_names"].decode(wanted_Bhw[:DECODED_IMAGES])
    figures["different_pixels"] = int((pixels != wanted_pixels).sum())
    return figures


def import_in_three_ways(state: dict[str, Tensor], folder: Path) -> dict[str, ImageTokenizer]:
    """From both spellings of the names, and once more through our own files."""
    torch.save(state, folder / "plain.pt")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "module.pt")
    plain = load_released_vqvae(folder / "plain.pt")
    plain.save(folder / "ours")
    module = load_released_vqvae(folder / "module.pt")
    return {"plain_names": plain, "module_names": module, "saved_and_loaded": ImageTokenizer.load(folder / "ours")}


def make_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """Everything but the codebook, at a scale that keeps the signal."""
    shapes = {
        "enc_b.blocks.0": (WIDTH, 3, 4, 4),
        "enc_b.blocks.2": (WIDTH, WIDTH, 4, 4),
        "enc_b.blocks.4": (WIDTH, WIDTH, 4, 4),
        "enc_b.blocks.6": (CODE_DIM, WIDTH, 1, 1),
        "dec.blocks.0": (CODE_DIM, WIDTH, 4, 4),  # transposed convolutions: [in, out, 4, 4]
        "dec.blocks.2": (WIDTH, WIDTH, 4, 4),
        "dec.blocks.4": (WIDTH, WIDTH, 4, 4),
        "dec.blocks.6": (3, WIDTH, 1, 1),
    }
    state = {}
    for name, shape in shapes.items():
        is_transposed = name.startswith("dec") and shape[-1] == 4
        taps = shape[0] * 4 if is_transposed else shape[1] * shape[2] * shape[3]  # of 16 taps, 4 meet each pixel
        channels_out = shape[1] if is_transposed else shape[0]
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / taps) ** 0.5
        state[f"{name}.bias"] = torch.randn(channels_out, generator=generator) * 0.1
    state["quantize_t.cluster_size"] = torch.rand(NUM_CODES, generator=generator) * 10
    return state


def make_codebook(state: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """[D, K]: the encoder's outputs for some other images, slightly moved."""
    images_BCHW = make_images(CODEBOOK_IMAGES, generator)
    vectors_ND = torch.cat([encoded(state, image_1CHW) for image_1CHW in torch.split(images_BCHW, 1)])
    noise_ND = torch.randn(vectors_ND.shape, generator=generator) * vectors_ND.std() * 0.1
    return (vectors_ND + noise_ND)[:NUM_CODES].T.contiguous()


def make_images(number: int, generator: torch.Generator) -> Tensor:
    """Coloured clouds with grain, float [B, 3, H, W] in [0, 1]."""
    clouds_BCHW = functional.interpolate(torch.rand(number, 3, 9, 9, generator=generator), IMAGE_SIZE, mode="bicubic")
    grain_BCHW = torch.rand(number, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return (0.8 * clouds_BCHW + 0.2 * grain_BCHW).clamp(0, 1)


def encoded(state: dict[str, Tensor], images_BCHW: Tensor) -> Tensor:
    """Encoder outputs [N, D]."""
    x = (images_BCHW - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    for layer in (0, 2, 4):
        x = functional.conv2d(x, *layer_of(state, f"enc_b.blocks.{layer}"), stride=2, padding=1).relu()
    x = functional.conv2d(x, *layer_of(state, "enc_b.blocks.6"))
    return x.permute(0, 2, 3, 1).reshape(-1, CODE_DIM)


def distances(state: dict[str, Tensor], vectors_ND: Tensor) -> Tensor:
    """Squared distances [N, K], summed in the order of the released code."""
    embed_DK = state["quantize_t.embed"]
    return vectors_ND.pow(2).sum(1, keepdim=True) - 2 * vectors_ND @ embed_DK + embed_DK.pow(2).sum(0, keepdim=True)


def plain_codes(state: dict[str, Tensor], images_BCHW: Tensor) -> Tensor:
    """Codes [B, h, w]."""
    codes_N = (-distances(state, encoded(state, images_BCHW))).max(1).indices
    return codes_N.view(len(images_BCHW), IMAGE_SIZE // 8, IMAGE_SIZE // 8)


def plain_pixels(state: dict[str, Tensor], codes_Bhw: Tensor) -> Tensor:
    """Images [B, 3, H, W], cut to [0, 1] as any picture file would."""
    x = functional.embedding(codes_Bhw, state["quantize_t.embed"].T).permute(0, 3, 1, 2)
    for layer in (0, 2, 4):
        x = functional.conv_transpose2d(x, *layer_of(state, f"dec.blocks.{layer}"), stride=2, padding=1).relu()
    x = functional.conv2d(x, *layer_of(state, "dec.blocks.6"))
    return (x * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)).clamp(0, 1)


def layer_of(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    return state[f"{name}.weight"], state[f"{name}.bias"]


def count_near_ties(state: dict[str, Tensor], images_BCHW: Tensor) -> int:
    """Vectors whose two nearest codes are closer to each other, in distance, than a thousandth of the nearest."""
    nearest_N2 = distances(state, encoded(state, images_BCHW)).topk(2, dim=1, largest=False).values
    return int((nearest_N2[:, 1] - nearest_N2[:, 0] < 1e-3 * nearest_N2[:, 0]).sum())


def main() -> int:
    """The command line."""
    flags = argument_parser(__doc__).parse_args()
    with torch.no_grad():
        return verify("vqvae_import", measure, bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
