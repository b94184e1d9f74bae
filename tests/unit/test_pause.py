"""What a pause promises: the machine with a clock of its own, the pages, and a broker restarted.

The broker in memory loses on a restart what is in flight to a session that is connected, as
VerneMQ was measured to do and mosquitto does not.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import structlog.testing
from blockbuster import blockbuster_ctx

from shadowsvc import http, pause_command, pause_page
from shadowsvc.errors import PauseFailed
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Metrics
from shadowsvc.mqtt.connection import Connection, Endpoint
from shadowsvc.mqtt.session import SessionOptions
from shadowsvc.pause import Pause, State
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from tests.faulty_store import AWAY, FaultyStore
from tests.memory_broker import serve
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

FILTER = "$share/g/things/+/shadow/update"


@pytest.fixture(autouse=True)
def _loop_never_blocked() -> Iterator[None]:
    with blockbuster_ctx(scanned_modules="shadowsvc"):
        yield


class Both:
    """What a pause drains and what it leaves by; notes what was asked of it, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.drained = True
        self.broken = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def drain(self, timeout_seconds: float) -> bool:
        self.asked.append(f"drain {timeout_seconds:g}")
        await self.gate.wait()
        if self.broken:
            raise LookupError("a defect")
        return self.drained

    def take_again(self) -> None:
        self.asked.append("take again")

    async def leave(self, reason: str) -> None:
        self.asked.append(f"leave {reason}")
        await asyncio.sleep(0)

    def come_back(self, reason: str) -> None:
        self.asked.append(f"come back {reason}")


WHOLE = ["drain 20", "leave paused", "take again", "come back paused"]


def paused_by(both: Both, metrics: Metrics | None = None) -> Pause:
    return Pause(both, both, metrics or Metrics(), drain_timeout_seconds=20)


async def test_a_pause_drains_then_leaves_then_comes_back() -> None:
    both, metrics = Both(), Metrics()
    pause = paused_by(both, metrics)
    assert pause.status == (State.OFF, 0, None)
    assert pause.describe() is None
    both.gate.clear()
    assert pause.begin(0.2)
    await until(lambda: both.asked == WHOLE[:1])
    assert pause.status == (State.LEAVING, 0.2, None)
    assert pause.describe() == "leaving; away for 0 s then"
    both.gate.set()
    await until(lambda: pause.status.state is State.OFF)
    assert both.asked == WHOLE
    assert pause.status.drained
    assert metrics.pauses == 1


async def test_the_time_away_counts_from_the_disconnection() -> None:
    both = Both()
    clock = 100.0
    pause = Pause(both, both, Metrics(), drain_timeout_seconds=20, now=lambda: clock)
    both.gate.clear()
    pause.begin(30)
    clock = 115.0
    both.gate.set()
    await until(lambda: pause.status.state is State.AWAY)
    assert pause.status.left_seconds == 30
    assert both.asked == WHOLE[:2]
    clock = 125.0
    assert pause.status.left_seconds == 20
    assert pause.describe() == "20 s are left"
    await pause.close()


async def test_asking_again_makes_it_longer_and_never_shorter() -> None:
    both, metrics = Both(), Metrics()
    clock = 100.0
    pause = Pause(both, both, metrics, drain_timeout_seconds=20, now=lambda: clock)
    both.gate.clear()
    for seconds in (30, 60, 10):
        pause.begin(seconds)
    assert pause.status.left_seconds == 60
    both.gate.set()
    await until(lambda: pause.status.state is State.AWAY)
    pause.begin(40)
    assert pause.status.left_seconds == 60
    clock = 150.0
    pause.begin(20)
    assert pause.status.left_seconds == 20
    assert both.asked == WHOLE[:2]
    assert metrics.pauses == 1
    await pause.close()


async def test_a_pause_can_be_ended_and_begun_again() -> None:
    both = Both()
    pause = paused_by(both)
    pause.end()  # without one nothing happens
    assert both.asked == []
    for count in (1, 2):
        pause.begin(1000)
        await until(lambda: pause.status.state is State.AWAY)
        pause.end()
        await until(lambda: pause.status.state is State.OFF)
        assert both.asked == WHOLE * count


async def test_a_pause_that_is_ended_while_leaving_disconnects_all_the_same() -> None:
    both = Both()
    both.gate.clear()
    pause = paused_by(both)
    pause.begin(1000)
    await until(lambda: both.asked)
    pause.end()
    await until(lambda: pause.status.state is State.OFF)
    assert both.asked == WHOLE
    assert pause.status.drained is False


async def test_a_pause_that_is_asked_for_after_an_end_is_one_however_far_the_last_one_is() -> None:
    for leaving in (True, False):
        both = Both()
        if leaving:
            both.gate.clear()
        pause = paused_by(both)
        pause.begin(1000)
        await until(lambda both=both, leaving=leaving: len(both.asked) == (1 if leaving else 2))  # type: ignore[misc]
        pause.end()
        assert pause.begin(500)
        await until(lambda pause=pause: pause.status.state is State.AWAY)  # type: ignore[misc]
        for _ in range(10):
            await asyncio.sleep(0)
        assert pause.status.state is State.AWAY
        assert 400 < pause.status.left_seconds <= 500, "what was ended does not count"
        assert both.asked == WHOLE[:2]
        await pause.close()


