"""CQL's binary protocol, version 4, as far as writing shadows needs it. Pure.

Lives here: requests as bytes, answers taken apart, and the one body that is made for every batch, a
BATCH of prepared statements. Rules: nothing of a device is ever part of a statement's text; each
statement has its own time, and a batch never has one; what can't be encoded raises `ValueError`;
what no server may send raises `BadAnswer`, and the connection is dead then. Must not come in:
sockets, futures, and what an error of the server means (`store.faults`).

Source: `native_protocol_v4.spec` of Apache Cassandra. A frame is a header of 9 bytes (version,
flags, stream, opcode, length of the body) and a body. A value is its length in 4 bytes and its
bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.update import Update
from shadowsvc.store.statements import HEARD, statements_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shadowsvc.shadow.update import Mutations

__all__ = [
    "AUTHENTICATE",
    "AUTH_RESPONSE",
    "AUTH_SUCCESS",
    "BATCH",
    "CONSISTENCIES",
    "ERROR",
    "OPTIONS",
    "PREPARE",
    "QUERY",
    "READY",
    "RESULT",
    "STARTUP",
    "Answers",
    "BadAnswer",
    "BatchBody",
    "error_of",
    "frame",
    "plain_login",
    "prepare_body",
    "prepared_id",
    "query_body",
    "rows_of",
    "startup_body",
]

ERROR: Final = 0x00
STARTUP: Final = 0x01
READY: Final = 0x02
AUTHENTICATE: Final = 0x03
OPTIONS: Final = 0x05
QUERY: Final = 0x07
RESULT: Final = 0x08
PREPARE: Final = 0x09
BATCH: Final = 0x0D
AUTH_RESPONSE: Final = 0x0F
AUTH_SUCCESS: Final = 0x10

CONSISTENCIES: Final = {
    "ONE": 0x0001,
    "TWO": 0x0002,
    "THREE": 0x0003,
    "QUORUM": 0x0004,
    "ALL": 0x0005,
    "LOCAL_QUORUM": 0x0006,
    "EACH_QUORUM": 0x0007,
    "LOCAL_ONE": 0x000A,
}
"""§3, [consistency]."""

_REQUEST: Final = 0x04
_RESPONSE: Final = 0x84
_ROWS: Final = 2
_PREPARED: Final = 4
_TRACING: Final = 0x02
_CUSTOM_PAYLOAD: Final = 0x04
_WARNING: Final = 0x08
_GLOBAL_TABLE: Final = 0x01
_MORE_PAGES: Final = 0x02
_NO_METADATA: Final = 0x04
_FIRST_TYPE_WITH_MORE: Final = 0x20
_MAX_BODY_BYTES: Final = 16 * 1024 * 1024
_UNLOGGED: Final = 1
_KIND_PREPARED: Final = b"\x01"
_NO_FLAGS: Final = b"\x00"
_MAX_KNOWN_PATHS: Final = 1024
_MAX_KNOWN_PATH_BYTES: Final = 128

_HEADER: Final = struct.Struct(">BBhBi")
_SHORT: Final = struct.Struct(">H")
_INT: Final = struct.Struct(">i")
_BIGINT: Final = struct.Struct(">iq")
"""A value of 8 bytes, its length before it."""
_BATCH: Final = struct.Struct(">BH")
_LENGTHS: Final = tuple(_INT.pack(length) for length in range(512))


class BadAnswer(Exception):
    """The server sent what the protocol does not have."""


def frame(stream: int, opcode: int, body: bytes) -> bytes:
    """Return a request; `stream` is 0 to 32,767."""
    return _HEADER.pack(_REQUEST, 0, stream, opcode, len(body)) + body


def startup_body() -> bytes:
    """Return the body of STARTUP: the version of CQL, and no compression (§4.1.1)."""
    return _SHORT.pack(1) + _string("CQL_VERSION") + _string("3.0.0")


def plain_login(username: str, password: str) -> bytes:
    """Return the body of AUTH_RESPONSE for `PasswordAuthenticator`: SASL PLAIN (RFC 4616)."""
    return _value(b"\0" + username.encode() + b"\0" + password.encode())


def prepare_body(text: str) -> bytes:
    """Return the body of PREPARE (§4.1.5)."""
    return _value(text.encode())


def prepared_id(body: bytes) -> bytes:
    """Return the id in the body of a RESULT of kind Prepared (§4.2.5.4). Raises `BadAnswer`."""
    try:
        kind, length = struct.unpack_from(">iH", body)
    except struct.error as error:
        raise BadAnswer(str(error)) from None
    found = body[6 : 6 + length]
    if kind != _PREPARED or not found or len(found) < length:
        raise BadAnswer(f"a result of kind {kind} where a prepared statement was asked for")
    return found


def query_body(text: str, consistency: int) -> bytes:
    """Return the body of QUERY for a text without values (§4.1.4)."""
    return _value(text.encode()) + _SHORT.pack(consistency) + _NO_FLAGS


def rows_of(body: bytes) -> list[list[bytes | None]]:
    """Return the values in the body of a RESULT of kind Rows, row by row (§4.2.5.2).

    Of plain types only; of several pages the first. Raises `BadAnswer`.
    """
    try:
        kind, flags, columns = struct.unpack_from(">iii", body)
        if kind != _ROWS or columns < 1:
            raise BadAnswer(f"a result of kind {kind} with {columns} columns for rows")
        at = 12
        if flags & _MORE_PAGES:
            _, at = _value_at(body, at)
        if not flags & _NO_METADATA:
            at = _after_columns(body, at, columns, shared=bool(flags & _GLOBAL_TABLE))
        (count,) = _INT.unpack_from(body, at)
        at += 4
        found: list[list[bytes | None]] = []
        for _ in range(count):
            row: list[bytes | None] = []
            for _ in range(columns):
                value, at = _value_at(body, at)
                row.append(value)
            found.append(row)
    except struct.error as error:
        raise BadAnswer(str(error)) from None
    return found


def _after_columns(body: bytes, at: int, columns: int, *, shared: bool) -> int:
    """Return where the description of the columns ends."""
    if shared:
        at = _after_strings(body, at, 2)
    for _ in range(columns):
        at = _after_strings(body, at, 1 if shared else 3)
        (of_type,) = _SHORT.unpack_from(body, at)
        at += 2
        if not 0 < of_type < _FIRST_TYPE_WITH_MORE:
            raise BadAnswer(f"a column of type {of_type:#x}")
    return at


def _after_strings(body: bytes, at: int, count: int) -> int:
    for _ in range(count):
        (length,) = _SHORT.unpack_from(body, at)
        at += 2 + length
    return at


def _value_at(body: bytes, at: int) -> tuple[bytes | None, int]:
    (length,) = _INT.unpack_from(body, at)
    at += 4
    if length < 0:
        return None, at
    value = body[at : at + length]
    if len(value) < length:
        raise BadAnswer(f"a value of {length} bytes of which {len(value)} came")
    return value, at + length


def error_of(body: bytes) -> tuple[int, str]:
    """Return code and message of an ERROR (§9). Raises `BadAnswer`."""
    try:
        code, length = struct.unpack_from(">iH", body)
    except struct.error as error:
        raise BadAnswer(str(error)) from None
    return code, body[6 : 6 + length].decode(errors="replace")


class Answers:
    """Cuts what a server sends into answers, however it is split."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        """What the server remarked beside its answers; whoever reads them empties the list."""
        self._rest = b""

    def take(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Return (stream, opcode, body) of every answer that is whole now. Raises `BadAnswer`."""
        if self._rest:
            data = self._rest + data
        found: list[tuple[int, int, bytes]] = []
        at = 0
        end = len(data)
        while end - at >= _HEADER.size:
            version, flags, stream, opcode, length = _HEADER.unpack_from(data, at)
            if version != _RESPONSE or not 0 <= length <= _MAX_BODY_BYTES:
                raise BadAnswer(f"version {version:#x}, length {length}")
            start = at + _HEADER.size
            if end - start < length:
                break
            at = start + length
            body = data[start:at]
            found.append((stream, opcode, self._without_extras(flags, body) if flags else body))
        self._rest = data[at:]
        return found

    def _without_extras(self, flags: int, body: bytes) -> bytes:
        """Return a body without what is before it: tracing id, warnings, custom payload (§2.2)."""
        at = 16 if flags & _TRACING else 0
        try:
            if flags & _WARNING:
                (count,) = _SHORT.unpack_from(body, at)
                at += 2
                for _ in range(count):
                    (length,) = _SHORT.unpack_from(body, at)
                    self.warnings.append(body[at + 2 : at + 2 + length].decode(errors="replace"))
                    at += 2 + length
            if flags & _CUSTOM_PAYLOAD:
                (count,) = _SHORT.unpack_from(body, at)
                at += 2
                for _ in range(count):
                    (length,) = _SHORT.unpack_from(body, at)
                    at += 2 + length
                    (size,) = _INT.unpack_from(body, at)
                    at += 4 + max(size, 0)
        except struct.error as error:
            raise BadAnswer(str(error)) from None
        return body[at:]


