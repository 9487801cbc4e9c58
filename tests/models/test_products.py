"""Products by oneDNN: torch's numbers and gradients, and torch's own product wherever oneDNN's is not wanted."""

import pytest
import torch
from torch import Tensor, nn

from cogview.models import products
from cogview.models.products import Linear, linear, onednn_linear, packed

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def is_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", [(1, 12), (5, 12), (3, 7, 12), (2, 1, 12), (0, 12)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_numbers_and_gradients_are_those_of_torch(shape: tuple[int, ...], has_bias: bool, is_onednn: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape), torch.randn(20, 12), torch.randn(20) if has_bias else None]
    ours, theirs = ([None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    for function, given in ((linear, ours), (nn.functional.linear, theirs)):
        found = function(*given)
        (found * torch.arange(found.numel()).view_as(found)).sum().backward()
    with torch.no_grad():
        close(linear(*leaves), nn.functional.linear(*leaves))
    for own, other in zip(ours, theirs, strict=True):
        if own is not None and other is not None:
            close(own.grad, other.grad)


def test_frozen_weights_get_no_gradient_and_keep_no_rows(is_onednn: bool) -> None:
    layer = Linear(12, 20).requires_grad_(False)
    kept: list[Tensor] = []
    rows = torch.randn(4, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(rows).sum().backward()
    assert layer.weight.grad is None
    close(rows.grad, layer.weight.sum(0).expand(4, 12))
    assert not any(tensor.data_ptr() == rows.data_ptr() for tensor in kept)


def test_transposed_and_cut_operands_are_no_others(is_onednn: bool) -> None:
    torch.manual_seed(0)
    wide, tall = torch.randn(12, 9), torch.randn(50, 12)
    close(linear(wide.T, tall[10:30]), wide.T @ tall[10:30].T)
    close(linear(tall[::2], wide.T), tall[::2] @ wide)


def test_other_precisions_and_devices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "onednn_linear", None)  # to call it would be an error
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert linear(torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)).dtype == dtype
    assert linear(torch.ones(2, 3, device="meta"), torch.ones(4, 3, device="meta")).shape == (2, 4)


@pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("rows", [1, 3, 60])
def test_a_packed_weight_is_the_same_weight(rows: int) -> None:
    torch.manual_seed(0)
    weight_OI, bias_O, rows_BI = torch.randn(96, 48), torch.randn(96), torch.randn(rows, 48)
    close(
        onednn_linear(rows_BI, packed(weight_OI, rows=rows), bias_O), nn.functional.linear(rows_BI, weight_OI, bias_O)
    )


def close(own: Tensor | None, other: Tensor | None) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
