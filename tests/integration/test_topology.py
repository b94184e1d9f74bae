"""Groups of devices: the rule, cassandra-driver's metadata, and a real Cassandra."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from cassandra import metadata as driver_metadata
from cassandra.connection import DefaultEndPoint
from cassandra.metadata import KeyspaceMetadata, Metadata, Murmur3Token
from cassandra.murmur3 import murmur3 as pure_murmur3
from cassandra.policies import SimpleConvictionPolicy
from cassandra.pool import Host
from hypothesis import given
from hypothesis import strategies as st

from backing import CassandraCluster
from shadowsvc.config import Cassandra, Settings
from shadowsvc.store import driver
from shadowsvc.store.migrate import migrate
from shadowsvc.store.topology import UNKNOWN, Replica, Snapshot, Topology, snapshot_of, token_of
from tests.keyspaces import settings_of

if TYPE_CHECKING:
    import backing

pytestmark = pytest.mark.timeout(120)

DEVICES = [f"device-{number}" for number in range(300)] + ["", "é", "😀", "a" * 1000]
REPLICAS = st.sampled_from([Replica(f"10.0.0.{number}", 9042, "name") for number in (1, 2, 3)])
MURMUR3 = "org.apache.cassandra.dht.Murmur3Partitioner"


def ring(
    nodes: dict[str, int], replication: dict[str, int], partitioner: str = MURMUR3
) -> Metadata:
    """Make the driver's metadata of a cluster: nodes by data centre, replicas by data centre."""
    made = Metadata()
    tokens: dict[Host, list[str]] = {}
    number = 0
    for dc, count in nodes.items():
        for index in range(count):
            number += 1
            host = Host(
                DefaultEndPoint(f"10.0.0.{number}"), SimpleConvictionPolicy, host_id=uuid.uuid4()
            )
            host.set_location_info(dc, f"rack{index % 3}")
            made.add_or_return_host(host)
            # 16 tokens a node, spread by the same hash that spreads devices.
            tokens[host] = [str(pure_murmur3(f"{number}/{v}".encode())) for v in range(16)]
    options = {"class": "NetworkTopologyStrategy", **{dc: str(n) for dc, n in replication.items()}}
    name = options.pop("class")
    made.keyspaces["ks"] = KeyspaceMetadata("ks", True, name, options)
    made.rebuild_token_map(partitioner, tokens)
    return made


@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), st.frozensets(REPLICAS, max_size=2)),
        min_size=1,
        max_size=20,
        unique_by=lambda item: item[0],
    ).map(sorted),
    st.text(max_size=5),
)
def test_a_group_is_the_replica_set_of_the_first_token_that_is_not_smaller(
    ranges: list[tuple[int, frozenset[Replica]]], device: str
) -> None:
    snapshot = Snapshot.build(ranges, 3)
    token = token_of(device)
    owner = next((replicas for end, replicas in ranges if end >= token), ranges[0][1])
    numbers = list(dict.fromkeys(replicas for _, replicas in ranges))
    assert snapshot.group(device) == numbers.index(owner)
    assert Topology(snapshot).group(device) == snapshot.group(device)
    assert snapshot.distinct == len(numbers)
    assert snapshot.single == (len(numbers) == 1)
    assert snapshot.replicas[snapshot.group(device)] == tuple(sorted(owner))


@pytest.mark.parametrize(
    ("nodes", "replication"),
    [
        ({"dc1": 4}, {"dc1": 3}),
        ({"dc1": 6}, {"dc1": 1}),
        ({"dc1": 5, "dc2": 4}, {"dc1": 2, "dc2": 3}),
    ],
)
def test_devices_of_one_group_have_the_same_local_replicas_and_others_have_not(
    nodes: dict[str, int], replication: dict[str, int]
) -> None:
    metadata = ring(nodes, replication)
    snapshot = snapshot_of(metadata, "ks", "dc1")
    topology = Topology(snapshot)
    assert snapshot.nodes == nodes["dc1"]
    assert not topology.single
    replicas_of: dict[int, frozenset[str]] = {}
    for device in DEVICES:
        replicas = frozenset(
            host.address
            for host in metadata.get_replicas("ks", device.encode())
            if host.datacenter == "dc1"
        )
        directly = snapshot.replicas[topology.group(device)]
        assert {replica.address for replica in directly} == replicas
        assert replicas_of.setdefault(topology.group(device), replicas) == replicas
    assert len(set(replicas_of.values())) == len(replicas_of)
    assert set(replicas_of) <= set(range(snapshot.distinct))


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_with_as_many_replicas_as_nodes_there_is_one_group(nodes: int) -> None:
    snapshot = snapshot_of(ring({"dc1": nodes, "dc2": 5}, {"dc1": 3, "dc2": 2}), "ks", "dc1")
    here = tuple(Replica(f"10.0.0.{at + 1}", 9042, f"10.0.0.{at + 1}") for at in range(nodes))
    assert snapshot == Snapshot(True, (), (0,), distinct=1, nodes=nodes, replicas=(here,))
    assert {Topology(snapshot).group(device) for device in DEVICES} == {0}


