"""The moving-average codebook: right from the first update, the same on one worker and two."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cogview.errors import ConfigError
from cogview.tokenizers.codebook import CodebookConfig, MovingAverageCodebook, nearest_codes

SETTINGS = CodebookConfig(num_codes=64, code_dim=8, revive_every=5)


def vectors(step: int, number: int = 256) -> torch.Tensor:
    return torch.randn(number, 8, generator=torch.Generator().manual_seed(step)) + 3.0


def test_nearest_codes_equal_the_plain_distance_matrix() -> None:
    searched, codebook = vectors(0, 5000), vectors(1, 64)
    assert torch.equal(nearest_codes(searched, codebook), torch.cdist(searched, codebook).argmin(dim=1))


def test_an_exact_tie_goes_to_the_lowest_code() -> None:
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert nearest_codes(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), codebook).tolist() == [1, 0]


def test_a_codebook_of_another_dimension_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dimension 8.*dimension 4"):
        nearest_codes(torch.zeros(3, 8), torch.zeros(5, 4))


def test_the_first_update_moves_codes_without_scattering_them() -> None:
    # Were counts to start at zero, one update would throw hit codes far away: 64 codes in use would become about 19.
    codebook = MovingAverageCodebook(SETTINGS).train()
    codebook(vectors(0, 4096))
    assert codebook.codebook_KD.abs().max() < 10
    in_use = nearest_codes(vectors(1, 4096), codebook.codebook_KD).unique()
    assert len(in_use) > 55


def test_the_straight_through_gradient_is_copied_and_commitment_pulls() -> None:
    codebook = MovingAverageCodebook(SETTINGS).train()
    inputs = vectors(0).requires_grad_()
    quantized, codes, commitment = codebook(inputs)
    assert torch.allclose(quantized, codebook.lookup(codes), atol=5.0)
    (gradient,) = torch.autograd.grad(quantized.sum(), inputs, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(inputs))
    (pull,) = torch.autograd.grad(commitment, inputs)
    assert pull.abs().sum() > 0


def test_codes_that_nothing_uses_are_moved_to_the_data() -> None:
    codebook = MovingAverageCodebook(CodebookConfig(num_codes=64, code_dim=8, decay=0.5, revive_every=5)).train()
    codebook(vectors(0))
    codebook.codebook_KD[32:] = 1e3  # far from all data
    codebook.sums_KD[32:] = codebook.codebook_KD[32:] * codebook.counts_K[32:, None]
    for step in range(1, 30):
        codebook(vectors(step))
    assert codebook.codebook_KD.abs().max() < 20
    share, perplexity = codebook.usage()
    assert share > 0.9
    assert perplexity > 32


def test_batches_before_the_start_pass_unquantized() -> None:
    codebook = MovingAverageCodebook(CodebookConfig(num_codes=64, code_dim=8, start_after=2)).train()
    for step in range(2):
        passed, _, commitment = codebook(vectors(step))
        assert torch.equal(passed, vectors(step))
        assert commitment == 0
    passed, _, _ = codebook(vectors(2))
    assert not torch.equal(passed, vectors(2))


def test_two_workers_end_with_the_codebook_of_one(tmp_path: Path) -> None:
    alone = MovingAverageCodebook(SETTINGS).train()
    start = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    for step in range(20):
        alone(vectors(step))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_train_half, args=(rank, start, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    together = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(together[0], together[1])
    assert torch.allclose(together[0], alone.codebook_KD, atol=1e-5)


def _train_half(rank: int, start: dict[str, torch.Tensor], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    codebook = MovingAverageCodebook(SETTINGS).train()
    codebook.load_state_dict(start)
    for step in range(20):
        codebook(vectors(step).chunk(2)[rank])
    torch.save(codebook.codebook_KD, folder / f"{rank}.pt")
    dist.destroy_process_group()
