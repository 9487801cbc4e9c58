"""Tokens and images per second of our sampling beside transformers' GPT-2, DALLE-pytorch, and CogView's own way.

Command: make verify NAME=generation_speed
All have 6 layers of 384 in 6 heads, one vocabulary, fp32 and random weights, and draw 256 image tokens with top-k 200
after a prompt of 64 tokens, another for each row. GPT-2 runs transformers' `generate` with its cache and torch's fused
attention. DALLE-pytorch 1.6.6 drops the cache that one asks `generate_images` for when there is no guidance; here it is
passed on, and as it is it runs for a single image alone. CogView's way keeps the inputs of all layers and makes keys
and values of all of them anew for every token, as the released code does, by torch's own products; it draws with our
weights and seeds, so its tokens have to be ours. The contenders take turns: a rate is of the median turn, and a ratio
the median of those within a turn, so that a machine that slows down slows all of them.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cogview_memory import CogViewMemory
from benchmarks.harness import Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.rivals import installed
from benchmarks.train_speed import HEADS, IMAGE_IDS, IMAGE_SIDE, LAYERS, RIVALS, TEXT, TEXT_IDS, WIDTH, dalle_model
from cogview.models.gpt import GPT, GPTConfig
from cogview.sampling.autoregressive import generate_codes
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws
from cogview.sequences.layout import TASKS
from cogview.tokenizers.vocabulary import Vocabulary

NUM_TOKENS = IMAGE_SIDE**2
SAMPLING = SamplingConfig(top_k=200)
VOCABULARY = Vocabulary(IMAGE_IDS, TEXT_IDS)
BATCHES = (1, 8, 60)
LARGEST = {"cogview": 8, "dalle_as_is": 1}  # images at once; beyond, a turn would take minutes
BARS = (
    *(Bar(figure=f"batch_{batch}/ratio_to_gpt2", op=">=", value=1.3) for batch in BATCHES),
    *(Bar(figure=f"batch_{batch}/ratio_to_dalle", op=">=", value=2) for batch in BATCHES),
    Bar(figure="batch_1/ratio_to_cogview", op=">=", value=5),
    Bar(figure="batch_8/ratio_to_cogview", op=">=", value=15),
    Bar(figure="tokens_unlike_cogview", op="==", value=0),
)
Draw = Callable[[int], Tensor]  # number of images -> their codes [B, T]


def measure(*, turns: int, threads: int, batches: Sequence[int]) -> Figures:
    """Rates of each contender at each batch size, and ratios."""
    torch.set_num_threads(threads)
    sys.path.append(str(installed(RIVALS)))
    torch.manual_seed(0)
    model = our_model()
    contenders: dict[str, Draw] = {
        "ours": lambda batch: our_codes(model, batch),
        "gpt2": gpt2(),
        "dalle": dalle(),
        "cogview": lambda batch: cogview_codes(model, batch),
        "dalle_as_is": dalle(is_cached=False),
    }
    figures: dict[str, float | int | str] = {"threads": torch.get_num_threads(), "turns": turns}
    for batch in batches:
        taking = {name: draw for name, draw in contenders.items() if batch <= LARGEST.get(name, batch)}
        drawn, seconds = take_turns(taking, batch=batch, turns=turns)
        figures |= figures_of(seconds, batch=batch)
        if "cogview" in drawn:
            different = int((drawn["ours"] != drawn["cogview"]).sum())
            figures["tokens_unlike_cogview"] = int(figures.get("tokens_unlike_cogview", 0)) + different
    return figures


def take_turns(
    contenders: Mapping[str, Draw], *, batch: int, turns: int
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """The last codes of each, and the seconds of each turn; the contenders one after another, again and again."""
    drawn: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        say(f"batch {batch}: turn {turn + 1} of {turns}")
        for name, draw in contenders.items():
            torch.manual_seed(turn)
            started = time.perf_counter()
            drawn[name] = draw(batch)
            seconds[name].append(time.perf_counter() - started)
            if drawn[name].shape != (batch, NUM_TOKENS):
                raise UnmeasuredError(f"{name} drew {tuple(drawn[name].shape)}, not {batch} x {NUM_TOKENS} tokens")
    return drawn, seconds


def figures_of(seconds: Mapping[str, list[float]], *, batch: int) -> Figures:
    """Medians and ratios of one batch size."""
    figures: dict[str, float | int | str] = {}
    for name, times in seconds.items():
        figures[f"batch_{batch}/tokens_per_second/{name}"] = batch * NUM_TOKENS / statistics.median(times)
    figures[f"batch_{batch}/images_per_second/ours"] = batch / statistics.median(seconds["ours"])
    for name in seconds.keys() - {"ours"}:
        turns = zip(seconds[name], seconds["ours"], strict=True)
        figures[f"batch_{batch}/ratio_to_{name}"] = statistics.median(theirs / mine for theirs, mine in turns)
    return figures


def our_model() -> GPT:
    """CogView's GPT with Sandwich-LN and pre-scaled norms."""
    config = GPTConfig(
        vocab_size=VOCABULARY.size,
        max_positions=TEXT + NUM_TOKENS,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_heads=HEADS,
    )
    return GPT(config).eval()


