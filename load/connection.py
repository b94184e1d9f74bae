"""One device's network connection in the lean driver: an asyncio protocol around `device.Device`.

Lives here: `Connection`, and `Watcher`, the rig's own subscriber. Rules: no task, no timer and no
future of its own; what it holds at rest is counted in bytes, since there are tens of thousands; it
tells its driver what happened and decides nothing. Must not come in: when to connect, publish or
ping; statistics.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from load.device import Acknowledged, Closed, Connected, Device, Message, Pong, Subscribed
from load.errors import BrokenConnection

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Connection", "Driver", "Open", "State", "Watcher", "words"]

_MAX_FILTERS = 200


class State(IntEnum):
    """Where a device is."""

    IDLE = 0
    """Not wanted."""
    WAITING = 1
    """In the line for its next attempt."""
    CONNECTING = 2
    """Until CONNACK."""
    UP = 3
    LEAVING = 4
    """Told to end, until the connection is gone."""


class Open(NamedTuple):
    """A publish without an answer."""

    sequence: int
    time_us: int
    due: float
    """When it was to be made, monotonic seconds."""


class Driver(Protocol):
    """What a connection tells."""

    def came(self, connection: Connection, event: Connected) -> None:
        """CONNACK came."""

    def acknowledged(self, connection: Connection, event: Acknowledged) -> None:
        """PUBACK came."""

    def subscribed(self) -> None:
        """Every subscription was granted."""

    def heard(self, message: Message) -> None:
        """A message of the broker's came."""

    def went(self, connection: Connection, reason: str) -> None:
        """The network connection is gone, or could not be made."""


class Connection(asyncio.Protocol):
    """One device; lives as long as the run, through many network connections."""

    __slots__ = (
        "attempt",
        "device",
        "driver",
        "failures",
        "number",
        "open",
        "paused",
        "pinged",
        "place",
        "quiet",
        "sequence",
        "started",
        "state",
        "transport",
        "wanted",
        "why",
    )

    def __init__(self, driver: Driver, number: int, device: Device) -> None:
        self.driver = driver
        self.number = number
        self.device = device
        self.transport: asyncio.Transport | None = None
        self.state = State.IDLE
        self.wanted = False
        self.attempt = 0
        self.failures = 0
        self.started = 0.0
        self.sequence = 0
        """Of the next document."""
        self.place = -1
        """In the driver's list of those that are up."""
        self.open: dict[int, Open] | None = None
        """By packet id; none at rest."""
        self.quiet = False
        """Nothing was sent since the last look at it."""
        self.pinged = False
        self.paused = False
        self.why: str | None = None
        """Why we ended the connection, if it was us."""

    # ---------------------------------------------------------------- for the driver

    def send(self, data: bytes) -> None:
        """Hand bytes to the socket."""
        if self.transport is not None:
            self.quiet = False
            self.transport.write(data)

    def abort(self, why: str) -> None:
        """End the connection without a word to the other side."""
        self.why = self.why or why
        if self.transport is not None:
            self.transport.abort()

    def goodbye(self) -> None:
        """Send DISCONNECT; the other side closes, and with it the wait states are its own."""
        self.state = State.LEAVING
        self.why = "goodbye"
        self.send(self.device.disconnect())

    # ---------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        self.transport = transport  # type: ignore[assignment]  # a stream's is a Transport
        self.why = None
        self.pinged = self.paused = False
        self.send(self.device.connect())

    def data_received(self, data: bytes) -> None:
        """Hand what came to the device, and what it means to the driver."""
        device = self.device
        try:
            events = device.receive(data)
        except BrokenConnection as error:
            self.abort(str(error))
            return
        if device.pending and self.transport is not None:
            self.transport.write(device.pending)
            device.pending = b""
        for event in events:
            kind = event.__class__
            if kind is Acknowledged:
                self.driver.acknowledged(self, event)  # type: ignore[arg-type]
            else:
                self._event(event)

    def pause_writing(self) -> None:
        """Publish nothing for now."""
        self.paused = True

    def resume_writing(self) -> None:
        """Publish again."""
        self.paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the driver."""
        self.transport = None
        why, self.why = self.why, None
        self.driver.went(self, why or (words(exc) if exc else "closed by the other side"))

    def _event(self, event: Any) -> None:
        match event:
            case Message():
                self.driver.heard(event)
            case Connected():
                self.driver.came(self, event)
            case Pong():
                self.pinged = False
            case Closed() if self.state is not State.LEAVING:
                self.abort(event.reason)
            case Subscribed() if not event.granted:
                self.abort("subscription refused")
            case Subscribed() if isinstance(self, Watcher):
                self.granted()


class Watcher(Connection):
    """Subscribes to some devices' updates; not one of the fleet."""

    __slots__ = ("_awaited", "_filters")

    def __init__(self, driver: Driver, device: Device, filters: Sequence[str]) -> None:
        super().__init__(driver, 0, device)
        self._filters = filters
        self._awaited = 0

    def subscribe(self) -> None:
        """Send the subscriptions, after CONNACK."""
        starts = range(0, len(self._filters), _MAX_FILTERS)
        self._awaited = len(starts)
        for start in starts:
            self.send(self.device.subscribe(self._filters[start : start + _MAX_FILTERS]))

    def granted(self) -> None:
        """Take a SUBACK."""
        self._awaited -= 1
        if not self._awaited:
            self.driver.subscribed()


def words(error: Exception) -> str:
    """Return an error as the key of a count: few different ones."""
    number = getattr(error, "errno", None)
    if (
        isinstance(number, int)
        and number in errno.errorcode
        and not isinstance(error, ssl.SSLError)
    ):
        return errno.errorcode[number]
    return type(error).__name__
