"""The slot of this process: the client id that it leases, and the keeper of the lease.

Theory. A slot is a client id, and with it a session at the broker that outlives the process. Its
row in Cassandra names an owner for a time (the TTL); the owner renews it. Times here are monotonic
seconds, taken *before* a request is sent, so that our lease never looks younger than the table's.

    NONE ──take──▶ HELD ──older than its TTL──▶ LAPSED ──renewed, or free and taken again──▶ HELD
     ▲              │                            │
     └── refused: another has it, or it is gone ─┘       any ──lapse()──▶ GIVEN_UP ──acquire()──▶ …
    NONE ──all taken──▶ FULL ──one is free──▶ HELD       any ──release()──▶ RELEASED

Rules:
1. Nobody connects by a client id without a lease: `acquire` comes before every CONNECT and renews,
   or takes another slot. Only when Cassandra does not answer, a lease that can't have ended yet
   is enough. A session that another process took over is thus never fought for.
2. A connection outlives its lease: while Cassandra is away, nobody can take the slot either. When
   it is back and the slot is still free, it is taken again; else the connection is left.
3. Every take has a token of its own; a take without an answer is asked about before another one.
4. A lease is never broken before its time, whoever seems to hold it. What an earlier life of this
   process still holds at the start is noted in `former`: nobody comes back for it.

Must not come in: statements (`shadowsvc.store.slots`), connections, what is done with a client id.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import structlog

from shadowsvc.backoff import wait_seconds
from shadowsvc.errors import StoreError
from shadowsvc.owners import is_former_life, owner_name
from shadowsvc.settings import variable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from shadowsvc.settings import Slots
    from shadowsvc.store.slots import Slot

__all__ = ["TTL_GRAIN_SECONDS", "Create", "Lease", "SlotKeeper", "SlotState", "Table", "Take"]

_log = structlog.get_logger(__name__)

TTL_GRAIN_SECONDS: Final = 1.0
"""Cassandra counts a TTL in whole seconds: it may end this much early."""
_RETRY_MIN_SECONDS = 0.2
_RETRY_MAX_SECONDS = 2.0
_FULL_POLL_SECONDS = 5.0
_MAX_DOUBLINGS = 6


class Table(Protocol):
    """What the keeper needs of `shadowsvc.store.slots.SlotTable`; calls raise `StoreError`."""

    async def list(self) -> list[Slot]:
        """Return every slot."""

    async def create(self, number: int, owner: str, token: UUID) -> bool:
        """Make a slot and take it."""

    async def take(self, name: str, owner: str, token: UUID) -> bool:
        """Take a free slot."""

    async def renew(self, name: str, token: UUID) -> bool:
        """Start the TTL anew."""

    async def release(self, name: str, token: UUID) -> bool:
        """Free a slot."""


class SlotState(StrEnum):
    """Every state of a slot as this process sees it; see the module's diagram."""

    NONE = "none"
    HELD = "held"
    LAPSED = "lapsed"
    FULL = "full"
    GIVEN_UP = "given_up"
    RELEASED = "released"


class Take(NamedTuple):
    """Take this free slot."""

    name: str


class Create(NamedTuple):
    """Make this slot."""

    number: int


