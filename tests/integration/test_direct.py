"""Own connections to a real Cassandra, behind a proxy that the driver does not go through.

So every fault here is one of the direct way alone, and the driver is there to take over.
"""

from __future__ import annotations

import asyncio
import struct
import time
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import pytest

import shadowsvc.store.direct as direct_module
from backing import Direction, FaultProxy
from shadowsvc.credentials import Credentials
from shadowsvc.errors import StoreRefused, StoreUnavailable
from shadowsvc.shadow.update import Update
from shadowsvc.store import frames
from shadowsvc.store.cassandra import CassandraStore
from tests.direct import connect_directly, one_node, wait_connections
from tests.keyspaces import cells, settings_of
from tests.unit.reading_frames import response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import backing

pytestmark = pytest.mark.timeout(120)

SHORT_SECONDS = 1.0
"""The time-out of requests where one is to be met."""
T0 = 1_700_000_000_000_000
_KEPT: list[Any] = []


class Setup:
    """A store, the proxy on its direct way, and devices to write."""

    def __init__(self, store: CassandraStore, proxy: FaultProxy) -> None:
        self.store = store
        self.proxy = proxy
        self.written: list[str] = []

    async def write(self, devices: int = 10) -> None:
        """Write one leaf of some new devices in one batch."""
        names = [uuid.uuid4().hex for _ in range(devices)]
        self.written += names
        await self.store.write(
            [Update(name, "", T0, ["/on"], [b"true"], 1, [], 100) for name in names]
        )

    async def by(self, way: str, devices: int = 10) -> None:
        """Write, and see that it went this way."""
        before = dict(self.store.batches)
        await self.write(devices)
        assert {name: self.store.batches[name] - before[name] for name in before} == {
            "direct": int(way == "direct"),
            "driver": int(way == "driver"),
        }

    def rows(self, session: Any) -> list[int]:
        """How many rows each written device has."""
        return [len(cells(session, self.store.settings.keyspace, name)) for name in self.written]


@asynccontextmanager
async def made(database: backing.Database, keyspace: str, **more: object) -> AsyncIterator[Setup]:
    settings = settings_of(database, keyspace, **{"request_timeout_seconds": 20, **more}).cassandra
    store = CassandraStore(settings, dead_letter_ttl_seconds=60)
    async with FaultProxy(settings.contact_points[0], settings.port) as proxy:
        await store.connect()
        try:
            yield Setup(store, proxy)
        finally:
            await store.close()
            # acsylla never closes a cluster's socket pairs; a collected socket is a warning.
            _KEPT.append(store._cluster)


@pytest.fixture
async def setup(cassandra: backing.Database, migrated: str) -> AsyncIterator[Setup]:
    async with made(cassandra, migrated) as setup:
        setup.store.follow(one_node("127.0.0.1", setup.proxy.port))
        await wait_connections(setup.store, 1)
        yield setup


@pytest.fixture
async def hasty(cassandra: backing.Database, migrated: str) -> AsyncIterator[Setup]:
    """With a short time-out of requests."""
    async with made(cassandra, migrated, request_timeout_seconds=SHORT_SECONDS) as setup:
        setup.store.follow(one_node("127.0.0.1", setup.proxy.port))
        await wait_connections(setup.store, 1)
        yield setup


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_many_batches_at_once_are_all_written(setup: Setup, cql: Any) -> None:
    await asyncio.gather(*(setup.write() for _ in range(100)))
    assert setup.store.batches == {"direct": 100, "driver": 0}
    assert set(setup.rows(cql)) == {1}


async def test_answers_that_come_byte_by_byte_are_understood(setup: Setup, cql: Any) -> None:
    setup.proxy.one_byte_at_a_time(Direction.TO_CLIENT)
    await asyncio.gather(*(setup.write() for _ in range(20)))
    assert setup.store.batches == {"direct": 20, "driver": 0}
    assert set(setup.rows(cql)) == {1}


async def test_without_an_answer_it_is_overload_and_the_connection_is_made_anew(
    hasty: Setup,
) -> None:
    connection = hasty.store.direct.wire_for("any")
    hasty.proxy.hold(Direction.TO_CLIENT)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        await hasty.write()
    assert time.monotonic() - started >= SHORT_SECONDS * 0.9
    assert caught.value.kind == "lib_request_timed_out"
    assert caught.value.overload
    await hasty.by("driver")
    hasty.proxy.heal()
    await wait_connections(hasty.store, 1)
    assert hasty.store.direct.wire_for("any") is not connection
    await hasty.by("direct")


async def test_a_lost_connection_ends_what_was_on_it_and_comes_back(setup: Setup, cql: Any) -> None:
    setup.proxy.hold(Direction.TO_CLIENT)
    write = asyncio.create_task(setup.write())
    wire = setup.store.direct.wire_for("any")
    assert wire is not None
    await until(lambda: wire.in_flight == 1)
    setup.proxy.reset()
    with pytest.raises(StoreUnavailable) as caught:
        await write
    assert caught.value.kind == "connection_error"
    setup.proxy.heal()
    await setup.by("driver")
    await wait_connections(setup.store, 1)
    await setup.by("direct")
    assert set(setup.rows(cql)[10:]) == {1}


async def test_a_node_that_is_away_is_tried_again_and_again(setup: Setup) -> None:
    setup.proxy.refuse()
    setup.proxy.reset()
    refused = setup.proxy.counts.refused
    await wait_connections(setup.store, 0)
    await setup.by("driver")
    await until(lambda: setup.proxy.counts.refused >= refused + 3)
    setup.proxy.refuse(on=False)
    await wait_connections(setup.store, 1)
    await setup.by("direct")