class BatchBody:
    """Makes the bodies of BATCH (§4.1.7) for one connection.

    Args:
        statements: the id of each prepared statement, by its name in `store.statements`, and how
            many values it takes.
        consistency: of every batch, one of `CONSISTENCIES`.
    """

    def __init__(self, statements: Mapping[str, tuple[bytes, int]], consistency: int) -> None:
        heads = {
            name: _KIND_PREPARED + _SHORT.pack(len(known)) + known + _SHORT.pack(values)
            for name, (known, values) in statements.items()
        }
        self._heads = heads
        self._usual = heads["write_usual"]
        self._usual_heard = heads["write_usual_heard"]
        self._tail = _SHORT.pack(consistency) + _NO_FLAGS
        # A fleet has few paths, said again and again; what a device makes up is not kept for long.
        self._paths: dict[str, bytes] = {}

    def encode(self, mutations: Sequence[Mutations | Update]) -> bytes:
        """Return the body that writes `mutations`. Raises `ValueError`."""
        parts: list[bytes] = [b""]
        rows = 0
        try:
            for mutation in mutations:
                if not isinstance(mutation, Update):
                    rows += self._any(mutation, parts)
                elif mutation.is_usual:
                    rows += self._usually(mutation, parts)
                else:
                    rows += self._any(merge((mutation,)), parts)
            parts[0] = _BATCH.pack(_UNLOGGED, rows)
        except struct.error as error:
            raise ValueError(f"a batch of {rows} rows can't be encoded: {error}") from None
        parts.append(self._tail)
        return b"".join(parts)

    def _usually(self, update: Update, parts: list[bytes]) -> int:
        """Add the rows of a usual update; return how many."""
        time_us = update.time_us
        time = _BIGINT.pack(8, time_us)
        device = _text(update.device)
        paths = update.paths
        values = update.values
        parts += (
            self._usual_heard + time,
            _length(values[0]),
            values[0],
            _BIGINT.pack(8, time_us // 1000),
            device,
            self._path(paths[0]),
        )
        head = self._usual + time
        for at in range(1, len(paths)):
            value = values[at]
            parts += (head, _length(value), value, device, self._path(paths[at]))
        return len(paths)

    def _any(self, mutations: Mutations, parts: list[bytes]) -> int:
        """Add every statement of one device; return how many."""
        found = statements_of(mutations)
        for name, time_us, value, texts in found:
            parts += (self._heads[name], _BIGINT.pack(8, time_us))
            if value is not None:
                parts.append(_value(value))
            if name in HEARD:
                parts.append(_BIGINT.pack(8, time_us // 1000))
            parts += [_text(text) for text in texts]
        return len(found)

    def _path(self, path: str) -> bytes:
        known = self._paths.get(path)
        if known is None:
            known = _text(path)
            if len(known) <= _MAX_KNOWN_PATH_BYTES:
                if len(self._paths) >= _MAX_KNOWN_PATHS:
                    self._paths.clear()
                self._paths[path] = known
        return known


def _length(value: bytes) -> bytes:
    length = len(value)
    return _LENGTHS[length] if length < len(_LENGTHS) else _INT.pack(length)


def _value(value: bytes) -> bytes:
    return _INT.pack(len(value)) + value


def _text(text: str) -> bytes:
    return _value(text.encode())


def _string(text: str) -> bytes:
    data = text.encode()
    return _SHORT.pack(len(data)) + data
