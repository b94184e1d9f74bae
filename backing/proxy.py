"""A TCP proxy in this process that stands between a client and a server and spoils the connection.

The faults are those of real networks: a reset, a peer that vanished without a word, a line that
stands still, delay, a thin line, segments of one byte, a connection that breaks in the middle of a
packet, a server that resets whoever comes. A fault acts on the connections that exist and on later
ones, until it is taken back or `heal` ends it. The proxy counts what it did, so that a test can
prove that its fault happened; a tap sees every byte as it passes, and a watch follows one
connection from what its ends sent to what was handed on.

Rules: bytes are never changed or reordered, and none is lost on a connection that goes on. A proxy
belongs to the event loop that started it, and knows no protocol.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self

from backing.ports import free_port

_CHUNK_BYTES = 65_536
_MAX_CHUNKS_HELD = 256
_SLICE_SECONDS = 0.02
_LINGER_ZERO = struct.pack("ii", 1, 0)  # SO_LINGER on with 0 s: close() sends RST instead of FIN


class Direction(StrEnum):
    """Which way bytes go."""

    TO_SERVER = "to_server"
    TO_CLIENT = "to_client"


Tap = Callable[[Direction, bytes], None]


class Watch(Protocol):
    """Follows one connection; called on the proxy's loop."""

    def came(self, direction: Direction, data: bytes) -> None:
        """One end has sent these bytes; whether they are ever handed on is open."""

    def went(self, direction: Direction, count: int) -> None:
        """So many of the bytes that came are about to be handed on to the other end."""

    def ended(self) -> None:
        """Nothing is handed on any more."""


@dataclass(slots=True)
class ProxyCounts:
    """What a proxy has done since it was made."""

    accepted: int = 0
    """Connections that were passed on to the server."""
    refused: int = 0
    """New connections reset because of `refuse`."""
    unreachable: int = 0
    """New connections reset because the server did not take one."""
    reset: int = 0
    """Open connections reset by `reset` or `cut_after`."""
    cut: int = 0
    """Those among `reset` that `cut_after` ended."""
    silenced: int = 0
    """Connections that `half_open` made silent for good."""
    swallowed_bytes: int = 0
    """Bytes thrown away on silent connections."""
    bytes_to_server: int = 0
    """Bytes handed on to the server."""
    bytes_to_client: int = 0
    """Bytes handed on to clients."""


@dataclass(slots=True)
class _Line:
    """How one direction behaves; shared by all connections, changed in place."""

    delay_seconds: float = 0.0
    bytes_per_second: float | None = None
    max_chunk_bytes: int = _CHUNK_BYTES
    cut_after_bytes: int | None = None
    holding: bool = False

    def heal(self) -> None:
        self.delay_seconds = 0.0
        self.bytes_per_second = None
        self.max_chunk_bytes = _CHUNK_BYTES
        self.cut_after_bytes = None
        self.holding = False


