"""Isolation: when a service that can't write leaves the broker, and when it comes back."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from shadowsvc.errors import StoreUnavailable
from shadowsvc.isolation import Isolation, IsolationWatch
from shadowsvc.metrics import Metrics
from tests.memory_slots import in_leaps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AFTER = 60.0


class TestIsolation:
    def test_it_is_due_when_nothing_succeeded_for_so_long_and_not_a_moment_before(self) -> None:
        isolation = Isolation(AFTER)
        assert not isolation.due(1000, None), "nothing fails, or nothing is tried"
        assert not isolation.due(159.9, 100)
        assert isolation.due(160, 100)

    def test_it_is_due_once(self) -> None:
        isolation = Isolation(AFTER)
        isolation.leave(160)
        assert isolation.since == 160
        assert not isolation.due(1000, 100)

    def test_after_a_return_the_writes_that_wait_have_as_long_again(self) -> None:
        isolation = Isolation(AFTER)
        isolation.leave(160)
        isolation.come_back(500)
        assert isolation.since is None
        assert not isolation.due(559, 100)
        assert isolation.due(560, 100)


class Apart:
    """A watch, what it watches, and what it did."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.failing_since: float | None = None
        self.draining = False
        self.away = True
        self.connected = True
        self.left = 0
        self.probed = 0
        self.metrics = Metrics()
        self.watch = IsolationWatch(
            AFTER,
            self,
            self.metrics,
            probe=self._probe,
            leave=self._leave,
            come_back=self._come_back,
            now=self.loop.time,
        )

    async def _probe(self) -> None:
        self.probed += 1
        if self.away:
            raise StoreUnavailable("timeout", "no answer")

    async def _leave(self) -> None:
        self.connected = False
        self.left += 1

    def _come_back(self) -> None:
        self.connected = True


@asynccontextmanager
async def apart() -> AsyncIterator[Apart]:
    made = Apart()
    task = asyncio.create_task(made.watch.run())
    await asyncio.sleep(1)
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled(), task.exception()


@in_leaps
async def test_an_outage_below_the_limit_leaves_the_connection() -> None:
    async with apart() as made:
        for _ in range(10):
            made.failing_since = made.loop.time()
            await asyncio.sleep(AFTER - 1)
            made.failing_since = None
            await asyncio.sleep(5)
        assert made.connected
        assert made.left == made.probed == made.metrics.isolations == 0


@in_leaps
async def test_an_outage_beyond_the_limit_isolates_until_the_probe_succeeds() -> None:
    async with apart() as made:
        made.failing_since = made.loop.time()
        await asyncio.sleep(AFTER + 1)
        assert not made.connected
        assert made.watch.detail is not None
        assert "SHADOWSVC_LIMITS__ISOLATE_AFTER_SECONDS" in made.watch.detail
        assert made.metrics.isolated
        before = made.left
        await asyncio.sleep(600)
        assert not made.connected
        assert made.left > before, "whatever took the slot again meanwhile gives it up again"
        made.away = False
        await asyncio.sleep(5)
        assert made.connected
        assert made.watch.detail is None
        assert not made.metrics.isolated
        assert made.metrics.isolations == 1
        # What waits may take its time; then it is the same again.
        await asyncio.sleep(AFTER - 10)
        assert made.connected
        made.away = True
        await asyncio.sleep(15)
        assert made.metrics.isolations == 2


@in_leaps
async def test_a_write_of_the_pipelines_own_ends_it_too() -> None:
    async with apart() as made:
        made.failing_since = made.loop.time()
        await asyncio.sleep(AFTER + 1)
        assert made.watch.detail is not None
        made.failing_since = None
        await asyncio.sleep(5)
        assert made.connected
        assert made.watch.detail is None


@in_leaps
async def test_failures_that_nobody_repeats_isolate_nobody_whose_probe_succeeds() -> None:
    """What failed may have been left to the broker; then nothing is tried, and nothing fails."""
    async with apart() as made:
        made.away = False
        made.failing_since = made.loop.time()
        await asyncio.sleep(10 * AFTER)
        assert made.connected
        assert made.left == 0
        assert made.probed > 0
        assert made.metrics.isolations == 0


@in_leaps
async def test_who_is_stopping_is_not_isolated() -> None:
    async with apart() as made:
        made.draining = True
        made.failing_since = made.loop.time()
        await asyncio.sleep(10 * AFTER)
        assert made.left == 0
