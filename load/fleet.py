"""Which devices are connected, and how they come to be: the part of the lean driver that connects.

Lives here: `Fleet`. Rules: the first N devices are wanted; one that is not wanted any more leaves
when its publishes are answered; connects begin at a limited rate that decays when they fail
(`backoff.ConnectRate`), and a device that lost its connection, or could not get one, waits by
`backoff.Backoff`; only an attempt has a task, until its socket is there; a device that was quiet is
pinged, one that does not answer is given up. One look at a 64th of the fleet at a time is all that
keep-alives cost. Must not come in: publishing.
"""

from __future__ import annotations

import asyncio
import heapq
import ssl
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from load.backoff import ConnectRate
from load.connection import Connection, State, Watcher, words
from load.device import Device
from load.endpoints import bound_socket, route
from load.websocket import WebSocketClient

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from load.connection import Driver
    from load.device import Connected
    from load.endpoints import Endpoint
    from load.options import Options
    from load.statistics import Statistics

__all__ = ["Fleet"]

_WHEEL: Final = 64
_KEEP_ALIVE_SHARE: Final = 0.4  # of the keep-alive between two looks at a device; two looks a ping
_GOODBYE_SECONDS: Final = 3.0
_WATCHER_EXPIRY_SECONDS: Final = 60


