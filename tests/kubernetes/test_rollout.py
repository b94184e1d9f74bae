"""The overlay `dev` rolls out in a real cluster, carries updates, and loses none when pods go.

mosquitto stands in VerneMQ's place, by the overlay itself, and Grafana is left out: their images
are not to be had everywhere. The tests build on each other, in the order of the file. They need a
cluster that runs pods and has the images; an API server alone does for the other tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.containers.updates import Publisher, locust, wait_for
from tests.kubernetes.kubectl import kubectl, require_api
from tests.kubernetes.system import BROKER, NAMESPACE, System
from tests.oracle import Load, Oracle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from backing.addresses import GivenCassandra

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(600)]

REPLICAS = 2
DEPLOYMENT = {"kind": "Deployment", "metadata": {"name": "shadowsvc", "namespace": NAMESPACE}}
PUBLISHERS = 8
LOADS = 3
"""Tests that publish by `under_load`."""
LOAD_DEVICES = [f"load-{number:07d}" for number in range(5)]
"""As the load rig calls its first ones."""
SETTLE_SECONDS = 180
"""For what waits in the session of a slot that nobody has, until it is adopted."""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    require_api()
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    if not nodes:
        reason = "this API has no node: the rollout needs a cluster that runs pods"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # `Load` numbers its devices: each has a login of its own, so each publisher has one device.
    devices = [f"lamp-{number}-0" for number in range(LOADS * PUBLISHERS + 3)]
    with System(tmp_path_factory.mktemp("dev"), [*devices, *LOAD_DEVICES]) as made:
        yield made


@pytest.fixture(scope="module")
def database(system: System) -> Iterator[GivenCassandra]:
    with system.database() as found:
        yield found


@contextlib.contextmanager
def under_load(system: System, database: GivenCassandra) -> Iterator[list[Oracle]]:
    """Eighty updates a second by devices with logins of their own, through HAProxy.

    At the end nothing is missing of what the broker said that somebody gets.
    """
    with contextlib.ExitStack() as connections:
        session = connections.enter_context(database.session())
        oracles: list[Oracle] = []
        with contextlib.ExitStack() as loads:
            for device in system.take_devices(PUBLISHERS):
                oracle = Oracle(system.broker(device), session, NAMESPACE, "things")
                oracles.append(connections.enter_context(oracle))
                name = device.removesuffix("-0")
                loads.enter_context(Load(oracle, name, count=1, burst=1, pause_seconds=0.1))
            wait_for(lambda: all(len(each.sent) > 20 for each in oracles), "the load flows")
            yield oracles
            at_the_end = [len(each.sent) for each in oracles]
            wait_for(
                lambda: all(
                    len(each.sent) > then + 20
                    for each, then in zip(oracles, at_the_end, strict=True)
                ),
                "the load flows on",
            )
        for oracle in oracles:
            oracle.wait_taken()
        deadline = time.monotonic() + SETTLE_SECONDS
        for oracle in oracles:
            oracle.wait_right(max(1.0, deadline - time.monotonic()))


def stopped(log: Path) -> dict[str, object]:
    """Return the last event of a listener that ended in good order."""

    def events() -> list[dict[str, object]]:
        lines = log.read_text().splitlines()
        parsed = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in parsed if event["event"] == "stopped"]

    wait_for(events, f"{log.name} has its end", 20)
    (found,) = events()
    return found


def test_the_overlay_rolls_out_and_no_listener_starts_twice(system: System) -> None:
    pods = system.pods()
    assert len(pods) == REPLICAS
    for pod in pods:
        (status,) = pod["status"]["containerStatuses"]
        assert status["ready"]
        assert status["restartCount"] == 0
    (migration,) = system.pods("app.kubernetes.io/component=migration")
    assert migration["status"]["phase"] == "Succeeded"
    system.wait_no_slot_is_free(REPLICAS)


@pytest.mark.parametrize("websocket", [True, False], ids=["websocket", "mqtt"])
def test_an_update_of_a_device_arrives(system: System, *, websocket: bool) -> None:
    (device,) = system.take_devices(1)
    login = (device, system.password(device))
    port = 80 if websocket else 1883
    Publisher(system.host, port, websocket=websocket, login=login).send(device, 7)

    def stored() -> bool:
        return bool(system.get(device) == {"reported": {"value": 7}})

    wait_for(stored, "the update can be read")


def test_prometheus_scrapes_listeners_and_ingress_and_has_the_rules(system: System) -> None:
    def all_up() -> bool:
        targets = system.prometheus("targets?state=active")["activeTargets"]
        up = sorted(one["labels"]["job"] for one in targets if one["health"] == "up")
        assert up == ["haproxy", "ingress", "shadowsvc", "shadowsvc"], targets
        return True

    wait_for(all_up, "every target is up", 90)
    groups = system.prometheus("rules")["groups"]
    assert len(groups) > 3
    broken = [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]
    assert not broken


def test_the_pods_of_the_load_rig_publish_with_logins_of_their_own(
    system: System, tmp_path: Path
) -> None:
    with system.load_rig(tmp_path, LOAD_DEVICES) as port:
        count = str(len(LOAD_DEVICES))
        where = {"host": f"ws://{system.host}:80/mqtt", "interval": "1"}

        def workers() -> bool:
            return len(locust(port, "stats/requests")["workers"]) == 1

        wait_for(workers, "the worker has found its master", 60)
        started = locust(port, "swarm", user_count=count, spawn_rate=count, **where)
        assert started["success"] is True

        def updates_are_answered() -> bool:
            found = locust(port, "stats/requests")
            assert found["errors"] == []
            counted = {one["name"]: one["num_requests"] for one in found["stats"]}
            connected = counted.get("connect") == len(LOAD_DEVICES)
            return connected and counted.get("publish to PUBACK", 0) > 25

        wait_for(updates_are_answered, "its devices publish", 90)
    for device in LOAD_DEVICES:
        wait_for(lambda each=device: system.get(each) is not None, f"{device} has a shadow", 60)


def test_a_rolling_update_under_load_loses_nothing(
    system: System, database: GivenCassandra
) -> None:
    before = system.listeners()
    logs = [system.follow(name) for name in before.values()]
    with under_load(system, database):
        kubectl("-n", NAMESPACE, "rollout", "restart", "deployment/shadowsvc")
        system.wait_rolled_out(DEPLOYMENT)
    after = system.listeners()
    assert len(after) == REPLICAS
    assert not before.keys() & after.keys(), "every pod is another one"
    for log in logs:
        end = stopped(log)
        assert end["drained"] is True
        assert end["left_to_the_broker"] == 0
        assert int(str(end["acknowledged"])) > 0, "it had a share of the load"
    system.wait_no_slot_is_free(REPLICAS)
    adopted = sum(system.figures(name).total("adoptions_total") for name in after.values())
    resumed = sum(
        system.figures(name).total("sessions_total", state="resumed") for name in after.values()
    )
    assert adopted + resumed > 0, "sessions of the old pods were fetched by the new ones"


@pytest.mark.parametrize("how", [[], ["--force", "--grace-period=0"]], ids=["plain", "force"])
def test_a_listener_that_is_deleted_under_load_loses_nothing(
    how: list[str], system: System, database: GivenCassandra
) -> None:
    before = system.listeners()
    victim, *_ = before
    with under_load(system, database):
        kubectl("-n", NAMESPACE, "delete", "pod", before[victim], *how)
        wait_for(
            lambda: victim not in system.listeners() and len(system.listeners()) == REPLICAS,
            "another pod has come",
        )
        system.wait_rolled_out(DEPLOYMENT)
    after = system.listeners()
    assert len(after) == REPLICAS
    assert len(before.keys() & after.keys()) == REPLICAS - 1
    (new,) = after.keys() - before.keys()
    durable = system.figures(after[new]).total("updates_durable_total")
    assert durable > 20, "it has a share of the load"
    system.wait_no_slot_is_free(REPLICAS)


# paho leaves its socket open when a WebSocket is refused, as here while there is no broker.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_that_comes_back_elsewhere_is_found_again(system: System) -> None:
    """Its pod has another address: HAProxy is told by `ingress`, without a reload."""
    (device,) = system.take_devices(1)
    publisher = Publisher(system.host, 80, websocket=True, login=(device, system.password(device)))
    publisher.send(device, 1)
    (before,) = system.pods(BROKER)
    reloads = system.ingress_figures().total("ingress_reloads_total")
    kubectl("-n", NAMESPACE, "delete", "pod", before["metadata"]["name"], limit_seconds=120)

    def arrives() -> bool:
        try:  # again and again: there may be no subscriber yet
            publisher.send(device, 2)
        except Exception as error:
            raise AssertionError(error) from error
        return bool(system.get(device) == {"reported": {"value": 2}})

    wait_for(arrives, "an update arrives again", 120)
    (after,) = system.pods(BROKER)
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["status"]["podIP"] != before["status"]["podIP"]
    assert system.ingress_figures().total("ingress_reloads_total") == reloads
