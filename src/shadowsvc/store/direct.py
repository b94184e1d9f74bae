"""Connections of our own to Cassandra's nodes, for the batches of shadows.

Lives here: a connection to each replica, made and made again; which of them a batch goes to; what
its answer means. Rules: this is a shorter way for what acsylla does as well, so whatever is amiss
here (no connection yet, a refused login, a statement that the server forgot) sends a batch by the
driver, and never stops the service; a request that was sent ends by its answer, its time-out, or
the loss of its connection, and is never sent twice from here; times go with each statement; nothing
blocks the loop. Must not come in: retrying, planning, acks, the meaning of errors (`store.faults`).

A connection is left when a request had no answer in time and nothing else was heard since, and
made again with full jitter. A login that was refused is tried again after a long wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING, Any

import structlog

from shadowsvc.backoff import login_wait_seconds, wait_seconds
from shadowsvc.errors import StoreError, StoreUnavailable
from shadowsvc.store import frames
from shadowsvc.store.faults import UNPREPARED, answered, failed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shadowsvc.credentials import Credentials
    from shadowsvc.settings import Cassandra
    from shadowsvc.shadow.update import Mutations, Update
    from shadowsvc.store.topology import Replica, Snapshot

__all__ = ["Direct", "Unprepared", "Wire"]

_log = structlog.get_logger(__name__)

_MAX_STREAMS = 1024
"""Requests on one connection, those included that timed out and may still be answered."""
_HEARTBEAT_SECONDS = 5.0
_KEEPALIVE_SECONDS = 15
_RECONNECT_MIN_SECONDS = 0.2
_RECONNECT_MAX_SECONDS = 2.0
_STEADY_SECONDS = 5.0
"""A connection that lived for so long is no sign of a server that drops each at once."""
_NUMBER = re.compile(r"\d+")


class Unprepared(Exception):
    """The server forgot the statements; nothing was written."""


class Wire(asyncio.Protocol):
    """One connection. Belongs to the running loop.

    Args:
        name: of the node, for people.
        timeout_seconds: of each request.
    """

    def __init__(self, name: str, timeout_seconds: float) -> None:
        self.name = name
        self.usable = False
        """Whether batches may be sent."""
        self.ended = asyncio.get_running_loop().create_future()
        """Done when nothing more is to be sent; says why."""
        self._timeout = timeout_seconds
        self._loop = asyncio.get_running_loop()
        self._answers = frames.Answers()
        # Never 0: Cassandra 5.0 answers so what waited in its queue for too long, whatever its
        # stream. Those free for the longest time come first, so that a late answer is told as one.
        self._free = deque(range(1, _MAX_STREAMS))
        # stream → (when it was sent, who waits), oldest first.
        self._waiting: dict[int, tuple[float, asyncio.Future[tuple[int, bytes]]]] = {}
        self._overdue: set[int] = set()
        self._heard = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: Any = None
        self._body: frames.BatchBody | None = None

    @property
    def in_flight(self) -> int:
        """Requests without an answer, those that timed out included."""
        return len(self._waiting) + len(self._overdue)

    async def log_in(self, credentials: Credentials) -> None:
        """Begin the conversation (§4.1.1, §4.1.2). Raises `StoreError`."""
        opcode, body = await self._ask(frames.STARTUP, frames.startup_body())
        if opcode == frames.AUTHENTICATE:
            username, password = credentials.username, credentials.password
            if username is None or password is None:
                raise failed("CassErrorServerBadCredentials", "a login is needed")
            login = frames.plain_login(username, password.get_secret_value())
            opcode, body = await self._ask(frames.AUTH_RESPONSE, login)
            expected = frames.AUTH_SUCCESS
        else:
            expected = frames.READY
        if opcode != expected:
            raise self._unexpected(opcode, body)

    async def prepare(self, statements: Mapping[str, str], consistency: int) -> None:
        """Prepare what batches are made of; then the connection is usable. Raises `StoreError`."""
        known: dict[str, tuple[bytes, int]] = {}
        for name, text in statements.items():
            opcode, body = await self._ask(frames.PREPARE, frames.prepare_body(text))
            if opcode != frames.RESULT:
                raise self._unexpected(opcode, body)
            try:
                known[name] = frames.prepared_id(body), text.count("?")
            except frames.BadAnswer as error:
                raise failed("CassErrorLibUnexpectedResponse", str(error)) from None
        self._body = frames.BatchBody(known, consistency)
        self.usable = True

    async def write(self, mutations: Sequence[Mutations | Update]) -> None:
        """Write one unlogged batch. Raises `StoreError`, `ValueError` or `Unprepared`."""
        body = self._body
        assert body is not None  # noqa: S101 - for the type checker: it is usable
        opcode, answer = await self._ask(frames.BATCH, body.encode(mutations))
        if opcode != frames.RESULT:
            error = self._unexpected(opcode, answer)
            if error.kind == _FORGOTTEN:
                self.usable = False
                raise Unprepared
            raise error

    async def beat(self) -> None:
        """Ask for anything, so that a connection that is dead is found. Raises `StoreError`."""
        await self._ask(frames.OPTIONS, b"")

    def _ask(self, opcode: int, body: bytes) -> asyncio.Future[tuple[int, bytes]]:
        future = self._loop.create_future()
        if not self._free or self._transport is None:
            future.set_exception(failed("CassErrorLibNoStreams", f"none is free at {self.name}"))
            return future
        stream = self._free.popleft()
        now = self._loop.time()
        self._waiting[stream] = now, future
        if self._timer is None:
            self._timer = self._loop.call_at(now + self._timeout, self._expire)
        self._transport.write(frames.frame(stream, opcode, body))
        return future

    def _unexpected(self, opcode: int, body: bytes) -> StoreError:
        if opcode == frames.ERROR:
            try:
                return answered(*frames.error_of(body))
            except frames.BadAnswer as error:
                return failed("CassErrorLibUnexpectedResponse", str(error))
        return failed("CassErrorLibUnexpectedResponse", f"opcode {opcode:#04x}")

    def _expire(self) -> None:
        """Give up what was sent too long ago; leave a connection on which nothing is heard."""
        self._timer = None
        now = self._loop.time()
        deaf = False
        while self._waiting:
            stream, (sent, future) = next(iter(self._waiting.items()))
            if now - sent < self._timeout:
                self._timer = self._loop.call_at(sent + self._timeout, self._expire)
                break
            del self._waiting[stream]
            self._overdue.add(stream)
            deaf = deaf or self._heard < sent
            if not future.done():
                future.set_exception(
                    failed("CassErrorLibRequestTimedOut", f"no answer of {self.name} in time")
                )
        if deaf:
            self.retire("nothing is heard")

    def retire(self, why: str) -> None:
        """Send nothing more, and close it when what was sent has been answered or timed out."""
        self._end(why)
        if self._waiting:
            self._loop.call_later(self._timeout, self.abort)
        else:
            self.abort()

    def abort(self) -> None:
        """Close it at once."""
        self._end("closed")
        if self._transport is not None:
            self._transport.abort()

    def _end(self, why: str) -> None:
        self.usable = False
        if not self.ended.done():
            self.ended.set_result(why)

    # ---------------------------------------------------------------- from the transport

    def connection_made(self, transport: Any) -> None:
        """Take the transport."""
        self._transport = transport
        _keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        """Hand each answer to who waits for it."""
        self._heard = self._loop.time()
        try:
            answers = self._answers.take(data)
        except frames.BadAnswer as error:
            self._end(f"what the protocol does not have: {error}")
            self.abort()
            return
        for warning in self._answers.warnings:
            _log.warning("Cassandra warns", warning=warning, limit_by=_NUMBER.sub("#", warning))
        self._answers.warnings.clear()
        waiting = self._waiting
        for stream, opcode, body in answers:
            entry = waiting.pop(stream, None)
            if entry is not None:
                future = entry[1]
                if not future.done():
                    future.set_result((opcode, body))
            elif stream in self._overdue:
                self._overdue.discard(stream)
            else:
                # Which request it belongs to nobody knows, so none on this connection is trusted.
                self._end(f"an answer that nobody waits for, stream {stream}, opcode {opcode:#04x}")
                self.abort()
                return
            self._free.append(stream)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell everybody who waits: what becomes of their requests nobody knows."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        why = f"the connection to {self.name} was lost"
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(failed("CassExceptionConnectionError", why))
        self._waiting.clear()
        self._end(why if error is None else f"{why}: {error}")


_FORGOTTEN = answered(UNPREPARED, "").kind


class Direct:
    """The connections to all replicas. Belongs to the running loop.

    Args:
        settings: of Cassandra.
        statements: text of each statement that batches are made of, by name.
    """

    def __init__(self, settings: Cassandra, statements: Mapping[str, str]) -> None:
        self.statements = statements
        self.login_retry_seconds = (10.0, 300.0)
        """Shortest and longest wait after a refused login."""
        self._settings = settings
        self._credentials: Credentials | None = None
        self._snapshot: Snapshot | None = None
        self._nodes: dict[Replica, _Node] = {}
        self._groups: list[list[_Node]] = []

    @property
    def connections(self) -> int:
        """How many can be used now."""
        return sum(node.wire is not None and node.wire.usable for node in self._nodes.values())

    def use(self, credentials: Credentials | None) -> None:
        """Log in with these from now on; connections by others end when their requests have."""
        self._credentials = credentials
        replicas = list(self._nodes)
        for replica in replicas:
            self._nodes.pop(replica).end()
        for replica in replicas:
            self._nodes[replica] = self._node(replica)
        self._regroup()

    def follow(self, snapshot: Snapshot) -> None:
        """Keep a connection to every replica of this ring, and to no other node."""
        self._snapshot = snapshot
        wanted = {replica for replicas in snapshot.replicas for replica in replicas}
        for replica in [replica for replica in self._nodes if replica not in wanted]:
            self._nodes.pop(replica).end()
        for replica in wanted - set(self._nodes):
            self._nodes[replica] = self._node(replica)
        self._regroup()

    def wire_for(self, device: str) -> Wire | None:
        """Return the least busy connection to a replica of a device, or None: by the driver."""
        groups = self._groups
        if not groups or self._snapshot is None:
            return None
        best = None
        fewest = _MAX_STREAMS
        for node in groups[self._snapshot.group(device)]:
            wire = node.wire
            if wire is not None and wire.usable and (in_flight := wire.in_flight) < fewest:
                best, fewest = wire, in_flight
        return best

    async def close(self) -> None:
        """Close every connection at once; await every write before."""
        nodes = list(self._nodes.values())
        self._nodes.clear()
        self._groups.clear()
        for node in nodes:
            node.task.cancel()
            if node.wire is not None:
                node.wire.abort()
        await asyncio.gather(*(node.task for node in nodes), return_exceptions=True)

    def _node(self, replica: Replica) -> _Node:
        return _Node(replica, self, self._settings, self._credentials)

    def _regroup(self) -> None:
        if self._snapshot is not None:
            self._groups = [
                [self._nodes[replica] for replica in replicas]
                for replicas in self._snapshot.replicas
            ]


class _Node:
    """Keeps a connection to one node, until it is ended."""

    def __init__(
        self,
        replica: Replica,
        owner: Direct,
        settings: Cassandra,
        credentials: Credentials | None,
    ) -> None:
        self.wire: Wire | None = None
        self._replica = replica
        self._name = f"{replica.address}:{replica.port}"
        self._owner = owner
        self._settings = settings
        self._credentials = credentials
        self.task = asyncio.create_task(self._run(), name=f"direct {self._name}")

    def end(self) -> None:
        """Connect no more, and close what there is when its requests have ended."""
        self.task.cancel()
        if self.wire is not None:
            self.wire.retire("it is needed no more")

    async def _run(self) -> None:
        failures = refusals = 0
        while True:
            started = asyncio.get_running_loop().time()
            why = ""
            try:
                self.wire = await self._connect()
                _log.info("direct connection", node=self._name)
                refusals = 0
                why = await self._watch(self.wire)
            except StoreError as error:
                why = str(error)
                if error.kind == _LOGIN_REFUSED:
                    refusals += 1
            if self.wire is not None:
                self.wire.retire(why)
                self.wire = None
            steady = asyncio.get_running_loop().time() - started > _STEADY_SECONDS
            failures = 1 if steady else failures + 1
            _log.warning(
                "no direct connection: batches go by the driver",
                node=self._name,
                error=why,
                limit_by=f"direct {self._name}",
            )
            if refusals:
                seconds = login_wait_seconds(refusals, *self._owner.login_retry_seconds)
            else:
                seconds = wait_seconds(failures, _RECONNECT_MIN_SECONDS, _RECONNECT_MAX_SECONDS)
            await asyncio.sleep(seconds)

    async def _connect(self) -> Wire:
        """Return a connection that can be used. Raises `StoreError`."""
        settings, replica = self._settings, self._replica
        loop = asyncio.get_running_loop()
        wire = Wire(self._name, settings.request_timeout_seconds)
        credentials = self._credentials
        if credentials is None or (settings.tls and credentials.context is None):
            raise StoreUnavailable("tls", "there are no credentials")
        try:
            async with asyncio.timeout(settings.connect_timeout_seconds):
                await loop.create_connection(
                    lambda: wire,
                    replica.address,
                    replica.port,
                    ssl=credentials.context if settings.tls else None,
                    server_hostname=replica.name if settings.tls else None,
                )
                await wire.log_in(credentials)
                consistency = frames.CONSISTENCIES[settings.consistency]
                await wire.prepare(self._owner.statements, consistency)
        except TimeoutError:
            wire.abort()
            raise failed("CassErrorLibUnableToConnect", "it took too long") from None
        except ssl.SSLError as error:
            wire.abort()
            raise StoreUnavailable("tls", str(error)) from None
        except OSError as error:
            wire.abort()
            raise failed("CassErrorLibUnableToConnect", str(error)) from None
        except BaseException:
            wire.abort()
            raise
        return wire

    async def _watch(self, wire: Wire) -> str:
        """Return why the connection ended. Prepares again what the server forgot."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEARTBEAT_SECONDS):
                    return str(await asyncio.shield(wire.ended))
            if wire.usable:
                await wire.beat()
            else:
                consistency = frames.CONSISTENCIES[self._settings.consistency]
                await wire.prepare(self._owner.statements, consistency)


_LOGIN_REFUSED = failed("CassErrorServerBadCredentials", "").kind


def _keep_alive(found: socket.socket | None) -> None:
    if found is not None and found.family in {socket.AF_INET, socket.AF_INET6}:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS)
