from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview.models import products
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.lora import LoRAConfig, add_lora
from cogview.models.pivots import SparseConfig
from cogview.training.language_model import LanguageModelLoss
from cogview.training.step_cost import keys_seen, row_cost

ROWS, LENGTH = 2, 64
REGIONS = SparseConfig(num_pivots=8, block_size=4, window_blocks=2, num_image_ids=400, padding_id=500)
SMALL = GPTConfig(
    vocab_size=512, max_positions=LENGTH, num_layers=3, hidden_size=64, num_heads=4, dropout=0.0, attention="pb_relax"
)


@pytest.fixture(autouse=True)
def _products_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows nothing of oneDNN's."""
    monkeypatch.setattr(products, "prefers_onednn", lambda: False)


def counted(model: GPT) -> int:
    """What torch counts in forward and backward."""
    ids = torch.randint(512, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    with FlopCounterMode(display=False) as counter:
        loss = LanguageModelLoss(model)(
            ids=ids[:, :-1],
            positions=positions,
            labels=ids[:, 1:],
            loss_weights=torch.ones(ROWS, LENGTH),
            image_part=positions > LENGTH // 2,
        )
        loss.loss_sum.backward()
    return int(counter.get_total_flops())


def written_out(config: GPTConfig, *, lora: LoRAConfig | None = None) -> float:
    """The cost where attention is written out: it computes with the keys ahead as well, and then masks them."""
    ahead = LENGTH - keys_seen(config, length=LENGTH)
    unmasked = 3 * 4.0 * config.num_layers * config.hidden_size * LENGTH * ahead
    return ROWS * (row_cost(config, length=LENGTH, lora=lora).model + unmasked)


def test_the_operations_are_those_that_torch_counts() -> None:
    assert counted(GPT(SMALL)) == pytest.approx(written_out(SMALL), rel=0.01)


def test_frozen_weights_have_no_gradients() -> None:
    lora, gpt = LoRAConfig(rank=1), GPT(SMALL)
    add_lora(gpt, lora, seed=0)
    assert counted(gpt) == pytest.approx(written_out(SMALL, lora=lora), rel=0.1)  # the adapters come to it
    assert counted(gpt) < 0.8 * counted(GPT(SMALL))


def test_layers_that_are_done_again_cost_a_forward_pass() -> None:
    again = row_cost(replace(SMALL, activation_checkpointing=True), length=LENGTH)
    plain = row_cost(SMALL, length=LENGTH)
    assert again.model == plain.model
    assert plain.remade == 0
    assert 0.2 * plain.model < again.remade < plain.model / 3


def test_sparse_attention_looks_at_no_more_keys_than_its_regions_hold() -> None:
    sparse = replace(SMALL, attention="sparse", sparse=REGIONS)
    assert keys_seen(sparse, length=LENGTH) == 16
    assert keys_seen(sparse, length=9) == 5
