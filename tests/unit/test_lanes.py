"""Which work goes next: no replica set takes the places of the others."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from shadowsvc.lanes import LETTERS, Lanes


class Work:
    def __init__(self, number: int, lane: int) -> None:
        self.number = number
        self.lane = lane
        self.in_doubt = False

    def __lt__(self, other: Work) -> bool:
        return self.number < other.number

    def __repr__(self) -> str:
        return f"{self.number}@{self.lane}"


def works(lane: int, count: int, first: int = 0) -> list[Work]:
    return [Work(first + number, lane) for number in range(count)]


def start(lanes: Lanes[Work], limit: int, running: list[Work]) -> list[Work]:
    """Begin whatever may begin."""
    begun = []
    while len(running) < limit and (work := lanes.take(limit)) is not None:
        lanes.begin(work)
        running.append(work)
        begun.append(work)
    return begun


def put(lanes: Lanes[Work], all_: list[Work]) -> None:
    for work in all_:
        lanes.put(work)


def fail(lanes: Lanes[Work], lane: int, times: int = 1) -> None:
    for _ in range(times):
        work = Work(0, lane)
        lanes.begin(work)
        lanes.end(work, outage=True)


def test_a_lane_alone_may_take_the_whole_window() -> None:
    lanes = Lanes[Work]()
    put(lanes, works(0, 100))
    assert len(start(lanes, 32, [])) == 32


def test_once_others_were_seen_no_lane_takes_the_whole_window() -> None:
    lanes = Lanes[Work]()
    fine = Work(0, 7)
    lanes.begin(fine)
    lanes.end(fine)
    put(lanes, works(0, 100))
    running: list[Work] = []
    assert len(start(lanes, 32, running)) == 24
    put(lanes, works(7, 100))
    assert Counter(work.lane for work in start(lanes, 32, running)) == {7: 8}


def test_dead_letters_never_take_the_whole_window_and_are_no_second_lane() -> None:
    lanes = Lanes[Work]()
    put(lanes, works(LETTERS, 100))
    running: list[Work] = []
    assert len(start(lanes, 8, running)) == 6
    put(lanes, works(0, 100))
    assert len(start(lanes, 32, running)) >= 24


def test_of_one_lane_the_oldest_goes_first_whenever_it_came() -> None:
    lanes = Lanes[Work]()
    put(lanes, [Work(number, 0) for number in (3, 1, 2, 0)])
    assert [work.number for work in start(lanes, 4, [])] == [0, 1, 2, 3]


def test_lanes_take_turns() -> None:
    lanes = Lanes[Work]()
    put(lanes, works(0, 3))
    put(lanes, works(1, 3, 10))
    assert [work.lane for work in start(lanes, 6, [])] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(("failures", "share"), [(1, 8), (2, 8), (3, 4), (4, 2), (5, 1), (50, 1)])
def test_a_lane_in_doubt_gets_less_with_each_failure(failures: int, share: int) -> None:
    lanes = Lanes[Work]()
    fail(lanes, 0, failures)
    put(lanes, works(0, 100))
    assert len(start(lanes, 32, [])) == share
    assert lanes.is_in_doubt(0)
    assert lanes.in_doubt == 1


def test_all_lanes_in_doubt_together_get_a_quarter_of_the_window() -> None:
    lanes = Lanes[Work]()
    for lane in range(20):
        fail(lanes, lane)
        put(lanes, works(lane, 5, lane * 10))
    put(lanes, works(99, 100, 1000))
    running: list[Work] = []
    start(lanes, 32, running)
    lanes_of = Counter(work.lane == 99 for work in running)
    assert lanes_of == {True: 24, False: 8}


def test_the_first_good_answer_ends_the_doubt_and_lets_all_go() -> None:
    lanes = Lanes[Work]()
    fail(lanes, 0, 9)
    put(lanes, works(0, 10))
    running: list[Work] = []
    assert len(start(lanes, 32, running)) == 1
    lanes.end(running.pop())
    assert lanes.in_doubt == 0
    assert len(start(lanes, 32, running)) == 9
    assert lanes.waiting == 0


def test_room_that_one_lane_in_doubt_gives_up_goes_to_another() -> None:
    lanes = Lanes[Work]()
    for lane in range(2):
        fail(lanes, lane)
        put(lanes, works(lane, 3, lane * 10))
    running: list[Work] = []
    (first,) = start(lanes, 4, running)
    assert start(lanes, 4, running) == []
    running.remove(first)
    lanes.end(first, outage=True)
    (second,) = start(lanes, 4, running)
    assert second.lane != first.lane


def test_what_is_dropped_never_goes() -> None:
    lanes = Lanes[Work]()
    put(lanes, works(0, 10))
    put(lanes, works(1, 10))
    lanes.drop(lambda work: work.number % 2 == 0)
    assert lanes.waiting == len(list(lanes)) == 10
    assert {work.number % 2 for work in start(lanes, 32, [])} == {1}
    assert lanes.take(32) is None


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_all_work_is_done_and_nothing_waits_for_ever(seed: int) -> None:
    chance = random.Random(seed)
    lanes = Lanes[Work]()
    todo = [Work(number, chance.randrange(-1, 6)) for number in range(300)]
    away = {chance.randrange(6) for _ in range(3)}
    running: list[Work] = []
    done: list[Work] = []
    fresh = list(todo)
    for step in range(100_000):
        if len(done) == len(todo):
            break
        if step == 2000:
            away.clear()
        for _ in range(min(chance.randrange(4), len(fresh))):
            lanes.put(fresh.pop())
        limit = chance.randrange(1, 12)
        start(lanes, limit, running)
        if lanes.waiting:
            assert running  # somebody's end will make room
        if running:
            work = running.pop(chance.randrange(len(running)))
            lanes.end(work, outage=work.lane in away)
            if work.lane in away:
                lanes.put(work)
            else:
                done.append(work)
    assert len(done) == len(todo)
    assert lanes.waiting == len(running) == 0