class FaultProxy:
    """A proxy for one server, and an asynchronous context manager.

    Args:
        host: the server's address.
        port: the server's port.
        listen_port: our port on 127.0.0.1; a free one when None. `close` and `start` keep it.
        tap: called with the direction and the bytes just before these are handed on.
        watch: called for each connection that is passed on; what it returns follows that one.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        listen_port: int | None = None,
        tap: Tap | None = None,
        watch: Callable[[], Watch] | None = None,
    ) -> None:
        self.target = (host, port)
        self.host = "127.0.0.1"
        self.port = free_port() if listen_port is None else listen_port
        self.tap = tap
        self.watch = watch
        self.counts = ProxyCounts()
        self._lines = {direction: _Line() for direction in Direction}
        self._links: set[_Link] = set()
        self._refusing = False
        self._silencing = False
        self._server: asyncio.Server | None = None
        self.heal()

    @property
    def connections(self) -> int:
        """Connections that are open now, at one end at least."""
        return len(self._links)

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, self.host, self.port)

    async def close(self) -> None:
        """Stop listening and reset what is open; not counted in `reset`."""
        if self._server is None:
            return
        self._server.close()
        while self._links:
            for link in self._links:
                link.abort()
            await asyncio.wait({link.task for link in self._links})
        await self._server.wait_closed()
        self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def heal(self) -> None:
        """End every fault: what was held back goes on, new connections are served.

        Connections that `half_open` silenced stay silent: their bytes are lost.
        """
        self._refusing = False
        self._silencing = False
        for line in self._lines.values():
            line.heal()

    def reset(self) -> int:
        """Reset (RST) every open connection at both ends, silent ones too; return how many."""
        links = tuple(self._links)
        for link in links:
            link.abort()
        self.counts.reset += len(links)
        return len(links)

    def refuse(self, *, on: bool = True) -> None:
        """Reset new connections as soon as they are there; open ones go on."""
        self._refusing = on

    def half_open(self, *, on: bool = True) -> None:
        """Let both ends vanish from each other without a word.

        Open connections, and new ones while it is on, swallow every byte of both directions, and no
        end learns that the other closes. Such a connection stays silent for good: `heal` and
        `on=False` concern new connections. `reset` ends it.
        """
        self._silencing = on
        if on:
            for link in self._links:
                self._silence(link)

    def hold(self, direction: Direction | None = None, *, on: bool = True) -> None:
        """Let bytes wait, as while packets are lost and sent again; nothing is lost in the end."""
        for line in self._of(direction):
            line.holding = on

    def delay(self, seconds: float, direction: Direction | None = None) -> None:
        """Hand every byte on `seconds` (0 or more) after it came."""
        for line in self._of(direction):
            line.delay_seconds = seconds

    def limit_bandwidth(
        self, bytes_per_second: float | None, direction: Direction | None = None
    ) -> None:
        """Hand on at most so many bytes a second (above 0) a connection; None lifts the limit."""
        for line in self._of(direction):
            line.bytes_per_second = bytes_per_second

    def one_byte_at_a_time(self, direction: Direction | None = None, *, on: bool = True) -> None:
        """Hand every byte on in a segment of its own."""
        for line in self._of(direction):
            line.max_chunk_bytes = 1 if on else _CHUNK_BYTES

    def cut_after(self, max_bytes: int | None, direction: Direction) -> None:
        """Reset the connection that hands on the `max_bytes`-th byte (0 or more) from now.

        The bytes count over all connections. The cut happens once; None takes it back. With 0 the
        next byte is not handed on.
        """
        self._lines[direction].cut_after_bytes = max_bytes

    def _of(self, direction: Direction | None) -> list[_Line]:
        return [self._lines[one] for one in Direction if direction in (None, one)]

    def _silence(self, link: "_Link") -> None:
        if not link.silent:
            link.silent = True
            self.counts.silenced += 1

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            self.counts.refused += 1
            _send_reset(writer)
            return
        try:
            to_server = await asyncio.open_connection(*self.target)
        except OSError:
            self.counts.unreachable += 1
            _send_reset(writer)
            return
        self.counts.accepted += 1
        watch = None if self.watch is None else self.watch()
        link = _Link(self, (reader, writer), to_server, watch)
        if self._silencing:
            self._silence(link)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)
            if watch is not None:
                watch.ended()

    def _handed_on(self, direction: Direction, data: bytes) -> None:
        if direction is Direction.TO_SERVER:
            self.counts.bytes_to_server += len(data)
        else:
            self.counts.bytes_to_client += len(data)
        if self.tap is not None:
            self.tap(direction, data)


_Held = asyncio.Queue[tuple[float, bytes]]
_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(
        self, proxy: FaultProxy, client: _Stream, server: _Stream, watch: Watch | None
    ) -> None:
        self._proxy = proxy
        self._watch = watch
        self._writers = (client[1], server[1])
        self._ways = (
            (Direction.TO_SERVER, client[0], server[1]),
            (Direction.TO_CLIENT, server[0], client[1]),
        )
        self.silent = False
        self.task: asyncio.Task[None]

    async def run(self) -> None:
        """Pass bytes on until both ends closed, or one of them or we reset."""
        self.task = asyncio.create_task(self._run(), name="fault-proxy-link")
        try:
            await asyncio.wait({self.task})
        finally:
            self.task.cancel()
            for writer in self._writers:
                writer.close()
        if not self.task.cancelled():
            self.task.result()  # a tap that raised

    async def _run(self) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            for direction, reader, writer in self._ways:
                held = _Held(_MAX_CHUNKS_HELD)
                tasks.append(asyncio.create_task(self._read(direction, reader, held)))
                tasks.append(asyncio.create_task(self._write(direction, held, writer)))
            await asyncio.gather(*tasks)
        except OSError:  # an end was reset, or went away while we wrote
            self.abort()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def abort(self) -> None:
        """Reset both ends."""
        for writer in self._writers:
            _send_reset(writer)
        self.task.cancel()

    async def _read(self, direction: Direction, reader: asyncio.StreamReader, held: _Held) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                if self._watch is not None:
                    self._watch.came(direction, data)
                await held.put((time.monotonic(), data))
        except OSError:
            if not self.silent:
                raise
        await held.put((time.monotonic(), b""))

    async def _write(self, direction: Direction, held: _Held, writer: asyncio.StreamWriter) -> None:
        line = self._proxy._lines[direction]  # noqa: SLF001 - one room
        while True:
            came, data = await held.get()
            await self._wait(line, came)
            if not data:
                break
            while data and not self.silent:
                chunk = data[: self._chunk_bytes(line)]
                data = data[len(chunk) :]
                await self._hand_on(direction, line, chunk, writer)
                await self._wait(line, came)
            self._proxy.counts.swallowed_bytes += len(data)
        if not self.silent:
            with contextlib.suppress(OSError, RuntimeError):  # the other end may be gone as well
                writer.write_eof()

    async def _wait(self, line: _Line, came: float) -> None:
        # In slices, so that `heal`, `half_open` and a new delay count at once.
        while not self.silent:
            if line.holding:
                await asyncio.sleep(_SLICE_SECONDS)
                continue
            left = came + line.delay_seconds - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, _SLICE_SECONDS))

    def _chunk_bytes(self, line: _Line) -> int:
        if line.bytes_per_second is None:
            return line.max_chunk_bytes
        return max(1, min(line.max_chunk_bytes, int(line.bytes_per_second * _SLICE_SECONDS)))

    async def _hand_on(
        self, direction: Direction, line: _Line, chunk: bytes, writer: asyncio.StreamWriter
    ) -> None:
        left = line.cut_after_bytes
        if left is not None:
            cut = len(chunk) >= left
            chunk = chunk[:left]
            line.cut_after_bytes = None if cut else left - len(chunk)
        else:
            cut = False
        if chunk:
            self._proxy._handed_on(direction, chunk)  # noqa: SLF001 - one room
            if self._watch is not None:
                self._watch.went(direction, len(chunk))
            writer.write(chunk)
            await writer.drain()
        if cut:
            self._proxy.counts.cut += 1
            self._proxy.counts.reset += 1
            self.abort()
            await asyncio.sleep(0)
        elif line.bytes_per_second is not None:
            await asyncio.sleep(len(chunk) / line.bytes_per_second)
        elif line.max_chunk_bytes == 1:
            await asyncio.sleep(0)  # uvloop joins what is written in one turn of the loop


def _send_reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    writer.transport.abort()
