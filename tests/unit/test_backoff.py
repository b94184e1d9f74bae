"""What the wait before another attempt promises."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from shadowsvc.backoff import ceiling_seconds, login_wait_seconds, wait_seconds


def test_the_upper_end_doubles_up_to_the_limit() -> None:
    ceilings = [ceiling_seconds(failures, 0.25, 1.5) for failures in range(1, 7)]
    assert ceilings == [0.25, 0.5, 1, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("failures", [1, 2, 5, 1000, 10**9])
def test_a_wait_lies_between_half_the_least_and_its_upper_end(failures: int) -> None:
    chance = random.Random(failures)
    waits = [wait_seconds(failures, 0.2, 30, chance.uniform) for _ in range(1000)]
    assert min(waits) >= 0.1
    assert max(waits) <= ceiling_seconds(failures, 0.2, 30) <= 30


def test_waits_are_spread_over_the_whole_range() -> None:
    chance = random.Random(1)
    waits = sorted(wait_seconds(8, 0.01, 1, chance.uniform) for _ in range(1000))
    assert waits[0] < 0.05
    assert waits[-1] > 0.95
    assert max(after - before for before, after in pairwise(waits)) < 0.05


def test_a_least_above_the_limit_gives_the_limit_as_upper_end() -> None:
    assert ceiling_seconds(1, 5, 2) == 2


def test_no_failure_yet_counts_as_the_first() -> None:
    assert ceiling_seconds(0, 0.25, 1) == 0.25


def test_after_a_refused_login_the_wait_is_at_least_the_least_and_doubles_to_the_limit() -> None:
    drawn: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        drawn.append((low, high))
        return high

    waits = [login_wait_seconds(refusals, 10, 60, draw) for refusals in (1, 2, 3, 10**9)]
    assert waits == [20, 40, 60, 60]
    assert {low for low, _ in drawn} == {10}