async def test_a_half_open_connection_is_found_while_nothing_is_written(
    hasty: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_module, "_HEARTBEAT_SECONDS", 0.2)
    hasty.proxy.reset()
    await wait_connections(hasty.store, 0)
    await wait_connections(hasty.store, 1)
    hasty.proxy.half_open()
    await wait_connections(hasty.store, 0)
    hasty.proxy.half_open(on=False)
    await wait_connections(hasty.store, 1)
    await hasty.by("direct")


async def test_statements_that_the_server_forgot_are_prepared_again(
    cassandra: backing.Database,
    keyspace: str,
    cql: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.keyspaces import make_schema

    monkeypatch.setattr(direct_module, "_HEARTBEAT_SECONDS", 0.2)
    await asyncio.to_thread(make_schema, cassandra, keyspace)
    async with made(cassandra, keyspace) as setup:
        setup.store.follow(one_node("127.0.0.1", setup.proxy.port))
        await wait_connections(setup.store, 1)
        wire = setup.store.direct.wire_for("any")
        await setup.by("direct")
        await asyncio.to_thread(cql.execute, f"ALTER TABLE {keyspace}.shadow ADD extra text")
        await setup.by("driver")
        await wait_connections(setup.store, 1)
        assert setup.store.direct.wire_for("any") is wire
        await setup.by("direct")
        assert set(setup.rows(cql)) == {1}


async def test_what_cassandra_refuses_is_refused(setup: Setup) -> None:
    too_long = Update("d" * 70_000, "", T0, ["/on"], [b"true"], 1, [], 100)
    with pytest.raises(StoreRefused) as caught:
        await setup.store.write([too_long])
    assert caught.value.kind == "server_invalid_query"
    beyond = Update("d", "", 1 << 63, ["/on"], [b"true"], 1, [], 100)
    with pytest.raises(StoreRefused):
        await setup.store.write([beyond])
    await setup.by("direct")


async def test_a_node_that_left_the_ring_gets_nothing_more(setup: Setup) -> None:
    port = setup.store.settings.port
    before = setup.store.direct.wire_for("any")
    assert before is not None
    setup.store.follow(one_node("127.0.0.1", port))
    assert not before.usable
    await wait_connections(setup.store, 1)
    await until(lambda: setup.proxy.connections == 0)
    await setup.by("direct")


async def test_other_credentials_make_other_connections_and_end_the_old_ones(
    setup: Setup, cql: Any
) -> None:
    old = setup.store.direct.wire_for("any")
    assert old is not None
    setup.proxy.delay(0.3, Direction.TO_CLIENT)
    write = asyncio.create_task(setup.write())
    await until(lambda: old.in_flight == 1)
    await setup.store.renew(Credentials("someone", None))
    assert not old.usable
    await write  # what was under way is finished
    await wait_connections(setup.store, 1)
    await until(lambda: setup.proxy.connections == 1)
    await setup.by("direct")
    assert set(setup.rows(cql)) == {1}


async def test_by_setting_everything_goes_by_the_driver(
    cassandra: backing.Database, migrated: str
) -> None:
    async with made(cassandra, migrated, direct=False) as setup:
        setup.store.follow(one_node("127.0.0.1", setup.proxy.port))
        await setup.by("driver")
        assert setup.proxy.connections == 0


class Scripted:
    """A server that says what no Cassandra does on demand; each connection gets the script."""

    def __init__(self, *script: bytes) -> None:
        self.script = script
        self.accepted = 0
        self.port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            for answer in self.script:
                header = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(header[5:]))
                (stream,) = struct.unpack_from(">h", header, 2)
                if answer[2:4] == OWN_STREAM:
                    answer = answer[:2] + struct.pack(">h", stream) + answer[4:]  # noqa: PLW2901
                writer.write(answer)
            await reader.read(1000)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


OWN = 0x7777
OWN_STREAM = struct.pack(">h", OWN)
"""Where an answer is to have the stream of its request."""
READY = response(OWN, frames.READY, b"")


@pytest.mark.parametrize(
    ("script", "pause"),
    [
        ((b"HTTP/1.1 400 Bad Request\r\n",), "short"),
        ((response(OWN, frames.ERROR, struct.pack(">iH3s", 0x000A, 3, b"no!")),), "short"),
        ((READY, READY), "short"),
        ((READY, response(OWN, frames.RESULT, b"\0\0\0\1")), "short"),
        ((READY, response(0, frames.ERROR, struct.pack(">iH3s", 0x1001, 3, b"old"))), "short"),
        ((response(OWN, frames.AUTHENTICATE, b"\0\1x"),), "long"),
        ((response(OWN, frames.ERROR, struct.pack(">iH3s", 0x0100, 3, b"who")),), "long"),
    ],
    ids=[
        "HTTP",
        "protocol error",
        "no result",
        "no statement",
        "stream 0",
        "no login",
        "refused login",
    ],
)
async def test_whatever_a_server_says_the_driver_does_the_work(
    setup: Setup, script: tuple[bytes, ...], pause: str
) -> None:
    async with Scripted(*script) as server:
        setup.store.follow(one_node("127.0.0.1", server.port))
        await until(lambda: server.accepted == 1)
        await setup.by("driver")
        if pause == "short":
            await until(lambda: server.accepted >= 3)
        else:  # nobody hammers a server with logins
            await asyncio.sleep(1)
            assert server.accepted == 1
        await setup.by("driver")
        await connect_directly(setup.store)
        await setup.by("direct")
