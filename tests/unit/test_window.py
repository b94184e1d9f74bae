"""The window of requests in flight: quick to find the best, slow to be fooled, never stuck.

Stores are simulated event by event with a clock of their own, so that an hour of Cassandra's bad
days takes a second and the same seed gives the same run.
"""

from __future__ import annotations

import functools
import heapq
import random
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest

from shadowsvc.window import MAX_IN_FLIGHT, REASONS, Window

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = 2.0


class Answer(NamedTuple):
    """What a store makes of a request."""

    seconds: float
    overload: bool = False


Store = "Callable[[int, float, random.Random], Answer]"
"""In flight with this one, time → the answer."""


def noisy(seconds: float, chance: random.Random) -> float:
    """A busy machine's latency: spread over a factor of four, and now and then a stall."""
    seconds *= chance.lognormvariate(0, 0.4)
    return seconds + (chance.uniform(0.02, 0.2) if chance.random() < 0.01 else 0)


def parallel(in_flight: int, now: float, chance: random.Random) -> Answer:  # noqa: ARG001
    """Takes whatever comes: as many as are allowed is best."""
    return Answer(noisy(0.005, chance))


def queueing(in_flight: int, now: float, chance: random.Random) -> Answer:  # noqa: ARG001
    """Works at eight, the rest queue: any window from eight on is best."""
    return Answer(noisy(0.005, chance) * max(1.0, in_flight / 8))


def thrashing(in_flight: int, now: float, chance: random.Random) -> Answer:  # noqa: ARG001
    """Works at eight; each one more costs all of them."""
    over = max(0, in_flight - 8)
    return Answer(noisy(0.005, chance) * max(1.0, in_flight / 8) * (1 + 0.08 * over))


def shedding(in_flight: int, now: float, chance: random.Random) -> Answer:  # noqa: ARG001
    """Refuses what is above twelve, as OVERLOADED does, and is busied by refusing."""
    if in_flight > 12:
        return Answer(0.005, overload=True)
    return Answer(noisy(0.005, chance))


def choking(in_flight: int, now: float, chance: random.Random) -> Answer:  # noqa: ARG001
    """Above sixteen everything times out."""
    if in_flight > 16:
        return Answer(TIMEOUT, overload=True)
    return Answer(noisy(0.01, chance))


class Run:
    """A closed loop: always more to write than may be in flight."""

    def __init__(
        self,
        store: Callable[[int, float, random.Random], Answer],
        *,
        minimum: int = 2,
        maximum: int = 32,
        seed: int = 1,
    ) -> None:
        self.store = store
        self.window = Window(minimum, maximum, now=0.0)
        self.chance = random.Random(seed)
        self.now = 0.0
        self.done: list[float] = []
        self.limits: list[tuple[float, int]] = []
        self.demand = MAX_IN_FLIGHT
        """How many would be in flight without a window."""
        self._ends: list[tuple[float, int, float, Answer]] = []
        self._number = 0

    def until(self, end: float) -> Run:
        while self.now < end:
            while len(self._ends) < min(self.window.limit, self.demand):
                self._number += 1
                in_flight = len(self._ends) + 1
                self.window.sent(in_flight)
                answer = self.store(in_flight, self.now, self.chance)
                item = (self.now + answer.seconds, self._number, self.now, answer)
                heapq.heappush(self._ends, item)
            self.now, _, sent, answer = heapq.heappop(self._ends)
            if answer.overload:
                self.window.overloaded(self.now, sent)
            else:
                self.window.answered(self.now, self.now - sent)
                self.done.append(self.now)
            self.limits.append((self.now, self.window.limit))
            assert self.window.minimum <= self.window.limit <= self.window.maximum
        return self

    def throughput(self, since: float) -> float:
        return sum(one >= since for one in self.done) / (self.now - since)

    def limit(self, since: float) -> float:
        limits = [limit for now, limit in self.limits if now >= since]
        return sum(limits) / len(limits)


