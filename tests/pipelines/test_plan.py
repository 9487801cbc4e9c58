"""`--plan`: the table, the verdict, and that jobs without a plan say so."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.models.sizes import SIZES
from pipelines import pretrain
from pipelines.runtime import command_line
from pipelines.runtime.flags import read_order
from pipelines.runtime.gpus import UNKNOWN, GPUs


def test_the_plan_of_the_paper_tells_every_size_tokens_and_steps() -> None:
    text = "\n".join(pretrain.plan(pretrain.PAPER, gpus=UNKNOWN))
    assert {*SIZES, "this run"} <= {line[:10].strip() for line in text.splitlines()}
    assert "3,928,849,920" in text
    assert "144,000 of 6,144 rows x 1,088 tokens" in text
    assert "962,592,768,000" in text  # 6144 x 1088 x 144,000; the paper prints a tenth of it


def test_what_does_not_fit_is_told_after_the_table() -> None:
    whole = replace(pretrain.PAPER, loop=replace(pretrain.PAPER.loop, sharding="none"))
    lines = pretrain.plan(whole, gpus=GPUs(memory=32.0))
    told = io.StringIO()
    with pytest.raises(ConfigError, match="--gpu-memory 32: a worker needs"):
        told.writelines(lines)
    assert "3,928,849,920" in told.getvalue()


def test_what_fits_raises_nothing() -> None:
    assert list(pretrain.plan(pretrain.PAPER, gpus=GPUs(memory=32.0))), "spread over the paper's 512 GPUs"
    assert list(pretrain.plan(replace(pretrain.PAPER, model=SIZES["tiny"]), gpus=GPUs(memory=80.0)))


def test_days_and_price_follow_from_what_a_gpu_sustains() -> None:
    text = "\n".join(pretrain.plan(pretrain.PAPER, gpus=GPUs(tflops=50.0, price=2.0)))
    # 144,000 x 6,144 rows x 1,088 tokens x 3.93e9 weights x 8, forward passes done again among them, is 3.0e22;
    # attention comes to it
    assert "work: 3.1e+22 floating-point operations" in text
    assert "8.4 s a step, 14.0 days on 512 GPUs of 50 TFLOP/s each" in text
    assert "GPU hours at 2 are" in text
    assert "time: give --gpu-tflops" in "\n".join(pretrain.plan(pretrain.PAPER, gpus=UNKNOWN))


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--gpu-memory", "1"), 2), (("--gpu-memory=many",), 2)])
def test_the_command_prints_the_plan_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int
) -> None:
    command = ["pretrain", "paper", "--plan", "--root", str(tmp_path), *words]
    assert command_line.main(command) == code
    shown = capsys.readouterr()
    assert ("this run" in shown.out) == (words != ("--gpu-memory=many",))
    assert ("error: --gpu-memory" in shown.err) == (code == 2)
    assert list(tmp_path.iterdir()) == []


def test_a_memory_without_a_plan_and_a_plan_of_another_job_are_refused() -> None:
    with pytest.raises(ConfigError, match="give --plan as well"):
        read_order(["pretrain", "--gpu-memory", "32"])
    outcome = command_line.Outcome(["generate", "--plan"], err=io.StringIO())
    with outcome:
        command_line._dispatch(["generate", "--plan"], io.StringIO())
    assert outcome.code == command_line.USER_ERROR
