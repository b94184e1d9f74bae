"""When the service calls itself failing: not for a moment's failure, and not by fits and starts."""

from __future__ import annotations

from shadowsvc.jobs import Job
from shadowsvc.store.batch import Batch
from shadowsvc.troubles import Troubles

MOMENT = 1.0


def job(lane: int = 0, number: int = 0) -> Job:
    return Job(number, lane, Batch(lane))


def test_a_failure_is_failing_only_after_a_moment() -> None:
    troubles = Troubles()
    assert troubles.failed(job(), 10.0, "time-out")
    assert troubles
    assert troubles.failing(10.9, MOMENT) is None
    assert troubles.failing(11.0, MOMENT) == "time-out"


def test_the_first_failure_counts_and_not_the_last() -> None:
    troubles = Troubles()
    one = job()
    assert troubles.failed(one, 10.0, "time-out")
    assert not troubles.failed(one, 10.9, "unavailable")
    assert troubles.failing(11.0, MOMENT) == "unavailable"


def test_successes_of_others_end_nothing_but_the_time_without_any() -> None:
    troubles = Troubles()
    one, other = job(), job()
    troubles.failed(one, 10.0, "time-out")
    troubles.failed(other, 11.0, "time-out")
    troubles.none_since = None
    assert troubles.ended(one)
    assert not troubles.are_over()
    assert troubles.failing(20.0, MOMENT) == "time-out"
    assert troubles.ended(other)
    assert troubles.are_over()
    assert not troubles.are_over()
    assert troubles.failing(20.0, MOMENT) is None


def test_what_was_left_to_the_broker_is_no_success() -> None:
    troubles = Troubles()
    one = job()
    troubles.failed(one, 10.0, "time-out")
    assert troubles.ended(one)
    assert not troubles.are_over()
    assert troubles.failing(11.0, MOMENT) == "time-out"
    troubles.none_since = None
    assert troubles.are_over()


def test_a_part_has_failed_for_as_long_as_the_whole() -> None:
    troubles = Troubles()
    whole, part = job(), job()
    troubles.failed(whole, 10.0, "failure")
    troubles.none_since = None
    troubles.split(whole, part)
    troubles.ended(whole)
    assert part in troubles
    assert troubles.failing(11.0, MOMENT) == "failure"
    troubles.split(job(), job())  # of what has not failed, nothing has
    troubles.ended(part)
    assert not troubles


def test_a_lane_is_clear_when_nothing_of_it_is_retried() -> None:
    troubles = Troubles()
    mine, yours = job(1), job(2)
    troubles.failed(mine, 10.0, "time-out")
    troubles.failed(mine, 11.0, "time-out")
    troubles.failed(yours, 11.0, "time-out")
    assert not troubles.is_lane_clear(1)
    troubles.ended(mine)
    assert troubles.is_lane_clear(1)
    assert not troubles.is_lane_clear(2)
    assert not troubles.ended(mine)


def test_the_older_job_is_the_lesser() -> None:
    assert min(job(number=3), job(number=1), job(number=2)).number == 1
