"""Cached sampling against recomputing everything for each token: the same tokens and logits, and how much faster.

Command: make verify NAME=decoding
A GPT of 4 layers of 256 with random weights (their scale is raised so that logits differ clearly) draws 16 x 16 codes
for prompts of different lengths, 20 seeds. The other side feeds the whole sequence anew for each token and keeps
nothing. Logits are compared along one sequence: prompt at once, then token by token.
"""

import time

import torch
from torch import Tensor

from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.models.gpt import GPT, GPTConfig, KeyValueCache
from cogview.sampling.autoregressive import generate_codes
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws
from cogview.sequences.layout import TASKS
from cogview.tokenizers.vocabulary import Vocabulary

GRID, SEEDS = 16, 20
NUM_TOKENS = GRID * GRID
VOCABULARY = Vocabulary(1024, 2000)
SAMPLING = SamplingConfig(top_k=200)
BARS = (
    Bar(figure="tokens/different", op="==", value=0),
    Bar(figure="tokens/compared", op=">=", value=SEEDS * NUM_TOKENS),
    Bar(figure="logits/max_difference", op="<=", value=1e-4),
)


def measure(*, threads: int) -> Figures:
    """Tokens that differ, the largest difference of logits, and tokens per second of both sides."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=VOCABULARY.size,
            max_positions=NUM_TOKENS + 72,
            num_layers=4,
            hidden_size=256,
            num_heads=4,
            init_std=0.06,
        )
    ).eval()
    prompts = [prompt(length=4 + 3 * seed) for seed in range(SEEDS)]
    say("drawing with the cache")
    started = time.perf_counter()
    cached = generate(model, prompts)
    cached_seconds = time.perf_counter() - started
    say("drawing without it")
    started = time.perf_counter()
    recomputed = torch.stack([recompute(model, ids, seed=seed) for seed, ids in enumerate(prompts)])
    recomputed_seconds = time.perf_counter() - started
    started = time.perf_counter()
    generate(model, prompts[:1] * 8)
    shared_seconds = time.perf_counter() - started
    difference, largest = logits_difference(model, [*prompts[0], *recomputed[0].tolist()], prefilled=len(prompts[0]))
    return {
        "tokens/different": int((cached != recomputed).sum()),
        "tokens/compared": cached.numel(),
        "tokens/distinct": len(set(cached.flatten().tolist())),
        "logits/max_difference": difference,
        "logits/max_magnitude": largest,
        "tokens_per_second/cached_batch_20": cached.numel() / cached_seconds,
        "tokens_per_second/cached_8_of_one_prompt": 8 * NUM_TOKENS / shared_seconds,
        "tokens_per_second/recomputed_batch_1": recomputed.numel() / recomputed_seconds,
    }


def prompt(*, length: int) -> list[int]:
    """A prompt with so many text tokens."""
    text = torch.randint(len(VOCABULARY.text_ids), (length,)).tolist()
    return TASKS["text_to_image"].prompt_ids(text, vocabulary=VOCABULARY, max_text=64)


def generate(model: GPT, prompts: list[list[int]]) -> Tensor:
    """Codes [B, T] with the cache, all prompts in one batch."""
    seeds = list(range(len(prompts)))
    return generate_codes(model, prompts, vocabulary=VOCABULARY, grid=GRID, sampling=SAMPLING, seeds=seeds).flatten(1)


@torch.inference_mode()
def recompute(model: GPT, ids: list[int], *, seed: int) -> Tensor:
    """Codes [T] of one prompt, the whole sequence fed anew for every token."""
    draws = uniform_draws([seed], length=NUM_TOKENS, device=torch.device("cpu"))
    known = torch.tensor([ids])
    for token in range(NUM_TOKENS):
        hidden = model(known, torch.arange(known.shape[1])[None])[:, -1]
        code = choose(model.logits(hidden, ids=VOCABULARY.image_ids).float(), draws[:, token], config=SAMPLING)
        known = torch.cat([known, code[:, None] + VOCABULARY.image_ids.start], dim=1)
    return known[0, len(ids) :] - VOCABULARY.image_ids.start


@torch.inference_mode()
def logits_difference(model: GPT, ids: list[int], *, prefilled: int) -> tuple[float, float]:
    """Largest |difference| of logits between one pass and prefill + decode, and the largest |logit|."""
    known, places = torch.tensor([ids]), torch.arange(len(ids))[None]
    whole = model.logits(model(known, places))
    cache = KeyValueCache(model.config, batch=1, length=len(ids), dtype=torch.float32, device=torch.device("cpu"))
    parts = [model(known[:, :prefilled], places[:, :prefilled], cache=cache)]
    for token in range(prefilled, len(ids)):
        parts.append(model(known[:, token : token + 1], places[:, token : token + 1], cache=cache))
    stepwise = model.logits(torch.cat(parts, dim=1))
    return float((whole - stepwise).abs().max()), float(whole.abs().max())


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    flags = parser.parse_args()
    return verify("decoding", lambda: measure(threads=flags.threads), bars=BARS, save=flags.save)


if __name__ == "__main__":
    raise SystemExit(main())
