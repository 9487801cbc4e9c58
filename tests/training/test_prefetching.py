"""Batches made ahead are those that were asked for, in their order; an error comes when it is its step's turn."""

import threading

import pytest

from cogview.training.prefetching import Batches


def test_every_batch_is_made_once_and_the_next_one_beside_the_work() -> None:
    made: list[tuple[int, bool]] = []
    is_there = threading.Event()

    def make(step: int) -> str:
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 4:
            is_there.set()
        return f"batch {step}"

    with Batches(make, end=6, is_ahead=True) as batches:
        assert batches.take(3) == "batch 3"
        assert is_there.wait(10)  # made without being asked for
        assert [batches.take(step) for step in (4, 5)] == ["batch 4", "batch 5"]
    assert made == [(3, True), (4, False), (5, False)]  # and none behind the end


def test_nothing_is_made_ahead_where_that_is_not_wanted() -> None:
    made: list[int] = []
    with Batches(lambda step: made.append(step) or step, end=9, is_ahead=False) as batches:
        assert [batches.take(step) for step in (0, 1)] == [0, 1]
        assert made == [0, 1]


def test_some_are_made_at_once() -> None:
    made: list[int] = []
    with Batches(lambda step: made.append(step) or step, end=5, is_ahead=False, at_once=3) as batches:
        assert batches.take(0) == 0
        assert made == [0, 1, 2]
        assert [batches.take(step) for step in range(1, 5)] == [1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4]  # and none behind the end


def test_an_error_is_raised_at_its_own_step() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise OSError("the disk is gone")
        return step

    with Batches(make, end=3, is_ahead=True) as batches:
        assert batches.take(0) == 0
        with pytest.raises(OSError, match="the disk is gone"):
            batches.take(1)


def test_a_step_that_was_not_expected_is_made_all_the_same() -> None:
    with Batches(lambda step: step, end=9, is_ahead=True) as batches:
        assert [batches.take(step) for step in (0, 5, 6)] == [0, 5, 6]
