"""Services without a client id of their own: real processes, a real broker, a real Cassandra.

Times are scaled: a lease of four seconds. Orphans are nobody's business here: every slot finds an
owner again before the end, so that what its session holds is delivered.
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import pytest

from tests.group import LEASE_SECONDS, Group, client_id, writes
from tests.oracle import Load
from tests.proxied import Proxied, away
from tests.service import run_command
from tests.serving import through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import backing
    from tests.group import MakeGroup
    from tests.service import ServiceProcess

    MakeBehind: TypeAlias = Callable[..., AbstractContextManager["Behind"]]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def group(make_group: MakeGroup) -> Iterator[Group]:
    with make_group() as made:
        yield made


def in_state(service: ServiceProcess, state: str) -> Callable[[], bool]:
    return lambda: service.metrics().total("slot_state", state=state) == 1


def test_two_that_start_at_once_have_client_ids_of_their_own_and_share_the_work(
    group: Group,
) -> None:
    with group.service() as first, group.service() as second:
        first.wait_ready()
        second.wait_ready()
        names = {client_id(first), client_id(second)}
        assert len(names) == 2
        owners = group.owners()
        assert set(owners) == names
        assert {str(owner).rpartition(":")[2] for owner in owners.values()} == {
            str(first.pid),
            str(second.pid),
        }
        with Load(group.oracle, group.name, pause_seconds=0.1):
            first.wait_until(writes(first, 200), "the first has a share")
            second.wait_until(writes(second, 200), "the second has a share")
        group.settle(first, second)
        for service in (first, second):
            assert service.metrics().total("disconnects_total") == 0
            assert service.metrics().total("slot_state", state="held") == 1
            assert service.metrics().total("slot_lease_age_seconds") < LEASE_SECONDS
        letters = {letter.client_id for name in names for letter in group.oracle.dead_letters(name)}
        assert letters <= names
        assert letters, "dead letters name the slot by which they came"
        assert first.terminate() == second.terminate() == 0
        assert set(group.owners().values()) == {None}, "an orderly stop gives the slot back"
        assert first.events("slot freed")[0]["freed"] is True


def test_an_orderly_restart_takes_the_same_slot_and_its_session(group: Group) -> None:
    with group.service() as service:
        service.wait_ready()
        name = client_id(service)
        assert service.terminate() == 0
        group.oracle.update(f"{group.name}-1", {"reported": {"while": "away"}})
        service.start()
        service.wait_ready()
        assert client_id(service) == name
        assert service.metrics().total("sessions_total", state="resumed") == 1
        assert service.metrics().total("slot_takes_total", how="free") == 1
        group.settle(service)


def test_kill_9_leaves_the_slot_until_its_lease_ends_and_then_its_session_is_resumed(
    group: Group,
) -> None:
    with group.service() as first, group.service() as second:
        first.wait_ready()
        second.wait_ready()
        killed = client_id(first)
        number = int(killed.rpartition("-")[2])
        with Load(group.oracle, group.name, pause_seconds=0.1):
            for _ in range(2):
                first.wait_until(writes(first, 50), "it writes")
                first.kill()
                second.wait_until(writes(second, 50), "the other goes on")
                group.wait_free(number)
                first.start()
                first.wait_ready()
                assert client_id(first) == killed
                assert first.metrics().total("sessions_total", state="resumed") == 1
        group.settle(first, second)
        assert second.metrics().total("disconnects_total") == 0


def test_kill_9_and_a_start_at_once_takes_another_slot_and_fetches_what_the_old_one_had(
    make_group: MakeGroup,
) -> None:
    # A lease longer than a start takes on a busy machine.
    with (
        make_group(SLOTS__LEASE_SECONDS=20) as group,
        group.service() as first,
        group.service() as second,
    ):
        first.wait_ready()
        second.wait_ready()
        killed = client_id(first)
        with Load(group.oracle, group.name, pause_seconds=0.1):
            first.wait_until(writes(first, 50), "it writes")
            first.kill()
            # Nobody can know that the owner is dead: its lease lasts.
            first.start()
            first.wait_ready()
            assert len({killed, client_id(first), client_id(second)}) == 3
            # Then the process knows the slot of its former life, and adopts it.
            first.wait_until(
                lambda: first.metrics().total("adoptions_total", outcome="emptied") == 1,
                "the old session is empty",
                60,
            )
        group.settle(first, second)
        assert second.metrics().total("adoptions_total") == 0
        assert killed not in group.owners()


def test_who_was_paused_beyond_its_lease_leaves_its_slot_to_who_took_it(group: Group) -> None:
    with group.service() as paused, group.service() as other, ExitStack() as later:
        paused.wait_ready()
        other.wait_ready()
        name = client_id(paused)
        with Load(group.oracle, group.name, pause_seconds=0.1):
            paused.wait_until(writes(paused, 100), "it writes")
            paused.signal(signal.SIGSTOP)
            group.wait_free(int(name.rpartition("-")[2]))
            successor = later.enter_context(group.service())
            successor.wait_ready()
            assert client_id(successor) == name
            assert successor.metrics().total("sessions_total", state="resumed") == 1
            paused.signal(signal.SIGCONT)
            paused.wait_until(
                lambda: len(paused.events("slot taken")) == 2, "it takes another slot"
            )
            paused.wait_ready()
            assert client_id(paused) not in {name, client_id(other)}
            assert paused.metrics().total("slot_losses_total", reason="taken") == 1
            paused.wait_until(writes(paused, 50), "it has a share by its new slot")
            successor.wait_until(writes(successor, 50), "nobody takes it from the successor")
        group.settle(paused, other, successor)
        # One connection was taken over; nobody fought for it.
        assert successor.metrics().total("disconnects_total") == 0
        assert other.metrics().total("disconnects_total") == 0
        assert 1 <= paused.metrics().total("disconnects_total") <= 4
        owners = {str(owner).rpartition(":")[2] for owner in group.owners().values()}
        assert owners == {str(one.pid) for one in (paused, other, successor)}


def test_who_was_paused_beyond_its_lease_and_finds_its_slot_free_stays(group: Group) -> None:
    with group.service() as service:
        service.wait_ready()
        name = client_id(service)
        service.signal(signal.SIGSTOP)
        group.wait_free(0)
        group.oracle.update(f"{group.name}-1", {"reported": {"while": "paused"}})
        service.signal(signal.SIGCONT)
        service.wait_until(lambda: len(service.events("slot taken")) == 2, "it is taken again")
        service.wait_ready()
        assert client_id(service) == name
        assert service.metrics().total("slot_takes_total", how="again") == 1
        group.settle(service)
        assert list(group.owners()) == [name], "none was wasted"


def test_one_service_more_than_slots_waits_and_says_which_setting_to_raise(
    make_group: MakeGroup,
) -> None:
    with ExitStack() as stack:
        group = stack.enter_context(make_group(SLOTS__MAX_SLOTS=1))
        first = stack.enter_context(group.service())
        first.wait_ready()  # else the other one may have the slot
        second = stack.enter_context(group.service())
        second.wait_reasons({"no_slot", "not_subscribed"})
        answer = json.loads(second.get("/readyz").body)
        [detail] = [one["detail"] for one in answer["reasons"] if one["reason"] == "no_slot"]
        assert "SHADOWSVC_SLOTS__MAX_SLOTS" in detail
        assert second.live()
        assert second.metrics().total("slot_state", state="full") == 1
        group.oracle.update(f"{group.name}-1", {"reported": {"n": 1}})
        group.settle(first)
        name = client_id(first)
        first.kill()
        group.oracle.update(f"{group.name}-1", {"reported": {"n": 2}})
        second.wait_ready()
        assert client_id(second) == name
        assert second.metrics().total("sessions_total", state="resumed") == 1
        group.settle(second)
        # And a stop while waiting is a stop.
        first.start()
        first.wait_reasons({"no_slot", "not_subscribed"})
        assert first.terminate() == 0


class Behind(NamedTuple):
    """A group, a proxy before its Cassandra and one before its broker, and their addresses."""

    group: Group
    store: Proxied
    mqtt: Proxied
    addresses: dict[str, object]


@pytest.fixture
def behind(
    make_group: MakeGroup, broker: backing.Broker, cassandra: backing.Database
) -> MakeBehind:
    """Makes a group that may have its servers taken away; with these settings."""

    @contextmanager
    def make(**settings: object) -> Iterator[Behind]:
        with (
            Proxied(cassandra.contact_points[0], cassandra.port) as store,
            Proxied(broker.host, broker.port) as mqtt,
            make_group(**settings) as group,
        ):
            addresses = {"MQTT__URL": f"mqtt://127.0.0.1:{mqtt.port}", **through(store)}
            yield Behind(group, store, mqtt, addresses)

    return make


def cut(store: Proxied) -> None:
    """Take Cassandra away."""
    store.do(away)


def heal(store: Proxied) -> None:
    store.do(lambda proxy: proxy.heal())


def test_cassandra_away_beyond_the_lease_costs_no_connection_while_it_lasts(
    behind: MakeBehind, unique: str
) -> None:
    with (
        behind() as (group, store, _, addresses),
        group.service(**addresses) as service,
    ):
        service.wait_ready()
        name = client_id(service)
        with Load(group.oracle, unique, pause_seconds=0.1):
            service.wait_until(writes(service, 50), "it writes")
            cut(store)
            service.wait_until(in_state(service, "lapsed"), "the lease has lapsed")
            group.wait_free(0)
            service.wait_reasons({"cassandra_unavailable"})
            heal(store)
            service.wait_until(in_state(service, "held"), "the slot is ours again")
            service.wait_ready()
        group.settle(service)
        assert client_id(service) == name
        figures = service.metrics()
        assert figures.total("slot_takes_total", how="again") >= 1
        assert figures.total("disconnects_total") == 0
        assert figures.total("isolations_total") == 0
        assert store.do(lambda proxy: proxy.counts.refused) > 0


def test_without_a_lease_and_without_cassandra_nobody_connects(
    behind: MakeBehind, unique: str
) -> None:
    with (
        behind() as (group, store, mqtt, addresses),
        group.service(**addresses) as service,
    ):
        service.wait_ready()
        cut(store)
        mqtt.do(lambda proxy: proxy.reset())
        # The lease can't have ended yet: it is enough to connect again.
        service.wait_until(
            lambda: service.metrics().total("sessions_total", state="resumed") == 1,
            "it has connected again",
        )
        service.wait_until(in_state(service, "lapsed"), "the lease has lapsed")
        accepted = mqtt.do(lambda proxy: proxy.counts.accepted)
        mqtt.do(lambda proxy: proxy.reset())
        service.wait_until(lambda: "no_slot" in service.ready_reasons(), "it waits for a slot")
        assert "not_subscribed" in service.ready_reasons()
        group.oracle.update(f"{unique}-1", {"reported": {"while": "away"}})
        time.sleep(2)  # for connects that must not be
        assert mqtt.do(lambda proxy: proxy.counts.accepted) == accepted
        heal(store)
        service.wait_ready()
        group.settle(service)


# ------------------------------------------------------------------ isolation


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["slots", "client ids"])
def test_below_the_limit_an_outage_isolates_nobody_and_above_it_others_take_over(
    behind: MakeBehind,
    unique: str,
    own: bool,  # noqa: FBT001 - a parameter
) -> None:
    limit = 8
    ids = [{"MQTT__CLIENT_ID": f"{unique}-{name}"} if own else {} for name in "ab"]
    with (
        behind(LIMITS__ISOLATE_AFTER_SECONDS=limit) as (group, store, _, addresses),
        group.service(**addresses, **ids[0]) as cutoff,
        group.service(**ids[1]) as other,
    ):
        cutoff.wait_ready()
        other.wait_ready()
        with Load(group.oracle, unique, pause_seconds=0.1):
            cutoff.wait_until(writes(cutoff, 50), "it writes")
            cut(store)
            cutoff.wait_reasons({"cassandra_unavailable"})
            heal(store)
            cutoff.wait_ready()
            figures = cutoff.metrics()
            assert figures.total("isolations_total") == 0
            assert figures.total("disconnects_total") == 0, "the connection stayed"

            cut(store)
            cutoff.wait_until(lambda: "isolated" in cutoff.ready_reasons(), "it is isolated", 60)
            assert {"not_subscribed", "cassandra_unavailable"} <= cutoff.ready_reasons()
            assert cutoff.live()
            figures = cutoff.metrics()
            assert figures.total("isolations_total") == 1
            assert figures.total("isolated") == 1
            assert figures.total("disconnects_total", reason="isolated") == 1
            if not own:
                assert figures.total("slot_state", state="given_up") == 1
                group.wait_free(int(client_id(cutoff).rpartition("-")[2]))
            other.wait_until(writes(other, 100), "the other goes on")
            assert other.ready_reasons() == set()
            heal(store)
            cutoff.wait_ready()
            cutoff.wait_until(writes(cutoff, 50), "it is back at work")
        group.settle(cutoff, other)
        figures = cutoff.metrics()
        assert figures.total("isolated") == 0
        assert figures.total("sessions_total", state="resumed") >= 1
        assert other.metrics().total("disconnects_total") == 0


def test_when_all_are_isolated_all_come_back_and_nothing_is_lost(
    behind: MakeBehind, unique: str
) -> None:
    with (
        behind(LIMITS__ISOLATE_AFTER_SECONDS=3) as (group, store, _, addresses),
        group.service(**addresses) as first,
        group.service(**addresses) as second,
    ):
        first.wait_ready()
        second.wait_ready()
        names = {client_id(first), client_id(second)}
        with Load(group.oracle, unique, pause_seconds=0.2):
            cut(store)
            for service in (first, second):
                service.wait_until(
                    lambda service=service: "isolated" in service.ready_reasons(),
                    "it is isolated",
                    60,
                )
            for number in range(2):
                group.wait_free(number)
            heal(store)
            first.wait_ready()
            second.wait_ready()
        group.settle(first, second)
        assert {client_id(first), client_id(second)} == names
        assert set(group.owners()) == names, "nobody took another"


# ------------------------------------------------------------------ the command


def test_the_command_shows_a_line_for_each_slot_in_a_pipe(group: Group) -> None:
    done = run_command(group.settings, "slots")
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["SLOT\tSTATE\tOWNER\tFOR"]
    assert "no slots" in done.stderr
    with group.service() as service:
        service.wait_ready()
        done = run_command(group.settings, "slots")
        assert done.stderr == ""
        [_, line] = done.stdout.splitlines()
        name, state, owner, age = line.split("\t")
        assert (name, state) == (f"{group.name}-0", "held")
        assert owner.endswith(f":{service.pid}")
        assert age.endswith("s")
    done = run_command(group.settings, "slots")
    assert done.stdout.splitlines()[1:] == [f"{group.name}-0\tfree\t-\t-"]
