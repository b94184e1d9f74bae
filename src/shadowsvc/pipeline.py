"""The way of an update, from PUBLISH to PUBACK; the only place that joins the rooms.

    publish ─▶ decode ─▶ batcher ─▶ worker: merge ─▶ store ─▶ ledger.complete ─▶ PUBACK
                 │ Rejected                                        ▲
                 └──▶ dead letter ─▶ worker: store ────────────────┘

Rules:
1. A delivery is completed only when all that it asks for is durable. There is no other way to an
   ack, and no delivery leaves the pipeline uncompleted but by being left to the broker.
2. `publish` never waits and never raises: memory is bounded by Receive Maximum for QoS 1 and by
   dropping QoS 0 over the budget.
3. An outage is retried for ever, the same statements with the same times, with full jitter. Only
   an update that is refused alone, while a known-good write succeeds, becomes a dead letter.
4. Workers are many and equal; a batch belongs to one worker until it is durable. What waits is in
   `batcher` and `_letters`, what is under way in `_jobs`, and nowhere else.

Must not come in: sockets, drivers, signals, HTTP.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog

from shadowsvc.errors import Rejected, StoreError, StoreRefused
from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.update import Mutations
from shadowsvc.store.batch import Batch, Batcher, halves
from shadowsvc.store.deadletter import DeadLetter, FloodGate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    import mqtt5

    from shadowsvc.ledger import Delivery, Ledger
    from shadowsvc.metrics import Metrics
    from shadowsvc.shadow.document import Decoder
    from shadowsvc.shadow.update import Update

__all__ = ["Options", "Pipeline", "Store"]

_log = structlog.get_logger(__name__)

_CONNECT_PATIENCE_SECONDS = 1.0
_DRAIN_POLL_SECONDS = 0.01
_ACK_DELAY_SECONDS = 0.001
_WEDGED_TIMEOUTS = 5
_WEDGED_IDLE_SECONDS = 5.0


class Store(Protocol):
    """What the pipeline needs from Cassandra; every call raises `StoreError` alone."""

    async def write(self, mutations: Sequence[Mutations | Update]) -> None:
        """Write durably, in one request."""

    async def write_in_parts(self, mutations: Mutations) -> None:
        """Write durably, one device that is too large for one request."""

    async def write_dead_letter(self, letter: DeadLetter) -> None:
        """Write a dead letter durably."""

    async def write_probe(self) -> None:
        """Write something that can't be refused."""


class Options(NamedTuple):
    """Figures of the pipeline; times in seconds, sizes in bytes."""

    client_id: str
    receive_maximum: int = 1000
    max_held_bytes: int = 64 * 1024 * 1024
    max_request_bytes: int = 5120
    linger_seconds: float = 0.005
    concurrency: int = 32
    request_timeout_seconds: float = 2.0
    retry_min_seconds: float = 0.05
    retry_max_seconds: float = 5.0
    max_dead_letters_per_minute: int = 60


class _Letter(NamedTuple):
    letter: DeadLetter
    delivery: Delivery