def test_what_cannot_be_told_is_one_group() -> None:
    four = {"dc1": 4}
    assert snapshot_of(ring(four, {"dc1": 2}), "absent", "dc1") == UNKNOWN._replace(nodes=4)
    assert snapshot_of(ring(four, {"dc1": 2}), "ks", "dc9") == UNKNOWN
    other = ring(four, {"dc1": 2}, "org.apache.cassandra.dht.RandomPartitioner")
    assert snapshot_of(other, "ks", "dc1") == UNKNOWN._replace(nodes=4)
    assert snapshot_of(Metadata(), "ks", "dc1") == UNKNOWN
    assert Topology().single


@given(st.text())
def test_a_token_is_the_drivers_with_and_without_its_extension(device: str) -> None:
    assert token_of(device) == Murmur3Token.from_key(device.encode()).value
    assert driver_metadata.murmur3 is not None
    assert pure_murmur3(device.encode()) in {token_of(device), -(2**63)}


@pytest.fixture
def settings(cassandra: backing.Database, keyspace: str) -> Cassandra:
    """Settings of a keyspace that does not exist yet, and is dropped at the end."""
    return settings_of(cassandra, keyspace, request_timeout_seconds=30).cassandra


def test_tokens_are_those_that_cassandra_computes(settings: Cassandra) -> None:
    migrate(Settings(cassandra=settings), lambda _: None)
    with driver.connected(settings, keyspace=settings.keyspace) as connection:
        for device in DEVICES[-20:]:
            if device:  # Cassandra takes no empty partition key
                connection.session.execute(
                    "UPDATE shadow SET updated_at = 0 WHERE device = %s", (device,)
                )
        tokens = dict(connection.session.execute("SELECT device, token(device) FROM shadow"))
    assert tokens == {device: token_of(device) for device in DEVICES[-20:] if device}


def test_a_real_cluster_is_followed_from_before_its_keyspace_exists(settings: Cassandra) -> None:
    topology = Topology()
    seen: list[Snapshot] = []
    known = threading.Event()

    def on_change(snapshot: Snapshot) -> None:
        seen.append(snapshot)
        if snapshot.distinct:
            known.set()

    topology.start(settings, refresh_seconds=0.2, on_change=on_change)
    try:
        with pytest.raises(RuntimeError, match="already"):
            topology.start(settings)
        assert topology.single
        migrate(Settings(cassandra=settings), lambda _: None)
        assert known.wait(60)
    finally:
        assert topology.stop(30)
    assert topology.snapshot == seen[-1]
    assert (topology.snapshot.nodes, topology.snapshot.distinct) == (1, 1)
    assert topology.refreshes >= 2
    assert topology.stop()


def test_without_cassandra_it_starts_stays_one_group_and_stops(settings: Cassandra) -> None:
    topology = Topology()
    topology.start(settings.model_copy(update={"port": 1}))
    assert topology.single
    assert topology.group("device") == 0
    assert topology.stop(30)
    assert topology.refreshes == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_nodes_migrate_at_once_and_make_a_group_each_when_every_row_has_one_replica() -> None:
    with CassandraCluster(2, heap="512M") as cluster:
        usual = Cassandra(
            contact_points=cluster.contact_points,
            port=cluster.port,
            local_dc=cluster.nodes[0].dc,
            keyspace="every_row_twice",
            request_timeout_seconds=30,
        )
        with ThreadPoolExecutor(4) as pool:
            reports = list(
                pool.map(lambda _: migrate(Settings(cassandra=usual), lambda _: None), range(4))
            )
        assert {report.replication[usual.local_dc] for report in reports} == {2}
        once = usual.model_copy(update={"keyspace": "every_row_once", "replication": "1"})
        migrate(Settings(cassandra=once), lambda _: None)
        with driver.connected(once, metadata=True) as connection:
            metadata = connection.cluster.metadata
            assert snapshot_of(metadata, usual.keyspace, usual.local_dc).single
            topology = Topology(snapshot_of(metadata, once.keyspace, once.local_dc))
            owners = {
                (topology.group(device), metadata.get_replicas(once.keyspace, device.encode())[0])
                for device in DEVICES
            }
        assert topology.snapshot.distinct == topology.snapshot.nodes == 2
        assert len(owners) == 2
