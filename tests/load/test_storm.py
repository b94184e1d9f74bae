"""The simulated storm: policies are the rig's, nobody is counted twice, chance is a seed."""

from __future__ import annotations

import dataclasses
import json
import math
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from load.backoff import BACKOFFS
from load.capacity.command import main
from load.capacity.storms import scenarios
from load.errors import BadOption
from load.storm import Decorrelated, Jittered, Policy, Storm, simulate

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Storm(devices=20_000, nodes=4, connects_per_second=100.0, horizon_seconds=1200.0)
LIMITED = dataclasses.replace(SMALL, places=400.0)
FULL = dataclasses.replace(BACKOFFS["full-jitter"], most_seconds=60.0)

storms = st.builds(
    Storm,
    devices=st.integers(1, 5000),
    nodes=st.integers(1, 5),
    connects_per_second=st.floats(5, 500),
    places=st.one_of(st.just(math.inf), st.integers(1, 5000).map(float)),
    timeout_seconds=st.floats(0.5, 30),
    notice_seconds=st.floats(0, 60),
    horizon_seconds=st.integers(10, 300).map(float),
    seed=st.integers(0, 1000),
)
policies = st.sampled_from([*map(Jittered, BACKOFFS.values()), Decorrelated()])


@settings(deadline=None, max_examples=60)
@given(storm=storms, policy=policies)
def test_no_device_is_connected_twice_and_no_node_takes_more_than_it_can(
    storm: Storm, policy: Jittered | Decorrelated
) -> None:
    found = simulate(storm, policy)

    gained = np.diff(found.connected_each_second, prepend=0.0)
    assert gained.min() >= -1e-12
    assert found.connected <= 1 + 1e-9
    # A turn that began before a second may end in it: one more than the rate.
    most = (storm.connects_per_second + 1) * storm.nodes
    devices = max(1, round(storm.devices / storm.nodes)) * storm.nodes
    assert gained.max() * devices <= most + 1e-6
    assert found.attempts >= found.connected * storm.devices - 1e-6
    assert -1e-9 <= found.wasted_share <= 1


@settings(deadline=None, max_examples=30)
@given(storm=storms, policy=policies)
def test_the_same_seed_makes_the_same_storm(storm: Storm, policy: Jittered | Decorrelated) -> None:
    first, second = simulate(storm, policy), simulate(storm, policy)

    assert np.array_equal(first.attempts_each_second, second.attempts_each_second)
    assert np.array_equal(first.connected_each_second, second.connected_each_second)


def test_devices_that_fit_all_come_back_at_the_first_attempt() -> None:
    storm = Storm(devices=100, nodes=1, connects_per_second=1000, horizon_seconds=30.0)

    found = simulate(storm, Jittered(BACKOFFS["none"]))

    assert found.connected == 1.0
    assert found.attempts == 100
    assert found.wasted_share == 0.0
    assert found.seconds_until(1.0) == 1.0


def test_nobody_is_back_before_the_nodes_could_have_taken_all() -> None:
    every: list[Policy] = [*map(Jittered, BACKOFFS.values()), Decorrelated()]
    for policy in every:
        for storm in (SMALL, LIMITED):
            back = simulate(storm, policy).seconds_until(1.0)
            assert back is None or back >= math.floor(storm.least_seconds)


def test_a_line_longer_than_patience_is_served_to_nobody() -> None:
    # All at once, again and again: after the first ten seconds every turn is of one that has gone.
    found = simulate(SMALL, Jittered(BACKOFFS["none"]))

    served = SMALL.timeout_seconds * SMALL.connects_per_second * SMALL.nodes
    assert found.connected * SMALL.devices == pytest.approx(served, rel=0.01)
    assert found.seconds_until(1.0) is None


def test_a_short_line_keeps_the_nodes_busy_with_those_who_wait() -> None:
    found = simulate(LIMITED, Jittered(BACKOFFS["none"]))

    assert found.seconds_until(1.0) is not None


def test_jitter_brings_all_back_sooner_than_the_same_waits_without() -> None:
    none = dataclasses.replace(BACKOFFS["exponential"], most_seconds=60.0)

    with_jitter = simulate(LIMITED, Jittered(FULL)).seconds_until(0.99)
    without = simulate(LIMITED, Jittered(none)).seconds_until(0.99)

    assert with_jitter is not None
    assert without is None or with_jitter < without


