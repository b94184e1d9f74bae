"""Publish-to-durable: a proxy between broker and service that sees deliveries and PUBACKs.

Lives here: `Observer`. The service sends PUBACK only after the write is durable, and in the order
of receipt; so the time from a document's `timestamp`, which is when the publish was due, to the
PUBACK of its delivery is what an update took to become durable, with every hop on the way: exact
for every update, where polling Cassandra would be coarse and a load of its own. It errs to the slow
side, by the way of the ack through the service and by this proxy's own hop, whose CPU and lateness
the report shows. Clocks of this machine alone are compared: rig and observer run on one.

Rules: bytes pass through `backing.FaultProxy` and are not changed; no packet is parsed further than
its id and the end of its payload. Plain MQTT 5 alone. Must not come in: what has to be durable
(`check`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from backing import Direction, FaultProxy
from load.errors import BadOption, BrokenConnection
from load.families import sent_at_us
from load.statistics import Statistics

if TYPE_CHECKING:
    from load.report import Phase

__all__ = ["Hears", "Link", "Observer"]

_PUBLISH: Final = 3
_PUBACK: Final = 4
_QOS_1: Final = 0x02
_QOS: Final = 0x06
_DUPLICATE: Final = 0x08
_REFUSED: Final = 0x80
_MAX_LENGTH_BYTES: Final = 4
_TAIL_BYTES: Final = 40
_TICK_SECONDS: Final = 0.01


class Observer:
    """The proxy; an asynchronous context manager.

    Args:
        host: the broker's.
        port: the broker's, plain MQTT.
        listen_port: ours on 127.0.0.1; a free one when None.

    Raises:
        BadOption: on entering, if the port can't be had.
    """

    def __init__(self, host: str, port: int, *, listen_port: int | None = None) -> None:
        self.proxy = FaultProxy(host, port, listen_port=listen_port, watch=self._watch)
        self.seen = Statistics(time.monotonic(), time.process_time())
        """Of its phases, `published` are deliveries, `acknowledged` and `puback` updates that are
        durable and what they took, `sent_again` deliveries with DUP, `refused` PUBACKs with an
        error, `connected` connections of services."""
        self.held = 0
        """Deliveries without a PUBACK, of connections that are open."""
        self.most_held = 0
        self.unstamped = 0
        """Durable messages whose document has no time of the rig's."""
        self._ticking: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where services connect."""
        return self.proxy.port

    @property
    def durable(self) -> int:
        """PUBACKs with success."""
        return self.seen.total("acknowledged")

    def begin_phase(self, name: str) -> None:
        """Begin new statistics beside those before."""
        self.seen.begin_phase(name, time.monotonic(), time.process_time())

    def progress(self) -> dict[str, Any]:
        """Return the moment of now, for programs; rates and quantiles since the one before."""
        now, cpu = time.monotonic(), time.process_time()
        seen = self.seen
        delivered, _ = seen.rates(now)
        took = seen.puback
        found = {
            "seconds": now - seen.began,
            "phase": seen.phase.name,
            "connections": self.proxy.connections,
            "delivered": seen.total("published"),
            "durable": self.durable,
            "held": self.held,
            "delivered_per_second": delivered,
            "to_durable_p50_seconds": took.quantile(0.5) if took.count else None,
            "to_durable_p99_seconds": took.quantile(0.99) if took.count else None,
            "lateness_p99_seconds": seen.lateness.quantile(0.99) if seen.lateness.count else None,
            "cpu_share": (cpu - seen.window_cpu) / max(now - seen.window_began, 1e-9),
        }
        seen.next_window(now, cpu)
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all of it for programs."""
        self.seen.end_phase(time.monotonic(), time.process_time())
        return {
            "durable": self.durable,
            "held": self.held,
            "most_held": self.most_held,
            "unstamped": self.unstamped,
            "rig_is_the_bottleneck": [
                f"{one.name}: {text}" for one in self.seen.phases for text in one.bottlenecks()
            ],
            "phases": [_phase(one) for one in self.seen.phases],
        }

    async def __aenter__(self) -> Self:
        try:
            await self.proxy.start()
        except OSError as error:
            raise BadOption(f"--port {self.port}: {error.strerror}") from None
        self._ticking = asyncio.create_task(self._tick(), name="observer-tick")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        await self.proxy.close()

    async def _tick(self) -> None:
        """See how late a timer of this process fires."""
        while True:
            due = time.monotonic() + _TICK_SECONDS
            await asyncio.sleep(_TICK_SECONDS)
            self.seen.late(max(0.0, time.monotonic() - due))

    def _watch(self) -> Link:
        self.seen.phase.connected += 1
        return Link(self)

    def delivered(self, *, duplicate: bool) -> None:
        """Note a delivery."""
        phase = self.seen.phase
        phase.published += 1
        phase.sent_again += duplicate
        self.held += 1
        self.most_held = max(self.most_held, self.held)

    def acknowledged(self, sent_us: int | None, *, refused: bool) -> None:
        """Note a PUBACK."""
        self.held -= 1
        if refused:
            self.seen.phase.refused += 1
        elif sent_us is None:
            self.seen.phase.acknowledged += 1
            self.unstamped += 1
        else:
            self.seen.acknowledged(time.time() - sent_us * 1e-6)


