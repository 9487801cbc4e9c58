"""How much memory a training step takes, from the model's shape alone.

In: a GPT's config, and how it is trained. Out: bytes on one worker, part by part. Nothing is allocated. With P
parameters, T = rows x length tokens, width E, L layers, vocabulary V, and w bytes a number (2 in half precision, 4 in
fp32), the parts are

* weights w P, gradients w P, Adam's two moments 8 P; in half precision also masters 4 P, and 4 P for their gradients
  once the backward pass is over. So 16 P in all, as in the paper's ZeRO: 63 GB for the 4 B model;
* activations: what autograd keeps of a layer is listed in `_kept_by_layer`: 19 w T E with fused attention, to which the
  written-out forms add their scores, w rows heads length^2. With checkpointing a layer keeps its input alone;
* logits: 4 bytes for each token and id (fp32 logits, which become their gradient), or those of one chunk.

With adapters (LoRA) only their A parameters have gradients, moments and masters, and the P others w bytes each; output
matrix and embeddings have no gradient. Activations stay: what is before a frozen layer still learns through it.

Sharded over S workers (FSDP2), weights, gradients and moments are 16 P / S in any precision. To these come, gathered
while they compute and w bytes each, two layers and what belongs to no layer, with the gradients of the latter.

They are not all there at once: the peak is the largest of three moments, see `MemoryPlan.peak`. Left out are what is
small beside these (batch, masks, indices) and what is not ours (`RESERVE`).
"""

from dataclasses import dataclass, replace
from functools import cache

from cogview.models.attention import is_written_out
from cogview.models.gpt import GPTConfig, count_parameters
from cogview.models.lora import LINEARS_IN_BLOCK, LoRAConfig, count_adapters
from cogview.training.cross_entropy import LOGITS_BYTES, chunk_tokens
from cogview.training.precision import DTYPES, Precision

RESERVE = 3 * 2**29  # 1.5 GiB of a GPU: its context, the libraries' workspaces, some fragmentation
ADAM = 8  # bytes a parameter: two moments in fp32
MASTER = 4  # bytes a parameter
IN_BACKWARD = 6  # w T E of gradients in flight in one layer, beyond what the layer has released by then


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How the model is trained, as far as memory depends on it.

    rows, length: of one worker's batch, tokens after the shift; num_workers: from 2 on, gradients lie in buckets that
    stay between steps; shards: over how many of them everything is spread (FSDP2), 0 for a whole model on each;
    is_cuda: dropout masks are a byte an element there and a number on a CPU, and the optimizer needs no temporaries;
    lora: with a rank, the adapters alone are trained.
    """

    rows: int
    length: int
    precision: Precision = "fp32"
    num_workers: int = 1
    shards: int = 0
    is_averaging: bool = False
    is_cuda: bool = True
    logits_bytes: int = LOGITS_BYTES
    lora: LoRAConfig = LoRAConfig()

    @property
    def tokens(self) -> int:
        """Of one worker's batch."""
        return self.rows * self.length

    @property
    def width(self) -> int:
        """Bytes of a parameter and an activation."""
        return DTYPES[self.precision].itemsize


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one worker.

    states: masters, moments and average, there all the time as are the weights; activations: kept for the backward
    pass; logits: what the loss needs on top; gathered: whole weights of sharded ones, while they compute; layer: in
    flight in one layer's backward pass; embedding_gradient: one copy of the largest gradient; temporaries: of the
    optimizer, for the largest parameter.
    """

    parameters: int
    weights: int
    states: int
    gradients: int
    master_gradients: int
    activations: int
    logits: int
    gathered: int
    layer: int
    embedding_gradient: int
    temporaries: int
    has_buckets: bool

    @property
    def steady(self) -> int:
        """What is there between two steps."""
        return self.weights + self.states + (self.gradients if self.has_buckets else 0)

    @property
    def peak(self) -> int:
        """The most at any time: at the loss, at the start of the backward pass, or at its end and the optimizer's."""
        kept = 0 if self.has_buckets else self.gradients
        at_loss = self.activations + self.logits + self.gathered
        at_start = self.activations + self.embedding_gradient + self.layer + self.gathered
        at_end = kept + self.embedding_gradient + self.gathered
        at_optimizer = (self.master_gradients or kept) + self.temporaries
        return self.steady + max(at_loss, at_start, at_end, at_optimizer)

    def fits(self, memory: int) -> bool:
        """Whether a GPU with so many bytes will do."""
        return self.peak + RESERVE <= memory


