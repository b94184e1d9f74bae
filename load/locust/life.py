"""What a device does, from its first connect to its last DISCONNECT, and what it measures.

Lives here: connecting with backoff, subscribing, publishing on time, pinging, and being dropped
when the load's shape wants a storm. Rules:

- Plain blocking code, one device after the other. In Locust's processes every wait lets others run.
- A connect is timed from its first packet: waiting for its turn is the rig's affair. A publish is
  timed from when it was due: that the rig was late is no excuse. `load.lean` does likewise.
- Sequence numbers of a device count on over connections, and over lives of the same number.
- What was on its way when a connection was lost counts as failed, and is not sent again: a device
  reports its state of now.
- A message that the broker repeats counts for no latency.

Must not come in: Locust, gevent, options, statistics.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from load.device import Acknowledged, Closed, Connected, Device, Message, Pong, Subscribed
from load.errors import BrokenConnection
from load.families import sent_at_us, sequence_of
from load.locust.pace import Schedule
from load.locust.wire import Wire

if TYPE_CHECKING:
    from random import Random

    from load.backoff import Backoff
    from load.device import Event
    from load.locust.wire import Address

__all__ = ["CONNECT", "LOST", "PUBACK", "SUBSCRIBE", "SUBSCRIBER", "Life", "Open", "Surroundings"]

CONNECT: Final = "connect"
SUBSCRIBE: Final = "subscribe"
PUBACK: Final = "publish to PUBACK"
SUBSCRIBER: Final = "publish to subscriber"
LOST: Final = "connection lost"

_PING_SHARE: Final = 0.9  # of the keep-alive: the broker waits for 1.5 (MQTT-3.1.2-22)
_LEAVE_SECONDS: Final = 2.0
_FIRST_REFUSAL: Final = 128


class Open(NamedTuple):
    """A publish without an answer."""

    sequence: int
    time_us: int
    due: float
    """When it was to be made, by `Surroundings.clock()`."""
    size_bytes: int


class Surroundings(Protocol):
    """What the devices of a process have in common."""

    backoff: Backoff
    connect_seconds: float
    """How long each step of connecting may take."""
    max_in_flight: int
    """Publishes of one device without an answer."""
    qos: int
    random: Random

    def clock(self) -> float:
        """Return seconds of a clock that never goes back."""

    def wait(self, seconds: float) -> None:
        """Return after so long."""

    def turn(self) -> None:
        """Return when one more connect may begin."""

    def address(self, life: Life, attempt: int) -> Address:
        """Return where to connect to. Raises BrokenConnection: its name is not known."""

    def connected(self, life: Life, wire: Wire) -> None:
        """Take note of a connect that succeeded."""

    def disconnected(self, life: Life, *, stood: bool) -> None:
        """Take note of a connect that failed, or of a connection that is over (`stood`)."""

    def schedule(self) -> Schedule:
        """Return what holds now."""

    def document(self, number: int, sequence: int, now_us: int) -> bytes:
        """Return a payload; see `load.families.Source`."""

    def next_sequence(self, number: int) -> int:
        """Return 0 for a device's first document, then 1, …."""

    def published(self, life: Life, made: Open, *, late_seconds: float) -> None:
        """Take note of a publish that was sent."""

    def skipped(self) -> None:
        """Take note of a publish that was not made, since too many have no answer."""

    def answered(self, life: Life, made: Open, reason: int) -> None:
        """Take note of a PUBACK."""

    def unanswered(self, life: Life, made: Open) -> None:
        """Take note of a publish that gets none any more."""

    def dropped(self, life: Life) -> None:
        """Take note of a connection that the shape's storm takes."""

    def record(
        self,
        life: Life,
        what: str,
        seconds: float | None,
        size_bytes: int = 0,
        error: Exception | None = None,
    ) -> None:
        """Take a measurement for the statistics."""


