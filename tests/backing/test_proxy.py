"""The fault proxy does to a connection what its command says, and counts it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import pytest

from backing import Direction, FaultProxy
from tests.waiting import until

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PAYLOAD = bytes(range(256)) * 40


class EchoServer:
    """Sends back what it gets, and knows how its connections ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.received = b""
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.received += data
                writer.write(data)
                await writer.drain()
            self.ends.append("closed")
        except ConnectionResetError:
            self.ends.append("reset")
        finally:
            writer.close()


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[EchoServer, FaultProxy]]:
    echo = EchoServer()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    echo.port = server.sockets[0].getsockname()[1]
    try:
        async with FaultProxy("127.0.0.1", echo.port) as proxy:
            yield echo, proxy
    finally:
        server.close()
        await server.wait_closed()


async def connect(proxy: FaultProxy) -> Stream:
    return await asyncio.open_connection(proxy.host, proxy.port)


class Followed:
    """A watch that counts."""

    def __init__(self) -> None:
        self.came_bytes = dict.fromkeys(Direction, 0)
        self.went_bytes = dict.fromkeys(Direction, 0)
        self.over = False

    def came(self, direction: Direction, data: bytes) -> None:
        self.came_bytes[direction] += len(data)

    def went(self, direction: Direction, count: int) -> None:
        self.went_bytes[direction] += count

    def ended(self) -> None:
        self.over = True


async def echoed(stream: Stream, data: bytes) -> bytes:
    stream[1].write(data)
    return await asyncio.wait_for(stream[0].readexactly(len(data)), 10)


async def silent(read: Awaitable[bytes]) -> bool:
    try:
        await asyncio.wait_for(read, 0.2)
    except TimeoutError:
        return True
    return False


async def test_bytes_pass_unchanged_and_a_tap_sees_both_directions() -> None:
    async with proxied() as (echo, proxy):
        seen = dict.fromkeys(Direction, b"")

        def tap(direction: Direction, data: bytes) -> None:
            seen[direction] += data

        proxy.tap = tap
        stream = await connect(proxy)
        assert await echoed(stream, PAYLOAD) == PAYLOAD
        stream[1].close()
        await until(lambda: proxy.connections == 0)
        assert echo.ends == ["closed"]
        assert seen == {Direction.TO_SERVER: PAYLOAD, Direction.TO_CLIENT: PAYLOAD}
        counts = proxy.counts
        assert counts.accepted == 1
        assert counts.bytes_to_server == counts.bytes_to_client == len(PAYLOAD)


async def test_reset_ends_both_ends_with_rst() -> None:
    async with proxied() as (echo, proxy):
        stream = await connect(proxy)
        await echoed(stream, b"x")
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            await stream[0].read()
        stream[1].close()
        await until(lambda: proxy.connections == 0 and bool(echo.ends))
        assert echo.ends == ["reset"]
        assert proxy.counts.reset == 1


async def test_half_open_swallows_both_directions_and_tells_nobody() -> None:
    async with proxied() as (echo, proxy):
        stream = await connect(proxy)
        await echoed(stream, b"before")
        proxy.half_open()
        stream[1].write(b"lost")
        assert await silent(stream[0].read(1))
        assert proxy.counts.swallowed_bytes == 4
        stream[1].close()
        await asyncio.sleep(0.1)
        assert echo.ends == []
        assert echo.received == b"before"

        proxy.heal()
        later = await connect(proxy)
        assert await echoed(later, b"again") == b"again"
        later[1].close()
        assert proxy.counts.silenced == 1


async def test_a_new_connection_during_half_open_stays_silent_after_heal() -> None:
    async with proxied() as (_, proxy):
        proxy.half_open()
        stream = await connect(proxy)
        await until(lambda: proxy.counts.silenced == 1)
        proxy.heal()
        stream[1].write(b"lost")
        assert await silent(stream[0].read(1))
        stream[1].close()


async def test_hold_loses_nothing_once_it_is_over() -> None:
    async with proxied() as (echo, proxy):
        stream = await connect(proxy)
        proxy.hold(Direction.TO_SERVER)
        stream[1].write(PAYLOAD)
        assert await silent(stream[0].read(1))
        assert echo.received == b""
        proxy.heal()
        assert await asyncio.wait_for(stream[0].readexactly(len(PAYLOAD)), 10) == PAYLOAD
        stream[1].close()