def plan_memory(config: GPTConfig, step: StepShape) -> MemoryPlan:
    """The memory of a training step. Sparse attention is taken for fused: it keeps the same tensors."""
    number, unit = (
        _count(replace(config, activation_checkpointing=False)),
        step.width * step.tokens * config.hidden_size,
    )
    has_masters = step.precision != "fp32" and not step.shards
    adapters = count_adapters(config, step.lora)
    trained = adapters if step.lora.rank else number
    largest = (4 * step.lora.rank if step.lora.rank else config.vocab_size) * config.hidden_size  # trained parameter
    layer, scores = _kept_by_layer(config, step), _scores(config, step)
    kept = config.num_layers * (unit if config.activation_checkpointing else layer)
    in_flight = IN_BACKWARD * unit + 2 * scores + (layer if config.activation_checkpointing else 0)
    copies = max(1, step.shards)
    width = MASTER if step.shards else step.width  # of weights and gradients between their uses
    states = ADAM + (MASTER if has_masters else 0) + (MASTER if step.is_averaging else 0)
    in_layer, outside = _split_weights(config, number)
    return MemoryPlan(
        parameters=number + adapters,
        weights=width * (number + adapters) // copies,
        states=states * trained // copies,
        gradients=width * trained // copies,
        master_gradients=MASTER * trained if has_masters else 0,
        activations=kept + 2 * unit + _dropout_mask(config, step),  # the last norm's input, its output at real tokens
        logits=_logits(config, step),
        gathered=step.width * (2 * in_layer + outside) if step.shards else 0,
        layer=in_flight + (step.width * in_layer if step.shards else 0),
        embedding_gradient=(step.width + (MASTER if step.shards else 0)) * largest,  # sharded ones are summed in fp32
        temporaries=0 if step.is_cuda else 8 * largest // copies,
        has_buckets=step.num_workers > 1 and not step.shards,
    )


@cache
def _count(config: GPTConfig) -> int:
    """Remembered, for a table asks for the same model many times, and each count builds it on the meta device."""
    return count_parameters(config)


def _split_weights(config: GPTConfig, number: int) -> tuple[int, int]:
    """The weights of one layer, and those of none."""
    outside = (config.vocab_size + config.max_positions + 2) * config.hidden_size  # embeddings and the last norm
    return (number - outside) // config.num_layers, outside


def _kept_by_layer(config: GPTConfig, step: StepShape) -> int:
    """What autograd keeps of one layer, in units of w T E, and the rows of statistics."""
    norms = 4 if config.sandwich_ln else 2  # each its (pre-scaled) input
    linear = 1 + 1 + 1 + 4  # the inputs of qkv, of attention's output, and of the MLP's two layers
    gelu = 4  # its input
    # Copies of q, k and v; or q / sqrt(D), and the product that q, k and v lie in.
    attention = 3 if _keeps_scores(config, step) else 4
    statistics = 4 * step.tokens * (2 * norms + config.num_heads)  # mean, deviation; log of the softmax's sum
    unit = step.width * step.tokens * config.hidden_size
    masks = 2 * _dropout_mask(config, step)
    return (
        (norms + linear + gelu + attention) * unit
        + statistics
        + masks
        + _scores(config, step)
        + _adapters(config, step)
    )


def _adapters(config: GPTConfig, step: StepShape) -> int:
    """What the adapters keep of a layer: their narrow middles and, with dropout, masks as large as their inputs."""
    kept = step.width * LINEARS_IN_BLOCK * step.lora.rank * step.tokens
    if step.lora.rank and step.lora.dropout:
        mask = 1 if step.is_cuda else step.width
        kept += (1 + 1 + 1 + 4) * mask * step.tokens * config.hidden_size
        # Attention's own output, which its fused form keeps, is no longer the same tensor as the next layer's input.
        kept += 0 if _keeps_scores(config, step) else step.width * step.tokens * config.hidden_size
    return kept


def _dropout_mask(config: GPTConfig, step: StepShape) -> int:
    if not config.dropout:
        return 0
    return (1 if step.is_cuda else step.width) * step.tokens * config.hidden_size


def _keeps_scores(config: GPTConfig, step: StepShape) -> bool:
    """Whether attention is written out: by the config, or for rows that are short enough for it on a CPU."""
    is_short = is_written_out(
        step.length, is_cpu=not step.is_cuda, dtype=DTYPES[step.precision], dropout=config.dropout
    )
    return config.attention in ("pb_relax", "plain") or (config.attention == "fused" and is_short)


def _scores(config: GPTConfig, step: StepShape) -> int:
    """Probabilities of the written-out attention; with dropout also their mask, and what it leaves of them."""
    if not _keeps_scores(config, step):
        return 0
    number = step.rows * config.num_heads * step.length**2
    mask = 1 if step.is_cuda else step.width
    return number * (2 * step.width + mask if config.dropout else step.width)


def _logits(config: GPTConfig, step: StepShape) -> int:
    """Of all tokens or of a chunk, with their 16-bit copy, and the gradients of output matrix and hidden states."""
    chunk = chunk_tokens(config.vocab_size, logits_bytes=step.logits_bytes)
    copy = 0 if step.precision == "fp32" else step.width
    gathered = 4 if step.tokens > chunk else 0  # bytes of an output gradient that chunks are added to
    gradient = 0 if step.lora.rank else (gathered + step.width) * config.vocab_size * config.hidden_size
    logits = (4 + copy) * min(step.tokens, chunk) * config.vocab_size
    return logits + gradient + step.width * step.tokens * config.hidden_size
