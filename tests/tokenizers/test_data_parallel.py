"""Data-parallel training: under each rule two workers with half of the batch each end with the codebook of one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cogview.tokenizers.codebook import CodebookConfig, build_codebook
from tests.two_workers import process_group, two_workers

STEPS = 20
BOOK = CodebookConfig(num_codes=32, code_dim=8, decay=0.8, start_after=2, revive_below=0.3, revive_every=4)
BOOKS = {
    "moving_average": BOOK,
    "straight_through": replace(BOOK, rule="straight_through"),
    "gumbel_hard": replace(BOOK, rule="gumbel", temperature_steps=STEPS, kl_weight=0.01),
    "gumbel_soft": replace(BOOK, rule="gumbel", temperature_steps=STEPS, gumbel_hard=False),
    "fixed": replace(BOOK, rule="fixed"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Book -> the state trained alone, by the first of two workers, and by the second."""
    folder = tmp_path_factory.mktemp("workers")
    with two_workers(_train_half, folder):
        alone = {name: _train(book, rank=0, world=1) for name, book in BOOKS.items()}
    halves = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {name: [alone[name], halves[0][name], halves[1][name]] for name in BOOKS}


@pytest.mark.parametrize("name", BOOKS)
def test_two_workers_end_with_the_codebook_of_one(trained: dict[str, list[dict[str, torch.Tensor]]], name: str) -> None:
    alone, first, second = trained[name]
    start = _build(BOOKS[name]).state_dict()
    assert (alone["codebook.codebook_KD"] - start["codebook.codebook_KD"]).abs().max() > 0.1  # not where it began
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert all(torch.allclose(tensor, alone[key], atol=1e-5) for key, tensor in first.items())


def _train_half(rank: int, folder: Path) -> None:
    with process_group(rank, folder):
        states = {name: _train(book, rank=rank, world=2) for name, book in BOOKS.items()}
        torch.save(states, folder / f"{rank}.pt")


class _Smooth(nn.Module):
    """A codebook between linear maps. Any ReLU would answer differences of the last bit with jumps of the gradient."""

    def __init__(self, book: CodebookConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(24, 8), nn.Linear(8, 24)
        self.codebook = build_codebook(book)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        quantized = self.codebook(self.encoder(inputs))
        return (self.decoder(quantized.vectors_ND) - inputs).square().mean() + quantized.loss


def _build(book: CodebookConfig) -> _Smooth:
    torch.manual_seed(0)
    return _Smooth(book).train()


def _train(book: CodebookConfig, *, rank: int, world: int) -> dict[str, torch.Tensor]:
    network = _build(book)
    model = DistributedDataParallel(network, broadcast_buffers=False) if world > 1 else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(STEPS):
        inputs = torch.randn(128, 24, generator=torch.Generator().manual_seed(step))
        loss = model(inputs.chunk(world)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
