"""Services that die, shrink and come back: real processes, a real broker, a real Cassandra.

The broker is mosquitto, where absent members of a share go on getting messages: whoever is gone
strands some, so what is compared at the end was fetched. Times are scaled: a lease of four seconds,
orphans after five, a quiet of one or more.
"""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.group import Group, client_id, grouped, writes
from tests.member import session_present
from tests.oracle import Load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing
    from tests.group import MakeGroup
    from tests.service import ServiceProcess

pytestmark = pytest.mark.timeout(300)

ADOPTION_SECONDS = 90.0


@pytest.fixture
def group(make_group: MakeGroup) -> Iterator[Group]:
    with make_group(SLOTS__ORPHAN_AFTER_SECONDS=5, SLOTS__ADOPT_QUIET_SECONDS=1) as made:
        yield made


def slot_of(service: ServiceProcess) -> str:
    """Return its client id; the log may lag behind readiness."""
    service.wait_until(
        lambda: bool(service.events("slot taken", this_life=True)), "it says its slot"
    )
    return client_id(service)


def adoptions(service: ServiceProcess, outcome: str) -> float:
    return service.metrics().total("adoptions_total", outcome=outcome)


def wait_adopted(service: ServiceProcess, count: int) -> None:
    service.wait_until(
        lambda: adoptions(service, "emptied") >= count, f"{count} adoptions", ADOPTION_SECONDS
    )


def emptied(service: ServiceProcess) -> set[str]:
    """Return the slots whose adoption the log tells."""
    ends = service.events("adoption ended")
    return {event["slot"] for event in ends if event["outcome"] == "emptied"}


def is_adopting(service: ServiceProcess) -> bool:
    return service.metrics().total("adopting") == 1


def gentle(group: Group) -> Load:
    return Load(group.oracle, group.name, count=40, burst=10, pause_seconds=0.05)


def assert_forgotten(broker: backing.Broker, *names: str) -> None:
    for name in names:
        assert not session_present(broker, name), f"the broker still has a session {name}"


def test_from_4_services_to_1_under_load_nothing_is_stranded(
    broker: backing.Broker, group: Group
) -> None:
    with ExitStack() as stack:
        last, *others = [stack.enter_context(group.service()) for _ in range(4)]
        for other in (last, *others):
            other.wait_ready()
        names = [slot_of(other) for other in others]
        assert len({slot_of(last), *names}) == 4
        with gentle(group):
            for other in others:
                other.wait_until(writes(other, 50), "it has a share")
            for number, other in enumerate(others):
                if number:
                    other.kill()
                else:
                    assert other.terminate() == 0
            last.wait_until(writes(last, 50), "the last one goes on")
            wait_adopted(last, 3)
            assert last.ready_reasons() == set()
        group.settle(last)
        figures = last.metrics()
        # A machine that is short of CPU may need more than one attempt for a slot.
        assert figures.total("adoptions_total", outcome="emptied") == 3
        assert figures.total("adopted_messages_total") > 100, "something was stranded"
        assert figures.total("markers_total") >= 3
        own = 1 + figures.total("disconnects_total")
        assert figures.total("sessions_total") <= own, "adopted sessions are not its own"
        # Every message that came ended in one of these ways, whichever session it came by.
        assert figures.total("messages_received_total") == sum(
            figures.total(name)
            for name in (
                "messages_acknowledged_total",
                "acks_stale_total",
                "deliveries_abandoned_total",
                "deliveries_done_without_ack_total",
            )
        )
        assert group.owners().keys() == {slot_of(last)}
        assert_forgotten(broker, *names)
        last.wait_until(lambda: len(emptied(last)) == 3, "the log tells it")
        assert emptied(last) == set(names)


def test_an_owner_that_comes_back_during_the_adoption_takes_another_slot(
    broker: backing.Broker, group: Group
) -> None:
    with (
        group.service(SLOTS__ADOPT_QUIET_SECONDS=15) as lasting,
        group.service() as leaving,
    ):
        lasting.wait_ready()
        leaving.wait_ready()
        name = slot_of(leaving)
        with gentle(group):
            leaving.wait_until(writes(leaving, 50), "it has a share")
            leaving.kill()
            lasting.wait_until(lambda: is_adopting(lasting), "it adopts", ADOPTION_SECONDS)
            leaving.start()
            leaving.wait_ready()
            assert is_adopting(lasting)
            assert slot_of(leaving) not in {name, slot_of(lasting)}
            leaving.wait_until(writes(leaving, 50), "it has a share again")
            wait_adopted(lasting, 1)
        group.settle(lasting, leaving)
        assert group.owners().keys() == {slot_of(leaving), slot_of(lasting)}
        assert_forgotten(broker, name)
        for service in (lasting, leaving):
            assert service.metrics().total("slot_losses_total") == 0


