"""Nodes come and go under load: a quorum goes on, less than one waits, and nothing is lost."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

import pytest

from tests.cluster.conftest import START_SECONDS, UP_SECONDS, make_whole, nodes_up, reader
from tests.oracle import Load, Oracle
from tests.proxied import Proxied
from tests.rig import Pings
from tests.service import ServiceProcess, variables
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import backing
    from backing import CassandraCluster

pytestmark = pytest.mark.timeout(580)

RECEIVE_MAXIMUM = 100
SCALED = {
    "MQTT__KEEP_ALIVE_SECONDS": 2,
    "MQTT__RECEIVE_MAXIMUM": RECEIVE_MAXIMUM,
    "CASSANDRA__REQUEST_TIMEOUT_SECONDS": 1,
    "DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE": 1_000_000,
    # The service is to stay at the broker, however long a node takes to start here.
    "LIMITS__ISOLATE_AFTER_SECONDS": 900,
}


class Rig:
    """A service on the cluster, an oracle that publishes to it, and the count of its pings."""

    def __init__(
        self,
        cluster: CassandraCluster,
        service: ServiceProcess,
        oracle: Oracle,
        pings: Pings,
    ) -> None:
        self.cluster = cluster
        self.service = service
        self.oracle = oracle
        self.pings = pings

    def total(self, name: str, **labels: str) -> float:
        return self.service.metrics().total(name, **labels)

    def wait_durable(self, more: int) -> None:
        """Wait until so many more updates are durable."""
        goal = self.total("updates_durable_total") + more
        self.service.wait_until(
            lambda: self.total("updates_durable_total") >= goal, f"{more} more are durable", 120
        )

    def wait_direct(self, nodes: int) -> None:
        """Wait until so many nodes have an own connection."""
        wait_until(
            lambda: self.total("direct_connections") == nodes, f"{nodes} connections", UP_SECONDS
        )

    def wait_pings(self, more: int) -> None:
        """Wait until the service has sent so many more pings."""
        goal = self.pings.count + more
        wait_until(lambda: self.pings.count >= goal, f"{more} more pings went out", 60)

    def check_never_left(self) -> None:
        """The connection to the broker is the one made at the start; nothing was given up."""
        figures = self.service.metrics()
        assert figures.total("disconnects_total") == 0
        assert figures.total("sessions_total") == 1
        assert figures.total("acks_stale_total") == 0
        letters = len(self.oracle.dead_letters(self.service.settings["SHADOWSVC_MQTT__CLIENT_ID"]))
        bad = sum(not sent.device for sent in self.oracle.taken)
        assert letters == bad


@contextmanager
def rigged(
    broker: backing.Broker,
    cluster: CassandraCluster,
    keyspace: str,
    name: str,
    folder: Path,
) -> Iterator[Rig]:
    with ExitStack() as stack:
        pings = Pings()
        proxy = stack.enter_context(Proxied(broker.host, broker.port, pings.tap))
        more = SCALED | {"MQTT__URL": f"mqtt://127.0.0.1:{proxy.port}"}
        settings = variables(broker, cast("backing.Database", cluster), keyspace, name, **more)
        session = stack.enter_context(reader(cluster))
        service = ServiceProcess(settings, folder / "service.log")
        oracle = Oracle(broker, session, keyspace, name)
        stack.enter_context(oracle)
        stack.enter_context(service)
        service.wait_ready()
        yield Rig(cluster, service, oracle, pings)


@pytest.fixture
def rig(
    broker: backing.Broker,
    cluster: CassandraCluster,
    make_keyspace: Callable[[int], str],
    unique: str,
    tmp_path: Path,
) -> Iterator[Rig]:
    """A service on a keyspace that has every row three times."""
    with rigged(broker, cluster, make_keyspace(3), unique, tmp_path) as rig:
        yield rig


def test_a_node_that_is_killed_and_comes_back_costs_nothing(rig: Rig) -> None:
    node = rig.cluster.nodes[2]
    with Load(rig.oracle, "one-down", count=200, burst=5):
        rig.wait_direct(3)
        rig.wait_durable(300)
        node.kill()
        rig.wait_direct(2)
        by_the_driver = rig.total("batches_sent_total", way="driver")
        rig.wait_durable(400)
        wait_until(
            lambda: nodes_up(rig.oracle.session) == 2, "the node is seen to be down", UP_SECONDS
        )
        rig.wait_durable(400)
        assert rig.service.ready_reasons() == set()
        assert rig.service.live()
        node.start(START_SECONDS)
        wait_until(lambda: nodes_up(rig.oracle.session) == 3, "the node is back", UP_SECONDS)
        rig.wait_direct(3)
        rig.wait_durable(400)
        # Two replicas are left to every batch.
        assert rig.total("batches_sent_total", way="driver") == by_the_driver
    rig.oracle.wait_taken()
    rig.oracle.wait_right(60)
    rig.check_never_left()


def test_with_two_nodes_down_nothing_is_acknowledged_and_nothing_is_lost(rig: Rig) -> None:
    service = rig.service
    with Load(rig.oracle, "two-down", count=200, burst=5):
        rig.wait_durable(300)
        for node in rig.cluster.nodes[1:]:
            node.kill()
        service.wait_reasons({"cassandra_unavailable"}, 120)
        before = service.metrics()
        service.wait_until(
            lambda: (
                service.metrics().since(before, "write_retries_total") >= 5
                and service.metrics().total("unacknowledged_deliveries") == RECEIVE_MAXIMUM
            ),
            "writes were tried again and again, and the window is full",
            120,
        )
        rig.wait_pings(3)
        away = service.metrics()
        assert away.since(before, "messages_acknowledged_total") == 0
        assert away.since(before, "updates_durable_total") == 0
        assert away.since(before, "dead_letters_total") == 0
        assert service.live()
        assert service.ready_reasons() == {"cassandra_unavailable"}
        # One of the two is enough for a quorum.
        rig.cluster.nodes[1].start(START_SECONDS)
        service.wait_ready(120)
        rig.wait_durable(300)
    make_whole(rig.cluster)
    rig.oracle.wait_taken()
    rig.oracle.wait_right(60)
    rig.check_never_left()


def test_a_node_that_hangs_stops_neither_writes_nor_keep_alive(rig: Rig) -> None:
    """SIGSTOP: connections stay open, and what was sent to the node has no answer."""
    service = rig.service
    node = rig.cluster.nodes[1]
    with Load(rig.oracle, "frozen", count=200, burst=5):
        rig.wait_durable(300)
        before = service.metrics()
        node.pause()
        try:
            service.wait_until(
                lambda: service.metrics().since(before, "write_retries_total") > 0,
                "a request had no answer and was sent again",
            )
            rig.wait_durable(300)
            rig.wait_pings(4)
            rig.wait_durable(300)
            assert service.live()
        finally:
            node.resume()
        rig.wait_durable(300)
        service.wait_ready(60)
    rig.oracle.wait_taken()
    rig.oracle.wait_right(60)
    rig.check_never_left()


def test_a_node_that_is_replaced_by_another_costs_nothing(rig: Rig) -> None:
    lost = rig.cluster.nodes[2]
    with Load(rig.oracle, "replaced", count=200, burst=5):
        rig.wait_durable(300)
        lost.kill()
        wait_until(
            lambda: nodes_up(rig.oracle.session) == 2, "the node is seen to be down", UP_SECONDS
        )
        successor = rig.cluster.add(replaces=lost)
        successor.start(START_SECONDS)
        rig.wait_durable(300)
        assert rig.service.ready_reasons() == set()
    rig.oracle.wait_taken()
    rig.oracle.wait_right(60)
    make_whole(rig.cluster)
    # The quorum may now be the two that were there all along, or one of them and the successor.
    rig.cluster.nodes[1].kill()
    with reader(rig.cluster) as session:
        rig.oracle.session = session
        rig.oracle.wait_right(60)
        rig.oracle.update("after", {"reported": {"a": 1}})
        rig.oracle.wait_taken()
        rig.oracle.wait_right(60)
        rig.check_never_left()
