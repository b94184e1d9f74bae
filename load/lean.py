"""The lean driver: a fleet of devices in one event loop, paced by one timer.

Lives here: `Lean`, which follows a shape from tick to tick and tells how it went. Rules: one timer
for all, every 5 ms; what is due in a tick is due at the tick's nominal time, so that a timer that
fires late shows as latency, and as the rig's own lateness; a run that was stopped ends as one that
is over does. Must not come in: connecting (`fleet`), publishing (`publishing`), the command line.
"""

from __future__ import annotations

import asyncio
import gc
import math
import resource
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from load.errors import BadOption
from load.fleet import Fleet
from load.publishing import Publishing
from load.report import Progress, Report
from load.shapes import Target
from load.statistics import Statistics
from load.watching import Watching

if TYPE_CHECKING:
    from collections.abc import Callable

    from load.connection import Connection
    from load.device import Acknowledged, Connected, Message
    from load.histogram import Histogram
    from load.options import Options

__all__ = ["TICK_SECONDS", "Lean"]

TICK_SECONDS: Final = 0.005
_SAMPLE_SECONDS: Final = 1.0
_GOODBYES_PER_SECOND: Final = 4_000
_GOODBYE_SECONDS: Final = 4.0
_PAGE_BYTES: Final = resource.getpagesize()
_NOTHING: Final = Target(-1, "start", 0, 0.0, 0.0, 0.0)


