"""A pause: leave the broker in good order for a while, and come back.

Lives here: the states of a pause and the task that goes through them. An operator asks for it
before a node of the broker is restarted: what is in flight to a connected session is lost then,
what waits for an absent one is not (docs/guarantees.md).

    OFF ──begin──▶ LEAVING ──drained, disconnected──▶ AWAY ──the time is over, or end──▶ OFF

Rules:
1. A pause that has begun always disconnects, even when it is ended at once: what was discarded
   meanwhile comes again only on a new connection (MQTT 5 §4.4).
2. Draining has the time limit of a stop. What is not durable by then stays with the broker, as it
   does at a stop.
3. The time away counts from the disconnection. Asking again makes it longer, never shorter.
4. Whatever goes wrong here, the service comes back.

Must not come in: HTTP, how to drain (`Pipeline.drain`) and how to leave (`Connection.leave`).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowsvc.metrics import Metrics

__all__ = ["MAX_SECONDS", "REASON", "Leaves", "Pause", "State", "Status", "Takes"]

_log = structlog.get_logger(__name__)

_POLL_SECONDS = 0.05

MAX_SECONDS = 3600.0
"""Longest pause; well below the session expiry that the broker was asked for."""
REASON = "paused"
"""What a connection is told, and so a label of the metric of disconnects."""


class Takes(Protocol):
    """What is drained: the pipeline."""

    async def drain(self, timeout_seconds: float) -> bool:
        """Take nothing more, write what is held; False when that did not end in time."""

    def take_again(self) -> None:
        """Undo `drain`."""


class Leaves(Protocol):
    """What is connected to the broker."""

    async def leave(self, reason: str) -> None:
        """Disconnect, keeping the session, and stay away."""

    def come_back(self, reason: str) -> None:
        """Undo `leave`."""


class State(enum.Enum):
    """Where a pause is; see the module's diagram."""

    OFF = "off"
    LEAVING = "leaving"
    AWAY = "away"


class Status(NamedTuple):
    """What an operator gets to see."""

    state: State
    left_seconds: float
    """Until the service connects again; while leaving, how long it will stay away."""
    drained: bool | None
    """Whether at the last disconnection everything held was durable and acknowledged, and all
    connections were left; None before the first one."""


class Pause:
    """The pause of one service. Belongs to the running loop."""

    def __init__(
        self,
        pipeline: Takes,
        connection: Leaves,
        metrics: Metrics,
        *,
        drain_timeout_seconds: float,
        others_left: Callable[[], bool] = lambda: True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it, off.

        `others_left` tells whether whoever else is connected has left: they do so by themselves
        once `describe` gives an answer, and are waited for within `drain_timeout_seconds`.
        """
        self._pipeline = pipeline
        self._connection = connection
        self._metrics = metrics
        self._drain_timeout_seconds = drain_timeout_seconds
        self._others_left = others_left
        self._now = now
        self._state = State.OFF
        self._seconds = 0.0
        self._until = 0.0
        self._drained: bool | None = None
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def status(self) -> Status:
        """Where the pause is now."""
        left = {
            State.OFF: 0.0,
            State.LEAVING: self._seconds,
            State.AWAY: max(0.0, self._until - self._now()),
        }[self._state]
        return Status(self._state, left, self._drained)

    def describe(self) -> str | None:
        """Say for people how far a pause is; None when there is none."""
        status = self.status
        if status.state is State.OFF:
            return None
        if status.state is State.LEAVING:
            return f"leaving; away for {status.left_seconds:.0f} s then"
        return f"{status.left_seconds:.0f} s are left"

    def begin(self, seconds: float) -> bool:
        """Leave for `seconds` (above 0, at most `MAX_SECONDS`), or make a pause that long.

        False when the service is stopping: then nothing happens.
        """
        if self._closed:
            return False
        self._ended.clear()  # also of a pause that was ended and has not noticed yet
        if self._state is State.AWAY:
            self._until = max(self._until, self._now() + seconds)
            _log.info("pause made longer", seconds_left=round(self.status.left_seconds, 1))
        elif self._state is State.LEAVING:
            self._seconds = max(self._seconds, seconds)
        else:
            self._state = State.LEAVING
            self._seconds = seconds
            self._metrics.pauses += 1
            _log.info("pausing", seconds=seconds)
            self._task = asyncio.create_task(self._run(), name="pause")
        return True

    def end(self) -> None:
        """Come back as soon as may be; without a pause nothing happens."""
        self._seconds = self._until = 0.0
        self._ended.set()

    async def close(self) -> None:
        """End it for good, where it stands: the service is stopping and stays away."""
        self._closed = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._state = State.OFF

    async def _run(self) -> None:
        try:
            drained = await self._drain()
            await self._connection.leave(REASON)
            self._drained = await self._others() and drained
            self._until = self._now() + self._seconds
            self._state = State.AWAY
            _log.info("paused", seconds=self._seconds, drained=self._drained)
            await self._wait()
        except Exception:  # noqa: BLE001 - rule 4
            await self._connection.leave(REASON)
            _log.exception("the pause failed")
        finally:
            if not self._closed:
                self._state = State.OFF
                self._pipeline.take_again()
                self._connection.come_back(REASON)
                _log.info("the pause is over")

    async def _drain(self) -> bool:
        """Drain, unless the pause is ended before."""
        draining = asyncio.ensure_future(self._pipeline.drain(self._drain_timeout_seconds))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait([draining, ended], return_when=asyncio.FIRST_COMPLETED)
            return draining.done() and draining.result()
        finally:
            draining.cancel()
            ended.cancel()

    async def _others(self) -> bool:
        """Wait for others to leave, unless the pause is ended before."""
        deadline = self._now() + self._drain_timeout_seconds
        while not self._others_left():
            if self._ended.is_set() or self._now() >= deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    async def _wait(self) -> None:
        while not self._ended.is_set() and (left := self._until - self._now()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._ended.wait()