@functools.cache
def best(store: Callable[[int, float, random.Random], Answer]) -> float:
    """The throughput of the best fixed window."""
    return max(
        Run(store, minimum=size, maximum=size).until(3).throughput(1)
        for size in (4, 6, 8, 10, 12, 14, 16, 24, 32)
    )


# -------------------------------------------------------------------- how near the best


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("store", "share"),
    [(parallel, 0.95), (queueing, 0.95), (thrashing, 0.65), (shedding, 0.85), (choking, 0.6)],
)
def test_throughput_comes_near_that_of_the_best_fixed_window(
    store: Callable[[int, float, random.Random], Answer], share: float, seed: int
) -> None:
    run = Run(store, seed=seed).until(25)
    assert run.throughput(10) >= share * best(store)


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_a_busy_machine_does_not_lower_the_window(seed: int) -> None:
    run = Run(parallel, seed=seed).until(15)
    assert run.limit(2) > 30


@pytest.mark.parametrize("seed", range(3))
def test_stalls_of_the_whole_process_do_not_lower_the_window(seed: int) -> None:
    def stalling(in_flight: int, now: float, chance: random.Random) -> Answer:
        answer = parallel(in_flight, now, chance)
        # A tenth of a second without a turn, twice a second: what is under way waits for its end.
        into = now % 0.5
        return Answer(answer.seconds + (0.1 - into if into < 0.1 else 0))

    assert Run(stalling, seed=seed).until(15).limit(2) > 28


def test_an_idle_store_that_becomes_busy_is_not_held_back() -> None:
    """Small requests teach a low latency; the large ones of a busy time are slower."""

    def heavier(in_flight: int, now: float, chance: random.Random) -> Answer:
        return Answer(noisy(0.001 if now < 60 else 0.006, chance) * max(1.0, in_flight / 16))

    run = Run(heavier)
    run.demand = 1
    run.until(60)
    assert run.window.limit == 2
    run.demand = MAX_IN_FLIGHT
    run.until(70)
    full = Run(lambda in_flight, now, chance: heavier(in_flight, now + 60, chance), minimum=32)
    assert run.throughput(61) > 0.9 * full.until(10).throughput(1)


def test_a_store_that_becomes_slow_whatever_the_window_is_not_throttled() -> None:
    """Compaction makes everything ten times slower for a minute; fewer requests mend nothing."""

    def slow(in_flight: int, now: float, chance: random.Random) -> Answer:
        factor = 10 if 20 <= now < 80 else 1
        return Answer(parallel(in_flight, now, chance).seconds * factor)

    run = Run(slow).until(80)
    assert run.window.changes["restored"] >= 1
    assert run.limit(25) > 24
    run.until(100)
    assert run.limit(85) > 30


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("slower", [3, 10, 40])
def test_a_first_impression_that_was_too_good_is_corrected(slower: int, seed: int) -> None:
    """The first answers come from an idle machine, all later ones from one that is busy."""

    def becomes_busy(in_flight: int, now: float, chance: random.Random) -> Answer:
        return Answer(parallel(in_flight, now, chance).seconds * (1 if now < 0.05 else slower))

    assert Run(becomes_busy, seed=seed).until(25).limit(20) > 24


@pytest.mark.parametrize("seed", range(3))
def test_latency_that_wanders_with_the_machine_does_not_hold_the_window_down(seed: int) -> None:
    """The machine's own work makes everything up to twenty times slower, for a second or ten."""
    phases = random.Random(seed)
    factors = [phases.choice([1, 1, 4, 20]) for _ in range(100)]

    def wandering(in_flight: int, now: float, chance: random.Random) -> Answer:
        return Answer(parallel(in_flight, now, chance).seconds * factors[int(now)])

    assert Run(wandering, seed=seed).until(40).limit(10) > 20


