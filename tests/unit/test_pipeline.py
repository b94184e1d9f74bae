"""What the pipeline promises between PUBLISH and PUBACK.

The store is a double that hangs, fails and refuses on demand: a real Cassandra does none of that
at a chosen statement. Everything else is the real thing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mqtt5
import orjson
import pytest
import structlog.testing
from blockbuster import blockbuster_ctx

import shadowsvc.pipeline as pipeline_module
from shadowsvc.backoff import wait_seconds
from tests.faulty_store import AWAY, REFUSED, writes_of
from tests.line import line, turns
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shadowsvc.errors import StoreError
    from shadowsvc.shadow.update import Mutations, Update


@pytest.fixture(autouse=True)
def _loop_never_blocked() -> Iterator[None]:
    with blockbuster_ctx(scanned_modules="shadowsvc"):
        yield


# -------------------------------------------------------------------- writing and acknowledging


async def test_an_ack_leaves_only_after_the_write_is_confirmed() -> None:
    async with line() as made:
        made.store.open.clear()
        made.deliver("a", "b")
        await until(lambda: made.store.in_flight)
        await turns()
        assert made.sent == []
        made.store.open.set()
        await made.settle()
        assert made.acks == [1, 2]
        assert {write[0] for write in made.store.durable} == {"a", "b"}


async def test_acks_leave_in_the_order_of_the_publishes() -> None:
    async with line(max_partitions=1) as made:
        made.store.refused_devices = {"first"}
        made.store.letter_error = AWAY
        made.deliver("first", "b", "c", "d")
        await until(lambda: len(made.store.durable) == 3)
        await turns()
        assert made.sent == []
        made.store.letter_error = None
        await made.settle()
        assert made.acks == [1, 2, 3, 4]


async def test_acks_of_batches_that_end_together_leave_in_one_write() -> None:
    async with line(max_partitions=1) as made:
        made.store.open.clear()
        made.deliver(*"abcdefgh")
        await until(lambda: made.store.in_flight == 8)
        made.store.open.set()
        await made.settle()
        assert made.acks == [*range(1, 9)]
        assert len(made.sent) == 1


async def test_updates_of_one_device_are_written_once_and_all_acknowledged() -> None:
    async with line(concurrency=1) as made:
        made.deliver("same", "same", "same", "other")
        await made.settle()
        assert made.acks == [1, 2, 3, 4]
        assert len(made.store.durable) == 2
        assert made.metrics.updates_merged == 2
        assert made.metrics.updates_durable == 4
        last = {write[0]: write[5] for write in made.store.durable}
        assert last == {"same": b"3", "other": b"4"}


async def test_a_full_batch_is_written_without_waiting_and_the_rest_after_the_linger() -> None:
    async with line(max_partitions=3, linger_seconds=0.2) as made:
        made.deliver(*"abcd")
        await until(lambda: made.acks == [1, 2, 3], seconds=0.15)
        await until(lambda: made.acks == [1, 2, 3, 4])


async def test_devices_of_different_replica_sets_are_written_apart() -> None:
    async with line(group=lambda device: ord(device[0])) as made:
        made.deliver("a1", "b1", "a2", "b2")
        await made.settle()
        assert [{write[0] for write in asked} for asked in made.store.asked] == [
            {"a1", "a2"},
            {"b1", "b2"},
        ]


async def test_no_more_requests_are_under_way_than_allowed() -> None:
    async with line(max_partitions=1, concurrency=4) as made:
        made.store.open.clear()
        made.deliver(*[f"d{number}" for number in range(100)])
        await turns()
        assert made.store.in_flight == made.pipeline.in_flight == 4
        made.store.open.set()
        await made.settle()
        assert made.acks == [*range(1, 101)]
        assert made.store.most_in_flight == 4


async def test_an_update_too_large_for_one_request_is_acknowledged_after_all_its_parts() -> None:
    async with line(max_request_bytes=600) as made:
        leaves = {f"leaf{number}": "x" * 20 for number in range(50)}
        made.deliver("big", payload=orjson.dumps({"state": {"reported": leaves}}))
        made.deliver("small", first_id=2)
        await made.settle()
        assert made.store.parts == 1
        assert len(made.store.durable) == 51
        assert made.acks == [1, 2]


async def test_an_update_that_changes_nothing_is_acknowledged_without_a_write() -> None:
    async with line() as made:
        made.deliver("a", payload=b'{"state": {"reported": {}}}')
        await made.settle()
        assert made.acks == [1]
        assert made.store.asked == []
        assert made.metrics.empty == 1


async def test_qos_0_is_written_and_never_acknowledged() -> None:
    async with line() as made:
        made.deliver("a", first_id=None)
        await made.settle()
        assert len(made.store.durable) == 1
        assert made.sent == []
        assert made.ledger.done_without_ack == 1


async def test_duplicates_are_counted_written_again_and_acknowledged_each() -> None:
    async with line() as made:
        made.deliver("a", first_id=7)
        await made.settle()
        made.deliver("a", first_id=7, duplicate=True)
        await made.settle()
        assert made.acks == [7, 7]
        assert made.metrics.messages == [0, 0, 1, 1]


# -------------------------------------------------------------------- outages


async def test_an_outage_is_retried_with_the_same_statements_and_times() -> None:
    async with line() as made:
        made.store.error = AWAY
        made.store.errors_left = 6
        made.deliver("a", "b")
        await made.settle()
        assert len(made.store.asked) == 7
        assert all(asked == made.store.asked[0] for asked in made.store.asked)
        assert made.acks == [1, 2]
        assert made.metrics.write_retries == Counter({AWAY.kind: 6})
        assert made.metrics.rejected == Counter()


async def test_an_outage_is_reported_while_it_lasts_and_once() -> None:
    with structlog.testing.capture_logs() as logs:
        async with line() as made:
            made.store.error = AWAY
            made.deliver("a")
            await until(lambda: made.pipeline.failing)
            assert made.pipeline.failing == "server_write_timeout: no answer"
            await turns()
            assert made.store.letters == []
            made.store.error = None
            await made.settle()
            assert made.pipeline.failing is None
    events = [entry["event"] for entry in logs]
    assert events.count("writes fail and are retried") == 1
    assert events.count("writes succeed again") == 1


async def test_waits_between_attempts_double_up_to_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0

    monkeypatch.setattr("shadowsvc.writers.wait_seconds", partial(wait_seconds, draw=uniform))
    async with line(retry_min_seconds=0.25, retry_max_seconds=1.5) as made:
        made.store.error = AWAY
        made.store.errors_left = 5
        made.deliver("a")
        await made.settle()
    assert [high for _, high in bounds] == [0.25, 0.5, 1, 1.5, 1.5]
    assert {low for low, _ in bounds} == {0.125}


async def test_messages_keep_coming_in_while_the_store_is_away() -> None:
    async with line(max_partitions=1, concurrency=2) as made:
        made.store.error = AWAY
        for number in range(1, 101):
            made.deliver(f"d{number}", first_id=number)
        await turns()
        assert made.ledger.held == 100
        assert made.pipeline.wedged(time.monotonic()) is None
        made.store.error = None
        await made.settle()
        assert made.acks == [*range(1, 101)]


# -------------------------------------------------------------------- refusals and dead letters


@pytest.mark.parametrize("position", range(10))
async def test_the_culprit_alone_becomes_a_dead_letter(position: int) -> None:
    async with line() as made:
        devices = [f"d{number}" for number in range(10)]
        made.store.refused_devices = {devices[position]}
        made.deliver(*devices)
        await made.settle()
        assert [letter.device for letter in made.store.letters] == [devices[position]]
        assert made.store.letters[0].reason == "refused_by_store"
        assert "I do not like it" in made.store.letters[0].detail
        assert sorted(write[0] for write in made.store.durable) == sorted(
            set(devices) - made.store.refused_devices
        )
        assert made.acks == [*range(1, 11)]
        assert made.store.probes == 1


async def test_of_several_updates_of_one_device_the_culprit_alone_is_refused() -> None:
    async with line() as made:

        async def picky(mutations: Iterable[Mutations | Update]) -> None:
            asked = [write for mutation in mutations for write in writes_of(mutation)]
            if any(write[4] == "/bad" for write in asked):
                raise REFUSED
            made.store.durable += asked

        made.store.write = picky  # type: ignore[method-assign]
        pipeline = made.pipeline
        pipeline.begin_chunk()
        for packet_id, leaf in enumerate(["good", "bad", "fine"], 1):
            payload = orjson.dumps({"state": {"reported": {leaf: 1}}})
            packet = mqtt5.PublishPacket(
                "things/d/shadow/update",
                payload,
                qos=mqtt5.QoS.AT_LEAST_ONCE,
                packet_id=packet_id,
            )
            pipeline.publish(packet.topic, packet)
        pipeline.end_chunk()
        await made.settle()
        assert {write[4] for write in made.store.durable} == {"/good", "/fine"}
        assert [letter.reason for letter in made.store.letters] == ["refused_by_store"]
        assert b"bad" in made.store.letters[0].payload
        assert made.acks == [1, 2, 3]


@pytest.mark.parametrize("probe_error", [AWAY, REFUSED])
async def test_a_store_that_refuses_everything_is_an_outage(probe_error: StoreError) -> None:
    async with line() as made:
        made.store.refused_devices = {"a"}
        made.store.probe_error = probe_error
        made.deliver("a")
        await until(lambda: made.store.probes >= 5)
        assert made.store.letters == []
        assert made.sent == []
        assert made.pipeline.failing is not None
        made.store.refused_devices = set()
        made.store.probe_error = None
        await made.settle()
        assert made.acks == [1]


async def test_an_update_refused_in_an_outage_is_written_when_the_store_works_again() -> None:
    async with line() as made:
        made.store.error = REFUSED
        made.store.errors_left = 5  # the batch, its halves and probes among them
        made.deliver("a", "b")
        await made.settle()
        assert {write[0] for write in made.store.durable} == {"a", "b"}
        assert made.store.letters == []
        assert made.acks == [1, 2]


@pytest.mark.parametrize("error", [AWAY, REFUSED])
async def test_a_dead_letter_that_cannot_be_written_holds_its_ack(error: StoreError) -> None:
    async with line() as made:
        made.store.letter_error = error
        made.deliver("a", payload=b"no json")
        await until(lambda: made.metrics.write_retries[error.kind] >= 3)
        assert made.sent == []
        assert made.pipeline.failing is not None
        made.store.letter_error = None
        await made.settle()
        assert made.acks == [1]
        assert made.metrics.dead_letters == Counter({"not_json": 1})


async def test_a_bad_document_costs_its_neighbours_nothing() -> None:
    async with line() as made:
        made.deliver("a")
        made.deliver("b", first_id=2, payload=b"\xff\xfe")
        made.deliver("c", first_id=3)
        await made.settle()
        assert made.acks == [1, 2, 3]
        assert sorted(write[0] for write in made.store.durable) == ["a", "c"]
        (letter,) = made.store.letters
        assert (letter.device, letter.payload, letter.qos) == ("b", b"\xff\xfe", 1)
        assert letter.client_id == "client"
        assert abs(letter.received_ms / 1000 - time.time()) < 60


async def test_a_defect_in_decoding_becomes_a_dead_letter_too() -> None:
    def defect(*_: Any) -> Update:
        raise ZeroDivisionError

    with structlog.testing.capture_logs() as logs:
        async with line() as made:
            made.pipeline.decoder = SimpleNamespace(  # type: ignore[assignment]
                decode=defect, device_of=made.pipeline.decoder.device_of
            )
            made.deliver("a")
            await made.settle()
        assert logs[-1]["event"] == "decoding failed"
    assert made.store.letters[0].reason == "internal_error"
    assert made.acks == [1]


async def test_a_device_that_floods_is_acknowledged_and_counted() -> None:
    async with line(max_dead_letters_per_minute=3) as made:
        made.deliver(*["noisy"] * 10, payload=b"rubbish")
        made.deliver("quiet", first_id=11, payload=b"rubbish")
        await made.settle()
        assert made.acks == [*range(1, 12)]
        assert Counter(letter.device for letter in made.store.letters) == {"noisy": 3, "quiet": 1}
        assert made.metrics.dead_letters_suppressed == 7
        assert made.metrics.rejected == Counter({"not_json": 11})


# -------------------------------------------------------------------- reconnects


async def test_a_resumed_session_drops_what_the_broker_repeats_and_the_driver_has_not() -> None:
    async with line(max_partitions=1, concurrency=2) as made:
        made.store.open.clear()
        made.deliver(*"abcdef")
        await until(lambda: made.store.in_flight == 2)
        await made.connect(session_present=True)
        assert made.ledger.abandoned == 4
        assert made.ledger.held == 2
        made.deliver(*"abcdef", duplicate=True)
        made.store.open.set()
        await made.settle()
        assert made.acks == [1, 2, 3, 4, 5, 6]
        assert made.ledger.stale == 2


async def test_in_an_outage_a_resumed_session_drops_what_waits_for_its_next_attempt_too() -> None:
    async with line(max_partitions=1, concurrency=2) as made:
        made.store.error = AWAY
        made.deliver(*"abcdef")
        await until(lambda: made.pipeline.failing)
        await made.connect(session_present=True)
        assert made.ledger.held == 0
        await turns()
        asked = len(made.store.asked)
        await turns()
        assert len(made.store.asked) == asked
        made.deliver(*"abcdef", duplicate=True)
        made.store.error = None
        await made.settle()
        assert made.acks == [1, 2, 3, 4, 5, 6]


async def test_dead_letters_of_a_resumed_session_are_dropped_too() -> None:
    async with line(concurrency=1) as made:
        made.store.letter_error = AWAY
        made.deliver("a", "b", "c", payload=b"rubbish")
        await until(lambda: made.pipeline.failing)
        await made.connect(session_present=True)
        assert made.ledger.held == 0
        made.store.letter_error = None
        made.deliver("a", "b", "c", payload=b"rubbish", duplicate=True)
        await made.settle()
        assert made.acks == [1, 2, 3]


async def test_a_lost_session_makes_what_is_held_the_last_copy() -> None:
    async with line(receive_maximum=10, max_partitions=1, concurrency=2) as made:
        made.store.error = AWAY
        made.deliver(*"abcdef", first_id=1)
        made.deliver("bad", first_id=7, payload=b"rubbish")
        await until(lambda: made.pipeline.failing)
        await made.connect(session_present=False)
        assert made.ledger.last_copies == 7
        assert await made.connect(session_present=True) == 3
        assert made.ledger.last_copies == 7
        assert made.ledger.abandoned == 0
        made.store.error = None
        await made.settle()
        assert sorted(write[0] for write in made.store.durable) == [*"abcdef"]
        assert len(made.store.letters) == 1
        assert made.sent == []
        assert made.ledger.last_copies == 0
        assert made.ledger.done_without_ack == 7


async def test_what_came_by_another_client_id_is_kept_whatever_the_new_session_is() -> None:
    """Only the former slot's session is asked to repeat it, and that may be gone."""
    async with line(receive_maximum=10, max_partitions=1, concurrency=2) as made:
        made.pipeline.identify("g-0")
        await made.connect(session_present=False)
        made.store.error = AWAY
        made.deliver(*"abc")
        await until(lambda: made.pipeline.failing)
        made.pipeline.identify("g-1")
        await made.connect(session_present=True)
        assert (made.ledger.abandoned, made.ledger.last_copies) == (0, 3)
        made.deliver("d")
        await made.connect(session_present=True)
        assert (made.ledger.abandoned, made.ledger.last_copies) == (1, 3), "by the same, repeated"
        made.store.error = None
        await made.settle()
        assert sorted(write[0] for write in made.store.durable) == [*"abc"]


