"""Super-resolution in seven calls beside the sliding window: what is drawn, how often a model is called, and seconds.

Command: make verify NAME=lopar [ARGS="--only counts road"]
*Counts*: how many codes each pass of LoPAR draws of 60 x 60, as the sampler asks its model, against the numbers of
CogView2's release; calls of the model. *Road*: from captions to pictures of 60 x 60 codes, in the same run with models
of equal layers and width: CogView's road draws 30 x 30 codes one by one and magnifies them with windows, as its release
does; CogView2's draws 20 x 20 codes, then the direct stage and the six passes of the iterative one. CogView's road is
gone twice: with the keys and values that we keep of each window, and as the release computes it, which keeps
the layers' inputs and projects all of them anew for every code. Super-resolution is compared by itself, from small
picture to large one, and the whole road from the caption; beside seconds there are those of the processor, which other
work on the machine does not change. Weights are new: what a model draws changes no step of either road. Operations are
those of the layers' matrices.

Beside our windows LoPAR saves calls, not arithmetic: each of its calls computes all codes of the picture, twice as many
operations in all. So what it gains there is what a call costs beyond its arithmetic: on a GPU most of it, on a CPU
little, where the bars of ten times are not met. Both roads draw the small picture code by code, which bounds the whole
road by the number of calls.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.cogview_memory import CogViewMemory
from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.local_super_resolution import LocalSuperResolution, LocalSuperResolutionConfig, Stage
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws
from cogview.sampling.filling import fill_codes
from cogview.sampling.hierarchy import LoPARConfig, StageModel, chooser, draw_directly, refine
from cogview.sampling.lopar import codes_drawn
from cogview.sampling.windows import SCALE, new_codes, plan_windows
from cogview.sequences.layout import TASKS
from cogview.sequences.picture_context import gpt_form
from cogview.tokenizers.vocabulary import Vocabulary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID, RATIO = 60, 3
SIDE = 16  # of the squares that CogView's windows read
RELEASED_COUNTS = [2300, 1900, 1500, 1000, 600, 200]
VOCABULARY = Vocabulary(8192, 2000)
TEXT = [list(range(20))]
SAMPLING = SamplingConfig()
IsNew = npt.NDArray[np.bool_]  # of the codes, [T]
Fill = Callable[[GPT, Sequence[int], Tensor, IsNew], Tensor]  # behind a prompt, codes [1, T] with the new ones drawn
BARS = (
    Bar(figure="counts/as released", op="==", value=1),
    Bar(figure="counts/calls of the iterative stage", op="==", value=6),
    Bar(figure="counts/codes drawn again one by one", op="==", value=3600),
    Bar(figure="road/pictures of 60 x 60 codes", op="==", value=3),
    Bar(figure="road/super-resolution, times faster than as released", op=">=", value=10),
    Bar(figure="road/from the caption, times faster than as released", op=">=", value=10),
    Bar(figure="road/super-resolution, times faster than our windows", op=">=", value=10),
    Bar(figure="road/from the caption, times faster than our windows", op=">=", value=10),
)


@dataclass(frozen=True, kw_only=True)
class Road:
    """How one road went. small, large: seconds to the small picture, and from there; cpu: those of the processor.

    calls: of a model; tokens: that went through its layers; codes: of the picture.
    """

    small: float
    large: float
    cpu: float
    calls: int
    tokens: int
    codes: Tensor


def counts(config: GPTConfig) -> Figures:
    """What the sampler asks of a model that is small, over 60 x 60 codes."""
    small = replace(config, num_layers=1, hidden_size=16, num_heads=1)
    stage = stage_of("iterative", small)
    asked: list[int] = []
    mask = stage.form.mask_id
    watch = stage.model.register_forward_pre_hook(
        lambda module, inputs, named: asked.append(int((named["grid_ids_BN"] == mask).sum())), with_kwargs=True
    )
    codes_BGG = torch.zeros(1, GRID, GRID, dtype=torch.int64, device=DEVICE)
    refine(stage, TEXT, codes_BGG, seeds=[1], config=LoPARConfig())
    watch.remove()
    say(f"codes drawn in each pass: {asked}")
    return {
        "counts/as released": int(asked == RELEASED_COUNTS == codes_drawn(GRID, GRID)),
        "counts/calls of the iterative stage": len(asked),
        "counts/codes drawn again one by one": codes_BGG.numel(),
        **{f"counts/pass {number}": count for number, count in enumerate(asked, start=1)},
    }


def road(config: GPTConfig) -> Figures:
    """All roads from a caption to a picture."""
    roads = {
        "lopar": lopar_road(config),
        "windows": windows_road(config, fill=fill_as_ours),
        "windows as released": windows_road(config, fill=fill_as_released),
    }
    for name, one in roads.items():
        say(f"{name}: {one.small:.2f} s and {one.large:.2f} s, {one.calls} calls, {one.tokens} tokens")
    weights = config.num_layers * 12 * config.hidden_size**2
    lopar = roads["lopar"]
    figures: dict[str, float | int | str] = {
        "road/times fewer calls": roads["windows"].calls / lopar.calls,
        "road/device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "road/layers": config.num_layers,
        "road/width": config.hidden_size,
        "road/pictures of 60 x 60 codes": sum(one.codes.shape[1:] == (GRID, GRID) for one in roads.values()),
        "road/codes of our windows that are not as released": int(
            (roads["windows"].codes != roads["windows as released"].codes).sum()
        ),
    }
    for name, words in (("windows", "than our windows"), ("windows as released", "than as released")):
        one = roads[name]
        figures |= {
            f"road/super-resolution, times faster {words}": one.large / lopar.large,
            f"road/from the caption, times faster {words}": (one.small + one.large) / (lopar.small + lopar.large),
            f"road/from the caption, times less processor time {words}": one.cpu / lopar.cpu,
        }
    for name, one in roads.items():
        figures[f"road/{name}/seconds, small picture"] = one.small
        figures[f"road/{name}/seconds, super-resolution"] = one.large
        figures[f"road/{name}/seconds of the processor"] = one.cpu
        if one.calls:  # those of the released way, which goes past the model's own forward, are those of the windows
            figures[f"road/{name}/calls"] = one.calls
            figures[f"road/{name}/tokens through the layers"] = one.tokens
            figures[f"road/{name}/operations"] = 2.0 * weights * one.tokens
    return figures


def windows_road(config: GPTConfig, *, fill: Fill) -> Road:
    """CogView's: the small picture code by code, then window after window, code by code."""
    model, side = gpt_of(config, max_positions=1400), GRID // SCALE
    layout, budget = TASKS["super_resolution"], len(TEXT[0])

    def magnify(small_Bhw: Tensor) -> Tensor:
        large_Bhw = torch.zeros(1, GRID, GRID, dtype=torch.int64, device=DEVICE)
        windows = plan_windows(side, side, side=SIDE)
        for window, is_new in zip(windows, new_codes(windows, height=side, width=side), strict=True):
            rows, columns = window.drawn
            square = small_Bhw[0, *window.read].flatten().cpu().numpy()
            prompt = layout.prompt_ids(TEXT[0], [square], vocabulary=VOCABULARY, max_text=budget)
            drawn_BT = fill(model, prompt, large_Bhw[:, rows, columns].flatten(1), is_new.ravel())
            large_Bhw[:, rows, columns] = drawn_BT.view(1, *is_new.shape)
        return large_Bhw

    return timed(model, side, magnify, [model], length_of=lambda inputs, _: inputs[0].numel(), fill=fill)


