"""A node of Cassandra in memory of which nothing is true but what it says: for faults of one node.

Lives here: `Node`, which takes a login, prepares anything, and answers a BATCH as its test wants.
Must not come in: rows, and anything that a real Cassandra does on demand (`tests.integration`).
"""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from shadowsvc.store import frames
from shadowsvc.store.topology import Replica
from tests.unit.reading_frames import Reader, response, rows

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DONE", "Node", "error"]

DONE = frames.RESULT, struct.pack(">i", 1)
"""The answer to a write."""
_EMPTY_MAP = b"\0\0"


def error(code: int, message: str = "") -> tuple[int, bytes]:
    """Return the answer of a node that does not do what was asked."""
    return frames.ERROR, struct.pack(">iH", code, len(message)) + message.encode()


class Node:
    """Serves on a port of its own; an asynchronous context manager."""

    def __init__(self) -> None:
        self.connections = 0
        self.batches = 0
        self.prepared = 0
        self.logins: list[bytes] = []
        self.streams: list[int] = []
        """Of the batches, oldest first."""
        self.login: tuple[int, bytes] | None = None
        """The answer to AUTH_RESPONSE; None: none is asked for."""
        self.batch: Callable[[int], tuple[int, bytes] | None] = lambda _number: DONE
        """What to answer to a batch, by its number; None: nothing."""
        self.prepare: tuple[int, bytes] | None = None
        """The answer to PREPARE; None: an id."""
        self.settings: tuple[int, bytes] = frames.RESULT, rows()
        """The answer to a question for `system_views.settings`."""
        self.questions: list[str] = []
        self.hears_options = True
        self.replica = Replica("127.0.0.1", 0, "127.0.0.1")
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.replica = Replica("127.0.0.1", port, "127.0.0.1")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()

    def say(self, stream: int, answer: tuple[int, bytes]) -> None:
        """Answer on the newest connection, asked or not."""
        self._writers[-1].write(response(stream, *answer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                header = await reader.readexactly(9)
                _, _, stream, opcode, size = struct.unpack(">BBhBi", header)
                answer = self._answer(opcode, await reader.readexactly(size), stream)
                if answer is not None:
                    writer.write(response(stream, *answer))

    def _answer(self, opcode: int, body: bytes, stream: int) -> tuple[int, bytes] | None:
        if opcode == frames.STARTUP:
            return (frames.READY, b"") if self.login is None else (frames.AUTHENTICATE, b"\0\1x")
        if opcode == frames.AUTH_RESPONSE:
            self.logins.append(Reader(body).value())
            return self.login
        if opcode == frames.OPTIONS:
            return (0x06, _EMPTY_MAP) if self.hears_options else None
        if opcode == frames.PREPARE:
            self.prepared += 1
            return self.prepare or (frames.RESULT, struct.pack(">iH4s", 4, 4, b"abcd"))
        if opcode == frames.QUERY:
            self.questions.append(Reader(body).value().decode())
            return self.settings
        assert opcode == frames.BATCH
        self.streams.append(stream)
        self.batches += 1
        return self.batch(self.batches)
