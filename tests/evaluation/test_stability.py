"""What is read from a GPT at work, and that the cast to fp16 tells the same as a run in fp16."""

import math

import pytest
import torch

from cogview.evaluation.stability import (
    HALF_LIMIT,
    MATERIALISED,
    fits_half,
    is_finite_in_half,
    largest_magnitude,
    score_scale,
    watch_scales,
)
from cogview.evaluation.stress_arms import ARMS, ArmTrace, StepRecord
from cogview.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=32, max_positions=12, num_layers=3, hidden_size=16, num_heads=2, dropout=0.0)
IDS = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(12).expand(2, -1)


def build(arm: str) -> GPT:
    torch.manual_seed(0)
    return GPT(ARMS[arm].apply(CONFIG)).eval()


def read(gpt: GPT):
    with watch_scales(gpt) as probe, torch.no_grad():
        logits = gpt.logits(gpt(IDS, POSITIONS))
        probe.record("logits", gpt.config.num_layers, logits)
    return probe


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (math.nan, False)])
def test_a_number_fits_if_its_cast_is_finite(value, fits):
    assert fits_half(value) is fits
    assert HALF_LIMIT == 65504


def test_the_largest_magnitude_may_be_negative_and_a_nan_is_not_lost():
    assert largest_magnitude(torch.tensor([1.0, -3.0, 2.0])) == 3.0
    assert math.isnan(largest_magnitude(torch.tensor([1.0, math.nan])))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_read_at_the_same_points(arm):
    record = StepRecord(step=0, loss=0.0, readings=read(build(arm)).readings)
    assert {reading.point for reading in record.readings} == {*MATERIALISED, "variance"}
    assert list(record.by_layer("residual")) == [0, 1, 2, 3]
    for point in ("qkv", "scores", "attention", "mlp_inside", "mlp"):
        assert list(record.by_layer(point)) == [0, 1, 2]


def test_the_main_branch_is_what_the_blocks_hand_on():
    gpt = build("both")
    record = StepRecord(step=0, loss=0.0, readings=read(gpt).readings)
    with torch.no_grad():
        hidden = gpt.word_embeddings(IDS) + gpt.transformer.position_embeddings(POSITIONS)
        assert record.readings[0].value == pytest.approx(hidden.abs().max().item())
        for block in gpt.transformer.layers:
            hidden = block(hidden)
    assert record.by_layer("residual")[3] == pytest.approx(hidden.abs().max().item())


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("weight", "point"),
    [("mlp.dense_4h_to_h", "mlp"), ("attention.dense", "attention"), ("mlp.dense_h_to_4h", "mlp_inside")],
)
def test_the_first_tensor_that_does_not_fit_is_named_in_every_arm(arm, weight, point):
    """Neither remedy keeps a branch itself from overflowing, and none is given credit for it."""
    gpt = build(arm)
    assert read(gpt).overflow is None
    assert is_finite_in_half(gpt, IDS, POSITIONS)
    with torch.no_grad():
        gpt.transformer.layers[1].get_submodule(weight).bias[0] = 1e5
    overflow = read(gpt).overflow
    assert (overflow.point, overflow.layer) == (point, 1)
    assert not is_finite_in_half(gpt, IDS, POSITIONS)


@pytest.mark.parametrize(("arm", "survives"), [("Sandwich-LN only", False), ("both", True)])
def test_scores_beyond_fp16_end_plain_attention_and_not_pb_relax(arm, survives):
    """The same weights, whose raw scores are about 400,000: in fp16 itself as well as by the cast."""
    gpt = build(arm)
    with torch.no_grad():
        gpt.transformer.layers[2].attention.query_key_value.bias[:32] = 220.0
    overflow = read(gpt).overflow
    assert (overflow is None) is survives
    assert overflow is None or (overflow.point, overflow.layer) == ("scores", 2)
    assert is_finite_in_half(gpt, IDS, POSITIONS) is survives


@pytest.mark.parametrize(("arm", "survives"), [("PB-relax only", False), ("both", True)])
def test_branches_that_add_up_end_the_main_branch_without_sandwich_ln(arm, survives):
    gpt = build(arm)
    with torch.no_grad():
        for block in gpt.transformer.layers:
            block.mlp.dense_4h_to_h.bias[0] = 3e4
    overflow = read(gpt).overflow
    assert (overflow is None) is survives
    assert overflow is None or overflow.point == "residual"
    assert is_finite_in_half(gpt, IDS, POSITIONS) is survives


def test_prescaled_norms_keep_the_variance_small():
    for arm, is_small in (("both", True), ("Sandwich-LN only", False)):
        gpt = build(arm)
        with torch.no_grad():
            gpt.word_embeddings.weight.mul_(1e5)
        variance = StepRecord(step=0, loss=0.0, readings=read(gpt).readings).by_layer("variance")
        assert (variance[0] <= 64.0) is is_small


def test_scores_behind_the_mask_or_far_below_zero_do_not_count():
    qkv = torch.zeros(1, 3, 6)  # one head of 2: queries, keys, values
    qkv[0, :, 0] = 1.0
    qkv[0, :, 2] = torch.tensor([2.0, -1e6, 1e6])  # the last key is seen by the last query only
    assert score_scale(qkv[:, :2], num_heads=1, relaxed=False).item() == 2.0
    assert score_scale(qkv, num_heads=1, relaxed=False).item() == 1e6
    assert score_scale(qkv, num_heads=1, relaxed=True).item() == pytest.approx(1e6 / (32 * 2**0.5))


def test_nothing_is_read_after_the_block():
    gpt = build("both")
    probe = read(gpt)
    count = len(probe.readings)
    gpt(IDS, POSITIONS)
    assert len(probe.readings) == count


def test_a_summary_tells_where_an_arm_ended():
    gpt = build("Sandwich-LN only")
    with torch.no_grad():
        gpt.transformer.layers[2].attention.query_key_value.bias[:32] = 220.0
    probe = read(gpt)
    record = StepRecord(step=7, loss=1.5, readings=probe.readings)
    trace = ArmTrace(name="x", num_steps=9, records=[record], overflow=probe.overflow, half_is_finite=False)
    assert trace.verdict == "scores overflows in layer 2 at step 7"
    summary = trace.summary()
    assert (summary["finished"], summary["steps"], summary["overflow"]) == (0, 7, "scores of layer 2")
    assert summary["max_scores"] > HALF_LIMIT
    assert (
        "overflow"
        not in ArmTrace(name="x", num_steps=1, records=[record], overflow=None, half_is_finite=True).summary()
    )
