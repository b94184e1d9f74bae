"""What the devices of one process share: their numbers, the pace of connects, the schedule, TLS.

Lives here: `Rig`, one for each of Locust's processes that has devices, from the start of a run to
its end; the `Surroundings` of its lives. Rules:

- Who wants to connect stands in one line; one greenlet lets them go at the rate of now
  (`load.backoff.ConnectRate`), however many wait.
- The schedule is a pure function of the time since the run's start: no worker needs to be told when
  a stage begins.
- A device that leaves and comes back, as in a drain and a ramp, has the same number, and its
  sequence goes on.
- Names are looked up beside the devices, not by each of them.

Must not come in: what a device does (`life`), options (`arguments`), what people see (`summary`).
"""

from __future__ import annotations

import gc
import heapq
import logging
import math
import resource
import socket
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import Event

from load.backoff import ConnectRate
from load.device import Device
from load.endpoints import route
from load.errors import BrokenConnection, LoadError
from load.journal import Journal
from load.locust.life import Life, Open
from load.locust.pace import Schedule, schedule
from load.locust.wire import Address
from load.websocket import WebSocketClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from load.endpoints import Endpoint
    from load.locust.arguments import Plan
    from load.locust.watch import Watch
    from load.locust.wire import Wire
    from load.options import Options

__all__ = ["WEBSOCKET", "Rig"]

WEBSOCKET: Final = "WS"
"""Transport of targets `ws://` and `wss://`."""

_TICK_SECONDS: Final = 0.01
_NAMES_SECONDS: Final = 30.0
_FIRST_REFUSAL: Final = 128
_log = logging.getLogger("load")


