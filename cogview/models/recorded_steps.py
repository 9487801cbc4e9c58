"""A model's step by one token as one command to the GPU: recorded once, then played again (CUDA graphs).

In: the hidden states of one token of each row, [B, E]. Out: the same after all layers, as `one_token.Steps` has them.
A recording knows addresses, not values. So whatever changes from token to token lies in tensors that stay where they
are: the states, the place where keys and values are kept, and what may be looked at. All keys up to a round number are
looked at, and those that are not there yet are forbidden; a longer row takes another recording. On a CPU there is
nothing to record, and the same steps are done one by one.
"""

# B batch, E hidden, H heads, D head size, K keys

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview.models.one_token import Steps

ROUND = 512  # keys: a recording for each half thousand, so that short rows do not read the places of long ones
Work = Callable[[], Tensor]


class RecordedSteps:
    """The layers of a model and one cache of keys and values, [B, H, K, D] of each layer."""

    def __init__(self, steps: Steps, *, caches: Sequence[tuple[Tensor, ...]]) -> None:
        self._steps, self._caches = steps, caches
        keys = caches[0][0]
        batch, heads, length, head_size = keys.shape
        self._hidden_BE = keys.new_zeros(batch, heads * head_size)
        self._place_1 = torch.zeros(1, dtype=torch.int64, device=keys.device)
        self._limits_B11K = keys.new_empty(batch, 1, 1, length)
        self._recordings: dict[int, Work] = {}

    def __call__(self, hidden_BE: Tensor, *, filled: int, allowed: Tensor | None) -> Tensor:
        """Hidden states [B, E] behind the last layer, valid until the next call.

        filled: keys that are there, behind which the new ones are kept; allowed: broadcastable to
        [B, 1, 1, filled + 1], bool or what is added to scores.
        """
        end, length = filled + 1, self._limits_B11K.shape[-1]
        self._hidden_BE.copy_(hidden_BE)
        self._place_1.fill_(filled)
        limits_B11K = self._limits_B11K.fill_(-torch.inf)[..., :end]  # all of it: a cache may be filled anew
        if allowed is None:
            limits_B11K.zero_()
        elif allowed.dtype == torch.bool:
            limits_B11K.masked_fill_(allowed, 0.0)
        else:
            limits_B11K.copy_(allowed)
        room = min(length, -(-end // ROUND) * ROUND)
        if room not in self._recordings:
            self._recordings[room] = recorded(lambda: self._advance(room), device=hidden_BE.device)
        return self._recordings[room]()

    def _advance(self, room: int) -> Tensor:
        """One step by the tensors that stay; doing it twice changes nothing."""

        def store(kept_BHKD: Tensor, new_BHD: Tensor) -> Tensor:
            kept_BHKD.index_copy_(2, self._place_1, new_BHD.unsqueeze(2))
            return kept_BHKD.narrow(2, 0, room)

        limits_B11K = self._limits_B11K.narrow(3, 0, room)
        return self._steps.through(self._hidden_BE, caches=self._caches, store=store, allowed=limits_B11K)


def recorded(work: Work, *, device: torch.device) -> Work:
    """What does `work` again by one command; `work` itself where the device has no such commands.

    `work` is done once before, on a stream of its own, so that libraries have made what they need, and must bear that.
    """
    if device.type != "cuda":
        return work
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()

    def play() -> Tensor:
        graph.replay()
        return result

    return play
