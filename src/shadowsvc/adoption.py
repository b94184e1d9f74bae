"""Adoption: orphaned slots are emptied by a process that lives, so that nothing is stranded.

Theory. A process that is gone for good leaves a slot behind: a client id, and at the broker a
session that holds what it never acknowledged. Other members of the share do not get that. So a
process takes the slot's lease, fetches everything (`mqtt.adoption`), and deletes the slot:

    free ──seen free for `orphan_after`──▶ due ──lease taken──▶ adopting ──emptied, absent──▶ gone
                                            ▲                      │
                                            └─────── later ◀───────┘ any error: the session is kept,
                                                                     the lease given back

Rules:
1. Only a process that has joined the share itself and whose store works adopts, and one slot at a
   time. What it fetches goes through a pipeline of its own: ledgers belong to one connection.
2. Free means seen free again and again by this process's own monotonic clock; time for which it did
   not look counts for nothing. Each process waits a little longer by its own draw, so that not all
   run for the same slot. For what its own earlier life held nobody comes back: that is due as soon
   as its lease has ended.
3. The lease is renewed while the adoption lasts. Refused, or not renewed within its time: the
   connection is left at once, with the session kept. Nobody is fought.
4. A new adoption begins only when nothing of the last one is held any more.

Must not come in: MQTT (`mqtt.adoption`), statements (`store.slots`), the own slot (`slots`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import structlog

from shadowsvc.backoff import wait_seconds
from shadowsvc.errors import MqttError, StoreError
from shadowsvc.slots import TTL_GRAIN_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from uuid import UUID

    import mqtt5

    from shadowsvc.metrics import Metrics
    from shadowsvc.mqtt.adoption import Adoption, Emptier
    from shadowsvc.pipeline import Pipeline
    from shadowsvc.store.slots import Slot

__all__ = ["OUTCOMES", "Adopter", "Orphans", "Table", "Terms"]

_log = structlog.get_logger(__name__)

OUTCOMES: Final = {
    "emptied": "all was fetched, the slot is deleted",
    "absent": "the broker knew no such session, the slot is deleted",
    "taken": "another process was faster",
    "lease_lost": "the lease was refused or could not be renewed in time",
    "broker": "the connection failed or was lost",
    "timeout": "an answer, a message or the quiet did not come in time",
    "store": "the table of slots could not be reached",
    "left": "the service stopped or paused",
    "error": "a defect; the log has it",
}
"""Every way in which an adoption ends."""

_SPREAD = 0.25
_MAX_RETRY_SECONDS = 600.0
_POLL_SECONDS = 0.1
_GONE: Final = object()
_LEAVE_SECONDS = 3.0
"""What a stop keeps of its time for leaving the broker and giving the lease back."""


class Table(Protocol):
    """What is needed of `shadowsvc.store.slots.SlotTable`; calls raise `StoreError`."""

    async def list(self) -> list[Slot]:
        """Return every slot."""

    async def take(self, name: str, owner: str, token: UUID) -> bool:
        """Take a free slot."""

    async def renew(self, name: str, token: UUID) -> bool:
        """Start the TTL anew."""

    async def release(self, name: str, token: UUID) -> bool:
        """Free a slot."""

    async def delete(self, name: str, token: UUID) -> bool:
        """Delete a slot."""


class Terms(NamedTuple):
    """Times of the adoptions, in seconds."""

    lease_seconds: float = 30.0
    renew_seconds: float = 10.0
    orphan_after_seconds: float = 300.0


class Orphans:
    """Which slots are orphaned and when they are due. Pure: times are handed in, seconds."""

    def __init__(
        self, terms: Terms, jitter: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._terms = terms
        self._jitter = jitter
        self._since: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._failures: Counter[str] = Counter()
        self._hastened: frozenset[str] = frozenset()
        self._looked: float | None = None

    def hasten(self, names: Iterable[str]) -> None:
        """Let these, and no others, be due as soon as they are free: nobody comes back for them."""
        self._hastened = frozenset(names)

    def look(self, free: Iterable[str], now: float) -> None:
        """Note which slots are free now; call it every `renew_seconds` or so."""
        unseen = 0.0 if self._looked is None else now - self._looked
        if unseen > 3 * self._terms.renew_seconds + 1:
            # A slot may have been taken and lost meanwhile.
            self._since.clear()
        self._looked = now
        names = set(free)
        for name in [known for known in self._since if known not in names]:
            self.forget(name)
        for name in names:
            if name not in self._since:
                self._since[name] = now
                wait = 0.0 if name in self._hastened else self._terms.orphan_after_seconds
                self._due[name] = now + self._jitter(wait, wait * (1 + _SPREAD))

    def count(self, now: float) -> int:
        """How many slots are orphaned."""
        oldest = now - self._terms.orphan_after_seconds
        return sum(since <= oldest for since in self._since.values())

    def due(self, now: float) -> str | None:
        """Return the slot that has been due for the longest, if one is."""
        ready = [name for name in self._since if self._due[name] <= now]
        return min(ready, key=self._due.__getitem__, default=None)

    def postpone(self, name: str, now: float) -> float:
        """Try a slot later: full jitter, doubling each time; return the wait in seconds."""
        self._failures[name] += 1
        first = self._terms.renew_seconds
        longest = max(first, _MAX_RETRY_SECONDS)
        wait = wait_seconds(self._failures[name], first, longest, self._jitter)
        self._due[name] = now + wait
        return wait

    def forget(self, name: str) -> None:
        """It is taken or gone."""
        self._since.pop(name, None)
        self._due.pop(name, None)
        del self._failures[name]


class Adopter:
    """Watches the slots of the group and adopts orphans. Belongs to the running loop."""

    def __init__(
        self,
        table: Table,
        pipeline: Pipeline,
        make: Callable[[str, Emptier], Adoption],
        metrics: Metrics,
        *,
        terms: Terms,
        owner: str,
        own_slot: Callable[[], str | None],
        may_adopt: Callable[[], bool],
        must_leave: Callable[[], bool],
        former: dict[str, UUID] | None = None,
        now: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Make it; nothing happens before `run`.

        Args:
            table: of slots.
            pipeline: for what adoptions fetch, and for nothing else; its owner closes it.
            make: makes an attempt at a slot's session, given its client id and who takes messages.
            metrics: where to count.
            terms: the times.
            owner: what the table shows people as the owner of a slot that is being adopted.
            own_slot: the client id of this process.
            may_adopt: whether this process has joined the share and can write.
            must_leave: whether the broker has to be left now.
            former: slots that an earlier life of this process held, with its tokens; what is found
                to be another's is taken out.
            now: the clock, in seconds.
            jitter: draws between two times.
        """
        self.pipeline = pipeline
        self.orphans = Orphans(terms, jitter)
        self.adopting: str | None = None
        """The slot that is being adopted."""
        self._table = table
        self._make = make
        self._metrics = metrics
        self._terms = terms
        self._owner = owner
        self._own_slot = own_slot
        self._may_adopt = may_adopt
        self._must_leave = must_leave
        self._former = {} if former is None else former
        self._now = now
        self._jitter = jitter
        self._taker = _Taker(pipeline, metrics)
        self._adoption: Adoption | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    async def run(self) -> None:
        """Look and adopt until cancelled; nothing is raised. `stop` remains to be called."""
        while True:
            await asyncio.sleep(self._terms.renew_seconds * self._jitter(0.8, 1.2))
            try:
                slots = await self._table.list()
            except StoreError as error:
                _log.debug("slots can't be listed", error=str(error))
                continue
            self._look(slots)

    def send(self, data: bytes) -> None:
        """Write acks to the adopted session's connection; without one they are dropped."""
        if self._adoption is not None:
            self._adoption.send(data)

    async def stop(self, timeout_seconds: float) -> None:
        """Adopt nothing more; leave an adoption that is under way, its session kept.

        What is fetched already is finished and acknowledged if that can be done in time.
        """
        deadline = self._now() + timeout_seconds
        await self.pipeline.drain(max(0.0, timeout_seconds - _LEAVE_SECONDS))
        self._stopping = True
        task, self._task = self._task, None
        if task is not None:
            await asyncio.wait([task], timeout=max(0.1, deadline - self._now()))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _look(self, slots: Sequence[Slot]) -> None:
        """Take in what the table says; begin an adoption if one is due."""
        now = self._now()
        own = self._own_slot()
        free = {slot.name for slot in slots if slot.token is None and slot.name != own}
        if self.adopting is not None:
            free.add(self.adopting)
        if self._former:
            self._check_former(slots)
        self.orphans.look(free, now)
        self._metrics.orphaned_slots = self.orphans.count(now)
        busy = self._task is not None and not self._task.done()
        if busy or self._stopping or self.pipeline.draining or self.pipeline.ledger.held:
            return
        name = self.orphans.due(now) if self._may_adopt() else None
        if name is not None:
            self._task = asyncio.create_task(self._adopt(name), name="adoption")
            self._task.add_done_callback(_report_defect)

    def _check_former(self, slots: Sequence[Slot]) -> None:
        """Keep of what an earlier life held what nobody else has taken since."""
        tokens = {slot.name: slot.token for slot in slots}
        for name, token in list(self._former.items()):
            if name != self.adopting and tokens.get(name, _GONE) not in (None, token):
                del self._former[name]
        self.orphans.hasten(self._former)

    async def _adopt(self, name: str) -> None:
        """Take the lease of a slot, empty its session, delete it; or give it back."""
        token = uuid.uuid4()
        started = self._now()
        self._taker.messages = 0
        try:
            if not await self._table.take(name, self._owner, token):
                self._metrics.adoptions["taken"] += 1
                self.orphans.forget(name)
                return
        except StoreError as error:
            # Should the lease be ours in spite of this, it ends by itself.
            self._ended(name, "store", str(error), started)
            return
        self.adopting = name
        self._metrics.adopting = True
        _log.info("adoption started", slot=name)
        try:
            outcome, problem = await self._adopt_under_lease(name, token, started)
            await self._settle(name, token, outcome)
        finally:
            self.adopting = None
            self._metrics.adopting = False
        self._ended(name, outcome, problem, started)

    def _ended(self, name: str, outcome: str, error: str | None, started: float) -> None:
        self._metrics.adoptions[outcome] += 1
        now = self._now()
        again: float | None = None
        if outcome in {"emptied", "absent"}:
            self.orphans.forget(name)
        else:
            again = round(self.orphans.postpone(name, now), 3)
        _log.log(
            logging.WARNING if error else logging.INFO,
            "adoption ended",
            slot=name,
            outcome=outcome,
            error=error,
            messages=self._taker.messages,
            seconds=round(now - started, 3),
            retry_seconds=again,
        )

    async def _adopt_under_lease(
        self, name: str, token: UUID, taken: float
    ) -> tuple[str, str | None]:
        """Run an attempt as long as the lease is ours; return the outcome and what went wrong."""
        self.pipeline.identify(name)
        self._adoption = self._make(name, self._taker)
        work = asyncio.create_task(self._adoption.run(), name="adopted connection")
        lease = asyncio.create_task(self._keep_lease(name, token, taken), name="adoption lease")
        leave = asyncio.create_task(self._until_told_to_leave(), name="adoption leave")
        tasks = (work, lease, leave)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()  # it leaves in good order first
                await asyncio.wait([work])
            if work.cancelled():
                return ("lease_lost", lease.result()) if lease.done() else ("left", None)
            return work.result().value, None
        except MqttError as error:
            slow = error.reason.startswith("stalled") or error.reason == "restless"
            return "timeout" if slow else "broker", f"{error.reason}: {error}"
        except Exception as error:  # noqa: BLE001 - a defect must not end the adopter
            _log.exception("an adoption failed", slot=name)
            return "error", type(error).__name__
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._adoption = None

    async def _keep_lease(self, name: str, token: UUID, taken: float) -> str:
        """Renew until that fails; return why."""
        trusted = self._terms.lease_seconds - TTL_GRAIN_SECONDS
        until = taken + trusted
        wait = self._terms.renew_seconds
        while True:
            await asyncio.sleep(min(wait, max(0.0, until - self._now())))
            asked = self._now()
            try:
                async with asyncio.timeout(max(0.0, until - asked)):
                    if not await self._table.renew(name, token):
                        return "the lease of the slot is another's now"
            except (StoreError, TimeoutError) as error:
                if self._now() >= until:
                    return f"the lease could not be renewed in time: {str(error) or 'no answer'}"
                wait = self._terms.renew_seconds / 4
            else:
                until = asked + trusted
                wait = self._terms.renew_seconds

    async def _until_told_to_leave(self) -> None:
        while not self._stopping and not self._must_leave():  # noqa: ASYNC110 - conditions of others
            await asyncio.sleep(_POLL_SECONDS)

    async def _settle(self, name: str, token: UUID, outcome: str) -> None:
        """Delete the slot or give it back. What fails here is mended by the end of the lease."""
        if outcome == "lease_lost":
            return
        done = outcome in {"emptied", "absent"}
        call = self._table.delete if done else self._table.release
        try:
            await call(name, token)
        except StoreError as error:
            # The session is gone already: whoever takes the slot finds it absent.
            _log.warning("a slot could not be given up", slot=name, delete=done, error=str(error))


