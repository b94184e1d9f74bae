"""Slots in memory, for tests of who holds what: rows with a TTL, faults on demand, leaping time.

Lives here: `Rows`, what Cassandra would have; `MemoryTable`, one process's way to it, which can
lose a request or its answer; `run`, an event loop whose clock jumps to the next timer, so that
minutes of leases pass in milliseconds, and which may be that of a busy machine; and `in_leaps`,
which makes a test run on it. Rules: a TTL ends by whole seconds, as in Cassandra; a transaction is
one step; what is lost raises `StoreUnavailable`, as the real table does once its own read failed.
"""

from __future__ import annotations

import asyncio
import functools
import math
import selectors
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from shadowsvc.errors import StoreUnavailable
from shadowsvc.store.slots import Slot

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine
    from uuid import UUID

__all__ = ["LOST", "UNANSWERED", "MemoryTable", "Rows", "in_leaps", "run"]

Result = TypeVar("Result")

LOST = "lost"
"""The request does not arrive."""
UNANSWERED = "unanswered"
"""It is applied, and the answer does not arrive."""

_SINCE = datetime(2026, 1, 1, tzinfo=UTC)


class _Lease(NamedTuple):
    owner: str
    token: UUID
    ends: float


class Rows:
    """The rows of one group."""

    def __init__(self, now: Callable[[], float], ttl_seconds: int, group: str = "g") -> None:
        self.group = group
        self.ttl_seconds = ttl_seconds
        self._now = now
        self._rows: dict[int, _Lease | None] = {}

    def token(self, name: str) -> UUID | None:
        """Return who has it now, None when nobody."""
        lease = self._rows.get(self._number(name))
        return None if lease is None or lease.ends <= self._now() else lease.token

    def slots(self) -> list[Slot]:
        """Return what a list would show."""
        found = []
        for number, lease in sorted(self._rows.items()):
            name = f"{self.group}-{number}"
            if lease is None or self.token(name) is None:
                found.append(Slot(name, number, None, None, None))
            else:
                found.append(Slot(name, number, lease.owner, lease.token, _SINCE))
        return found

    def create(self, number: int, owner: str, token: UUID) -> bool:
        if number in self._rows:
            return False
        self._rows[number] = self._lease(owner, token)
        return True

    def take(self, name: str, owner: str, token: UUID) -> bool:
        number = self._number(name)
        if number not in self._rows or self.token(name) is not None:
            return False
        self._rows[number] = self._lease(owner, token)
        return True

    def renew(self, name: str, token: UUID) -> bool:
        number = self._number(name)
        lease = self._rows.get(number)
        if lease is None or self.token(name) != token:
            return False
        self._rows[number] = self._lease(lease.owner, token)
        return True

    def release(self, name: str, token: UUID) -> bool:
        if self.token(name) != token:
            return False
        self._rows[self._number(name)] = None
        return True

    def delete(self, name: str, token: UUID) -> bool:
        if self.token(name) != token:
            return False
        del self._rows[self._number(name)]
        return True

    def _lease(self, owner: str, token: UUID) -> _Lease:
        return _Lease(owner, token, math.floor(self._now()) + self.ttl_seconds)

    def _number(self, name: str) -> int:
        return int(name.rpartition("-")[2])


class MemoryTable:
    """One process's `SlotTable`. `away` loses every request, `faults` the next ones one by one."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.away = False
        self.faults: deque[str | None] = deque()
        """For each of the next calls `LOST`, `UNANSWERED`, or None for none."""
        self.seconds = 0.0
        """How long a request takes before it is applied."""
        self.asked: list[str] = []
        self.faulty = 0

    async def list(self) -> list[Slot]:
        found: list[Slot] = await self._call("list", self.rows.slots)
        return found

    async def create(self, number: int, owner: str, token: UUID) -> bool:
        return bool(await self._call("create", self.rows.create, number, owner, token))

    async def take(self, name: str, owner: str, token: UUID) -> bool:
        return bool(await self._call("take", self.rows.take, name, owner, token))

    async def renew(self, name: str, token: UUID) -> bool:
        return bool(await self._call("renew", self.rows.renew, name, token))

    async def release(self, name: str, token: UUID) -> bool:
        return bool(await self._call("release", self.rows.release, name, token))

    async def delete(self, name: str, token: UUID) -> bool:
        return bool(await self._call("delete", self.rows.delete, name, token))

    async def _call(self, name: str, do: Callable[..., Any], *values: object) -> Any:
        self.asked.append(name)
        fault = LOST if self.away else self.faults.popleft() if self.faults else None
        await asyncio.sleep(self.seconds)
        if fault == LOST:
            self.faulty += 1
            raise StoreUnavailable("timeout", "the request was lost")
        answer = do(*values)
        if fault == UNANSWERED:
            self.faulty += 1
            raise StoreUnavailable("timeout", "the answer was lost")
        return answer


def run(main: Coroutine[Any, Any, Result], stalls: random.Random | None = None) -> Result:
    """Run it on a loop whose clock jumps whenever there is nothing to do.

    With `stalls` the loop is that of a busy machine: now and then time passes between two turns,
    milliseconds or seconds, and what is ready is noticed late and in any order. Sockets of the
    loopback may be used.
    """
    with asyncio.Runner(loop_factory=lambda: _JumpingLoop(stalls)) as runner:
        return runner.run(main)


def in_leaps(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop whose clock jumps."""

    @functools.wraps(test)
    def runs(**arguments: object) -> None:
        run(test(**arguments))

    return runs


_STALLS = ((0.06, 0.05), (0.006, 0.5), (0.0006, 3.0))
"""How probable, and how long at most, in seconds."""
_LATE = 0.3


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, stalls: random.Random | None) -> None:
        super().__init__()
        self.jumped = 0.0
        self._stalls = stalls

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("everybody waits, and for nothing")
        if ready and self._stalls is not None:
            return self._stall(ready, self._stalls)
        if not ready and timeout:
            self.jumped += timeout
        return ready

    def _stall(
        self, ready: list[tuple[selectors.SelectorKey, int]], draw: random.Random
    ) -> list[tuple[selectors.SelectorKey, int]]:
        for chance, seconds in _STALLS:
            if draw.random() < chance:
                self.jumped += draw.uniform(0, seconds)
        draw.shuffle(ready)
        if draw.random() >= _LATE:
            return ready
        self.jumped += 0.001
        return [one for one in ready if draw.random() < 0.5]  # the others in a later turn


class _JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self, stalls: random.Random | None) -> None:
        self._jumping = _JumpingSelector(stalls)
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.jumped
