"""Small pictures to large ones in seven calls of a model: direct super-resolution, then LoPAR (CogView2).

In: captions and the codes of pictures, g x g. Out: codes of the same pictures at `ratio` times the side. The direct
stage draws all of them at once, each for itself, from the small picture; the iterative stage draws most of them again
in the passes of `cogview.sampling.lopar`, with what surrounds them in view, in all of a picture or in a part of it.
"""

# B batch, g grid of the small pictures, G of the large, N codes of a large one, P codes to draw, R passes, E hidden

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.models.local_super_resolution import LocalSuperResolution
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws
from cogview.sampling.lopar import RELEASED_RANKS, RELEASED_TOP_K, Ranks, check_ranks, num_passes, rank_grid
from cogview.sequences.layout import IdSequence
from cogview.sequences.picture_context import ContextBatch, ContextForm, build_context

CODES_AT_ONCE = 2048  # whose logits are held: 2048 x 20,000 codes x 8 bytes = 328 MB
Choose = Callable[[Tensor, Tensor], Tensor]  # logits [P, codes] and draws [P, 2] -> codes [P]
DRAWS_EACH = 2  # numbers for each code: for a cluster of codes and for one of it, or the first alone


@dataclass(frozen=True, kw_only=True)
class LoPARConfig:
    """ranks: see `lopar.py`; top_k: of each pass, the last one for all that follow; temperature: of all passes."""

    ranks: Ranks = RELEASED_RANKS
    top_k: tuple[int, ...] = RELEASED_TOP_K
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_ranks(self.ranks)
        if not self.top_k:
            raise ConfigError("top_k=(): give a number for each pass, or one for all of them")

    def sampling(self, number: int) -> SamplingConfig:
        """How codes are chosen in a pass, from 1 on."""
        return SamplingConfig(temperature=self.temperature, top_k=self.top_k[min(number, len(self.top_k)) - 1])


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """A super-resolution model with what it reads: the form of its context, and the ids of image codes."""

    model: LocalSuperResolution
    form: ContextForm
    image_ids: range

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.gpt.word_embeddings.weight.device

    def context(self, texts: Sequence[IdSequence], small_Bgg: Tensor | None) -> ContextBatch:
        """What the model reads of captions (raw pieces) and, in the direct stage, of small pictures, on its device."""
        codes = None
        if self.model.config.is_direct:
            assert small_Bgg is not None
            codes = small_Bgg.flatten(1).cpu().numpy().astype(np.uint16)
        context = build_context(texts, codes, form=self.form)
        return ContextBatch(**{name: tensor.to(self.device) for name, tensor in vars(context).items()})

    @torch.inference_mode()
    def draw(
        self, context: ContextBatch, codes_BGG: Tensor, *, is_masked_BGG: Tensor, draws_BN2: Tensor, choose: Choose
    ) -> Tensor:
        """Codes [B, G, G] with those that are masked drawn at once; of these, `codes_BGG` may hold anything.

        draws_BN2: numbers in [0, 1) for each code of the grid. choose: makes codes of logits and draws.
        """
        is_masked_BN, ids_BN = is_masked_BGG.flatten(1), codes_BGG.flatten(1) + self.image_ids.start
        hidden_BNE = self.model(
            context.ids,
            context.positions,
            context_allowed_BCC=context.allowed,
            context_seen_BC=context.seen,
            grid_ids_BN=torch.where(is_masked_BN, self.form.mask_id, ids_BN),
        )
        drawn_BN = codes_BGG.flatten(1).clone()
        drawn_BN[is_masked_BN] = torch.cat(
            [
                choose(self.model.gpt.logits(hidden_PE, ids=self.image_ids).float(), draws_P2)
                for hidden_PE, draws_P2 in zip(
                    torch.split(hidden_BNE[is_masked_BN], CODES_AT_ONCE),
                    torch.split(draws_BN2[is_masked_BN], CODES_AT_ONCE),
                    strict=True,
                )
            ]
        )
        return drawn_BN.view_as(codes_BGG)


def draw_directly(
    stage: StageModel,
    texts: Sequence[IdSequence],
    small_Bgg: Tensor,
    *,
    seeds: Sequence[int],
    choose: Choose,
) -> Tensor:
    """Codes int64 [B, G, G] of pictures with codes [B, g, g], in one pass. ConfigError for pictures of another size."""
    config = stage.model.config
    _require_sides(small_Bgg, config.small_grid, reads="reads")
    device = stage.device
    large_BGG = torch.zeros(len(small_Bgg), config.grid, config.grid, dtype=torch.int64, device=device)
    return stage.draw(
        stage.context(texts, small_Bgg),
        large_BGG,
        is_masked_BGG=torch.ones_like(large_BGG, dtype=torch.bool),
        draws_BN2=_draws(seeds, 1, config.grid**2, device=device)[:, 0],
        choose=choose,
    )


def refine(
    stage: StageModel,
    texts: Sequence[IdSequence],
    codes_BGG: Tensor,
    *,
    seeds: Sequence[int],
    config: LoPARConfig,
    inside_BGG: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Codes int64 [B, G, G] with those of rank 1 and above drawn again, in the passes of the config's ranks.

    inside_BGG: bool, the part of each picture that may change; None for all of it. progress: called with (passes done,
    passes). ConfigError for pictures of another size.
    """
    grid = stage.model.config.grid
    _require_sides(codes_BGG, grid, reads="draws")
    passes, device = num_passes(config.ranks), stage.device
    rank_GG = rank_grid(grid, grid, ranks=config.ranks).to(device)
    draws_BRN2 = _draws(seeds, passes, grid**2, device=device)
    context, drawn_BGG = stage.context(texts, None), codes_BGG.to(device)
    for number in range(1, passes + 1):
        is_masked_BGG = (rank_GG >= number).expand(drawn_BGG.shape)
        if inside_BGG is not None:
            is_masked_BGG = is_masked_BGG & inside_BGG.to(device)
        if bool(is_masked_BGG.any()):
            drawn_BGG = stage.draw(
                context,
                drawn_BGG,
                is_masked_BGG=is_masked_BGG,
                draws_BN2=draws_BRN2[:, number - 1],
                choose=chooser(config.sampling(number)),
            )
        if progress is not None:
            progress(number, passes)
    return drawn_BGG


def chooser(sampling: SamplingConfig) -> Choose:
    """Temperature, top-k and top-p as a way to choose codes."""
    return lambda logits_PK, draws_P2: choose(logits_PK, draws_P2[:, 0], config=sampling)


def _draws(seeds: Sequence[int], passes: int, codes: int, *, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float64 [B, R, N, 2], of each picture from its seed alone."""
    flat = uniform_draws(list(seeds), length=passes * codes * DRAWS_EACH, device=device)
    return flat.view(len(seeds), passes, codes, DRAWS_EACH)


def _require_sides(codes_Bgg: Tensor, side: int, *, reads: str) -> None:
    if codes_Bgg.shape[1:] != (side, side):
        height, width = codes_Bgg.shape[1:]
        raise ConfigError(
            f"the model {reads} pictures of {side} x {side} codes, and this one has {height} x {width}; give pictures "
            "of the size that it was trained on"
        )
