"""Where codes are put: onto encoder outputs of the whole batch, the same on every data-parallel worker.

In: this worker's vectors. Out: vectors drawn from those of all workers, for a codebook that starts or for codes that
nothing uses any more. A draw depends on a seed and on the numbering of the whole batch, never on how the batch is
spread over workers; all workers must bring the same number of vectors.
"""

# N vectors of this worker, D code dimension, R drawn vectors

import torch
import torch.distributed as dist
from torch import Tensor

from cogview.tokenizers.code_search import squared_distances


def world_and_rank() -> tuple[int, int]:
    """How many data-parallel workers there are, and which of them this is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The tensor itself, summed in place over all workers."""
    if world_and_rank()[0] > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def draw_vectors(vectors_ND: Tensor, weights_N: Tensor, *, number: int, seed: int) -> Tensor:
    """`number` vectors [R, D] of all workers' batches, drawn by weight without repetition while there are enough.

    The draw is a race of exponential clocks. Only the times and the winners travel between workers.
    """
    world, rank = world_and_rank()
    size = len(vectors_ND)
    generator = torch.Generator().manual_seed(seed)
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
    drawn_RD = vectors_ND.new_zeros(number, vectors_ND.shape[1])
    mine = winners // number == rank
    drawn_RD[mine] = vectors_ND[own_rows[winners[mine] % number]]
    sum_over_workers(drawn_RD)
    noise_RD = torch.randn(drawn_RD.shape, generator=generator).to(drawn_RD.device)
    # Two codes on one vector would never part.
    return drawn_RD + noise_RD * (drawn_RD.square().mean().sqrt() * 1e-3 + 1e-9)


def spread_vectors(vectors_ND: Tensor, *, number: int, seed: int) -> Tensor:
    """`number` vectors [R, D] of all workers' batches for a codebook that starts.

    They are drawn in rounds, each as many as all before it. A round draws in proportion to the squared distance from
    what is there already, so that a ground colour that fills most of every picture does not take most of the codebook.
    """
    placed_RD = vectors_ND[:0]
    while len(placed_RD) < number:
        upto = min(number, max(1, 2 * len(placed_RD)))
        if len(placed_RD):
            weights_N = squared_distances(vectors_ND, placed_RD)
        else:
            weights_N = torch.ones(len(vectors_ND), device=vectors_ND.device)
        drawn_RD = draw_vectors(vectors_ND, weights_N, number=upto - len(placed_RD), seed=seed + upto)
        placed_RD = torch.cat([placed_RD, drawn_RD])
    return placed_RD
