"""What the ingest connection promises, over real loopback sockets, against the broker in memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct
import subprocess
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import mqtt5
import pytest
import structlog.testing
from blockbuster import blockbuster_ctx

import shadowsvc.mqtt.connection as connection_module
import shadowsvc.mqtt.transport as transport_module
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Metrics
from shadowsvc.mqtt.connection import Connection, Endpoint
from shadowsvc.mqtt.session import Session, SessionOptions
from shadowsvc.mqtt.transport import Wire
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from tests.faulty_store import AWAY, FaultyStore
from tests.line import nothing_lost
from tests.memory_broker import MemoryBroker, Message, Server, serve
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

FILTERS = ("$share/g/things/+/shadow/update",)
TOPIC = "things/d/shadow/update"
KEEP_ALIVE = 1
SERVER_BUSY = mqtt5.ConnAckReasonCode.SERVER_BUSY


@pytest.fixture(autouse=True)
def _loop_never_blocked() -> Iterator[None]:
    with blockbuster_ctx(scanned_modules="shadowsvc"):
        yield


class Taker:
    """An ingest that acknowledges when it is told to."""

    def __init__(self, receive_maximum: int = 1000) -> None:
        self.receive_maximum = receive_maximum
        self.ledger = Ledger()
        self.send: Callable[[bytes], None] = lambda _: None
        self.acks_at_once = True
        self.taken: list[bytes] = []
        self.sessions: list[bool] = []
        self.reasons: list[str] = []
        self.subscribed = 0
        self.open_chunk = False
        self.breaks_at: bytes | None = None
        self.gate: asyncio.Event | None = None
        self._held: list[Any] = []

    async def begin_connection(self) -> int:
        if self.gate is not None:
            await self.gate.wait()
        self.ledger.begin_epoch()
        return self.receive_maximum

    def connected(self, *, session_present: bool) -> None:
        self.sessions.append(session_present)

    def subscribed_now(self) -> None:
        self.subscribed += 1

    def begin_chunk(self) -> None:
        assert not self.open_chunk
        self.open_chunk = True

    def publish(self, topic: str, packet: mqtt5.PublishPacket) -> None:
        assert self.open_chunk
        assert topic == TOPIC
        if packet.payload == self.breaks_at:
            self.breaks_at = None
            raise LookupError("a defect")
        self.taken.append(packet.payload)
        self._held.append(self.ledger.receive(packet.packet_id or 0, 1, 0))

    def end_chunk(self) -> None:
        self.open_chunk = False
        if self.acks_at_once:
            self.ack()

    def over_receive_maximum(self) -> bool:
        return self.ledger.unacknowledged > self.receive_maximum

    def disconnected(self, reason: str) -> None:
        self.reasons.append(reason)

    def ack(self, count: int | None = None) -> None:
        """Acknowledge what is held, or the first `count` of it."""
        self.ledger.complete(self._held[:count])
        del self._held[:count]
        if acks := self.ledger.take_acks():
            self.send(acks)


def endpoint(port: int, **more: Any) -> Endpoint:
    fast = {"connect_timeout_seconds": 5, "reconnect_min_seconds": 0.02}
    return Endpoint("127.0.0.1", port, **{**fast, "reconnect_max_seconds": 0.05, **more})


def options(**more: Any) -> SessionOptions:
    return SessionOptions("client", FILTERS, **{"keep_alive_seconds": KEEP_ALIVE, **more})


@asynccontextmanager
async def running(connection: Connection) -> AsyncIterator[asyncio.Task[None]]:
    """Run a connection; nothing may reach the loop's handler of last resort."""
    with nothing_lost():
        task = asyncio.create_task(connection.run())
        try:
            yield task
        finally:
            await connection.finish()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class Bench:
    """A broker, a taker and the connection between them."""

    def __init__(self, server: Server, taker: Taker, connection: Connection) -> None:
        self.server = server
        self.broker = server.broker
        self.taker = taker
        self.connection = connection
        self.task: asyncio.Task[None]

    def publish(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.broker.publish(TOPIC, payload)

    async def up(self, count: int = 1) -> None:
        """Wait until the connection was established `count` times."""
        await until(lambda: self.taker.subscribed >= count)


@asynccontextmanager
async def bench(
    *,
    broker: MemoryBroker | None = None,
    taker: Taker | None = None,
    wait: bool = True,
    session: dict[str, Any] | None = None,
    **more: Any,
) -> AsyncIterator[Bench]:
    taker = taker or Taker()
    async with serve(broker) as server:
        connection = Connection(endpoint(server.port, **more), options(**(session or {})), taker)
        taker.send = connection.send
        made = Bench(server, taker, connection)
        async with running(connection) as made.task:
            if wait:
                await made.up()
            yield made


# -------------------------------------------------------------------- messages


async def test_messages_come_in_order_and_acks_go_back() -> None:
    async with bench() as made:
        sent = [b"%d" % number for number in range(3000)]
        made.publish(*sent)
        await until(lambda: len(made.broker.acked) == 3000)
        assert made.taker.taken == sent
        assert [message.payload for message in made.broker.acked] == sent


async def test_the_receive_maximum_is_announced() -> None:
    async with bench(taker=Taker(receive_maximum=3)) as made:
        made.taker.acks_at_once = False
        made.publish(*[b"%d" % number for number in range(10)])
        await until(lambda: len(made.taker.taken) == 3)
        assert made.broker.links[0].receive_maximum == 3
        made.taker.ack(2)
        await until(lambda: len(made.taker.taken) == 5)


async def test_a_stream_may_come_one_byte_at_a_time() -> None:
    async with bench(wait=False) as made:
        made.server.segment_bytes = 1
        await made.up()
        made.publish(b"1", b"two", bytes(200), b"4")
        await until(lambda: len(made.broker.acked) == 4)
        assert made.taker.taken == [b"1", b"two", bytes(200), b"4"]


@pytest.mark.parametrize("segment_bytes", [0, 61, 64])
async def test_packets_of_every_size_around_the_buffers_pass(
    monkeypatch: pytest.MonkeyPatch, segment_bytes: int
) -> None:
    monkeypatch.setattr(transport_module, "_BUFFER_BYTES", 64)
    async with bench(session={"maximum_packet_size_bytes": 2000}) as made:
        made.server.segment_bytes = segment_bytes
        sizes = [*range(0, 300, 7), 1900, 3, *range(300, 0, -11), 1950]
        made.publish(*map(bytes, sizes))
        await until(lambda: len(made.broker.acked) == len(sizes))
        assert [len(payload) for payload in made.taker.taken] == sizes
        protocol = made.connection._protocol
        assert protocol is not None
        assert len(protocol._buffer) == 64


async def test_a_packet_larger_than_the_buffer_makes_it_grow_and_shrink_back() -> None:
    async with bench() as made:
        large = bytes(range(256)) * 4000
        made.publish(b"before", large, b"after", large)
        await until(lambda: len(made.broker.acked) == 4)
        assert made.taker.taken == [b"before", large, b"after", large]
        protocol = made.connection._protocol
        assert protocol is not None
        assert len(protocol._buffer) == transport_module._BUFFER_BYTES


async def test_publishes_in_the_segment_of_connack_are_taken() -> None:
    broker = MemoryBroker()
    async with bench(broker=broker) as made:
        made.taker.acks_at_once = False
        made.publish(b"1", b"2")
        await until(lambda: len(made.taker.taken) == 2)
        broker.links[-1].drop()
        await made.up(2)
        made.taker.ack()
        await until(lambda: len(broker.acked) == 2)
        assert made.taker.taken == [b"1", b"2", b"1", b"2"]
        assert made.taker.sessions == [False, True]
        assert broker.links[-1].strangers == []


# -------------------------------------------------------------------- reconnecting


async def test_every_connect_asks_by_which_client_id() -> None:
    async with serve() as server:
        connection = Connection(endpoint(server.port), options(), Taker())
        ids = iter(["g-0", "g-0", "g-1"])
        asked: list[str] = []

        async def identify() -> str:
            await asyncio.sleep(0)
            asked.append(next(ids))
            return asked[-1]

        connection.identify = identify
        async with running(connection):
            for number in range(3):
                await until(lambda count=number + 1: len(server.broker.links) == count)
                link = server.broker.links[-1]
                await until(lambda link=link: link.session is not None)
                link.drop()
        assert asked[:3] == ["g-0", "g-0", "g-1"]
        assert {"g-0", "g-1"} == set(server.broker.sessions)


async def test_nothing_connects_while_the_client_id_is_waited_for_and_finish_ends_it() -> None:
    async with serve() as server:
        taker = Taker()
        connection = Connection(endpoint(server.port), options(), taker)
        asked = asyncio.Event()
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def identify() -> str:
            asked.set()
            return await answer

        connection.identify = identify
        async with running(connection) as task:
            await asked.wait()
            await asyncio.sleep(0.05)
            assert not server.broker.links
            finishing = asyncio.create_task(connection.finish())
            await asyncio.wait_for(finishing, 5)
            answer.set_result("g-0")
            await asyncio.wait_for(task, 5)
        assert not server.broker.links
        assert taker.reasons == ["stopping"]


async def test_a_session_that_another_takes_over_is_connected_to_again_by_the_id_that_is_told() -> (
    None
):
    """DISCONNECT 142 is answered by asking who we are, not by the old client id."""
    async with serve() as server:
        taker = Taker()
        connection = Connection(endpoint(server.port), options(), taker)
        mine = "g-0"

        async def identify() -> str:
            return mine

        connection.identify = identify
        other = Connection(endpoint(server.port), options(), Taker())

        async def identify_other() -> str:
            return "g-0"

        other.identify = identify_other
        async with running(connection):
            await until(lambda: taker.subscribed == 1)
            mine = "g-1"
            async with running(other):
                await until(lambda: taker.subscribed == 2)
                assert taker.reasons == ["session_taken_over"]
                assert set(server.broker.sessions) == {"g-0", "g-1"}
                assert server.broker.sessions["g-0"].link is not None


async def test_waits_double_up_to_the_limit_and_are_fully_jittered() -> None:
    bounds: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.001

    server = Server(MemoryBroker())
    await server.start()
    await server.stop()
    taker = Taker()
    target = endpoint(server.port, reconnect_min_seconds=0.2, reconnect_max_seconds=3)
    connection = Connection(target, options(), taker, jitter=jitter)
    with structlog.testing.capture_logs() as logs:
        async with running(connection):
            await until(lambda: len(bounds) >= 7)
            await server.start()
            await until(lambda: taker.subscribed)
        await server.stop()
    assert [round(high, 6) for _, high in bounds[:7]] == [0.2, 0.4, 0.8, 1.6, 3, 3, 3]
    assert {low for low, _ in bounds} == {0.1}
    assert set(taker.reasons[:-1]) == {"connect"}
    assert logs[0]["event"] == "broker not reachable"
    assert "SHADOWSVC_MQTT__URL" in logs[0]["error"]


@pytest.mark.parametrize(("stable_seconds", "again"), [(0.0, 0.02), (60.0, 0.04)])
async def test_only_a_connection_that_lasted_makes_waits_short_again(
    monkeypatch: pytest.MonkeyPatch, stable_seconds: float, again: float
) -> None:
    monkeypatch.setattr(connection_module, "_STABLE_SECONDS", stable_seconds)
    bounds: list[float] = []

    def jitter(_: float, high: float) -> float:
        bounds.append(high)
        return 0

    async with bench(reconnect_max_seconds=10) as made:
        made.connection._jitter = jitter
        for count in (2, 3):
            await asyncio.sleep(0.01)
            made.broker.links[-1].drop()
            await made.up(count)
    assert bounds[:2] == [0.02, again]


async def test_a_refusal_is_retried_and_named() -> None:
    broker = MemoryBroker()
    broker.refusal = SERVER_BUSY
    async with bench(broker=broker, wait=False) as made:
        await until(lambda: len(made.taker.reasons) >= 2)
        broker.refusal = None
        await made.up()
        assert set(made.taker.reasons) == {"connack_server_busy"}


async def test_a_broker_that_restarts_is_joined_again() -> None:
    async with bench() as made:
        made.publish(b"1")
        await until(lambda: made.broker.acked)
        await made.server.stop()
        await until(lambda: "connect" in made.taker.reasons)
        await made.server.start()
        await made.up(2)
        made.publish(b"2")
        await until(lambda: len(made.broker.acked) == 2)


async def test_being_taken_over_is_named_and_the_session_is_resumed() -> None:
    async with bench() as made:
        async with serve(made.broker) as second:
            taker = Taker()
            other = Connection(endpoint(second.port), options(), taker)
            task = asyncio.create_task(other.run())
            await until(lambda: taker.subscribed)
            assert taker.sessions == [True]
            await until(lambda: made.taker.reasons)
            assert made.taker.reasons[0] == "session_taken_over"
            await other.finish()
            task.cancel()
        await made.up(2)
        assert made.taker.sessions[-1] is True


async def test_leaving_to_connect_anew_keeps_the_session() -> None:
    async with bench() as made:
        made.connection.reconnect("receive_maximum")
        await made.up(2)
        assert made.broker.links[0].farewell == 0
        assert made.taker.sessions == [False, True]
        assert made.taker.reasons == ["receive_maximum"]


async def test_acks_between_two_connections_go_nowhere() -> None:
    async with bench(reconnect_min_seconds=0.4, reconnect_max_seconds=0.4) as made:
        made.taker.acks_at_once = False
        made.publish(*[b"%d" % number for number in range(20)])
        await until(lambda: len(made.taker.taken) == 20)
        made.broker.links[0].drop()
        await until(lambda: made.taker.reasons)
        for _ in range(10):
            made.taker.ack(1)
            await asyncio.sleep(0)
        await made.up(2)
        assert made.broker.acked == []
        made.taker.ack()
        await until(lambda: len(made.broker.acked) == 20)
        assert made.broker.links[-1].strangers == []


async def test_a_defect_of_the_taker_costs_one_connection_and_no_message() -> None:
    with structlog.testing.capture_logs() as logs:
        async with bench() as made:
            made.taker.breaks_at = b"bad"
            made.publish(b"1", b"bad", b"3")
            await until(lambda: len(made.broker.acked) == 3)
        assert logs[0]["event"] == "taking messages failed"
    assert made.taker.reasons[0] == "internal_error"
    assert made.broker.links[0].farewell == 131
    assert {message.payload for message in made.broker.acked} == {b"1", b"bad", b"3"}


# -------------------------------------------------------------------- what the broker may not send


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param("00 00", 0x81, id="malformed"),
        pytest.param("36 06 0001 61 0005 00", 0x81, id="QoS 3"),
        pytest.param("20 03 00 00 00", 0x82, id="second CONNACK"),
        pytest.param("32 06 0001 61 0000 00", 0x82, id="packet id 0"),
        pytest.param("30 07 0001 61 03 23ffff", 0x94, id="alias"),
        pytest.param("30 ff ff ff 7f", 0x95, id="too large"),
        pytest.param("34 06 0001 61 0005 00", 0x9B, id="QoS 2"),
    ],
)
async def test_a_violation_is_answered_with_its_code_and_a_new_connection(
    data: str, code: int
) -> None:
    async with bench() as made:
        first = made.broker.links[-1]
        made.publish(b"before")
        first.write(bytes.fromhex(data) + b"\xd0\x00")
        await until(lambda: first.farewell is not None)
        assert first.farewell == code
        await made.up(2)
        made.publish(b"after")
        await until(lambda: b"after" in made.taker.taken)
        assert made.taker.reasons == ["protocol_error"]
        assert b"before" in made.taker.taken


