"""Broker away, Cassandra away: the service stays, says why it isn't ready, and loses nothing.

Times are scaled: a keep-alive of two seconds, retries and reconnects after half a second at most.
Each test proves by the service's own figures that its fault happened.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from backing import Direction, Mosquitto
from tests.oracle import Load, Oracle
from tests.proxied import away
from tests.rig import RECEIVE_MAXIMUM, SCALED, Rig, rigged
from tests.service import ServiceProcess, variables
from tests.serving import wait_nothing_held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import backing
    from backing import FaultProxy
    from tests.serving import Serve

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def rig(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    tmp_path: Path,
) -> Iterator[Rig]:
    """A rig that is ready."""
    with (
        rigged(broker, cassandra, migrated, unique, tmp_path) as rig,
        rig.oracle,
        rig.service,
    ):
        rig.service.wait_ready()
        yield rig


@pytest.fixture
def own_broker() -> Iterator[Mosquitto]:
    """A broker that a test starts, stops and kills; it keeps sessions in a file."""
    broker = Mosquitto(persistent=True)
    yield broker
    broker.close()


# ------------------------------------------------------------------ the broker


def test_a_broker_that_is_away_at_the_start_is_waited_for(
    own_broker: Mosquitto,
    cassandra: backing.Database,
    migrated: str,
    cql: Any,
    unique: str,
    tmp_path: Path,
) -> None:
    settings = variables(own_broker, cassandra, migrated, unique, **SCALED)
    with ServiceProcess(settings, tmp_path / "service.log") as service:
        service.wait_reasons({"not_subscribed"})
        service.wait_until(
            lambda: service.metrics().total("disconnects_total", reason="connect") >= 3,
            "it tried three times",
        )
        assert service.live()
        assert service.get("/startupz").status == 200
        assert service.ready_reasons() == {"not_subscribed"}
        own_broker.start()
        service.wait_ready()
        with Oracle(own_broker, cql, migrated, unique) as oracle:
            oracle.update(unique, {"reported": {"a": 1}})
            oracle.wait_taken()
            oracle.wait_right()


def test_a_broker_that_stops_and_starts_again_costs_nothing(
    serve: Serve, own_broker: Mosquitto, unique: str
) -> None:
    own_broker.start()
    with serve(own_broker, **SCALED) as (service, oracle):
        before = service.metrics()
        with Load(oracle, unique):
            service.wait_until(
                lambda: service.metrics().since(before, "updates_durable_total") > 200, "it works"
            )
            own_broker.stop()
            service.wait_reasons({"not_subscribed"})
            service.wait_until(
                lambda: service.metrics().since(before, "disconnects_total") >= 4,
                "it lost the broker and tried to find it",
            )
            assert service.live()
            own_broker.start()
            service.wait_ready()
            again = service.metrics()
            service.wait_until(
                lambda: service.metrics().since(again, "updates_durable_total") > 200,
                "it works again",
            )
        oracle.wait_right()
        assert service.metrics().since(before, "sessions_total", state="resumed") == 1
        assert service.metrics().since(before, "sessions_total", state="new") == 0


def test_what_a_killed_broker_had_saved_arrives_after_its_restart(
    serve: Serve, own_broker: Mosquitto, unique: str
) -> None:
    own_broker.start()
    with serve(own_broker, **SCALED) as (service, oracle):
        service.pause()  # so that the broker has a queue beyond the Receive Maximum
        for number in range(10 * RECEIVE_MAXIMUM):
            oracle.update(f"{unique}-{number}", {"reported": {"a": number}})
        oracle.wait_taken()
        own_broker.save()
        own_broker.kill()
        own_broker.start()
        service.resume()
        service.wait_until(
            lambda: service.metrics().total("sessions_total", state="resumed") == 1,
            "the session is resumed",
        )
        oracle.wait_right()
        service.wait_ready()
        figures = service.metrics()
        assert figures.total("messages_acknowledged_total") >= 10 * RECEIVE_MAXIMUM


def test_a_half_open_connection_to_the_broker_is_found_by_keep_alive(rig: Rig) -> None:
    rig.publish(20)
    assert rig.broker_proxy.do(lambda one: one.connections) == 1
    rig.broker_proxy.do(lambda one: one.half_open())
    rig.publish(20)
    rig.wait_total(1, "disconnects_total", reason="keep_alive")
    assert rig.service.live()
    assert rig.service.ready_reasons() == {"not_subscribed"}
    assert rig.broker_proxy.do(lambda one: one.counts.silenced) >= 1
    rig.broker_proxy.do(lambda one: one.heal())
    rig.publish(20)
    rig.service.wait_ready()
    rig.oracle.wait_right()
    assert rig.service.metrics().total("sessions_total", state="resumed") == 1


def test_connections_that_break_in_the_middle_of_packets_cost_nothing(rig: Rig) -> None:
    draw = random.Random(7)
    breaks = 12
    with Load(rig.oracle, rig.name):
        for number in range(1, breaks + 1):
            way = draw.choice([Direction.TO_CLIENT, Direction.TO_SERVER])
            after = draw.randrange(2000)
            rig.broker_proxy.do(lambda one, way=way, after=after: one.cut_after(after, way))
            rig.wait_total(number + 1, "sessions_total")
    rig.oracle.wait_right()
    rig.service.wait_ready()
    assert rig.broker_proxy.do(lambda one: one.counts.cut) == breaks
    figures = rig.service.metrics()
    assert figures.total("sessions_total", state="new") == 1
    assert figures.total("sessions_total", state="resumed") >= breaks
    assert figures.total("messages_received_total", dup="1") > 0


# ------------------------------------------------------------------ Cassandra


def hold(proxy: FaultProxy) -> None:
    """As a node that hangs: connections stay, nothing is answered."""
    proxy.hold()


def test_cassandra_that_is_away_at_the_start_is_waited_for(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    tmp_path: Path,
) -> None:
    with rigged(broker, cassandra, migrated, unique, tmp_path) as rig, rig.oracle:
        rig.cassandra_proxy.do(away)
        with rig.service as service:
            service.wait_reasons({"cassandra_unavailable", "not_subscribed"})
            service.wait_until(
                lambda: rig.cassandra_proxy.do(lambda one: one.counts.refused) >= 3,
                "it tried three times",
            )
            assert service.live()
            assert service.get("/startupz").status == 200
            # A service that can't write takes no share of the traffic.
            assert rig.broker_proxy.do(lambda one: one.counts.accepted) == 0
            rig.cassandra_proxy.do(lambda one: one.heal())
            service.wait_ready()
            rig.publish(20)
            rig.oracle.wait_right()


@pytest.mark.parametrize("fault", [pytest.param(away, id="refuse"), hold])
def test_while_cassandra_is_away_the_broker_is_kept_and_nothing_is_lost(
    rig: Rig, fault: Callable[[FaultProxy], None]
) -> None:
    service = rig.service
    rig.publish(100)
    rig.oracle.wait_right()
    wait_nothing_held(service)
    before = service.metrics()
    rig.cassandra_proxy.do(fault)
    rig.publish(10 * RECEIVE_MAXIMUM)
    service.wait_reasons({"cassandra_unavailable"})
    pings = rig.pings
    service.wait_until(lambda: rig.pings >= pings + 4, "four pings went out")
    assert service.live()
    assert service.ready_reasons() == {"cassandra_unavailable"}
    meanwhile = service.metrics()
    assert meanwhile.since(before, "disconnects_total") == 0
    assert meanwhile.since(before, "sessions_total") == 0
    assert meanwhile.since(before, "messages_acknowledged_total") == 0
    assert meanwhile.total("deliveries_held") == RECEIVE_MAXIMUM
    assert meanwhile.since(before, "write_retries_total") > 0
    rig.cassandra_proxy.do(lambda one: one.heal())
    rig.oracle.wait_right()
    service.wait_ready()
    after = service.metrics()
    assert after.since(before, "disconnects_total") == 0
    assert after.since(before, "sessions_total") == 0
    assert after.since(before, "dead_letters_total") == 0


def test_qos_0_over_the_budget_is_dropped_and_counted_while_cassandra_is_away(rig: Rig) -> None:
    sent = 4 * RECEIVE_MAXIMUM
    rig.cassandra_proxy.do(hold)
    for number in range(sent):
        topic = rig.oracle.topic(f"{rig.name}-unconfirmed-{number}")
        rig.oracle.raw(topic, b'{"state":{"reported":{"a":1}}}', qos=0)
    rig.wait_total(sent, "messages_received_total", qos="0")
    figures = rig.service.metrics()
    assert figures.total("qos0_dropped_total") == sent - RECEIVE_MAXIMUM
    assert figures.total("deliveries_held") == RECEIVE_MAXIMUM
    rig.publish(20)
    rig.cassandra_proxy.do(lambda one: one.heal())
    rig.oracle.wait_right()
    rig.wait_total(RECEIVE_MAXIMUM, "deliveries_done_without_ack_total")


def test_reconnects_while_cassandra_is_away_hold_no_more_than_the_budget(rig: Rig) -> None:
    reconnects = 4
    rig.cassandra_proxy.do(hold)
    rig.publish(4 * RECEIVE_MAXIMUM)
    rig.wait_total(1, "write_retries_total")
    for number in range(1, reconnects + 1):
        assert rig.broker_proxy.do(lambda one: one.reset()) == 1
        rig.wait_total(number, "sessions_total", state="resumed")
        rig.wait_total(RECEIVE_MAXIMUM, "unacknowledged_deliveries")
        assert rig.service.metrics().total("deliveries_held") <= 2 * RECEIVE_MAXIMUM
    assert rig.service.metrics().total("messages_acknowledged_total") == 0
    rig.cassandra_proxy.do(lambda one: one.heal())
    rig.oracle.wait_right()
    wait_nothing_held(rig.service)
    assert rig.service.metrics().total("deliveries_abandoned_total") > 0


def test_what_a_broker_forgot_while_cassandra_was_away_is_written_all_the_same(
    cassandra: backing.Database, migrated: str, unique: str, tmp_path: Path
) -> None:
    """The broker loses its sessions: what the service holds is the last copy."""
    count = RECEIVE_MAXIMUM // 2
    with (
        Mosquitto() as broker,
        rigged(broker, cassandra, migrated, unique, tmp_path) as rig,
        rig.oracle,
        rig.service as service,
    ):
        service.wait_ready()
        rig.cassandra_proxy.do(hold)
        rig.publish(count)
        rig.wait_total(count, "messages_received_total")
        # The second loss makes the service announce what the last copies leave of its budget.
        for sessions in (2, 3):
            broker.kill()
            broker.start()
            rig.wait_total(sessions, "sessions_total", state="new")
            assert service.metrics().total("deliveries_held") == count
        rig.cassandra_proxy.do(lambda one: one.heal())
        rig.oracle.wait_right()
        rig.wait_total(count, "deliveries_done_without_ack_total")
        assert service.metrics().total("messages_received_total") == count
        # The whole Receive Maximum is announced again, by a connection of its own.
        rig.wait_total(1, "disconnects_total", reason="receive_maximum")
        service.wait_ready()
        rig.publish(20)
        rig.oracle.wait_right()


def test_cassandra_that_is_killed_under_load_loses_nothing_that_was_acknowledged(
    broker: backing.Broker,
    own_cassandra: backing.Cassandra,
    own_migrated: str,
    unique: str,
    tmp_path: Path,
) -> None:
    settings = variables(broker, own_cassandra, own_migrated, unique, **SCALED)
    with ServiceProcess(settings, tmp_path / "service.log") as service, ExitStack() as stack:
        service.wait_ready()
        session = stack.enter_context(own_cassandra.session())
        oracle = stack.enter_context(Oracle(broker, session, own_migrated, unique))
        with Load(oracle, unique, burst=5):
            service.wait_until(
                lambda: service.metrics().total("updates_durable_total") > 200, "it works"
            )
            own_cassandra.kill()
            service.wait_reasons({"cassandra_unavailable"})
        assert service.live()
        meanwhile = service.metrics()
        assert meanwhile.total("write_retries_total") > 0
        own_cassandra.start()
        service.wait_ready()
        oracle.wait_taken()
        oracle.session = stack.enter_context(own_cassandra.session())  # the other one is dead
        oracle.wait_right(60)
        assert service.metrics().total("disconnects_total") == 0


@pytest.mark.slow
def test_half_open_connections_to_cassandra_are_found_by_the_drivers_heartbeat(rig: Rig) -> None:
    rig.publish(20)
    rig.cassandra_proxy.do(lambda one: one.half_open())
    rig.publish(20)
    rig.service.wait_reasons({"cassandra_unavailable"})
    rig.cassandra_proxy.do(lambda one: one.heal())
    rig.oracle.wait_right(60)
    rig.service.wait_ready()
    assert rig.service.metrics().total("disconnects_total") == 0
    assert rig.cassandra_proxy.do(lambda one: one.counts.swallowed_bytes) > 0
