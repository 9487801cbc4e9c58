"""Training steps per second of our GPT beside transformers' GPT-2 and DALLE-pytorch, at the same depth and width.

Command: make verify NAME=train_speed
All have 6 layers of 384 in 6 heads, one vocabulary, rows of 64 text and 256 image tokens, fp32, no dropout, AdamW and
the same batch; a step is forward, loss, backward and update. Ours has twice the norms of the others (Sandwich-LN), with
pre-scaled inputs; it runs as is and with `torch.compile`. DALLE runs with its defaults, which shift tokens and rotate
queries and keys, and plain, without both. The contenders take turns, a few steps each: a rate is of the median turn,
and a ratio the median of those within a turn, so that a machine that slows down slows all of them.
"""

import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.harness import Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.rivals import installed
from cogview.models.gpt import GPT, GPTConfig
from cogview.training.language_model import LanguageModelLoss

LAYERS, WIDTH, HEADS = 6, 384, 6
TEXT, IMAGE_SIDE = 64, 16
LENGTH = TEXT + IMAGE_SIDE**2
TEXT_IDS, IMAGE_IDS = 7168, 1024
BATCH = 8
STEPS_PER_TURN, WARMUP = 3, 2
RIVALS = (
    *("transformers==4.57.1", "tokenizers==0.22.1", "huggingface-hub==0.36.0", "safetensors==0.6.2", "regex", "tqdm"),
    *("dalle-pytorch==1.6.6", "axial-positional-embedding==0.2.1", "rotary-embedding-torch==0.2.1", "einops==0.8.1"),
    *("omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "setuptools<80"),
)
BARS = (
    Bar(figure="ratio/compiled_to_gpt2", op=">=", value=1.1),
    Bar(figure="ratio/compiled_to_dalle", op=">=", value=1.5),
)
Step = Callable[[], Tensor]


def measure(*, turns: int, threads: int) -> Figures:
    """Tokens per second of each contender, and the ratios."""
    torch.set_num_threads(threads)
    sys.path.append(str(installed(RIVALS)))
    contenders: dict[str, Callable[[], Step]] = {
        "ours": our_step,
        "compiled": lambda: our_step(compiled=True),
        "gpt2": gpt2_step,
        "gpt2_compiled": lambda: gpt2_step(compiled=True),
        "dalle": dalle_step,
        "dalle_plain": lambda: dalle_step(is_plain=True),
    }
    steps = {}
    for name, build in contenders.items():
        say(f"{name}: building and warming up")
        torch.manual_seed(0)
        steps[name] = build()
        for _ in range(WARMUP):
            steps[name]()
    return figures_of(take_turns(steps, turns=turns))


def take_turns(steps: Mapping[str, Step], *, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn's steps, the contenders one after another, again and again."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        for name, step in steps.items():
            started = time.perf_counter()
            losses = [step() for _ in range(STEPS_PER_TURN)]
            seconds[name].append(time.perf_counter() - started)
            if not torch.stack(losses).isfinite().all():
                raise UnmeasuredError(f"{name}: the loss is not finite")
    return seconds


def figures_of(seconds: Mapping[str, list[float]]) -> Figures:
    """Medians and ratios."""
    tokens = STEPS_PER_TURN * BATCH * LENGTH
    rate = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    figures: dict[str, float | int | str] = {f"tokens_per_second/{name}": value for name, value in rate.items()}
    for ours in ("ours", "compiled"):
        for rival in ("gpt2", "gpt2_compiled", "dalle", "dalle_plain"):
            turns = zip(seconds[rival], seconds[ours], strict=True)
            figures[f"ratio/{ours}_to_{rival}"] = statistics.median(theirs / mine for theirs, mine in turns)
    return {**figures, "batch": BATCH, "length": LENGTH, "threads": torch.get_num_threads()}


def optimized(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A step: the same optimizer for all."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    return step


def our_step(*, compiled: bool = False) -> Step:
    """CogView's GPT with Sandwich-LN, pre-scaled norms and the loss of the training loop."""
    vocabulary = TEXT_IDS + IMAGE_IDS
    config = GPTConfig(
        vocab_size=vocabulary,
        max_positions=LENGTH,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_heads=HEADS,
        dropout=0.0,
        embedding_gradient=1.0,
    )
    gpt = GPT(config)
    if compiled:
        gpt.compile_layers()
    model = LanguageModelLoss(gpt)
    ids, positions = torch.randint(vocabulary, (BATCH, LENGTH)), torch.arange(LENGTH).expand(BATCH, LENGTH)
    image_part = positions >= TEXT

    def loss() -> Tensor:
        result = model(
            ids=ids,
            positions=positions,
            labels=ids.roll(-1, dims=1),
            loss_weights=torch.ones(ids.shape),
            image_part=image_part,
        )
        total: Tensor = result.loss_sum
        return total / ids.numel()

    return optimized(model, loss)


def gpt2_step(*, compiled: bool = False) -> Step:
    """transformers' GPT2LMHeadModel on torch's fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TEXT_IDS + IMAGE_IDS,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config)
    if compiled:
        model.compile()
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    return optimized(model, lambda: model(input_ids=ids, labels=ids).loss)


def dalle_step(*, is_plain: bool = False) -> Step:
    """DALLE-pytorch's DALLE on codes, with its own losses: by its defaults, or without shifted tokens and rotation."""
    model = dalle_model(is_plain=is_plain)
    text = torch.randint(1, TEXT_IDS - TEXT, (BATCH, TEXT))
    codes = torch.randint(IMAGE_IDS, (BATCH, IMAGE_SIDE**2))
    return optimized(model, lambda: model(text, codes, return_loss=True))


def dalle_model(*, is_plain: bool = False) -> nn.Module:
    """DALLE-pytorch's DALLE of our size."""
    # Its package imports taming's VQGAN, and with it PyTorch Lightning and torchvision, for a class not used here.
    unused = types.ModuleType("taming.models.vqgan")
    unused.__dict__.update(VQModel=None, GumbelVQ=None)
    sys.modules.update({"taming": types.ModuleType("taming"), "taming.models": unused, "taming.models.vqgan": unused})
    from dalle_pytorch import DALLE, DiscreteVAE

    vae = DiscreteVAE(image_size=IMAGE_SIDE * 2, num_layers=1, num_tokens=IMAGE_IDS, codebook_dim=16, hidden_dim=16)
    model: nn.Module = DALLE(
        dim=WIDTH,
        vae=vae,
        num_text_tokens=TEXT_IDS - TEXT,  # it adds an id of its own for the padding at each text position
        text_seq_len=TEXT,
        depth=LAYERS,
        heads=HEADS,
        dim_head=WIDTH // HEADS,
        shift_tokens=not is_plain,
        rotary_emb=not is_plain,
    )
    return model


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--turns", type=int, default=10, help="turns of each contender (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    flags = parser.parse_args()
    return verify("train_speed", lambda: measure(turns=flags.turns, threads=flags.threads), bars=BARS, save=flags.save)


if __name__ == "__main__":
    raise SystemExit(main())
