"""The table of slots: client ids that the processes of a group lease from one another.

Lives here: the rows of one group at one broker cluster, and the transactions that take, renew,
free and delete them. Rules:

1. Light-weight transactions only, LOCAL_SERIAL for writes and reads, values bound.
2. A transaction that got no answer may have been applied or not. A serial read, which ends what is
   under way, and the comparison of the token tell which; only where that fails too, a call raises.
   A refusal that shows our own token is a success whose answer was lost.
3. Whoever takes a slot brings a token that nobody ever used, so a transaction that is applied late,
   when nobody expects it any more, can do no more than hold a slot for one TTL.
4. The event loop never waits: one thread of its own does everything, one call after the other.

Must not come in: when a slot is taken, renewed or given up (`shadowsvc.slots`).
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeVar

import structlog
from cassandra import ConsistencyLevel

from shadowsvc.errors import StoreError, StoreUnavailable
from shadowsvc.store import driver

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from shadowsvc.settings import Settings

__all__ = ["Slot", "SlotTable"]

_log = structlog.get_logger(__name__)

Result = TypeVar("Result")

_ROW = "share_group = ? AND broker = ? AND number = ?"
_FREE = "SET owner = null, lease = null, since = null"
_LEASE = "USING TTL ? SET owner = ?, lease = ?, since = ?"

# Nothing but the keyspace, which has a form of its own, is ever part of a statement's text.
# ruff: noqa: S608
_STATEMENTS: Final = {
    "list": "SELECT number, created_at, owner, lease, since FROM {keyspace}.slot "
    "WHERE share_group = ? AND broker = ?",
    "read": "SELECT lease FROM {keyspace}.slot WHERE " + _ROW,
    "create": "BEGIN BATCH "
    "INSERT INTO {keyspace}.slot (share_group, broker, number, created_at) VALUES (?, ?, ?, ?) "
    "IF NOT EXISTS; "
    "UPDATE {keyspace}.slot " + _LEASE + " WHERE " + _ROW + "; "
    "APPLY BATCH",
    # An update alone would make a row that is gone with the lease.
    "take": "UPDATE {keyspace}.slot "
    + _LEASE
    + " WHERE "
    + _ROW
    + " IF created_at != null AND lease = null",
    "renew": "UPDATE {keyspace}.slot " + _LEASE + " WHERE " + _ROW + " IF lease = ?",
    "release": "UPDATE {keyspace}.slot " + _FREE + " WHERE " + _ROW + " IF lease = ?",
    "delete": "DELETE FROM {keyspace}.slot WHERE " + _ROW + " IF lease = ?",
}
_READS: Final = ("list", "read")


class Slot(NamedTuple):
    """One slot as a list showed it."""

    name: str
    """the client id"""
    number: int
    owner: str | None
    """the process that has it, for people; None when it is free"""
    token: UUID | None
    """None when it is free"""
    since: datetime | None
    """when the owner took it, by the owner's clock"""


_Slots: TypeAlias = list[Slot]  # `list` is a method below


