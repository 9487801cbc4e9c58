"""The VQGAN's losses: one backward pass has the gradients of the two that are usually alternated."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cogview.errors import ConfigError
from cogview.tokenizers.adversarial import (
    ADVERSARIAL_PARTS,
    AdversarialLossConfig,
    VQGANObjective,
    VQGANTraining,
    adaptive_weight,
    hinge_loss,
)
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.discriminator import DiscriminatorConfig, PatchDiscriminator
from cogview.tokenizers.residual_blocks import PyramidConfig
from cogview.tokenizers.vqgan import VQGANConfig
from tests.two_workers import process_group, run_two_workers

PYRAMID = PyramidConfig(
    channels=8, multipliers=(1, 2), num_res_blocks=1, attention_levels=(), latent_channels=8, norm_groups=4
)
LOSS = AdversarialLossConfig(
    start_after=0, discriminator=DiscriminatorConfig(channels=8, num_halvings=2, norm_groups=4)
)
TINY = VQGANTraining(
    # Codes that stay where they are: the test goes over one batch several times.
    tokenizer=VQGANConfig(
        pyramid=PYRAMID, codebook=CodebookConfig(num_codes=16, code_dim=4, rule="straight_through", start_after=None)
    ),
    loss=LOSS,
)


def build(config: VQGANTraining = TINY) -> VQGANObjective:
    torch.manual_seed(0)
    return VQGANObjective(config).train()


def batch(step: int = 0) -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_one_backward_pass_has_the_gradients_of_two() -> None:
    objective = build()
    objective(batch()).total.backward()
    found = gradients(objective)

    tokenizer, discriminator = objective.tokenizer, objective.discriminator
    assert discriminator is not None
    objective.zero_grad(set_to_none=True)
    result = tokenizer(batch())
    faithfulness = (result.decoded_BCHW - result.pixels_BCHW).abs().mean()
    generator = -discriminator(result.decoded_BCHW).mean()
    last = tokenizer.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (faithfulness, generator)]
    weight = 0.8 * norms[0] / (norms[1] + 1e-4)
    (faithfulness + result.quantized.loss + weight * generator).backward()
    first_pass = gradients(tokenizer)

    objective.zero_grad(set_to_none=True)
    drawn = result.decoded_BCHW.detach()
    hinge_loss(discriminator(result.pixels_BCHW), discriminator(drawn)).backward()
    second_pass = gradients(discriminator)

    expected = {f"tokenizer.{name}": gradient for name, gradient in first_pass.items()}
    expected |= {f"discriminator.{name}": gradient for name, gradient in second_pass.items()}
    assert found.keys() == expected.keys() == dict(objective.named_parameters()).keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7), name
    assert all(bool(gradient.any()) for name, gradient in found.items() if name.endswith("weight"))


def test_the_discriminator_waits_for_its_start() -> None:
    objective = build(replace(TINY, loss=replace(LOSS, start_after=2)))
    for step in range(2):
        loss = objective(batch(step))
        assert {float(loss.parts[name]) for name in ADVERSARIAL_PARTS} == {0.0}
    loss.total.backward()
    waiting = gradients(objective)
    assert waiting.keys() == dict(objective.named_parameters()).keys()  # data-parallel training waits for every one
    assert all(not gradient.any() for name, gradient in waiting.items() if name.startswith("discriminator"))
    started = objective(batch(2)).parts
    assert float(started["adaptive_weight"]) > 0
    assert float(started["discriminator"]) > 0
    resumed = build(replace(TINY, loss=replace(LOSS, start_after=2)))
    resumed.load_state_dict(objective.state_dict())
    assert int(resumed.num_batches) == 3


def test_without_a_weight_there_is_no_discriminator() -> None:
    objective = build(replace(TINY, loss=replace(LOSS, adversarial_weight=0.0)))
    assert objective.discriminator is None
    parts = objective(batch()).parts
    assert parts.keys() == {"reconstruction", "commitment", "mse"}


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_and_bounded() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    faithfulness, generator = weight.square().sum(), weight.sum()  # gradients (6, 8) and (1, 1)
    found = adaptive_weight(faithfulness, generator, last_weight=weight)
    assert float(found) == pytest.approx(10 / (2**0.5 + 1e-4))
    assert float(adaptive_weight(faithfulness, generator * 1e-12, last_weight=weight)) == 1e4
    with torch.no_grad():
        assert float(adaptive_weight(faithfulness, generator, last_weight=weight)) == 0


def test_the_hinge_asks_for_a_margin_of_one_on_each_side() -> None:
    assert float(hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0]))) == 0
    assert float(hinge_loss(torch.tensor([0.0]), torch.tensor([0.0]))) == 1
    assert float(hinge_loss(torch.tensor([-1.0]), torch.tensor([-1.0]))) == 1


def test_l2_differs_from_l1_as_it_should() -> None:
    losses = {}
    for kind in ("l1", "l2"):
        objective = build(replace(TINY, loss=replace(LOSS, reconstruction=kind)))
        result = objective.tokenizer(batch())
        losses[kind] = float(objective(batch()).parts["reconstruction"])
        difference = (result.decoded_BCHW - result.pixels_BCHW).detach()
        expected = difference.abs() if kind == "l1" else difference.square()
        assert losses[kind] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert losses["l1"] != losses["l2"]


def test_half_precision_weights_train() -> None:
    objective = build()
    for parameter in objective.parameters():
        if parameter is not objective.tokenizer.codebook.codebook_KD:
            parameter.data = parameter.data.bfloat16()
    loss = objective(batch())
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(objective).values())
    assert gradients(objective).keys() == dict(objective.named_parameters()).keys()


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ConfigError, match="choose l1 or l2"):
        replace(LOSS, reconstruction="huber")
    with pytest.raises(ConfigError, match="start_after=-1"):
        replace(LOSS, start_after=-1)
    with pytest.raises(ConfigError, match="norm_groups=3"):
        DiscriminatorConfig(channels=8, norm_groups=3)


def test_each_logit_sees_a_patch() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=8, num_halvings=3, norm_groups=4))
    for module in discriminator.modules():
        if isinstance(module, nn.GroupNorm):  # its statistics see the whole picture
            module.forward = lambda map_BCHW: map_BCHW  # type: ignore[method-assign]
    pixels = torch.rand(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(pixels)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    assert pixels.grad is not None
    seen = pixels.grad[0].abs().sum(0) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (70, 70)
    with pytest.raises(ConfigError, match="needs 24"):
        discriminator(torch.rand(1, 3, 16, 128))
    assert discriminator(torch.rand(1, 3, 24, 24)).numel() == 1


def test_two_workers_have_the_gradients_of_one(tmp_path: Path) -> None:
    alone = build()
    alone(batch()).total.backward()
    run_two_workers(_half_a_batch, tmp_path)
    together = torch.load(tmp_path / "0.pt", weights_only=True)
    for name, gradient in gradients(alone).items():
        assert torch.allclose(together[name], gradient, rtol=1e-4, atol=1e-6), name


def _half_a_batch(rank: int, folder: Path) -> None:
    with process_group(rank, folder):
        objective = build()
        shared = DistributedDataParallel(objective, broadcast_buffers=False)  # must live until the gradients are there
        shared(batch().chunk(2)[rank]).total.backward()
        torch.save(gradients(objective), folder / f"{rank}.pt")
