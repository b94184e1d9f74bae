"""Who waits how long after a failure, and how fast a rig connects."""

from __future__ import annotations

import math
from random import Random

import pytest

from load.backoff import BACKOFFS, Backoff, ConnectRate
from load.errors import BadOption


def test_full_jitter_draws_from_the_whole_range_below_a_ceiling_that_doubles() -> None:
    random = Random(1)
    policy = BACKOFFS["full-jitter"]
    assert [policy.bounds(failures) for failures in (1, 2, 3, 6, 7, 100)] == [
        (0, 1),
        (0, 2),
        (0, 4),
        (0, 32),
        (0, 60),
        (0, 60),
    ]
    waits = [policy.wait_seconds(7, random) for _ in range(5000)]
    tenths = [sum(6 * at <= wait < 6 * at + 6 for wait in waits) for at in range(10)]
    assert sum(tenths) == 5000
    assert min(tenths) > 400


@pytest.mark.parametrize(
    ("name", "failures", "bounds"),
    [
        ("none", 5, (0, 0)),
        ("fixed", 1, (5, 5)),
        ("fixed", 9, (5, 5)),
        ("fixed-jitter", 9, (0, 10)),
        ("exponential", 3, (4, 4)),
        ("equal-jitter", 3, (2, 4)),
    ],
)
def test_each_policy_draws_within_its_bounds(
    name: str, failures: int, bounds: tuple[float, float]
) -> None:
    policy, random = BACKOFFS[name], Random(1)
    assert policy.bounds(failures) == bounds
    for _ in range(200):
        assert bounds[0] <= policy.wait_seconds(failures, random) <= bounds[1]


def test_devices_that_failed_together_come_back_spread_out() -> None:
    together = [Backoff("x", floor_share=1.0).wait_seconds(4, Random(seed)) for seed in range(100)]
    spread = [BACKOFFS["full-jitter"].wait_seconds(4, Random(seed)) for seed in range(100)]
    assert len(set(together)) == 1
    assert len({round(wait, 2) for wait in spread}) > 80


def taken(rate: ConnectRate, seconds: float, *, begin: float, fail: float = 0.0) -> int:
    """Connects that begin in `seconds`, of which a share fails."""
    count, random = 0, Random(1)
    for tick in range(int(seconds * 100)):
        now = rate.take(begin + tick / 100, 10_000)
        count += now
        for _ in range(now):
            if random.random() < fail:
                rate.failed()
            else:
                rate.succeeded()
    return count


def test_connects_begin_at_the_rate_that_was_set() -> None:
    assert taken(ConnectRate(200), 10, begin=5) == pytest.approx(2000, abs=20)


def test_a_pause_brings_no_burst() -> None:
    rate = ConnectRate(200)
    taken(rate, 1, begin=0)
    assert rate.take(1000, 10_000) <= 20


def test_no_more_begin_than_are_wanted() -> None:
    rate = ConnectRate(1000)
    rate.take(0, 0)
    assert rate.take(1, 7) == 7


def test_failures_slow_connects_down_to_the_least_rate() -> None:
    rate = ConnectRate(400)
    taken(rate, 30, begin=0, fail=1.0)
    assert rate.per_second == 400 / 50
    assert rate.decays >= 5


def test_the_rate_comes_back_when_connects_succeed() -> None:
    rate = ConnectRate(400)
    taken(rate, 30, begin=0, fail=1.0)
    taken(rate, 15, begin=30)
    assert rate.per_second == 400


def test_few_failures_do_not_slow_connects() -> None:
    rate = ConnectRate(400)
    taken(rate, 20, begin=0, fail=0.02)
    assert rate.decays == 0
    assert rate.per_second == 400


def test_without_decay_failures_change_nothing() -> None:
    rate = ConnectRate(400, decay=1.0)
    taken(rate, 20, begin=0, fail=1.0)
    assert (rate.per_second, rate.decays) == (400, 0)


def test_a_new_limit_keeps_the_decay_that_there_was() -> None:
    rate = ConnectRate(400)
    taken(rate, 3.5, begin=0, fail=1.0)
    decayed = rate.per_second / 400
    assert decayed < 1
    rate.limit(100)
    assert rate.per_second == pytest.approx(100 * decayed)
    rate.limit(1000)
    assert rate.per_second == pytest.approx(1000 * decayed)


@pytest.mark.parametrize(
    "figures",
    [
        {"most_per_second": 0},
        {"most_per_second": 5, "decay": 0},
        {"most_per_second": math.inf},
        {"most_per_second": math.nan},
    ],
)
def test_figures_that_make_no_sense_are_refused(figures: dict[str, float]) -> None:
    with pytest.raises(BadOption, match="above 0"):
        ConnectRate(**figures)


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan])
def test_a_limit_that_makes_no_sense_is_refused(rate: float) -> None:
    kept = ConnectRate(400)
    with pytest.raises(BadOption, match="above 0"):
        kept.limit(rate)
    assert kept.per_second == 400
