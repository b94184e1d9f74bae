"""Health: when the probes say no, and that every reason is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest

from shadowsvc.health import MAX_CLOCK_OFFSET_SECONDS, REASONS, Health

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowsvc.pipeline import Pipeline


@dataclass
class Works:
    """The few facts of a pipeline that probes ask for; being wedged can't be had on demand."""

    subscribed: bool = True
    draining: bool = False
    failing: str | None = None
    stuck: str | None = None
    asked: float | None = None

    def wedged(self, now: float) -> str | None:
        self.asked = now
        return self.stuck


def healthy() -> tuple[Health, Works]:
    health = Health(lambda: 5.0)
    works = Works()
    health.pipeline = cast("Pipeline", works)
    health.store_connected = True
    return health, works


def names(health: Health) -> list[str]:
    return [reason["reason"] for reason in health.reasons()]


def test_a_service_that_is_being_built_is_live_and_not_started_and_not_ready() -> None:
    health = Health(lambda: 0.0)
    assert health.live() == (True, "ok")
    assert not health.started
    assert not health.ready
    assert names(health) == ["starting"]
    assert health.by_reason == {name: name == "starting" for name in REASONS}


def test_with_everything_in_place_it_is_ready() -> None:
    health, works = healthy()
    assert health.reasons() == []
    assert health.ready
    assert health.started
    assert health.live() == (True, "ok")
    assert works.asked == 5.0


CASES: list[tuple[str, Callable[[Health, Works], None], str]] = [
    ("not connected", lambda health, _: setattr(health, "store_connected", False),
     "cassandra_unavailable"),
    ("lost", lambda health, _: setattr(health, "store_error", "no host"), "cassandra_unavailable"),
    ("writes fail", lambda _, works: setattr(works, "failing", "time out"),
     "cassandra_unavailable"),
    ("schema", lambda health, _: setattr(health, "schema_error", "version 1"), "schema_behind"),
    ("share", lambda _, works: setattr(works, "subscribed", False), "not_subscribed"),
    ("slotless", lambda health, _: setattr(health, "slot_wait", lambda: "all taken"), "no_slot"),
    ("apart", lambda health, _: setattr(health, "isolation", lambda: "60 s"), "isolated"),
    ("ahead", lambda health, _: setattr(health, "clock_offset_seconds", 30.1), "clock_skew"),
    ("behind", lambda health, _: setattr(health, "clock_offset_seconds", -30.1), "clock_skew"),
    ("stopping", lambda _, works: setattr(works, "draining", True), "draining"),
    ("pause", lambda health, _: setattr(health, "pause", lambda: "9 s are left"), "paused"),
    ("canary", lambda health, _: setattr(health, "canary_lost", "none for 30 s"), "canary_lost"),
    ("stuck", lambda _, works: setattr(works, "stuck", "nothing in flight"), "wedged"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_one_fault_gives_one_reason_with_its_meaning(
    change: Callable[[Health, Works], None], reason: str
) -> None:
    health, works = healthy()
    change(health, works)
    assert names(health) == [reason]
    assert health.reasons()[0]["meaning"] == REASONS[reason]
    assert not health.ready
    assert health.started


@pytest.mark.parametrize("change", [case[1] for case in CASES if case[2] != "wedged"])
def test_no_dependency_makes_a_restart_look_helpful(
    change: Callable[[Health, Works], None],
) -> None:
    health, works = healthy()
    change(health, works)
    assert health.live() == (True, "ok")


def test_only_a_wedged_pipeline_asks_for_a_restart_and_says_why() -> None:
    health, works = healthy()
    works.stuck = "2 writers have ended"
    assert health.live() == (False, "2 writers have ended")
    assert health.reasons()[0]["detail"] == "2 writers have ended"


def test_a_wedged_adoption_asks_for_a_restart_too() -> None:
    health, _ = healthy()
    adopted = Works(subscribed=False, failing="away", draining=True)
    health.adopted = cast("Pipeline", adopted)
    assert health.live() == (True, "ok")
    assert health.reasons() == [], "readiness has nothing to do with it"
    adopted.stuck = "stuck"
    assert health.live() == (False, "stuck")


def test_nothing_is_known_against_writing_or_it_is_not_done() -> None:
    health, works = healthy()
    assert health.can_write
    works.failing = "away"
    assert not health.can_write
    works.failing = None
    health.store_error = "away"
    assert not health.can_write
    health.store_error, health.schema_error = None, "behind"
    assert not health.can_write
    assert not Health(lambda: 0.0).can_write


def test_all_reasons_are_told_at_once() -> None:
    health, works = healthy()
    works.subscribed = False
    works.draining = True
    works.stuck = "stuck"
    works.failing = "time out"
    health.clock_offset_seconds = 31.0
    assert names(health) == [
        "cassandra_unavailable", "not_subscribed", "clock_skew", "draining", "wedged",
    ]  # fmt: skip


def test_a_schema_that_is_behind_is_not_called_an_outage() -> None:
    health, works = healthy()
    health.schema_error = "version 1, 2 is needed"
    health.store_connected = False
    works.failing = "schema_behind"
    assert names(health) == ["schema_behind"]
    assert health.reasons()[0]["detail"] == "version 1, 2 is needed"


def test_details_say_what_was_seen() -> None:
    health, works = healthy()
    works.subscribed = False
    health.broker_error = lambda: "connection refused"
    health.store_error = "no host"
    health.clock_offset_seconds = -42.04
    details = {reason["reason"]: reason["detail"] for reason in health.reasons()}
    assert details == {
        "cassandra_unavailable": "no host",
        "not_subscribed": "connection refused",
        "clock_skew": "-42.0 s",
    }


@pytest.mark.parametrize("offset", [-MAX_CLOCK_OFFSET_SECONDS, 0.0, MAX_CLOCK_OFFSET_SECONDS])
def test_clocks_at_most_half_a_minute_apart_are_fine(offset: float) -> None:
    health, _ = healthy()
    health.clock_offset_seconds = offset
    assert health.ready


def test_a_pause_explains_that_nothing_is_subscribed_and_that_it_drains() -> None:
    health, works = healthy()
    works.subscribed = False
    works.draining = True
    health.pause = lambda: "9 s are left"
    assert names(health) == ["paused"]
    assert health.reasons()[0]["detail"] == "9 s are left"


def test_the_broker_is_kept_away_from_in_a_pause_and_in_isolation_alone() -> None:
    health, works = healthy()
    works.subscribed = False
    assert not health.away
    health.pause = lambda: "9 s are left"
    assert health.away
    health.pause = lambda: None
    health.isolation = lambda: "for 9 s"
    assert health.away


def test_what_is_wrong_besides_one_reason_can_be_asked_for() -> None:
    health, works = healthy()
    assert health.ready_but_for("canary_lost")
    health.canary_lost = "none for 30 s"
    assert health.ready_but_for("canary_lost")
    assert not health.ready
    works.subscribed = False
    assert not health.ready_but_for("canary_lost")


def test_every_reason_can_be_given() -> None:
    assert {case[2] for case in CASES} | {"starting"} == set(REASONS)