async def test_delay_holds_bytes_back_until_it_is_taken_away() -> None:
    async with proxied() as (echo, proxy):
        stream = await connect(proxy)
        proxy.delay(3600, Direction.TO_CLIENT)
        stream[1].write(b"x")
        await until(lambda: echo.received == b"x")
        assert await silent(stream[0].read(1))
        proxy.delay(0)
        assert await asyncio.wait_for(stream[0].readexactly(1), 10) == b"x"
        stream[1].close()


async def test_bandwidth_limit_lets_a_little_pass_at_a_time() -> None:
    async with proxied() as (_, proxy):
        stream = await connect(proxy)
        proxy.limit_bandwidth(500, Direction.TO_SERVER)
        stream[1].write(PAYLOAD)
        await asyncio.wait_for(stream[0].readexactly(20), 10)
        assert proxy.counts.bytes_to_server < len(PAYLOAD)
        proxy.limit_bandwidth(None)
        rest = len(PAYLOAD) - 20
        assert await asyncio.wait_for(stream[0].readexactly(rest), 10) == PAYLOAD[20:]
        stream[1].close()


async def test_one_byte_at_a_time_hands_on_single_bytes() -> None:
    async with proxied() as (_, proxy):
        sizes: list[int] = []
        proxy.tap = lambda _, data: sizes.append(len(data))
        proxy.one_byte_at_a_time()
        stream = await connect(proxy)
        assert await echoed(stream, PAYLOAD[:300]) == PAYLOAD[:300]
        assert sizes == [1] * 600
        stream[1].close()


@pytest.mark.parametrize("max_bytes", [0, 1, 700])
async def test_cut_after_n_bytes_hands_on_n_bytes_and_resets(max_bytes: int) -> None:
    async with proxied() as (echo, proxy):
        stream = await connect(proxy)
        proxy.cut_after(max_bytes, Direction.TO_SERVER)
        stream[1].write(PAYLOAD)
        with pytest.raises(ConnectionResetError):
            await stream[0].read()
        stream[1].close()
        await until(lambda: bool(echo.ends))
        assert echo.received == PAYLOAD[:max_bytes]
        assert echo.ends == ["reset"]
        assert (proxy.counts.cut, proxy.counts.reset) == (1, 1)

        later = await connect(proxy)
        assert await echoed(later, PAYLOAD) == PAYLOAD
        later[1].close()


async def test_refuse_resets_new_connections_and_leaves_open_ones() -> None:
    async with proxied() as (_, proxy):
        stream = await connect(proxy)
        await echoed(stream, b"x")
        proxy.refuse()
        refused = await connect(proxy)
        with pytest.raises(ConnectionResetError):
            await refused[0].read()
        refused[1].close()
        assert await echoed(stream, b"y") == b"y"
        stream[1].close()
        assert (proxy.counts.refused, proxy.counts.accepted) == (1, 1)


async def test_a_server_that_is_away_is_counted_as_unreachable() -> None:
    async with proxied() as (_, proxy):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
            proxy.target = taken.getsockname()
            stream = await connect(proxy)
            with pytest.raises(ConnectionResetError):
                await stream[0].read()
            stream[1].close()
        assert proxy.counts.unreachable == 1


async def test_close_resets_open_connections_and_start_listens_on_the_same_port() -> None:
    async with proxied() as (_, proxy):
        stream = await connect(proxy)
        await echoed(stream, b"x")
        port = proxy.port
        await proxy.close()
        with pytest.raises(ConnectionResetError):
            await stream[0].read()
        stream[1].close()
        with pytest.raises(ConnectionRefusedError):
            await connect(proxy)
        await proxy.start()
        assert proxy.port == port
        stream = await connect(proxy)
        assert await echoed(stream, b"y") == b"y"
        stream[1].close()


async def test_a_watch_follows_each_connection_from_what_came_to_what_went() -> None:
    watches: list[Followed] = []

    def watch() -> Followed:
        watches.append(Followed())
        return watches[-1]

    async with proxied() as (_, proxy):
        proxy.watch = watch
        idle, stream = await connect(proxy), await connect(proxy)
        assert await echoed(stream, b"seen") == b"seen"
        first, second = watches
        assert second.came_bytes == second.went_bytes == dict.fromkeys(Direction, 4)
        assert first.came_bytes == dict.fromkeys(Direction, 0)
        proxy.half_open()
        stream[1].write(b"swallowed")
        await until(lambda: second.came_bytes[Direction.TO_SERVER] == 13)
        assert second.went_bytes[Direction.TO_SERVER] == 4
        assert not second.over
        proxy.reset()
        await until(lambda: first.over and second.over)
        for _, writer in (idle, stream):
            writer.close()