class Lease:
    """The lease machine: what is held, since when, and what to take. Pure; see the module."""

    def __init__(self, lease_seconds: float, max_slots: int) -> None:
        """Make it, holding nothing. `lease_seconds` is the TTL."""
        self.name: str | None = None
        """The slot that we hold, or held when the lease lapsed."""
        self.token: UUID | None = None
        self._trusted_seconds = lease_seconds - TTL_GRAIN_SECONDS
        self._max_slots = max_slots
        self._confirmed = 0.0
        self._refused = False
        self._last: str | None = None
        self._full = False
        self._left: SlotState | None = None
        """`GIVEN_UP` or `RELEASED` while no slot is wanted."""

    def state(self, now: float) -> SlotState:
        """Return the state at `now`."""
        if self._left is not None:
            return self._left
        if self.name is None:
            return SlotState.FULL if self._full else SlotState.NONE
        return SlotState.HELD if self.trusted(now) else SlotState.LAPSED

    def trusted(self, now: float) -> bool:
        """Whether the lease can't have ended, whatever happened to renewals since."""
        return (
            self.name is not None
            and not self._refused
            and now - self._confirmed < self._trusted_seconds
        )

    def age(self, now: float) -> float | None:
        """Return the seconds since the last confirmed renewal; None when nothing is held."""
        return None if self.name is None else max(0.0, now - self._confirmed)

    def choose(
        self, slots: Sequence[Slot], collisions: int, draw: random.Random
    ) -> Take | Create | None:
        """Choose what to take: the slot we had, a random free one, a new one; None: all taken.

        `collisions` counts the attempts that others were faster at. Those who start together all
        want the same new slot: after each collision the choice is among twice as many.
        """
        free = [slot.name for slot in slots if slot.token is None]
        self._full = False
        if free:
            return Take(self._last if self._last in free else draw.choice(free))
        missing = self._max_slots - len(slots)
        if missing <= 0:
            self._full = True
            return None
        there = {slot.number for slot in slots}
        wide = min(missing, 1 << min(collisions, _MAX_DOUBLINGS))
        numbers: list[int] = []
        number = 0
        while len(numbers) < wide:
            if number not in there:
                numbers.append(number)
            number += 1
        return Create(draw.choice(numbers))

    def granted(self, name: str, token: UUID, asked: float) -> None:
        """Enter what was taken by a request sent at `asked`."""
        self.name = self._last = name
        self.token = token
        self._confirmed = asked
        self._refused = self._full = False

    def renewed(self, asked: float) -> None:
        """Enter a renewal that was sent at `asked`."""
        self._confirmed = max(self._confirmed, asked)

    def refused(self) -> None:
        """Trust the lease no longer, whatever its age: a renewal was refused."""
        self._refused = True

    def lost(self) -> None:
        """Forget the slot: it is another's."""
        self.name = self.token = None

    def give_up(self) -> None:
        """Renew no more; what is held lapses by itself."""
        self._left = SlotState.GIVEN_UP

    def want(self) -> None:
        """Want a slot again."""
        self._left = None

    def released(self) -> None:
        """Hold and want nothing any more."""
        self.lost()
        self._left = SlotState.RELEASED


