"""kill -9 and SIGTERM under load: what a publisher got PUBACK for is in Cassandra at the end.

The moments are drawn at random, and which message a kill meets depends on the machine: a run is
one sample. Publishing begins when the session exists, and goes on while the service is dead.
"""

from __future__ import annotations

import hashlib
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.oracle import Load, Oracle
from tests.proxied import Proxied
from tests.service import ServiceProcess, variables
from tests.serving import settle, through

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import backing
    from tests.serving import Serve

pytestmark = pytest.mark.timeout(180)

LIVES = {
    "MQTT__KEEP_ALIVE_SECONDS": 2,
    "CASSANDRA__REQUEST_TIMEOUT_SECONDS": 1,
    "DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE": 1_000_000,
}


def works(service: ServiceProcess, since: float = 0) -> Callable[[], bool]:
    """Return the question whether the service has written something in this life."""
    return lambda: service.metrics().total("updates_durable_total") > since


def assert_dead_letters(oracle: Oracle, load: Load, client_ids: list[str]) -> None:
    """See that every bad document is kept, once or (when it was repeated) more often."""
    found = {
        bytes(letter.payload_sha256)
        for client_id in client_ids
        for letter in oracle.dead_letters(client_id)
    }
    assert load.bad
    assert {hashlib.sha256(sent.payload).digest() for sent in load.bad} == found


@pytest.mark.parametrize(("receive_maximum", "kills"), [(1000, 5), (5, 3)])
def test_kill_9_at_any_moment_loses_nothing_that_the_broker_confirmed(
    serve: Serve, unique: str, receive_maximum: int, kills: int
) -> None:
    draw = random.Random()
    resumed = 0.0
    with serve(MQTT__RECEIVE_MAXIMUM=receive_maximum, **LIVES) as (service, oracle):
        with Load(oracle, unique) as load:
            for _ in range(kills):
                service.wait_until(works(service), "it writes")
                time.sleep(draw.uniform(0, 0.5))
                service.kill()
                time.sleep(draw.uniform(0, 0.5))
                service.start()
                # Not always ready: a kill may come while it connects or resumes.
                service.wait_started()
                if draw.random() < 0.7:
                    service.wait_ready()
                    resumed += service.metrics().total("sessions_total", state="resumed")
        service.wait_ready()
        settle(service, oracle, 60)
        assert resumed + service.metrics().total("sessions_total", state="resumed") > 0
        assert service.metrics().total("sessions_total", state="new") == 0
        assert_dead_letters(oracle, load, [unique])


def test_kill_9_while_messages_are_held_has_them_repeated(
    serve: Serve, cassandra: backing.Database, unique: str
) -> None:
    """Cassandra does not answer, so nothing may be acknowledged, however often the service dies."""
    count = 60
    more = LIVES | {"MQTT__RECEIVE_MAXIMUM": count // 2}
    with (
        Proxied(cassandra.contact_points[0], cassandra.port) as proxy,
        serve(**more, **through(proxy)) as (service, oracle),
    ):
        proxy.do(lambda one: one.half_open())
        for number in range(count):
            oracle.update(f"{unique}-{number}", {"reported": {"n": number}})
            oracle.raw(oracle.topic(f"{unique}-{number}"), b"bad %d" % number)
        oracle.wait_taken()
        service.wait_until(
            lambda: service.metrics().total("deliveries_held") == count // 2,
            "the budget is held",
        )
        assert service.metrics().total("messages_acknowledged_total") == 0
        service.kill()
        assert {sent.device for sent in oracle.sent} - {""} == {
            one.device for one in oracle.differences()
        }, "nothing is in Cassandra yet"
        proxy.do(lambda one: one.heal())
        service.start()
        service.wait_ready()
        settle(service, oracle, 60)
        figures = service.metrics()
        assert figures.total("messages_received_total", dup="1") >= count // 2
        assert figures.total("messages_acknowledged_total") == 2 * count
        assert len(oracle.dead_letters(unique)) == count


@pytest.mark.parametrize("receive_maximum", [1000, 5])
def test_sigterm_under_load_ends_with_0_and_loses_nothing(
    serve: Serve, unique: str, receive_maximum: int
) -> None:
    draw = random.Random()
    restarts = 3
    with serve(MQTT__RECEIVE_MAXIMUM=receive_maximum, **LIVES) as (service, oracle):
        with Load(oracle, unique) as load:
            for _ in range(restarts):
                service.wait_until(works(service), "it writes")
                time.sleep(draw.uniform(0, 0.3))
                assert service.terminate() == 0
                service.start()
                service.wait_ready()
        settle(service, oracle, 60)
        stops = service.events("stopped")
        assert [stop["drained"] for stop in stops] == [True] * restarts
        assert service.metrics().total("sessions_total", state="new") == 0
        assert_dead_letters(oracle, load, [unique])
        # Drained means acknowledged, on the wire too: nothing written was sent a second time.
        durable = sum(stop["durable"] for stop in stops)
        durable += service.metrics().total("updates_durable_total")
        assert durable == len(oracle.sent) - len(load.bad)


def test_of_two_services_in_a_group_one_may_be_killed(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    cql: Any,
    unique: str,
    tmp_path: Path,
) -> None:
    settings = variables(broker, cassandra, migrated, unique, **LIVES)
    names = [f"{unique}-{number}" for number in range(2)]
    with (
        Oracle(broker, cql, migrated, unique) as oracle,
        ServiceProcess(
            settings | {"SHADOWSVC_MQTT__CLIENT_ID": names[0]}, tmp_path / "first.log"
        ) as first,
        ServiceProcess(
            settings | {"SHADOWSVC_MQTT__CLIENT_ID": names[1]}, tmp_path / "second.log"
        ) as second,
    ):
        first.wait_ready()
        second.wait_ready()
        with Load(oracle, unique) as load:
            first.wait_until(works(first, 100), "the first has a share")
            second.wait_until(works(second, 100), "the second has a share")
            first.kill()
            alone = second.metrics().total("updates_durable_total")
            second.wait_until(works(second, alone + 100), "the second goes on")
            assert second.ready_reasons() == set()
            first.start()
            first.wait_ready()
            first.wait_until(works(first, 100), "the first has a share again")
        settle(first, oracle, 60)
        settle(second, oracle, 60)
        assert first.metrics().total("sessions_total", state="resumed") == 1
        assert second.metrics().total("disconnects_total") == 0
        assert_dead_letters(oracle, load, names)