def our_codes(model: GPT, batch: int) -> Tensor:
    """Codes [B, T] by the sampling that `make generate` uses."""
    seeds = list(range(batch))
    codes = generate_codes(
        model, prompts(batch), vocabulary=VOCABULARY, grid=IMAGE_SIDE, sampling=SAMPLING, seeds=seeds
    )
    return codes.flatten(1)


def prompts(batch: int) -> list[list[int]]:
    """Different prompts of 64 tokens: ROI1, 61 of text, BASE, BOI1."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(TEXT_IDS, (batch, TEXT - 3), generator=generator).tolist()
    return [TASKS["text_to_image"].prompt_ids(text, vocabulary=VOCABULARY, max_text=TEXT) for text in texts]


@torch.inference_mode()
def cogview_codes(model: GPT, batch: int) -> Tensor:
    """Codes [B, T] the released way: only the layers' inputs are kept, and all ids are scored."""
    draws = uniform_draws(list(range(batch)), length=NUM_TOKENS, device=torch.device("cpu"))
    ids, start = torch.tensor(prompts(batch)), 0
    memory = CogViewMemory(model, batch=batch)
    codes: list[Tensor] = []
    for token in range(NUM_TOKENS):
        positions = torch.arange(start, start + ids.shape[1]).expand(batch, -1)
        logits = memory.read(ids, positions) @ model.word_embeddings.weight.T
        codes.append(choose(logits[:, : VOCABULARY.image_ids.stop].float(), draws[:, token], config=SAMPLING))
        start, ids = start + ids.shape[1], codes[-1][:, None]
    return torch.stack(codes, dim=1)


def gpt2() -> Draw:
    """transformers' `generate`: keys and values cached, torch's fused attention, top-k."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TEXT_IDS + IMAGE_IDS,
        n_positions=TEXT + NUM_TOKENS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()

    def draw(batch: int) -> Tensor:
        ids = torch.randint(config.vocab_size, (batch, TEXT))
        drawn: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=SAMPLING.top_k,
            max_new_tokens=NUM_TOKENS,
            use_cache=True,
        )
        return drawn[:, TEXT:]

    return draw


def dalle(*, is_cached: bool = True) -> Draw:
    """DALLE-pytorch's `generate_images`; its tiny decoder's pictures are left aside for the codes that it decodes."""
    model: Any = dalle_model().eval()
    model.vae.decode = lambda codes: codes
    if is_cached:

        def cached(*inputs: Tensor, cond_scale: float, cache: dict[str, Any]) -> Any:
            return model(*inputs, cache=cache)

        model.forward_with_cond_scale = cached
    share = 1 - (SAMPLING.top_k + 0.5) / model.total_tokens  # of the ids that top-k leaves out

    def draw(batch: int) -> Tensor:
        text = torch.randint(1, TEXT_IDS - TEXT, (batch, TEXT))
        codes: Tensor = model.generate_images(text, filter_thres=share, use_cache=True)
        return codes

    return draw


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="images at once (default: 1 8 60)")
    flags = parser.parse_args()

    def work() -> Figures:
        return measure(turns=flags.turns, threads=flags.threads, batches=flags.batches)

    return verify("generation_speed", work, bars=BARS, save=flags.save)


if __name__ == "__main__":
    raise SystemExit(main())
