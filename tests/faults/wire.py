"""What one service and its broker said to each other, as the proxy between them saw it.

Lives here: `Wire`, which reads MQTT 5 in both directions and keeps every delivery and every PUBACK.
Rules:

- A delivery is *handed out* when the broker sent it, *reached* when its last byte was handed on.
- A message is *acknowledged* when the service sent its PUBACK, whether or not that ever got to
  the broker: what a fault swallowed had been said all the same.
- A PUBACK must belong to the oldest delivery of its own connection that has none (MQTT-4.6.0-2),
  and that delivery must have reached the service. Anything else is a violation.
- A message is known by its topic and payload: packet ids are used again.

Must not come in: what was published and what has to become of it (`tests.faults.witness`).
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

import mqtt5

from backing import Direction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Delivery", "Key", "Wire"]

Key = tuple[str, bytes]
"""Topic and payload."""

_PUBLISH, _PUBACK = 3, 4
_MAX_LENGTH_BYTES = 4
_MAX_VIOLATIONS = 50


class Delivery:
    """One PUBLISH of the broker to the service; times are seconds since 1970."""

    __slots__ = ("acked_at", "came_at", "duplicate", "key", "link", "packet_id", "reached")

    def __init__(self, key: Key, packet_id: int, link: int, *, duplicate: bool) -> None:
        self.key = key
        self.link = link
        self.packet_id = packet_id
        self.duplicate = duplicate
        self.came_at = time.time()
        self.reached = False
        self.acked_at: float | None = None


class Wire:
    """All connections of one service, one after another; made for `FaultProxy(watch=wire.watch)`.

    Args:
        name: of the service, for messages.
        on_ack: called on the proxy's thread with each delivery as its PUBACK comes.
    """

    def __init__(
        self, name: str, on_ack: Callable[[Delivery], None] = lambda _delivery: None
    ) -> None:
        self.name = name
        self.on_ack = on_ack
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        """Packets by name, `repeated` deliveries, `resumed` and `new` sessions, `code …` of
        DISCONNECT and CONNACK."""
        self.most_outstanding = 0
        """Deliveries without a PUBACK on one connection: more than its Receive Maximum only where
        the broker does not keep to that."""
        self.connects: list[mqtt5.ConnectPacket] = []
        self._acked: dict[Key, float] = {}
        self._reached: set[Key] = set()
        self._unacked: dict[Key, Delivery] = {}
        self._lock = threading.Lock()

    @property
    def acked(self) -> dict[Key, float]:
        """When the service first acknowledged each message."""
        with self._lock:
            return dict(self._acked)

    @property
    def reached(self) -> set[Key]:
        """Messages that were handed on to the service."""
        with self._lock:
            return set(self._reached)

    def unacked(self, last_link: int | None = None) -> set[Key]:
        """Return messages that the broker handed out and whose PUBACK has not got back to it.

        Of connections up to `last_link`, counted from 1; of all when None.
        """
        with self._lock:
            return {
                key
                for key, delivery in self._unacked.items()
                if last_link is None or delivery.link <= last_link
            }

    def oldest_unacked(self, count: int) -> set[Key]:
        """Return the first `count` messages of the present connection that have no PUBACK."""
        with self._lock:
            link = self.counts["connections"]
            keys = [key for key, delivery in self._unacked.items() if delivery.link == link]
            return set(keys[:count])

    def watch(self) -> _Link:
        """Follow a new connection."""
        self.counts["connections"] += 1
        return _Link(self)

    def violate(self, text: str) -> None:
        """Note what must not be."""
        if len(self.violations) < _MAX_VIOLATIONS:
            self.violations.append(f"{self.name}: {text}")

    # ---------------------------------------------------------------- from links

    def _handed_out(self, delivery: Delivery) -> None:
        with self._lock:
            self._unacked[delivery.key] = delivery

    def _handed_on(self, delivery: Delivery) -> None:
        with self._lock:
            self._reached.add(delivery.key)

    def _was_acked(self, delivery: Delivery) -> None:
        delivery.acked_at = time.time()
        with self._lock:
            self._acked.setdefault(delivery.key, delivery.acked_at)
        self.on_ack(delivery)

    def _ack_arrived(self, delivery: Delivery) -> None:
        with self._lock:
            self._unacked.pop(delivery.key, None)


class _Link:
    """One connection; a `backing.Watch`."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._number = wire.counts["connections"]
        self._ways = {direction: _Way() for direction in Direction}
        self._open: deque[Delivery] = deque()
        self._aliases: dict[int, str] = {}
        self._clean = False

    def came(self, direction: Direction, data: bytes) -> None:
        way = self._ways[direction]
        for packet in way.split(data):
            try:
                if direction is Direction.TO_CLIENT:
                    self._of_broker(packet, way)
                else:
                    self._of_service(packet, way)
            except (ValueError, IndexError) as error:
                self._wire.violate(f"unreadable {packet[:40]!r} {direction}: {error}")

    def went(self, direction: Direction, count: int) -> None:
        self._ways[direction].hand_on(count)

    def ended(self) -> None:
        self._wire.counts["ended"] += 1

    def _of_broker(self, packet: bytes, way: _Way) -> None:
        wire = self._wire
        kind = packet[0] >> 4
        if kind == _PUBLISH:
            publish = mqtt5.read(memoryview(packet))[0]
            assert isinstance(publish, mqtt5.PublishPacket)
            topic = publish.topic
            if publish.topic_alias is not None:
                topic = topic or self._aliases[publish.topic_alias]
                self._aliases[publish.topic_alias] = topic
            wire.counts["PUBLISH"] += 1
            wire.counts["repeated"] += publish.duplicate
            if publish.packet_id is None:
                return
            key = (topic, bytes(publish.payload or b""))
            delivery = Delivery(key, publish.packet_id, self._number, duplicate=publish.duplicate)
            self._open.append(delivery)
            wire.most_outstanding = max(wire.most_outstanding, len(self._open))
            wire._handed_out(delivery)
            way.when_handed_on(lambda: self._on_reached(delivery))
            return
        self._count(packet)

    def _of_service(self, packet: bytes, way: _Way) -> None:
        if packet[0] >> 4 != _PUBACK:
            self._count(packet)
            return
        wire = self._wire
        wire.counts["PUBACK"] += 1
        packet_id = int.from_bytes(packet[2:4], "big")
        if not self._open:
            wire.violate(f"PUBACK {packet_id}, and nothing waits for one")
            return
        delivery = self._open.popleft()
        if delivery.packet_id != packet_id:
            wire.violate(f"PUBACK {packet_id}, the oldest delivery is {delivery.packet_id}")
            return
        if not delivery.reached:
            wire.violate(f"PUBACK {packet_id} for what has not reached the service")
        wire._was_acked(delivery)
        way.when_handed_on(lambda: wire._ack_arrived(delivery))

    def _on_reached(self, delivery: Delivery) -> None:
        delivery.reached = True
        self._wire._handed_on(delivery)

    def _count(self, packet: bytes) -> None:
        wire = self._wire
        parsed = mqtt5.read(memoryview(packet))[0]
        name = type(parsed).__name__.removesuffix("Packet").upper()
        # The service publishes too: markers, the canary. Those are no deliveries and no acks.
        wire.counts[f"{name} of the other way" if name in ("PUBLISH", "PUBACK") else name] += 1
        match parsed:
            case mqtt5.ConnectPacket():
                wire.connects.append(parsed)
                self._clean = parsed.clean_start
            case mqtt5.SubscribePacket():
                shares = any(one.pattern.startswith("$share/") for one in parsed.topic_filters)
                if shares and self._clean:
                    wire.violate("a share on a session that was begun anew: the old one is lost")
            case mqtt5.ConnAckPacket():
                wire.counts[f"CONNACK {parsed.reason_code.name}"] += 1
                if parsed.reason_code == mqtt5.ConnAckReasonCode.SUCCESS:
                    wire.counts["resumed" if parsed.session_present else "new"] += 1
            case mqtt5.DisconnectPacket():
                wire.counts[f"DISCONNECT {parsed.reason_code.name}"] += 1
            case _:
                pass