@pytest.mark.parametrize("seed", range(2))
def test_a_time_out_now_and_then_is_no_overload(seed: int) -> None:
    def lossy(in_flight: int, now: float, chance: random.Random) -> Answer:
        if chance.random() < 0.002:
            return Answer(TIMEOUT, overload=True)
        return Answer(parallel(in_flight, now, chance).seconds * 10)

    assert Run(lossy, seed=seed).until(60).limit(10) > 26


# -------------------------------------------------------------------- overload and outages


def test_one_overload_of_many_requests_halves_the_window_once() -> None:
    run = Run(parallel).until(5)
    before = run.window.limit
    for _ in range(before):
        run.window.overloaded(5.5, 5.1)
    assert run.window.limit == before // 2
    run.window.overloaded(6.0, 5.6)
    assert run.window.limit == before // 4
    assert run.window.changes["overload"] == 2


def test_never_below_the_minimum_and_never_above_the_maximum() -> None:
    window = Window(3, 5, now=0)
    for number in range(100):
        window.overloaded(number + 1.0, number + 0.5)
        assert window.limit == 3
    for number in range(10_000):
        window.sent(window.limit)
        window.answered(200 + number / 1000, 0.001)
        assert 3 <= window.limit <= 5
    assert window.limit == 5


@pytest.mark.parametrize("seed", range(3))
def test_after_an_outage_the_window_is_whole_again_within_seconds(seed: int) -> None:
    def away(in_flight: int, now: float, chance: random.Random) -> Answer:
        if 10 <= now < 60:
            return Answer(TIMEOUT, overload=True)
        return parallel(in_flight, now, chance)

    run = Run(away, seed=seed).until(60)
    assert run.window.limit == run.window.minimum
    run.until(70)
    assert run.limit(65) > 30
    assert run.throughput(65) > 0.9 * best(parallel)


def test_where_overload_was_met_the_window_returns_carefully_until_that_is_long_over() -> None:
    window = Run(parallel).until(5).window
    now = 10.0

    def cut_and_count_seconds() -> float:
        """How long the window takes to be whole again after an overload at its upper bound."""
        nonlocal now
        for _ in range(4):
            window.overloaded(now, now)
        began = now
        while window.limit < 32:
            now += 0.005
            window.sent(window.limit)
            window.answered(now, 0.005)
        return now - began

    quick = cut_and_count_seconds()
    slower = cut_and_count_seconds()
    assert 2 < quick < slower / 1.5
    for _ in range(1000):  # five good seconds
        now += 0.005
        window.sent(window.limit)
        window.answered(now, 0.005)
    assert cut_and_count_seconds() == pytest.approx(quick, rel=0.1)


def test_a_window_that_nobody_fills_does_not_grow() -> None:
    run = Run(parallel)
    run.demand = 1
    run.until(30)
    assert run.window.limit == 2
    assert run.window.usual_seconds == pytest.approx(0.005, rel=0.3)


# -------------------------------------------------------------------- bounds and figures


@pytest.mark.parametrize(("least", "most"), [(0, 1), (3, 2), (1, MAX_IN_FLIGHT + 1)])
def test_bounds_that_make_no_sense_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match="does not hold"):
        Window(least, most, now=0)


def test_a_window_of_one_size_never_changes() -> None:
    run = Run(shedding, minimum=32, maximum=32).until(2)
    assert run.window.limit == 32
    assert run.window.changes == Counter()


def test_every_change_has_a_reason_that_is_known() -> None:
    reasons: set[str] = set()
    for store in (parallel, queueing, thrashing, shedding, choking):
        reasons |= set(Run(store, seed=1).until(30).window.changes)
    assert reasons == set(REASONS)


def test_what_it_remembers_of_requests_is_bounded() -> None:
    window = Window(1, 32, now=0)
    most = 0
    for number in range(100_000):
        window.sent(1)
        window.answered(number / 5000, 0.001)
        most = max(most, len(window._samples))
    assert most <= 5000