async def test_a_service_that_stops_inside_a_pause_does_not_come_back() -> None:
    for hold in (True, False):
        both = Both()
        if hold:
            both.gate.clear()
        pause = paused_by(both)
        pause.begin(1000)
        await until(lambda both=both, hold=hold: len(both.asked) == (1 if hold else 2))  # type: ignore[misc]
        await pause.close()
        assert both.asked == WHOLE[: 1 if hold else 2]
        assert pause.describe() is None
        assert not pause.begin(5)
        assert both.asked == WHOLE[: 1 if hold else 2]


async def test_others_that_are_connected_are_waited_for_but_not_for_ever() -> None:
    both = Both()
    left = False
    pause = Pause(both, both, Metrics(), drain_timeout_seconds=0.3, others_left=lambda: left)
    pause.begin(1000)
    await until(lambda: len(both.asked) == 2)
    assert pause.status.state is State.LEAVING
    left = True
    await until(lambda: pause.status.state is State.AWAY)
    assert pause.status.drained
    pause.end()
    await until(lambda: pause.status.state is State.OFF)
    left = False
    pause.begin(1000)
    await until(lambda: pause.status.state is State.AWAY)
    assert pause.status.drained is False
    await pause.close()


async def test_a_defect_ends_the_pause_and_not_the_service() -> None:
    both = Both()
    both.broken = True
    pause = paused_by(both)
    with structlog.testing.capture_logs() as events:
        pause.begin(1000)
        await until(lambda: pause.status.state is State.OFF)
    assert both.asked == WHOLE
    assert [event["event"] for event in events if event["log_level"] == "error"] == [
        "the pause failed"
    ]


# -------------------------------------------------------------------- pages


@asynccontextmanager
async def served(both: Both, expiry: float = 86_400) -> AsyncIterator[tuple[Pause, http.Server]]:
    pause = paused_by(both)
    server = await http.serve("127.0.0.1", 0, pause_page.routes(pause, expiry))
    try:
        yield pause, server
    finally:
        await pause.close()
        await server.close()


