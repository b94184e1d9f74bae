"""Publishing what a fleet makes, at an even rate, over a few connections.

Lives here: pacing, the count of what was acknowledged, and what happens to publishes without an
answer. Rules: each connection has its own part of the devices, so that one that hangs stalls no
other; messages are due evenly, in ticks of 10 ms, and a message's device time is when it was due,
so that a late one shows as latency; a message without an answer is published again, with the same
time, until it has one or the run is over; a message counts as acknowledged only when PUBACK said
success. Must not come in: what messages hold, and how progress is shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from shadowsvc.errors import ConfigError, ConnectionLost
from shadowsvc.mqtt.publisher import SUCCESS, Publisher
from shadowsvc.simulate.families import FAMILIES
from shadowsvc.simulate.fleet import Fleet, Message, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowsvc.settings import Mqtt
    from shadowsvc.simulate.expected import Expected

__all__ = ["Options", "Progress", "Simulation", "Summary"]

_TICK_SECONDS: Final = 0.01
_MAX_LATENCIES: Final = 200_000
_MAX_CONNECTIONS: Final = 10_000
_USUAL_CONNECTIONS: Final = 8
_AT_ONCE: Final = 64
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What to simulate."""

    devices: int = 100
    rate: float = 100.0
    """Messages a second, of all devices together; 0: as fast as acknowledged."""
    seconds: float = 10.0
    """How long; 0: until stopped."""
    connections: int | None = None
    """MQTT connections, among which devices are divided; None: one a device, 8 at most."""
    seed: int = 1
    qos: int = 1
    """0 or 1. Nothing acknowledges QoS 0."""
    shape: Shape = field(default_factory=Shape)
    name_prefix: str = "sim"
    """Devices are called `PREFIX-000001` and so on."""
    max_in_flight: int = 128
    """Publishes without an answer, a connection."""
    drain_seconds: float = 10.0
    """How long to wait for answers at the end."""

    def parts(self) -> int:
        """Return how many connections are made."""
        return min(self.connections or _USUAL_CONNECTIONS, self.devices)

    def mistakes(self) -> list[str]:
        """Return one line for each option that makes no sense."""
        checks = [
            (self.devices >= 1, f"--devices {self.devices}: 1 or more"),
            (self.rate >= 0, f"--rate {self.rate}: 0 (as fast as acknowledged) or more"),
            (self.seconds >= 0, f"--seconds {self.seconds}: 0 (until stopped) or more"),
            (
                self.connections is None or 1 <= self.connections <= _MAX_CONNECTIONS,
                f"--connections {self.connections}: 1 to {_MAX_CONNECTIONS}",
            ),
            (self.qos in (0, 1), f"--qos {self.qos}: 0 or 1"),
            (bool(self.shape.families), "--families: at least one"),
        ]
        checks += [
            (name in FAMILIES, f"--families {name}: not one of {', '.join(FAMILIES)}")
            for name in self.shape.families
        ]
        checks += [
            (0 <= getattr(self.shape, f"{name}_share") <= 1, f"--{name}-share: 0 to 1")
            for name in ("repeat", "late", "bad")
        ]
        return [line for good, line in checks if not good]


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run; counts since its start."""

    seconds: float
    sent: int
    """Publishes, those sent again included."""
    acknowledged: int
    in_flight: int
    connected: int
    """Connections that are up."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of a run; counts of messages, not of leaves."""

    devices: int
    connections: int
    seconds: float
    """From the first publish to the last answer."""
    published: int
    """Different messages handed to the broker; a repeated one counts twice, one sent again once."""
    acknowledged: int
    """PUBACK success. Always 0 for QoS 0."""
    bad: int
    """Of those acknowledged: bad documents."""
    unrouted: int
    """The broker took it and nobody was subscribed: lost."""
    refused: int
    """PUBACK with an error."""
    unknown: int
    """No answer: the broker may have it or not."""
    sent_again: int
    reconnects: int
    payload_bytes: int
    ack_p50_seconds: float | None
    """Publish to PUBACK by the broker, of the last 200,000."""
    ack_p99_seconds: float | None
    interrupted: bool
    """Stopped before its time."""

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.published / self.seconds if self.seconds else 0.0

    @property
    def complete(self) -> bool:
        """Whether every message found a subscriber, as far as the broker tells."""
        return not (self.unrouted or self.refused or self.unknown)