class Hears(Protocol):
    """Who is told what passes."""

    held: int
    """Deliveries without a PUBACK, of connections that are open."""

    def delivered(self, *, duplicate: bool) -> None:
        """Note a delivery."""

    def acknowledged(self, sent_us: int | None, *, refused: bool) -> None:
        """Note a PUBACK, and when its document was due: microseconds since 1970, if it says so."""


class Link:
    """One connection of a service, as `backing.Watch` follows it."""

    def __init__(self, observer: Hears) -> None:
        self._observer = observer
        self._open: dict[int, int | None] = {}
        self._rest = {Direction.TO_CLIENT: b"", Direction.TO_SERVER: b""}

    def came(self, direction: Direction, data: bytes) -> None:
        """Take what one end sent."""
        data = self._rest[direction] + data
        see = self._delivery if direction is Direction.TO_CLIENT else self._answer
        at = 0
        while (bounds := _packet(data, at)) is not None:
            start, end = bounds
            see(data, data[at], start, end)
            at = end
        self._rest[direction] = data[at:]

    def went(self, direction: Direction, count: int) -> None:
        """Take no notice: what counts is when it came."""

    def ended(self) -> None:
        """Forget what the broker will deliver again."""
        self._observer.held -= len(self._open)
        self._open.clear()

    def _delivery(self, data: bytes, first: int, start: int, end: int) -> None:
        if first >> 4 != _PUBLISH or first & _QOS != _QOS_1:
            return
        at = start + 2 + int.from_bytes(data[start : start + 2], "big")
        packet_id = int.from_bytes(data[at : at + 2], "big")
        if packet_id not in self._open:
            self._observer.delivered(duplicate=bool(first & _DUPLICATE))
        self._open[packet_id] = sent_at_us(data[max(at, end - _TAIL_BYTES) : end])

    def _answer(self, data: bytes, first: int, start: int, end: int) -> None:
        if first >> 4 != _PUBACK:
            return
        packet_id = int.from_bytes(data[start : start + 2], "big")
        if packet_id in self._open:
            refused = end - start > 2 and data[start + 2] >= _REFUSED  # noqa: PLR2004 - reason code
            self._observer.acknowledged(self._open.pop(packet_id), refused=refused)


def _packet(data: bytes, at: int) -> tuple[int, int] | None:
    """Return begin and end of the body of the packet at `at`; None if it is not whole."""
    length = 0
    for index, byte in enumerate(data[at + 1 : at + 1 + _MAX_LENGTH_BYTES]):
        length |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            start = at + 2 + index
            return None if start + length > len(data) else (start, start + length)
    if len(data) - at > _MAX_LENGTH_BYTES:
        raise BrokenConnection("the observer passes plain MQTT alone: malformed remaining length")
    return None


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "began_seconds": phase.began_seconds,
        "seconds": phase.seconds,
        "cpu_share": phase.cpu_share,
        "connected": phase.connected,
        "delivered": phase.published,
        "delivered_again": phase.sent_again,
        "durable": phase.acknowledged,
        "refused": phase.refused,
        "to_durable": phase.puback.as_json(),
        "lateness": phase.lateness.as_json(),
        "rig_is_the_bottleneck": phase.bottlenecks(),
    }