async def test_nothing_follows_a_disconnect_even_when_connack_came_with_garbage() -> None:
    broker = MemoryBroker()
    broker.silent_on = {mqtt5.ConnectPacket}
    async with bench(broker=broker, wait=False) as made:
        await until(lambda: broker.links and broker.links[0].packets)
        broker.silent_on = set()
        broker.links[0].write(mqtt5.ConnAckPacket().write() + b"\x00\x00")
        await until(lambda: broker.links[0].farewell is not None)
        assert broker.links[0].farewell == 0x81
        await made.up()  # the server fails the test if SUBSCRIBE followed DISCONNECT


# -------------------------------------------------------------------- silence


@pytest.mark.parametrize("packet", [mqtt5.ConnectPacket, mqtt5.SubscribePacket])
async def test_an_answer_that_never_comes_is_not_waited_for(packet: type) -> None:
    broker = MemoryBroker()
    broker.silent_on = {packet}
    async with bench(broker=broker, wait=False, connect_timeout_seconds=0.15) as made:
        await until(lambda: made.taker.reasons)
        broker.silent_on = set()
        await made.up()
        assert set(made.taker.reasons) == {"no_answer"}


async def test_the_connect_time_limit_holds_for_tls_too() -> None:
    taker = Taker()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = endpoint(
            silent.getsockname()[1],
            connect_timeout_seconds=0.15,
            tls=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        )
        async with running(Connection(target, options(), taker)):
            await until(lambda: taker.reasons)
    assert taker.reasons[0] == "connect_timeout"


