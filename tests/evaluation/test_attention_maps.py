"""Attention read from real forwards, compared with loops over queries and keys."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cogview.errors import SchemaError
from cogview.evaluation.attention_maps import HeadRules, analyse_attention, describe_heads, head_shares, uniform_offsets
from cogview.models.gpt import GPT, GPTConfig
from cogview.sequences.batch import SequenceConfig, build_batch
from cogview.sequences.layout import TASKS
from cogview.tokenizers.vocabulary import Vocabulary

GRID = 3
VOCABULARY = Vocabulary(16, 20)
CONFIG = GPTConfig(
    vocab_size=VOCABULARY.size, max_positions=24, num_layers=2, hidden_size=16, num_heads=2, dropout=0.0, init_std=0.3
)


def build_rows(texts=((3, 4, 5), (6,))):
    codes = np.random.default_rng(0).integers(16, size=(len(texts), GRID**2)).astype(np.uint16)
    texts = [list(text) for text in texts]
    return build_batch(
        texts, codes, layout=TASKS["text_to_image"], config=SequenceConfig(length=24), vocabulary=VOCABULARY
    )


def build_gpt(**changes):
    torch.manual_seed(0)
    return GPT(replace(CONFIG, **changes)).eval()


def probabilities(gpt, batch, row, layer):
    """[H, L, L] of one row's real tokens, by the definition."""
    found = []
    module = gpt.transformer.layers[layer].attention.query_key_value
    hook = module.register_forward_hook(lambda _m, _i, output: found.append(output))
    with torch.no_grad():
        gpt(batch.ids, batch.positions)
    hook.remove()
    length = int(batch.image_part[row].int().argmax()) + GRID**2
    q, k, _ = found[0][row, :length].view(length, 3, 2, 8).unbind(1)
    attention = torch.zeros(2, length, length)
    for head in range(2):
        for query in range(length):
            scores = torch.stack([q[query, head] @ k[key, head] / math.sqrt(8) for key in range(query + 1)])
            attention[head, query, : query + 1] = scores.softmax(dim=0)
    return attention


@pytest.mark.parametrize("form", ["fused", "pb_relax"])
def test_offsets_text_and_tokens_are_those_of_the_definition(form):
    gpt, batch = build_gpt(attention=form), build_rows()
    analysis = analyse_attention(gpt, [batch], grid=GRID)
    assert analysis.rows == 2
    for layer in range(2):
        offsets, text, tokens = torch.zeros(2, GRID, 2 * GRID - 1), torch.zeros(2), torch.zeros(2)
        for row in range(2):
            attention = probabilities(gpt, batch, row, layer)
            start = attention.shape[-1] - GRID**2
            for query in range(GRID**2):
                seen = attention[:, start + query]
                text += seen[:, :start].sum(dim=-1)
                tokens += torch.special.entr(seen).sum(dim=-1).exp()
                for key in range(query + 1):
                    up, aside = query // GRID - key // GRID, key % GRID - query % GRID
                    offsets[:, up, aside + GRID - 1] += seen[:, start + key]
        queries = 2 * GRID**2
        assert torch.allclose(analysis.offsets_NHRC[layer], offsets / queries, atol=1e-5)
        assert torch.allclose(analysis.text_NH[layer], text / queries, atol=1e-5)
        assert torch.allclose(analysis.tokens_NH[layer], tokens / queries, atol=1e-4)
    total = analysis.offsets_NHRC.sum(dim=(-1, -2)) + analysis.text_NH
    assert torch.allclose(total, torch.ones(2, 2), atol=1e-5)


def test_batches_do_not_matter():
    gpt = build_gpt()
    together = analyse_attention(gpt, [build_rows(((3, 4, 5), (3, 4, 5)))], grid=GRID)
    batch = build_rows(((3, 4, 5), (3, 4, 5)))
    halves = [
        type(batch)(**{name: getattr(batch, name)[half] for name in vars(batch)}) for half in (slice(0, 1), slice(1, 2))
    ]
    apart = analyse_attention(gpt, halves, grid=GRID)
    assert torch.allclose(together.offsets_NHRC, apart.offsets_NHRC, atol=1e-6)
    assert torch.allclose(together.score_NH, apart.score_NH, atol=1e-6)


def test_a_head_without_preferences_looks_at_all_visible_codes_alike():
    gpt = build_gpt()
    with torch.no_grad():
        for block in gpt.transformer.layers:
            block.attention.query_key_value.weight.zero_()
    analysis = analyse_attention(gpt, [build_rows(((3,),))], grid=GRID)
    visible = torch.arange(5, 5 + GRID**2).float()  # ROI1, one piece, BASE, BOI1, and the codes up to the query
    assert analysis.tokens_NH[0, 0].item() == pytest.approx(visible.mean().item(), rel=1e-5)
    assert analysis.text_NH[0, 0].item() == pytest.approx((4 / visible).mean().item(), rel=1e-5)
    assert analysis.score_NH.max().item() == 0.0
    heads = describe_heads(analysis, rules=HeadRules())
    assert not any(head.follows_positions or head.rests_on_few_tokens for head in heads)
    assert uniform_offsets(GRID).sum().item() == pytest.approx(1.0)


def test_a_head_that_copies_the_code_above_follows_positions():
    """Positions as one-hot vectors, and keys that lie one row behind: every code looks straight up."""
    config = replace(CONFIG, hidden_size=64, num_heads=2, num_layers=1)
    gpt = GPT(config).eval()
    with torch.no_grad():
        gpt.word_embeddings.weight.zero_()
        gpt.transformer.position_embeddings.weight.copy_(torch.eye(24, 64))
        weight = gpt.transformer.layers[0].attention.query_key_value.weight.zero_()
        weight[:32] = torch.eye(32, 64) * 4
        weight[64:96] = torch.eye(32, 64).roll(GRID, dims=0) * 4  # key at p answers the query of p + GRID
    heads = describe_heads(analyse_attention(gpt, [build_rows(((3,),))], grid=GRID), rules=HeadRules(num_offsets=1))
    seeing, blind = heads
    assert (seeing.top_rows, seeing.top_columns) == (1, 0)
    assert seeing.follows_positions
    assert seeing.rests_on_few_tokens
    assert seeing.neighbour_share > 0.6
    assert not blind.follows_positions
    shares = head_shares(heads)
    assert shares["follow_positions"] == 0.5
    assert shares["largest_score"] == seeing.largest_score


def test_maps_are_probabilities_of_the_first_row():
    gpt, batch = build_gpt(), build_rows()
    analysis = analyse_attention(gpt, [batch], grid=GRID)
    assert torch.allclose(analysis.maps_NHSS[1], probabilities(gpt, batch, 0, 1), atol=1e-5)


def test_no_rows_and_cut_rows_are_refused():
    with pytest.raises(SchemaError, match="num_rows"):
        analyse_attention(build_gpt(), [], grid=GRID)
    with pytest.raises(SchemaError, match="4 x 4"):
        analyse_attention(build_gpt(), [build_rows()], grid=4)
