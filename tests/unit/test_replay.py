"""Replay: which update a dead letter is now, at which time, and what becomes of its row.

The store is a double that fails and refuses on demand; decoder and merge are the service's own.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowsvc.replay import Judge, Options, Outcome, Replay, Summary, Verdict
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.shadow.update import Update
from shadowsvc.store.deadletter import DeadLetter
from shadowsvc.store.letters import Entry
from tests.faulty_store import AWAY, FaultyStore
from tests.waiting import until

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator, Sequence

    from shadowsvc.errors import StoreUnavailable

NOW_MS = 1_700_000_123_456
NOW_US = NOW_MS * 1000
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
GOOD = b'{"state":{"reported":{"a":1}}}'


def document(**more: Any) -> bytes:
    return json.dumps({"state": {"reported": {"a": 1}}} | more).encode()


def letter(**changes: Any) -> DeadLetter:
    message: dict[str, Any] = {
        "topic": "things/d/shadow/update",
        "payload": GOOD,
        "device": "d",
        "reason": "too_many_leaves",
        "detail": "",
        "received_ms": NOW_MS,
        "client_id": "pod",
        "qos": 1,
        "retain": False,
        "duplicate": False,
        "user_properties": (),
    }
    return DeadLetter.of(**message | changes)


def judge(row: DeadLetter, *, now_us: int = NOW_US, restamp: bool = False, **limits: Any) -> Any:
    made = Judge(TopicParser("things"), Limits(**limits), restamp=restamp)
    return made.judge(row, now_us, NOW_US + 77)


def update_of(row: DeadLetter, **more: Any) -> Update:
    made = judge(row, **more)
    assert isinstance(made, Update), made
    return made


def verdict_of(row: DeadLetter, **more: Any) -> Verdict:
    made = judge(row, **more)
    assert isinstance(made, Verdict), made
    return made


# ---------------------------------------------------------------- the time


def test_the_devices_time_is_kept() -> None:
    stamp = NOW_US - HOUR_US
    assert update_of(letter(payload=document(timestamp=stamp)), now_us=NOW_US).time_us == stamp


def test_the_time_in_the_user_properties_is_kept() -> None:
    row = letter(user_properties=[("timestamp", str(NOW_MS - 5)), ("seq", "7")])
    assert update_of(row).time_us == (NOW_MS - 5) * 1000 + 7


def test_without_a_device_time_it_is_the_receipt_however_often_and_in_whatever_order() -> None:
    made = Judge(TopicParser("things"), Limits())
    rows = [letter(received_ms=NOW_MS - ago) for ago in (0, 5, 5, 90_000, 5)]
    for _ in range(2):
        times = []
        for row in rows:
            update = made.judge(row, NOW_US, 0)
            assert isinstance(update, Update)
            times.append(update.time_us)
        assert times == [row.received_ms * 1000 for row in rows]


@given(ahead_us=st.integers(-20 * DAY_US, 20 * DAY_US), waited_us=st.integers(0, 40 * DAY_US))
def test_a_time_is_written_only_if_it_was_fine_at_the_receipt_and_is_now(
    ahead_us: int, waited_us: int
) -> None:
    row = letter(payload=document(timestamp=NOW_US + ahead_us))
    now_us = NOW_US + waited_us
    made = judge(row, now_us=now_us)
    limits = Limits()
    fine = ahead_us <= limits.max_ahead_us and waited_us - ahead_us <= limits.max_age_us
    if fine:
        assert isinstance(made, Update)
        assert made.time_us == NOW_US + ahead_us
    else:
        assert isinstance(made, Verdict)
        assert made.outcome is Outcome.TIME
        in_future = ahead_us > limits.max_ahead_us
        assert made.reason == ("time_in_future" if in_future else "time_too_old")
        again = judge(row, now_us=now_us, restamp=True)
        assert isinstance(again, Update)
        assert again.time_us == NOW_US + 77


def test_restamp_leaves_a_possible_time_alone() -> None:
    row = letter(payload=document(timestamp=NOW_US - HOUR_US))
    assert update_of(row, restamp=True).time_us == NOW_US - HOUR_US


def test_a_letter_received_by_a_clock_far_ahead_is_not_written_in_the_future() -> None:
    row = letter(received_ms=NOW_MS + 3_600_000)
    made = verdict_of(row)
    assert (made.outcome, made.reason) == (Outcome.TIME, "time_in_future")


def test_where_the_service_replaces_impossible_times_a_replay_does_so_with_the_receipt() -> None:
    row = letter(reason="time_in_future", payload=document(timestamp=NOW_US + DAY_US))
    now_us = NOW_US + 2 * DAY_US
    assert update_of(row, now_us=now_us, on_future="server_time").time_us == NOW_US
    old = letter(payload=document(timestamp=NOW_US - 30 * DAY_US))
    assert update_of(old, now_us=now_us, on_ancient="server_time").time_us == NOW_US
    made = verdict_of(old, now_us=NOW_US + 10 * DAY_US, on_ancient="server_time")
    assert made.reason == "time_too_old"


# ---------------------------------------------------------------- what is no update


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"payload": b"{"}, "not_json"),
        ({"payload": b""}, "empty_payload"),
        ({"payload": b"\xff"}, "not_utf8"),
        ({"topic": "other/d/shadow/update"}, "topic"),
        ({"topic": "things/a b/shadow/update"}, "device_name"),
        ({"payload": document(timestamp="soon")}, "bad_time"),
    ],
)
def test_what_is_still_rejected_has_todays_reason_and_restamp_does_not_help(
    changes: dict[str, Any], reason: str
) -> None:
    for restamp in (False, True):
        made = verdict_of(letter(**changes), restamp=restamp)
        assert (made.outcome, made.reason) == (Outcome.REJECTED, reason)
        assert made.detail


def test_the_limits_are_those_of_now() -> None:
    row = letter(payload=json.dumps({"state": {"reported": dict.fromkeys("abc", 1)}}).encode())
    assert verdict_of(row, max_leaves=2).reason == "too_many_leaves"
    assert len(update_of(row, max_leaves=3).writes) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": document(long="x" * 70_000)},
        {"topic": "things/" + "x" * 2000},
        {"user_properties": [("a", "x" * 9000)]},
    ],
    ids=["payload", "topic", "properties"],
)
def test_a_row_that_holds_a_part_of_the_message_is_never_an_update(changes: Any) -> None:
    for restamp in (False, True):
        made = verdict_of(letter(**changes), restamp=restamp, max_payload_bytes=10**6)
        assert made.outcome is Outcome.TRUNCATED
        assert made.detail


@pytest.mark.parametrize("properties", ["{", "7", "[[1, 2]]", '[["a"]]', '[["a", "b", "c"]]'])
def test_user_properties_that_are_none_make_it_damaged(properties: str) -> None:
    row = letter()
    object.__setattr__(row, "user_properties", properties)
    assert verdict_of(row).outcome is Outcome.DAMAGED


def test_a_payload_that_is_not_the_one_received_is_damaged() -> None:
    row = letter()
    object.__setattr__(row, "payload", GOOD.replace(b"1", b"2"))
    assert verdict_of(row).outcome is Outcome.DAMAGED


def test_a_defect_in_decoding_costs_its_letter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Update:
        raise ZeroDivisionError

    monkeypatch.setattr(Decoder, "decode", broken)
    made = verdict_of(letter(reason="internal_error"))
    assert (made.outcome, made.reason) == (Outcome.REJECTED, "internal_error")


@given(payload=st.binary(max_size=40), topic=st.text(max_size=30), properties=st.text(max_size=20))
def test_no_row_raises_anything(payload: bytes, topic: str, properties: str) -> None:
    row = letter(payload=payload, topic=topic)
    object.__setattr__(row, "user_properties", properties)
    assert isinstance(judge(row), Update | Verdict)


# ---------------------------------------------------------------- the run


class Table:
    """Letters in memory that counts how many are out; not the real one, whose pages are tested
    against Cassandra."""

    def __init__(self, letters: Sequence[DeadLetter]) -> None:
        self.rows = {one.id: one for one in letters}
        self.order = [entry_of(one) for one in letters]
        self.read_so_far = 0
        self.error: StoreUnavailable | None = None

    def scan(self) -> Iterator[Entry]:
        yield from self.order

    def read(self, entries: Sequence[Entry]) -> list[DeadLetter | None]:
        if self.error is not None:
            raise self.error
        self.read_so_far += len(entries)
        return [self.rows.get(entry.id) for entry in entries]

    def delete(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            del self.rows[entry.id]


def entry_of(row: DeadLetter) -> Entry:
    return Entry(
        row.bucket_ms,
        row.shard,
        row.received_ms,
        row.id,
        row.device,
        row.topic,
        row.reason,
        row.detail,
        row.payload_bytes,
        row.received_ms * 1000,
    )


class Run:
    """A replay with its surroundings."""

    def __init__(
        self, letters: Sequence[DeadLetter], *, restamp: bool = False, **more: Any
    ) -> None:
        figures = {
            "concurrency": 4,
            "retry_min_seconds": 0.001,
            "retry_max_seconds": 0.002,
            "patience_seconds": 5.0,
        }
        self.stopping = asyncio.Event()
        self.table = Table(letters)
        self.store = FaultyStore()
        self.told: list[tuple[uuid.UUID, Verdict]] = []
        self.most_ahead = 0
        self.replay = Replay(
            self.table,
            self.store,
            Judge(TopicParser("things"), Limits(), restamp=restamp),
            Options(**{**figures, **more}),
            self._report,
            self.stopping,
        )

    def _report(self, entry: Entry, verdict: Verdict) -> None:
        self.told.append((entry.id, verdict))
        self.most_ahead = max(self.most_ahead, self.table.read_so_far - len(self.told))

    async def run(self) -> Summary:
        return await self.replay.run(self.table.scan(), lambda: NOW_US)

    def letters_written(self) -> list[str]:
        return sorted(write[0] for write in self.store.durable)


def fleet(count: int, **changes: Any) -> list[DeadLetter]:
    return [
        letter(
            topic=f"things/d{number}/shadow/update",
            device=f"d{number}",
            received_ms=NOW_MS - number,
            **changes,
        )
        for number in range(count)
    ]


async def test_what_is_an_update_now_is_written_and_its_row_stays() -> None:
    bad = letter(payload=b"{")
    run = Run([*fleet(9), bad])
    summary = await run.run()
    assert run.letters_written() == [f"d{number}" for number in range(9)]
    assert summary.outcomes == {Outcome.REPLAYED: 9, Outcome.REJECTED: 1}
    assert summary.kept == {(Outcome.REJECTED, "not_json"): 1}
    assert not summary.complete
    assert len(run.table.rows) == 10
    assert run.store.letters == []
    assert [told for told, _ in run.told] == [entry.id for entry in run.table.order]


async def test_purge_deletes_what_is_done_and_nothing_else() -> None:
    bad = letter(payload=b"{")
    empty = letter(payload=b'{"state":{}}')
    run = Run([*fleet(9), bad, empty], purge=True)
    summary = await run.run()
    assert set(run.table.rows) == {bad.id}
    assert summary.deleted == 10
    assert summary.outcomes[Outcome.EMPTY] == 1


async def test_a_dry_run_writes_and_deletes_nothing_and_tells_all() -> None:
    run = Run(fleet(9), purge=True, dry_run=True)
    summary = await run.run()
    assert summary.outcomes == {Outcome.REPLAYED: 9}
    assert summary.complete
    assert (run.store.asked, run.store.probes, len(run.table.rows)) == ([], 0, 9)
    assert len(run.told) == 9


async def test_the_same_cells_are_written_every_time() -> None:
    run, again = Run(fleet(5)), Run(fleet(5))
    await run.run()
    await again.run()
    await again.run()
    assert sorted(run.store.durable * 2) == sorted(again.store.durable)


async def test_restamped_letters_keep_the_order_of_their_receipt() -> None:
    ancient = document(timestamp=NOW_US - 300 * DAY_US)
    rows = [letter(payload=ancient, received_ms=NOW_MS - age) for age in range(11)]
    run = Run(rows, restamp=True)
    await run.run()
    times = {verdict.time_us: place for place, (_, verdict) in enumerate(run.told)}
    assert len(times) == 11
    assert [times[stamp] for stamp in sorted(times, key=lambda one: -(one or 0))] == list(range(11))
    assert max(one or 0 for one in times) == NOW_US


async def test_ten_thousand_letters_are_never_held_together() -> None:
    run = Run(fleet(10_000))
    summary = await run.run()
    assert summary.outcomes == {Outcome.REPLAYED: 10_000}
    assert run.most_ahead <= 2 * 4
    assert run.store.most_in_flight <= 4


async def test_an_outage_is_retried_with_the_same_time() -> None:
    run = Run(fleet(1))
    run.store.error, run.store.errors_left = AWAY, 3
    summary = await run.run()
    assert summary.complete
    assert len(run.store.asked) == 4
    assert all(asked == run.store.asked[0] for asked in run.store.asked)


async def test_an_outage_that_lasts_ends_the_run_and_keeps_the_rows() -> None:
    run = Run(fleet(20), purge=True, patience_seconds=0.01)
    run.store.error = AWAY
    summary = await run.run()
    assert summary.error is AWAY
    assert summary.outcomes == {Outcome.GIVEN_UP: 4}
    assert {verdict.reason for _, verdict in run.told} == {AWAY.kind}
    assert not summary.complete
    assert len(run.table.rows) == 20


async def test_an_outage_of_reading_ends_the_run() -> None:
    run = Run(fleet(20))
    run.table.error = AWAY
    summary = await run.run()
    assert summary.error is AWAY
    assert summary.letters == 0


async def test_a_letter_that_is_gone_meanwhile_is_told_and_is_no_failure() -> None:
    run = Run(fleet(3))
    del run.table.rows[run.table.order[1].id]
    summary = await run.run()
    assert summary.outcomes == {Outcome.REPLAYED: 2, Outcome.GONE: 1}
    assert summary.complete


async def test_what_the_store_refuses_alone_stays_with_its_reason() -> None:
    run = Run(fleet(6), purge=True)
    run.store.refused_devices = {"d3"}
    summary = await run.run()
    assert summary.kept == {(Outcome.REJECTED, "refused_by_store"): 1}
    assert run.store.probes == 1
    assert [row.device for row in run.table.rows.values()] == ["d3"]
    assert len(run.letters_written()) == 5


async def test_a_store_that_refuses_everything_is_an_outage() -> None:
    run = Run(fleet(2), patience_seconds=0.01)
    run.store.refused_devices = {"d0", "d1"}
    run.store.probe_error = AWAY
    summary = await run.run()
    assert summary.error is AWAY
    assert summary.outcomes == {Outcome.GIVEN_UP: 2}
    assert run.store.probes >= 2


async def test_a_letter_above_the_size_of_a_request_is_written_in_parts() -> None:
    many = {f"k{number}": "x" * 100 for number in range(100)}
    payload = json.dumps({"state": {"reported": many}}).encode()
    run = Run([letter(payload=payload)])
    summary = await run.run()
    assert summary.complete
    assert run.store.parts == 1
    assert len(run.store.durable) == 100


async def test_stop_finishes_what_is_under_way_and_begins_nothing_more() -> None:
    run = Run(fleet(50))
    run.store.open.clear()
    running = asyncio.create_task(run.run())
    async with asyncio.timeout(10):
        await until(lambda: run.store.in_flight >= 4)
        run.stopping.set()
        run.store.open.set()
        summary = await running
    assert summary.interrupted
    assert not summary.complete
    assert summary.outcomes == {Outcome.REPLAYED: 4}
    assert len(run.store.durable) == 4


async def test_stop_ends_the_waiting_for_an_outage() -> None:
    run = Run(fleet(4), retry_min_seconds=3600, retry_max_seconds=3600, patience_seconds=7200)
    run.store.error = AWAY
    running = asyncio.create_task(run.run())
    async with asyncio.timeout(20):
        await until(lambda: run.store.asked and not run.store.in_flight, 20)
        run.stopping.set()
        summary = await running
    assert (summary.interrupted, summary.error) == (True, None)
    assert summary.outcomes == {Outcome.GIVEN_UP: 4}
