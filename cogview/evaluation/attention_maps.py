"""What the attention heads of a trained GPT look at (CogView, section 2.4 and appendix C).

In: a GPT and rows of one image each. Out: for every head of every layer its maps, where in the picture it looks
relative to the code that it predicts from, how much it looks at text, on how few tokens it rests, and how large its
scores are. The paper saw heads that follow the picture's rows and columns, heads that attend to a few tokens only, and
scores whose scale differs much from head to head, which is why PB-relax takes its maximum for each head.

Probabilities are computed anew in fp32 from queries and keys, so the figures do not depend on the model's form of
attention; sparse attention is shown as the dense attention that it stands for.
"""

# N layers, H heads, L sequence, P image codes (grid x grid), S side of a shown map, B batch, E hidden
# R row offsets: 0 to grid - 1 rows above; C column offsets: grid - 1 to the left, up to grid - 1 to the right

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cogview.errors import SchemaError
from cogview.models.attention import causal_mask
from cogview.models.gpt import GPT, Block
from cogview.sequences.batch import SequenceBatch

MAP_SIDE = 128  # maps are shown this large at most
NEIGHBOURHOOD = 1  # rows and columns: the 8 codes around a code, of which causal attention sees 4


@dataclass(frozen=True, kw_only=True)
class HeadRules:
    """When a head counts as one that follows positions, or rests on few tokens.

    few_tokens: its attention is spread over no more tokens than this (exp of the entropy, mean over queries);
    num_offsets, offset_share: so many offsets on the grid hold at least this share of its attention to the image, and
    at least `offset_gain` times what they would hold if it looked at all visible codes alike.
    """

    few_tokens: float = 4.0
    num_offsets: int = 8
    offset_share: float = 0.5
    offset_gain: float = 2.0


@dataclass(frozen=True, kw_only=True)
class AttentionAnalysis:
    """Means over the image codes of all rows, as queries, unless said otherwise.

    maps_NHSS: probabilities of the first row, all its queries, reduced to at most MAP_SIDE (the largest in a cell);
    offsets_NHRC: share of attention by rows above and columns aside, which sums to 1 - text_NH;
    uniform_RC: the same of a head that looks at all visible codes alike and at no text;
    text_NH: share of attention on text and command tokens; tokens_NH: exp of the entropy, in tokens;
    score_NH: largest |q k| / sqrt(D) of all queries; spread_NH: standard deviation of these scores; rows: how many.
    """

    maps_NHSS: Tensor
    offsets_NHRC: Tensor
    uniform_RC: Tensor
    text_NH: Tensor
    tokens_NH: Tensor
    score_NH: Tensor
    spread_NH: Tensor
    rows: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """One head in numbers. top_rows, top_columns: the offset that it looks at most (rows above, columns right)."""

    layer: int
    head: int
    text_share: float
    tokens: float
    top_rows: int
    top_columns: int
    top_share: float
    offsets_share: float
    offsets_uniform: float
    neighbour_share: float
    largest_score: float
    score_spread: float
    follows_positions: bool
    rests_on_few_tokens: bool


@torch.inference_mode()
def analyse_attention(gpt: GPT, batches: Iterable[SequenceBatch], *, grid: int) -> AttentionAnalysis:
    """Read every head on the rows of all batches; each row holds one image of grid x grid codes, then only padding.

    SchemaError for a row without such an image, or for no rows at all.
    """
    gpt.eval()
    device = gpt.word_embeddings.weight.device
    reader = _Reader(gpt, grid=grid)
    with reader.hooked():
        for batch in batches:
            reader.starts = _image_starts(batch, grid=grid)
            gpt(batch.ids.to(device), batch.positions.to(device))
    return reader.result()


def describe_heads(analysis: AttentionAnalysis, *, rules: HeadRules) -> list[Head]:
    """Every head in numbers, by layer and head."""
    num_layers, num_heads = analysis.text_NH.shape
    return [
        _describe_head(analysis, layer=layer, head=head, rules=rules)
        for layer in range(num_layers)
        for head in range(num_heads)
    ]


