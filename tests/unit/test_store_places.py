"""However many use one store, the driver never has more requests than its socket pair bears."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shadowsvc.config import Settings
from shadowsvc.errors import StoreUnavailable
from shadowsvc.store.cassandra import CassandraStore
from shadowsvc.window import MAX_IN_FLIGHT


class Driver:
    """Session and statement of the driver, as far as a probe needs them; it answers when told."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.most = 0
        self.answers = 0
        self.open = asyncio.Event()
        self.error: Exception | None = None

    def bind(self, _values: Any, **_more: Any) -> None:
        pass

    async def execute(self, _statement: Any) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await self.open.wait()
            await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        self.answers += 1
        if self.error is not None:
            raise self.error


def connected(driver: Driver) -> CassandraStore:
    store = CassandraStore(Settings().cassandra, dead_letter_ttl_seconds=60)
    store._session = driver
    store._statements = {"write": driver}
    return store


async def test_requests_beyond_the_bound_wait_and_are_sent_in_the_end() -> None:
    driver = Driver()
    store = connected(driver)
    requests = [asyncio.create_task(store.write_probe()) for _ in range(3 * MAX_IN_FLIGHT)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert driver.in_flight == MAX_IN_FLIGHT
    driver.open.set()
    await asyncio.gather(*requests)
    assert driver.most == MAX_IN_FLIGHT
    assert driver.answers == 3 * MAX_IN_FLIGHT


async def test_a_request_that_fails_or_is_cancelled_gives_its_place_back() -> None:
    driver = Driver()
    store = connected(driver)
    cancelled = [asyncio.create_task(store.write_probe()) for _ in range(2 * MAX_IN_FLIGHT)]
    await asyncio.sleep(0)
    for request in cancelled:
        request.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)
    driver.open.set()
    driver.error = OSError("away")
    for _ in range(MAX_IN_FLIGHT + 1):
        with pytest.raises(StoreUnavailable, match="away"):
            await store.write_probe()
    assert driver.in_flight == 0