async def test_a_half_open_connection_is_found() -> None:
    async with bench() as made:
        made.broker.deaf = True
        await until(lambda: made.taker.reasons)
        assert made.taker.reasons[0] == "keep_alive"
        made.broker.deaf = False
        await made.up(2)


async def test_keep_alive_never_misses_while_nothing_is_acknowledged() -> None:
    async with bench(taker=Taker(receive_maximum=5)) as made:
        made.taker.acks_at_once = False
        made.publish(*[b"%d" % number for number in range(20)])
        link = made.broker.links[0]
        await until(lambda: link.count(mqtt5.PingReqPacket) >= 4)
        assert made.taker.reasons == []
        assert len(made.taker.taken) == 5


async def test_the_first_ping_keeps_to_the_keep_alive_that_the_broker_asks_for() -> None:
    broker = MemoryBroker()
    broker.connack_properties["server_keep_alive"] = 1
    async with bench(broker=broker, session={"keep_alive_seconds": 600}):
        await until(lambda: broker.links[0].count(mqtt5.PingReqPacket), seconds=1)


async def test_a_broker_without_keep_alive_is_pinged_all_the_same_and_not_in_a_frenzy() -> None:
    broker = MemoryBroker()
    broker.connack_properties["server_keep_alive"] = 0
    async with bench(broker=broker) as made:
        protocol = made.connection._protocol
        assert protocol is not None
        ticks = 0
        tick = protocol._tick

        def counted() -> None:
            nonlocal ticks
            ticks += 1
            tick()

        protocol._tick = counted  # type: ignore[method-assign]
        await until(lambda: broker.links[0].count(mqtt5.PingReqPacket) >= 2)
        assert ticks <= 50