def _report_defect(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("an adoption ended by a defect", exc_info=error)


class _Taker:
    """Hands what an adopted session delivers to the pipeline. An `Emptier`."""

    def __init__(self, pipeline: Pipeline, metrics: Metrics) -> None:
        self.messages = 0
        self._incomplete = False
        """Something was left to the broker: the session has to be kept, whatever comes."""
        self.begin_chunk = pipeline.begin_chunk
        self.end_chunk = pipeline.end_chunk
        self.over_receive_maximum = pipeline.over_receive_maximum
        self._pipeline = pipeline
        self._metrics = metrics

    async def begin_connection(self) -> int:
        self._incomplete = False
        return await self._pipeline.begin_connection()

    # Nothing of another connection is held when an adoption begins (rule 4): CONNACK has nothing
    # to decide.
    def connected(self, *, session_present: bool) -> None: ...

    def subscribed_now(self) -> None: ...

    def publish(self, topic: str, packet: mqtt5.PublishPacket) -> None:
        self.messages += 1
        self._metrics.adopted_messages += 1
        self._incomplete = self._incomplete or self._pipeline.draining
        self._pipeline.publish(topic, packet)

    def disconnected(self, reason: str) -> None:  # noqa: ARG002 - counted as an outcome instead
        self._pipeline.ledger.begin_epoch()

    @property
    def settled(self) -> bool:
        ledger = self._pipeline.ledger
        return not self._incomplete and not ledger.held and not ledger.unacknowledged

    @property
    def finished(self) -> int:
        ledger = self._pipeline.ledger
        return ledger.acknowledged + ledger.stale + ledger.done_without_ack
