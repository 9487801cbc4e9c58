"""Cross-entropy over a large vocabulary that never holds all logits at once.

In: last hidden states, the output matrix, labels. Out: nats per token in fp32. The logits of the paper's batch of 12
rows, 12 x 1088 x 58,240, are 3 GB in fp32, and the plain form holds them three times. Here they are made a chunk of
tokens at a time, reduced to one number a token, and made again when the gradient needs them: one more product with the
output matrix, about 1 % of a step of the 4 B model. Where all tokens fit into one chunk its logits stay, and become
their own gradient in place: a third of the plain form's memory, and fewer passes over it.
"""

# N tokens, E hidden, V vocabulary; chunks of C tokens

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cogview.models.products import linear

LOGITS_BYTES = 256 * 2**20  # fp32 logits of 1,152 tokens over 58,240 ids: enough for an efficient product


def token_losses(hidden_NE: Tensor, output_VE: Tensor, labels_N: Tensor, *, logits_bytes: int = LOGITS_BYTES) -> Tensor:
    """-log softmax(hidden output^T)[label] for each token, at least fp32 [N]; at most `logits_bytes` of logits at once.

    Their gradient can be asked for once: a second backward pass through the same losses raises RuntimeError.
    """
    size = chunk_tokens(output_VE.shape[0], logits_bytes=logits_bytes)
    losses_N: Tensor
    if len(hidden_NE) <= size:
        losses_N = _LossesOfOneChunk.apply(hidden_NE, output_VE, labels_N)  # type: ignore[no-untyped-call]
    else:
        losses_N = _ChunkedLosses.apply(hidden_NE, output_VE, labels_N, size)  # type: ignore[no-untyped-call]
    return losses_N


def chunk_tokens(vocab_size: int, *, logits_bytes: int) -> int:
    """How many tokens' fp32 logits fit into a byte budget, 1 or more."""
    return max(1, logits_bytes // (4 * vocab_size))


class _LossesOfOneChunk(torch.autograd.Function):
    """Keeps the exponentials of the logits, and turns them into the logits' gradient where they lie."""

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, output_VE: Tensor, labels_N: Tensor) -> Tensor:
        powers_NV = _logits(hidden_NE, output_VE)
        losses_N, _, sums_N = _reduce(powers_NV, labels_N)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden_NE, output_VE, labels_N, sums_N)
            ctx.powers_NV = powers_NV
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden_NE, output_VE, labels_N, sums_N = ctx.saved_tensors
        d_logits_NV, ctx.powers_NV = ctx.powers_NV, None
        if d_logits_NV is None:
            raise RuntimeError("the gradient of these losses was taken already; compute them again")
        d_logits_NV.mul_((gradients[0] / sums_N)[:, None])
        narrow_NV = d_logits_NV.scatter_add_(1, labels_N[:, None], -gradients[0][:, None]).to(hidden_NE.dtype)
        d_output_VE = narrow_NV.T @ hidden_NE if ctx.needs_input_grad[1] else None
        return linear(narrow_NV, output_VE.T), d_output_VE, None


class _ChunkedLosses(torch.autograd.Function):
    """Keeps hidden states, labels and the log of the softmax's denominator; makes the logits twice."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_NE: Tensor, output_VE: Tensor, labels_N: Tensor, size: int) -> Tensor:
        chunks = zip(torch.split(hidden_NE, size), torch.split(labels_N, size), strict=True)
        parts = [_reduce(_logits(hidden_CE, output_VE), labels_C) for hidden_CE, labels_C in chunks]
        losses_N, log_sums_N, _ = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden_NE, output_VE, labels_N, log_sums_N)
        ctx.size = size  # type: ignore[attr-defined]
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """The gradient of the output matrix is gathered in fp32, unless that is frozen."""
        hidden_NE, output_VE, labels_N, log_sums_N = ctx.saved_tensors
        d_hidden_NE = torch.empty_like(hidden_NE)
        d_output_VE = torch.zeros_like(output_VE, dtype=log_sums_N.dtype) if ctx.needs_input_grad[1] else None
        parts = [
            torch.split(tensor, ctx.size) for tensor in (hidden_NE, labels_N, log_sums_N, gradients[0], d_hidden_NE)
        ]
        for hidden_CE, labels_C, log_sum_C, gradient_C, d_hidden_CE in zip(*parts, strict=True):
            d_logits_CV = _gradient_of_chunk(hidden_CE, output_VE, labels_C, log_sum_C).mul_(gradient_C[:, None])
            narrow_CV = d_logits_CV.to(hidden_CE.dtype)
            d_hidden_CE.copy_(linear(narrow_CV, output_VE.T))
            if d_output_VE is not None:
                d_output_VE += narrow_CV.T @ hidden_CE
            del d_logits_CV, narrow_CV  # or they would still be there while the next ones are made
        return d_hidden_NE, None if d_output_VE is None else d_output_VE.to(output_VE.dtype), None, None


def _reduce(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, the logs of the softmax's denominators, and the denominators once the highest logit is taken off.

    What is left in the place of the logits are the exponentials that the last of these is the sum of.
    """
    labelled_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    highest_C = logits_CV.amax(dim=1)
    sum_C = logits_CV.sub_(highest_C[:, None]).exp_().sum(dim=1)
    log_sum_C = sum_C.log().add_(highest_C)
    return log_sum_C - labelled_C, log_sum_C, sum_C


def _gradient_of_chunk(hidden_CE: Tensor, output_VE: Tensor, labels_C: Tensor, log_sum_C: Tensor) -> Tensor:
    """d loss / d logits: the softmax, less one at the label."""
    d_logits_CV = _logits(hidden_CE, output_VE).sub_(log_sum_C[:, None]).exp_()
    return d_logits_CV.scatter_add_(1, labels_C[:, None], torch.full_like(log_sum_C, -1.0)[:, None])


def _logits(hidden_NE: Tensor, output_VE: Tensor) -> Tensor:
    """[N, V] in fp32, or in fp64 if that is what comes in."""
    logits_NV = linear(hidden_NE, output_VE)
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
