"""The codebook under its four rules: what moves it, what starts and revives it, what it reports."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from cogview.errors import ConfigError
from cogview.tokenizers.codebook import RULES, Codebook, CodebookConfig, Rule, build_codebook, nearest_codes

SETTINGS = CodebookConfig(num_codes=64, code_dim=8, revive_every=5)
LEARNED: tuple[Rule, ...] = ("straight_through", "gumbel")


def vectors(step: int, number: int = 256) -> torch.Tensor:
    return torch.randn(number, 8, generator=torch.Generator().manual_seed(step)) + 3.0


def build(rule: Rule, **changes: float | None) -> Codebook:
    torch.manual_seed(0)
    return build_codebook(replace(SETTINGS, rule=rule, **changes)).train()


def train(codebook: Codebook, *, steps: int, first: int = 0) -> None:
    learned = list(codebook.parameters())
    optimizer = torch.optim.Adam(learned, lr=0.02) if learned else None
    for step in range(first, first + steps):
        quantized = codebook(vectors(step))
        if optimizer:
            optimizer.zero_grad()
            (quantized.loss + (quantized.vectors_ND - vectors(step)).square().mean()).backward()
            optimizer.step()


def test_the_first_update_moves_codes_without_scattering_them() -> None:
    # Were counts to start at zero, one update would throw hit codes far away: 64 codes in use would become about 19.
    codebook = build("moving_average")
    codebook(vectors(0, 4096))
    assert codebook.codebook_KD.abs().max() < 10
    in_use = nearest_codes(vectors(1, 4096), codebook.codebook_KD).unique()
    assert len(in_use) > 55


def test_a_moving_average_follows_the_mean_of_what_it_wins() -> None:
    codebook = build("moving_average", decay=0.5, revive_below=0.0)
    for _ in range(40):
        codes = codebook(vectors(7)).codes_N
    means = torch.stack([vectors(7)[codes == code].mean(dim=0) for code in codes.unique()])
    assert torch.allclose(codebook.codebook_KD[codes.unique()], means, atol=1e-3)


@pytest.mark.parametrize("rule", ["moving_average", "straight_through", "fixed"])
def test_the_decoders_gradient_is_copied_and_commitment_pulls(rule: Rule) -> None:
    codebook = build(rule)
    inputs = vectors(0).requires_grad_()
    quantized = codebook(inputs)
    (gradient,) = torch.autograd.grad(quantized.vectors_ND.sum(), inputs, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(inputs))
    (pull,) = torch.autograd.grad(quantized.loss, inputs)
    chosen = quantized.vectors_ND.detach()
    assert torch.allclose(pull, 0.25 * 2 * (inputs - chosen) / inputs.numel(), atol=1e-6)


def test_the_codebook_loss_pulls_each_code_to_the_mean_of_its_vectors() -> None:
    codebook = build("straight_through", start_after=None)
    quantized = codebook(vectors(0))
    quantized.loss.backward()
    used = quantized.codes_N.unique()
    before = codebook.codebook_KD.detach()
    for code in used:
        own = vectors(0)[quantized.codes_N == code]
        expected = 2 * (before[code] - own).sum(dim=0) / vectors(0).numel()
        assert torch.allclose(codebook.codebook_KD.grad[code], expected, atol=1e-6)
    assert (codebook.codebook_KD.grad.abs().sum(dim=1) > 0).sum() == len(used)


@pytest.mark.parametrize("rule", RULES)
def test_training_brings_every_rule_but_the_fixed_one_closer_to_the_data(rule: Rule) -> None:
    codebook = build(rule, start_after=None, temperature_steps=30)
    before = codebook.codebook_KD.detach().clone()
    train(codebook, steps=60)
    moved = (codebook.codebook_KD.detach() - before).abs().max()
    error = codebook.eval()(vectors(99)).parts["commitment"]
    assert moved == 0 if rule == "fixed" else moved > 0.1
    assert error > 5 if rule == "fixed" else error < 5  # nine where the codes stay around zero


@pytest.mark.parametrize("rule", ["moving_average", "straight_through", "gumbel"])
def test_codes_that_nothing_uses_are_moved_to_the_data(rule: Rule) -> None:
    codebook = build(rule, decay=0.5, temperature_start=0.1, temperature_end=0.01)
    codebook(vectors(0))
    with torch.no_grad():
        codebook.codebook_KD[32:] = 1e3  # far from all data
        if rule == "moving_average":
            codebook.sums_KD[32:] = codebook.codebook_KD[32:] * codebook.counts_K[32:, None]
    train(codebook, steps=29, first=1)
    assert codebook.codebook_KD.abs().max() < 20
    share, perplexity = codebook.usage()
    assert share > 0.9
    assert perplexity > 32


def test_a_revival_that_is_switched_off_moves_nothing() -> None:
    codebook = build("straight_through", decay=0.5, revive_below=0.0)
    codebook(vectors(0))
    with torch.no_grad():
        codebook.codebook_KD[32:] = 1e3
    train(codebook, steps=12, first=1)
    assert (codebook.codebook_KD[32:] > 900).all()
    share, _ = codebook.usage()
    assert share <= 0.5


@pytest.mark.parametrize("rule", RULES)
def test_batches_before_the_start_pass_unquantized(rule: Rule) -> None:
    codebook = build(rule, start_after=2)
    random_codes = codebook.codebook_KD.detach().clone()
    for step in range(2):
        passed = codebook(vectors(step))
        assert torch.equal(passed.vectors_ND, vectors(step))
        assert passed.loss == 0
        if rule in LEARNED:  # data-parallel training waits for a gradient of each parameter
            passed.loss.backward()
            assert torch.equal(codebook.codebook_KD.grad, torch.zeros_like(random_codes))
    assert torch.equal(codebook.codebook_KD, random_codes)
    assert not torch.equal(codebook(vectors(2)).vectors_ND, vectors(2))
    assert (codebook.codebook_KD.mean() - 3).abs() < 0.5  # where the vectors are


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_that_is_not_finite_leaves_no_trace(rule: Rule) -> None:
    codebook = build(rule)
    train(codebook, steps=2)
    before = copy.deepcopy(codebook.state_dict())
    broken = vectors(2)
    broken[17, 3] = float("nan")
    assert codebook(broken).vectors_ND.isnan().any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in codebook.state_dict().items())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_of_16_bits_come_back_as_such(rule: Rule, dtype: torch.dtype) -> None:
    codebook = build(rule)
    inputs = vectors(0).to(dtype).requires_grad_()
    quantized = codebook(inputs)
    (quantized.vectors_ND.float().sum() + quantized.loss).backward()
    assert quantized.vectors_ND.dtype == inputs.grad.dtype == dtype
    assert quantized.loss.dtype == codebook.codebook_KD.dtype == torch.float32
    assert inputs.grad.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_a_codebook_in_64_bits_stays_there(rule: Rule) -> None:
    codebook = build(rule, kl_weight=0.1).double()
    for step in range(6):  # a start, updates and a look for dead codes
        quantized = codebook(vectors(step).double())
    assert quantized.vectors_ND.dtype == quantized.loss.dtype == codebook.codebook_KD.dtype == torch.float64


@pytest.mark.parametrize("rule", RULES)
def test_a_codebook_goes_on_from_its_state_as_if_never_stopped(rule: Rule) -> None:
    through, first = build(rule, start_after=1), build(rule, start_after=1)
    for step in range(6):
        expected = through(vectors(step))
        if step < 3:
            first(vectors(step))
    torch.manual_seed(123)  # another process has another random state
    second = build_codebook(first.config).train()
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        found = second(vectors(step))
    assert torch.equal(found.vectors_ND, expected.vectors_ND)
    assert all(torch.equal(a, b) for a, b in zip(second.buffers(), through.buffers(), strict=True))
    assert torch.equal(second.codebook_KD, through.codebook_KD)


def test_the_temperature_falls_geometrically_and_is_reported() -> None:
    codebook = build("gumbel", start_after=2, temperature_start=1.0, temperature_end=0.01, temperature_steps=4)
    reported = [codebook(vectors(step)).parts.get("temperature", torch.tensor(-1.0)).item() for step in range(9)]
    assert reported == pytest.approx([-1, -1, 1, 10**-0.5, 0.1, 10**-1.5, 0.01, 0.01, 0.01])


def test_the_divergence_is_in_the_loss_when_it_is_weighted() -> None:
    quantized = build("gumbel", kl_weight=0.5)(vectors(0))
    assert 0 < quantized.parts["kl"] <= math.log(64) + 1e-4
    assert torch.allclose(quantized.loss, 0.5 * quantized.parts["kl"])
    assert build("gumbel")(vectors(0)).loss == 0


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_the_same_face(rule: Rule) -> None:
    codebook = build(rule)
    trained, used = codebook(vectors(0)), codebook.eval()(vectors(0))
    for quantized in (trained, used):
        assert quantized.vectors_ND.shape == (256, 8)
        assert quantized.codes_N.dtype == torch.long
        assert quantized.loss.shape == quantized.parts["commitment"].shape == ()
    assert torch.equal(used.codes_N, nearest_codes(vectors(0), codebook.codebook_KD))
    assert torch.equal(codebook.lookup(used.codes_N), codebook.codebook_KD[used.codes_N])
    assert [name for name, _ in codebook.named_parameters()] == (["codebook_KD"] if rule in LEARNED else [])
    share, perplexity = codebook.usage()
    assert 0 < share <= 1
    assert 1 < perplexity <= 64 + 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 1}, "num_codes=1"),
        ({"num_codes": 70_000}, "uint16"),
        ({"code_dim": 0}, "code_dim=0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"rule": "nearest"}, "rule='nearest': choose one of moving_average"),
        ({"revive_every": 0}, "revive_every=0"),
        ({"start_after": -1}, "start_after=-1"),
        ({"revive_below": float("nan")}, "revive_below=nan"),
        ({"temperature_end": 0.0}, "temperature_end=0.0"),
        ({"temperature_end": 2.0}, "temperature_start"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SETTINGS, **changes)
