"""Dense attention, in two forms that give the same numbers (CogView, section 2.4, equation 4).

`pb_relax_attention` is the paper's formula, written out. `fused_attention` is torch's kernel, which keeps the softmax
statistics in fp32 and subtracts the row maximum itself; queries are divided by sqrt(D) before the product, as the
released code does. Forbidden scores are -inf; the release's -10,000 would let a row whose own scores are all lower look
into the future.
"""

# B batch, H heads, Q queries, K keys, D head size

import math

import torch
from torch import Tensor, nn

PB_RELAX_ALPHA = 32.0
SHORT_ROW = 128  # tokens; the CPU's fused kernel works in blocks, which cost more than they save on such rows


def pb_relax_attention(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, *, allowed: Tensor, dropout: float = 0.0
) -> Tensor:
    """softmax(alpha * (s - max s)) v with s = q / (alpha sqrt(D)) k^T, alpha 32; the maximum is taken per row.

    allowed: broadcastable to [B, H, Q, K]: bool, True where a query may look, or what is added to its scores (-inf
    where it may not look). Scores stay 32 times smaller than in plain attention until their maximum is gone, so fp16
    does not overflow. Returns [B, H, Q, D].
    """
    scale = PB_RELAX_ALPHA * math.sqrt(q_BHQD.shape[-1])
    scores_BHQK = (q_BHQD / scale) @ k_BHKD.transpose(-1, -2)
    scores_BHQK = _limited(scores_BHQK, allowed, scale=PB_RELAX_ALPHA)
    relaxed_BHQK = PB_RELAX_ALPHA * (scores_BHQK - scores_BHQK.detach().amax(dim=-1, keepdim=True))
    return nn.functional.dropout(relaxed_BHQK.softmax(dim=-1), dropout) @ v_BHKD


def plain_attention(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, *, allowed: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with scores at full size: the form that overflows fp16 in deep models."""
    scores_BHQK = (q_BHQD @ k_BHKD.transpose(-1, -2)) / math.sqrt(q_BHQD.shape[-1])
    probabilities_BHQK = _limited(scores_BHQK, allowed, scale=1.0).softmax(dim=-1)
    return nn.functional.dropout(probabilities_BHQK, dropout) @ v_BHKD


def fused_attention(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, *, allowed: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Torch's fused kernel; `allowed=None` means causal: as many queries as keys, or a single one that is the last.

    Short fp32 rows on a CPU take two plain products, which are a quarter faster there.
    """
    q_BHQD = q_BHQD / math.sqrt(q_BHQD.shape[-1])
    if allowed is not None and allowed.dtype != torch.bool:
        allowed = allowed.to(q_BHQD.dtype)
    is_cpu, dtype, length = q_BHQD.device.type == "cpu", q_BHQD.dtype, q_BHQD.shape[2]
    is_causal = allowed is None and length > 1
    if is_causal and is_written_out(length, is_cpu=is_cpu, dtype=dtype, dropout=dropout):
        return _short_attention(q_BHQD, k_BHKD, v_BHKD)
    return nn.functional.scaled_dot_product_attention(
        q_BHQD, k_BHKD, v_BHKD, attn_mask=allowed, dropout_p=dropout, is_causal=is_causal, scale=1.0
    )


def staged_mask(stages_BL: Tensor, groups_BL: Tensor) -> Tensor:
    """bool [B, 1, L, L]: a token sees those of its own or an earlier stage, if they are of its group or of group 0.

    One stage for several tokens lets them see each other; a stage for each makes them causal, in the order of their
    stages and not of their places (CogView2: masks that lie in the attention alone).
    """
    is_reached_BLL = stages_BL[:, None, :] <= stages_BL[:, :, None]
    is_ours_BLL = (groups_BL[:, None, :] == 0) | (groups_BL[:, None, :] == groups_BL[:, :, None])
    return (is_reached_BLL & is_ours_BLL)[:, None]


def is_written_out(length: int, *, is_cpu: bool, dtype: torch.dtype, dropout: float) -> bool:
    """Whether `fused_attention` takes plain products for causal rows of `length` tokens."""
    return length <= SHORT_ROW and is_cpu and dtype == torch.float32 and dropout == 0.0


def _limited(scores_BHQK: Tensor, allowed: Tensor, *, scale: float) -> Tensor:
    """Scores that are `scale` times too small, with -inf where a query may not look, or with what is to be added."""
    if allowed.dtype == torch.bool:
        return scores_BHQK.masked_fill(~allowed, -torch.inf)
    return scores_BHQK + allowed.to(scores_BHQK.dtype) / scale


def _short_attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
    """Causal attention with all scores at once, [B H, L, L]; queries are scaled already."""
    batch, heads, length, _ = q_BHLD.shape
    q_NLD, k_NLD, v_NLD = (tensor.reshape(batch * heads, length, -1) for tensor in (q_BHLD, k_BHLD, v_BHLD))
    future_LL = torch.full((length, length), -torch.inf).triu(1)
    scores_NLL = torch.baddbmm(future_LL.expand(batch * heads, -1, -1), q_NLD, k_NLD.transpose(1, 2))
    return (scores_NLL.softmax(dim=-1) @ v_NLD).view(batch, heads, length, -1)


def causal_mask(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """bool [Q, K]: the queries are the last Q of the K positions, and each sees itself and what lies before it."""
    positions = torch.arange(num_keys, device=device)
    return positions[None, :] <= positions[num_keys - num_queries :, None]