async def test_a_client_id_that_never_connected_does_not_hide_whose_deliveries_are_held() -> None:
    async with line(receive_maximum=10) as made:
        made.pipeline.identify("g-0")
        await made.connect(session_present=False)
        made.store.error = AWAY
        made.deliver("a")
        await until(lambda: made.pipeline.failing)
        made.pipeline.identify("g-1")
        await made.pipeline.begin_connection()
        made.pipeline.disconnected("connect")
        made.pipeline.identify("g-1")
        await made.connect(session_present=True)
        assert (made.ledger.abandoned, made.ledger.last_copies) == (0, 1)
        made.store.error = None
        await made.settle()


async def test_a_session_that_an_unanswered_connect_may_have_made_is_not_trusted() -> None:
    """The broker lost the session, answered `session_present=0`, and the answer was lost too."""
    async with line(receive_maximum=10, max_partitions=1, concurrency=2) as made:
        await made.connect(session_present=False)
        made.store.error = AWAY
        made.deliver(*"abc")
        await until(lambda: made.pipeline.failing)
        made.pipeline.disconnected("closed_by_broker")
        await made.pipeline.begin_connection()
        made.pipeline.disconnected("network")  # CONNECT went out, CONNACK never came
        await made.connect(session_present=True)
        assert (made.ledger.abandoned, made.ledger.last_copies) == (0, 3)
        made.deliver("d")
        await made.connect(session_present=True)
        assert (made.ledger.abandoned, made.ledger.last_copies) == (1, 3), "answered: repeated"
        made.store.error = None
        await made.settle()
        assert sorted(write[0] for write in made.store.durable) == [*"abc"]


