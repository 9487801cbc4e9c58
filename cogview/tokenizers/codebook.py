"""The moving-average codebook of the VQ-VAE (CogView, section 2.2 and appendix A; van den Oord et al. 2017, appendix
A.1).

In: encoder outputs. Out: codes, their vectors, and statistics. The statistics are summed over all data-parallel workers
before they touch the codebook, so that one worker with a batch of 2b and two with b each end with the same codebook.

Two traps are avoided here. The running count of a code starts at one and the running sum at the code itself; were the
count to start at zero, the first update would multiply each code that was hit by about 1 / ((1 - decay) * count) and
most of the codebook would be lost at once. And codes that nothing uses any more are moved to vectors of the present
batch.
"""

# N vectors, D code dimension, K codes

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogview.errors import ConfigError

SEARCH_CHUNK = 8192  # vectors searched at a time: 8192 x 8192 fp32 distances are 256 MiB


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """num_codes: 8192 in the paper; code_dim: 256; decay and epsilon: the paper's moving average.

    start_after: training batches that pass unquantized, so that the codebook can start from vectors that mean
    something; 0 quantizes from the first batch on. revive_below: a code whose running count falls below this is moved
    to a vector of the batch; 0 switches it off. revive_every: how many updates lie between two such moves.
    """

    num_codes: int = 8192
    code_dim: int = 256
    decay: float = 0.99
    epsilon: float = 1e-5
    start_after: int = 0
    revive_below: float = 0.1
    revive_every: int = 10

    def __post_init__(self) -> None:
        if not 2 <= self.num_codes <= 65536:
            raise ConfigError(f"num_codes={self.num_codes}: image codes are stored as uint16; choose from 2 to 65536")
        if not 0 < self.decay < 1:
            raise ConfigError(f"decay={self.decay}: choose a number between 0 and 1; the paper's is 0.99")