class Life:
    """One device; `live` until something is raised in it, then `leave`.

    Args:
        number: of the device.
        device: what speaks MQTT.
        topic: where it publishes.
        around: the rest of the world.
        transport: name of what carries it, for statistics.
        listens: whether it subscribes to its own topic, and so measures how long a publish takes to
            a subscriber.
    """

    __slots__ = (
        "_around",
        "_attempt",
        "_connecting",
        "_device",
        "_failures",
        "_next_ping",
        "_next_publish",
        "_open",
        "_ping_seconds",
        "_pinged",
        "_room",
        "_schedule",
        "_stands",
        "_topic",
        "_wire",
        "listens",
        "number",
        "transport",
    )

    def __init__(
        self,
        number: int,
        device: Device,
        topic: str,
        around: Surroundings,
        *,
        transport: str,
        listens: bool = False,
    ) -> None:
        self.number = number
        self.transport = transport
        self._device = device
        self._topic = topic
        self._around = around
        self.listens = listens
        self._wire: Wire | None = None
        self._connecting = self._stands = False
        self._attempt = -1
        self._failures = 0
        self._open: dict[int, Open] = {}
        """By packet id."""
        self._room = 0
        self._schedule = Schedule(math.inf, math.inf)
        self._next_publish = math.inf
        self._next_ping = math.inf
        self._ping_seconds = math.inf
        self._pinged = False

    @property
    def client_id(self) -> str:
        """As the broker knows the device."""
        return self._device.client_id

    def live(self) -> None:
        """Connect, publish, come back; never returns."""
        self._end("begun anew")
        while True:
            if self._failures:
                around = self._around
                around.wait(around.backoff.wait_seconds(self._failures, around.random))
            try:
                self._stay(self._connect())
            except BrokenConnection as error:
                if self._stands and not isinstance(error, _Dropped):
                    self._around.record(self, LOST, None, 0, error)
                self._failures += 1
                self._end("connection lost before PUBACK")

    def leave(self, limit_seconds: float = _LEAVE_SECONDS) -> None:
        """Wait for the PUBACKs that are due, for a while, then DISCONNECT and close."""
        wire, clock = self._wire, self._around.clock
        if wire is not None and self._stands and not wire.torn:
            deadline = clock() + limit_seconds
            try:
                while self._open and (left := deadline - clock()) > 0:
                    self._take(wire.receive(left))
                wire.send(self._device.disconnect())
            except BrokenConnection:
                pass  # it was to end anyway
        self._end("no PUBACK at the end")

    # ------------------------------------------------------------------ connecting

    def _connect(self) -> Wire:
        around = self._around
        around.turn()
        self._connecting = True
        self._attempt += 1
        begun = around.clock()
        try:
            address = around.address(self, self._attempt)
            self._wire = wire = Wire.open(self._device, address, around.connect_seconds)
            self._await(Connected, wire)
        except BrokenConnection as error:
            around.record(self, CONNECT, around.clock() - begun, 0, error)
            raise
        around.record(self, CONNECT, around.clock() - begun)
        self._connecting, self._stands = False, True
        self._failures = 0
        around.connected(self, wire)
        self._next_ping = around.clock() + self._ping_seconds
        self._pinged = False
        if self.listens:
            self._subscribe(wire)
        return wire

    def _subscribe(self, wire: Wire) -> None:
        around = self._around
        begun = around.clock()
        try:
            wire.send(self._device.subscribe(self._topic, 1))
            self._await(Subscribed, wire)
        except BrokenConnection as error:
            around.record(self, SUBSCRIBE, around.clock() - begun, 0, error)
            raise
        around.record(self, SUBSCRIBE, around.clock() - begun)

    def _await(self, wanted: type[Connected | Subscribed], wire: Wire) -> None:
        """Receive until a packet of this kind came; what else comes is dealt with."""
        clock = self._around.clock
        deadline = clock() + self._around.connect_seconds
        while (left := deadline - clock()) > 0:
            events = wire.receive(left)
            self._take(events)
            if any(isinstance(event, wanted) for event in events):
                return
        raise BrokenConnection(f"timed out before it was {wanted.__name__.lower()}")

    # ------------------------------------------------------------------ a connection that stands

    def _stay(self, wire: Wire) -> None:
        """Do what is due until the connection is lost."""
        around = self._around
        clock = around.clock
        self._plan(around.schedule(), begins=True)
        while True:
            due = min(self._next_publish, self._next_ping, self._schedule.until)
            if (left := due - clock()) > 0:
                self._take(wire.receive(left))
            now = clock()
            if now >= self._schedule.until:
                self._plan(around.schedule(), begins=False)
            if now >= self._next_publish:
                self._publish(wire, now)
            if now >= self._next_ping:
                if self._pinged:
                    raise BrokenConnection("no answer to a ping")
                self._pinged = True
                wire.send(self._device.ping())
                self._next_ping = now + self._ping_seconds

    def _plan(self, schedule: Schedule, *, begins: bool) -> None:
        """Take a schedule; devices that take it at the same moment publish at different ones."""
        around, before = self._around, self._schedule
        self._schedule = schedule
        interval = schedule.interval_seconds
        if begins or interval != before.interval_seconds:
            wait = interval if math.isinf(interval) else around.random.random() * interval
            self._next_publish = around.clock() + wait
        if (
            not begins
            and schedule.stage != before.stage
            and around.random.random() < schedule.drop_share
        ):
            around.dropped(self)
            raise _Dropped("dropped, as the shape wants it")

    def _publish(self, wire: Wire, now: float) -> None:
        around = self._around
        due, interval = self._next_publish, self._schedule.interval_seconds
        self._next_publish = due + interval
        if self._next_publish < now:  # what was missed is not made up for
            self._next_publish = now + interval
        if around.qos and len(self._open) >= min(self._room, around.max_in_flight):
            around.skipped()  # MQTT-3.3.4-7, and a device's memory
            return
        sequence = around.next_sequence(self.number)
        time_us = time.time_ns() // 1000 - int((now - due) * 1e6)
        payload = around.document(self.number, sequence, time_us)
        made = Open(sequence, time_us, due, len(payload))
        packet_id, data = self._device.publish(self._topic, payload, around.qos)
        if packet_id:
            self._open[packet_id] = made
        # Before it is sent: what breaks on its way out is one that was published and has no answer.
        around.published(self, made, late_seconds=now - due)
        wire.send(data)
        self._next_ping = now + self._ping_seconds

    # ------------------------------------------------------------------ what comes

    def _take(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Acknowledged():
                    self._acknowledged(event)
                case Message():
                    self._delivered(event)
                case Pong():
                    self._pinged = False
                case Connected():
                    self._room = event.receive_maximum
                    seconds = event.keep_alive_seconds
                    if seconds is None:
                        seconds = self._device.keep_alive_seconds
                    self._ping_seconds = seconds * _PING_SHARE or math.inf
                case Subscribed():
                    if not event.granted:
                        raise BrokenConnection(f"subscription refused: {max(event.reasons):#x}")
                case Closed():
                    raise BrokenConnection(event.reason)

    def _acknowledged(self, event: Acknowledged) -> None:
        made = self._open.pop(event.packet_id, None)
        if made is None:
            return
        around = self._around
        around.answered(self, made, event.reason)
        error = None
        if event.reason >= _FIRST_REFUSAL:
            error = BrokenConnection(f"publish refused: {event.reason:#x}")
        around.record(self, PUBACK, around.clock() - made.due, made.size_bytes, error)

    def _delivered(self, message: Message) -> None:
        if message.duplicate or sequence_of(message.payload) is None:
            return
        sent_us = sent_at_us(message.payload)
        if sent_us is not None:
            seconds = max(0.0, time.time_ns() / 1e9 - sent_us / 1e6)
            self._around.record(self, SUBSCRIBER, seconds, len(message.payload))

    # ------------------------------------------------------------------ the end of a connection

    def _end(self, words: str) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        for made in self._open.values():
            self._around.unanswered(self, made)
            self._around.record(self, PUBACK, None, made.size_bytes, BrokenConnection(words))
        self._open.clear()
        if self._connecting or self._stands:
            self._around.disconnected(self, stood=self._stands)
        self._connecting = self._stands = False


class _Dropped(BrokenConnection):
    """The device itself ended the connection, without a word, as one that loses its power."""
