"""Own connections to Cassandra for tests of the store, without a ring to follow."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from shadowsvc.store.topology import Replica, Snapshot

if TYPE_CHECKING:
    from shadowsvc.store.cassandra import CassandraStore

__all__ = ["CONNECT_SECONDS", "connect_directly", "one_node", "wait_connections"]

CONNECT_SECONDS = 20.0


def one_node(address: str, port: int, name: str = "") -> Snapshot:
    """Return a ring of one node."""
    return Snapshot.build([(0, frozenset({Replica(address, port, name or address)}))], 1)


async def wait_connections(store: CassandraStore, count: int) -> None:
    """Wait until that many own connections can be used."""
    async with asyncio.timeout(CONNECT_SECONDS):
        while store.direct.connections != count:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def connect_directly(store: CassandraStore) -> None:
    """Connect to the first contact point, which has to be an address."""
    settings = store.settings
    store.follow(one_node(settings.contact_points[0], settings.port))
    await wait_connections(store, 1)
