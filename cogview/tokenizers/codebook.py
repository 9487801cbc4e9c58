"""The codebook of the image tokenizer and the four ways to train it (CogView, section 2.2 and figure 2).

In: encoder outputs. Out: quantized vectors for the decoder, their codes, the codebook's term of the loss, and
statistics of use. The rules differ in what moves the codes:

* `moving_average`: each code is the running mean of the vectors that it won (van den Oord et al. 2017, appendix A.1);
  the paper's choice.
* `straight_through`: the gradient of a codebook loss (van den Oord et al. 2017).
* `gumbel`: the gradient through a softmax over the codes, of which one is drawn at random (`gumbel.py`).
* `fixed`: nothing.

In all but `gumbel` a vector takes its nearest code, the decoder's gradient is copied to the encoder, and a commitment
term pulls encoder outputs towards their codes. Learned codebooks are parameters, so that data-parallel training sums
their gradients; all statistics are summed over the workers. One worker with a batch of 2b and two with b each end with
the same codebook.

Two traps are avoided here. The running count of a code starts at one and its running sum at the code itself; were the
count to start at zero, the first update would multiply each code that was hit by about 1 / ((1 - decay) * count) and
most of the codebook would be lost at once. And codes that nothing uses any more are moved to vectors of the present
batch.
"""

# N vectors, D code dimension, K codes

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cogview.config import require_positive
from cogview.errors import ConfigError
from cogview.tokenizers.code_placement import draw_vectors, spread_vectors, sum_over_workers, world_and_rank
from cogview.tokenizers.code_search import at_least_fp32, nearest_codes, squared_distances
from cogview.tokenizers.gumbel import GumbelDraw, draw_codes

__all__ = ["RULES", "Codebook", "CodebookConfig", "Quantized", "Rule", "build_codebook", "nearest_codes"]

Rule = Literal["moving_average", "straight_through", "gumbel", "fixed"]
RULES: tuple[Rule, ...] = ("moving_average", "straight_through", "gumbel", "fixed")
LEARNED: tuple[Rule, ...] = ("straight_through", "gumbel")  # the codebook is a parameter
GUMBEL_FIELDS = ("temperature_start", "temperature_end", "temperature_steps", "gumbel_hard", "kl_weight")
UNUSED_BELOW = 0.1  # the running count at which a code counts as unused, where no revival says otherwise


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """num_codes: 8192 in the paper; code_dim: 256; rule: what trains the codebook.

    decay and epsilon: of the paper's moving average; the running counts of use decay alike under every rule.

    start_after: training batches that pass unquantized before the codebook, a `fixed` one too, is put onto vectors of
    the next batch; 0 puts it onto the first batch, None keeps the random codebook. revive_below: a code whose running
    count falls below this is moved to a vector of the batch; 0 switches it off, and a `fixed` codebook never moves.
    revive_every: how many batches lie between two such moves.

    For `gumbel`: the temperature, in units of squared distance, falls geometrically from temperature_start to
    temperature_end over temperature_steps batches; gumbel_hard: the decoder sees the drawn code, not the mixture;
    kl_weight: of the divergence of the codes' probabilities from uniform, 0 for none.
    """

    num_codes: int = 8192
    code_dim: int = 256
    decay: float = 0.99
    epsilon: float = 1e-5
    start_after: int | None = 0
    revive_below: float = 0.1
    revive_every: int = 10
    rule: Rule = "moving_average"
    temperature_start: float = 1.0
    temperature_end: float = 0.0625
    temperature_steps: int = 10_000
    gumbel_hard: bool = True
    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.num_codes <= 65536:
            raise ConfigError(f"num_codes={self.num_codes}: image codes are stored as uint16; choose from 2 to 65536")
        if not 0 < self.decay < 1:
            raise ConfigError(f"decay={self.decay}: choose a number between 0 and 1; the paper's is 0.99")
        if self.rule not in RULES:
            raise ConfigError(f"rule={self.rule!r}: choose one of {', '.join(RULES)}")
        require_positive(self, "code_dim", "revive_every", "temperature_steps")
        for name in ("start_after", "revive_below", "kl_weight"):
            if not (getattr(self, name) or 0) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: choose 0 or more")
        if not 0 < self.temperature_end <= self.temperature_start:
            raise ConfigError(
                f"temperature_end={self.temperature_end}: choose a number above 0, up to temperature_start "
                f"({self.temperature_start})"
            )

    def stored(self) -> dict[str, Any]:
        """The fields as they are saved: those that the rule reads. The default rule goes without saying its name."""
        fields = asdict(self)
        if self.rule != "gumbel":
            fields = {name: value for name, value in fields.items() if name not in GUMBEL_FIELDS}
        if self.rule == "moving_average":
            del fields["rule"]
        return fields