def head_shares(heads: list[Head]) -> dict[str, float]:
    """The shares of all heads that the paper speaks of, and how far the heads' scores lie apart."""
    scores = [head.largest_score for head in heads]
    return {
        "follow_positions": sum(head.follows_positions for head in heads) / len(heads),
        "rest_on_few_tokens": sum(head.rests_on_few_tokens for head in heads) / len(heads),
        "text_share": sum(head.text_share for head in heads) / len(heads),
        "largest_score": max(scores),
        "score_ratio": max(scores) / max(min(scores), 1e-12),
    }


def _describe_head(analysis: AttentionAnalysis, *, layer: int, head: int, rules: HeadRules) -> Head:
    offsets_RC, uniform_RC = analysis.offsets_NHRC[layer, head], analysis.uniform_RC
    columns, grid = offsets_RC.shape[1], offsets_RC.shape[0]
    image_share = max(1 - float(analysis.text_NH[layer, head]), 1e-12)
    top = offsets_RC.flatten().topk(min(rules.num_offsets, offsets_RC.numel()))
    offsets_share = float(top.values.sum()) / image_share
    offsets_uniform = float(uniform_RC.flatten()[top.indices].sum())
    first = int(top.indices[0])
    reach = NEIGHBOURHOOD
    near_RC = offsets_RC[: reach + 1, grid - 1 - reach : grid + reach]
    tokens = float(analysis.tokens_NH[layer, head])
    return Head(
        layer=layer,
        head=head,
        text_share=float(analysis.text_NH[layer, head]),
        tokens=tokens,
        top_rows=first // columns,
        top_columns=first % columns - (grid - 1),
        top_share=float(top.values[0]),
        offsets_share=offsets_share,
        offsets_uniform=offsets_uniform,
        neighbour_share=float(near_RC.sum()),
        largest_score=float(analysis.score_NH[layer, head]),
        score_spread=float(analysis.spread_NH[layer, head]),
        follows_positions=offsets_share >= max(rules.offset_share, rules.offset_gain * offsets_uniform),
        rests_on_few_tokens=tokens <= rules.few_tokens,
    )


