"""The way of an update, from PUBLISH to PUBACK; the only place that joins the rooms.

    publish ─▶ decode ─▶ batcher ─▶ writers: merge ─▶ store ─▶ ledger.complete ─▶ PUBACK
                 │ Rejected                                         ▲
                 └──▶ dead letter ─▶ writers: store ────────────────┘

Rules:
1. A delivery is completed only when all that it asks for is durable. There is no other way to an
   ack, and no delivery leaves the pipeline uncompleted but by being left to the broker.
2. `publish` never waits and never raises: memory is bounded by Receive Maximum for QoS 1 and by
   dropping QoS 0 over the budget.
3. What waits is in `batcher`, what is under way in `writers`, and nowhere else.

Must not come in: sockets, drivers, signals, HTTP.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

import structlog

from shadowsvc.errors import Rejected
from shadowsvc.store.deadletter import DeadLetter, FloodGate
from shadowsvc.writers import Figures, Store, Writers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import mqtt5

    from shadowsvc.errors import StoreRefused
    from shadowsvc.ledger import Delivery, Ledger
    from shadowsvc.metrics import Metrics
    from shadowsvc.shadow.document import Decoder
    from shadowsvc.shadow.update import Update
    from shadowsvc.store.batch import Batcher

__all__ = ["Options", "Pipeline", "Store"]

_log = structlog.get_logger(__name__)

_CONNECT_PATIENCE_SECONDS = 1.0
_DRAIN_POLL_SECONDS = 0.01
_NOT_ASKED = frozenset({"connect", "connect_timeout", "tls", "stopping"})
"""Ends of connections that never came to a CONNECT."""
_ACK_DELAY_SECONDS = 0.001


class Options(NamedTuple):
    """Figures of the pipeline; times in seconds, sizes in bytes."""

    client_id: str
    receive_maximum: int = 1000
    max_held_bytes: int = 64 * 1024 * 1024
    linger_seconds: float = 0.005
    min_concurrency: int = 2
    concurrency: int = 32
    request_timeout_seconds: float = 2.0
    retry_min_seconds: float = 0.05
    retry_max_seconds: float = 5.0
    max_dead_letters_per_minute: int = 60
    marker_prefix: str = ""
    """What the topics of markers begin with: messages of adoptions, which are no updates."""
    failing_after_seconds: float = 1.0
    """Writes that are retried for longer make the service not ready."""


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
        self._connected_as: str | None = None
        """The client id of the last session that the broker confirmed."""
        self._asking = False
        """Whether a connection is being made that has no CONNACK yet."""
        self._unanswered = False
        """Whether a CONNECT since then may have reached the broker and was never answered."""
        self.announced = options.receive_maximum
        """The Receive Maximum of the present connection."""
        self.leave: Callable[[str], None] = lambda _reason: None
        """Called to connect anew, with a reason, when too much was announced."""
        self._send = send
        self._gate = FloodGate(options.max_dead_letters_per_minute)
        self._loop = asyncio.get_running_loop()
        self._now = time.monotonic()
        self._now_us = time.time_ns() // 1000
        self._acks_due = False
        self.writers = Writers(
            Figures(
                linger_seconds=options.linger_seconds,
                min_concurrency=options.min_concurrency,
                concurrency=options.concurrency,
                request_timeout_seconds=options.request_timeout_seconds,
                retry_min_seconds=options.retry_min_seconds,
                retry_max_seconds=options.retry_max_seconds,
                failing_after_seconds=options.failing_after_seconds,
            ),
            batcher,
            store,
            metrics,
            completed=self._complete,
            condemned=self._condemn,
        )

    # ---------------------------------------------------------------- from the connection

    async def begin_connection(self) -> int:
        """Start a new epoch; return the Receive Maximum that is left to announce."""
        self.subscribed = False
        self._asking = True
        self.ledger.begin_epoch()
        # What is at the driver will be durable in a moment: then its place is free again.
        deadline = time.monotonic() + _CONNECT_PATIENCE_SECONDS
        while self.ledger.held and time.monotonic() < deadline:
            if self.writers.in_trouble:
                break
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        # Last copies take places; when they take all, there is nothing to connect for yet.
        while self.ledger.last_copies >= self.options.receive_maximum:  # noqa: ASYNC110 - rare
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        self.announced = self.options.receive_maximum - self.ledger.last_copies
        return self.announced

    def identify(self, client_id: str) -> None:
        """Go by this client id from now on: the next connection will, and dead letters do."""
        if client_id != self.options.client_id:
            self.options = self.options._replace(client_id=client_id)

    def connected(self, *, session_present: bool) -> None:
        """Settle what older connections left, by what the broker remembers."""
        self.metrics.sessions["resumed" if session_present else "new"] += 1
        client_id = self.options.client_id
        former, self._connected_as = self._connected_as, client_id
        # A CONNECT without an answer may have made the session that is resumed now.
        doubtful, self._unanswered = self._unanswered, False
        self._asking = False
        if session_present and former in (None, client_id) and not doubtful:
            abandoned = self._abandon_repeated()
            _log.info("session resumed", client_id=client_id, abandoned=abandoned)
            return
        # What came by another client id is not repeated to this one; it may be the last copy.
        for delivery in self._waiting_deliveries():
            self.ledger.keep(delivery)
        _log.info(
            "another session resumed" if session_present else "session is new",
            client_id=client_id,
            doubtful=doubtful,
            last_copies=self.ledger.last_copies,
        )
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
        asked = reason not in _NOT_ASKED and not reason.startswith("connack_")
        self._unanswered |= self._asking and asked
        self._asking = False

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
        if self.writers.has_work:
            self.writers.wake()
        if self.batcher.is_open:
            self.writers.linger()

    def over_receive_maximum(self) -> bool:
        """Whether more waits for an ack than this connection's Receive Maximum allows."""
        return self.ledger.unacknowledged > self.announced

    # ---------------------------------------------------------------- for health and shutdown

    @property
    def in_flight(self) -> int:
        """Requests at the driver now."""
        return self.writers.in_flight

    @property
    def concurrency(self) -> int:
        """How many requests may be at the driver now."""
        return self.writers.window.limit

    @property
    def failing(self) -> str | None:
        """Why writes fail, while one has been retried for more than a moment; else None."""
        return self.writers.failing

    @property
    def failing_since(self) -> float | None:
        """Since when every write failed, monotonic seconds; None after a success."""
        return self.writers.failing_since

    def wedged(self, now: float) -> str | None:
        """Say why the pipeline can't go on by itself, or None. An outage is no wedge."""
        return self.writers.wedged(now)

    async def drain(self, timeout_seconds: float) -> bool:
        """Take nothing more, write what is held; False when that did not end in time.

        For a stop and for a pause; after a pause `take_again`.
        """
        self.draining = True
        self.batcher.seal()
        self.writers.wake()
        deadline = time.monotonic() + timeout_seconds
        while self.ledger.held:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        self._flush_acks()
        return True

    def take_again(self) -> None:
        """Undo `drain`: a pause is over."""
        self.draining = False

    async def close(self) -> None:
        """Stop the workers; what they were writing has an unknown outcome and no ack."""
        await self.writers.close()

    # ---------------------------------------------------------------- deliveries

    def _reject(
        self, delivery: Delivery, reason: str, detail: str, device_us: int | None = None
    ) -> None:
        """Make a dead letter of a message, or count it when its sender floods."""
        topic, payload, retain, duplicate, properties = delivery.message
        markers = self.options.marker_prefix
        if markers and topic.startswith(markers):
            # Also where none is awaited: that of an adoption that was given up may come here.
            self.metrics.markers += 1
            self._complete((delivery,))
            return
        self.metrics.rejected[reason] += 1
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
        self.writers.add_letter(letter, delivery)

    def _condemn(self, update: Update, error: StoreRefused) -> None:
        """Make a dead letter of an update that the store will never take."""
        self._reject(_delivery(update), "refused_by_store", str(error), update.time_us)

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

    def _waiting_deliveries(self) -> list[Delivery]:
        """Every delivery held, at the driver or not."""
        waiting: list[Delivery] = list(self.writers.deliveries())
        for batch in self.batcher.batches():
            waiting.extend(map(_delivery, batch.updates()))
        return waiting

    def _abandon_repeated(self) -> int:
        """Drop what the broker repeats and Cassandra has not yet got; return how many."""
        ledger = self.ledger
        before = ledger.abandoned
        for update in self.batcher.drop(lambda update: ledger.is_repeated(_delivery(update))):
            ledger.abandon(_delivery(update))
        self.writers.abandon(ledger.abandon)
        return ledger.abandoned - before


def _delivery(update: Update) -> Delivery:
    return update.token  # type: ignore[return-value]  # set by `Pipeline.publish`