async def ask(server: http.Server, method: str, target: str, *headers: str) -> tuple[int, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = [f"{method} {target} HTTP/1.1", "Host: a", "Connection: close", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status = int(head.split()[1])
    return status, orjson.loads(body) if b"json" in head else None


async def test_pause_and_resume_are_asked_for_over_http() -> None:
    both = Both()
    async with served(both) as (pause, server):
        off = {"state": "off", "left_seconds": 0.0, "drained": None}
        assert await ask(server, "GET", "/pause") == (200, off)
        status, fields = await ask(server, "POST", "/pause?seconds=60")
        assert (status, fields["left_seconds"]) == (202, 60)
        await until(lambda: pause.status.state is State.AWAY)
        status, fields = await ask(server, "GET", "/pause")
        assert (status, fields["state"], fields["drained"]) == (200, "away", True)
        assert (await ask(server, "DELETE", "/pause"))[0] == 202
        await until(lambda: pause.status.state is State.OFF)
        await ask(server, "POST", "/pause?seconds=25.5")
        await until(lambda: pause.status.state is State.AWAY)
        assert (await ask(server, "POST", "/resume"))[0] == 202
        await until(lambda: pause.status.state is State.OFF)
        assert both.asked == WHOLE * 2


@pytest.mark.parametrize(
    "query",
    ["", "?", "?seconds", "?seconds=", "?seconds=0", "?seconds=-1", "?seconds=0.9",
     "?seconds=3601", "?seconds=nan", "?seconds=inf", "?seconds=1e9", "?seconds=ten",
     "?seconds=5&seconds=6", "?Seconds=5"],
)  # fmt: skip
async def test_a_pause_without_sensible_seconds_is_refused(query: str) -> None:
    both = Both()
    async with served(both) as (_, server):
        status, fields = await ask(server, "POST", f"/pause{query}")
        assert status == 400
        assert "seconds=N" in fields["error"]
        assert both.asked == []


async def test_a_pause_ends_well_before_the_broker_forgets_the_session() -> None:
    async with served(Both(), expiry=100) as (_, server):
        assert (await ask(server, "POST", "/pause?seconds=51"))[0] == 400
        assert (await ask(server, "POST", "/pause?seconds=50"))[0] == 202


async def test_no_other_method_and_no_browser_pauses() -> None:
    both = Both()
    async with served(both) as (pause, server):
        for method, target in (("PUT", "/pause?seconds=5"), ("GET", "/resume")):
            assert (await ask(server, method, target))[0] == 405
        origin = "Origin: http://evil.example"
        assert (await ask(server, "POST", "/pause?seconds=5", origin))[0] == 403
        assert both.asked == []
        await pause.close()
        assert (await ask(server, "POST", "/pause?seconds=5"))[0] == 409
        assert both.asked == []


# -------------------------------------------------------------------- the command


async def test_the_command_waits_until_the_service_has_left() -> None:
    both = Both()
    both.gate.clear()
    async with served(both) as (pause, server):
        url = f"http://127.0.0.1:{server.port}"
        said: list[str] = []
        asking = asyncio.to_thread(pause_command.pause, url, 60, 10, said.append)
        asked = asyncio.create_task(asking)
        await until(lambda: both.asked)
        assert said == []
        both.gate.set()
        await asked
        assert pause.status.state is State.AWAY
        assert "durable and acknowledged" in said[0]
        await asyncio.to_thread(pause_command.resume, url, 10, said.append)
        assert pause.status.state is State.OFF


async def test_the_command_says_why_it_failed() -> None:
    both = Both()
    both.gate.clear()
    both.drained = False
    async with served(both) as (pause, server):
        url = f"http://127.0.0.1:{server.port}"

        async def failure(seconds: float, limit: float, where: str = url) -> str:
            with pytest.raises(PauseFailed) as caught:
                await asyncio.to_thread(pause_command.pause, where, seconds, limit, print)
            return str(caught.value)

        assert "seconds=N" in await failure(5000, 1)
        assert "still 'leaving' after 0.3 s" in await failure(5, 0.3)
        for bad in ("https://a", "a:1", "http://", "http://a:x", "http://a/path", "http://a:0"):
            assert "http://HOST:PORT" in await failure(5, 1, bad)
        await pause.close()
        assert "stopping" in await failure(5, 1)
    assert "no answer" in await failure(5, 1)


# -------------------------------------------------------------------- with a broker


class Line:
    """A pipeline on a connection to the broker in memory, with more in flight than is acked."""

    def __init__(self, port: int) -> None:
        self.store = FaultyStore()
        self.ledger = Ledger()
        self.metrics = Metrics()
        self.pipeline = Pipeline(
            Options(
                "client",
                linger_seconds=0.001,
                retry_min_seconds=0.001,
                retry_max_seconds=0.004,
            ),
            Decoder(TopicParser("things"), Limits()),
            Batcher(None, max_partitions=10, max_bytes=5120),
            self.store,
            self.ledger,
            self.metrics,
            lambda data: self.connection.send(data),  # noqa: PLW0108 - made below
        )
        where = Endpoint("127.0.0.1", port, reconnect_min_seconds=0.02, reconnect_max_seconds=0.05)
        options = SessionOptions("client", (FILTER,))
        self.connection = Connection(where, options, self.pipeline)
        self.pause = Pause(self.pipeline, self.connection, self.metrics, drain_timeout_seconds=0.5)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.connection.run())
        await until(lambda: self.pipeline.subscribed)
        try:
            yield
        finally:
            await self.pause.close()
            await self.connection.finish()
            await self.pipeline.close()
            await task

    def durable(self) -> set[str]:
        return {write[0] for write in self.store.durable}


def update(number: int) -> tuple[str, bytes]:
    return f"things/d{number}/shadow/update", b'{"state": {"reported": {"a": %d}}}' % number


@pytest.mark.parametrize("pause", [True, False])
async def test_what_is_in_flight_when_a_broker_restarts_is_lost_unless_there_is_a_pause(
    pause: bool,  # noqa: FBT001
) -> None:
    async with serve() as server:
        line = Line(server.port)
        broker = server.broker
        async with line.running():
            line.store.open.clear()
            for number in range(100):
                broker.publish(*update(number))
            await until(lambda: line.ledger.held == 100)
            if pause:
                line.pause.begin(1000)
                await until(lambda: line.pipeline.draining)
                broker.publish(*update(100))
                await until(lambda: line.metrics.discarded_draining)
                line.store.open.set()
                await until(lambda: line.pause.status.state is State.AWAY)
                assert len(broker.acked) == 100
            else:
                broker.publish(*update(100))
                await until(lambda: line.ledger.held == 101)
                line.store.error = AWAY  # the broker is gone before anything is durable
                line.store.open.set()
            broker.restart()
            broker.publish(*update(101))
            if pause:
                line.pause.end()
            await until(lambda: line.metrics.sessions["resumed"] == 1)
            await until(lambda: line.ledger.received >= (102 if pause else 101))
            line.store.error = None
            await until(lambda: "d101" in line.durable() and not line.ledger.held)
            expected = {f"d{number}" for number in range(102)}
            assert (line.durable() == expected) is pause
            assert line.pipeline.draining is False


async def test_what_cannot_be_written_before_a_pause_is_repeated_after_it() -> None:
    async with serve() as server:
        line = Line(server.port)
        async with line.running():
            line.store.error = AWAY
            for number in range(20):
                server.broker.publish(*update(number))
            await until(lambda: line.ledger.held == 20)
            line.pause.begin(1000)
            await until(lambda: line.pause.status.state is State.AWAY)
            assert line.pause.status.drained is False
            assert server.broker.acked == []
            server.broker.restart()
            line.store.error = None
            line.pause.end()
            await until(lambda: len(server.broker.acked) == 20)
            assert line.durable() == {f"d{number}" for number in range(20)}
            assert line.metrics.sessions["resumed"] == 1