def nearest_codes(vectors_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """The index of the nearest code (squared L2) for each vector, searched in chunks: int64 [N].

    Of codes at exactly the same computed distance the lowest index wins.
    """
    if vectors_ND.shape[-1] != codebook_KD.shape[-1]:
        raise ConfigError(
            f"vectors of dimension {vectors_ND.shape[-1]} cannot be looked up in a codebook of dimension "
            f"{codebook_KD.shape[-1]}; load the encoder and the codebook of one tokenizer"
        )
    half_norms_K = codebook_KD.square().sum(dim=1) / 2
    codes = [
        torch.addmm(half_norms_K, chunk_ND, codebook_KD.T, alpha=-1).argmin(dim=1)
        for chunk_ND in torch.split(vectors_ND, SEARCH_CHUNK)
    ]
    return torch.cat(codes) if codes else vectors_ND.new_zeros(0, dtype=torch.long)


class MovingAverageCodebook(nn.Module):
    """K codes of dimension D that follow the encoder outputs by exponential moving averages."""

    codebook_KD: Tensor
    counts_K: Tensor
    sums_KD: Tensor
    num_batches: Tensor

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        bound = (5 / 3) * (6 / (config.num_codes + config.code_dim)) ** 0.5  # Xavier uniform, gain of tanh
        codebook_KD = torch.empty(config.num_codes, config.code_dim).uniform_(-bound, bound)
        self.register_buffer("codebook_KD", codebook_KD)
        self.register_buffer("counts_K", torch.ones(config.num_codes))
        self.register_buffer("sums_KD", codebook_KD.clone())
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors [..., D] of int64 codes [...]."""
        return nn.functional.embedding(codes, self.codebook_KD)

    def forward(self, vectors_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Straight-through vectors [N, D], codes [N] and the commitment loss. In training the codes move as well."""
        detached_ND = vectors_ND.detach().float()
        if self.training:
            self.num_batches.add_(1)
            if int(self.num_batches) <= self.config.start_after:
                no_codes_N = torch.zeros(len(vectors_ND), dtype=torch.long, device=vectors_ND.device)
                return vectors_ND, no_codes_N, vectors_ND.new_zeros(())
            if int(self.num_batches) == self.config.start_after + 1:
                self._start_from(detached_ND)
        codes_N = nearest_codes(detached_ND, self.codebook_KD)
        quantized_ND = self.lookup(codes_N).to(vectors_ND.dtype)
        commitment = nn.functional.mse_loss(vectors_ND, quantized_ND)
        straight_through_ND = vectors_ND + (quantized_ND - vectors_ND).detach()
        if self.training:
            self._update(detached_ND, codes_N)
        return straight_through_ND, codes_N, commitment

    def usage(self) -> tuple[Tensor, Tensor]:
        """Share of codes in use and perplexity, from the running counts."""
        shares_K = self.counts_K / self.counts_K.sum()
        perplexity = torch.exp(-(shares_K * torch.log(shares_K.clamp_min(1e-12))).sum())
        in_use = (self.counts_K >= self.config.revive_below).float().mean()
        return in_use, perplexity

    @torch.no_grad()
    def _start_from(self, vectors_ND: Tensor) -> None:
        """Move the whole codebook onto vectors of the first batch, in rounds that double the codes placed so far.

        Each round draws vectors in proportion to their squared distance from the codes already there, so that a ground
        colour that fills most of every picture does not take most of the codebook.
        """
        placed = 0
        while placed < self.config.num_codes:
            if placed:
                distances_N = self._squared_distances(vectors_ND, self.codebook_KD[:placed])
            else:
                distances_N = torch.ones(len(vectors_ND), device=vectors_ND.device)
            upto = min(self.config.num_codes, max(1, 2 * placed))
            self._place(torch.arange(placed, upto, device=vectors_ND.device), vectors_ND, distances_N, salt=upto)
            placed = upto

    @torch.no_grad()
    def _update(self, vectors_ND: Tensor, codes_N: Tensor) -> None:
        counts_K = torch.zeros_like(self.counts_K).index_add_(0, codes_N, torch.ones_like(codes_N, dtype=torch.float32))
        sums_KD = torch.zeros_like(self.sums_KD).index_add_(0, codes_N, vectors_ND)
        if _distributed():
            dist.all_reduce(counts_K)
            dist.all_reduce(sums_KD)
        decay, epsilon = self.config.decay, self.config.epsilon
        self.counts_K.mul_(decay).add_(counts_K, alpha=1 - decay)
        self.sums_KD.mul_(decay).add_(sums_KD, alpha=1 - decay)
        total = self.counts_K.sum()
        smoothed_K = (self.counts_K + epsilon) / (total + self.config.num_codes * epsilon) * total
        self.codebook_KD.copy_(self.sums_KD / smoothed_K.unsqueeze(1))
        if self.config.revive_below > 0 and int(self.num_batches) % self.config.revive_every == 0:
            dead = (self.counts_K < self.config.revive_below).nonzero().squeeze(1)
            if len(dead):
                distances_N = self._squared_distances(vectors_ND, self.codebook_KD)
                self._place(dead, vectors_ND, distances_N, salt=0)

    def _place(self, indices: Tensor, vectors_ND: Tensor, weights_N: Tensor, *, salt: int) -> None:
        """Put the codes at `indices` onto vectors of all workers' batches, drawn by weight, each with a count of one.

        The draw is a race of exponential clocks over the numbering of the whole batch, so that it does not depend on
        how the batch is spread over workers. Only the times and the winners travel.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
        number, size = len(indices), len(vectors_ND)
        generator = torch.Generator().manual_seed(int(self.num_batches) * 65537 + salt)
        clocks_N = torch.empty(size * world).exponential_(generator=generator)[rank * size : (rank + 1) * size]
        times_N = clocks_N.to(vectors_ND.device) / weights_N.clamp_min(1e-12)
        own_times, own_rows = times_N.topk(min(number, size), largest=False)
        if len(own_rows) < number:  # fewer vectors than codes: some are taken again
            again = torch.arange(number, device=own_rows.device) % len(own_rows)
            own_times, own_rows = own_times[again], own_rows[again]
        times = own_times
        if world > 1:
            gathered = [torch.empty_like(own_times) for _ in range(world)]
            dist.all_gather(gathered, own_times)
            times = torch.cat(gathered)
        winners = times.topk(number, largest=False).indices  # rank * number + place, fastest first
        drawn = torch.zeros(number, vectors_ND.shape[1], device=vectors_ND.device)
        mine = winners // number == rank
        drawn[mine] = vectors_ND[own_rows[winners[mine] % number]]
        if world > 1:
            dist.all_reduce(drawn)
        noise = torch.randn(drawn.shape, generator=generator).to(drawn.device)
        drawn += noise * (drawn.square().mean().sqrt() * 1e-3 + 1e-9)  # two codes on one vector would never part
        self.codebook_KD[indices] = drawn
        self.sums_KD[indices] = drawn
        self.counts_K[indices] = 1.0

    @staticmethod
    def _squared_distances(vectors_ND: Tensor, codebook_KD: Tensor) -> Tensor:
        return (vectors_ND - codebook_KD[nearest_codes(vectors_ND, codebook_KD)]).square().sum(dim=1)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