async def test_a_process_that_was_stopped_does_not_blame_the_broker() -> None:
    async with bench() as made:
        time.sleep(2 * KEEP_ALIVE)  # noqa: ASYNC251 - as SIGSTOP would
        made.publish(b"1")
        await until(lambda: made.broker.acked)
        await asyncio.sleep(0.3)
        assert made.taker.reasons == []


async def test_a_broker_that_sends_beyond_the_receive_maximum_waits_and_is_not_left() -> None:
    async with bench(taker=Taker(receive_maximum=10)) as made:
        made.taker.acks_at_once = False
        link = made.broker.links[0]
        link.receive_maximum = 1000
        chunk = [bytes(20_000)] * 1000
        made.publish(*chunk)
        await until(lambda: link.count(mqtt5.PingReqPacket) >= 3)
        assert made.taker.reasons == []
        assert len(made.taker.taken) < 1000
        made.taker.acks_at_once = True
        made.taker.ack()
        await until(lambda: len(made.broker.acked) == 1000)


# -------------------------------------------------------------------- leaving


async def test_the_last_acks_arrive_and_the_session_stays() -> None:
    async with bench() as made:
        made.taker.acks_at_once = False
        sent = [b"%d" % number for number in range(1000)]
        made.publish(*sent)
        await until(lambda: len(made.taker.taken) == 1000)
        made.taker.ack()
        await made.connection.finish()
        await until(made.task.done)
        assert [message.payload for message in made.broker.acked] == sent
        assert made.broker.links[0].farewell == 0
        assert made.broker.sessions["client"].filters == set(FILTERS)


