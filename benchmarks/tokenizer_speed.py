"""How fast pictures become codes, and which share of what the machine can multiply that is.

Command: make verify NAME=tokenizer_speed [ARGS="--seconds 1 --device cpu"]
Encodes pictures of 256 pixels with the paper's network (width 512, 8,192 codes of dimension 256) and with the smoke
network (of 64 and of 256 pixels), in fp32 and, on a GPU, in bf16 and fp16, and divides the multiplications which that
takes by the rate of the best square matrix product of the same type in the same run. Beside it, the search for the
nearest code alone, with vector-quantize-pytorch (MIT licence, Phil Wang), on the same vectors and codebook. Every time
is the best of those that fit into `--seconds`.
"""

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from benchmarks.rivals import installed
from cogview.tokenizers.code_search import nearest_codes
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from pipelines.train_image_tokenizer import SMOKE

RIVAL = (
    "vector-quantize-pytorch==1.32.0",
    *("einops==0.8.2", "einx==0.4.3", "frozendict==2.5.1", "loguru==0.7.3", "torch-einops-utils==0.2.0"),
)
PAPER = VQVAEConfig()
NARROW = cast(VQVAEConfig, SMOKE.model)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}  # of the square matrices; the best rate counts
BATCHES = {"cpu": (1, 4), "cuda": (16, 64)}  # of the pictures; the best rate counts
SEARCH_PICTURES = {"cpu": 2, "cuda": 64}  # of 1,024 vectors each
NO_GPU = "no GPU here"
GPU_BARS = tuple(Bar(figure=f"paper_256px/{name}/share_of_matmul", op=">=", value=0.4) for name in ("bf16", "fp16"))
BARS = (Bar(figure="search/codes_that_differ", op="==", value=0),)


def measure(*, device: str, seconds: float) -> Figures:
    """All figures of one device."""
    figures: dict[str, float | int | str] = {"device": device_name(device)}
    for name, dtype in DTYPES.items():
        if device == "cpu" and name != "fp32":
            figures[f"paper_256px/{name}/share_of_matmul"] = NO_GPU
            continue
        say(f"{name}: matrix products, then pictures")
        peak = matmul_rate(dtype, device=device, seconds=seconds)
        figures[f"matmul/{name}/tflops"] = peak / 1e12
        for title, config, side in (("paper", PAPER, 256), ("smoke", NARROW, 256), ("smoke", NARROW, 64)):
            rate, flops = encode_rate(config, side=side, dtype=dtype, device=device, seconds=seconds)
            figures[f"{title}_{side}px/{name}/images_per_second"] = rate
            figures[f"{title}_{side}px/{name}/share_of_matmul"] = rate * flops / peak
    say("the search for the nearest code, ours and vector-quantize-pytorch's")
    return figures | search_figures(device=device, seconds=seconds)


def device_name(device: str) -> str:
    """What it says of itself."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def best_seconds(work: Callable[[], object], *, device: str, seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, after one to warm up; three at least."""
    times: list[float] = []
    work()
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def matmul_rate(dtype: torch.dtype, *, device: str, seconds: float) -> float:
    """Operations in a second (two for each multiplication) of the best square matrix product."""
    rates = []
    for side in SIDES[device]:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        took = best_seconds(partial(torch.mm, left, right, out=out), device=device, seconds=seconds)
        rates.append(2 * side**3 / took)
    return max(rates)


def encode_rate(
    config: VQVAEConfig, *, side: int, dtype: torch.dtype, device: str, seconds: float
) -> tuple[float, float]:
    """Pictures in a second at the best batch size, and the operations that one picture takes."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(config).eval().to(device)
    tokenizer.encoder.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rates = []
    for batch in BATCHES[device]:
        images_BCHW = torch.rand(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        took = best_seconds(partial(tokenizer.encode, images_BCHW), device=device, seconds=seconds)
        rates.append(batch / took)
    return max(rates), encode_operations(tokenizer, side=side)


def encode_operations(tokenizer: ImageTokenizer, *, side: int) -> float:
    """Two for each multiplication of the convolutions and of the search, for one picture."""
    total = 0
    for layer in tokenizer.encoder:
        if isinstance(layer, nn.Conv2d):
            side //= layer.stride[0]
            total += 2 * layer.weight.numel() * side**2
    return float(total + 2 * tokenizer.codebook.codebook_KD.numel() * side**2)


def search_figures(*, device: str, seconds: float) -> dict[str, float]:
    """Vectors in a second against 8,192 codes of dimension 256, forward without training, both on the same numbers."""
    torch.manual_seed(0)
    config = PAPER.codebook
    codebook_KD = torch.randn(config.num_codes, config.code_dim, device=device)
    vectors_ND = torch.randn(SEARCH_PICTURES[device] * 1024, config.code_dim, device=device)
    rival = rival_quantizer(codebook_KD)
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["ours"] = nearest_codes(vectors_ND, codebook_KD)

    def theirs() -> None:
        found["theirs"] = rival(vectors_ND)

    with torch.no_grad():
        took = {"ours": best_seconds(ours, device=device, seconds=seconds)}
        took["theirs"] = best_seconds(theirs, device=device, seconds=seconds)
    differing = (found["ours"] != found["theirs"]).nonzero().squeeze(1)
    return {
        "search/ours/vectors_per_second": len(vectors_ND) / took["ours"],
        "search/vector_quantize_pytorch/vectors_per_second": len(vectors_ND) / took["theirs"],
        "search/ours_over_theirs": took["theirs"] / took["ours"],
        "search/codes_that_differ": sum(_is_worse(row, vectors_ND, codebook_KD, found) for row in differing.tolist()),
    }


def rival_quantizer(codebook_KD: Tensor) -> Callable[[Tensor], Tensor]:
    """vector-quantize-pytorch's quantizer with this codebook: vectors [N, D] -> codes [N]."""
    sys.path.insert(0, str(installed(RIVAL)))
    package: Any = importlib.import_module("vector_quantize_pytorch")
    quantizer = package.VectorQuantize(dim=codebook_KD.shape[1], codebook_size=codebook_KD.shape[0])
    quantizer.to(codebook_KD.device).eval()
    quantizer._codebook.embed.copy_(codebook_KD[None])

    def search(vectors_ND: Tensor) -> Tensor:
        codes_N: Tensor = quantizer(vectors_ND[None])[1][0]
        return codes_N

    return search


def _is_worse(row: int, vectors_ND: Tensor, codebook_KD: Tensor, found: dict[str, Tensor]) -> bool:
    """Whether our code for a vector is really farther away than theirs, beyond the rounding of fp32."""
    ours, theirs = (
        (vectors_ND[row].double() - codebook_KD[found[name][row]].double()).square().sum()
        for name in ("ours", "theirs")
    )
    return bool(ours > theirs * (1 + 1e-5))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bars(device: str) -> Sequence[Bar]:
    """A machine without a GPU has no bar for one."""
    return (*BARS, *GPU_BARS) if device == "cuda" else BARS


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here, help=f"where to compute (default: {here})")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure (default: 5)")
    flags = parser.parse_args()

    def work() -> Figures:
        return measure(device=flags.device, seconds=flags.seconds)

    return verify("tokenizer_speed", work, bars=bars(flags.device), save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