class SlotKeeper:
    """Gets a lease, renews it in time, gives it back. Belongs to the running loop."""

    def __init__(
        self,
        table: Table,
        settings: Slots,
        share_group: str,
        *,
        owner: str | None = None,
        takes: Counter[str] | None = None,
        losses: Counter[str] | None = None,
        now: Callable[[], float] = time.monotonic,
        draw: random.Random | None = None,
    ) -> None:
        """Make it; nothing happens before `acquire`.

        `takes` counts slots taken by `free`, `created`, `again`; `losses` those given up by
        `taken` (another has it, or deleted it), `lapsed` (free, and taken again), `isolated`,
        `released`.
        """
        self.lost: Callable[[], None] = lambda: None
        """Called when the slot is another's: the connection by its client id has to end."""
        self.waiting: str | None = None
        """Why `acquire` has not returned yet, for people; None when nobody waits."""
        self.former: dict[str, UUID] = {}
        """Slots that an earlier life of this process held when this one began, with its tokens."""
        self.takes = Counter[str]() if takes is None else takes
        self.losses = Counter[str]() if losses is None else losses
        self._table = table
        self._settings = settings
        self._group = share_group
        self._owner = owner or owner_name()
        self._now = now
        self._draw = draw or random.Random()  # noqa: S311 - jitter, no secret
        self._lease = Lease(settings.lease_seconds, settings.max_slots)
        self._busy = asyncio.Lock()
        self._listed = False
        self._unsure: tuple[str, UUID, str] | None = None
        """A take without an answer: name, token, and how it counts."""

    @property
    def client_id(self) -> str | None:
        """The client id that we lease; None when there is none."""
        return self._lease.name

    @property
    def lease_age(self) -> float | None:
        """Seconds since the last confirmed renewal; None when nothing is held."""
        return self._lease.age(self._now())

    @property
    def state(self) -> SlotState:
        """One of the slot states in docs/architecture.md."""
        return self._lease.state(self._now())

    async def acquire(self) -> str:
        """Renew the lease or take another slot; return the client id.

        Waits for as long as there is none to be had. To be called before every CONNECT.
        """
        async with self._busy:
            self._lease.want()
            failures = collisions = 0
            try:
                while True:
                    try:
                        name = await self._renewed() or await self._taken(collisions)
                    except StoreError as error:
                        if self._lease.trusted(self._now()):
                            return self._lease.name or ""
                        failures += 1
                        self._wait_for(str(error))
                        await self._rest(failures, _RETRY_MAX_SECONDS)
                        continue
                    failures = 0
                    if name is not None:
                        return name
                    if self._lease.state(self._now()) is SlotState.FULL:
                        self._wait_for(
                            f"all {self._settings.max_slots} slots of the group {self._group!r} "
                            f"are taken: raise {variable('slots', 'max_slots')}, or run fewer"
                        )
                        await self._rest(_MAX_DOUBLINGS, self._full_poll_seconds)
                    else:
                        collisions += 1
                        await self._rest(collisions, _RETRY_MAX_SECONDS)
            finally:
                self.waiting = None

    async def run(self) -> None:
        """Renew the lease in time, for ever."""
        failures = 0
        while True:
            if failures:
                await self._rest(failures, min(_RETRY_MAX_SECONDS, self._settings.renew_seconds))
            else:
                await asyncio.sleep(self._settings.renew_seconds * self._draw.uniform(0.8, 1.0))
            async with self._busy:
                if self.state not in (SlotState.HELD, SlotState.LAPSED):
                    continue
                try:
                    if await self._renewed() is None:
                        self.lost()
                    failures = 0
                except StoreError as error:
                    failures += 1
                    _log.warning(
                        "slot not renewed",
                        slot=self.client_id,
                        age_seconds=round(self.lease_age or 0.0, 1),
                        error=str(error),
                        limit_by="slot not renewed",
                    )

    async def lapse(self) -> None:
        """Renew no more, so that others may take the slot; `acquire` undoes it."""
        if self.state in (SlotState.HELD, SlotState.LAPSED):
            self.losses["isolated"] += 1
            _log.warning("slot left to lapse", slot=self.client_id)
        self._lease.give_up()

    async def release(self) -> None:
        """Free the slot for others; once the connection is closed. Raises `StoreError`."""
        async with self._busy:
            lease, unsure, self._unsure = self._lease, self._unsure, None
            name, token = lease.name, lease.token
            counted = self.state is SlotState.GIVEN_UP  # as isolated
            lease.released()
            if unsure is not None:
                await self._table.release(unsure[0], unsure[1])
            if name is not None and token is not None:
                freed = await self._table.release(name, token)
                if not counted:
                    self.losses["released" if freed else "taken"] += 1
                _log.info("slot freed", slot=name, freed=freed)

    # ---------------------------------------------------------------- steps

    async def _renewed(self) -> str | None:
        """Renew what we hold, or take it again if it is free; None when there is nothing to."""
        if self._unsure is not None:
            maybe, its_token, how = self._unsure
            asked = self._now()
            if await self._table.renew(maybe, its_token):
                return self._enter(maybe, its_token, asked, how)
            self._unsure = None
        lease = self._lease
        name, token = lease.name, lease.token
        if name is None or token is None:
            return None
        asked = self._now()
        if await self._table.renew(name, token):
            lease.renewed(asked)
            return name
        lease.refused()
        if await self._take(name, "again"):
            return name
        lease.lost()
        self.losses["taken"] += 1
        _log.warning("the slot is another's", slot=name)
        return None

    async def _taken(self, collisions: int) -> str | None:
        """Take a slot; None when all are taken or another was faster."""
        slots = await self._table.list()
        if not self._listed:
            self._listed = True
            self._note_former(slots)
        match self._lease.choose(slots, collisions, self._draw):
            case Take(name):
                return name if await self._take(name, "free") else None
            case Create(number):
                name = f"{self._group}-{number}"
                return name if await self._take(name, "created", number) else None
        return None

    async def _take(self, name: str, how: str, number: int | None = None) -> bool:
        token = uuid.uuid4()
        self._unsure = name, token, how
        asked = self._now()
        if number is None:
            taken = await self._table.take(name, self._owner, token)
        else:
            taken = await self._table.create(number, self._owner, token)
        if taken:
            self._enter(name, token, asked, how)
        self._unsure = None
        return taken

    def _enter(self, name: str, token: UUID, asked: float, how: str) -> str:
        self._unsure = None
        self._lease.granted(name, token, asked)
        self.takes[how] += 1
        _log.info("slot taken", slot=name, how=how, owner=self._owner)
        if how == "again":
            self.losses["lapsed"] += 1
            _log.warning("the lease had lapsed; the slot was free and is ours again", slot=name)
        return name

    def _note_former(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.token is not None and is_former_life(slot.owner or ""):
                self.former[slot.name] = slot.token
                _log.info("slot held by an earlier life", slot=slot.name, owner=slot.owner)

    def _wait_for(self, why: str) -> None:
        self.waiting = why
        _log.warning("no slot yet", why=why, limit_by="no slot")

    @property
    def _full_poll_seconds(self) -> float:
        return min(_FULL_POLL_SECONDS, self._settings.renew_seconds)

    async def _rest(self, failures: int, limit_seconds: float) -> None:
        await asyncio.sleep(
            wait_seconds(failures, _RETRY_MIN_SECONDS, limit_seconds, self._draw.uniform)
        )
