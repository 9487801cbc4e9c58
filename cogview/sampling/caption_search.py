"""Writing captions with a captioner: drawn token by token, or searched for with beams.

In: a captioner (`cogview.sampling.captioning`) and image codes. Out: captions with their log-probabilities.
"""

# B images, W beams of each, R rows (B, or B x W), K choices: the pieces of text and the end, h w grid

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.sampling.captioning import Caption, CaptionModel, Language
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws


@dataclass(frozen=True, kw_only=True)
class BeamConfig:
    """width: how many beginnings of each caption are followed.

    length_power: captions are compared by log-probability / tokens ** length_power; 0 prefers short ones.
    """

    width: int = 5
    length_power: float = 1.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width={self.width}: follow 1 caption or more")
        if not 0 <= self.length_power <= 2:
            raise ConfigError(f"length_power={self.length_power}: choose a number from 0 to 2")


@torch.inference_mode()
def draw_captions(
    captioner: CaptionModel,
    codes_Bhw: Tensor,
    *,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    language: Language = "any",
) -> list[Caption]:
    """One caption for each image, drawn with its seed; temperature 0 is greedy. An image that comes again is read once.

    ConfigError unless there are as many seeds as images.
    """
    if len(seeds) != len(codes_Bhw):
        raise ConfigError(f"{len(seeds)} seeds for {len(codes_Bhw)} images; give one for each")
    reading, allowed_K = captioner.begin(codes_Bhw, language=language), captioner.allowed(language)
    draws_BT = uniform_draws(list(seeds), length=captioner.max_text, device=allowed_K.device)
    totals_B = torch.zeros(len(seeds), device=allowed_K.device)
    is_open_B = torch.ones(len(seeds), dtype=torch.bool, device=allowed_K.device)
    chosen: list[Tensor] = []
    for step in range(captioner.max_text):
        if step:
            captioner.advance(reading, chosen[-1])
        logits_BK = captioner.logits(reading)
        masked_BK = logits_BK.masked_fill(~_possible(allowed_K, captioner, step=step), -torch.inf)
        chosen.append(choose(masked_BK, draws_BT[:, step], config=sampling))
        chances_B = logits_BK.log_softmax(dim=-1).gather(1, chosen[-1][:, None])[:, 0]
        totals_B = totals_B + chances_B * is_open_B
        is_open_B = is_open_B & (chosen[-1] != captioner.end)
        if not is_open_B.any():
            break
    rows = zip(torch.stack(chosen, dim=1).tolist(), totals_B.tolist(), strict=True)
    return [captioner.caption(choices, log_probability=total) for choices, total in rows]


@torch.inference_mode()
def search_captions(
    captioner: CaptionModel, codes_Bhw: Tensor, *, beams: BeamConfig, language: Language = "any"
) -> list[list[Caption]]:
    """For each image up to `beams.width` captions, the best first, found by following the likeliest beginnings."""
    width, images = beams.width, len(codes_Bhw)
    reading = captioner.begin(codes_Bhw.repeat_interleave(width, dim=0), language=language)
    allowed_K = captioner.allowed(language)
    # At first all beams of an image are alike, so all but one of them are ruled out.
    start = [_Beam(row=0, choices=(), total=-torch.inf if beam else 0.0) for beam in range(width)]
    live, done = [start] * images, [[] for _ in range(images)]  # type: list[list[_Beam]], list[list[_Beam]]
    for step in range(captioner.max_text):
        if step:
            rows_R = [beam.row for going in live for beam in going]
            reading.follow(torch.tensor(rows_R, device=allowed_K.device), captioner=captioner)
            last_R = [beam.choices[-1] for going in live for beam in going]
            captioner.advance(reading, torch.tensor(last_R, device=allowed_K.device))
        chances_RK = captioner.logits(reading).log_softmax(dim=-1)
        chances_RK = chances_RK.masked_fill(~_possible(allowed_K, captioner, step=step), -torch.inf)
        for image, chances_WK in enumerate(chances_RK.view(images, width, -1)):
            grown = _grow(live[image], chances_WK, first_row=image * width)
            done[image] += [beam for beam in grown if beam.choices[-1] == captioner.end]
            live[image] = [beam for beam in grown if beam.choices[-1] != captioner.end][:width]
        if all(_is_settled(*pair, beams=beams) for pair in zip(done, live, strict=True)):
            break
    found = []
    for ended, going in zip(done, live, strict=True):
        cut = [] if len(ended) >= width else going
        possible = [beam for beam in [*ended, *cut] if beam.total > -torch.inf]
        ranked = sorted(possible, key=lambda beam: -beam.score(beams.length_power))
        found.append([captioner.caption(beam.choices, log_probability=beam.total) for beam in ranked[:width]])
    return found


@dataclass(frozen=True, kw_only=True)
class _Beam:
    """A beginning of a caption. row: of the batch that it was read in; total: its log-probability."""

    row: int
    choices: tuple[int, ...]
    total: float

    def score(self, length_power: float) -> float:
        return self.total / float(max(1, len(self.choices)) ** length_power)


def _grow(live: Sequence[_Beam], chances_WK: Tensor, *, first_row: int) -> list[_Beam]:
    """The likeliest continuations by one choice, best first: twice as many as beams, for up to half of them end."""
    totals_W1 = torch.tensor([[beam.total] for beam in live], device=chances_WK.device)
    num_choices = chances_WK.shape[1]
    best = (totals_W1 + chances_WK).flatten().topk(2 * len(live))
    return [
        _Beam(
            row=first_row + place // num_choices,
            choices=(*live[place // num_choices].choices, place % num_choices),
            total=total,
        )
        for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _is_settled(done: Sequence[_Beam], live: Sequence[_Beam], *, beams: BeamConfig) -> bool:
    """Whether there are enough whole captions, none of which is worse than the best of the unfinished ones."""
    if len(done) < beams.width:
        return False
    scores = sorted((beam.score(beams.length_power) for beam in done), reverse=True)
    return scores[beams.width - 1] >= max(beam.score(beams.length_power) for beam in live)


def _possible(allowed_K: Tensor, captioner: CaptionModel, *, step: int) -> Tensor:
    """bool [K]: what is allowed, but for an end before the first piece."""
    if step or not captioner.has_end:
        return allowed_K
    return torch.cat([allowed_K[:-1], torch.zeros_like(allowed_K[-1:])])