@pytest.mark.parametrize("reason", ["connect", "connect_timeout", "tls", "connack_not_authorized"])
async def test_an_attempt_that_made_no_session_leaves_no_doubt(reason: str) -> None:
    async with line(receive_maximum=10, max_partitions=1, concurrency=2) as made:
        await made.connect(session_present=False)
        made.store.error = AWAY
        made.deliver(*"abc")
        await until(lambda: made.pipeline.failing)
        made.pipeline.disconnected("network")
        await made.pipeline.begin_connection()
        made.pipeline.disconnected(reason)
        await made.connect(session_present=True)
        assert (made.ledger.abandoned, made.ledger.last_copies) == (3, 0)
        made.store.error = None
        await made.settle()


async def test_dead_letters_name_the_present_client_id() -> None:
    async with line() as made:
        for number in range(2):
            made.pipeline.identify(f"g-{number}")
            made.deliver("a", first_id=number + 1, payload=b"rubbish")
            await made.settle()
        assert [letter.client_id for letter in made.store.letters] == ["g-0", "g-1"]


async def test_failing_counts_from_the_first_failure_after_the_last_success() -> None:
    async with line() as made:
        assert made.pipeline.failing_since is None
        made.store.error = AWAY
        made.deliver("a")
        await until(lambda: made.pipeline.failing)
        since = made.pipeline.failing_since
        assert since is not None
        asked = len(made.store.asked)
        await until(lambda: len(made.store.asked) > asked + 2)
        assert made.pipeline.failing_since == since
        made.store.error = None
        await made.settle()
        assert made.pipeline.failing_since is None
        made.store.error = AWAY
        made.deliver("b", first_id=2)
        await until(lambda: made.pipeline.failing)
        assert made.pipeline.failing_since is not None
        assert made.pipeline.failing_since > since
        made.store.error = None
        await made.settle()