@pytest.mark.parametrize("paused", [False, True])
async def test_the_last_acks_arrive_although_the_broker_goes_on_sending(paused: bool) -> None:  # noqa: FBT001
    async with bench(taker=Taker(receive_maximum=10)) as made:
        made.taker.acks_at_once = False
        link = made.broker.links[0]
        link.receive_maximum = 500 if paused else 10
        made.publish(*[bytes(4000)] * 500)
        await until(lambda: len(made.taker.taken) >= 10)
        for _ in range(10):
            made.taker.ack(1)
        protocol = made.connection._protocol
        assert protocol is not None
        await until(lambda: protocol.paused == paused)
        made.publish(*[bytes(4000)] * 200)
        await made.connection.finish()
        await until(lambda: link.is_closed)
        assert link.farewell == 0
        assert len(made.broker.acked) >= 10
        assert link.count(mqtt5.PubAckPacket) == made.taker.ledger.acknowledged
        await until(lambda: not made.server._transports)
        assert made.server.resets == []


async def test_nothing_is_sent_after_the_farewell_and_nothing_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport_module, "_FAREWELL_SECONDS", 0.2)
    async with bench() as made:
        made.taker.acks_at_once = False
        made.publish(b"1")
        await until(lambda: made.taker.taken)
        made.broker.silent_on = {mqtt5.DisconnectPacket}
        leaving = asyncio.create_task(made.connection.finish())
        await until(lambda: made.broker.links[0].farewell is not None)
        made.taker.ack()
        made.connection.send(b"\xc0\x00")
        made.publish(b"2")
        await leaving
        assert made.taker.taken == [b"1"]
        assert made.broker.acked == []


async def test_leaving_a_broker_that_is_gone_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "_FAREWELL_SECONDS", 0.1)
    async with bench() as made:
        made.broker.deaf = True
        async with asyncio.timeout(1):
            await made.connection.finish()
            await made.task


async def test_the_kernel_holds_no_more_than_a_bounded_part_of_what_waits() -> None:
    async with bench() as made:
        protocol = made.connection._protocol
        assert protocol is not None
        assert protocol.transport is not None
        kept = protocol.transport.get_extra_info("socket")
        # A size that was set stays, one that was not grows. Linux gives twice what is asked for.
        size = kept.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        assert size == 2 * transport_module._RECEIVE_BUFFER_BYTES


async def test_leaving_a_broker_that_reset_the_connection_a_moment_ago_is_no_error() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        wire = Wire(Session(SessionOptions("c", FILTERS), lambda *_: None), Taker(), loop)
        await loop.create_connection(lambda: wire, *server.getsockname())
        accepted, _ = await loop.sock_accept(server)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()  # the loop has not seen it yet
        await wire.close_gently()
        assert wire.transport is None


async def test_leaving_while_waiting_to_connect_again_ends_at_once() -> None:
    async with bench(reconnect_min_seconds=60, reconnect_max_seconds=60) as made:
        await made.server.stop()
        await until(lambda: made.taker.reasons)
        async with asyncio.timeout(1):
            await made.connection.finish()
            await made.task


