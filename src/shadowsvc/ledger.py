"""The ledger: what was delivered and not yet acknowledged, and in which order acks may leave.

Theory. A delivery is *held* from the moment it was received until it is completed (what it asks
for is durable) or abandoned (the broker will send it again). PUBACKs leave in the order in which
the PUBLISH packets came (MQTT-4.6.0-2): a completed delivery waits until all before it are
completed, and then the whole contiguous prefix leaves in one write.

Three rules:
1. An ack belongs to the connection, the *epoch*, that its delivery came by. Packet ids are reused,
   so an ack of an older epoch is never sent: it is counted as stale and the broker's repetition
   is acknowledged instead.
2. A new epoch begins with a question that CONNACK answers. `session_present=1`: the broker repeats
   what was unacknowledged, so old deliveries that are not on their way to Cassandra may be
   abandoned. `session_present=0`: they are the *last copy*; they are kept until durable, and
   counted, since each takes a place from the next Receive Maximum.
3. Nothing is forgotten: every delivery received ends as exactly one of acknowledged, stale,
   abandoned, done without ack (QoS 0 and last copies), or is still held.

Must not come in: sockets, batches, clocks (times are handed in, seconds on any steady clock).
"""

from __future__ import annotations

from collections import deque
from struct import Struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["LAST_COPY", "Delivery", "Ledger"]

LAST_COPY = -1
"""The epoch of a delivery that no broker holds any more."""

# PUBACK with reason code 0 and no properties is these four bytes: 0x40, length 2, packet id
# (MQTT 5 §3.4.2.1: the reason code may be left out when it is 0).
_PUBACK = 0x4002_0000
_MAX_PACKED = 512
_PACKERS = [Struct(f">{count}I").pack for count in range(_MAX_PACKED + 1)]


class Delivery:
    """One message received: its packet id (0 for QoS 0), epoch, size in bytes and receive time.

    `message` is the owner's: what is needed to make a dead letter of it.
    """

    __slots__ = ("done", "epoch", "message", "packet_id", "received", "size_bytes")

    message: Any

    def __init__(self, packet_id: int, epoch: int, size_bytes: int, received: float) -> None:
        self.packet_id = packet_id
        self.epoch = epoch
        self.size_bytes = size_bytes
        self.received = received
        self.done = False

    def __repr__(self) -> str:
        return f"Delivery({self.packet_id}, epoch={self.epoch}, done={self.done})"


class Ledger:
    """Deliveries held, over all epochs, and the acks that may leave in the present one."""

    __slots__ = (
        "_queue",
        "abandoned",
        "acknowledged",
        "done_without_ack",
        "epoch",
        "held",
        "held_bytes",
        "last_copies",
        "observe",
        "received",
        "stale",
    )

    def __init__(self, observe: Callable[[float, int], None] | None = None) -> None:
        """Make an empty ledger in epoch 0.

        `observe` is called with (receive time, count) for deliveries that are acknowledged:
        neighbours that share their receive time come as one call.
        """
        self._queue: deque[Delivery] = deque()
        self.observe = observe
        self.epoch = 0
        self.held = 0
        self.held_bytes = 0
        self.last_copies = 0
        self.received = 0
        self.acknowledged = 0
        self.stale = 0
        self.abandoned = 0
        self.done_without_ack = 0

    @property
    def unacknowledged(self) -> int:
        """Deliveries of the present epoch that wait for their ack, completed or not."""
        return len(self._queue)

    @property
    def oldest(self) -> float | None:
        """Receive time of the oldest delivery that waits for its ack in this epoch."""
        return self._queue[0].received if self._queue else None

    def begin_epoch(self) -> int:
        """Start the epoch of a new connection; acks of the former one can't leave any more."""
        self.epoch += 1
        # Completed but unsent acks of the old epoch: the broker will repeat those messages.
        self.stale += sum(1 for delivery in self._queue if delivery.done)
        self._queue.clear()
        return self.epoch

    def receive(self, packet_id: int, size_bytes: int, received: float) -> Delivery:
        """Enter a delivery of the present epoch; `packet_id` 0 means QoS 0, never acknowledged."""
        delivery = Delivery(packet_id, self.epoch, size_bytes, received)
        self.received += 1
        self.held += 1
        self.held_bytes += size_bytes
        if packet_id:
            self._queue.append(delivery)
        return delivery

    def complete(self, deliveries: Iterable[Delivery]) -> None:
        """Mark deliveries as durable: their acks may leave when their turn comes."""
        epoch = self.epoch
        for delivery in deliveries:
            if delivery.done:
                continue
            delivery.done = True
            self.held -= 1
            self.held_bytes -= delivery.size_bytes
            if not delivery.packet_id:
                self.done_without_ack += 1
            elif delivery.epoch == LAST_COPY:
                self.done_without_ack += 1
                self.last_copies -= 1
            elif delivery.epoch != epoch:
                self.stale += 1

    def is_repeated(self, delivery: Delivery) -> bool:
        """Whether the broker, having kept the session, sends this delivery again."""
        return delivery.packet_id != 0 and delivery.epoch not in (self.epoch, LAST_COPY)

    def keep(self, delivery: Delivery) -> None:
        """Mark a delivery of an older epoch as the last copy: the broker lost the session."""
        if not delivery.done and self.is_repeated(delivery):
            delivery.epoch = LAST_COPY
            self.last_copies += 1

    def abandon(self, delivery: Delivery) -> None:
        """Forget a delivery of an older epoch that the broker sends again; no other."""
        if not delivery.done and self.is_repeated(delivery):
            delivery.done = True
            self.held -= 1
            self.held_bytes -= delivery.size_bytes
            self.abandoned += 1

    def take_acks(self) -> bytes:
        """Return the PUBACK packets that may leave now, in receive order; empty when none may."""
        queue = self._queue
        words: list[int] = []
        observe = self.observe
        received = -1.0
        count = 0
        while queue and queue[0].done:
            delivery = queue.popleft()
            words.append(_PUBACK | delivery.packet_id)
            if delivery.received == received:
                count += 1
            else:
                if count and observe is not None:
                    observe(received, count)
                received = delivery.received
                count = 1
        if not words:
            return b""
        if count and observe is not None:
            observe(received, count)
        self.acknowledged += len(words)
        if len(words) <= _MAX_PACKED:
            return _PACKERS[len(words)](*words)
        return b"".join(
            _PACKERS[len(part)](*part)
            for part in (words[at : at + _MAX_PACKED] for at in range(0, len(words), _MAX_PACKED))
        )
