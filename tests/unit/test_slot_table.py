"""What the table of slots does around the driver; its statements are tried on a real Cassandra.

The driver is a double: it hangs and breaks on demand.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from blockbuster import blockbuster_ctx

from shadowsvc.errors import StoreUnavailable
from shadowsvc.settings import Settings
from shadowsvc.store import driver
from shadowsvc.store.slots import SlotTable

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _loop_never_blocked() -> Iterator[None]:
    with blockbuster_ctx(scanned_modules="shadowsvc"):
        yield


class Driver:
    """Stands for cassandra-driver: counts connections, answers everything with no rows."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.connects = 0
        self.closed = 0
        self.executed = 0
        self.threads: set[str] = set()
        self.bound: list[tuple[Any, ...]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    @contextmanager
    def connected(self, _settings: object) -> Iterator[Any]:
        self.connects += 1
        try:
            yield self
        finally:
            self.closed += 1

    @property
    def session(self) -> Any:
        return self

    def prepare(self, _text: str) -> Any:
        return self

    def bind(self, values: tuple[Any, ...]) -> Any:
        self.bound.append(values)
        return self

    def execute(self, _bound: object) -> list[Any]:
        self.threads.add(threading.current_thread().name)
        assert self.go_on.wait(10)
        self.executed += 1
        if self.error is not None:
            raise self.error
        return []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(driver, "connected", made.connected)
    return made


async def test_one_connection_serves_all_calls_and_a_close_ends_it(fake: Driver) -> None:
    table = SlotTable(Settings())
    await table.close()
    assert fake.connects == 0, "nothing was asked"
    assert await table.list() == await table.list() == []
    assert (fake.connects, fake.closed) == (1, 0)
    await table.close()
    assert fake.closed == 1
    assert await table.list() == []
    assert fake.connects == 2, "and again when asked"
    await table.close()


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("a defect of the driver's")])
async def test_whatever_the_driver_raises_is_an_outage_and_the_next_call_connects_anew(
    fake: Driver, error: Exception
) -> None:
    table = SlotTable(Settings())
    fake.error = error
    with pytest.raises(StoreUnavailable, match=str(error)) as caught:
        await table.list()
    assert caught.value.kind == "driver"
    assert fake.closed == 1
    fake.error = None
    assert await table.list() == []
    assert fake.connects == 2
    await table.close()


async def test_calls_follow_one_another_in_a_thread_while_the_loop_goes_on(fake: Driver) -> None:
    table = SlotTable(Settings())
    fake.go_on.clear()
    calls = [asyncio.create_task(table.list()) for _ in range(3)]
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert not any(call.done() for call in calls)
    fake.go_on.set()
    assert await asyncio.gather(*calls) == [[], [], []]
    assert fake.threads == {"slots"}
    await table.close()


async def test_who_stops_waiting_does_not_stop_the_call(fake: Driver) -> None:
    """A take that nobody waits for any more is freed by the release that follows it."""
    table = SlotTable(Settings())
    fake.go_on.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await table.take("shadowsvc-0", "me", uuid.uuid4())
    fake.go_on.set()
    assert await table.list() == []
    assert fake.executed >= 2
    await table.close()


async def test_a_take_without_an_answer_is_renewed_under_its_owners_name(fake: Driver) -> None:
    """It may have been made; the owner's name is how a restarted process knows its own slot."""
    table = SlotTable(Settings())
    token = uuid.uuid4()
    fake.error = StoreUnavailable("timeout", "no answer")
    with pytest.raises(StoreUnavailable):
        await table.take("shadowsvc-0", "me", token)
    fake.bound.clear()
    with pytest.raises(StoreUnavailable):
        await table.renew("shadowsvc-0", token)
    assert fake.bound[0][1:3] == ("me", token)
    await table.close()