class Lean:
    """One run; made inside the event loop.

    Args:
        options: what to do.
        on_progress: called about every second.

    Raises:
        BadOption: options that make no sense, or a file that can't be read or written.
    """

    def __init__(
        self, options: Options, on_progress: Callable[[Progress], None] = lambda _: None
    ) -> None:
        options.check()
        options.raise_descriptor_limit()
        self.options = options
        self._on_progress = on_progress
        now = time.monotonic()
        self._began_at = time.time()
        epoch = self._began_at - now
        # Processes that share a load and a seed must not wait in step.
        random = Random(f"{options.seed} {options.first_number}")  # noqa: S311 - repeatable
        self._seen = Statistics(now, time.process_time())
        self._watching = Watching(options, self._seen, epoch)
        self._fleet = Fleet(options, self._seen, random, self)
        self._publishing = Publishing(options, self._seen, self._fleet, self._watching, epoch)
        self._loop = asyncio.get_running_loop()
        self._target = _NOTHING
        self._manual: Target | None = None
        self._began = self._next_tick = now
        self._next_sample = now + _SAMPLE_SECONDS
        self._timer: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._hurry = asyncio.Event()
        self._interrupted = False
        self._failure: Exception | None = None
        """Of a tick."""

    # ---------------------------------------------------------------- what others ask for

    async def run(self) -> Report:
        """Follow the shape to its end, wait for answers, disconnect, and tell; call it once."""
        thresholds = gc.get_threshold()
        # What a connection allocates makes no cycles worth looking for among ten thousand others.
        gc.set_threshold(100_000, 20, 100)
        self._next_tick = time.monotonic()
        try:
            if self._watching.topics:
                name = self.options.client_id.format(number=self.options.first_number)
                # A name that no session of an earlier run has.
                name = f"{name}-watcher-{time.time_ns()}"
                self._fleet.watch(name, self._watching.topics)
            self._tick()
            await self._over.wait()
            await self._drain()
            await self._leave()
            if self._failure is not None:
                raise self._failure
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._fleet.end()
            self._seen.end_phase(time.monotonic(), time.process_time())
            unanswered = self._publishing.close()
            gc.set_threshold(*thresholds)
        await asyncio.sleep(0)  # what was aborted is gone in the loop's next turn
        return self._report(unanswered)

    def stop(self) -> None:
        """End the run early, with its report; a second call waits for nothing."""
        if self._interrupted:
            self._hurry.set()
        self._interrupted = True
        self._over.set()

    def steer(
        self,
        *,
        connections: int | None = None,
        publish_rate: float | None = None,
        connect_rate: float | None = None,
    ) -> None:
        """Leave the shape, and hold these figures from now on; None: as it is now.

        Raises:
            BadOption: one that makes no sense.
        """
        for name, value in (("connections", connections), ("publish-rate", publish_rate)):
            if value is not None and not 0 <= value < math.inf:
                raise BadOption(f"{name} {value:g}: 0 or more")
        # Two commands may come within a tick: the second holds what the first said.
        now = self._manual or self._target
        self._manual = now._replace(
            connections=now.connections if connections is None else connections,
            publish_rate=now.publish_rate if publish_rate is None else publish_rate,
        )
        if connect_rate is not None:
            self._fleet.rate.limit(connect_rate)

    def drop(self, share: float) -> int:
        """Drop a share (0 to 1) of the connections without a word; return how many.

        They come back as those do that lost theirs.
        """
        dropped = self._fleet.drop(share)
        self._seen.phase.dropped += dropped
        return dropped

    def begin_phase(self, name: str) -> None:
        """Begin new statistics, which the report shows beside those before."""
        self._seen.begin_phase(name, time.monotonic(), time.process_time())

    def progress(self) -> Progress:
        """Return the moment of now."""
        now, seen, fleet = time.monotonic(), self._seen, self._fleet
        published, acknowledged = seen.total("published"), seen.total("acknowledged")
        in_flight = self._publishing.in_flight
        elapsed = max(now - seen.window_began, 1e-9)
        published_per_second, connected_per_second = seen.rates(now)
        return Progress(
            seconds=now - self._began,
            phase=seen.phase.name,
            connected=len(fleet.up),
            connecting=fleet.connecting,
            waiting=fleet.waiting,
            wanted=fleet.members,
            failed=sum(one.failed.total() for one in seen.phases),
            lost=sum(one.lost.total() for one in seen.phases),
            connect_rate=fleet.rate.per_second,
            published=published,
            acknowledged=acknowledged,
            in_flight=in_flight,
            missing=published - acknowledged - in_flight if self.options.qos else 0,
            skipped=seen.total("skipped"),
            heard=seen.total("heard"),
            published_per_second=published_per_second,
            connected_per_second=connected_per_second,
            connect_p99_seconds=_quantile(seen.connect, 0.99),
            puback_p50_seconds=_quantile(seen.puback, 0.5),
            puback_p99_seconds=_quantile(seen.puback, 0.99),
            to_subscriber_p99_seconds=_quantile(seen.to_subscriber, 0.99),
            lateness_p99_seconds=_quantile(seen.lateness, 0.99),
            cpu_share=(time.process_time() - seen.window_cpu) / elapsed,
            rss_bytes=_rss_bytes(),
        )

    # ---------------------------------------------------------------- what connections tell

    def came(self, connection: Connection, event: Connected) -> None:
        """Take CONNACK."""
        self._fleet.came(connection, event)
        if connection.open:
            self._publishing.send_again(connection, resumed=event.session_present)

    def acknowledged(self, connection: Connection, event: Acknowledged) -> None:
        """Take PUBACK."""
        self._publishing.acknowledged(connection, event)

    def subscribed(self) -> None:
        """Take the last SUBACK that the rig's own subscriber waited for."""
        self._watching.begin(time.monotonic())

    def heard(self, message: Message) -> None:
        """Take a message that the rig's own subscriber got."""
        self._watching.heard(message, time.monotonic())

    def went(self, connection: Connection, reason: str) -> None:
        """Take the end of a network connection, or of the attempt to make one."""
        self._fleet.went(connection, reason)

    # ---------------------------------------------------------------- the tick

    def _tick(self) -> None:
        try:
            self._turn()
        except Exception as error:  # noqa: BLE001 - raised by `run`, which would wait for ever
            self._failure = error
            self._over.set()
            self._hurry.set()
            return
        delay = max(0.0, self._next_tick - time.monotonic())
        self._timer = self._loop.call_later(delay, self._tick)

    def _turn(self) -> None:
        now = time.monotonic()
        due = self._next_tick
        self._next_tick = due + TICK_SECONDS
        self._seen.late(max(0.0, now - due))
        if not self._over.is_set():
            self._follow(due - self._began)
            self._publishing.due(due, self._target.publish_rate, TICK_SECONDS)
        self._fleet.tick(now)
        if now >= self._next_sample:
            self._sample(now)

    def _follow(self, seconds: float) -> None:
        """Want what the shape wants now."""
        target = self._manual or self.options.shape.at(seconds)
        if target is None:
            self._target = self._target._replace(publish_rate=0.0)
            self._over.set()
            return
        before, self._target = self._target, target
        if target.stage != before.stage:
            self.begin_phase(target.name)
            if target.drop_share:
                self.drop(target.drop_share)
        if target.connections != self._fleet.members:
            self._fleet.resize(target.connections)

    def _sample(self, now: float) -> None:
        progress = self.progress()
        self._seen.sample(progress, now, time.process_time())
        self._next_sample = max(self._next_sample + _SAMPLE_SECONDS, now)
        self._on_progress(progress)

    # ---------------------------------------------------------------- the end

    async def _drain(self) -> None:
        """Publish nothing new, and wait for the answers."""
        self.begin_phase("end")
        deadline = time.monotonic() + self.options.drain_seconds
        while self._publishing.in_flight or self._watching.unheard:
            if await self._hurried() or time.monotonic() > deadline:
                return

    async def _leave(self) -> None:
        """Disconnect everybody, at a rate that the broker can follow."""
        fleet = self._fleet
        step = max(1, int(_GOODBYES_PER_SECOND * TICK_SECONDS))
        while fleet.members and not await self._hurried():
            fleet.resize(max(0, fleet.members - step))
        deadline = time.monotonic() + _GOODBYE_SECONDS
        while fleet.leaving and time.monotonic() < deadline:
            if await self._hurried():
                return

    async def _hurried(self) -> bool:
        """Wait for a tick; return whether the second Ctrl-C came."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), TICK_SECONDS)
        return self._hurry.is_set()

    def _report(self, unanswered: int) -> Report:
        seen = self._seen
        published, acknowledged = seen.total("published"), seen.total("acknowledged")
        return Report(
            options=_plain(asdict(self.options)),
            began_at=self._began_at,
            seconds=time.monotonic() - self._began,
            interrupted=self._interrupted,
            connections=len(self._fleet.devices),
            published=published,
            acknowledged=acknowledged,
            missing=published - acknowledged if self.options.qos else 0,
            unanswered=unanswered,
            unheard=self._watching.unheard,
            rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            phases=seen.phases,
            samples=seen.samples,
        )


def _quantile(histogram: Histogram, share: float) -> float | None:
    return histogram.quantile(share) if histogram.count else None


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as JSON has them, without the password."""
    options.pop("password")
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items()
    }
