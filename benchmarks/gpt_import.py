"""Released GPT weights, imported: the same logits as a plain implementation written here, and how much memory it takes.

Command: make verify NAME=gpt_import
Files in the released layout are made here from random weights: tiny whole models in 1, 2 and 4 model-parallel parts,
under the released and under SwissArmyTransformer's names, and two layers of the 4 B model's shape with 9,216 instead of
58,240 vocabulary rows. The plain implementation knows the weights before they are cut and uses none of our code: norms
of inputs over their largest magnitude over 8, queries over sqrt(64) before the product, -10000 where a mask is, GELU's
tanh form, epsilon 1e-5. Positions run through, start anew at ROI2 (as in training), or after it (as the released
sampler has it).
"""

import math
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Bar, Figures, UnmeasuredError, argument_parser, say, verify
from cogview.models.gpt import GPT
from cogview.models.published import load_model, save_weights
from cogview.models.released import load_released_gpt, open_released_gpt

# B batch, L sequence, H heads, D head size, E hidden, V vocabulary

HEAD_SIZE = 64
TINY = {"hidden_size": 256, "num_layers": 4, "vocab_size": 1024, "max_positions": 96}
WIDE = {"hidden_size": 2560, "num_layers": 2, "vocab_size": 9216, "max_positions": 1089}
TINY_LENGTH, WIDE_LENGTH = 96, 160
TOLERANCE = 1e-4
BARS = (
    *(Bar(figure=f"largest_difference/tiny_in_{parts}", op="<=", value=TOLERANCE) for parts in (1, 2, 4)),
    Bar(figure="largest_difference/sat_names", op="<=", value=TOLERANCE),
    Bar(figure="largest_difference/own_files", op="<=", value=TOLERANCE),
    Bar(figure="largest_difference/positions_of_training", op="<=", value=TOLERANCE),
    Bar(figure="largest_difference/positions_of_sampler", op="<=", value=TOLERANCE),
    Bar(figure="largest_difference/4b_shapes", op="<=", value=TOLERANCE),
    Bar(figure="effect_of_position_rule", op=">", value=100 * TOLERANCE),
    Bar(figure="memory_per_file_byte/stored_precision", op="<=", value=0.1),
    Bar(figure="memory_per_file_byte/fp32_of_fp16", op="<=", value=2.1),
)


def measure() -> Figures:
    """Tiny models first, then the 4 B model's shapes, then memory."""
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, float | int | str] = {}
    with tempfile.TemporaryDirectory(prefix="cogview-gpt-") as folder:
        weights = make_weights(**TINY, generator=generator)
        figures.update(compare_tiny(weights, Path(folder), generator))
        weights = make_weights(**WIDE, generator=generator)
        ids_BL = torch.randint(WIDE["vocab_size"], (1, WIDE_LENGTH), generator=generator)
        positions_BL = torch.arange(WIDE["max_positions"] - WIDE_LENGTH, WIDE["max_positions"])[None]
        say("two layers of the 4 B model's shape")
        wide = write_parts(weights, Path(folder) / "wide", parts=1)
        figures.update(memory_figures(wide))
        gpt = load_released_gpt(wide)
        wanted = plain_logits(weights, ids_BL, positions_BL)
        figures["largest_difference/4b_shapes"] = largest_difference(gpt, wanted, ids_BL, positions_BL)
        figures["largest_logit/4b_shapes"] = float(wanted.abs().max())
    return figures