def test_waits_long_enough_bring_all_back_without_a_limit() -> None:
    # Devices, divided by the mean wait and time-out, have to be below what the nodes take.
    enough = 2 * 1.5 * SMALL.least_seconds
    long = dataclasses.replace(FULL, least_seconds=enough, most_seconds=enough)
    short = dataclasses.replace(FULL, least_seconds=5.0, most_seconds=5.0)

    assert simulate(SMALL, Jittered(long)).connected == 1.0
    assert simulate(SMALL, Jittered(short)).connected < 0.5


def test_a_first_wait_from_the_whole_range_needs_few_attempts() -> None:
    wide = dataclasses.replace(FULL, least_seconds=60.0)

    spread = simulate(LIMITED, Jittered(wide))
    usual = simulate(LIMITED, Jittered(FULL))

    assert spread.connected == usual.connected == 1.0
    assert spread.attempts_per_device < usual.attempts_per_device / 2
    assert spread.peak_per_node < usual.peak_per_node / 10


def test_a_loss_that_is_noticed_slowly_peaks_lower() -> None:
    slow = dataclasses.replace(LIMITED, notice_seconds=90.0)

    assert (
        simulate(slow, Jittered(FULL)).peak_per_node
        < simulate(LIMITED, Jittered(FULL)).peak_per_node / 5
    )


@pytest.mark.parametrize("name", sorted(BACKOFFS))
def test_the_simulated_waits_are_those_that_the_rig_draws(name: str) -> None:
    backoff, chance = BACKOFFS[name], np.random.default_rng(1)
    many = 2000
    for failures in (1, 2, 5, 200):
        drawn = Jittered(backoff).waits(np.full(many, failures), np.zeros(many), chance)
        random = Random(1)
        rig = [backoff.wait_seconds(failures, random) for _ in range(many)]

        low, high = backoff.bounds(failures)
        assert drawn.min() >= low
        assert drawn.max() <= high
        assert drawn.mean() == pytest.approx(sum(rig) / many, abs=0.05 * (high - low) + 1e-9)


@given(
    last=st.floats(0, 500),
    failures=st.integers(1, 100),
    least=st.floats(0.1, 5),
    most=st.floats(5, 400),
)
def test_decorrelated_waits_stay_between_the_least_and_three_times_the_last(
    last: float, failures: int, least: float, most: float
) -> None:
    policy = Decorrelated(least_seconds=least, most_seconds=most)

    drawn = policy.waits(np.full(50, failures), np.full(50, last), np.random.default_rng(1))

    before = least if failures == 1 else last
    assert drawn.min() >= min(least, most)
    assert drawn.max() <= min(most, max(least, 3 * before)) + 1e-9


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"devices": 0}, "--devices 0"),
        ({"nodes": 0}, "--nodes 0"),
        ({"places": 0}, "--places 0"),
        ({"notice_seconds": -1.0}, "--notice-seconds -1"),
        ({"connects_per_second": 0.0}, "--connects-per-second 0"),
        ({"timeout_seconds": math.nan}, "--timeout-seconds nan"),
        ({"horizon_seconds": math.inf}, "--horizon-seconds inf"),
    ],
)
def test_a_storm_that_makes_no_sense_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        dataclasses.replace(SMALL, **changed)


def test_every_policy_is_compared_without_and_with_a_limit() -> None:
    found = list(
        scenarios(SMALL, capacity=125, limit=100, places=400, long_places=6000, ceiling=30)
    )

    bare = {each.policy.name for each in found if each.front == "none"}
    limited = {each.policy.name for each in found if each.front == "limit, line of 400"}
    assert bare == limited
    assert {"none", "fixed", "exponential", "equal-jitter", "full-jitter", "decorrelated"} < bare
    assert any(each.front == "limit, line of 6,000" for each in found)


@pytest.mark.timeout(240)  # matplotlib alone takes most of a minute on a machine that is full
def test_the_command_prints_a_row_for_each_and_writes_figures_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, plot = tmp_path / "storm.json", tmp_path / "storm.svg"

    code = main(
        "storm --devices 400 --nodes 2 --capacity 6 --limit 5 --places 20 --long-places 300 "
        f"--ceiling-seconds 30 --horizon-seconds 200 --json {figures} --plot {plot}".split()
    )

    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("|")][2:]
    found = json.loads(figures.read_text())
    assert code == 0
    assert len(rows) == len(found) >= 14
    assert all(each["seed"] == 1 for each in found)
    assert "<svg" in plot.read_text()


def test_the_command_names_an_option_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["storm", "--limit", "0"]) == 2
    assert "--limit: has to be above 0" in capsys.readouterr().err