class Simulation:
    """One run; `run` may be called once.

    Args:
        settings: of the broker.
        options: what to simulate.
        expected: what gets every acknowledged message, for reading back; None: nothing is kept.

    Raises:
        ConfigError: options that make no sense, one line each.
    """

    def __init__(self, settings: Mqtt, options: Options, expected: Expected | None = None) -> None:
        if mistakes := options.mistakes():
            raise ConfigError(mistakes)
        self.options = options
        self._expected = expected
        self._stop = asyncio.Event()
        self._interrupted = False
        self._started = 0.0
        self._latencies: deque[float] = deque(maxlen=_MAX_LATENCIES)
        names = [f"{options.name_prefix}-{n:06d}" for n in range(options.devices)]
        count = options.parts()
        # Client ids differ between runs: two with one id would take the session from each other.
        run = f"{os.getpid()}-{time.monotonic_ns() % 10**9}"
        self._parts = [
            _Part(
                Publisher(
                    settings,
                    client_id=f"shadowsvc-simulate-{run}-{number}",
                    max_in_flight=options.max_in_flight,
                ),
                Fleet(
                    names[number::count],
                    seed=f"{options.seed} {number} {count}",
                    shape=options.shape,
                    numbers=range(number, len(names), count),
                    topic_prefix=settings.topic_prefix,
                ),
                options,
                answered=self._answered,
                phase=number / count,
                share=len(names[number::count]) / len(names),
            )
            for number in range(count)
        ]
        self._acknowledged = self._bad = self._unrouted = self._refused = 0

    def stop(self) -> None:
        """End the run early, with its summary; a second call gives up waiting for answers."""
        if self._interrupted:
            for part in self._parts:
                part.give_up()
        self._interrupted = True
        self._stop.set()

    def progress(self) -> Progress:
        """Return the counts of now."""
        return Progress(
            seconds=time.monotonic() - self._started if self._started else 0.0,
            sent=sum(part.sent for part in self._parts),
            acknowledged=self._acknowledged,
            in_flight=sum(part.publisher.in_flight for part in self._parts),
            connected=sum(part.publisher.connected for part in self._parts),
        )

    async def run(self, on_started: Callable[[], None] | None = None) -> Summary:
        """Connect, publish for `seconds`, wait for the answers, disconnect.

        Raises:
            MqttError: a connection could not be made at the start.
        """
        async with contextlib.AsyncExitStack() as stack:
            entered = await asyncio.gather(
                *(stack.enter_async_context(part.publisher) for part in self._parts),
                return_exceptions=True,
            )
            for error in entered:
                if isinstance(error, BaseException):
                    raise error
            self._started = time.monotonic()
            if on_started is not None:
                on_started()
            # Its own clock for all parts, so that what they publish is even as a whole.
            begin = asyncio.get_running_loop().time()
            seconds = self.options.seconds or float("inf")
            tasks = [
                asyncio.create_task(part.run(begin, begin + seconds, self._stop))
                for part in self._parts
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            ended = time.monotonic()
        return self._summary(ended - self._started)

    def _answered(self, message: Message, code: int | None, seconds: float) -> None:
        """Count an answer: PUBACK's reason code, None when the broker refused the message."""
        if self.options.qos == 0:
            return
        if code is None:
            self._refused += 1
        elif code != SUCCESS:
            self._unrouted += 1
        else:
            self._acknowledged += 1
            self._bad += message.bad
            self._latencies.append(seconds)
            if self._expected is not None:
                self._expected.apply(message)

    def _summary(self, seconds: float) -> Summary:
        unknown = [message for part in self._parts for message in part.unanswered()]
        if self._expected is not None:
            for message in unknown:
                self._expected.doubt(message)
        latencies = sorted(self._latencies)
        count = len(latencies)
        return Summary(
            devices=self.options.devices,
            connections=len(self._parts),
            seconds=seconds,
            published=sum(part.published for part in self._parts),
            acknowledged=self._acknowledged,
            bad=self._bad,
            unrouted=self._unrouted,
            refused=self._refused,
            unknown=len(unknown),
            sent_again=sum(part.sent - part.published for part in self._parts),
            reconnects=sum(part.publisher.reconnects for part in self._parts),
            payload_bytes=sum(part.payload_bytes for part in self._parts),
            ack_p50_seconds=latencies[count // 2] if count else None,
            ack_p99_seconds=latencies[count * 99 // 100] if count else None,
            interrupted=self._interrupted,
        )


class _Part:
    """One connection and its devices."""

    def __init__(
        self,
        publisher: Publisher,
        fleet: Fleet,
        options: Options,
        *,
        answered: Callable[[Message, int | None, float], None],
        phase: float,
        share: float,
    ) -> None:
        self.publisher = publisher
        self.published = 0
        self.sent = 0
        self.payload_bytes = 0
        self._fleet = fleet
        self._options = options
        self._rate = options.rate * share
        self._phase = phase
        self._answered = answered
        self._open: dict[int, Message] = {}
        self._again: deque[int] = deque()
        self._idle = asyncio.Event()
        self._given_up = asyncio.Event()

    def unanswered(self) -> list[Message]:
        """Messages without an answer."""
        return list(self._open.values())

    def give_up(self) -> None:
        """Do not wait for answers."""
        self._given_up.set()

    async def run(self, begin: float, end: float, stop: asyncio.Event) -> None:
        """Publish until `end` (of the loop's clock) or `stop`, then wait for the answers."""
        publishing = asyncio.create_task(self._publish(begin, end))
        stopped = asyncio.create_task(stop.wait())
        loop = asyncio.get_running_loop()
        try:
            # A connection that is away at the end must not keep `_publish` waiting for it.
            await asyncio.wait(
                (publishing, stopped),
                timeout=None if end == float("inf") else max(0.0, end - loop.time()) + 1,
                return_when=asyncio.FIRST_COMPLETED,
            )
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            if publishing.done() and not publishing.cancelled():
                publishing.result()
            await self._drain()
        finally:
            publishing.cancel()
            stopped.cancel()

    async def _publish(self, begin: float, end: float) -> None:
        loop = asyncio.get_running_loop()
        epoch_ms = time.time() * 1000 - loop.time() * 1000
        if self._rate == 0:
            while (now := loop.time()) < end:
                while self._again:
                    await self._send_again()
                for _ in range(_AT_ONCE):
                    await self._send(self._fleet.next(int(epoch_ms + now * 1000)))
                await asyncio.sleep(0)
            return
        due = begin + self._phase / self._rate
        tick = begin
        while due < end:
            now = loop.time()
            while self._again:
                await self._send_again()
            while due <= now and due < end:
                await self._send(self._fleet.next(int(epoch_ms + due * 1000)))
                due = begin + (self._phase + self.published) / self._rate
            tick = max(tick + _TICK_SECONDS, due, now - 10 * _TICK_SECONDS)
            await asyncio.sleep(max(0.0, tick - loop.time()))

    async def _drain(self) -> None:
        """Publish what was held back, and again what has no answer, until all have one."""
        gone = asyncio.create_task(self._given_up.wait())
        finishing = asyncio.create_task(self._finish())
        try:
            await asyncio.wait(
                (gone, finishing),
                timeout=self._options.drain_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for task in (gone, finishing):
                task.cancel()
            await asyncio.gather(gone, finishing, return_exceptions=True)

    async def _finish(self) -> None:
        for message in self._fleet.rest():
            await self._send(message)
        while self._open:
            self._idle.clear()
            if self._again:
                await self._send_again()
            else:
                await self._idle.wait()

    async def _send(self, message: Message) -> None:
        self.published += 1
        self.payload_bytes += len(message.payload)
        number = self.published
        self._open[number] = message
        try:
            await self._hand_over(number, message)
        except BaseException:
            # Not even tried, as far as we know: `_finish` does it.
            self._again.append(number)
            raise

    async def _send_again(self) -> None:
        number = self._again[0]
        await self._hand_over(number, self._open[number])
        self._again.popleft()

    async def _hand_over(self, number: int, message: Message) -> None:
        future = await self.publisher.send(message.topic, message.payload, qos=self._options.qos)
        self.sent += 1
        sent = time.perf_counter()

        def done(future: asyncio.Future[int]) -> None:
            error = future.exception()
            if isinstance(error, ConnectionLost):
                self._again.append(number)
            else:
                del self._open[number]
                code = future.result() if error is None else None
                self._answered(message, code, time.perf_counter() - sent)
            self._idle.set()

        future.add_done_callback(done)