def compare_tiny(weights: dict[str, Tensor], folder: Path, generator: torch.Generator) -> dict[str, float]:
    """Every way into the same tiny model, and every rule of positions."""
    ids_BL = torch.randint(TINY["vocab_size"], (3, TINY_LENGTH), generator=generator)
    positions = dict(position_rules())
    wanted = {rule: plain_logits(weights, ids_BL, positions_BL) for rule, positions_BL in positions.items()}
    figures = {}
    for parts in (1, 2, 4):
        gpt = load_released_gpt(write_parts(weights, folder / f"in_{parts}", parts=parts))
        figures[f"tiny_in_{parts}"] = largest_difference(gpt, wanted["plain"], ids_BL, positions["plain"])
    sat = load_released_gpt(write_parts(weights, folder / "sat", parts=2, words="transformer.word_embeddings.weight"))
    figures["sat_names"] = largest_difference(sat, wanted["plain"], ids_BL, positions["plain"])
    released = open_released_gpt(folder / "in_4")
    save_weights(dict(released.tensors(torch.float32)), folder / "own", config=released.config, settings={})
    figures["own_files"] = largest_difference(
        load_model(folder / "own")[0], wanted["plain"], ids_BL, positions["plain"]
    )
    for rule in ("training", "sampler"):
        figures[f"positions_of_{rule}"] = largest_difference(gpt, wanted[rule], ids_BL, positions[rule])
    effect = float((wanted["training"] - wanted["sampler"]).abs().max())
    return {
        **{f"largest_difference/{name}": value for name, value in figures.items()},
        "effect_of_position_rule": effect,
    }


def position_rules(*, roi2: int = 40) -> Iterator[tuple[str, Tensor]]:
    """Rule -> position ids [1, L] of a sequence whose second region, ROI2, starts at index `roi2`."""
    plain_L = torch.arange(TINY_LENGTH)
    yield "plain", plain_L[None]
    yield "training", torch.where(plain_L >= roi2, plain_L - roi2, plain_L)[None]
    yield "sampler", torch.where(plain_L > roi2, plain_L - roi2, plain_L)[None]


