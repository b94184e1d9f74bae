"""Three real Cassandra nodes, which the tests here kill, freeze and replace.

Rules: the nodes start once for all tests; each test finds all of them up, and has keyspaces of its
own; rows are read back at LOCAL_QUORUM, since a node that was away has not all of them. They are
marked `cluster` and run by `scripts/test --all`, in a group of their own.
"""

from __future__ import annotations

import uuid
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from cassandra import ConsistencyLevel, OperationTimedOut, ReadTimeout, Unavailable
from cassandra.cluster import EXEC_PROFILE_DEFAULT

from backing import CassandraCluster, connect
from tests.keyspaces import make_schema
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import backing

HERE = Path(__file__).parent
UP_SECONDS = 180.0
# What confirmed writes a killed node may forget would hide what the service did wrong.
_SETTINGS = {"commitlog_sync": "batch"}
# Nodes that live for minutes spend them on compiling, unless they are told to be quick about it.
_JVM = ("-XX:TieredStopAtLevel=1", "-XX:-UseG1GC", "-XX:+UseSerialGC")
START_SECONDS = 240.0
"""Three JVMs share what processors there are."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def three() -> Iterator[CassandraCluster]:
    cluster = CassandraCluster(3, heap="384M", settings=_SETTINGS, jvm_options=_JVM)
    try:
        cluster.start(START_SECONDS)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def cluster(three: CassandraCluster) -> Iterator[CassandraCluster]:
    """The nodes, all of them up, before the test and after it."""
    make_whole(three)
    yield three
    make_whole(three)


def make_whole(cluster: CassandraCluster) -> None:
    """Start what does not run, and wait until every node sees every other."""
    cluster.start(START_SECONDS)
    for node in cluster.nodes:
        with connect((node.address,), cluster.port) as session:
            profile = session.get_execution_profile(EXEC_PROFILE_DEFAULT)
            profile.consistency_level = ConsistencyLevel.ALL
            wait_until(partial(sees_all, session), f"{node.address} sees all nodes", UP_SECONDS)


def sees_all(session: Any) -> bool:
    """Whether the node that is asked finds a replica of everything on every node."""
    try:
        # Cassandra keeps three copies of this keyspace; the table is empty.
        session.execute("SELECT parent_id FROM system_distributed.parent_repair_history")
    except (Unavailable, ReadTimeout, OperationTimedOut):
        return False
    return True


def nodes_up(session: Any) -> int:
    """Return how many of the nodes that the session is connected to are up."""
    return sum(bool(host.is_up) for host in session.cluster.metadata.all_hosts())


@pytest.fixture
def make_keyspace(cluster: CassandraCluster) -> Callable[[int], str]:
    """Make keyspaces with the schema, each row so many times."""

    def make(replicas: int) -> str:
        name = f"c{uuid.uuid4().hex[:12]}"
        database = cast("backing.Database", cluster)
        make_schema(database, name, replicas=replicas, request_timeout_seconds=30)
        return name

    return make


@contextmanager
def reader(cluster: CassandraCluster) -> Iterator[Any]:
    """Connect to the nodes of now, to read at LOCAL_QUORUM."""
    points = [node.address for node in cluster.nodes if node.running]
    with connect(points, cluster.port) as session:
        profile = session.get_execution_profile(EXEC_PROFILE_DEFAULT)
        profile.consistency_level = ConsistencyLevel.LOCAL_QUORUM
        yield session