class Rig:
    """One process's part of one run.

    Args:
        plan: the run.
        worker: index of this process, 0 or more; what it has of numbers and files follows from it.
        watch: is told how late publishes were.
        fire: takes a measurement: Locust's `events.request.fire`.

    Raises:
        BadOption: a source, the journal or a certificate can't be read or made.
    """

    def __init__(self, plan: Plan, worker: int, watch: Watch, fire: Callable[..., None]) -> None:
        options = plan.options
        self.plan = plan
        self.worker = worker
        self.backoff = options.backoff
        self.connect_seconds = options.connect_timeout_seconds
        self.max_in_flight = options.max_in_flight
        self.qos = options.qos
        first = options.first_number + worker * plan.devices_per_worker
        self.random = Random(f"{options.seed} {first}")  # noqa: S311 - repeatable on purpose
        self.counts: Counter[str] = Counter()
        """connected and connecting: now; others since the start."""
        self.highest_descriptor = -1
        self._watch = watch
        self._fire = fire
        self._numbers = list(range(first, first + plan.devices_per_worker))
        self._sequences: Counter[int] = Counter()
        self._watching: Counter[str] = Counter()
        self._source = options.source()
        self._rate = ConnectRate(options.connect_rate, decay=options.connect_rate_decay)
        self._line: deque[_Turn] = deque()
        self._tls = options.tls()
        self._names: dict[str, list[tuple[int, str]]] = {}
        self._began = math.nan
        self._greenlets: list[Any] = []
        self._journal = Journal(_journaled(plan, worker)) if options.journal else None
        self._thresholds = gc.get_threshold()

    # ------------------------------------------------------------------ a run

    def begin(self) -> None:
        """Begin the run: the time of its shape counts from now."""
        # What devices allocate makes no cycles worth looking for among thousands of others.
        gc.set_threshold(100_000, 20, 100)
        self._began = time.monotonic()
        self._look_up()
        loops = (self._usher, self._name_keeper)
        self._greenlets = [gevent.spawn(loop) for loop in loops]

    def end(self) -> None:
        """End it; the devices have left."""
        gevent.killall(self._greenlets)
        self._greenlets = []
        gc.set_threshold(*self._thresholds)
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def figures(self) -> dict[str, Any]:
        """Return what the rig says of itself, as JSON."""
        return {
            **{name: self.counts[name] for name in _COUNTS},
            "worker": self.worker,
            "connect_rate": self._rate.per_second,
            "connect_rate_decays": self._rate.decays,
            "highest_descriptor": self.highest_descriptor,
            "event_loop": gevent.get_hub().loop.backend,
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    # ------------------------------------------------------------------ devices

    def life(self, transport: str) -> Life:
        """Return a device with a number that no other has; `give_back` the life at its end.

        Args:
            transport: `WEBSOCKET`, or what else Locust shall call the device's requests.

        Raises:
            LoadError: there is no number left.
        """
        if not self._numbers:
            most = self.plan.devices_per_worker
            raise LoadError(f"this process has {most} devices (more --devices-per-worker)")
        options = self.plan.options
        number = heapq.heappop(self._numbers)
        name = options.client_id.format(number=number)
        username = options.username
        device = Device(
            name,
            keep_alive_seconds=options.keep_alive_seconds,
            clean_start=options.clean_start,
            session_expiry_seconds=options.session_expiry_seconds,
            username=None if username is None else username.format(client_id=name),
            password=self.plan.passwords.get(name, options.password),
            websocket=WebSocketClient("") if transport == WEBSOCKET else None,
        )
        return Life(
            number,
            device,
            options.topic.format(client_id=name),
            self,
            transport=transport,
            listens=self._watches(transport),
        )

    def give_back(self, life: Life) -> None:
        """Take back the number of a device that has left."""
        self._watching[life.transport] -= life.listens
        heapq.heappush(self._numbers, life.number)

    def _watches(self, transport: str) -> bool:
        """Return whether one more device is to listen to itself."""
        wanted = self._watching[transport] < self.plan.options.watch
        self._watching[transport] += wanted
        return wanted

    # ------------------------------------------------------------------ Surroundings

    def clock(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Let others run."""
        gevent.sleep(seconds)

    def turn(self) -> None:
        """Stand in the line."""
        mine = _Turn()
        self._line.append(mine)
        try:
            mine.comes.wait()
        except BaseException:  # the device was told to end
            if mine.comes.is_set():
                self.counts["connecting"] -= 1
            mine.gone = True
            raise

    def address(self, life: Life, attempt: int) -> Address:
        """Return target and source in turn, of the targets that this transport has."""
        options = self.plan.options
        websocket = life.transport == WEBSOCKET
        targets = [one for one in options.targets if (one.path is not None) is websocket]
        if not targets:
            raise BrokenConnection(f"no target for {life.transport} in --host")
        sources = options.sources
        target, source = route(life.number, attempt, len(targets), len(sources))
        endpoint = targets[target]
        mine = sources[source] if sources else None
        family, where = self._resolved(endpoint, mine, life.number + attempt)
        return Address(
            endpoint,
            family,
            (where, endpoint.port),
            mine,
            self._tls if endpoint.tls else None,
            options.tls_name,
        )

    def connected(self, life: Life, wire: Wire) -> None:
        """Count it."""
        del life
        self._rate.succeeded()
        self.counts["connecting"] -= 1
        self.counts["connected"] += 1
        self.counts["connects"] += 1
        self.highest_descriptor = max(self.highest_descriptor, wire.descriptor)

    def disconnected(self, life: Life, *, stood: bool) -> None:
        """Count it."""
        del life
        if stood:
            self.counts["connected"] -= 1
        else:
            self._rate.failed()
            self.counts["connecting"] -= 1
            self.counts["connects_failed"] += 1

    def schedule(self) -> Schedule:
        """Return what the shape wants of each device now."""
        shape = self.plan.shape
        if shape is None:
            return Schedule(self.plan.interval_seconds, math.inf)
        now = time.monotonic() - self._began
        found = schedule(shape, now, self.plan.interval_seconds)
        return found._replace(until=self._began + found.until)

    def document(self, number: int, sequence: int, now_us: int) -> bytes:
        """Return a payload of the families, or of the recording."""
        return self._source.document(number, sequence, now_us)

    def next_sequence(self, number: int) -> int:
        """Count on."""
        sequence = self._sequences[number]
        self._sequences[number] = sequence + 1
        return sequence

    def published(self, life: Life, made: Open, *, late_seconds: float) -> None:
        """Count it."""
        del life, made
        self.counts["published"] += 1
        self._watch.late(late_seconds)

    def skipped(self) -> None:
        """Count it."""
        self.counts["skipped"] += 1

    def answered(self, life: Life, made: Open, reason: int) -> None:
        """Count it, and write it down."""
        if reason == 0:
            self.counts["acknowledged"] += 1
            if self._journal is not None:
                self._journal.acknowledged(life.number, made.sequence, made.time_us)
        else:
            self.counts["refused" if reason >= _FIRST_REFUSAL else "unrouted"] += 1

    def unanswered(self, life: Life, made: Open) -> None:
        """Count it, and write it down: it may be there or not."""
        self.counts["unanswered"] += 1
        if self._journal is not None:
            self._journal.unanswered(life.number, made.sequence, made.time_us)

    def dropped(self, life: Life) -> None:
        """Count it."""
        del life
        self.counts["dropped"] += 1

    def record(
        self,
        life: Life,
        what: str,
        seconds: float | None,
        size_bytes: int = 0,
        error: Exception | None = None,
    ) -> None:
        """Hand it to Locust."""
        self._fire(
            request_type=life.transport,
            name=what,
            response_time=None if seconds is None else seconds * 1000,
            response_length=size_bytes,
            exception=error,
            context={},
        )

    # ------------------------------------------------------------------ greenlets

    def _usher(self) -> None:
        most = self.plan.options.max_connecting
        while True:
            gevent.sleep(_TICK_SECONDS)
            while self._line and self._line[0].gone:
                self._line.popleft()
            wanted = min(len(self._line), most - self.counts["connecting"])
            for _ in range(self._rate.take(time.monotonic(), max(0, wanted))):
                turn = self._line.popleft()
                if not turn.gone:
                    self.counts["connecting"] += 1
                    turn.comes.set()

    def _name_keeper(self) -> None:
        while True:
            gevent.sleep(_NAMES_SECONDS)
            self._look_up()

    # ------------------------------------------------------------------ names and TLS

    def _look_up(self) -> None:
        for host in {endpoint.host for endpoint in self.plan.options.targets}:
            try:
                found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            except OSError as error:  # what was known stays
                _log.warning("the name %s is not known: %s", host, error.strerror)
                continue
            self._names[host] = [(family, str(where[0])) for family, _, _, _, where in found]

    def _resolved(self, endpoint: Endpoint, source: str | None, turn: int) -> tuple[int, str]:
        found = self._names.get(endpoint.host, [])
        if source is not None:
            wanted = socket.AF_INET6 if ":" in source else socket.AF_INET
            found = [one for one in found if one[0] == wanted]
        if not found:
            raise BrokenConnection(f"the name {endpoint.host} is not known")
        return found[turn % len(found)]


class _Turn:
    """A place in the line."""

    __slots__ = ("comes", "gone")

    def __init__(self) -> None:
        self.comes = Event()
        self.gone = False
        """Nobody stands there any more."""


_COUNTS: Final = (
    "connected",
    "connecting",
    "connects",
    "connects_failed",
    "dropped",
    "published",
    "acknowledged",
    "unrouted",
    "refused",
    "unanswered",
    "skipped",
)


def _journaled(plan: Plan, worker: int) -> Options:
    return replace(plan.options, journal=Path(f"{plan.options.journal}.{worker}"))