async def test_leaving_before_the_connection_is_begun_connects_no_more() -> None:
    taker = Taker()
    taker.gate = asyncio.Event()
    async with bench(taker=taker, wait=False) as made:
        await asyncio.sleep(0.02)
        await made.connection.finish()
        taker.gate.set()
        await until(made.task.done)
        assert made.broker.links == []


async def test_leaving_twice_is_leaving_once() -> None:
    async with bench() as made:
        await asyncio.gather(made.connection.finish(), made.connection.finish())
        await made.connection.finish()
        assert made.broker.links[0].count(mqtt5.DisconnectPacket) == 1


async def test_a_cancelled_connection_is_closed_and_the_session_stays() -> None:
    async with bench() as made:
        made.task.cancel()
        await until(lambda: made.broker.links[0].is_closed)
        assert made.broker.sessions["client"].filters == set(FILTERS)
        made.connection.send(b"\xc0\x00")
        assert made.task.cancelled()


# -------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "both.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-days", "1", "-nodes", "-subj", "/CN=broker"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
        timeout=20,
    )
    made.write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return made


def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_the_last_acks_arrive_over_tls_too(certificate: Path) -> None:
    taker = Taker()
    async with serve(tls=server_tls(certificate)) as server:
        target = endpoint(
            server.port, tls=lambda: ssl.create_default_context(cafile=str(certificate))
        )
        connection = Connection(target, options(), taker)
        taker.send = connection.send
        async with running(connection) as task:
            await until(lambda: taker.subscribed)
            taker.acks_at_once = False
            for number in range(1000):
                server.broker.publish(TOPIC, b"%d" % number + bytes(500))
            await until(lambda: len(taker.taken) == 1000)
            taker.ack()
            for _ in range(500):
                server.broker.publish(TOPIC, bytes(5000))
            await connection.finish()
            await until(task.done)
            assert len(server.broker.acked) == 1000
            assert server.broker.links[0].farewell == 0


async def test_a_certificate_that_nobody_trusts_names_the_setting(certificate: Path) -> None:
    taker = Taker()
    async with serve(tls=server_tls(certificate)) as server:
        target = endpoint(server.port, tls=ssl.create_default_context)
        with structlog.testing.capture_logs() as logs:
            async with running(Connection(target, options(), taker)):
                await until(lambda: taker.reasons)
    assert taker.reasons[0] == "tls"
    assert "SHADOWSVC_MQTT__CA_FILE" in logs[0]["error"]


async def test_a_host_that_is_no_name_is_retried_like_one_that_is_away() -> None:
    taker = Taker()
    target = Endpoint(f"{'x' * 64}.invalid", 1, reconnect_min_seconds=0.01)
    async with running(Connection(target, options(), taker)):
        await until(lambda: len(taker.reasons) >= 2, seconds=20)
        assert set(taker.reasons) == {"connect"}


# -------------------------------------------------------------------- with the real pipeline


async def test_leaving_from_within_connack_sends_nothing_after_the_farewell() -> None:
    taker = Taker()
    async with bench(taker=taker, wait=False) as made:
        connected = taker.connected

        def leave_once(*, session_present: bool) -> None:
            connected(session_present=session_present)
            if len(taker.sessions) == 1:
                made.connection.reconnect("receive_maximum")

        taker.connected = leave_once  # type: ignore[method-assign]
        await made.up()
        assert taker.sessions == [False, True]
        assert made.broker.links[0].count(mqtt5.SubscribePacket) == 0


@pytest.mark.parametrize("restarts", [False, True])
async def test_through_losses_and_faults_all_that_the_broker_forgot_is_durable(
    restarts: bool,  # noqa: FBT001
) -> None:
    store = FaultyStore()
    ledger = Ledger()
    chance = random.Random(3)
    async with serve() as server:
        broker = server.broker
        pipeline = Pipeline(
            Options("client", 20, concurrency=3, retry_min_seconds=0.001, retry_max_seconds=0.01),
            Decoder(TopicParser("things"), Limits()),
            Batcher(lambda _: 0, max_partitions=3),
            store,
            ledger,
            Metrics(),
            lambda data: connection.send(data),  # noqa: PLW0108 - made below
        )
        connection = Connection(endpoint(server.port), options(), pipeline)
        pipeline.leave = connection.reconnect
        published: list[str] = []
        async with running(connection):
            await until(lambda: pipeline.subscribed)
            for step in range(60):
                store.error = AWAY if step % 7 > 4 else None
                if step % 10 == 9:
                    broker.restart() if restarts else broker.links[-1].drop()
                if "client" in broker.sessions and broker.sessions["client"].filters:
                    for _ in range(chance.randrange(12)):
                        published.append(f"d{len(published)}")
                        broker.publish(
                            f"things/{published[-1]}/shadow/update",
                            b'{"state": {"reported": {"x": 1}}}',
                        )
                await asyncio.sleep(0.004)
                assert ledger.held <= 20 + 3 * 3
                forgotten = {message.topic.split("/")[1] for message in broker.acked}
                assert forgotten <= {write[0] for write in store.durable}
            store.error = None
            left = broker.sessions["client"]
            await until(lambda: not (left.queue or left.in_flight or ledger.held))
            assert await pipeline.drain(1)
        await pipeline.close()
    durable = {write[0] for write in store.durable}
    if restarts:  # the broker itself loses what was in flight, at most Receive Maximum each time
        assert len(published) - len(durable) <= 6 * 20
    else:
        assert durable == set(published)
        assert len(broker.acked) == len(published)
    assert not any(link.strangers for link in broker.links)
    assert len(broker.links) >= 5