@pytest.mark.slow
def test_an_owner_that_was_frozen_for_longer_than_that_takes_another_slot(
    broker: backing.Broker, group: Group
) -> None:
    with (
        group.service(SLOTS__ADOPT_QUIET_SECONDS=10) as lasting,
        group.service() as frozen,
    ):
        lasting.wait_ready()
        frozen.wait_ready()
        name = slot_of(frozen)
        with gentle(group):
            frozen.wait_until(writes(frozen, 50), "it has a share")
            frozen.pause()
            try:
                lasting.wait_until(lambda: is_adopting(lasting), "it adopts", ADOPTION_SECONDS)
            finally:
                frozen.resume()
            frozen.wait_until(lambda: slot_of(frozen) != name, "it has another slot")
            frozen.wait_ready()
            frozen.wait_until(writes(frozen, 50), "it has a share again")
            wait_adopted(lasting, 1)
        group.settle(lasting, frozen)
        assert_forgotten(broker, name)
        assert group.owners().keys() == {slot_of(frozen), slot_of(lasting)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_adopter_that_ends_in_the_middle_strands_nothing(
    broker: backing.Broker, group: Group, number: signal.Signals
) -> None:
    services = [group.service(SLOTS__ADOPT_QUIET_SECONDS=3) for _ in range(3)]
    first, *others = services
    with services[0], services[1], services[2]:
        for service in services:
            service.wait_ready()
        names = [slot_of(service) for service in services]
        with gentle(group):
            first.wait_until(writes(first, 50), "it has a share")
            first.kill()
            deadline = time.monotonic() + ADOPTION_SECONDS
            while not (adopters := [one for one in others if is_adopting(one)]):
                assert time.monotonic() < deadline, "nobody adopts"
                time.sleep(0.02)
            (adopter,) = adopters
            (last,) = [one for one in others if one is not adopter]
            assert adoptions(adopter, "emptied") == 0
            pid = adopter.pid
            adopter.signal(number)
            code = adopter.wait_exit()
            assert code == (0 if number == signal.SIGTERM else -number)
            if number == signal.SIGTERM:
                [ended] = adopter.events("adoption ended")
                assert ended["outcome"] == "left"
                assert adopter.events("stopped")[0]["drained"]
                # Given back, not left to end by itself.
                owner = group.owners().get(ended["slot"])  # gone, if the last one was quick
                assert owner is None or f":{pid} " not in owner
            wait_adopted(last, 2)
        group.settle(last)
        assert group.owners().keys() == {slot_of(last)}
        assert_forgotten(broker, *(set(names) - {slot_of(last)}))


@pytest.mark.slow
def test_while_cassandra_is_away_an_adoption_is_given_up_and_made_later(
    broker: backing.Broker,
    own_cassandra: Any,
    own_migrated: str,
    unique: str,
    tmp_path: Path,
) -> None:
    with (
        grouped(
            broker,
            own_cassandra,
            own_migrated,
            unique,
            tmp_path,
            SLOTS__ORPHAN_AFTER_SECONDS=5,
            SLOTS__ADOPT_QUIET_SECONDS=3,
        ) as group,
        group.service() as last,
        group.service() as leaving,
    ):
        last.wait_ready()
        leaving.wait_ready()
        slots = {slot_of(leaving), slot_of(last)}
        with gentle(group):
            leaving.wait_until(writes(leaving, 50), "it has a share")
            leaving.kill()
            last.wait_until(lambda: is_adopting(last), "it adopts", ADOPTION_SECONDS)
            own_cassandra.pause()
            try:
                last.wait_until(
                    lambda: adoptions(last, "lease_lost") + adoptions(last, "timeout") >= 1,
                    "it gives up",
                    ADOPTION_SECONDS,
                )
                assert adoptions(last, "emptied") == 0
            finally:
                own_cassandra.resume()
            wait_adopted(last, 1)
        group.settle(last)
        # Its own lease may have lapsed too: then it may have taken the other slot for itself.
        assert_forgotten(broker, *(slots - {slot_of(last)}))
