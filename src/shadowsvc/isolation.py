"""Isolation: a service that can't write leaves the broker, so that others take its share.

Lives here: when to leave, and when to come back. Theory. A shared subscription goes on handing a
share of all messages to a member that is connected, whether it can write or not; its window fills
and the broker queues behind it. Whoever is alone in that leaves, keeping its session, and lets its
slot lapse; others get the new messages, and in the end fetch what waits. When all are in the same
plight, all leave, nobody can take a slot, and all come back to their own.

Rules: the time counts from the first failure after the last successful write, and only while
writes are attempted: a service without messages is not isolated; a single success starts it anew;
it returns upon a write that succeeded, the probe's or any other. Must not come in: how to leave.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from shadowsvc.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shadowsvc.metrics import Metrics

__all__ = ["REASON", "Isolation", "IsolationWatch"]

_log = structlog.get_logger(__name__)

REASON: Final = "isolated"
"""Why the broker was left: a reason of `/readyz` and of the metric of disconnects."""

_WATCH_SECONDS = 0.25
_PROBE_SECONDS = 2.0


class Isolation:
    """Decides. Pure: times are monotonic seconds, handed in."""

    def __init__(self, after_seconds: float) -> None:
        """Make it; `after_seconds` without a successful write isolate."""
        self.after_seconds = after_seconds
        self.since: float | None = None
        """Since when isolated; None when not."""
        self._came_back = 0.0

    def due(self, now: float, failing_since: float | None) -> bool:
        """Whether to leave now; `failing_since` is the first failure after the last success."""
        if self.since is not None or failing_since is None:
            return False
        # After a return the writes that wait have as long again to succeed.
        return now - max(failing_since, self._came_back) >= self.after_seconds

    def leave(self, now: float) -> None:
        """Be isolated from `now` on."""
        self.since = now

    def come_back(self, now: float) -> None:
        """Be isolated no longer."""
        self.since = None
        self._came_back = now


class _Pipeline(Protocol):
    """What the watch reads of the pipeline."""

    @property
    def failing_since(self) -> float | None:
        """Monotonic seconds of the first failure after the last success."""

    @property
    def draining(self) -> bool:
        """Whether it takes nothing more."""


class IsolationWatch:
    """Watches the pipeline and leaves the broker when it is due. Belongs to the running loop."""

    def __init__(
        self,
        after_seconds: float,
        pipeline: _Pipeline,
        metrics: Metrics,
        *,
        probe: Callable[[], Awaitable[None]],
        leave: Callable[[], Awaitable[None]],
        come_back: Callable[[], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        `probe` writes something that can't be refused, or raises `StoreError`. `leave` disconnects
        and lets the slot lapse; it is called again at each failed probe. `come_back` undoes it.
        """
        self._isolation = Isolation(after_seconds)
        self._pipeline = pipeline
        self._metrics = metrics
        self._probe = probe
        self._leave = leave
        self._come_back = come_back
        self._now = now

    @property
    def detail(self) -> str | None:
        """For how long we are isolated, for people; None when we are not."""
        since = self._isolation.since
        if since is None:
            return None
        return (
            f"no write succeeded for {self._isolation.after_seconds:g} s "
            "(SHADOWSVC_LIMITS__ISOLATE_AFTER_SECONDS); the broker was left "
            f"{self._now() - since:.0f} s ago"
        )

    async def run(self) -> None:
        """Watch for ever."""
        isolation = self._isolation
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self._pipeline.draining or not isolation.due(
                self._now(), self._pipeline.failing_since
            ):
                continue
            # What failed may have been left to the broker since, so that nothing is tried any more.
            if not await self._a_write_succeeds():
                isolation.leave(self._now())
                self._metrics.isolations += 1
                self._metrics.isolated = True
                _log.error("isolated: no write succeeds, leaving the broker", detail=self.detail)
                await self._leave()
                while not await self._a_write_succeeds():
                    await self._leave()
                    await asyncio.sleep(_PROBE_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311
                _log.warning("writes succeed again: coming back to the broker")
                self._metrics.isolated = False
                self._come_back()
            isolation.come_back(self._now())

    async def _a_write_succeeds(self) -> bool:
        if self._pipeline.failing_since is None:  # one of its own did
            return True
        try:
            await self._probe()
        except StoreError as error:
            _log.info("the probe fails", error=str(error), limit_by="isolation probe")
            return False
        return True