class _Reader:
    """Sums over rows, for each layer; `starts` says where the images of the batch at work begin."""

    def __init__(self, gpt: GPT, *, grid: int) -> None:
        num_layers, num_heads = gpt.config.num_layers, gpt.config.num_heads
        self.gpt, self.grid, self.starts = gpt, grid, list[int]()
        self.rows = torch.zeros(num_layers, dtype=torch.long)
        self.maps: list[Tensor | None] = [None] * num_layers
        self.offsets_NHO = torch.zeros(num_layers, num_heads, grid * (2 * grid - 1))
        self.text_NH, self.tokens_NH, self.score_NH = torch.zeros(3, num_layers, num_heads)
        self.squares_NH, self.sums_NH, self.counts_N = *torch.zeros(2, num_layers, num_heads), torch.zeros(num_layers)
        self.offset_PP = _offset_numbers(grid)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Read every forward inside the block."""
        modules = [block.attention.query_key_value for block in self.gpt.transformer.layers if isinstance(block, Block)]
        hooks = [module.register_forward_hook(partial(self._read, layer)) for layer, module in enumerate(modules)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, layer: int, _module: nn.Module, _inputs: tuple[Tensor, ...], qkv_BLE: Tensor) -> None:
        batch, length, _ = qkv_BLE.shape
        qkv = qkv_BLE.float().view(batch, length, 3, self.gpt.config.num_heads, -1)
        for row, start in enumerate(self.starts):
            q_LHD, k_LHD = qkv[row, : start + self.grid**2, :2].unbind(1)
            scores_HLL = torch.einsum("qhd,khd->hqk", q_LHD, k_LHD).cpu() / math.sqrt(q_LHD.shape[-1])
            self._add_row(layer, scores_HLL, start=start)

    def _add_row(self, layer: int, scores_HLL: Tensor, *, start: int) -> None:
        length = scores_HLL.shape[-1]
        visible_LL = causal_mask(length, length, device=scores_HLL.device)
        probabilities_HLL = scores_HLL.masked_fill(~visible_LL, -math.inf).softmax(dim=-1)
        if self.maps[layer] is None:
            side = min(length, MAP_SIDE)
            self.maps[layer] = nn.functional.adaptive_max_pool2d(probabilities_HLL, (side, side))
        image_HPL = probabilities_HLL[:, start:]
        entropy_HP = torch.special.entr(image_HPL).sum(dim=-1)
        offsets_PP = image_HPL[:, :, start:].flatten(1)
        self.offsets_NHO[layer].index_add_(1, self.offset_PP, offsets_PP / len(image_HPL[0]))
        self.text_NH[layer] += image_HPL[:, :, :start].sum(dim=-1).mean(dim=-1)
        self.tokens_NH[layer] += entropy_HP.exp().mean(dim=-1)
        seen_HV = scores_HLL[:, visible_LL]
        self.score_NH[layer] = torch.maximum(self.score_NH[layer], seen_HV.abs().amax(dim=-1))
        self.sums_NH[layer] += seen_HV.sum(dim=-1)
        self.squares_NH[layer] += seen_HV.square().sum(dim=-1)
        self.counts_N[layer] += seen_HV.shape[-1]
        self.rows[layer] += 1

    def result(self) -> AttentionAnalysis:
        """The means. SchemaError when nothing was read."""
        rows = int(self.rows[0])
        maps = [layer_map for layer_map in self.maps if layer_map is not None]
        if not rows:
            raise SchemaError("no rows to look at; give a folder of tokens with held-out rows, and num_rows above 0")
        grid, shape = self.grid, self.text_NH.shape
        mean_NH = self.sums_NH / self.counts_N[:, None]
        variance_NH = (self.squares_NH / self.counts_N[:, None] - mean_NH.square()).clamp_min(0)
        return AttentionAnalysis(
            maps_NHSS=torch.stack(maps),
            offsets_NHRC=self.offsets_NHO.view(*shape, grid, 2 * grid - 1) / rows,
            uniform_RC=uniform_offsets(grid),
            text_NH=self.text_NH / rows,
            tokens_NH=self.tokens_NH / rows,
            score_NH=self.score_NH,
            spread_NH=variance_NH.sqrt(),
            rows=rows,
        )


def uniform_offsets(grid: int) -> Tensor:
    """The offsets of a query that looks at all codes up to its own alike, mean over queries: [R, C], sums to 1."""
    num_codes = grid**2
    visible_PP = causal_mask(num_codes, num_codes, device=torch.device("cpu")).float()
    shares_PP = visible_PP / visible_PP.sum(dim=-1, keepdim=True) / num_codes
    shares_O = torch.zeros(grid * (2 * grid - 1)).index_add_(0, _offset_numbers(grid), shares_PP.flatten())
    return shares_O.view(grid, 2 * grid - 1)


def _offset_numbers(grid: int) -> Tensor:
    """For every pair of query and key, flat [P * P], the number of their offset in [R, C]; keys below count as row 0.

    Those keys lie behind the causal mask, so their probability is 0.
    """
    places_P = torch.arange(grid**2)
    rows_PP = (places_P[:, None] // grid - places_P[None, :] // grid).clamp_min(0)
    columns_PP = places_P[None, :] % grid - places_P[:, None] % grid + grid - 1
    return (rows_PP * (2 * grid - 1) + columns_PP).flatten()


def _image_starts(batch: SequenceBatch, *, grid: int) -> list[int]:
    """Where each row's image begins. The step from the last code is the image's too, so all codes are inputs."""
    counts, starts = batch.image_part.sum(dim=1), batch.image_part.int().argmax(dim=1)
    if (counts != grid**2).any():
        raise SchemaError(f"a row has {int(counts.min())} image codes, {grid} x {grid} are needed; give whole rows")
    return [int(start) for start in starts]
