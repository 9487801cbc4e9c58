"""The loss scale: when it falls, when it grows, and that it goes on after a resume."""

import pytest

from cogview.errors import ConfigError
from cogview.training.loss_scale import LossScale, LossScaleConfig


def scale(**changes: float) -> LossScale:
    return LossScale(LossScaleConfig(**{"initial": 16.0, "window": 3, "hysteresis": 2, **changes}))


def follow(loss_scale: LossScale, steps: str) -> list[float]:
    """The scale after each of some steps: `+` a good one, `!` an overflow."""
    values = []
    for step in steps:
        loss_scale.succeeded() if step == "+" else loss_scale.overflowed()
        values.append(loss_scale.value)
    return values


def test_a_window_of_good_steps_doubles_the_scale() -> None:
    assert follow(scale(), "+++++++") == [16, 16, 32, 32, 32, 64, 64]


def test_an_overflow_starts_the_window_anew() -> None:
    assert follow(scale(), "++!+++") == [16, 16, 16, 16, 16, 32]


def test_the_first_overflow_is_forgiven_and_all_that_follow_halve_the_scale() -> None:
    assert follow(scale(), "!!+!") == [16, 8, 8, 4]


def test_growth_brings_the_patience_back() -> None:
    assert follow(scale(), "!!+++!!") == [16, 8, 8, 8, 16, 16, 8]


def test_the_scale_stops_at_its_minimum() -> None:
    falling = scale(minimum=4.0, hysteresis=1)
    assert follow(falling, "!!!!") == [8, 4, 4, 4]
    assert not falling.can_fall


@pytest.mark.parametrize("stop", range(9))
def test_it_goes_on_where_it_was_saved(stop: int) -> None:
    steps = "++!+!+++!"
    whole, first, second = scale(), scale(), scale()
    expected = follow(whole, steps)
    head = follow(first, steps[:stop])
    second.load_state_dict(first.state_dict())
    assert head + follow(second, steps[stop:]) == expected


def test_impossible_settings_name_the_field() -> None:
    with pytest.raises(ConfigError, match="window=0"):
        LossScaleConfig(window=0)
    with pytest.raises(ConfigError, match=r"minimum=4\.0"):
        LossScaleConfig(initial=2.0, minimum=4.0)
