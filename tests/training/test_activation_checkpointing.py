"""Activation checkpointing: other memory, the same numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cogview.models.gpt import GPT, GPTConfig
from cogview.training.language_model import LanguageModelLoss

CONFIG = GPTConfig(vocab_size=50, max_positions=16, num_layers=3, hidden_size=16, num_heads=2, dropout=0.2)


def loss_and_gradients(config: GPTConfig) -> tuple[Tensor, dict[str, Tensor], int]:
    """And the bytes that autograd kept between forward and backward, but for the weights."""
    torch.manual_seed(0)
    module = LanguageModelLoss(GPT(config)).train()
    ids = torch.randint(50, (2, 17))
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in module.parameters()}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        positions = torch.arange(16).expand(2, -1)
        result = module(ids[:, :-1], positions, ids[:, 1:], torch.ones(2, 16), positions > 3)
    result.loss_sum.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return result.loss_sum.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("attention", ["fused", "pb_relax"])
def test_loss_and_gradients_are_the_same_to_the_bit_with_less_kept(attention: str) -> None:
    config = replace(CONFIG, attention=attention)
    loss, gradients, kept = loss_and_gradients(config)
    loss_again, gradients_again, kept_again = loss_and_gradients(replace(config, activation_checkpointing=True))
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys() == dict(GPT(config).named_parameters(prefix="gpt")).keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    assert kept_again < kept / 2
