"""Several processes, several orphans, random faults: at the end nothing waits for anybody.

The broker and the table of slots are in memory, the connections are real, and time leaps. The
faults are those that no real broker shows on demand: connections lost at any moment, a table that
loses requests and answers, a store that fails, a machine that is too busy.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import mqtt5
import pytest

from shadowsvc.adoption import Adopter, Terms
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Metrics
from shadowsvc.mqtt.adoption import Adoption, Emptier, Patience
from shadowsvc.mqtt.session import SessionOptions
from shadowsvc.mqtt.transport import Endpoint
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from tests.faulty_store import AWAY, FaultyStore
from tests.line import nothing_lost
from tests.memory_broker import Link, MemoryBroker, Server, serve
from tests.memory_slots import LOST, UNANSWERED, MemoryTable, Rows, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from shadowsvc.mqtt.adopted import Marker

SHARE = "$share/g/things/+/shadow/update"
TERMS = Terms(lease_seconds=2, renew_seconds=0.1, orphan_after_seconds=0.2)
PATIENCE = Patience(quiet_seconds=0.1, stalled_seconds=0.6, restless_seconds=5)
LIMIT_SECONDS = 40
SEEDS = 80
SEEDS_A_TEST = 20


class Process:
    """One process's adopter, with a store of its own."""

    def __init__(self, name: str, server: Server, rows: Rows) -> None:
        self.server = server
        self.table = MemoryTable(rows)
        self.store = FaultyStore()
        self.metrics = Metrics()
        self.ledger = Ledger()
        self.pipeline = Pipeline(
            Options(
                "",
                20,
                concurrency=2,
                retry_min_seconds=0.001,
                retry_max_seconds=0.01,
                marker_prefix="marker/",
            ),
            Decoder(TopicParser("things"), Limits()),
            Batcher(None),
            self.store,
            self.ledger,
            self.metrics,
            lambda data: self.adopter.send(data),  # noqa: PLW0108 - made below
        )
        self.adopter = Adopter(
            self.table,
            self.pipeline,
            self._attempt,
            self.metrics,
            terms=TERMS,
            owner=name,
            own_slot=lambda: None,
            may_adopt=lambda: True,
            must_leave=lambda: False,
            now=asyncio.get_running_loop().time,
        )

    def _attempt(self, name: str, emptier: Emptier) -> Adoption:
        return Adoption(
            Endpoint("127.0.0.1", self.server.port, connect_timeout_seconds=0.5),
            SessionOptions(name, (SHARE,), keep_alive_seconds=1, session_expiry_seconds=300),
            [SHARE],
            f"marker/{name}",
            emptier,
            self._publish,
            PATIENCE,
        )

    async def _publish(self, marker: Marker) -> None:
        await asyncio.sleep(0)
        self.server.broker.publish(marker.topic, marker.payload)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.adopter.run())
        try:
            yield
        finally:
            await self.adopter.stop(5)
            assert not task.done(), "it ended by itself"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.pipeline.close()


def leave_behind(broker: MemoryBroker, rows: Rows, count: int, draw: random.Random) -> list[str]:
    """Make orphans that hold messages, in flight and queued; return the devices."""
    members = []
    for number in range(count):
        token = uuid.uuid4()
        assert rows.create(number, "gone", token)
        assert rows.release(f"g-{number}", token)
        member = Link(broker, lambda _: None, lambda: None)
        member.receive(
            mqtt5.ConnectPacket(
                f"g-{number}", session_expiry_interval=300, receive_max=draw.randint(1, 30)
            ).write()
        )
        topic_filter = mqtt5.TopicFilter(SHARE, max_qos=mqtt5.QoS.AT_LEAST_ONCE)
        member.receive(mqtt5.SubscribePacket(1, [topic_filter]).write())
        members.append(member)
    devices = [f"d{number}" for number in range(100 * count)]
    for device in devices:
        broker.publish(f"things/{device}/shadow/update", b'{"state": {"reported": {"n": 1}}}')
    for member in members:
        member.closed()
    return devices


async def until(condition: Callable[[], object], seconds: float = LIMIT_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of all kinds
            await asyncio.sleep(0.01)


@asynccontextmanager
async def processes(count: int, rows: Rows, server: Server) -> AsyncIterator[list[Process]]:
    with nothing_lost():
        made = [Process(f"p{number}", server, rows) for number in range(count)]
        async with AsyncExitStack() as stack:
            for process in made:
                await stack.enter_async_context(process.running())
            yield made


def assert_all_came(made: list[Process], devices: list[str]) -> None:
    durable = {write[0] for process in made for write in process.store.durable}
    assert sorted(durable) == sorted(devices)
    for process in made:
        ledger = process.ledger
        assert ledger.received == (
            ledger.acknowledged + ledger.stale + ledger.abandoned + ledger.done_without_ack
        )
        assert process.metrics.rejected == {}


def assert_nothing_waits(broker: MemoryBroker) -> None:
    """A session may be left, if its end was lost on its way: an empty one, outside of the share."""
    for session in broker.sessions.values():
        assert session.link is None
        assert not session.queue
        assert SHARE not in session.filters


def make_rows() -> Rows:
    return Rows(asyncio.get_running_loop().time, int(TERMS.lease_seconds))


async def test_two_processes_empty_four_orphans() -> None:
    rows = make_rows()
    async with serve() as server:
        devices = leave_behind(server.broker, rows, 4, random.Random(1))
        async with processes(2, rows, server) as made:
            await until(lambda: not rows.slots())
            assert server.broker.sessions == {}
        assert sum(process.metrics.adoptions["emptied"] for process in made) == 4
        assert_all_came(made, devices)


@pytest.mark.parametrize("first_seed", range(0, SEEDS, SEEDS_A_TEST))
def test_whatever_breaks_everything_is_fetched_in_the_end(first_seed: int) -> None:
    faults, faulty = Counter[str](), 0
    for seed in range(first_seed, first_seed + SEEDS_A_TEST):
        draw = random.Random(seed)
        try:
            happened, at_table = run(break_and_look(draw), stalls=draw)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        faults += happened
        faulty += at_table
    assert set(faults) == {"connection", "store", "silence"}
    assert faulty > SEEDS_A_TEST


async def break_and_look(draw: random.Random) -> tuple[Counter[str], int]:
    """Have random things fail; return what did, and how many requests to the table were lost."""
    rows = make_rows()
    faults = Counter[str]()
    async with serve() as server:
        broker = server.broker
        devices = leave_behind(broker, rows, 3, draw)
        async with processes(2, rows, server) as made:
            for _ in range(40):
                await asyncio.sleep(draw.uniform(0, 0.1))
                one = draw.choice(made)
                fault = draw.randrange(4)
                if fault == 0 and broker.online:
                    draw.choice([session.link for session in broker.online if session.link]).drop()
                    faults["connection"] += 1
                elif fault == 1:
                    one.table.faults.append(draw.choice([LOST, UNANSWERED]))
                elif fault == 2:
                    one.store.error = AWAY
                    one.store.errors_left = draw.randint(1, 5)
                    faults["store"] += 1
                elif broker.online and not broker.silent_on:
                    broker.silent_on = {
                        draw.choice([mqtt5.SubscribePacket, mqtt5.UnsubscribePacket])
                    }
                    faults["silence"] += 1
                else:
                    broker.silent_on = set()
            broker.silent_on = set()
            for process in made:
                process.table.faults.clear()
                process.store.error = None
            await until(lambda: not rows.slots())
            assert_nothing_waits(broker)
        assert_all_came(made, devices)
        return faults, sum(process.table.faulty for process in made)
