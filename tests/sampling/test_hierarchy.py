"""Seven calls of a model: what they read, what they change, and that a picture is decided by its seed alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cogview.errors import ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.local_super_resolution import LocalSuperResolution, LocalSuperResolutionConfig, Stage
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws
from cogview.sampling.hierarchy import LoPARConfig, StageModel, chooser, draw_directly, refine
from cogview.sampling.lopar import rank_grid
from cogview.sequences.picture_context import gpt_form
from cogview.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(32, 20)
TEXTS = [[1, 2, 3], [4], []]
SEEDS = [5, 6, 7]
CHOOSE = chooser(SamplingConfig(top_k=12))
LOPAR = LoPARConfig(top_k=(12,))


def stage_of(stage: Stage, *, grid: int = 12, ratio: int = 3) -> StageModel:
    torch.manual_seed(0)
    shape = GPTConfig(
        vocab_size=VOCABULARY.size,
        max_positions=40,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        dropout=0.0,
        init_std=0.3,
    )
    model = LocalSuperResolution(GPT(shape), LocalSuperResolutionConfig(stage=stage, grid=grid, ratio=ratio))
    for parameter in model.mixins.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    form = gpt_form(VOCABULARY, length=4 + 10 + 16, grid=4, is_image_fixed=True)
    return StageModel(model=model.eval(), form=form, image_ids=VOCABULARY.image_ids)


def small(batch: int = 3, *, side: int = 4) -> Tensor:
    return torch.randint(32, (batch, side, side), generator=torch.Generator().manual_seed(batch))


def calls_of(stage: StageModel) -> list[Tensor]:
    """The ids of the grid in each call from now on."""
    seen: list[Tensor] = []
    stage.model.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(named["grid_ids_BN"].clone()), with_kwargs=True
    )
    return seen


def test_direct_codes_are_drawn_in_one_call_of_masks() -> None:
    stage = stage_of("direct")
    calls = calls_of(stage)
    drawn = draw_directly(stage, TEXTS, small(), seeds=SEEDS, choose=CHOOSE)
    assert drawn.shape == (3, 12, 12)
    assert len(calls) == 1
    assert set(calls[0].unique().tolist()) == {VOCABULARY.command("BOI1")}


def test_passes_mask_what_is_not_settled_and_keep_the_rest() -> None:
    stage, codes = stage_of("iterative"), small(side=12)
    calls, mask = calls_of(stage), VOCABULARY.command("BOI1")
    seen: list[tuple[int, int]] = []
    drawn = refine(stage, TEXTS, codes, seeds=SEEDS, config=LOPAR, progress=lambda done, all: seen.append((done, all)))
    rank = rank_grid(12, 12)
    assert len(calls) == 6
    assert seen == [(number, 6) for number in range(1, 7)]
    for number, ids in enumerate(calls, start=1):
        assert torch.equal(ids.view(3, 12, 12) == mask, (rank >= number).expand(3, -1, -1))
    for earlier, later in pairwise(calls):  # what was settled is read as it was drawn
        settled = (earlier == mask) & (later != mask)
        assert torch.equal(later[settled], drawn.flatten(1)[settled])
    assert torch.equal(drawn[:, rank <= 0], codes[:, rank <= 0])
    assert not torch.equal(drawn[:, rank > 0], codes[:, rank > 0])


def test_nothing_changes_outside_of_the_part_that_may() -> None:
    stage, codes = stage_of("iterative"), small(side=12)
    inside = torch.zeros(3, 12, 12, dtype=torch.bool)
    inside[0, 2:7, 3:9] = True
    inside[1, 0, 0] = True  # a code that is kept: nothing to draw
    drawn = refine(stage, TEXTS, codes, seeds=SEEDS, config=LOPAR, inside_BGG=inside)
    assert torch.equal(drawn[~inside], codes[~inside])
    assert not torch.equal(drawn[0], codes[0])
    calls = calls_of(stage)
    refine(stage, TEXTS[:1], codes[:1], seeds=[1], config=LOPAR, inside_BGG=torch.zeros(1, 12, 12, dtype=torch.bool))
    assert calls == []


@pytest.mark.parametrize("stage", ["direct", "iterative"])
def test_a_picture_is_decided_by_its_seed_and_not_by_its_batch(stage: Stage) -> None:
    model, side = stage_of(stage), 4 if stage == "direct" else 12
    codes = small(side=side)

    def draw(rows: slice, seeds: list[int]) -> Tensor:
        if stage == "direct":
            return draw_directly(model, TEXTS[rows], codes[rows], seeds=seeds, choose=CHOOSE)
        return refine(model, TEXTS[rows], codes[rows], seeds=seeds, config=LOPAR)

    together = draw(slice(0, 3), SEEDS)
    for row in range(3):
        assert torch.equal(draw(slice(row, row + 1), SEEDS[row : row + 1])[0], together[row])
    assert not torch.equal(draw(slice(0, 3), [8, 9, 10]), together)


def test_codes_are_chosen_by_their_own_numbers_however_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of("direct")
    whole = draw_directly(stage, TEXTS, small(), seeds=SEEDS, choose=CHOOSE)
    monkeypatch.setattr("cogview.sampling.hierarchy.CODES_AT_ONCE", 7)
    assert torch.equal(draw_directly(stage, TEXTS, small(), seeds=SEEDS, choose=CHOOSE), whole)
    given = uniform_draws(SEEDS, length=288, device=torch.device("cpu"))
    places: list[Tensor] = []

    def watch(logits_PK: Tensor, draws_P2: Tensor) -> Tensor:
        places.append(draws_P2)
        return CHOOSE(logits_PK, draws_P2)

    draw_directly(stage, TEXTS, small(), seeds=SEEDS, choose=watch)
    assert torch.equal(torch.cat(places).flatten(), given.flatten())


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(top_k=5),
        SamplingConfig(top_k=50, temperature=0.3),
        SamplingConfig(top_k=50, top_p=0.6),
        SamplingConfig(top_k=5, temperature=0),
        SamplingConfig(top_k=0),
        SamplingConfig(top_k=900),
    ],
)
def test_a_shortlist_chooses_what_all_codes_would(sampling: SamplingConfig) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, draws = torch.randn(400, 300, generator=generator) * 3, torch.rand(400, 2, generator=generator).double()
    expected = choose(logits, draws[:, 0], config=sampling)
    assert torch.equal(chooser(sampling)(logits, draws), expected)


def test_top_k_is_that_of_the_pass() -> None:
    config = LoPARConfig(top_k=(40, 20, 10), temperature=0.5)
    assert [config.sampling(number).top_k for number in range(1, 7)] == [40, 20, 10, 10, 10, 10]
    assert config.sampling(1).temperature == 0.5
    assert LoPARConfig().sampling(6) == SamplingConfig(temperature=1.0, top_k=10)


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="reads pictures of 4 x 4 codes, and this one has 5 x 5"):
        draw_directly(stage_of("direct"), TEXTS, small(side=5), seeds=SEEDS, choose=CHOOSE)
    with pytest.raises(ConfigError, match="draws pictures of 12 x 12 codes, and this one has 4 x 4"):
        refine(stage_of("iterative"), TEXTS, small(), seeds=SEEDS, config=LOPAR)
    with pytest.raises(ConfigError, match="top_k="):
        replace(LOPAR, top_k=())
