"""Connections of our own to Cassandra's nodes, for the batches of shadows.

Lives here: a connection to each replica, made and made again; which of them a batch goes to; what
its answer means. Rules: this is a shorter way for what acsylla does as well, so whatever is amiss
here (no connection yet, a refused login, a statement that the server forgot) sends a batch by the
driver, and never stops the service; a request that was sent ends by its answer, its time-out, or
the loss of its connection, and is never sent twice from here; times go with each statement; nothing
blocks the loop. Must not come in: retrying, planning, acks, the meaning of errors (`store.faults`).

A connection is left when a request had no answer in time and nothing else was heard since, and
made again with full jitter. One login is tried at a time; one that was refused is tried again after
a long wait, whatever the node, since servers lock accounts. A node that answers with an error gets
nothing for a while, as long as another replica can take it: who fails fast would be the least busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections import deque
from functools import reduce
from typing import TYPE_CHECKING, Any

import structlog

from shadowsvc.backoff import wait_seconds
from shadowsvc.errors import StoreError, StoreUnavailable
from shadowsvc.login_pace import LOGIN_KINDS, LoginPace
from shadowsvc.store import frames
from shadowsvc.store.faults import UNPREPARED, answered, failed
from shadowsvc.store.thresholds import DEFAULT, QUESTION, BatchLimits, limits_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
_PREPARE_MAX_SECONDS = 10.0
_STEADY_SECONDS = 5.0
"""A connection that lived for so long is no sign of a server that drops each at once."""
_DOUBT_SECONDS = 1.0
"""For so long a node that failed comes after all others."""
_LATE_SECONDS = 0.1
_GRACE_SECONDS = 0.05
"""A time-out that comes so late tells of this process, which may have answers to read first."""
_NUMBER = re.compile(r"\d+")
_FORGOTTEN = answered(UNPREPARED, "").kind


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
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when nothing more is to be sent; says why."""
        self.doubted_until = 0.0
        """Until when other connections are to be preferred, by the monotonic clock."""
        self.limits = DEFAULT
        """What its node allows a batch to have."""
        self._timeout = timeout_seconds
        self._loop = asyncio.get_running_loop()
        self._answers = frames.Answers()
        # Never 0: Cassandra 5.0 answers so what waited in its queue for too long, whatever its
        # stream. Those free for the longest time come first, so that a late answer is told as one.
        self._free = deque(range(1, _MAX_STREAMS))
        # stream → (when it was sent, who waits), oldest first.
        self._waiting: dict[int, tuple[float, asyncio.Future[tuple[int, bytes]]]] = {}
        self._overdue: set[int] = set()
        # Not the loop's clock: uvloop's counts whole milliseconds.
        self._heard = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._in_grace = False
        self._retiring = False
        self._transport: Any = None
        self._body: frames.BatchBody | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing is left of it."""
        return self._transport is None

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
            if opcode != frames.AUTH_SUCCESS:
                # Whatever it is, a challenge too, asking again at once would not help.
                why = self._unexpected(opcode, body)
                raise failed("CassErrorServerBadCredentials", str(why))
        elif opcode != frames.READY:
            raise self._unexpected(opcode, body)

    async def learn_limits(self) -> None:
        """Ask the node for its thresholds. Raises `StoreError`: then they are the default's."""
        opcode, body = await self._ask(
            frames.QUERY, frames.query_body(QUESTION, frames.CONSISTENCIES["ONE"])
        )
        if opcode != frames.RESULT:
            raise self._unexpected(opcode, body)
        try:
            self.limits = limits_of(frames.rows_of(body))
        except frames.BadAnswer as error:
            raise failed("CassErrorLibUnexpectedResponse", str(error)) from None

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
        self.usable = not self.ended.done()

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
            if isinstance(error, StoreUnavailable):
                self._doubt()
            raise error

    async def beat(self) -> None:
        """Ask for anything if nothing was heard, so that a connection that is dead is found."""
        if time.monotonic() - self._heard >= _HEARTBEAT_SECONDS:
            # What its failure means, `_expire` and `connection_lost` say.
            with contextlib.suppress(StoreError):
                await self._ask(frames.OPTIONS, b"")

    def _ask(self, opcode: int, body: bytes) -> asyncio.Future[tuple[int, bytes]]:
        future = self._loop.create_future()
        if self._transport is None:
            future.set_exception(self._lost())
            return future
        if not self._free:
            future.set_exception(failed("CassErrorLibNoStreams", f"none is free at {self.name}"))
            if not self._waiting:
                self.retire("it owes too many answers")
            return future
        stream = self._free.popleft()
        now = time.monotonic()
        self._waiting[stream] = now, future
        if self._timer is None:
            self._due = now + self._timeout
            self._timer = self._loop.call_later(self._timeout, self._expire)
        self._transport.write(frames.frame(stream, opcode, body))
        return future

    def _doubt(self) -> None:
        self.doubted_until = time.monotonic() + _DOUBT_SECONDS

    def _lost(self) -> StoreError:
        return failed("CassExceptionConnectionError", f"the connection to {self.name} was lost")

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
        now = time.monotonic()
        if now - self._due > _LATE_SECONDS and not self._in_grace:
            self._in_grace = True
            self._timer = self._loop.call_later(_GRACE_SECONDS, self._expire)
            return
        self._in_grace = False
        deaf = False
        while self._waiting:
            stream, (sent, future) = next(iter(self._waiting.items()))
            left = sent + self._timeout - now
            if left > 0:
                self._due = now + left
                self._timer = self._loop.call_later(left, self._expire)
                break
            del self._waiting[stream]
            self._overdue.add(stream)
            deaf = deaf or self._heard < sent
            self._doubt()
            if not future.done():
                future.set_exception(
                    failed("CassErrorLibRequestTimedOut", f"no answer of {self.name} in time")
                )
        if deaf:
            self.retire("nothing is heard")

    def retire(self, why: str) -> None:
        """Send nothing more, and close it when what was sent has been answered or timed out."""
        self._end(why)
        self._retiring = True
        if self._waiting:
            self._loop.call_later(self._timeout + _LATE_SECONDS, self.abort)
        else:
            self.abort()

    def abort(self, why: str = "closed") -> None:
        """Close it at once."""
        self._end(why)
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
        self._heard = time.monotonic()
        try:
            answers = self._answers.take(data)
        except frames.BadAnswer as error:
            self.abort(f"what the protocol does not have: {error}")
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
                self.abort(f"an answer that nobody waits for: {stream}, opcode {opcode:#04x}")
                return
            self._free.append(stream)
        if self._retiring and not waiting:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell everybody who waits: what becomes of their requests nobody knows."""
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(self._lost())
        self._waiting.clear()
        self._overdue.clear()
        self._end("it was lost" if error is None else f"it was lost: {error}")


class Direct:
    """The connections to all replicas. Belongs to the running loop.

    Args:
        settings: of Cassandra.
        statements: text of each statement that batches are made of, by name.
    """

    def __init__(self, settings: Cassandra, statements: Mapping[str, str]) -> None:
        self.statements = statements
        self.settings = settings
        self.credentials: Credentials | None = None
        self.pace = LoginPace(10.0, 300.0)
        """Of refused logins."""
        self.on_limits: Callable[[BatchLimits], None] | None = None
        """Called with what all connected nodes allow a batch to have, whenever one connects."""
        self._snapshot: Snapshot | None = None
        self._nodes: dict[Replica, _Node] = {}
        self._groups: list[list[_Node]] = []
        self._leaving: set[Wire] = set()
        self._turn = 0
        self._closed = False
        self._logging_in = asyncio.Lock()
        self._no_login_before = 0.0

    @property
    def connections(self) -> int:
        """How many can be used now."""
        return sum(node.wire is not None and node.wire.usable for node in self._nodes.values())

    def use(self, credentials: Credentials | None) -> None:
        """Log in with these from now on; connections by others end when their requests have."""
        if self._closed:
            return
        self.credentials = credentials
        self.pace.accepted()
        self._no_login_before = 0.0
        replicas = list(self._nodes)
        for replica in replicas:
            self._end(self._nodes.pop(replica))
        for replica in replicas:
            self._nodes[replica] = _Node(replica, self)
        self._regroup()

    def follow(self, snapshot: Snapshot) -> None:
        """Keep a connection to every replica of this ring, and to no other node."""
        if self._closed:
            return
        self._snapshot = snapshot
        wanted = {replica for replicas in snapshot.replicas for replica in replicas}
        for replica in [replica for replica in self._nodes if replica not in wanted]:
            self._end(self._nodes.pop(replica))
        for replica in wanted - set(self._nodes):
            self._nodes[replica] = _Node(replica, self)
        self._regroup()

    def wire_for(self, device: str) -> Wire | None:
        """Return the least busy connection to a replica of a device, or None: by the driver.

        Those in doubt come last, and those that are alike take turns.
        """
        groups = self._groups
        if not groups or self._snapshot is None:
            return None
        nodes = groups[self._snapshot.group(device)]
        self._turn = turn = self._turn + 1
        best = None
        least = 0
        for at in range(len(nodes)):
            wire = nodes[(turn + at) % len(nodes)].wire
            if wire is None or not wire.usable:
                continue
            cost = wire.in_flight
            if wire.doubted_until and time.monotonic() < wire.doubted_until:
                cost += _MAX_STREAMS
            if best is None or cost < least:
                best, least = wire, cost
        return best

    def tell_limits(self) -> None:
        """Say what every node that is connected allows."""
        wires = (node.wire for node in self._nodes.values())
        limits = [wire.limits for wire in wires if wire is not None and wire.usable]
        if limits and self.on_limits is not None:
            self.on_limits(reduce(BatchLimits.within, limits))

    @property
    def login_wait_seconds(self) -> float:
        """How long no login may be tried."""
        return max(0.0, self._no_login_before - time.monotonic())

    async def log_in(self, wire: Wire, credentials: Credentials) -> None:
        """Log in, one after the other. Raises `StoreError`, at once while it is too early."""
        async with self._logging_in:
            if (seconds := self.login_wait_seconds) > 0:
                raise failed("CassErrorServerBadCredentials", f"not tried for {seconds:.0f} s")
            try:
                await wire.log_in(credentials)
            except StoreError as error:
                if error.kind in LOGIN_KINDS:
                    self._no_login_before = time.monotonic() + self.pace.refused()
                raise
            self.pace.accepted()

    async def close(self) -> None:
        """Close every connection at once and for good; await every write before."""
        self._closed = True
        nodes = list(self._nodes.values())
        self._nodes.clear()
        self._groups.clear()
        for node in nodes:
            node.task.cancel()
            if node.wire is not None:
                node.wire.abort()
        for wire in self._leaving:
            wire.abort()
        await asyncio.gather(*(node.task for node in nodes), return_exceptions=True)

    def _end(self, node: _Node) -> None:
        node.task.cancel()
        if node.wire is not None:
            self.leave(node.wire, "it is needed no more")

    def leave(self, wire: Wire, why: str) -> None:
        """Close a connection when its requests have ended."""
        self._leaving = {one for one in self._leaving if not one.closed}
        self._leaving.add(wire)
        wire.retire(why)

    def _regroup(self) -> None:
        if self._snapshot is not None:
            self._groups = [
                [self._nodes[replica] for replica in replicas]
                for replicas in self._snapshot.replicas
            ]


class _Node:
    """Keeps a connection to one node, until it is ended."""

    def __init__(self, replica: Replica, owner: Direct) -> None:
        self.wire: Wire | None = None
        """What batches may take, once it is usable."""
        self._replica = replica
        self._owner = owner
        self._name = f"{replica.address}:{replica.port}"
        self.task = asyncio.create_task(self._run(), name=f"direct {self._name}")

    async def _run(self) -> None:
        failures = 0
        while True:
            wire = Wire(self._name, self._owner.settings.request_timeout_seconds)
            connected = None
            try:
                await self._connect(wire)
                connected = time.monotonic()
                await self._serve(wire)
                why = wire.ended.result()
            except Exception as error:  # noqa: BLE001 - it is a shorter way: it must not end for good
                why = wire.ended.result() if wire.ended.done() else str(error) or repr(error)
            self.wire = None
            self._owner.leave(wire, why)
            steady = connected and time.monotonic() - connected > _STEADY_SECONDS
            failures = 1 if steady else failures + 1
            _log.warning(
                "no direct connection: batches go by another replica or by the driver",
                node=self._name,
                error=why,
                limit_by=f"direct {self._name}",
            )
            seconds = wait_seconds(failures, _RECONNECT_MIN_SECONDS, _RECONNECT_MAX_SECONDS)
            await asyncio.sleep(max(seconds, self._owner.login_wait_seconds))

    async def _connect(self, wire: Wire) -> None:
        """Connect and log in. Raises `StoreError`, `OSError` and whatever a name causes."""
        settings, credentials = self._owner.settings, self._owner.credentials
        if credentials is None or (settings.tls and credentials.context is None):
            raise StoreUnavailable("tls", "there are no credentials")
        try:
            async with asyncio.timeout(settings.connect_timeout_seconds):
                await asyncio.get_running_loop().create_connection(
                    lambda: wire,
                    self._replica.address,
                    self._replica.port,
                    ssl=credentials.context if settings.tls else None,
                    server_hostname=self._replica.name if settings.tls else None,
                )
            await self._owner.log_in(wire, credentials)
        except TimeoutError:
            raise failed("CassErrorLibUnableToConnect", "it took too long") from None
        except asyncio.CancelledError:
            wire.abort()  # nobody else has it yet
            raise

    async def _serve(self, wire: Wire) -> None:
        """Prepare statements and see that the connection lives, until it ends."""
        self.wire = wire
        refusals = 0
        pause = 0.0
        consistency = frames.CONSISTENCIES[self._owner.settings.consistency]
        while not await _ends_within(pause, wire):
            if wire.usable:
                refusals = 0
                await wire.beat()
                pause = _HEARTBEAT_SECONDS
                continue
            try:
                await self._learn_limits(wire)
                await wire.prepare(self._owner.statements, consistency)
            except StoreError as error:
                # No schema yet, or no grant: the login need not be made again for that.
                _log.warning(
                    "batches can't be prepared: they go by the driver",
                    node=self._name,
                    error=str(error),
                    limit_by=f"prepare {self._name}",
                )
                refusals += 1
                pause = wait_seconds(refusals, _RECONNECT_MIN_SECONDS, _PREPARE_MAX_SECONDS)
            else:
                _log.info("direct connection", node=self._name)
                self._owner.tell_limits()
                pause = _HEARTBEAT_SECONDS

    async def _learn_limits(self, wire: Wire) -> None:
        """Ask for the node's thresholds; without an answer they are taken for the default ones."""
        if self._owner.on_limits is None:
            return
        try:
            await wire.learn_limits()
        except StoreError as error:
            _log.info(
                "a node did not tell its batch thresholds, which count as Cassandra's default",
                node=self._name,
                error=str(error),
                limit_by=f"thresholds {self._name}",
            )


async def _ends_within(seconds: float, wire: Wire) -> bool:
    await asyncio.wait([wire.ended], timeout=seconds)
    return wire.ended.done()


def _keep_alive(found: socket.socket | None) -> None:
    if found is not None and found.family in {socket.AF_INET, socket.AF_INET6}:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS)
