"""The write path under faults, on a real Cassandra behind a proxy, or one with low limits.

Each test proves by the service's own figures, or the proxy's, that its fault happened.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from backing import Direction
from tests.keyspaces import cells
from tests.oracle import Load
from tests.rig import Rig, rigged
from tests.serving import wait_nothing_held

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing
    from tests.serving import Serve

pytestmark = pytest.mark.timeout(180)

TIMEOUT_SECONDS = 0.5


@pytest.fixture
def rig(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    tmp_path: Path,
) -> Iterator[Rig]:
    """A service that gives up on a request soon."""
    more = {
        "CASSANDRA__REQUEST_TIMEOUT_SECONDS": TIMEOUT_SECONDS,
        "CASSANDRA__BATCH_MAX_BYTES": 1024,
        "MQTT__RECEIVE_MAXIMUM": 500,
    }
    with (
        rigged(broker, cassandra, migrated, unique, tmp_path, **more) as rig,
        rig.oracle,
        rig.service,
    ):
        rig.service.wait_ready()
        yield rig


def update(rig: Rig, device: str, at_us: int) -> None:
    """A few updates of one device, each with its own time."""
    for number in range(5):
        state = {"n": number, f"of-{number}": {"deep": [number]}, "gone": None if number else 1}
        rig.oracle.update(device, {"reported": state}, time_us=at_us + number)
    rig.oracle.wait_taken()


def test_writes_that_timed_out_make_the_same_rows_whether_they_were_applied_or_not(
    rig: Rig, migrated: str
) -> None:
    service, proxy = rig.service, rig.cassandra_proxy
    at_us = rig.oracle.time_us()
    plain, applied, lost = (f"{rig.name}-{name}" for name in ("plain", "applied", "lost"))
    update(rig, plain, at_us)
    rig.oracle.wait_right()

    def rows(device: str) -> list[tuple[Any, ...]]:
        return cells(rig.oracle.session, migrated, device)

    wanted = rows(plain)
    assert len(wanted) == 6

    before = service.metrics()
    proxy.do(lambda one: one.hold(Direction.TO_CLIENT))  # written, and nobody is told
    update(rig, applied, at_us)
    service.wait_until(lambda: len(rows(applied)) == 6, "the rows are there")
    service.wait_until(
        lambda: service.metrics().since(before, "write_retries_total") >= 2, "it timed out twice"
    )
    assert service.metrics().since(before, "messages_acknowledged_total") == 0
    service.wait_reasons({"cassandra_unavailable"})
    proxy.do(lambda one: one.heal())
    service.wait_ready()

    before = service.metrics()
    proxy.do(lambda one: one.hold(Direction.TO_SERVER))  # not written for now, but later
    update(rig, lost, at_us)
    service.wait_until(
        lambda: service.metrics().since(before, "write_retries_total") >= 2, "it timed out twice"
    )
    assert rows(lost) == []
    assert service.metrics().since(before, "messages_acknowledged_total") == 0
    proxy.do(lambda one: one.heal())
    rig.oracle.wait_right()
    service.wait_ready()

    assert rows(applied) == wanted
    assert rows(lost) == wanted
    figures = service.metrics()
    assert figures.total("write_errors_total", kind="lib_request_timed_out") >= 4
    assert figures.total("dead_letters_total") == 0


def test_time_outs_lower_the_limit_and_a_well_cassandra_raises_it_again(rig: Rig) -> None:
    service, proxy = rig.service, rig.cassandra_proxy
    with Load(rig.oracle, rig.name, burst=20):
        service.wait_until(lambda: service.metrics().total("writes_limit") > 4, "it grew at first")
        before = service.metrics()
        proxy.do(lambda one: one.hold())
        service.wait_until(
            lambda: (
                service.metrics().since(before, "writes_limit_changes_total", reason="overload")
                >= 1
            ),
            "it shrank",
        )
        least = service.metrics().total("writes_limit")
        service.wait_reasons({"cassandra_unavailable"})
        assert service.live()
        proxy.do(lambda one: one.heal())
        service.wait_until(
            lambda: service.metrics().total("writes_limit") > least, "it grew again", 60
        )
    rig.oracle.wait_right(120)
    service.wait_ready()


def test_an_update_of_many_slow_parts_is_no_wedge(rig: Rig) -> None:
    service, proxy = rig.service, rig.cassandra_proxy
    delay_seconds, parts = 0.3, 20
    before = service.metrics()
    proxy.do(lambda one: one.delay(delay_seconds, Direction.TO_CLIENT))
    state = {f"leaf-{number}": "x" * 300 for number in range(parts * 3)}
    rig.oracle.update(rig.name, {"reported": state})
    rig.oracle.wait_taken()
    looks = 0
    while service.metrics().since(before, "messages_acknowledged_total") == 0:
        assert service.live()
        looks += 1
    assert looks > 3
    figures = service.metrics()
    # It took longer than the five time-outs that make a wedge of one request.
    assert figures.since(before, "write_seconds_sum") > 5 * TIMEOUT_SECONDS
    proxy.do(lambda one: one.heal())
    rig.oracle.wait_right()


def test_an_outage_longer_than_a_wedge_is_none(rig: Rig) -> None:
    service, proxy = rig.service, rig.cassandra_proxy
    proxy.do(lambda one: one.hold())
    for number in range(50):
        rig.oracle.update(f"{rig.name}-{number}", {"reported": {"a": number}})
    rig.oracle.wait_taken()

    def age() -> float:
        return service.metrics().total("oldest_unacknowledged_seconds")

    service.wait_until(lambda: age() > 8 * TIMEOUT_SECONDS, "it lasts long enough")
    assert service.live()
    assert service.ready_reasons() == {"cassandra_unavailable"}
    assert service.metrics().total("replica_sets_in_doubt") >= 1
    proxy.do(lambda one: one.heal())
    rig.oracle.wait_right()
    service.wait_ready()
    figures = service.metrics()
    assert figures.total("replica_sets_in_doubt") == 0
    assert figures.total("retries_waiting") == 0


def test_more_that_cassandra_refuses_than_receive_maximum_costs_the_neighbours_nothing(
    serve_own: Serve, unique: str
) -> None:
    """That server takes no mutation above 200 KiB and no batch above 20 KiB."""
    receive_maximum = 10
    with serve_own(
        MQTT__RECEIVE_MAXIMUM=receive_maximum,
        SHADOW__MAX_PAYLOAD_BYTES=400_000,
        CASSANDRA__BATCH_MAX_BYTES=1_000_000,
        CASSANDRA__LINGER_SECONDS=0.05,
        DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE=1000,
    ) as (service, oracle):
        before = service.metrics()
        refused = {}
        for number in range(3 * receive_maximum):
            payload = json.dumps({"state": {"reported": {"a": "x" * (250_000 + number)}}}).encode()
            oracle.raw(oracle.topic(f"{unique}-large-{number}"), payload)
            refused[f"{unique}-large-{number}"] = hashlib.sha256(payload).digest()
            # Alone it fits, in a batch with its neighbours it does not.
            oracle.update(f"{unique}-middle-{number}", {"reported": {"a": "y" * 9_000}})
            oracle.update(f"{unique}-{number}", {"reported": {"a": number}})
        oracle.wait_taken(60)
        oracle.wait_right(60)
        wait_nothing_held(service, 60)
        letters = oracle.dead_letters(unique)
        assert {one.device: one.payload_sha256 for one in letters} == refused
        assert len(letters) == len(refused)
        assert {one.reason for one in letters} == {"refused_by_store"}
        figures = service.metrics()
        assert figures.since(before, "batches_split_total") > 0
        assert figures.since(before, "write_errors_total", kind="server_invalid_query") > 0
        assert figures.since(before, "updates_durable_total") == 6 * receive_maximum
        assert figures.since(before, "messages_acknowledged_total") == 9 * receive_maximum
        assert service.ready_reasons() == set()