async def test_while_last_copies_take_every_place_nothing_is_connected_for() -> None:
    async with line(receive_maximum=4, max_partitions=1) as made:
        made.store.error = AWAY
        made.deliver(*"abcd")
        await until(lambda: made.pipeline.failing)
        await made.connect(session_present=False)
        made.pipeline.disconnected("network")
        waiting = asyncio.create_task(made.pipeline.begin_connection())
        await turns()
        assert not waiting.done()
        made.store.error = None
        assert 1 <= await waiting <= 4
        await made.settle()


async def test_acks_that_found_no_connection_are_stale_and_not_sent() -> None:
    async with line() as made:
        made.store.open.clear()
        made.deliver("a", "b")
        await until(lambda: made.store.in_flight)
        made.pipeline.disconnected("network")
        made.store.open.set()
        await made.settle()
        assert made.ledger.acknowledged == 0
        assert made.ledger.stale == 2


async def test_an_ack_of_an_old_connection_never_leaves_on_the_new_one() -> None:
    async with line() as made:
        made.store.open.clear()
        made.deliver("old", first_id=1)
        await until(lambda: made.store.in_flight)
        await made.connect(session_present=True)
        made.deliver("new", first_id=1)
        made.store.open.set()
        await made.settle()
        assert made.acks == [1]
        assert made.ledger.stale == 1