@dataclass(frozen=True)
class Quantized:
    """What a codebook makes of vectors.

    vectors_ND: for the decoder, with a gradient to the encoder; codes_N: int64; loss: a scalar, ready to be added;
    parts: what to report, scalars without gradient. `commitment` is always there: the mean squared difference between
    the vectors and their codes.
    """

    vectors_ND: Tensor
    codes_N: Tensor
    loss: Tensor
    parts: Mapping[str, Tensor]


def build_codebook(config: CodebookConfig, *, commitment_weight: float = 0.25) -> "Codebook":
    """A codebook that starts at random. commitment_weight: how strongly encoder outputs are pulled to their codes."""
    return Codebook(config, commitment_weight=commitment_weight)


class Codebook(nn.Module):
    """K codes of dimension D under one of the four rules.

    codebook_KD: the codes; counts_K: running number of vectors that take a code; num_batches: training batches so far,
    on which the start, the revivals, the temperature and all random draws depend.
    """

    keeps_fp32 = True  # in 16 bits running means stand still, and codes that are put somewhere would not stay there
    codebook_KD: Tensor
    counts_K: Tensor
    sums_KD: Tensor
    num_batches: Tensor
    noise_seed: Tensor

    def __init__(self, config: CodebookConfig, *, commitment_weight: float) -> None:
        super().__init__()
        self.config, self.commitment_weight = config, commitment_weight
        bound = (5 / 3) * (6 / (config.num_codes + config.code_dim)) ** 0.5  # Xavier uniform, gain of tanh
        codebook_KD = torch.empty(config.num_codes, config.code_dim).uniform_(-bound, bound)
        if config.rule in LEARNED:
            self.codebook_KD = nn.Parameter(codebook_KD)
        else:
            self.register_buffer("codebook_KD", codebook_KD)
        self.register_buffer("counts_K", torch.ones(config.num_codes))
        if config.rule == "moving_average":
            self.register_buffer("sums_KD", codebook_KD.clone())
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))
        if config.rule == "gumbel":  # of the seed that the whole network starts from; drawing one would shift its start
            self.register_buffer("noise_seed", torch.tensor(torch.initial_seed() % 2**62))

    @property
    def temperature(self) -> float:
        """The Gumbel temperature of the present batch."""
        done = max(0, int(self.num_batches) - (self.config.start_after or 0) - 1) / self.config.temperature_steps
        start, end = self.config.temperature_start, self.config.temperature_end
        return float(start * (end / start) ** min(1.0, done))

    def lookup(self, codes: Tensor) -> Tensor:
        """Code vectors [..., D] of int64 codes [...]."""
        return nn.functional.embedding(codes, self.codebook_KD)

    def usage(self) -> tuple[Tensor, Tensor]:
        """Share of codes in use and perplexity, from the running counts."""
        shares_K = self.counts_K / self.counts_K.sum()
        perplexity = torch.exp(-(shares_K * torch.log(shares_K.clamp_min(1e-12))).sum())
        in_use = (self.counts_K >= (self.config.revive_below or UNUSED_BELOW)).float().mean()
        return in_use, perplexity

    def forward(self, vectors_ND: Tensor) -> Quantized:
        """Quantize vectors [N, D]. In training the rule also does its work, summed over all workers.

        A batch with a value that is not finite, on any worker, passes unquantized and leaves no trace: the loss says
        what is wrong, and one bad step must not spoil running sums for good.
        """
        if not self.training:
            return self._take_nearest(vectors_ND)
        detached_ND = at_least_fp32(vectors_ND.detach())
        if not _finite_on_all_workers(detached_ND):
            return self._pass(vectors_ND)
        self.num_batches.add_(1)
        step, start_after = int(self.num_batches), self.config.start_after
        if start_after is not None and step <= start_after:
            return self._pass(vectors_ND)
        if start_after is not None and step == start_after + 1:
            self._start(detached_ND)
        elif self.config.rule in LEARNED:  # before the batch, not after: gradients need the codes that were used
            self._revive(detached_ND)
        quantized = self._draw(vectors_ND) if self.config.rule == "gumbel" else self._take_nearest(vectors_ND)
        self._count(detached_ND, quantized.codes_N)
        if self.config.rule == "moving_average":
            self._revive(detached_ND)
        return quantized

    def _pass(self, vectors_ND: Tensor) -> Quantized:
        """The batch unquantized. A learned codebook still gets its gradient, of zeros: data-parallel training waits."""
        codes_N = torch.zeros(len(vectors_ND), dtype=torch.long, device=vectors_ND.device)
        loss = vectors_ND.new_zeros(()) + (self.codebook_KD.sum() * 0 if self.config.rule in LEARNED else 0)
        return Quantized(vectors_ND, codes_N, loss, {"commitment": vectors_ND.new_zeros(())})

    def _take_nearest(self, vectors_ND: Tensor) -> Quantized:
        codes_N = nearest_codes(vectors_ND.detach(), self.codebook_KD)
        chosen_ND = at_least_fp32(self.lookup(codes_N))
        commitment = nn.functional.mse_loss(at_least_fp32(vectors_ND), chosen_ND.detach())
        loss, parts = self.commitment_weight * commitment, {"commitment": commitment.detach()}
        if self.config.rule == "straight_through":
            codebook_loss = nn.functional.mse_loss(chosen_ND, at_least_fp32(vectors_ND.detach()))
            loss = loss + codebook_loss
        straight_ND = vectors_ND + (chosen_ND.to(vectors_ND.dtype) - vectors_ND).detach()
        return Quantized(straight_ND, codes_N, loss, parts)

    def _draw(self, vectors_ND: Tensor) -> Quantized:
        draw = GumbelDraw(
            temperature=self.temperature,
            hard=self.config.gumbel_hard,
            with_kl=self.config.kl_weight > 0,
            seed=int(self.noise_seed),
            step=int(self.num_batches),
            first_row=world_and_rank()[1] * len(vectors_ND),
        )
        drawn_ND, codes_N, divergence = draw_codes(vectors_ND, self.codebook_KD, draw=draw)
        chosen_ND = at_least_fp32(self.lookup(codes_N).detach())
        commitment = nn.functional.mse_loss(at_least_fp32(vectors_ND.detach()), chosen_ND)  # reported only
        parts = {"commitment": commitment, "temperature": commitment.new_tensor(draw.temperature)}
        if draw.with_kl:
            parts["kl"] = divergence.detach()
        return Quantized(drawn_ND.to(vectors_ND.dtype), codes_N, self.config.kl_weight * divergence, parts)

    @torch.no_grad()
    def _count(self, vectors_ND: Tensor, codes_N: Tensor) -> None:
        """Bring the running counts up to date, and with them the codes of a moving average."""
        decay, epsilon = self.config.decay, self.config.epsilon
        ones_N = torch.ones_like(codes_N, dtype=self.counts_K.dtype)
        counts_K = sum_over_workers(torch.zeros_like(self.counts_K).index_add_(0, codes_N, ones_N))
        self.counts_K.mul_(decay).add_(counts_K, alpha=1 - decay)
        if self.config.rule == "moving_average":
            sums_KD = sum_over_workers(torch.zeros_like(self.sums_KD).index_add_(0, codes_N, vectors_ND))
            self.sums_KD.mul_(decay).add_(sums_KD, alpha=1 - decay)
            total = self.counts_K.sum()
            smoothed_K = (self.counts_K + epsilon) / (total + self.config.num_codes * epsilon) * total
            self.codebook_KD.copy_(self.sums_KD / smoothed_K.unsqueeze(1))

    def _start(self, vectors_ND: Tensor) -> None:
        """Put the whole codebook onto vectors of this batch."""
        number = self.config.num_codes
        drawn_KD = spread_vectors(vectors_ND, number=number, seed=int(self.num_batches) * 65537)
        self._put(torch.arange(number, device=vectors_ND.device), drawn_KD)

    def _revive(self, vectors_ND: Tensor) -> None:
        """Now and then, move the codes that nothing uses any more to vectors far from all others."""
        if self.config.revive_below == 0 or int(self.num_batches) % self.config.revive_every:
            return
        dead = (self.counts_K < self.config.revive_below).nonzero().squeeze(1)
        if len(dead):
            distances_N = squared_distances(vectors_ND, self.codebook_KD.detach())
            seed = int(self.num_batches) * 65537
            self._put(dead, draw_vectors(vectors_ND, distances_N, number=len(dead), seed=seed))

    @torch.no_grad()
    def _put(self, indices: Tensor, vectors_RD: Tensor) -> None:
        """Set codes to vectors, each with a count of one."""
        self.codebook_KD[indices] = vectors_RD
        if self.config.rule == "moving_average":
            self.sums_KD[indices] = vectors_RD
        self.counts_K[indices] = 1.0


def _finite_on_all_workers(vectors_ND: Tensor) -> bool:
    return bool(sum_over_workers((~torch.isfinite(vectors_ND)).any().float()) == 0)