def fill_as_ours(model: GPT, prompt: Sequence[int], codes_BT: Tensor, is_new_T: IsNew) -> Tensor:
    """Codes [1, T] with the new ones drawn behind a prompt, keys and values kept."""
    return fill_codes(
        model,
        [prompt],
        codes_BT,
        is_new_T=is_new_T,
        prompts_positions=[list(range(len(prompt)))],
        draws_BN=draws_for(is_new_T),
        vocabulary=VOCABULARY,
        sampling=SAMPLING,
    )


@torch.inference_mode()
def fill_as_released(model: GPT, prompt: Sequence[int], codes_BT: Tensor, is_new_T: IsNew) -> Tensor:
    """The same with only the layers' inputs kept and all ids scored."""
    memory, filled_BT, read = CogViewMemory(model, batch=1), codes_BT.clone(), 0
    ids, draws_BN = torch.tensor([prompt], device=DEVICE), draws_for(is_new_T)
    last_BE = memory.read(ids, torch.arange(len(prompt), device=DEVICE)[None])
    for number, token in enumerate(np.flatnonzero(is_new_T).tolist()):
        if token > read:
            ids = filled_BT[:, read:token] + VOCABULARY.image_ids.start
            last_BE = memory.read(ids, torch.arange(len(prompt) + read, len(prompt) + token, device=DEVICE)[None])
            read = token
        logits_BV = (last_BE @ model.word_embeddings.weight.T)[:, : VOCABULARY.image_ids.stop].float()
        filled_BT[:, token] = choose(logits_BV, draws_BN[:, number], config=SAMPLING)
    return filled_BT


