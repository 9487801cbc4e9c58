"""Gumbel draws: the right probabilities, the right gradient, the same noise however the batch is cut."""

import math

import pytest
import torch

from cogview.tokenizers.gumbel import GumbelDraw, draw_codes, gumbel_noise

DRAW = GumbelDraw(temperature=0.5, hard=True, with_kl=True, seed=3, step=1, first_row=0)


def soft(**changes: float) -> GumbelDraw:
    return GumbelDraw(**{**vars(DRAW), "hard": False, **changes})


def test_codes_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    codebook = torch.tensor([[0.0, 0.0], [0.7, 0.0], [0.0, 1.0]])
    vector = torch.tensor([0.3, 0.2])
    expected = torch.softmax(-(codebook - vector).square().sum(dim=1) / DRAW.temperature, dim=0)
    _, codes, _ = draw_codes(vector.expand(40_000, 2), codebook, draw=DRAW)
    drawn = torch.bincount(codes, minlength=3) / 40_000
    assert torch.allclose(drawn, expected, atol=0.01)


def test_a_low_temperature_draws_the_nearest_code() -> None:
    vectors, codebook = torch.randn(500, 4), torch.randn(16, 4)
    quantized, codes, _ = draw_codes(vectors, codebook, draw=GumbelDraw(**{**vars(DRAW), "temperature": 1e-6}))
    assert torch.equal(codes, torch.cdist(vectors, codebook).argmin(dim=1))
    assert torch.equal(quantized, codebook[codes])


def test_noise_depends_on_the_vectors_number_and_not_on_the_cut() -> None:
    whole = gumbel_noise(torch.empty(300, 16), seed=1, step=2, first_row=0)
    for first, last in ((0, 1), (63, 65), (100, 300), (299, 300)):
        part = gumbel_noise(torch.empty(last - first, 16), seed=1, step=2, first_row=first)
        assert torch.equal(part, whole[first:last])
    assert not torch.equal(gumbel_noise(torch.empty(300, 16), seed=1, step=3, first_row=0), whole)
    assert not torch.equal(gumbel_noise(torch.empty(300, 16), seed=2, step=2, first_row=0), whole)
    assert whole.mean().item() == pytest.approx(0.5772, abs=0.06)
    assert whole.var().item() == pytest.approx(math.pi**2 / 6, abs=0.15)


def test_the_size_of_a_chunk_changes_neither_values_nor_gradients() -> None:
    outcomes = []
    for chunk_bytes in (1, 50 * 16 * 4, 2**26):
        vectors = torch.randn(120, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        codebook = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        quantized, codes, kl = draw_codes(vectors, codebook, draw=DRAW, chunk_bytes=chunk_bytes)
        (quantized.square().sum() + kl).backward()
        outcomes.append((codes, quantized.detach(), vectors.grad, codebook.grad))
    for codes, *others in outcomes[1:]:
        assert torch.equal(codes, outcomes[0][0])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(others, outcomes[0][1:], strict=True))


def test_the_soft_gradient_is_that_of_the_mixture() -> None:
    vectors = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codebook = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    noise = gumbel_noise(torch.empty(6, 5), seed=3, step=1, first_row=0).double()
    weights = torch.softmax(-torch.cdist(vectors, codebook).square() / 0.5 + noise, dim=1)
    target = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(((weights @ codebook) * target).sum(), (vectors, codebook))
    own = [tensor.detach().float().requires_grad_() for tensor in (vectors, codebook)]
    quantized, _, _ = draw_codes(own[0], own[1], draw=soft())
    found = torch.autograd.grad((quantized * target.float()).sum(), own)
    assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_a_hard_draw_is_a_code_with_the_gradient_of_the_mixture() -> None:
    vectors, codebook = torch.randn(20, 3).requires_grad_(), torch.randn(5, 3).requires_grad_()
    target = torch.randn(20, 3)
    drawn, codes, _ = draw_codes(vectors, codebook, draw=DRAW)
    mixed, _, _ = draw_codes(vectors, codebook, draw=soft())
    assert torch.equal(drawn, codebook[codes])
    (of_drawn,) = torch.autograd.grad((drawn * target).sum(), vectors, retain_graph=True)
    (of_mixed,) = torch.autograd.grad((mixed * target).sum(), vectors)
    assert torch.allclose(of_drawn, of_mixed, atol=1e-5)
    (of_codes,) = torch.autograd.grad(drawn.sum(), codebook)
    assert of_codes.abs().sum() > 0


def test_the_divergence_runs_from_uniform_to_one_certain_code() -> None:
    vectors, codebook = torch.randn(50, 4), torch.randn(16, 4)
    *_, of_hot = draw_codes(vectors, codebook, draw=GumbelDraw(**{**vars(DRAW), "temperature": 1e6}))
    *_, of_cold = draw_codes(vectors, codebook, draw=GumbelDraw(**{**vars(DRAW), "temperature": 1e-4}))
    assert of_hot.item() == pytest.approx(0, abs=1e-4)
    assert of_cold.item() == pytest.approx(math.log(16), rel=1e-2)