class _Way:
    """One direction: bytes that came, split into packets, and how many of them went on."""

    def __init__(self) -> None:
        self._rest = b""
        self._split_bytes = 0
        self._went_bytes = 0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def split(self, data: bytes) -> Iterator[bytes]:
        """Yield the packets that are whole now."""
        rest = self._rest + data
        at = 0
        while (end := _end_of_packet(rest, at)) is not None:
            self._split_bytes += end - at
            yield rest[at:end]
            at = end
        self._rest = rest[at:]

    def when_handed_on(self, call: Callable[[], None]) -> None:
        """Call when the packet that `split` has just yielded was handed on whole."""
        self._waiting.append((self._split_bytes, call))

    def hand_on(self, count: int) -> None:
        """Let `count` more bytes have gone on."""
        self._went_bytes += count
        while self._waiting and self._waiting[0][0] <= self._went_bytes:
            self._waiting.popleft()[1]()


def _end_of_packet(data: bytes, at: int) -> int | None:
    """Return where the packet that begins at `at` ends; None while it is not whole."""
    length = 0
    for index in range(_MAX_LENGTH_BYTES):
        place = at + 1 + index
        if place >= len(data):
            return None
        length |= (data[place] & 0x7F) << (7 * index)
        if not data[place] & 0x80:
            end = place + 1 + length
            return end if end <= len(data) else None
    raise ValueError("no remaining length")