class Fleet:
    """The devices of one process; made inside the event loop.

    Args:
        options: of the run.
        statistics: told of what happens.
        random: of all chance.
        driver: told by connections.
    """

    def __init__(
        self, options: Options, statistics: Statistics, random: Random, driver: Driver
    ) -> None:
        self.members = 0
        """How many are wanted: the first so many of `devices`."""
        self.devices: list[Connection] = []
        self.up: list[Connection] = []
        self.connecting = 0
        self.rate = ConnectRate(options.connect_rate, decay=options.connect_rate_decay)
        self.watcher: Watcher | None = None
        self._options = options
        self._seen = statistics
        self._random = random
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._tls = options.tls()
        self._ready: deque[Connection] = deque()
        self._later: list[tuple[float, int, Connection]] = []
        self._tasks: dict[Connection, asyncio.Task[None]] = {}
        self._deadlines: deque[tuple[float, int, Connection]] = deque()
        self._leaving: deque[tuple[float, Connection]] = deque()
        self._owing: set[Connection] = set()
        """Not wanted any more, but with publishes that have no answer."""
        self._wheel = 0
        self._wheel_seconds = 0.0
        self._next_look = time.monotonic()
        self._keep_alive(options.keep_alive_seconds)

    @property
    def waiting(self) -> int:
        """Devices that wait for their next attempt."""
        return len(self._ready) + len(self._later)

    @property
    def leaving(self) -> int:
        """Devices that are on their way out."""
        return sum(not one.wanted and one.transport is not None for one in self.devices)

    # ---------------------------------------------------------------- for the driver

    def tick(self, now: float) -> None:
        """Connect, ping and give up who is due."""
        self._connects(now)
        if now >= self._next_look:
            self._look(now)
        self._expire(now)
        for connection in [one for one in self._owing if not one.open]:
            self._owing.remove(connection)
            self._retire(connection, now)

    def resize(self, wanted: int) -> None:
        """Want the first `wanted` devices, and no others."""
        now = time.monotonic()
        for number in range(self.members, wanted):
            if number == len(self.devices):
                self.devices.append(self._make(self._options.first_number + number))
            connection = self.devices[number]
            connection.wanted = True
            self._owing.discard(connection)
            if connection.state is State.IDLE:
                connection.state = State.WAITING
                self._ready.append(connection)
            elif connection.state is State.UP and connection.place < 0:
                self._add(connection)
        for number in range(wanted, self.members):
            connection = self.devices[number]
            if connection.open:
                self._owing.add(connection)
                if connection.place >= 0:
                    self._remove(connection)
            else:
                self._retire(connection, now)
        self.members = wanted

    def drop(self, share: float) -> int:
        """Drop a share (0 to 1) of the connections without a word; return how many."""
        chosen = self._random.sample(self.up, round(len(self.up) * share))
        for connection in chosen:
            connection.abort("dropped")
        return len(chosen)

    def watch(self, client_id: str, filters: Sequence[str]) -> None:
        """Connect the rig's own subscriber, and keep it connected."""
        device = self._device(client_id)
        # What comes while it is away must not be missed; it leaves nothing behind for long.
        device.clean_start, device.session_expiry_seconds = False, _WATCHER_EXPIRY_SECONDS
        self.watcher = Watcher(self._driver, device, filters)
        self.watcher.wanted = True
        self.watcher.state = State.WAITING
        self._ready.append(self.watcher)

    def end(self) -> None:
        """End every connection and attempt at once."""
        for connection in [*self.devices, *([self.watcher] if self.watcher else [])]:
            connection.wanted = False
            connection.abort("goodbye")
        for task in list(self._tasks.values()):
            task.cancel()

    # ---------------------------------------------------------------- what connections tell

    def came(self, connection: Connection, event: Connected) -> None:
        """Take a device that got CONNACK."""
        now = time.monotonic()
        connection.failures = 0
        connection.state = State.UP
        self.connecting -= 1
        self.rate.succeeded()
        if event.keep_alive_seconds:
            mine = self._options.keep_alive_seconds or event.keep_alive_seconds
            self._keep_alive(min(mine, event.keep_alive_seconds))
        if isinstance(connection, Watcher):
            connection.subscribe()
            return
        self._seen.connected(now - connection.started)
        if connection not in self._owing:
            self._add(connection)
        if not connection.wanted:
            self._dismiss(connection, now)

    def went(self, connection: Connection, reason: str) -> None:
        """Take back a device whose network connection is gone, or could not be made."""
        state, connection.state = connection.state, State.IDLE
        if state is State.CONNECTING:
            self.connecting -= 1
            if connection.wanted:
                self.rate.failed()
                self._seen.phase.failed[reason] += 1
        elif state is State.UP and not isinstance(connection, Watcher):
            if connection.place >= 0:
                self._remove(connection)
            if reason != "dropped":
                self._seen.phase.lost[reason] += 1
        if connection.wanted:
            connection.failures += 1
            wait = self._options.backoff.wait_seconds(connection.failures, self._random)
            connection.state = State.WAITING
            due = time.monotonic() + wait
            heapq.heappush(self._later, (due, id(connection), connection))

    # ---------------------------------------------------------------- connecting

    def _make(self, number: int) -> Connection:
        return Connection(
            self._driver, number, self._device(self._options.client_id.format(number=number))
        )

    def _device(self, client_id: str) -> Device:
        options = self._options
        return Device(
            client_id,
            keep_alive_seconds=options.keep_alive_seconds,
            clean_start=options.clean_start,
            session_expiry_seconds=options.session_expiry_seconds,
            username=options.username,
            password=options.password,
        )

    def _connects(self, now: float) -> None:
        later, ready = self._later, self._ready
        while later and later[0][0] <= now:
            ready.append(heapq.heappop(later)[2])
        if not ready:
            return
        room = min(len(ready), self._options.max_connecting - self.connecting)
        for _ in range(self.rate.take(now, max(0, room))):
            connection = ready.popleft()
            if not connection.wanted or connection.state is not State.WAITING:
                connection.state = State.IDLE
                continue
            self._begin(connection, now)

    def _begin(self, connection: Connection, now: float) -> None:
        options = self._options
        connection.state = State.CONNECTING
        connection.started = now
        target, source = route(
            connection.number, connection.attempt, len(options.targets), len(options.sources)
        )
        connection.attempt += 1
        self.connecting += 1
        self._deadlines.append(
            (now + options.connect_timeout_seconds, connection.attempt, connection)
        )
        endpoint = options.targets[target]
        connection.device.websocket = (
            None if endpoint.path is None else WebSocketClient(endpoint.authority, endpoint.path)
        )
        address = options.sources[source] if options.sources else None
        self._tasks[connection] = self._loop.create_task(self._open(connection, endpoint, address))

    async def _open(self, connection: Connection, endpoint: Endpoint, source: str | None) -> None:
        """Make the network connection; whatever comes of it is told through `went` or `came`."""
        loop = self._loop
        arguments: dict[str, Any] = {}
        if endpoint.tls:
            arguments["ssl"] = self._tls
            arguments["server_hostname"] = self._options.tls_name or endpoint.host
        reason = "timeout"
        made = None
        try:
            if source is None:
                arguments |= {"host": endpoint.host, "port": endpoint.port}
            else:
                made = bound_socket(source)
                await loop.sock_connect(made, (endpoint.host, endpoint.port))
                arguments["sock"] = made
            await loop.create_connection(lambda: connection, **arguments)
        except (OSError, ssl.SSLError) as error:
            reason = words(error)
        except asyncio.CancelledError:
            reason = connection.why or reason
        else:
            return
        finally:
            self._tasks.pop(connection, None)
        if connection.transport is not None:
            connection.abort(reason)
            return
        if made is not None:
            made.close()
        connection.why = None
        self._driver.went(connection, reason)

    def _give_up(self, connection: Connection, why: str) -> None:
        """End an attempt to connect."""
        task = self._tasks.get(connection)
        if connection.transport is None and task is not None:
            connection.why = why
            task.cancel()
        else:
            connection.abort(why)

    def _expire(self, now: float) -> None:
        """End attempts and farewells that take too long."""
        deadlines, leaving = self._deadlines, self._leaving
        while deadlines and deadlines[0][0] <= now:
            _, attempt, connection = deadlines.popleft()
            if connection.attempt == attempt and connection.state is State.CONNECTING:
                self._give_up(connection, "timeout")
        while leaving and leaving[0][0] <= now:
            connection = leaving.popleft()[1]
            if connection.state is State.LEAVING:
                connection.abort("goodbye")

    def _add(self, connection: Connection) -> None:
        connection.place = len(self.up)
        self.up.append(connection)

    def _retire(self, connection: Connection, now: float) -> None:
        """Want a device no more."""
        connection.wanted = False
        if connection.state is State.UP:
            self._dismiss(connection, now)
        elif connection.state is State.CONNECTING:
            self._give_up(connection, "not wanted any more")

    def _remove(self, connection: Connection) -> None:
        last = self.up.pop()
        if last is not connection:
            self.up[connection.place] = last
            last.place = connection.place
        connection.place = -1

    def _dismiss(self, connection: Connection, now: float) -> None:
        """Disconnect in good order; the other side closes."""
        if connection.place >= 0:
            self._remove(connection)
        connection.goodbye()
        self._leaving.append((now + _GOODBYE_SECONDS, connection))

    # ---------------------------------------------------------------- keep-alive

    def _keep_alive(self, seconds: float) -> None:
        self._wheel_seconds = seconds * _KEEP_ALIVE_SHARE / _WHEEL

    def _look(self, now: float) -> None:
        """Look at the next part of the fleet: ping who was quiet, end who is silent."""
        if not self._wheel_seconds:
            self._next_look = now + 1.0
            return
        self._next_look = max(now, self._next_look + self._wheel_seconds)
        self._wheel = (self._wheel + 1) % _WHEEL
        fleet = self.devices
        for number in range(self._wheel, self.members, _WHEEL):
            self._look_at(fleet[number])
        if self.watcher is not None and self._wheel == 0:
            self._look_at(self.watcher)

    def _look_at(self, connection: Connection) -> None:
        if connection.state is not State.UP:
            return
        if not connection.quiet:
            connection.quiet = True
        elif connection.pinged:
            connection.abort("silent")
        else:
            connection.send(connection.device.ping())
            connection.pinged = connection.quiet = True
