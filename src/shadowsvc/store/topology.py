"""Which devices share a replica set: the map from token to group.

Lives here: the groups by which batches are planned, read from cassandra-driver's metadata in a
thread of its own. Rules: the event loop only ever reads `Topology.snapshot`, an immutable object
that the thread replaces whole, so a look-up never waits and never sees half a ring. A wrong group
costs the coordinator a hop, never correctness: until the ring is known there is one group.
Must not come in: batches, and writes of any kind.

A group is a set of replicas of the local data centre, whatever their order, since the coordinator
writes to each of them at once (`replica_set` of the Spark Cassandra Connector). Tokens follow
Cassandra's `Murmur3Partitioner`: the 64-bit half of its own variant of MurmurHash3 over the UTF-8
bytes of the partition key; a token belongs to the first node token that is not smaller, and beyond
the last one to the first.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from cassandra.metadata import Murmur3Token
from cassandra.policies import HostStateListener

from shadowsvc.backoff import wait_seconds
from shadowsvc.errors import StoreError
from shadowsvc.store import driver

try:
    from cassandra.cmurmur3 import murmur3
except ImportError:  # the driver was built without its C extensions
    from cassandra.murmur3 import murmur3

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shadowsvc.settings import Cassandra

__all__ = ["UNKNOWN", "Replica", "Snapshot", "Topology", "snapshot_of"]

_log = structlog.get_logger(__name__)

_MINIMUM = -(1 << 63)
_MAXIMUM = (1 << 63) - 1


class Replica(NamedTuple):
    """Where a node answers CQL, and the name that its certificate has to have."""

    address: str
    port: int
    name: str


class Snapshot(NamedTuple):
    """The ring at one moment.

    `single` tells that all tokens share one replica set, so that every group is 0. `tokens` are the
    upper ends of the ranges, ascending, neighbours of one group joined; `groups` has one entry
    more, for what wraps around. `distinct` counts the groups, `nodes` the nodes of the local data
    centre; both are 0 while nothing is known. `replicas` has those of each group, sorted.
    """

    single: bool
    tokens: tuple[int, ...]
    groups: tuple[int, ...]
    distinct: int
    nodes: int
    replicas: tuple[tuple[Replica, ...], ...] = ()

    @classmethod
    def build(cls, ranges: Iterable[tuple[int, frozenset[Replica]]], nodes: int) -> Snapshot:
        """Make it from `(upper end, replicas)` of every range of the ring, ascending.

        Groups are numbered by first appearance, so the same ring gives the same numbers.
        """
        numbers: dict[frozenset[Replica], int] = {}
        tokens: list[int] = []
        groups: list[int] = []
        for token, replicas in ranges:
            group = numbers.setdefault(replicas, len(numbers))
            if groups and groups[-1] == group:
                tokens[-1] = token
            else:
                tokens.append(token)
                groups.append(group)
        members = tuple(tuple(sorted(replicas)) for replicas in numbers)
        if len(numbers) <= 1:
            return cls(True, (), (0,), len(numbers), nodes, members)
        groups.append(groups[0])
        return cls(False, tuple(tokens), tuple(groups), len(numbers), nodes, members)

    def group(self, device: str) -> int:
        """Return the group of `device`'s partition: 0 up to, not including, `distinct`."""
        if self.single:
            return 0
        return self.groups[bisect_left(self.tokens, token_of(device))]


UNKNOWN = Snapshot(True, (), (0,), 0, 0)
"""Before the ring is known: one group."""


def token_of(device: str) -> int:
    """Return the token of a partition whose key is the one text `device`."""
    token: int = murmur3(device.encode())
    return token if token != _MINIMUM else _MAXIMUM


def snapshot_of(metadata: Any, keyspace: str, local_dc: str) -> Snapshot:
    """Read the ring out of cassandra-driver's `Metadata`; `UNKNOWN` where it cannot tell.

    That is so for another partitioner, before the keyspace exists, and for a strategy of
    replication that the driver does not know.
    """
    token_map = metadata.token_map
    nodes = sum(host.datacenter == local_dc for host in metadata.all_hosts())
    if (
        token_map is None
        or token_map.token_class is not Murmur3Token
        or keyspace not in metadata.keyspaces
    ):
        return UNKNOWN._replace(nodes=nodes)
    ranges: list[tuple[int, frozenset[Replica]]] = []
    for token in token_map.ring:
        replicas = token_map.get_replicas(keyspace, token)
        local = frozenset(_replica(host) for host in replicas if host.datacenter == local_dc)
        ranges.append((token.value, local))
    if not any(replicas for _, replicas in ranges):
        return UNKNOWN._replace(nodes=nodes)
    return Snapshot.build(ranges, nodes)


def _replica(host: Any) -> Replica:
    endpoint = host.endpoint
    name = (endpoint.ssl_options or {}).get("server_hostname", endpoint.address)
    return Replica(endpoint.address, endpoint.port, name)