async def test_what_is_at_the_driver_is_waited_for_before_connecting_again() -> None:
    async with line() as made:
        made.store.open.clear()
        made.deliver("a")
        await until(lambda: made.store.in_flight)
        connecting = asyncio.create_task(made.connect(session_present=False))
        await turns(5)
        assert not connecting.done()
        made.store.open.set()
        await connecting
        assert made.ledger.last_copies == 0


@pytest.mark.parametrize("present", [True, False])
async def test_no_number_of_reconnects_makes_more_be_held(
    monkeypatch: pytest.MonkeyPatch,
    present: bool,  # noqa: FBT001
) -> None:
    monkeypatch.setattr(pipeline_module, "_CONNECT_PATIENCE_SECONDS", 0.01)
    async with line(receive_maximum=20, max_partitions=2, concurrency=3) as made:
        left: list[str] = []
        made.pipeline.leave = left.append
        made.store.open.clear()
        most = 0
        for _ in range(6):
            made.pipeline.disconnected("network")
            try:
                async with asyncio.timeout(0.1):
                    announced = await made.pipeline.begin_connection()
            except TimeoutError:
                continue
            made.pipeline.connected(session_present=present)
            if left:
                left.clear()
                continue
            made.pipeline.subscribed_now()
            made.deliver(*[f"d{number}" for number in range(announced)], duplicate=present)
            await turns(5)
            most = max(most, made.ledger.held)
        # Of a resumed session the driver has at most what its requests hold.
        assert most <= (20 + 3 * 2 if present else 20)
        made.store.open.set()
        await made.settle()


