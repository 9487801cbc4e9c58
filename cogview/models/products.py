"""Products with weights on the CPUs where torch's own choice is slow.

In: rows [..., I] and a weight [O, I]. Out: rows @ weight^T + bias, [..., O]. torch multiplies fp32 matrices with MKL,
which keeps its AVX-512 kernels for Intel's CPUs. oneDNN, which comes with torch too, has them for all: on two cores of
an AMD EPYC it reads weights for one row at 32 GB/s where MKL reads 16, and multiplies 1,500 rows at 480 GFLOP/s where
MKL does 217. So there fp32 products are oneDNN's; everywhere else, and while a graph is compiled, they are torch's. The
two differ by rounding alone.
"""

# O outputs, I inputs

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

OTHER_VENDORS = ("AuthenticAMD", "HygonGenuine")
PLAIN = (Tensor, nn.Parameter)  # neither spread over workers nor without content


@functools.cache
def prefers_onednn() -> bool:
    """Whether this CPU has AVX-512, and MKL does not use it."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    about = Path("/proc/cpuinfo")
    words = about.read_text() if about.exists() else platform.processor()
    return any(vendor in words for vendor in OTHER_VENDORS)


def takes_onednn(weight_OI: Tensor) -> bool:
    """Whether products with this weight are oneDNN's."""
    return (
        prefers_onednn()
        and weight_OI.dtype == torch.float32
        and weight_OI.device.type == "cpu"
        and type(weight_OI) in PLAIN
    )


def linear(rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """What nn.functional.linear gives, differentiable once where it is oneDNN's."""
    if torch.compiler.is_compiling() or not (
        takes_onednn(weight_OI)
        and rows.dtype == weight_OI.dtype
        and rows.device == weight_OI.device
        and type(rows) in PLAIN
        and rows.numel()
    ):
        return nn.functional.linear(rows, weight_OI, bias_O)
    if torch.is_grad_enabled():
        return _Linear.apply(rows, weight_OI, bias_O)  # type: ignore[no-any-return, no-untyped-call]
    return onednn_linear(rows, weight_OI, bias_O)


def onednn_linear(rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same by oneDNN, without a gradient. weight_OI: as it is, or as `packed` gave it."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight_OI, bias_O, "none", [], "")
    return found


def onednn_gelu(rows_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """GELU's tanh form of that product; in the same pass but for a single row, for which oneDNN's pass is slower."""
    if len(rows_BI) == 1:
        return nn.functional.gelu(onednn_linear(rows_BI, weight_OI, bias_O), approximate="tanh")
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows_BI, weight_OI, bias_O, "gelu", [], "tanh")
    return found


def linear_gelu(rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same by torch's own product."""
    return nn.functional.gelu(nn.functional.linear(rows, weight_OI, bias_O), approximate="tanh")


def packed(weight_OI: Tensor, *, rows: int) -> Tensor:
    """A copy of a weight that lies as oneDNN reads it fastest for so many rows."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
    return copy


class Linear(nn.Linear):
    """A linear layer whose product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear names it
        """rows @ weight^T + bias, [..., O]."""
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """The product, and its gradients as products."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        for_rows, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if for_weight else None, weight_OI if for_rows else None)
        return onednn_linear(rows, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight_OI = ctx.saved_tensors
        d_rows = d_weight_OI = d_bias_O = None
        if ctx.needs_input_grad[0]:
            d_rows = onednn_linear(gradient, weight_OI.t(), None)
        if ctx.needs_input_grad[1]:
            d_weight_OI = onednn_linear(gradient.flatten(0, -2).t(), rows.flatten(0, -2).t(), None)
        if ctx.needs_input_grad[2]:
            d_bias_O = gradient.flatten(0, -2).sum(0)
        return d_rows, d_weight_OI, d_bias_O