class Topology:
    """The newest snapshot, kept up to date by a thread.

    Without `start` it stays what it was given: one group unless told otherwise. `start` and `stop`
    belong to one thread; `snapshot`, `single` and `group` to any.
    """

    def __init__(self, snapshot: Snapshot = UNKNOWN) -> None:
        """Make it with `snapshot`; nothing runs yet."""
        self.snapshot = snapshot
        self.refreshes = 0
        """how often the ring was read since the start"""
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def single(self) -> bool:
        """Whether every device is in group 0 at this moment."""
        return self.snapshot.single

    def group(self, device: str) -> int:
        """Return the group of `device`; see `Snapshot.group`, repeated here since calls cost."""
        snapshot = self.snapshot
        if snapshot.single:
            return 0
        return snapshot.groups[bisect_left(snapshot.tokens, murmur3(device.encode()))]

    def start(
        self,
        settings: Cassandra,
        *,
        refresh_seconds: float = 60.0,
        on_change: Callable[[Snapshot], None] | None = None,
    ) -> None:
        """Begin to follow the cluster; returns at once, whether Cassandra is there or not.

        The ring is read when nodes or tokens change and every `refresh_seconds`. `on_change` is
        called in the thread with each snapshot that differs from the one before; it must be quick.
        Raises `RuntimeError` if it runs already.
        """
        if self._thread is not None:
            raise RuntimeError("the topology is being followed already")
        self._stopping = False
        self._wake.clear()
        self._thread = threading.Thread(
            target=self._follow,
            args=(settings, refresh_seconds, on_change),
            name="topology",
            daemon=True,
        )
        self._thread.start()

    def stop(self, timeout_seconds: float = 5.0) -> bool:
        """Stop following; False if the thread has not ended within `timeout_seconds`.

        It may be inside a connect, whose time-out it then waits for; it ends by itself after that.
        Blocks; doing it twice is fine.
        """
        thread = self._thread
        if thread is None:
            return True
        self._stopping = True
        self._wake.set()
        thread.join(timeout_seconds)
        if thread.is_alive():
            return False
        self._thread = None
        return True

    def _follow(
        self,
        settings: Cassandra,
        refresh_seconds: float,
        on_change: Callable[[Snapshot], None] | None,
    ) -> None:
        failures = 0
        while not self._stopping:
            try:
                with driver.connected(settings, metadata=True) as connection:
                    if failures:
                        _log.info("topology_connected", attempts=failures + 1)
                    failures = 0
                    self._watch(connection, settings, refresh_seconds, on_change)
            except StoreError as error:
                failures += 1
                if failures == 1 and not self._stopping:
                    _log.warning("topology_unavailable", kind=error.kind, error=str(error))
                self._pause(settings, failures)
            except Exception:  # noqa: BLE001
                # Grouping is an optimisation: it must not end for good, whatever the driver does.
                failures += 1
                if failures == 1 and not self._stopping:
                    _log.exception("topology_failed")
                self._pause(settings, failures)

    def _watch(
        self,
        connection: driver.Connection,
        settings: Cassandra,
        refresh_seconds: float,
        on_change: Callable[[Snapshot], None] | None,
    ) -> None:
        cluster = connection.cluster
        cluster.register_listener(_Listener(self._wake))
        while True:
            self._wake.clear()
            if self._stopping:
                return
            snapshot = snapshot_of(cluster.metadata, settings.keyspace, connection.local_dc)
            self.refreshes += 1
            if snapshot != self.snapshot:
                self.snapshot = snapshot
                _log.info("topology", groups=snapshot.distinct, nodes=snapshot.nodes)
                if on_change is not None:
                    on_change(snapshot)
            # Soon again while the keyspace does not exist: its creation is no event of nodes.
            self._wake.wait(refresh_seconds if snapshot.distinct else min(refresh_seconds, 5.0))
            if not self._stopping:
                # The driver follows events by itself, but one that it missed stays missed.
                cluster.refresh_nodes(force_token_rebuild=True)
                cluster.refresh_keyspace_metadata(settings.keyspace)

    def _pause(self, settings: Cassandra, failures: int) -> None:
        self._wake.clear()
        if not self._stopping:
            self._wake.wait(
                wait_seconds(failures, settings.retry_min_seconds, settings.retry_max_seconds)
            )


class _Listener(HostStateListener):  # type: ignore[misc] # the driver is untyped
    """Wake the thread when nodes come or go; `on_up` too, since a node may return with tokens."""

    def __init__(self, wake: threading.Event) -> None:
        self._wake = wake

    def on_up(self, host: Any) -> None:  # noqa: ARG002 - the driver's interface
        self._wake.set()

    def on_down(self, host: Any) -> None:
        """Ignore it: a node that is down keeps its tokens."""

    def on_add(self, host: Any) -> None:  # noqa: ARG002 - likewise
        self._wake.set()

    def on_remove(self, host: Any) -> None:  # noqa: ARG002 - likewise
        self._wake.set()