# -------------------------------------------------------------------- bounds


async def test_qos_0_over_the_budget_of_messages_is_dropped_and_counted() -> None:
    async with line(receive_maximum=5) as made:
        made.store.open.clear()
        made.deliver(*"abc")
        made.deliver(*"defgh", first_id=None)
        assert made.ledger.held == 5
        assert made.metrics.qos0_dropped == 3
        made.deliver("i", first_id=4)
        assert made.ledger.held == 6
        made.store.open.set()
        await made.settle()
        assert made.acks == [1, 2, 3, 4]
        assert made.ledger.done_without_ack == 2


async def test_qos_0_over_the_budget_of_bytes_is_dropped_and_counted() -> None:
    async with line(max_held_bytes=2000) as made:
        made.store.open.clear()
        payload = orjson.dumps({"state": {"reported": {"x": "y" * 900}}})
        made.deliver(*"abcd", first_id=None, payload=payload)
        assert made.metrics.qos0_dropped == 2
        assert made.ledger.held_bytes <= 2000
        made.store.open.set()
        await made.settle()


async def test_more_than_the_receive_maximum_is_noticed_until_enough_is_acknowledged() -> None:
    async with line(receive_maximum=3) as made:
        made.store.open.clear()
        made.deliver(*"abc")
        assert not made.pipeline.over_receive_maximum()
        made.deliver("d", first_id=4)
        assert made.pipeline.over_receive_maximum()
        made.store.open.set()
        await made.settle()
        assert not made.pipeline.over_receive_maximum()


# -------------------------------------------------------------------- shutdown and health


async def test_draining_writes_and_acknowledges_what_is_held_and_takes_nothing_more() -> None:
    async with line(linger_seconds=1) as made:
        made.deliver("a", "b")
        made.deliver("bad", first_id=3, payload=b"rubbish")
        draining = asyncio.create_task(made.pipeline.drain(5))
        await asyncio.sleep(0)
        made.deliver("late", first_id=4)
        assert await draining
        assert made.acks == [1, 2, 3]
        assert made.metrics.discarded_draining == 1
        assert made.ledger.received == 3


