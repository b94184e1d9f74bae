"""CQL's binary protocol, version 4, from the server's side: reads requests, writes responses.

Lives here: what tests need to see that a request says what it should, by the specification and not
by our own code. Must not come in: anything of shadowsvc.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["Batch", "Reader", "read_batch", "response", "rows"]


class Reader:
    """Takes a body apart from its beginning."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        assert len(found) == size, "the body ends too early"
        self._at += size
        return found

    def byte(self) -> int:
        return self.take(1)[0]

    def short(self) -> int:
        (number,) = struct.unpack(">H", self.take(2))
        assert isinstance(number, int)
        return number

    def string(self) -> str:
        return self.take(self.short()).decode()

    def short_bytes(self) -> bytes:
        return self.take(self.short())

    def value(self) -> bytes:
        (size,) = struct.unpack(">i", self.take(4))
        return self.take(size)

    @property
    def left(self) -> int:
        return len(self._data) - self._at


class Batch(NamedTuple):
    kind: int
    rows: list[tuple[bytes, list[bytes]]]
    """id of the prepared statement, values"""
    consistency: int
    flags: int


def read_batch(body: bytes) -> Batch:
    reader = Reader(body)
    kind = reader.byte()
    rows = []
    for _ in range(reader.short()):
        assert reader.byte() == 1, "no text of a statement in a batch"
        known = reader.short_bytes()
        rows.append((known, [reader.value() for _ in range(reader.short())]))
    batch = Batch(kind, rows, reader.short(), reader.byte())
    assert reader.left == 0
    return batch


def rows(*found: list[bytes | None], columns: int = 2, described: bool = True) -> bytes:
    """Return the body of a RESULT of kind Rows (§4.2.5.2), of texts, as Cassandra describes it."""
    flags = 0x01 if described else 0x04
    body = struct.pack(">iii", 2, flags, columns)
    if described:
        body += _string("system_views") + _string("settings")
        body += b"".join(_string(f"column {at}") + b"\0\x0d" for at in range(columns))
    body += struct.pack(">i", len(found))
    for row in found:
        for value in row:
            body += struct.pack(">i", -1 if value is None else len(value)) + (value or b"")
    return body


def _string(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def response(
    stream: int, opcode: int, body: bytes, *, flags: int = 0, version: int = 0x84
) -> bytes:
    return struct.pack(">BBhBi", version, flags, stream, opcode, len(body)) + body
