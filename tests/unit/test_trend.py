"""What the soak calls growth: a steady rise beyond what is allowed, and no noise."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "lib"))

from trend import Trend, trend_of

HOUR = 3600


def series(per_hour: float, noise: float, base: float = 100.0, count: int = 240) -> Trend:
    draw = random.Random(5)
    points = [
        (at, base + per_hour * at / HOUR + draw.gauss(0, noise))
        for at in (number * HOUR / count for number in range(count))
    ]
    trend = trend_of(points, 0.05)
    assert trend is not None
    return trend


@pytest.mark.parametrize("noise", [0.0, 1.0, 10.0])
def test_noise_is_no_growth(noise: float) -> None:
    assert not series(0, noise).grows


def test_a_steady_rise_is_growth_and_its_slope_is_found_in_noise() -> None:
    trend = series(20, 5)
    assert trend.grows
    assert trend.per_hour == pytest.approx(20, rel=0.2)
    assert trend.begin < trend.median < trend.end


def test_a_rise_within_what_is_allowed_and_a_fall_are_no_growth() -> None:
    assert not series(4, 0.1).grows
    assert series(4, 0.1).score > 4
    assert not series(-40, 1).grows


def test_a_few_wild_points_are_no_growth() -> None:
    points = [(float(at), 100.0 + (1000 if at in {50, 51, 90} else 0)) for at in range(100)]
    trend = trend_of(points, 0.05)
    assert trend is not None
    assert not trend.grows
    assert trend.highest == 1100


def test_a_step_to_a_level_that_stays_is_growth_only_if_it_comes_late_and_large() -> None:
    late = [(float(at), 100.0 if at < 50 else 130.0) for at in range(100)]
    early = [(float(at), 100.0 if at < 5 else 101.0) for at in range(100)]
    assert (trend := trend_of(late, 0.05)) is not None
    assert trend.grows
    assert (trend := trend_of(early, 0.05)) is not None
    assert not trend.grows


def test_too_few_points_say_nothing() -> None:
    assert trend_of([(float(at), 1.0) for at in range(7)], 0.05) is None
