"""Three-region attention: the rule against a slow obvious one, and every fast form against the rule."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask

from cogview.errors import ConfigError
from cogview.models.gpt import GPT, GPTConfig, KeyValueCache
from cogview.models.pivots import NEVER, Pivots, SparseConfig, draw_pivots, inference_mask, needed_keys, pivot_keys
from cogview.models.published import load_model, save_model
from cogview.models.sparse_attention import blockwise_attention, reference_attention, score_bias, sparse_attention
from cogview.models.sparse_flex import block_mask, flex_sparse_attention

SMALL = SparseConfig(num_pivots=12, block_size=8, window_blocks=2, num_image_ids=100, padding_id=150)
CASES = {
    "many rows": (SMALL, 61, (7, 3)),
    "whole blocks": (SMALL, 64, (7, 3)),
    "shorter than a block": (SMALL, 5, (2, 0)),
    "one token": (SMALL, 1, (0, 1)),
    "no text": (SMALL, 50, (0, 0)),
    "text alone": (SMALL, 40, (40, 9)),
    "text beyond the pivots": (replace(SMALL, num_pivots=3), 45, (10, 2)),
    "one block in the window": (replace(SMALL, window_blocks=1), 37, (4, 6)),
    "window over all": (replace(SMALL, window_blocks=6), 44, (4, 6)),
    "no correction": (replace(SMALL, corrects_pivots=False), 61, (7, 3)),
}


def token_ids(length: int, texts: tuple[int, ...], *, num_padding: int = 0) -> Tensor:
    """Rows of text, then image tokens; the last row ends in padding."""
    ids = torch.full((len(texts), length), 5)
    for row, num_text in enumerate(texts):
        ids[row, :num_text] = 120
    if num_padding:
        ids[-1, -num_padding:] = 150
    return ids


def drawn(config: SparseConfig, length: int, texts: tuple[int, ...], *, step: int = 0, layer: int = 0) -> Pivots:
    keys = pivot_keys(torch.arange(len(texts)), seed=1, step=step)
    return draw_pivots(token_ids(length, texts), keys_B=keys, layer=layer, config=config)


def heads(batch: int, length: int, *, size: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, length, size, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def weights_of(pivots: Pivots) -> Tensor:
    """[B, Q, K]: with equal scores and values that name their key, the output is the softmax over the gathered keys."""
    length, batch = pivots.length, len(pivots.positions_BP)
    zeros = torch.zeros(batch, 1, length, length)
    return blockwise_attention(zeros, zeros, torch.eye(length).expand(batch, 1, -1, -1), pivots=pivots)[:, 0]


@pytest.mark.parametrize(("config", "length", "texts"), CASES.values(), ids=CASES.keys())
def test_the_rule_is_the_obvious_one(config: SparseConfig, length: int, texts: tuple[int, ...]) -> None:
    pivots = drawn(config, length, texts)
    bias: list[list[list[float]]] = score_bias(pivots).tolist()
    size, times = config.block_size, config.window_blocks
    share = math.log(length // config.num_pivots) if config.corrects_pivots and length > config.num_pivots else 0.0
    for row in range(len(texts)):
        chosen = {int(position) for position in pivots.positions_BP[row]}
        for query in range(length):
            for key in range(length):
                if key <= query and key // size > query // size - times:
                    expected = 0.0
                elif key in chosen and key // size <= query // size - times:
                    expected = share
                else:
                    expected = -math.inf
                assert bias[row][query][key] == pytest.approx(expected)


@pytest.mark.parametrize(("config", "length", "texts"), CASES.values(), ids=CASES.keys())
def test_blocks_give_the_numbers_and_gradients_of_the_rule(
    config: SparseConfig, length: int, texts: tuple[int, ...]
) -> None:
    pivots, found = drawn(config, length, texts), []
    for form in (blockwise_attention, reference_attention):
        inputs = heads(len(texts), length)
        output = form(*inputs, pivots=pivots)
        (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
        found.append([output, *(values.grad for values in inputs)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("config", "length", "texts"), CASES.values(), ids=CASES.keys())
def test_the_gpu_form_gives_the_numbers_of_the_rule(
    config: SparseConfig, length: int, texts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False
    )  # or it compiles, for seconds
    pivots, inputs = drawn(config, length, texts), [values.detach() for values in heads(len(texts), length)]
    found = flex_sparse_attention(*inputs, pivots=pivots, is_compiled=False)
    torch.testing.assert_close(found, reference_attention(*inputs, pivots=pivots), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("config", "length", "texts"), CASES.values(), ids=CASES.keys())
def test_the_gpu_form_visits_the_blocks_that_its_rule_touches(
    config: SparseConfig, length: int, texts: tuple[int, ...]
) -> None:
    ours = block_mask(drawn(config, length, texts))
    queries, keys = ours.seq_lengths
    theirs = create_block_mask(
        ours.mask_mod, len(texts), None, queries, keys, device="cpu", BLOCK_SIZE=config.block_size
    )
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


@given(
    length=st.integers(1, 70),
    num_pivots=st.integers(1, 40),
    block_size=st.integers(1, 17),
    window_blocks=st.integers(1, 5),
    texts=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    num_padding=st.integers(0, 20),
    step=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_no_key_counts_twice_none_lies_ahead_and_padding_is_no_pivot(
    length: int,
    num_pivots: int,
    block_size: int,
    window_blocks: int,
    texts: list[int],
    num_padding: int,
    step: int,
) -> None:
    config = replace(
        SMALL, num_pivots=num_pivots, block_size=block_size, window_blocks=window_blocks, corrects_pivots=False
    )
    ids = token_ids(length, tuple(texts), num_padding=min(num_padding, length))
    keys = pivot_keys(torch.arange(len(texts)), seed=3, step=step)
    pivots = draw_pivots(ids, keys_B=keys, layer=2, config=config)
    weights = weights_of(pivots)
    counts = weights / weights.amax(-1, keepdim=True)  # a key that counted twice would make the others a half
    is_none, is_once = counts == 0, (counts - 1).abs() < 1e-5
    assert (is_none | is_once).all()
    assert torch.equal(is_once, score_bias(pivots) == 0)
    assert not is_once.triu(1).any()
    real = pivots.positions_BP < length
    assert not (ids.gather(1, pivots.positions_BP.clamp(max=length - 1)) == 150)[real].any()
    assert torch.equal(real.sum(1), (ids != 150).sum(1).clamp(max=num_pivots))
    assert torch.equal(real, pivots.first_block_BP < NEVER)
    assert all(len(set(row[row < length].tolist())) == int((row < length).sum()) for row in pivots.positions_BP)


def test_text_comes_first_and_image_pivots_are_drawn_evenly() -> None:
    keys = pivot_keys(torch.arange(400), seed=1, step=0)
    pivots = draw_pivots(token_ids(40, (6,)).expand(400, -1), keys_B=keys, layer=0, config=SMALL)
    counts = pivots.positions_BP.flatten().bincount(minlength=40)
    assert (counts[:6] == 400).all()
    assert (counts[6:] - 400 * 6 / 34).abs().max() < 40  # the standard deviation is 7.6


def test_pivots_follow_from_seed_step_layer_and_row_alone() -> None:
    def positions(*, seed: int = 1, step: int = 0, layer: int = 0, row: int = 0) -> list[int]:
        keys = pivot_keys(torch.tensor([row]), seed=seed, step=step)
        found: list[int] = (
            draw_pivots(token_ids(90, (5,)), keys_B=keys, layer=layer, config=SMALL).positions_BP[0].tolist()
        )
        return found

    assert positions() == positions()
    assert len({tuple(positions(**change)) for change in ({}, {"seed": 2}, {"step": 1}, {"layer": 1}, {"row": 1})}) == 5
    both = draw_pivots(
        token_ids(90, (5, 5)), keys_B=pivot_keys(torch.tensor([4, 0]), seed=1, step=0), layer=0, config=SMALL
    )
    assert both.positions_BP[1].tolist() == positions()


def test_with_a_pivot_for_every_token_nothing_is_lost() -> None:
    q, k, v = heads(2, 61)
    found = sparse_attention(q, k, v, pivots=drawn(replace(SMALL, num_pivots=100), 61, (7, 3)))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-5)


def test_pivots_stand_for_the_tokens_that_were_not_drawn() -> None:
    weights = weights_of(drawn(SMALL, 61, (0,)))[0, 60]
    of_pivot, of_window = weights[:40][weights[:40] > 0], weights[60]
    assert len(of_pivot) > 1
    torch.testing.assert_close(of_pivot, (of_window * (61 // 12)).expand_as(of_pivot))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_scores_beyond_half_precision_stay_finite(dropout: float) -> None:
    q = torch.full((2, 1, 61, 64), 120.0, dtype=torch.float16, requires_grad=True)  # 120 * 120 * 64 > 65504
    v = torch.ones_like(q)
    found = blockwise_attention(q, q, v, pivots=drawn(SMALL, 61, (7, 3)), dropout=dropout)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(q.grad).all()
    assert dropout or torch.allclose(found, v, atol=1e-2)


def test_half_precision_is_close_to_single() -> None:
    pivots = drawn(SMALL, 61, (7, 3))
    halves = [values.detach() for values in heads(2, 61, dtype=torch.bfloat16)]
    found = blockwise_attention(*halves, pivots=pivots).float()
    torch.testing.assert_close(
        found, reference_attention(*(v.float() for v in halves), pivots=pivots), rtol=0, atol=0.03
    )


def test_impossible_regions_name_the_field() -> None:
    with pytest.raises(ConfigError, match=r"sparse.window_blocks=0"):
        replace(SMALL, window_blocks=0)
    with pytest.raises(ConfigError, match=r"sparse.padding_id=58192 is not among vocab_size=160"):
        replace(TINY, sparse=SparseConfig())


TINY = GPTConfig(
    vocab_size=160,
    max_positions=80,
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    dropout=0.0,
    ln_prescale=False,  # it looks at the whole tensor
    attention="sparse",
    sparse=SMALL,
)


def model(config: GPTConfig = TINY) -> GPT:
    torch.manual_seed(0)
    return GPT(config)


def image_row(batch: int = 2, length: int = 70) -> tuple[Tensor, Tensor]:
    ids = torch.randint(100, (batch, length), generator=torch.Generator().manual_seed(1))
    ids[:, :5] += 40
    ids[:, :5].clamp_(100, 149)
    return ids, torch.arange(length).expand(batch, -1)


def test_a_later_token_changes_nothing_before_it_in_training() -> None:
    gpt, (ids, positions) = model().train(), image_row()
    changed = ids.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 100
    keys = torch.tensor([1, 2])
    before, after = gpt(ids, positions, pivot_keys_B=keys), gpt(changed, positions, pivot_keys_B=keys)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_training_is_sparse_and_evaluation_dense_unless_told() -> None:
    ids, positions = image_row()
    dense = model(replace(TINY, attention="fused")).eval()(ids, positions)
    assert torch.equal(model().eval()(ids, positions), dense)
    keys = torch.zeros(2, dtype=torch.int64)
    sparse = model(replace(TINY, embedding_gradient=1.0)).train()(ids, positions, pivot_keys_B=keys)
    assert not torch.allclose(sparse, dense)
    told = replace(TINY, sparse=replace(SMALL, in_evaluation=True))
    torch.testing.assert_close(model(told).eval()(ids, positions), sparse)


def test_every_step_draws_anew_and_a_restored_random_state_draws_the_same() -> None:
    gpt, (ids, positions) = model().train(), image_row()
    state = torch.get_rng_state()
    first, second = gpt(ids, positions), gpt(ids, positions)
    torch.set_rng_state(state)
    assert torch.equal(gpt(ids, positions), first)
    assert not torch.allclose(second, first)


def test_activations_computed_again_meet_the_same_pivots() -> None:
    ids, positions = image_row()
    found = []
    for is_on in (False, True):
        gpt = model(replace(TINY, activation_checkpointing=is_on, dropout=0.1)).train()
        torch.manual_seed(5)
        gpt(ids, positions).square().sum().backward()
        found.append(gpt.word_embeddings.weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_sparse_decoding_gives_the_same_one_by_one_and_together() -> None:
    gpt, (ids, positions) = model(replace(TINY, sparse=replace(SMALL, in_evaluation=True))).eval(), image_row()
    ids[0, :2] = 150  # padding before a short prompt
    found = []
    for cuts in ([*range(5, 71)], [5, 70]):
        cache = KeyValueCache(TINY, batch=2, length=70, dtype=torch.float32, device=torch.device("cpu"))
        cache.allowed_BK[0, :2] = False
        bounds = [0, *cuts]
        with torch.no_grad():
            parts = [gpt(ids[:, a:b], positions[:, a:b], cache=cache) for a, b in pairwise(bounds)]
        found.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(found[0][:, 5:], found[1][:, 5:], rtol=0, atol=1e-5)


def test_a_cached_query_sees_the_window_the_text_and_a_share_of_the_rest() -> None:
    config = replace(SMALL, num_pivots=250)
    ids = token_ids(1000, (9, 4))
    allowed = torch.ones(2, 1, 1, 1000, dtype=torch.bool)
    allowed[1, ..., :2] = False
    mask = inference_mask(allowed, ids, layer=1, max_positions=1000, config=config)
    assert mask[..., -16:].all()
    assert mask[0, ..., :9].all()
    assert mask[1, 0, 0, :4].tolist() == [False, False, True, True]
    assert 190 < mask[0, 0, 0, 9:984].sum() < 300  # 0.25 * 975, standard deviation 13.5
    other = inference_mask(allowed, ids, layer=2, max_positions=1000, config=config)
    assert not torch.equal(mask, other)
    keys, values = torch.randn(2, 2, 3, 1000, 8).unbind(0)
    kept_keys, _, kept_mask = needed_keys(keys, values, mask)
    assert kept_keys.shape[2] == kept_mask.shape[3] == int(mask.any(0).sum()) < 350


def test_a_published_sparse_model_comes_back(tmp_path: Path) -> None:
    save_model(model(), tmp_path, settings={})
    assert load_model(tmp_path)[0].config == TINY
