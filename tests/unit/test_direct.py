"""Own connections to nodes that fail alone, are silent, late, or say what nobody asked."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

import shadowsvc.store.direct as direct_module
from shadowsvc.config import Settings
from shadowsvc.credentials import Credentials
from shadowsvc.errors import StoreUnavailable
from shadowsvc.shadow.update import Update
from shadowsvc.store import frames
from shadowsvc.store.direct import Direct, Wire
from shadowsvc.store.statements import STATEMENTS
from shadowsvc.store.thresholds import DEFAULT, BatchLimits
from shadowsvc.store.topology import Replica, Snapshot
from tests.unit.cql_node import DONE, Node, error
from tests.unit.reading_frames import rows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

UNAVAILABLE = error(0x1000, "two of three are down, it seems")
OVERLOADED = error(0x1001)
TIMEOUT_SECONDS = 0.5
UPDATE = Update("lamp", "", 1_700_000_000_000_000, ["/on"], [b"true"], 1, [], 100)
LOGIN = Credentials("me", SecretStr("secret"))


def ring(*replicas: Replica) -> Snapshot:
    return Snapshot.build([(0, frozenset(replicas))], len(replicas))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(
    *nodes: Node,
    timeout_seconds: float = TIMEOUT_SECONDS,
    usable: bool = True,
    told: list[BatchLimits] | None = None,
) -> AsyncIterator[Direct]:
    settings = Settings.model_validate(
        {"cassandra": {"request_timeout_seconds": timeout_seconds}}
    ).cassandra
    async with AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node)
        direct = Direct(settings, STATEMENTS)
        if told is not None:
            direct.on_limits = told.append
        direct.use(LOGIN)
        direct.follow(ring(*(node.replica for node in nodes)))
        try:
            if usable:
                await until(lambda: direct.connections == len(nodes))
            yield direct
        finally:
            await direct.close()


def wire_of(direct: Direct) -> Wire:
    wire = direct.wire_for("lamp")
    assert wire is not None
    return wire


async def write(direct: Direct) -> None:
    await wire_of(direct).write([UPDATE])


async def tried(direct: Direct) -> str:
    """Write; return what went wrong, or nothing."""
    try:
        await write(direct)
    except StoreUnavailable as failure:
        return failure.kind
    return ""


@pytest.mark.parametrize("sick", [0, 1])
@pytest.mark.parametrize("answer", [UNAVAILABLE, OVERLOADED], ids=["unavailable", "overloaded"])
async def test_a_node_that_fails_fast_does_not_get_every_batch(
    sick: int, answer: tuple[int, bytes]
) -> None:
    nodes = Node(), Node()
    nodes[sick].batch = lambda _number: answer
    async with connected(*nodes) as direct:
        results = [await tried(direct) for _ in range(40)]
        assert results.count("") >= 35
        # It is asked again after a while, and trusted as soon as it is well.
        nodes[sick].batch = lambda _number: DONE
        before = nodes[sick].batches
        async with asyncio.timeout(20):
            while nodes[sick].batches == before:
                assert await tried(direct) == ""
                await asyncio.sleep(0.01)


async def test_with_every_node_ill_each_is_still_asked() -> None:
    nodes = Node(), Node(), Node()
    for node in nodes:
        node.batch = lambda _number: UNAVAILABLE
    async with connected(*nodes) as direct:
        for _ in range(30):
            assert await tried(direct) == "server_unavailable"
        assert all(node.batches >= 5 for node in nodes)


async def test_nodes_that_are_alike_take_turns() -> None:
    nodes = Node(), Node(), Node()
    async with connected(*nodes) as direct:
        for _ in range(30):
            await write(direct)
    assert [node.batches for node in nodes] == [10, 10, 10]


async def test_a_node_that_is_slow_gets_less() -> None:
    slow, quick = Node(), Node()
    slow.batch = lambda _number: None
    async with connected(slow, quick, timeout_seconds=5) as direct:
        waiting = []
        while not slow.batches:
            waiting.append(asyncio.create_task(write(direct)))
            await asyncio.sleep(0.01)
        for _ in range(20):
            await write(direct)
        assert slow.batches == 1
        slow.say(slow.streams[0], DONE)
        await asyncio.gather(*waiting)


async def test_a_late_answer_is_nobodys_and_its_stream_serves_again() -> None:
    node = Node()
    node.batch = lambda number: None if number == 1 else DONE
    async with connected(node) as direct:
        wire = wire_of(direct)
        free = len(wire._free)
        lost = asyncio.create_task(tried(direct))
        await until(lambda: node.batches == 1)
        while not lost.done():  # others are answered: the connection lives
            await write(direct)
            await asyncio.sleep(0.02)
        assert lost.result() == "lib_request_timed_out"
        assert wire.usable
        assert len(wire._free) == free - 1
        (late, *_) = node.streams
        assert node.streams.count(late) == 1
        node.say(late, DONE)
        await until(lambda: wire.in_flight == 0)
        for _ in range(free):
            await write(direct)
        assert node.streams.count(late) == 2
    assert node.connections == 1


async def test_an_answer_to_no_question_ends_the_connection_and_confirms_nothing() -> None:
    node = Node()
    node.batch = lambda number: None if number == 1 else DONE
    async with connected(node) as direct:
        wire = wire_of(direct)
        lost = asyncio.create_task(tried(direct))
        await until(lambda: node.batches == 1)
        node.say(0, DONE)
        assert await lost == "connection_error"
        assert "nobody waits" in await wire.ended
        await until(lambda: direct.connections == 1)
        await write(direct)


async def test_a_silent_node_is_left_after_one_time_out() -> None:
    node = Node()
    async with connected(node) as direct:
        wire = wire_of(direct)
        await write(direct)
        node.batch = lambda _number: None  # from the moment of an answer on
        assert await tried(direct) == "lib_request_timed_out"
        assert not wire.usable
        assert await wire.ended == "nothing is heard"


async def test_a_late_heartbeat_costs_no_connection_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct_module, "_HEARTBEAT_SECONDS", 0.05)
    node = Node()
    node.hears_options = False
    async with connected(node) as direct:
        ends = time.monotonic() + 4 * TIMEOUT_SECONDS
        while time.monotonic() < ends:
            await write(direct)
            await asyncio.sleep(0.02)
        assert node.connections == 1
        # Without anything else it is a sign.
        await until(lambda: node.connections > 1)


async def test_a_stalled_process_reads_the_answers_that_wait_before_it_judges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Node()
    async with connected(node, timeout_seconds=20) as direct:
        wire = wire_of(direct)
        node.batch = lambda _number: None
        writes = [asyncio.create_task(write(direct)) for _ in range(5)]
        await until(lambda: node.batches == 5)
        wire._transport.pause_reading()
        for stream in node.streams:
            node.say(stream, DONE)
        await asyncio.sleep(0.1)
        # As after SIGCONT: the time-out is long over, and its timer comes before the socket.
        stopped = SimpleNamespace(monotonic=lambda: time.monotonic() + 100)
        monkeypatch.setattr(direct_module, "time", stopped)
        wire._expire()
        wire._transport.resume_reading()
        await asyncio.gather(*writes)
        assert wire.usable


async def test_when_too_many_answers_are_owed_the_connection_is_made_anew() -> None:
    node = Node()
    node.batch = lambda _number: None
    async with connected(node) as direct:
        wire = wire_of(direct)
        wire._free.clear()  # as after a thousand answers that never came
        assert await tried(direct) == "lib_no_streams"
        await until(lambda: node.connections == 2 and direct.connections == 1)


@pytest.mark.parametrize(
    "answer",
    [error(0x0100, "wrong password"), (0x0E, b"\0\0\0\1x"), error(0x0000, "no role")],
    ids=["refused", "challenge", "server error"],
)
async def test_logins_that_fail_are_not_hammered_whatever_the_node(
    answer: tuple[int, bytes],
) -> None:
    nodes = Node(), Node(), Node()
    for node in nodes:
        node.login = answer
    async with connected(*nodes, usable=False) as direct:
        await until(lambda: any(node.logins for node in nodes))
        await asyncio.sleep(1)
        assert [login for node in nodes for login in node.logins] == [b"\0me\0secret"]
        assert direct.wire_for("lamp") is None
        # Other credentials are tried at once.
        for node in nodes:
            node.login = frames.AUTH_SUCCESS, b"\xff\xff\xff\xff"
        direct.use(Credentials("me", SecretStr("other")))
        await until(lambda: direct.connections == 3)
        assert nodes[0].logins[-1] == b"\0me\0other"


async def test_a_schema_that_is_not_there_yet_needs_no_new_login() -> None:
    node = Node()
    node.prepare = error(0x2200, "unconfigured table shadow")
    async with connected(node, usable=False) as direct:
        await until(lambda: node.prepared >= 3)
        assert direct.connections == 0
        node.prepare = None
        await until(lambda: direct.connections == 1)
        assert node.connections == 1
        await write(direct)


@pytest.mark.parametrize("address", ["a" * 70, "no..host", "host.invalid", "::1"])
async def test_an_address_that_cannot_be_used_is_tried_again_and_hurts_nobody(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_module, "_RECONNECT_MAX_SECONDS", 0.2)
    node = Node()
    async with connected(node) as direct:
        bad = Replica(address, node.replica.port, "name")
        direct.follow(ring(node.replica, bad))
        (task,) = (one.task for replica, one in direct._nodes.items() if replica == bad)
        await asyncio.sleep(0.5)
        assert not task.done()
        for _ in range(10):
            await write(direct)


async def test_a_replica_set_without_nodes_goes_by_the_driver() -> None:
    node = Node()
    async with connected(node) as direct:
        direct.follow(Snapshot.build([(0, frozenset())], 0))
        assert direct.wire_for("lamp") is None
        assert direct.connections == 0


async def test_after_the_end_nothing_is_connected_any_more() -> None:
    node = Node()
    async with connected(node) as direct:
        wire = wire_of(direct)
        node.batch = lambda _number: None
        held = asyncio.create_task(tried(direct))
        await until(lambda: node.batches == 1)
        direct.use(LOGIN)  # the connection leaves, with a request under way
        await direct.close()
        assert await held == "connection_error"
        direct.follow(ring(node.replica))
        direct.use(LOGIN)
        connections = node.connections
        await asyncio.sleep(0.2)
        assert node.connections == connections
        assert wire.closed
        assert direct.connections == 0


def thresholds(partitions: int, size: str) -> tuple[int, bytes]:
    return frames.RESULT, rows(
        [b"unlogged_batch_across_partitions_warn_threshold", str(partitions).encode()],
        [b"batch_size_warn_threshold", size.encode()],
    )


async def test_batches_may_be_as_large_as_every_connected_node_allows() -> None:
    nodes = Node(), Node()
    nodes[0].settings = thresholds(30, "8KiB")
    nodes[1].settings = thresholds(20, "16KiB")
    told: list[BatchLimits] = []
    async with connected(*nodes, told=told):
        await until(lambda: len(told) == 2)
    assert told[-1] == BatchLimits(20, 8192)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(error(0x2100, "no SELECT on system_views.settings"), id="no grant"),
        pytest.param(error(0x2200, "keyspace system_views does not exist"), id="no such table"),
        pytest.param((frames.RESULT, b"\0\0\0\2"), id="no rows"),
    ],
)
async def test_a_node_that_does_not_tell_counts_as_cassandra_by_default_and_is_used(
    answer: tuple[int, bytes],
) -> None:
    nodes = Node(), Node()
    nodes[0].settings = answer
    nodes[1].settings = thresholds(20, "16KiB")
    told: list[BatchLimits] = []
    async with connected(*nodes, told=told) as direct:
        await until(lambda: len(told) == 2)
        for _ in range(4):
            await write(direct)
    assert told[-1] == DEFAULT
    assert [node.batches for node in nodes] == [2, 2]


async def test_a_node_that_comes_back_with_other_thresholds_is_asked_again() -> None:
    told: list[BatchLimits] = []
    node = Node()
    node.settings = thresholds(30, "8KiB")
    async with connected(node, told=told) as direct:
        node.settings = thresholds(5, "8KiB")
        wire_of(direct).abort()
        await until(lambda: len(told) == 2)
    assert told == [BatchLimits(30, 8192), BatchLimits(5, 8192)]


async def test_nobody_is_asked_for_thresholds_that_do_not_matter() -> None:
    node = Node()
    async with connected(node) as direct:
        await write(direct)
    assert node.questions == []