async def test_draining_gives_up_when_the_store_is_away_and_acknowledges_nothing() -> None:
    async with line() as made:
        made.store.error = AWAY
        made.deliver("a")
        assert not await made.pipeline.drain(0.05)
        assert made.sent == []
        assert made.ledger.held == 1


async def test_a_request_without_an_answer_is_a_wedge_and_an_outage_is_not() -> None:
    async with line(request_timeout_seconds=2) as made:
        made.store.open.clear()
        made.deliver("a")
        await until(lambda: made.store.in_flight)
        assert made.pipeline.wedged(time.monotonic() + 9) is None
        reason = made.pipeline.wedged(time.monotonic() + 11)
        assert reason is not None
        assert "no answer for" in reason
        made.store.error = AWAY
        made.store.open.set()
        await until(lambda: made.pipeline.writers._due)
        assert made.pipeline.wedged(time.monotonic() + 1000) is None


async def test_work_that_nobody_takes_up_is_a_wedge_once_it_has_lasted() -> None:
    async with line() as made:
        now = time.monotonic()
        assert made.pipeline.wedged(now) is None
        made.pipeline.writers._idle.clear()  # as if the writers' wake-up had got lost
        made.deliver("a")
        made.pipeline.batcher.seal()
        # Seen for the first time, however long ago the last look was: it may just have come.
        assert made.pipeline.wedged(now + 100) is None
        assert made.pipeline.wedged(now + 104) is None
        assert made.pipeline.wedged(now + 106) == "work is planned and nothing is in flight"


async def test_a_look_at_every_moment_of_busy_work_sees_no_wedge() -> None:
    async with line(max_partitions=1, concurrency=2) as made:
        for number in range(1, 51):
            made.deliver(f"d{number}", first_id=number)
            # Each look comes long after the one before, when a batch has just come.
            assert made.pipeline.wedged(time.monotonic() + 10 * number) is None
            await made.settle()


async def test_a_writer_that_dies_is_reported() -> None:
    with structlog.testing.capture_logs() as logs:
        async with line() as made:
            made.store.error = ZeroDivisionError("a defect")
            made.deliver("a")
            await until(lambda: made.pipeline.wedged(time.monotonic()))
            assert made.pipeline.wedged(time.monotonic()) == "1 writers have ended"
            assert made.sent == []
    assert [entry["event"] for entry in logs if entry["log_level"] == "critical"] == [
        "a writer ended"
    ]


async def test_closing_stops_the_writers_and_acknowledges_nothing_unwritten() -> None:
    async with line() as made:
        made.store.open.clear()
        made.deliver("a")
        await until(lambda: made.store.in_flight)
        await made.pipeline.close()
        assert made.sent == []
        assert made.store.in_flight == 0


# -------------------------------------------------------------------- everything at once


async def test_through_faults_and_reconnects_what_the_broker_forgot_is_durable() -> None:
    async with line(receive_maximum=40, max_partitions=3, concurrency=3) as made:
        store = made.store
        in_flight: dict[int, str] = {}  # what the broker holds, by packet id
        devices = [f"d{number}" for number in range(400)]
        fresh = iter(devices)
        forgotten: list[str] = []
        handled = 0

        def forget() -> None:
            nonlocal handled
            forgotten.extend(in_flight.pop(packet_id) for packet_id in made.acks[handled:])
            handled = len(made.acks)
            assert set(forgotten) <= {write[0] for write in store.durable}

        for step in range(80):
            store.error = (None, AWAY, None, REFUSED, None)[step % 5]
            for packet_id in [free for free in range(1, 41) if free not in in_flight][:11]:
                device = next(fresh, None)
                if device is not None:
                    in_flight[packet_id] = device
                    made.deliver(device, first_id=packet_id)
            await turns(3)
            forget()
            if step % 7 == 6:
                await made.connect(session_present=True)
                forget()
                for packet_id, device in in_flight.items():
                    made.deliver(device, first_id=packet_id, duplicate=True)
            made.check_accounts()
        store.error = None
        await made.settle()
        forget()
        assert sorted(forgotten) == sorted(devices)
        assert {write[0] for write in store.durable} == set(devices)
        assert store.letters == []
        assert made.ledger.abandoned
