"""What a line of the metrics tells of speed and memory, from counted rows, tokens and operations."""

import time
from pathlib import Path

import pytest

from cogview.training.speed import Speed, peak_tflops
from tests.training.small_gpt import GPTTask, run


def test_rates_are_those_since_the_line_before() -> None:
    speed = Speed(first_step=10, device="cpu", precision="fp32")
    speed.add(1e9)
    with speed.waiting():
        time.sleep(0.1)
    time.sleep(0.1)
    first = speed.read(14, global_batch_size=8, tokens_per_row=100.0)
    assert 0 < first["rows_per_second"] <= 4 * 8 / 0.2
    assert first["tokens_per_second"] == pytest.approx(100 * first["rows_per_second"], rel=1e-3)
    assert first["tflops_per_worker"] == pytest.approx(1e-3 * first["rows_per_second"] / (4 * 8), rel=1e-2)
    assert 0.1 < first["data_wait"] <= 1
    time.sleep(0.1)
    second = speed.read(15, global_batch_size=8, tokens_per_row=None)
    assert second["rows_per_second"] <= 8 / 0.1
    assert second.keys() == {"rows_per_second", "data_wait", "memory_gib"}
    assert second["data_wait"] == 0


def test_no_share_of_a_peak_that_is_not_known() -> None:
    assert peak_tflops("cpu") is None
    speed = Speed(first_step=0, device="cpu", precision="bf16")
    speed.add(1e9)
    assert "mfu" not in speed.read(1, global_batch_size=1, tokens_per_row=1.0)


def test_every_line_of_a_training_has_them(tmp_path: Path) -> None:
    for line in run(tmp_path, GPTTask()).values():
        assert line["rows_per_second"] > 0
        assert line["tokens_per_second"] == pytest.approx(8 * line["rows_per_second"], rel=1e-3)
        assert 0 <= line["data_wait"] < 1
        assert 0 < line["memory_gib"] < 64
