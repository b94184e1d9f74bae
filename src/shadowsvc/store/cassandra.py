"""The data plane: shadows and dead letters into Cassandra.

Lives here: the only use of acsylla, prepared statements, and the making of one request from a
batch. Batches of shadows go by `store.direct` where it has a connection, by acsylla else, as all
the rest does. What errors mean stands in `store.faults`. Rules: a call returns only after
Cassandra confirmed the write at the configured consistency; times go with each statement (`USING
TIMESTAMP ?`), never with a batch, so a repetition writes the same cells again; text is bound as
bytes without U+0000 (the driver binds C strings); the driver retries nothing by itself; no more
than `MAX_IN_FLIGHT` requests are at it. Must not come in: retrying, planning, acks.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

import acsylla
import structlog

from shadowsvc.credentials import load, system_authorities
from shadowsvc.errors import CredentialsUnusable, StoreError, StoreUnavailable
from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.update import Update
from shadowsvc.store.direct import Direct, Unprepared
from shadowsvc.store.endpoints import by_name
from shadowsvc.store.faults import mapped
from shadowsvc.store.migrate import SELECT_VERSIONS, verify
from shadowsvc.store.statements import HEARD, STATEMENTS, statements_of
from shadowsvc.store.thresholds import DEFAULT, BatchLimits
from shadowsvc.window import MAX_IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shadowsvc.config import Cassandra
    from shadowsvc.credentials import Credentials
    from shadowsvc.shadow.update import Mutations
    from shadowsvc.store.deadletter import DeadLetter
    from shadowsvc.store.direct import Wire
    from shadowsvc.store.topology import Snapshot

__all__ = ["PROBE_DEVICE", "CassandraStore"]

_log = structlog.get_logger(__name__)

PROBE_DEVICE = "$shadowsvc"
"""Partition of the store's own probe; no device can have this name (`shadow.topic`)."""

# Nothing of a device is ever part of a statement's text.
# ruff: noqa: S608
_STATEMENTS = {
    **STATEMENTS,
    "read_reported": "SELECT path, value, WRITETIME(value) AS time_us FROM {keyspace}.shadow "
    "WHERE device = ? AND shadow = ? AND section = 'reported'",
    "dead_letter": "INSERT INTO {keyspace}.dead_letter (bucket, shard, received_at, id, "
    "client_id, device, topic, reason, detail, payload, payload_bytes, payload_sha256, qos, "
    "retain, duplicate, user_properties, device_time) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) USING TTL ?",
}

# cassandra.h's CASS_SSL_VERIFY_PEER_CERT (1, the chain) and …_PEER_IDENTITY (2) or …_DNS (4): the
# latter do not imply the former. As numbers, since acsylla 1.2 knows no sums of them, and its
# SSLVerifyFlags.PEER_IDENTITY has the value of PEER_CERT.
_VERIFY_ADDRESS = 1 | 2
_VERIFY_NAME = 1 | 4

_NUMBER = re.compile(r"\d+")
_DRIVER_LEVELS = {"CRITICAL": "error", "ERROR": "error", "WARN": "warning"}


class _Uncancelled(asyncio.Task[Any]):
    """A connect of the driver, which ends by its time-outs alone.

    Cancelled, it would free the session that it makes, and freeing one that connects waits for
    ever, on the thread of the loop.
    """

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ARG002 - its only argument
        return False