def make_weights(
    *, hidden_size: int, num_layers: int, vocab_size: int, max_positions: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random weights by their released names, in fp16 as released; norms and biases are not those of a fresh model."""

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).half()

    std = 1 / math.sqrt(hidden_size)
    weights = {
        "word_embeddings.weight": normal(vocab_size, hidden_size, std=std),
        "transformer.position_embeddings.weight": normal(max_positions, hidden_size, std=std),
    }
    shapes = {
        "attention.query_key_value": (3 * hidden_size, hidden_size),
        "attention.dense": (hidden_size, hidden_size),
        "mlp.dense_h_to_4h": (4 * hidden_size, hidden_size),
        "mlp.dense_4h_to_h": (hidden_size, 4 * hidden_size),
    }
    norms = ("input_layernorm", "third_layernorm", "post_attention_layernorm", "fourth_layernorm")
    for layer in range(num_layers):
        for name, shape in shapes.items():
            weights[f"transformer.layers.{layer}.{name}.weight"] = normal(*shape, std=1.5 * std)
            weights[f"transformer.layers.{layer}.{name}.bias"] = normal(shape[0], std=0.1)
        for name in norms:
            weights[f"transformer.layers.{layer}.{name}.weight"] = normal(hidden_size, std=0.2, mean=1.0)
            weights[f"transformer.layers.{layer}.{name}.bias"] = normal(hidden_size, std=0.1)
    weights["transformer.final_layernorm.weight"] = normal(hidden_size, std=0.2, mean=1.0)
    weights["transformer.final_layernorm.bias"] = normal(hidden_size, std=0.1)
    return weights


def write_parts(weights: dict[str, Tensor], folder: Path, *, parts: int, words: str = "word_embeddings.weight") -> Path:
    """Cut the weights as model parallelism does, and write them as the release does; returns the folder."""
    (folder / "20000").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("20000")
    for part in range(parts):
        state = {
            words if name == "word_embeddings.weight" else name: cut(name, value, part, parts).clone()
            for name, value in weights.items()
        }
        path = folder / "20000" / f"mp_rank_{part:02d}_model_states.pt"
        torch.save({"module": state, "iteration": 20000}, path)
    return folder


def cut(name: str, tensor: Tensor, part: int, parts: int) -> Tensor:
    """A part's share: of each third of qkv, of rows of h->4h and of the vocabulary, of columns of the two outputs."""
    if "query_key_value" in name:
        size = len(tensor) // 3
        return torch.cat([cut("dense_h_to_4h", tensor[size * i : size * (i + 1)], part, parts) for i in range(3)])
    if "dense_h_to_4h" in name or name.startswith("word_embeddings"):
        size = len(tensor) // parts
        return tensor[part * size : (part + 1) * size]
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        size = tensor.shape[1] // parts
        return tensor[:, part * size : (part + 1) * size]
    return tensor


def plain_logits(weights: dict[str, Tensor], ids_BL: Tensor, positions_BL: Tensor) -> Tensor:
    """[B, L, V] in fp32, step by step."""
    of = {name: tensor.float() for name, tensor in weights.items()}
    hidden = of["word_embeddings.weight"][ids_BL] + of["transformer.position_embeddings.weight"][positions_BL]
    num_layers = sum(name.endswith("attention.dense.bias") for name in of)
    for layer in range(num_layers):
        at = f"transformer.layers.{layer}"
        attended = plain_attention(of, f"{at}.attention", plain_norm(of, f"{at}.input_layernorm", hidden))
        hidden = hidden + plain_norm(of, f"{at}.third_layernorm", attended)
        wide = linear(of, f"{at}.mlp.dense_h_to_4h", plain_norm(of, f"{at}.post_attention_layernorm", hidden))
        wide = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        narrow = linear(of, f"{at}.mlp.dense_4h_to_h", wide)
        hidden = hidden + plain_norm(of, f"{at}.fourth_layernorm", narrow)
    return plain_norm(of, "transformer.final_layernorm", hidden) @ of["word_embeddings.weight"].T


def linear(of: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return x @ of[f"{name}.weight"].T + of[f"{name}.bias"]


def plain_norm(of: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """LayerNorm over the last dimension of an input that is first brought into [-8, 8]."""
    x = x / (x.abs().max() / 8)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * of[f"{name}.weight"] + of[f"{name}.bias"]


def plain_attention(of: dict[str, Tensor], name: str, x_BLE: Tensor) -> Tensor:
    """Causal attention, head by head."""
    length, hidden_size = x_BLE.shape[1:]
    qkv = linear(of, f"{name}.query_key_value", x_BLE)
    hidden_from = [0, hidden_size, 2 * hidden_size]
    future_LL = torch.ones(length, length).triu(1).bool()
    heads = []
    for head in range(hidden_size // HEAD_SIZE):
        q, k, v = (qkv[..., start + head * HEAD_SIZE : start + (head + 1) * HEAD_SIZE] for start in hidden_from)
        scores_BLL = (q / math.sqrt(HEAD_SIZE)) @ k.transpose(1, 2)
        scores_BLL = torch.where(future_LL, torch.tensor(-10000.0), scores_BLL)
        powers_BLL = torch.exp(scores_BLL - scores_BLL.max(-1, keepdim=True).values)
        heads.append(powers_BLL / powers_BLL.sum(-1, keepdim=True) @ v)
    return linear(of, f"{name}.dense", torch.cat(heads, dim=-1))


def largest_difference(gpt: GPT, wanted: Tensor, ids_BL: Tensor, positions_BL: Tensor) -> float:
    """Of all logits of all positions."""
    found = gpt.logits(gpt(ids_BL, positions_BL.expand(len(ids_BL), -1)))
    return float((found - wanted).abs().max())


def memory_figures(folder: Path) -> dict[str, float]:
    """The most memory that an import takes for itself, over the size of the file: as stored, and in twice as much."""
    size = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    figures: dict[str, float] = {"file_mib": size / 2**20}
    for name, dtype in (("stored_precision", None), ("fp32_of_fp16", torch.float32)):
        figures[f"memory_per_file_byte/{name}"] = peak_bytes(partial(load_released_gpt, folder, dtype=dtype)) / size
    return figures


def peak_bytes(work: Callable[[], object]) -> int:
    """How far `work` raises our own memory at most, looked at every millisecond."""
    is_over, start = threading.Event(), own_bytes()
    seen = [start]

    def watch() -> None:
        while not is_over.wait(0.001):
            seen.append(own_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = work()
    seen.append(own_bytes())  # while the result is still held
    is_over.set()
    watcher.join()
    del result
    return max(seen) - start


def own_bytes() -> int:
    """Memory of this process that no file stands behind."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise UnmeasuredError("only Linux tells which memory belongs to no file; run this there") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> int:
    """The command line."""
    flags = argument_parser(__doc__).parse_args()
    with torch.no_grad():
        return verify("gpt_import", measure, bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
