"""Three-region sparse attention: the numbers of its rule, the loss of dense attention, and what it costs.

Command: make verify NAME=sparse_attention [ARGS="--only agreement loss"]
*Agreement*: outputs and gradients against the same rule as a mask over a dense product. *Loss*: a small GPT learns
captioned scenes with dense and with sparse attention on the same batches, each from the same two starts; compared are
the means over the starts, and told beside is how far two runs of dense attention lie apart that differ in their start
alone. *Cost*: forward and backward at 1,088 and 4,096 tokens beside materialised and fused dense attention, the draw of
the pivots included.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.models.attention import causal_mask, fused_attention, plain_attention
from cogview.models.gpt import GPT, AttentionKind, GPTConfig
from cogview.models.pivots import Pivots, SparseConfig, draw_pivots, pivot_keys
from cogview.models.sparse_attention import reference_attention, score_bias, sparse_attention
from cogview.scenes.scene import corpus, draw_scene
from cogview.sequences.batch import SequenceConfig, build_batch
from cogview.sequences.layout import TASKS
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.language_model import LanguageModelLoss, weighted
from cogview.training.optimization import OptimizerConfig, build_optimizer, clip_gradients, learning_rate_at

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BARS = (
    Bar(figure="agreement/output", op="<=", value=1e-5),
    Bar(figure="agreement/gradient", op="<=", value=1e-5),
    Bar(figure="loss/largest_gap", op="<=", value=0.02),
)
GPU_BAR = Bar(figure="cost/4096/times_faster_than_materialised", op=">=", value=2.5)

SHORT = SparseConfig(num_pivots=48, block_size=32, window_blocks=2)
AGREEMENT: tuple[tuple[SparseConfig, int, tuple[int, ...]], ...] = (  # regions, tokens, text tokens of each row
    (SparseConfig(), 1088, (64, 0)),
    (SparseConfig(num_pivots=256, block_size=64, window_blocks=4), 1345, (61, 7)),  # a super-resolution row
    (SparseConfig(num_pivots=256, window_blocks=3), 2048, (30,)),
    (SHORT, 200, (12, 3, 0)),
    (SHORT, 31, (5, 31)),
    (SHORT, 256, (100, 49)),  # more text than pivots
    (replace(SHORT, corrects_pivots=False), 333, (20, 1)),
    (replace(SHORT, window_blocks=1), 128, (1, 2)),
)

# The loss: 16 x 16 patches of 8 x 8 pixels, each as its mean colour; regions in the paper's proportions.
GRID, PATCH, LEVELS = 16, 8, 5
NUM_STEPS, BATCH_SIZE, SMOOTHED_STEPS, NUM_STARTS = 240, 16, 20, 2
KINDS: tuple[AttentionKind, ...] = ("fused", "sparse")
REGIONS = SparseConfig(num_pivots=48, block_size=8, window_blocks=6)
MODEL = GPTConfig(num_layers=3, hidden_size=128, num_heads=4, dropout=0.0, init_std=0.088, embedding_gradient=1.0)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3)

COST_LENGTHS = (1088, 4096)
NUM_HEADS, HEAD_SIZE = 8, 64


def agreement() -> Figures:
    """The largest differences over all cases between the fp32 form and the rule in fp64."""
    torch.backends.cuda.matmul.allow_tf32 = False
    worst = {"agreement/output": 0.0, "agreement/gradient": 0.0}
    for number, (config, length, texts) in enumerate(AGREEMENT):
        pivots = pivots_of(config, length=length, texts=texts)
        weights = random_tensor(len(texts), length, seed=number)
        found = []
        for form, dtype in ((sparse_attention, torch.float32), (reference_attention, torch.float64)):
            inputs = [random_tensor(len(texts), length, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
            output = form(*inputs, pivots=pivots)
            (output * weights).sum().backward()  # type: ignore[no-untyped-call]
            found.append([output.detach(), *(value.grad for value in inputs if value.grad is not None)])
        gaps = [float((fast - slow).abs().max()) for fast, slow in zip(*found, strict=True)]
        say(f"{length} tokens, texts of {texts}: output {gaps[0]:.1e}, gradients {max(gaps[1:]):.1e}")
        worst["agreement/output"] = max(worst["agreement/output"], gaps[0])
        worst["agreement/gradient"] = max(worst["agreement/gradient"], *gaps[1:])
    return worst


def loss() -> Figures:
    """How far the smoothed loss curve of sparse attention lies from that of dense attention, and where both end."""
    vocabulary, batches = scene_batches()
    curves = {
        attention: np.stack(
            [loss_curve(attention, vocabulary=vocabulary, batches=batches, seed=seed) for seed in range(NUM_STARTS)]
        )
        for attention in KINDS
    }
    dense, sparse = curves["fused"].mean(axis=0), curves["sparse"].mean(axis=0)
    gaps = (sparse - dense) / dense
    paired = np.abs(curves["sparse"] - curves["fused"]) / curves["fused"]
    control = np.abs(curves["fused"][1:] - curves["fused"][:-1]) / curves["fused"][:-1]
    length = batches[0]["ids"].shape[1]
    return {
        "loss/largest_gap": float(np.abs(gaps).max()),
        "loss/mean_gap": float(np.abs(gaps).mean()),
        "loss/largest_excess": float(gaps.max()),
        "loss/last_excess": float(gaps[-1]),
        "loss/starts": NUM_STARTS,
        "loss/largest_gap_of_one_start": float(paired.max()),
        "loss/largest_gap_of_dense_from_two_starts": float(control.max()),
        "loss/mean_gap_of_dense_from_two_starts": float(control.mean()),
        "loss/dense_first": float(dense[0]),
        "loss/dense_last": float(dense[-1]),
        "loss/sparse_last": float(sparse[-1]),
        "loss/share_of_keys_seen": seen_share(length),
    }


def cost() -> Figures:
    """Median seconds of forward and backward, and what is kept in between."""
    figures: dict[str, float | int | str] = {"cost/device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    for length in COST_LENGTHS:
        seconds: dict[str, float] = {}
        for name, form in forms(length).items():
            inputs = [random_tensor(1, length, seed=seed, is_half=True).requires_grad_() for seed in range(3)]
            seconds[name] = median_seconds(form, inputs)
            figures[f"cost/{length}/{name}/seconds"] = seconds[name]
            figures[f"cost/{length}/{name}/kept_mib"] = kept_bytes(form, inputs) / 2**20
            say(f"{length} tokens, {name}: {seconds[name]:.4f} s")
        for name in ("materialised", "fused"):
            figures[f"cost/{length}/times_faster_than_{name}"] = seconds[name] / seconds["sparse"]
    return figures


def forms(length: int) -> dict[str, Callable[..., Tensor]]:
    """The three ways to attend over rows of one length."""
    allowed = causal_mask(length, length, device=torch.device(DEVICE))

    def sparse(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        return sparse_attention(q_BHLD, k_BHLD, v_BHLD, pivots=pivots_of(SparseConfig(), length=length, texts=(64,)))

    return {
        "materialised": lambda q, k, v: plain_attention(q, k, v, allowed=allowed),
        "fused": lambda q, k, v: fused_attention(q, k, v, allowed=None),
        "sparse": sparse,
    }


def median_seconds(form: Callable[..., Tensor], inputs: Sequence[Tensor], *, repeats: int = 5) -> float:
    """Of forward and backward, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        form(*inputs).sum().backward()  # type: ignore[no-untyped-call]
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def kept_bytes(form: Callable[..., Tensor], inputs: Sequence[Tensor]) -> int:
    """Bytes that forward keeps for backward, a storage counted once."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # or an address could be used again

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        form(*inputs)
    return sum(storages.values())


def pivots_of(config: SparseConfig, *, length: int, texts: Sequence[int]) -> Pivots:
    """Pivots for rows that begin with so many text tokens and go on with image tokens."""
    positions_L = torch.arange(length, device=DEVICE)
    ids_BL = torch.where(positions_L < torch.tensor(texts, device=DEVICE)[:, None], config.num_image_ids, 0)
    keys_B = pivot_keys(torch.arange(len(texts), device=DEVICE), seed=1, step=0)
    return draw_pivots(ids_BL, keys_B=keys_B, layer=0, config=config)


def random_tensor(batch: int, length: int, *, seed: int, is_half: bool = False) -> Tensor:
    """Normal numbers [batch, heads, length, head size]; bf16 on a GPU where asked for."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, NUM_HEADS, length, HEAD_SIZE, generator=generator).to(DEVICE)
    return values.bfloat16() if is_half and DEVICE == "cuda" else values


