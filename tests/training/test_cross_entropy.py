"""Chunked cross-entropy: the plain form's losses and gradients, without its memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cogview.training.cross_entropy import chunk_tokens, token_losses

TOKENS, HIDDEN, VOCABULARY = 50, 8, 300
CHUNKED = 4 * VOCABULARY * 7  # 7 tokens at once: 7 whole chunks and one token


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output matrix, labels, and a weight for each token's loss."""
    generator = torch.Generator().manual_seed(0)
    hidden, output = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (TOKENS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), output.requires_grad_(), labels, torch.rand(TOKENS, generator=generator)


def plain(hidden: Tensor, output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy((hidden @ output.T).float(), labels, reduction="none")


def losses_and_gradients(form: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    hidden, output, labels, weights = inputs(dtype)
    losses = form(hidden, output, labels, **options)
    (losses * weights).sum().backward()
    assert hidden.grad is not None
    assert output.grad is not None
    return [losses.detach(), hidden.grad, output.grad]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_chunks_give_the_plain_losses_and_gradients() -> None:
    found = losses_and_gradients(token_losses, torch.float32, logits_bytes=CHUNKED)
    expected = losses_and_gradients(plain, torch.float32)
    assert all(relative(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


def test_the_gradient_is_that_of_the_function() -> None:
    hidden, output, labels, _ = inputs(torch.float64)
    few, small = labels[:10] % 20, 4 * 20 * 3  # 10 tokens over 20 ids, 3 at once
    whole = token_losses(hidden[:10], output[:20], few)
    assert torch.allclose(whole, token_losses(hidden[:10], output[:20], few, logits_bytes=small), rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda h, o: token_losses(h, o, few, logits_bytes=small), (hidden[:10], output[:20])
    )


def test_half_precision_loses_nothing_to_the_chunks() -> None:
    found = losses_and_gradients(token_losses, torch.bfloat16, logits_bytes=CHUNKED)
    expected = losses_and_gradients(plain, torch.bfloat16)
    assert found[0].dtype == torch.float32
    assert relative(found[0], expected[0]) < 1e-6
    assert all(relative(a, b) < 5e-3 for a, b in zip(found[1:], expected[1:], strict=True))  # bf16 has 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_chunk_gives_the_plain_losses_and_gradients(dtype: torch.dtype) -> None:
    found = losses_and_gradients(token_losses, dtype)
    expected = losses_and_gradients(plain, dtype)
    assert found[0].dtype == torch.float32
    assert all(
        relative(a, b) < (1e-6 if dtype == torch.float32 else 5e-3) for a, b in zip(found, expected, strict=True)
    )


def test_one_chunk_holds_its_logits_once() -> None:
    hidden, output, labels, weights = inputs()
    with LogitBuffers() as watch:
        losses = token_losses(hidden, output, labels)
        (losses * weights).sum().backward()
    assert len(watch.places) == 1


def test_the_gradient_is_taken_once() -> None:
    hidden, output, labels, _ = inputs()
    total = token_losses(hidden, output, labels).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        total.backward()


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    with LargestTensor() as watch:
        losses_and_gradients(plain, torch.float32)
    assert watch.numel == TOKENS * VOCABULARY
    with LargestTensor() as watch:
        losses_and_gradients(token_losses, torch.float32, logits_bytes=CHUNKED)
    assert watch.numel == VOCABULARY * HIDDEN  # the output matrix; a chunk is 7 x 300


def test_large_logits_do_not_overflow() -> None:
    hidden, output, labels, _ = inputs()
    losses = token_losses(hidden * 1e4, output, labels, logits_bytes=CHUNKED)
    assert torch.isfinite(losses).all()
    assert torch.allclose(losses, plain(hidden * 1e4, output, labels))


@pytest.mark.parametrize(("budget", "expected"), [(256 * 2**20, 1152), (1, 1)])
def test_the_budget_decides_how_many_tokens_go_at_once(budget: int, expected: int) -> None:
    assert chunk_tokens(58_240, logits_bytes=budget) == expected


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class LogitBuffers(TorchDispatchMode):
    """The memory in which any operation leaves tokens times ids numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    @property
    def places(self) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in self.kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kept += [result] if isinstance(result, Tensor) and result.numel() == TOKENS * VOCABULARY else []
        return result
