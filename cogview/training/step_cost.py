"""How many floating-point operations training takes, from the model's shape alone.

In: a GPT's config and the length of a row. Out: operations of forward and backward, two for each multiply-add. A matrix
of a block costs 2 a weight and token forward and twice that backward; attention 4 E a query and key; the output matrix
like any other. Norms, activations and the optimizer are left out: together they are below a hundredth of it.
"""

from dataclasses import dataclass

from cogview.models.gpt import GPTConfig
from cogview.models.lora import LoRAConfig

MATRICES = 12  # weights of a block's four linear layers, in squares of the width


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """Operations of one row. model: of forward and backward; remade: of the forward passes that are done again."""

    model: float
    remade: float

    @property
    def total(self) -> float:
        """What the hardware does."""
        return self.model + self.remade


def row_cost(config: GPTConfig, *, length: int, lora: LoRAConfig | None = None) -> RowCost:
    """The cost of training on one row of `length` tokens. lora: with a rank, frozen weights have no gradients."""
    width, keys = config.hidden_size, keys_seen(config, length=length)
    matrices = 2.0 * MATRICES * config.num_layers * width**2 * length
    attention = 4.0 * config.num_layers * width * length * keys
    output = 2.0 * config.vocab_size * width * length
    is_frozen = lora is not None and lora.rank > 0
    through_weights = 2 if is_frozen else 3  # forward, gradients of inputs, gradients of weights
    model = through_weights * (matrices + output) + 3 * attention
    return RowCost(model=model, remade=matrices + attention if config.activation_checkpointing else 0.0)


def keys_seen(config: GPTConfig, *, length: int) -> float:
    """Keys that an average query looks at: half of the row, or the pivots and the window of sparse attention."""
    dense = (length + 1) / 2
    if config.attention != "sparse":
        return dense
    return min(dense, config.sparse.num_pivots + config.sparse.block_size * config.sparse.window_blocks)