def scene_batches() -> tuple[Vocabulary, list[dict[str, Tensor]]]:
    """Batches of scenes with their captions by word, none seen twice; one for each step."""
    scenes = list(corpus(5, NUM_STEPS * BATCH_SIZE))
    words = sorted({word for scene in scenes for word in scene.english.split()})
    vocabulary = Vocabulary(LEVELS**3, len(words))
    texts = [[words.index(word) for word in scene.english.split()] for scene in scenes]
    codes = np.stack([patch_codes(np.asarray(draw_scene(scene.scene, image_size=GRID * PATCH))) for scene in scenes])
    batches = []
    for start in range(0, len(scenes), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        batch = build_batch(
            texts[rows],
            codes[rows],
            layout=TASKS["text_to_image"],
            config=SequenceConfig(length=GRID**2 + 40),
            vocabulary=vocabulary,
        )
        batches.append(dict(weighted(batch).tensors))
    return vocabulary, batches


def patch_codes(pixels_HWC: np.ndarray) -> np.ndarray:
    """The mean colour of each patch, rounded to a few levels a channel, as one number: uint16 [patches]."""
    patches = pixels_HWC.reshape(GRID, PATCH, GRID, PATCH, 3).mean(axis=(1, 3)).reshape(-1, 3)
    levels = np.rint(patches / 255 * (LEVELS - 1)).astype(np.uint16)
    codes: np.ndarray = levels @ np.array([LEVELS**2, LEVELS, 1], dtype=np.uint16)
    return codes


def loss_curve(
    attention: AttentionKind, *, vocabulary: Vocabulary, batches: Sequence[dict[str, Tensor]], seed: int = 0
) -> np.ndarray:
    """Train from the start that the seed gives; the mean loss of every `SMOOTHED_STEPS` steps in a row."""
    torch.manual_seed(seed)
    regions = replace(REGIONS, num_image_ids=vocabulary.num_image_codes, padding_id=vocabulary.command("PAD"))
    config = replace(MODEL, vocab_size=vocabulary.size, max_positions=GRID**2 + 40, attention=attention, sparse=regions)
    module = LanguageModelLoss(GPT(config)).to(DEVICE).train()
    optimizer = build_optimizer(module, OPTIMIZER)
    losses: list[float] = []
    for step, value in enumerate(training_losses(module, optimizer, batches)):
        losses.append(value)
        if (step + 1) % 40 == 0:
            say(f"{attention}, step {step + 1}: {statistics.mean(losses[-SMOOTHED_STEPS:]):.4f}")
    return np.convolve(losses, np.full(SMOOTHED_STEPS, 1 / SMOOTHED_STEPS), mode="valid")


def training_losses(
    module: LanguageModelLoss, optimizer: torch.optim.Optimizer, batches: Sequence[dict[str, Tensor]]
) -> Iterator[float]:
    """Take a step on each batch; yields its loss."""
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, num_steps=len(batches), config=OPTIMIZER)
        tensors = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        optimizer.zero_grad(set_to_none=True)
        value = module(**tensors).loss_sum / tensors["loss_weights"].sum()
        value.backward()
        clip_gradients(module, norm=OPTIMIZER.clip_norm)
        optimizer.step()
        yield value.item()


def seen_share(length: int) -> float:
    """The share of the keys before it, itself included, that an average query of the loss run looks at."""
    seen = score_bias(pivots_of(REGIONS, length=length, texts=(10,))).isfinite().sum().item()
    return seen / (length * (length + 1) / 2)


PARTS: dict[str, Callable[[], Figures]] = {"agreement": agreement, "loss": loss, "cost": cost}


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these parts only")
    flags = parser.parse_args()
    bars = [bar for bar in (*BARS, *([GPU_BAR] if DEVICE == "cuda" else [])) if bar.figure.split("/")[0] in flags.only]

    def measure() -> Figures:
        figures: dict[str, float | int | str] = {}
        for name in flags.only:
            figures.update(PARTS[name]())
        return figures

    is_whole = set(flags.only) == set(PARTS)
    return verify("sparse_attention", measure, bars=bars, save=flags.save and is_whole)


if __name__ == "__main__":
    sys.exit(main())