# -------------------------------------------------------------------- leaving for a while


async def test_who_leaves_for_a_while_stays_away_keeps_the_session_and_comes_back() -> None:
    async with bench() as made:
        made.taker.acks_at_once = False
        made.publish(*[b"%d" % number for number in range(100)])
        await until(lambda: len(made.taker.taken) == 100)
        made.taker.ack()
        await made.connection.leave("paused")
        await until(lambda: made.broker.links[0].is_closed)
        assert len(made.broker.acked) == 100
        assert made.broker.links[0].farewell == 0
        assert made.broker.sessions["client"].filters == set(FILTERS)
        made.publish(b"while away")
        await asyncio.sleep(0.2)  # longer than the longest wait before a reconnect
        assert len(made.broker.links) == 1
        assert made.taker.reasons == ["paused"]
        made.connection.come_back("paused")
        await made.up(2)
        await until(lambda: made.taker.taken[-1] == b"while away")
        assert made.taker.sessions == [False, True]
        assert made.server.resets == []


async def test_with_several_reasons_to_be_away_the_last_one_counts() -> None:
    async with bench() as made:
        await made.connection.leave("paused")
        await made.connection.leave("isolated")
        made.connection.come_back("paused")
        made.connection.come_back("never given")
        await asyncio.sleep(0.2)
        assert len(made.broker.links) == 1
        made.connection.come_back("isolated")
        await made.up(2)


async def test_leaving_for_a_while_is_no_failure() -> None:
    waits: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        waits.append((low, high))
        return low

    async with serve() as server:
        taker = Taker()
        slow = endpoint(server.port, reconnect_max_seconds=8)
        connection = Connection(slow, options(), taker, jitter=jitter)
        with structlog.testing.capture_logs() as events:
            async with running(connection):
                for count in range(1, 4):
                    await until(lambda count=count: taker.subscribed == count)  # type: ignore[misc]
                    await connection.leave("paused")
                    connection.come_back("paused")
        assert {high for _, high in waits} == {0.02}
        assert not [event for event in events if event["log_level"] != "info"]


async def test_what_is_being_connected_is_given_up_by_who_leaves() -> None:
    taker = Taker()
    taker.gate = asyncio.Event()
    async with bench(taker=taker, wait=False) as made:
        await asyncio.sleep(0.02)
        await made.connection.leave("paused")
        taker.gate.set()
        await until(lambda: taker.reasons == ["paused"])
        await asyncio.sleep(0.1)
        assert made.broker.links == []
        made.connection.come_back("paused")
        await made.up()


async def test_who_is_away_may_leave_for_good() -> None:
    async with bench() as made:
        await made.connection.leave("paused")
        await until(lambda: made.taker.reasons)
        async with asyncio.timeout(1):
            await made.connection.finish()
            await made.task
        assert len(made.broker.links) == 1


# -------------------------------------------------------------------- subscribing again


def subscribes(made: Bench) -> int:
    return made.broker.links[-1].count(mqtt5.SubscribePacket)


async def test_a_subscription_that_was_granted_and_not_made_is_made_later() -> None:
    broker = MemoryBroker()
    broker.subscribes_nothing = True
    async with bench(broker=broker, resubscribe_seconds=0.05) as made:
        granted: list[None] = []
        made.connection._protocol.subscribed_again = lambda: granted.append(None)  # type: ignore[union-attr]
        made.publish(b"lost")
        await until(lambda: len(granted) >= 2)
        assert made.broker.unrouted == 1
        broker.subscribes_nothing = False
        before = len(granted)
        await until(lambda: len(granted) > before + 1)
        made.publish(b"1")
        await until(lambda: made.taker.taken == [b"1"])
        assert made.taker.subscribed == 1
        assert len(broker.links) == 1


async def test_without_an_interval_it_subscribes_when_asked_to() -> None:
    async with bench() as made:
        await asyncio.sleep(0.1)
        assert subscribes(made) == 1
        assert made.connection.subscribe_again()
        assert not made.connection.subscribe_again()  # the answer is awaited
        await until(lambda: subscribes(made) == 2)
        await until(made.connection.subscribe_again)