def draws_for(is_new_T: IsNew) -> Tensor:
    """A number for each new code, float64 [1, N]."""
    return uniform_draws([1], length=int(is_new_T.sum()), device=torch.device(DEVICE))


def lopar_road(config: GPTConfig) -> Road:
    """CogView2's: a smaller picture code by code, then all at once, then most of it again in six passes."""
    direct, iterative = stage_of("direct", config), stage_of("iterative", config)
    painter = gpt_of(config, max_positions=1400)

    def magnify(small_Bhw: Tensor) -> Tensor:
        large_BGG = draw_directly(direct, TEXT, small_Bhw, seeds=[1], choose=chooser(SAMPLING))
        return refine(iterative, TEXT, large_BGG, seeds=[2], config=LoPARConfig())

    def length_of(inputs: Sequence[Tensor], named: dict[str, Tensor]) -> int:
        return inputs[0].numel() + (named["grid_ids_BN"].numel() if "grid_ids_BN" in named else 0)

    models = [painter, direct.model, iterative.model]
    return timed(painter, GRID // RATIO, magnify, models, length_of=length_of, fill=fill_as_ours)


def timed(
    painter: GPT,
    small_grid: int,
    magnify: Callable[[Tensor], Tensor],
    models: Sequence[nn.Module],
    *,
    length_of: Callable[[Sequence[Tensor], dict[str, Tensor]], int],
    fill: Fill,
) -> Road:
    """One road, once to warm up where kernels are compiled, and once to count."""
    lengths: list[int] = []
    if DEVICE == "cuda":
        magnify(draw_small(painter, grid=small_grid, fill=fill))
    hooks = [
        model.register_forward_pre_hook(
            lambda module, inputs, named: lengths.append(length_of(inputs, named)), with_kwargs=True
        )
        for model in models
    ]
    started, worked = now(), time.process_time()
    small_Bhw = draw_small(painter, grid=small_grid, fill=fill)
    between = now()
    codes = magnify(small_Bhw)
    ended = now()
    cpu = time.process_time() - worked
    for hook in hooks:
        hook.remove()
    return Road(
        small=between - started, large=ended - between, cpu=cpu, calls=len(lengths), tokens=sum(lengths), codes=codes
    )


def now() -> float:
    """The time, once the device has done what it was asked."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def draw_small(model: GPT, *, grid: int, fill: Fill) -> Tensor:
    """Codes [1, grid, grid], one by one."""
    prompt = TASKS["text_to_image"].prompt_ids(TEXT[0], vocabulary=VOCABULARY, max_text=len(TEXT[0]))
    empty_BT = torch.zeros(1, grid**2, dtype=torch.int64, device=DEVICE)
    return fill(model, prompt, empty_BT, np.ones(grid**2, dtype=bool)).view(1, grid, grid)


def gpt_of(config: GPTConfig, *, max_positions: int) -> GPT:
    """A model with new weights; bf16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = GPT(replace(config, vocab_size=VOCABULARY.size, max_positions=max_positions)).eval()
    return model.bfloat16() if DEVICE == "cuda" else model


def stage_of(stage: Stage, config: GPTConfig) -> StageModel:
    """A stage with new weights."""
    gpt = gpt_of(config, max_positions=512)
    with torch.device(DEVICE):
        model = LocalSuperResolution(gpt, LocalSuperResolutionConfig(stage=stage, grid=GRID, ratio=RATIO)).eval()
    model = model.to(gpt.word_embeddings.weight.dtype)
    form = gpt_form(VOCABULARY, length=400 + 4 + len(TEXT[0]), grid=GRID // RATIO, is_image_fixed=True)
    return StageModel(model=model, form=form, image_ids=VOCABULARY.image_ids)


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parts: dict[str, Callable[[GPTConfig], Figures]] = {"counts": counts, "road": road}
    is_gpu = DEVICE == "cuda"
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="parts to measure")
    parser.add_argument("--layers", type=int, default=48 if is_gpu else 3, help="of the models (GPU: 48, CPU: 3)")
    parser.add_argument("--width", type=int, default=2560 if is_gpu else 128, help="their width (GPU: 2560, CPU: 128)")
    flags = parser.parse_args()
    torch.set_num_threads(1)  # a second one waits for whatever else the machine does
    heads = max(1, flags.width // 64)
    config = GPTConfig(num_layers=flags.layers, hidden_size=flags.width, num_heads=heads, dropout=0.0)
    bars = [bar for bar in BARS if bar.figure.split("/")[0] in flags.only]
    measure = {name: part for name, part in parts.items() if name in flags.only}
    return verify(
        "lopar",
        lambda: {key: value for part in measure.values() for key, value in part(config).items()},
        bars=bars,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