class Pipeline:
    """Joins session, decoder, batcher, store and ledger. Belongs to the running loop."""

    def __init__(
        self,
        options: Options,
        decoder: Decoder,
        batcher: Batcher,
        store: Store,
        ledger: Ledger,
        metrics: Metrics,
        send: Callable[[bytes], None],
    ) -> None:
        """Make it; `send` writes to the present connection, if there is one."""
        self.options = options
        self.decoder = decoder
        self.batcher = batcher
        self.ledger = ledger
        self.metrics = metrics
        self.draining = False
        self.subscribed = False
        self.failing: str | None = None
        """Why the store's last answer was a failure; None after a success."""
        self.concurrency = options.concurrency
        self.announced = options.receive_maximum
        """The Receive Maximum of the present connection."""
        self.leave: Callable[[str], None] = lambda _reason: None
        """Called to connect anew, with a reason, when too much was announced."""
        self._store = store
        self._send = send
        self._gate = FloodGate(options.max_dead_letters_per_minute)
        self._letters: deque[_Letter] = deque()
        self._loop = asyncio.get_running_loop()
        self._now = time.monotonic()
        self._now_us = time.time_ns() // 1000
        self._linger: asyncio.TimerHandle | None = None
        self._lingered = False
        self._acks_due = False
        self._idle: list[asyncio.Future[None]] = []
        self._jobs: set[Batch | _Letter] = set()
        self._backing_off = 0
        self._calls: dict[int, float] = {}
        self._stalled_since: float | None = None
        self._workers = [
            asyncio.create_task(self._work(), name=f"writer {number}")
            for number in range(options.concurrency)
        ]
        for worker in self._workers:
            worker.add_done_callback(_report_death)

    # ---------------------------------------------------------------- from the connection

    async def begin_connection(self) -> int:
        """Start a new epoch; return the Receive Maximum that is left to announce."""
        self.subscribed = False
        self.ledger.begin_epoch()
        # What is at the driver will be durable in a moment: then its place is free again.
        deadline = time.monotonic() + _CONNECT_PATIENCE_SECONDS
        while self.ledger.held and not self.failing and time.monotonic() < deadline:  # noqa: ASYNC110 - short
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        # Last copies take places; when they take all, there is nothing to connect for yet.
        while self.ledger.last_copies >= self.options.receive_maximum:  # noqa: ASYNC110 - rare
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        self.announced = self.options.receive_maximum - self.ledger.last_copies
        return self.announced

    def connected(self, *, session_present: bool) -> None:
        """Settle what older connections left, by what the broker remembers."""
        self.metrics.sessions["resumed" if session_present else "new"] += 1
        if session_present:
            abandoned = self._abandon_repeated()
            _log.info("session resumed", abandoned=abandoned)
            return
        for delivery in self._waiting_deliveries():
            self.ledger.keep(delivery)
        _log.info("session is new", last_copies=self.ledger.last_copies)
        if self.ledger.last_copies + self.announced > self.options.receive_maximum:
            # Nothing is subscribed yet: connect anew and announce what is left.
            self.leave("receive_maximum")

    def subscribed_now(self) -> None:
        """The share is joined."""
        self.subscribed = True

    def disconnected(self, reason: str) -> None:
        """The connection is gone: acks that become due from now on are stale."""
        self.subscribed = False
        self.ledger.begin_epoch()
        self.metrics.disconnects[reason] += 1

    def begin_chunk(self) -> None:
        """Set the time of the messages that follow."""
        # Not the loop's clock: uvloop's counts whole milliseconds.
        self._now = time.monotonic()
        self._now_us = time.time_ns() // 1000

    def publish(self, topic: str, packet: mqtt5.PublishPacket) -> None:
        """Take one message."""
        metrics = self.metrics
        ledger = self.ledger
        payload = packet.payload
        packet_id = packet.packet_id or 0
        size = len(payload) + len(topic)
        metrics.messages[(2 if packet_id else 0) + packet.duplicate] += 1
        metrics.received_bytes += size
        if self.draining:
            metrics.discarded_draining += 1
            return
        if not packet_id and (
            ledger.held >= self.options.receive_maximum
            or ledger.held_bytes + size > self.options.max_held_bytes
        ):
            metrics.qos0_dropped += 1
            return
        now_us = self._now_us
        delivery = ledger.receive(packet_id, size, self._now)
        properties = packet.user_properties
        # Not the packet itself: it is the heaviest of all that a held delivery keeps alive.
        delivery.message = (
            topic,
            payload,
            packet.retain,
            packet.duplicate,
            properties or (),
        )
        try:
            update = self.decoder.decode(topic, payload, properties, now_us)
        except Rejected as rejected:
            self._reject(delivery, rejected.reason, rejected.detail, rejected.time_us)
            return
        except Exception as error:  # noqa: BLE001 - a defect here must not cost the neighbours
            _log.exception("decoding failed", limit_by="decode")
            self._reject(delivery, "internal_error", type(error).__name__)
            return
        metrics.decoded += 1
        if update.paths or update.deletes:
            update.token = delivery
            self.batcher.add(update)
        else:
            metrics.empty += 1
            self._complete((delivery,))

    def end_chunk(self) -> None:
        """Start what the chunk made ready."""
        if self.batcher.ready or self._letters:
            self._wake()
        if self.batcher.is_open and self._linger is None:
            self._linger = self._loop.call_later(self.options.linger_seconds, self._on_linger)

    def over_receive_maximum(self) -> bool:
        """Whether more waits for an ack than this connection's Receive Maximum allows."""
        return self.ledger.unacknowledged > self.announced

    # ---------------------------------------------------------------- for health and shutdown

    @property
    def in_flight(self) -> int:
        """Requests at the driver now."""
        return len(self._calls)

    def wedged(self, now: float) -> str | None:
        """Say why the pipeline can't go on by itself, or None. An outage is no wedge."""
        limit = _WEDGED_TIMEOUTS * self.options.request_timeout_seconds
        for started in self._calls.values():
            if now - started > limit:
                return f"a request to Cassandra has had no answer for {now - started:.0f} s"
        dead = sum(worker.done() for worker in self._workers)
        if dead:
            return f"{dead} writers have ended"
        planned = bool(self.batcher.ready or self._letters)
        if not planned or self._calls or self._backing_off:
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now  # it may have been planned in this very turn of the loop
        elif now - self._stalled_since > _WEDGED_IDLE_SECONDS:
            return "work is planned and nothing is in flight"
        return None

    async def drain(self, timeout_seconds: float) -> bool:
        """Take nothing more, write what is held; False when that did not end in time."""
        self.draining = True
        self.batcher.seal()
        self._wake()
        deadline = time.monotonic() + timeout_seconds
        while self.ledger.held:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        self._flush_acks()
        return True

    async def close(self) -> None:
        """Stop the workers; what they were writing has an unknown outcome and no ack."""
        if self._linger is not None:
            self._linger.cancel()
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    # ---------------------------------------------------------------- workers

    def _on_linger(self) -> None:
        self._linger = None
        if self._idle:
            self.batcher.seal()
            self._wake()
        else:
            # Every worker is busy: the open batches fill up until one is free.
            self._lingered = True

    def _wake(self) -> None:
        idle = self._idle
        for _ in range(min(len(idle), len(self.batcher.ready) + len(self._letters))):
            future = idle.pop()
            if not future.done():
                future.set_result(None)

    async def _work(self) -> None:
        batcher = self.batcher
        while True:
            if self._letters:
                letter = self._letters.popleft()
                await self._write_letter(letter)
            elif batcher.ready:
                batch = batcher.ready.popleft()
                self._jobs.add(batch)
                try:
                    await self._write_batch(batch)
                finally:
                    self._jobs.discard(batch)
            elif self._lingered and batcher.is_open:
                self._lingered = False
                batcher.seal()
            else:
                self._lingered = False
                future = self._loop.create_future()
                self._idle.append(future)
                await future

    async def _write_batch(self, batch: Batch) -> None:
        """Write a batch until it is durable, split, or left to the broker."""
        attempt = 0
        proven = False
        while True:
            # An update that is alone needs no merging: the store takes it as it is.
            mutations = [
                updates[0] if len(updates) == 1 else merge(updates)
                for updates in batch.devices.values()
            ]
            try:
                if batch.size_bytes > self.options.max_request_bytes and len(mutations) == 1:
                    whole = merge(next(iter(batch.devices.values())))
                    await self._call(self._store.write_in_parts(whole))
                else:
                    await self._call(self._store.write(mutations))
            except StoreRefused as error:
                if len(batch) > 1:
                    await self._write_halves(batch)
                elif proven:
                    self._condemn(batch, error)
                else:
                    # Refused again after a write that can't be refused: then it is guilty.
                    proven = await self._prove_store(batch)
                    if proven:
                        continue
                return
            except StoreError as error:
                proven = False
                attempt += 1
                await self._back_off(attempt, error)
                if not self._still_wanted(batch):
                    return
                continue
            self._durable(batch, mutations)
            return

    def _durable(self, batch: Batch, mutations: list[Mutations | Update]) -> None:
        metrics = self.metrics
        now_us = time.time_ns() // 1000
        updates = batch.updates()
        metrics.device_to_durable_us.observe_each([now_us - update.time_us for update in updates])
        count = len(updates)
        metrics.updates_durable += count
        metrics.batch_partitions.observe(len(mutations))
        if count > len(mutations):
            metrics.updates_merged += count - len(mutations)
            metrics.leaves_merged_away += sum(
                mutation.merged_away for mutation in mutations if isinstance(mutation, Mutations)
            )
        self._complete([update.token for update in updates])  # type: ignore[misc]  # `publish`

    async def _write_halves(self, batch: Batch) -> None:
        """Write a refused batch in two parts, on the way to the update that is refused alone."""
        self.metrics.batches_split += 1
        for part in halves(batch) or ():
            self._jobs.add(part)
            try:
                await self._write_batch(part)
            finally:
                self._jobs.discard(part)

    async def _prove_store(self, batch: Batch) -> bool:
        """Write what can't be refused until that works; False when the batch was left meanwhile.

        A table that refuses everything is an outage, not a bad update.
        """
        attempt = 0
        while True:
            try:
                await self._call(self._store.write_probe())
            except StoreError as error:
                attempt += 1
                await self._back_off(attempt, error)
                if not self._still_wanted(batch):
                    return False
            else:
                return self._still_wanted(batch)

    def _condemn(self, batch: Batch, error: StoreRefused) -> None:
        """Make a dead letter of the one update of a batch."""
        if self._still_wanted(batch):
            _log.error("the store refuses an update", error=str(error), limit_by=error.kind)
            update = batch.updates()[0]
            self._reject(_delivery(update), "refused_by_store", str(error), update.time_us)
            self._wake()

    async def _write_letter(self, item: _Letter) -> None:
        attempt = 0
        self._jobs.add(item)
        try:
            while not item.delivery.done:
                try:
                    await self._call(self._store.write_dead_letter(item.letter))
                except StoreError as error:
                    attempt += 1
                    await self._back_off(attempt, error)
                    continue
                self.metrics.dead_letters[item.letter.reason] += 1
                self._complete((item.delivery,))
        finally:
            self._jobs.discard(item)

    async def _call(self, request: Awaitable[None]) -> None:
        """Await one request to the store; count it, its time and its failure."""
        started = time.monotonic()
        key = id(request)
        self._calls[key] = started
        self._stalled_since = None
        try:
            await request
        except StoreError as error:
            self.metrics.write_errors[error.kind] += 1
            raise
        else:
            if self.failing:
                self._recovered()
        finally:
            del self._calls[key]
            self.metrics.write_seconds.observe(time.monotonic() - started)

    async def _back_off(self, attempt: int, error: StoreError) -> None:
        """Wait before the next attempt: full jitter, doubling up to the limit.

        Whatever is tried again is an outage: a refused probe or dead letter too.
        """
        self._failed(error)
        options = self.options
        self.metrics.write_retries[error.kind] += 1
        doublings = min(attempt - 1, 16)
        ceiling = min(options.retry_max_seconds, options.retry_min_seconds * 2**doublings)
        self._backing_off += 1
        try:
            await asyncio.sleep(random.uniform(options.retry_min_seconds / 2, ceiling))  # noqa: S311
        finally:
            self._backing_off -= 1

    def _failed(self, error: StoreError) -> None:
        if self.failing is None:
            _log.warning("writes fail and are retried", kind=error.kind, error=str(error))
        self.failing = f"{error.kind}: {error}"

    def _recovered(self) -> None:
        self.failing = None
        _log.info("writes succeed again")

    # ---------------------------------------------------------------- deliveries

    def _reject(
        self, delivery: Delivery, reason: str, detail: str, device_us: int | None = None
    ) -> None:
        """Make a dead letter of a message, or count it when its sender floods."""
        self.metrics.rejected[reason] += 1
        topic, payload, retain, duplicate, properties = delivery.message
        device = self.decoder.device_of(topic)
        if not self._gate.admits(device or topic[:160], self._now):
            self.metrics.dead_letters_suppressed += 1
            self._complete((delivery,))
            return
        letter = DeadLetter.of(
            topic=topic,
            payload=payload,
            device=device,
            reason=reason,
            detail=detail,
            received_ms=int((time.time() - (time.monotonic() - delivery.received)) * 1000),
            client_id=self.options.client_id,
            device_us=device_us,
            qos=1 if delivery.packet_id else 0,
            retain=retain,
            duplicate=duplicate,
            user_properties=properties,
        )
        # The row is made: the whole payload need not be held any longer.
        delivery.message = None
        self._letters.append(_Letter(letter, delivery))

    def _complete(self, deliveries: Iterable[Delivery]) -> None:
        self.ledger.complete(deliveries)
        if not self._acks_due:
            # Batches that end within a millisecond share one write of acks, and so do the
            # messages that the broker sends upon them.
            self._acks_due = True
            self._loop.call_later(_ACK_DELAY_SECONDS, self._flush_acks)

    def _flush_acks(self) -> None:
        self._acks_due = False
        acks = self.ledger.take_acks()
        if acks:
            self._send(acks)

    def _still_wanted(self, batch: Batch) -> bool:
        """Take out of a waiting batch what was left to the broker; False when nothing is left."""
        for device, updates in list(batch.devices.items()):
            kept = [update for update in updates if not _delivery(update).done]
            if len(kept) < len(updates):
                if kept:
                    batch.devices[device] = kept
                else:
                    del batch.devices[device]
        return bool(batch.devices)

    def _waiting_deliveries(self) -> list[Delivery]:
        """Every delivery held, at the driver or not."""
        waiting = [item.delivery for item in self._letters]
        for batch in self.batcher.batches():
            waiting.extend(map(_delivery, batch.updates()))
        for job in self._jobs:
            if isinstance(job, Batch):
                waiting.extend(map(_delivery, job.updates()))
            else:
                waiting.append(job.delivery)
        return waiting

    def _abandon_repeated(self) -> int:
        """Drop what the broker repeats and Cassandra has not yet got; return how many."""
        ledger = self.ledger
        before = ledger.abandoned
        for update in self.batcher.drop(lambda update: ledger.is_repeated(_delivery(update))):
            ledger.abandon(_delivery(update))
        kept = deque[_Letter]()
        for item in self._letters:
            if ledger.is_repeated(item.delivery):
                ledger.abandon(item.delivery)
            else:
                kept.append(item)
        self._letters = kept
        if self.failing:
            # What waits for its next attempt is in memory alone too; workers look before it.
            for delivery in self._waiting_deliveries():
                if ledger.is_repeated(delivery):
                    ledger.abandon(delivery)
        return ledger.abandoned - before


def _report_death(worker: asyncio.Task[None]) -> None:
    if not worker.cancelled() and (error := worker.exception()) is not None:
        _log.critical("a writer ended", exc_info=error)


def _delivery(update: Update) -> Delivery:
    return update.token  # type: ignore[return-value]  # set by `Pipeline.publish`