async def test_without_a_connection_it_does_not_subscribe_again() -> None:
    async with bench() as made:
        await made.connection.leave("paused")
        assert not made.connection.subscribe_again()


async def test_a_later_refusal_ends_the_connection_with_its_reason() -> None:
    async with bench() as made:
        made.broker.suback = mqtt5.SubAckReasonCode.NOT_AUTHORIZED
        assert made.connection.subscribe_again()
        await until(lambda: made.taker.reasons)
        assert made.taker.reasons[0] == "suback_not_authorized"
        made.broker.suback = None
        await made.up(2)


async def test_a_subscribe_that_is_not_answered_ends_the_connection() -> None:
    async with bench(connect_timeout_seconds=0.3) as made:
        made.broker.silent_on = {mqtt5.SubscribePacket}
        assert made.connection.subscribe_again()
        await until(lambda: made.taker.reasons)
        assert made.taker.reasons == ["no_answer"]
        assert made.connection.last_error is not None
        assert "SUBACK" in made.connection.last_error
        made.broker.silent_on = set()
        await made.up(2)


@pytest.mark.parametrize("which", ["first", "later"])
async def test_an_answer_that_comes_behind_many_messages_is_waited_for(which: str) -> None:
    class Backlog(MemoryBroker):
        """Answers a SUBSCRIBE when it likes."""

        answers: bool = which == "later"

        def take_subscribe(self, *arguments: Any) -> None:
            self.answer = lambda: super(Backlog, self).take_subscribe(*arguments)
            if self.answers:
                self.answer()

    broker = Backlog()
    wait = which == "later"
    # mosquitto sends beyond the Receive Maximum, so that is no limit here.
    async with bench(broker=broker, connect_timeout_seconds=0.2, wait=wait) as made:
        if wait:
            broker.answers = False
            assert made.connection.subscribe_again()
        await until(lambda: bool(made.broker.links) and hasattr(broker, "answer"))
        made.taker.acks_at_once = False
        message = Message(TOPIC, bytes(4096))
        packet_id = 0
        end = asyncio.get_running_loop().time() + 1.0  # five times the limit
        while asyncio.get_running_loop().time() < end:
            packet_id += 1
            made.broker.links[0].send_message(message, packet_id)
            await asyncio.sleep(0.005)
        assert made.taker.reasons == []
        broker.answers = True
        broker.answer()
        await made.up()
        assert len(broker.links) == 1


async def test_an_answer_that_never_comes_ends_the_connection_when_the_messages_end() -> None:
    async with bench(connect_timeout_seconds=0.2) as made:
        made.broker.silent_on = {mqtt5.SubscribePacket}
        assert made.connection.subscribe_again()
        made.publish(*[bytes(4096)] * 200)
        await until(lambda: made.taker.reasons)
        assert made.taker.reasons == ["no_answer"]
        assert len(made.taker.taken) == 200


async def test_the_time_limit_of_an_answered_subscribe_does_not_end_a_later_one() -> None:
    class SlowToAnswer(MemoryBroker):
        def take_subscribe(self, *arguments: Any) -> None:
            asyncio.get_running_loop().call_later(0.03, super().take_subscribe, *arguments)

    # While one is awaited most of the time, the limits of those before it pass.
    often = {"resubscribe_seconds": 0.01, "connect_timeout_seconds": 0.2}
    async with bench(broker=SlowToAnswer(), **often) as made:
        await until(lambda: subscribes(made) >= 20)
        assert made.taker.reasons == []
        assert len(made.broker.links) == 1


async def test_an_answer_behind_what_is_not_read_yet_is_waited_for() -> None:
    taker = Taker(receive_maximum=5)
    async with bench(taker=taker, connect_timeout_seconds=0.2) as made:
        taker.acks_at_once = False
        made.broker.links[0].receive_maximum = 500
        made.publish(*[bytes(4000)] * 300)
        protocol = made.connection._protocol
        assert protocol is not None
        await until(lambda: protocol.paused)
        assert made.connection.subscribe_again()
        await asyncio.sleep(0.5)
        assert taker.reasons == []
        taker.acks_at_once = True
        taker.ack()
        await until(lambda: not protocol.session.awaits_suback)
        assert taker.reasons == []


async def test_intervals_are_jittered() -> None:
    spreads: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        spreads.append((low, high))
        return low

    async with serve() as server:
        taker = Taker()
        often = endpoint(server.port, resubscribe_seconds=0.05)
        connection = Connection(often, options(), taker, jitter=jitter)
        async with running(connection):
            await until(lambda: len(spreads) >= 3)
        assert set(spreads[:3]) == {(0.8, 1.2)}