class CassandraStore:
    """One acsylla session and its statements. Belongs to the running event loop."""

    def __init__(
        self,
        settings: Cassandra,
        *,
        dead_letter_ttl_seconds: int,
        credentials: Credentials | None = None,
    ) -> None:
        """Make it, unconnected; without `credentials` those of the settings are read."""
        self.settings = settings
        self.limits = _chosen(settings, DEFAULT)
        """What a batch may have now."""
        self.on_limits: Callable[[BatchLimits], None] | None = None
        """Called with each change of `limits`."""
        self._ttl = dead_letter_ttl_seconds
        self._timeout = settings.request_timeout_seconds
        self._credentials = credentials
        self._in_use = credentials
        self._connecting = asyncio.Lock()
        # Of all who use this store together; each has a window of its own below it.
        self._places = asyncio.Semaphore(MAX_IN_FLIGHT)
        # One for good: each has a socket pair and a reader on the loop of its own. What a session
        # is made with is copied out of it, so it takes other credentials while an older one lives.
        self._cluster: Any = None
        self._retiring: asyncio.Task[None] | None = None
        self._session: Any = None
        self._connect: _Uncancelled | None = None
        self._execute_batch: Any = None
        self._statements: dict[str, Any] = {}
        self.direct = Direct(
            settings,
            {name: text.format(keyspace=settings.keyspace) for name, text in STATEMENTS.items()},
        )
        if "auto" in {settings.batch_max_partitions, settings.batch_max_bytes}:
            self.direct.on_limits = self._learned
        self.batches = {"direct": 0, "driver": 0}
        """Batches of shadows that were sent, by the way that they took."""

    @property
    def connected(self) -> bool:
        """Whether statements are prepared, which needs Cassandra and the schema once."""
        return bool(self._statements)

    async def connect(self) -> None:
        """Connect and prepare. Raises `StoreUnavailable` or `SchemaBehind`; call it again then."""
        async with self._connecting:
            if self._session is None:
                self._session = await self._new_session()
            await self.check_schema()
            self._use(self._session, await self._prepare(self._session))

    async def renew(self, credentials: Credentials | None = None) -> None:
        """Put a session with other credentials, or the same once more, in the place of this one.

        Requests go on meanwhile; the old session is closed when those on it have ended. Raises
        `StoreError`: then the old session stays. Unconnected it changes what `connect` will use.
        """
        async with self._connecting:
            if credentials is not None:
                self._credentials = credentials
            if self._session is None:
                return
            if not self._statements:  # half-way through `connect`, which makes another session
                session, self._session = self._session, None
                await session.close()
                return
            if self._retiring is not None:
                await asyncio.wait([self._retiring])  # never more than two at a time
            session = await self._new_session()
            try:
                statements = await self._prepare(session)
            except BaseException:
                await session.close()
                raise
            old = self._session
            self._use(session, statements)
            self._retiring = asyncio.create_task(self._retire(old), name="retire session")

    async def _new_session(self) -> Any:
        """Return a session of its own with the present credentials."""
        credentials = self._credentials
        if credentials is None:
            try:
                credentials = await asyncio.to_thread(load, "cassandra", self.settings)
            except CredentialsUnusable as error:
                raise StoreUnavailable("tls", str(error)) from None
        if self._cluster is None:
            self._cluster = _cluster(self.settings)
        self._in_use = credentials
        authorities = None
        if self.settings.tls:
            authorities = credentials.ca or await asyncio.to_thread(system_authorities)
        try:
            _configure(self._cluster, self.settings, credentials, authorities)
            connect = self._cluster.create_session(keyspace=self.settings.keyspace)
            self._connect = _Uncancelled(connect, name="connect to Cassandra")
            return await asyncio.shield(self._connect)
        except Exception as error:
            raise mapped(error) from error

    async def _prepare(self, session: Any) -> dict[str, Any]:
        statements = {}
        for name, text in _STATEMENTS.items():
            try:
                statements[name] = await session.create_prepared(
                    text.format(keyspace=self.settings.keyspace), timeout=self._timeout
                )
            except Exception as error:
                raise mapped(error) from error
        return statements

    def _use(self, session: Any, statements: dict[str, Any]) -> None:
        self._session = session
        self._execute_batch = session.execute_batch
        self._statements = statements
        self.direct.use(self._in_use)

    async def _retire(self, session: Any) -> None:
        """Close a session when every request on it has ended, by its time-out at the latest."""
        try:
            await asyncio.sleep(2 * self._timeout)
        finally:
            try:
                await session.close()
            except Exception as error:  # noqa: BLE001 - it is gone all the same
                _log.info("old session not closed", error=str(mapped(error)))

    async def close(self) -> None:
        """Close the session; await every write before.

        A connect that was given up is awaited: `connect_timeout_seconds` an address, at most.
        """
        if self._connect is not None:
            await asyncio.wait([self._connect])
            if self._connect.exception() is None and self._connect.result() is not self._session:
                await self._connect.result().close()
        if self._retiring is not None:
            self._retiring.cancel()
            await asyncio.wait([self._retiring])
        await self.direct.close()
        session, self._session = self._session, None
        self._statements = {}
        if session is not None:
            await session.close()

    def _learned(self, allowed: BatchLimits) -> None:
        """Take what the nodes allow for what the settings leave open."""
        limits = _chosen(self.settings, allowed)
        if limits == self.limits:
            return
        self.limits = limits
        _log.info("batches", max_partitions=limits.partitions, max_bytes=limits.size_bytes)
        if self.on_limits is not None:
            self.on_limits(limits)

    def follow(self, snapshot: Snapshot) -> None:
        """Send batches directly to the replicas that this ring names."""
        if self.settings.direct:
            self.direct.follow(snapshot)

    async def write(self, mutations: Sequence[Mutations | Update]) -> None:
        """Write, durably at the configured consistency, what is to be written for some devices.

        One unlogged batch, to be of one replica set. Raises `StoreUnavailable` or `StoreRefused`:
        then any part of it may have been written, and writing it again is safe.
        """
        try:
            wire = self.direct.wire_for(mutations[0].device)
            if wire is not None and await self._write_directly(wire, mutations):
                return
            self.batches["driver"] += 1
            batch = acsylla.create_batch_unlogged(timeout=self._timeout)
            self._fill(
                (merge((part,)) if isinstance(part, Update) else part for part in mutations),
                batch.add_statement,
            )
            async with self._places:
                await self._execute_batch(batch)
        except StoreError:
            raise
        except Exception as error:
            raise mapped(error) from error

    async def _write_directly(self, wire: Wire, mutations: Sequence[Mutations | Update]) -> bool:
        """Write by an own connection; False if the driver has to, since nothing was written."""
        try:
            await wire.write(mutations)
        except Unprepared:
            return False
        except StoreError:
            self.batches["direct"] += 1
            raise
        self.batches["direct"] += 1
        return True

    async def write_in_parts(
        self, mutations: Mutations, on_part: Callable[[], None] | None = None
    ) -> None:
        """Write one device's mutations that are too large for one request, part by part.

        `on_part` is called after each part. Raises as `write` does.
        """
        statements: list[Any] = []
        self._fill((mutations,), statements.append)
        size = sum(len(value) + len(path) for _, value, _, _, path in mutations.writes)
        size += 64 * len(statements) + sum(2 * len(path) for *_, path in mutations.deletes)
        parts = max(1, -(-size // self.limits.size_bytes))
        step = max(1, -(-len(statements) // parts))
        for at in range(0, len(statements), step):
            batch = acsylla.create_batch_unlogged(timeout=self._timeout)
            for statement in statements[at : at + step]:
                batch.add_statement(statement)
            try:
                async with self._places:
                    await self._execute_batch(batch)
            except Exception as error:
                raise mapped(error) from error
            if on_part is not None:
                on_part()

    async def write_dead_letter(self, letter: DeadLetter) -> None:
        """Write one dead letter. Raises `StoreError`."""
        await self._execute(
            self._statements["dead_letter"].bind(
                [
                    _stamp(letter.bucket_ms * 1000),
                    letter.shard,
                    _stamp(letter.received_ms * 1000),
                    str(letter.id),
                    letter.client_id,
                    letter.device,
                    letter.topic,
                    letter.reason,
                    letter.detail,
                    letter.payload,
                    letter.payload_bytes,
                    letter.payload_sha256,
                    letter.qos,
                    letter.retain,
                    letter.duplicate,
                    letter.user_properties,
                    None if letter.device_ms is None else _stamp(letter.device_ms * 1000),
                    self._ttl,
                ],
                timeout=self._timeout,
            )
        )

    async def write_probe(self) -> None:
        """Write a row that can't be refused, to tell a bad update from a bad day."""
        now_us = time.time_ns() // 1000
        await self._execute(
            self._statements["write"].bind(
                [now_us, b"true", PROBE_DEVICE, "", "reported", "/probe"], timeout=self._timeout
            )
        )

    async def read_reported(self, device: str, shadow: str) -> dict[str, tuple[str, int]]:
        """Return value (JSON) and write time (µs) of each reported leaf of a small shadow, by path.

        At LOCAL_QUORUM: what was confirmed at that or above is seen. Raises `StoreError`.
        """
        result = await self._execute(
            self._statements["read_reported"].bind(
                [device, shadow],
                timeout=self._timeout,
                consistency=acsylla.Consistency.LOCAL_QUORUM,
            )
        )
        rows = (row.as_tuple() for row in result)
        return {path: (value, time_us) for path, value, time_us in rows if value is not None}

    async def check_schema(self) -> None:
        """Raise `SchemaBehind` or `SchemaConflict` unless the schema is what this release needs."""
        statement = acsylla.create_statement(SELECT_VERSIONS, timeout=self._timeout)
        verify(row.as_tuple() for row in await self._execute(statement))

    async def gc_grace_seconds(self) -> int:
        """Return `gc_grace_seconds` of the table of shadows: how long deletes are remembered."""
        result = await self._execute(
            acsylla.create_statement(
                "SELECT gc_grace_seconds FROM system_schema.tables WHERE keyspace_name = "
                f"'{self.settings.keyspace}' AND table_name = 'shadow'",
                timeout=self._timeout,
            )
        )
        row = result.first()
        return 0 if row is None else int(row.column_value("gc_grace_seconds"))

    async def clock_offset_seconds(self) -> float:
        """Return this machine's clock less the coordinator's, which counts milliseconds.

        The question and the answer are taken to be as long under way as each other.
        """
        asked = time.time()
        result = await self._execute(
            acsylla.create_statement(
                "SELECT toUnixTimestamp(now()) AS now FROM system.local", timeout=self._timeout
            )
        )
        theirs = int(result.first().column_value("now")) / 1000
        return (asked + time.time()) / 2 - theirs

    async def _execute(self, statement: Any) -> Any:
        try:
            async with self._places:
                return await self._session.execute(statement)
        except Exception as error:
            raise mapped(error) from error

    def _fill(self, mutations: Iterable[Mutations], add: Any) -> None:
        """Hand every statement of `mutations` to `add`."""
        for mutation in mutations:
            for name, time_us, value, texts in statements_of(mutation):
                values: list[Any] = [time_us]
                if value is not None:
                    values.append(value)
                if name in HEARD:
                    values.append(_stamp(time_us))
                add(self._statements[name].bind([*values, *texts]))


def _chosen(settings: Cassandra, allowed: BatchLimits) -> BatchLimits:
    partitions, size_bytes = settings.batch_max_partitions, settings.batch_max_bytes
    return BatchLimits(
        allowed.partitions if partitions == "auto" else partitions,
        allowed.size_bytes if size_bytes == "auto" else size_bytes,
    )


def _cluster(settings: Cassandra) -> Any:
    """Build the driver's cluster object, without credentials."""
    return acsylla.create_cluster(
        list(settings.contact_points),
        port=settings.port,
        connect_timeout=settings.connect_timeout_seconds,
        request_timeout=settings.request_timeout_seconds,
        consistency=acsylla.Consistency[settings.consistency],
        load_balance_dc_aware=settings.local_dc,
        protocol_version=acsylla.ProtocolVersion.V4,
        exponential_reconnect_base_delay_ms=200,
        exponential_reconnect_max_delay_ms=2000,
        retry_policy="fallthrough",
        heartbeat_interval_sec=5,
        idle_timeout_sec=15,
        tcp_keepalive_sec=15,
        # A millisecond for requests to share a system call.
        coalesce_delay_us=1000,
        log_level="warn",
        logging_callback=_driver_log,
        application_name="shadowsvc",
        hostname_resolution=settings.tls and by_name(settings.contact_points),
    )


def _configure(
    cluster: Any, settings: Cassandra, credentials: Credentials, authorities: str | None
) -> None:
    """Set what the next session logs in with, and whom it trusts. The host's name is checked."""
    if credentials.username is not None and credentials.password is not None:
        cluster.set_credentials(credentials.username, credentials.password.get_secret_value())
    if settings.tls:
        cluster.set_ssl(
            True,
            credentials.certificate,
            credentials.key,
            "",
            authorities,
            _VERIFY_NAME if by_name(settings.contact_points) else _VERIFY_ADDRESS,
        )


def _stamp(time_us: int) -> float:
    """Return the seconds that the driver turns into the milliseconds of `time_us`, exactly.

    It multiplies by 1000 and cuts: the half keeps a rounded double from losing a millisecond.
    """
    return (time_us // 1000 + 0.5) / 1000


def _driver_log(message: Any) -> None:
    level = _DRIVER_LEVELS.get(str(message.log_level).upper(), "warning")
    if "sharding info" in message.message:
        level = "debug"  # every Cassandra that is not a Scylla
    # Its numbers make each another one: the driver tells a stepped clock once a second.
    kind = _NUMBER.sub("#", message.message)
    getattr(_log, level)("cassandra driver", driver_message=message.message, limit_by=kind)
