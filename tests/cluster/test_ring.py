"""Batches follow the ring: devices that are written together have the same replicas.

Where each device lies is worked out here from the nodes' own tokens, not by the code under test.
These tests change the ring for good, so their file comes last.
"""

from __future__ import annotations

import asyncio
import gc
import warnings
from bisect import bisect_left
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest
from cassandra.murmur3 import murmur3

from shadowsvc.app import Service
from shadowsvc.config import load
from shadowsvc.store.cassandra import CassandraStore
from tests.cluster.conftest import START_SECONDS, UP_SECONDS, reader
from tests.oracle import Load, Oracle
from tests.service import variables
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    import backing
    from backing import CassandraCluster

pytestmark = pytest.mark.timeout(580)

Entered = TypeVar("Entered", Load, Oracle)
REPLICAS = 2
BATCHES = 60


class Ring:
    """The tokens of the nodes as one of them tells them, and who holds what.

    All nodes are in one rack: a row lies on the node of its token and on the next other ones
    (`NetworkTopologyStrategy`).
    """

    def __init__(self, cluster: CassandraCluster) -> None:
        tokens = []
        with cluster.session() as session:  # with one node: what it says of itself and of its peers
            local = session.execute("SELECT host_id, tokens FROM system.local").one()
            for row in [local, *session.execute("SELECT host_id, tokens FROM system.peers_v2")]:
                tokens += [(int(token), row.host_id) for token in row.tokens]
        self._owners = sorted(tokens)
        self._ends = [token for token, _ in self._owners]
        self.nodes = len({owner for _, owner in tokens})

    def replicas(self, device: str) -> frozenset[Any]:
        at = bisect_left(self._ends, murmur3(device.encode()))
        found: list[Any] = []
        for index in range(len(self._owners)):
            owner = self._owners[(at + index) % len(self._owners)][1]
            if owner not in found:
                found.append(owner)
            if len(found) == REPLICAS:
                break
        return frozenset(found)


@pytest.fixture(autouse=True)
def _sockets_of_the_driver() -> Iterator[None]:
    """Let go of the pairs of sockets that acsylla leaves to the garbage collector."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The devices of every request of the service, oldest first."""
    seen: list[list[str]] = []
    right = CassandraStore.write

    def write(self: CassandraStore, mutations: Sequence[Any]) -> Any:
        seen.append([mutation.device for mutation in mutations])
        return right(self, mutations)

    monkeypatch.setattr(CassandraStore, "write", write)
    return seen


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what, UP_SECONDS)


async def test_batches_stay_within_replica_sets_while_a_node_joins(
    broker: backing.Broker,
    cluster: CassandraCluster,
    make_keyspace: Callable[[int], str],
    unique: str,
    batches: list[list[str]],
) -> None:
    keyspace = await asyncio.to_thread(make_keyspace, REPLICAS)
    settings = variables(
        broker,
        cast("backing.Database", cluster),
        keyspace,
        unique,
        CASSANDRA__LINGER_SECONDS=0.02,
        LIMITS__ISOLATE_AFTER_SECONDS=900,
        DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE=1_000_000,
    )
    async with AsyncExitStack() as stack:
        session = stack.enter_context(reader(cluster))
        ring = await asyncio.to_thread(Ring, cluster)
        assert ring.nodes == 3
        service = await stack.enter_async_context(serving(Service(load(settings))))
        await until(lambda: service.health.ready, "the service is ready")
        await until(lambda: service.topology.snapshot.distinct == 3, "the ring is known")
        before = service.topology.snapshot
        oracle = await stack.enter_async_context(
            in_thread(Oracle(broker, session, keyspace, unique))
        )
        async with in_thread(Load(oracle, unique, count=200, burst=10)):
            await until(lambda: several(batches) > BATCHES, "there are batches of several devices")
            assert_grouped(batches, ring)

            node = cluster.add()
            await asyncio.to_thread(node.start, START_SECONDS)
            await until(lambda: service.topology.snapshot != before, "the ring has changed")
            await until(lambda: service.topology.snapshot.nodes == 4, "four nodes are known")
            assert service.topology.snapshot.distinct > before.distinct
            await asyncio.sleep(0.5)  # batches planned before are written
            batches.clear()
            await until(lambda: several(batches) > BATCHES, "there are batches of several devices")
            grown = await asyncio.to_thread(Ring, cluster)
            assert grown.nodes == 4
            assert_grouped(batches, grown)
            # By the old ring they would not have been right: the change was followed.
            assert any(len({ring.replicas(name) for name in batch}) > 1 for batch in batches)
        await asyncio.to_thread(oracle.wait_taken)
        await asyncio.to_thread(oracle.wait_right, 120)


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[Service]:
    """Run a service in this loop."""
    stop = asyncio.Event()
    await service.start()
    supervisor = asyncio.create_task(service.supervise(stop))
    try:
        yield service
    finally:
        stop.set()
        await supervisor
        await service.stop()


@asynccontextmanager
async def in_thread(what: Entered) -> AsyncIterator[Entered]:
    """Enter and leave in a thread: both wait for answers that this loop has to give."""
    await asyncio.to_thread(what.__enter__)
    try:
        yield what
    finally:
        await asyncio.to_thread(what.__exit__, None, None, None)


def several(batches: list[list[str]]) -> int:
    return sum(len(batch) > 1 for batch in list(batches))


def assert_grouped(batches: list[list[str]], ring: Ring) -> None:
    seen = list(batches)
    for batch in seen:
        assert len({ring.replicas(device) for device in batch}) == 1, batch
    # The groups really differ, so that this says something.
    assert len({ring.replicas(batch[0]) for batch in seen}) >= 3