class SlotTable:
    """The slots of one group at one broker cluster. Connects when first asked, and again."""

    def __init__(self, settings: Settings) -> None:
        """Make it; nothing happens before the first call."""
        self._settings = settings.cassandra
        self._group = settings.mqtt.share_group
        self._broker = settings.slots.broker
        self._ttl = settings.slots.lease_seconds
        self._thread = _Thread("slots")
        self._stack: ExitStack | None = None
        self._session: Any = None
        self._statements: dict[str, Any] = {}
        self._takes: dict[UUID, tuple[str, datetime]] = {}
        """Owner and time of each take, which a renewal has to write again."""

    async def list(self) -> list[Slot]:
        """Return every slot, by number. Raises `StoreError`."""
        return await self._thread.call(self._list)

    async def create(self, number: int, owner: str, token: UUID) -> bool:
        """Make slot `number` and take it; False when it exists. Raises `StoreError`."""
        return await self._thread.call(functools.partial(self._create, number, owner, token))

    async def take(self, name: str, owner: str, token: UUID) -> bool:
        """Take a free slot; False when it is not free or gone. Raises `StoreError`."""
        return await self._thread.call(functools.partial(self._take, name, owner, token))

    async def renew(self, name: str, token: UUID) -> bool:
        """Start the TTL anew; False when the slot is not ours any more. Raises `StoreError`."""
        return await self._thread.call(functools.partial(self._renew, name, token))

    async def release(self, name: str, token: UUID) -> bool:
        """Free a slot; False when it was not ours any more. Raises `StoreError`."""
        return await self._thread.call(functools.partial(self._release, name, token))

    async def delete(self, name: str, token: UUID) -> bool:
        """Delete a slot; False when it was not ours any more. Raises `StoreError`."""
        return await self._thread.call(functools.partial(self._delete, name, token))

    async def close(self) -> None:
        """Disconnect, and end the thread. A call that comes later starts both again."""
        if not self._thread.started:
            return
        await self._thread.call(self._disconnect)
        self._thread.end()

    # ---------------------------------------------------------------- in the thread

    def _list(self) -> _Slots:
        with self._failing_closed():
            rows = self._execute("list", self._group, self._broker)
            return [
                Slot(
                    self._name(number), number, owner, token, None if since is None else _utc(since)
                )
                for number, created_at, owner, token, since in rows
                if created_at is not None
            ]

    def _create(self, number: int, owner: str, token: UUID) -> bool:
        row = self._key(number)
        now = self._note(owner, token)
        return self._lease("create", number, token, *row, now, self._ttl, owner, token, now, *row)

    def _take(self, name: str, owner: str, token: UUID) -> bool:
        number = self._number(name)
        now = self._note(owner, token)
        return self._lease("take", number, token, self._ttl, owner, token, now, *self._key(number))

    def _renew(self, name: str, token: UUID) -> bool:
        number = self._number(name)
        owner, since = self._takes.get(token, ("", datetime.now(UTC)))
        return self._lease(
            "renew", number, token, self._ttl, owner, token, since, *self._key(number), token
        )

    def _release(self, name: str, token: UUID) -> bool:
        number = self._number(name)
        self._takes.pop(token, None)
        return self._transact("release", number, token, *self._key(number), token, gives_up=True)

    def _delete(self, name: str, token: UUID) -> bool:
        number = self._number(name)
        done = self._transact("delete", number, token, *self._key(number), token, gives_up=True)
        if done:
            self._takes.pop(token, None)
        return done

    def _note(self, owner: str, token: UUID) -> datetime:
        """Note a take before it is asked for: one without an answer may be renewed, too."""
        now = datetime.now(UTC)
        self._takes[token] = (owner, now)
        return now

    def _lease(self, name: str, number: int, token: UUID, *values: object) -> bool:
        granted = self._transact(name, number, token, *values)
        if not granted:
            self._takes.pop(token, None)
        return granted

    def _transact(
        self, name: str, number: int, token: UUID, *values: object, gives_up: bool = False
    ) -> bool:
        """Tell whether a transaction was applied, by a read when its own answer does not say.

        `gives_up`: it was applied if the token is gone, else if the token is there.
        """
        with self._failing_closed():
            self._connect()  # what fails here was never asked
            try:
                result = self._execute(name, *values)
            except StoreUnavailable as error:
                _log.info(
                    "slot transaction without an answer: reading what became of it",
                    transaction=name,
                    kind=error.kind,
                    limit_by=f"slot {name}",
                )
                if error.kind == "unreachable":
                    self._disconnect()  # the driver takes its time before it tries again
                return (self._read(number) == token) is not gives_up
            answer = dict(zip(result.column_names, result.one(), strict=False))
            if answer["[applied]"]:
                return True
            # The driver sends a request again when a connection breaks under it.
            return not gives_up and answer.get("lease") == token

    def _read(self, number: int) -> UUID | None:
        row = self._execute("read", *self._key(number)).one()
        return None if row is None else row[0]

    def _execute(self, name: str, *values: object) -> Any:
        self._connect()
        with driver.errors(self._settings):
            return self._session.execute(self._statements[name].bind(values))

    def _connect(self) -> None:
        if self._session is not None:
            return
        with ExitStack() as stack:
            connection = stack.enter_context(driver.connected(self._settings))
            for name, text in _STATEMENTS.items():
                with driver.errors(self._settings):
                    statement = connection.session.prepare(
                        text.format(keyspace=self._settings.keyspace)
                    )
                if name in _READS:
                    statement.consistency_level = ConsistencyLevel.LOCAL_SERIAL
                self._statements[name] = statement
            self._session = connection.session
            self._stack = stack.pop_all()

    def _disconnect(self) -> None:
        stack, self._stack, self._session = self._stack, None, None
        if stack is not None:
            try:
                stack.close()
            except Exception:  # noqa: BLE001 - it is gone all the same
                _log.exception("closing failed", limit_by="slots close")

    def _failing_closed(self) -> _FailingClosed:
        return _FailingClosed(self._disconnect)

    def _key(self, number: int) -> tuple[str, str, int]:
        return self._group, self._broker, number

    def _name(self, number: int) -> str:
        return f"{self._group}-{number}"

    def _number(self, name: str) -> int:
        group, _, number = name.rpartition("-")
        if group != self._group or not number.isdecimal():
            raise ValueError(f"{name!r} is no slot of the group {self._group!r}")
        return int(number)


class _FailingClosed:
    """Disconnect upon an error, so that the next call connects anew.

    The driver would find out by itself: after a minute for a connection that went silent, after
    half a minute for a cluster that came back.
    """

    def __init__(self, disconnect: Callable[[], None]) -> None:
        self._disconnect = disconnect

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            return
        self._disconnect()
        if isinstance(error, Exception) and not isinstance(error, StoreError):
            # Whatever the driver does, the keeper of a slot must be able to try again.
            text = f"{type(error).__name__}: {error}"
            raise StoreUnavailable("driver", text) from error


class _Thread:
    """Makes blocking calls, one after the other, while the event loop goes on.

    A daemon: a call that hangs in the driver does not hold up the end of the process.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether it was ever asked for anything since the last end."""
        return self._thread is not None

    async def call(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, or raise what it raises.

        Cancelling stops the waiting; `work` is done nevertheless, in its turn.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def do() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
                answer = functools.partial(_raise, future, error)
            else:
                answer = functools.partial(_return, future, result)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(answer)

        self._calls.put(do)
        return await future

    def end(self) -> None:
        """End the thread when it has done what it was asked for; wait for nothing."""
        if self._thread is not None:
            self._thread = None
            calls, self._calls = self._calls, queue.SimpleQueue()
            calls.put(None)

    def _serve(self) -> None:
        calls = self._calls
        while (do := calls.get()) is not None:
            do()


def _return(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _raise(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _utc(stamp: datetime) -> datetime:
    """Return a time of the driver's, which are in UTC without saying so, with its zone."""
    return stamp.replace(tzinfo=UTC)
