"""The client's side of WebSocket (RFC 6455), for MQTT, without I/O.

Lives here: the opening handshake, frames in both directions, and the answers to ping and close.
Rules:

- Bytes come in any division: the borders of chunks, frames and MQTT packets have nothing to do with
  each other (MQTT 5 §6.0).
- MQTT travels in binary frames alone; a text frame is an error (MQTT-6.0.0-1).
- Every frame that we send is masked (RFC 6455 §5.3), the server's must not be (§5.1).
- A connection at rest holds no buffer, since a rig has tens of thousands of these.

Must not come in: sockets, MQTT, extensions (none is offered).
"""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Final

from load.errors import BrokenConnection

__all__ = ["WebSocketClient"]

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_FINAL: Final = 0x80
_MASKED: Final = 0x80
_RESERVED: Final = 0x70
_MAX_HEAD_BYTES: Final = 16_384
_MAX_FRAME_BYTES: Final = 1 << 24
_SHORT: Final = 126
_LONG: Final = 1 << 16
# RFC 6455 §10.3 wants masks that a page in a browser cannot foresee. No page chooses what a rig
# sends, and a call of the operating system for each frame would be the dearest part of a publish.
_bits = random.getrandbits


class WebSocketClient:
    """One connection: first `request`, then `receive` and `frame`.

    Args:
        host: for the header `Host`, with the port if it is not the usual one.
        path: of the request, for example `/mqtt`.
        subprotocol: `mqtt` (MQTT 5 §6.0).
    """

    __slots__ = ("_buffer", "_key", "closed", "host", "path", "pending", "subprotocol", "upgraded")

    def __init__(self, host: str, path: str = "/mqtt", subprotocol: str = "mqtt") -> None:
        self.host = host
        self.path = path
        self.subprotocol = subprotocol
        self.upgraded = False
        """The server has agreed; `frame` may be used."""
        self.closed = False
        """A close frame came; whatever follows it is nothing."""
        self.pending = b""
        """Frames to send that answer the server's (pong, close); the owner empties it."""
        self._key: bytes | None = None
        self._buffer = b""

    def request(self) -> bytes:
        """Return the opening handshake (RFC 6455 §4.1); the connection begins anew."""
        self.upgraded = self.closed = False
        self.pending = self._buffer = b""
        self._key = base64.b64encode(_bits(128).to_bytes(16, "big"))
        return (
            f"GET {self.path} HTTP/1.1\r\nHost: {self.host}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {self._key.decode()}\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: {self.subprotocol}\r\n\r\n"
        ).encode()

    def receive(self, data: bytes) -> list[bytes]:
        """Take what came from the network; return the payload bytes in it, in order.

        Raises:
            BrokenConnection: the handshake was refused, or a frame breaks the standard.
        """
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if not self.upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._keep_head(head)
                return []
            self._check(head)
        found: list[bytes] = []
        at = 0
        # A data frame could be handed on before it is whole; MQTT packets are too small for that
        # to be worth its state.
        while not self.closed and (payload := _bounds(data, at)) is not None:
            start, finish = payload
            opcode = data[at] & 0x0F
            if opcode in (_BINARY, _CONTINUATION):
                found.append(data[start:finish])
            else:
                self._control(opcode, data[start:finish])
            at = finish
        self._buffer = b"" if self.closed else data[at:]
        return found

    def frame(self, payload: bytes) -> bytes:
        """Return one final, masked binary frame with `payload`."""
        return _frame(_BINARY, payload)

    def close(self) -> bytes:
        """Return a close frame with code 1000; the server answers it and then closes."""
        return _frame(_CLOSE, b"\x03\xe8")

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == _PING:
            self.pending += _frame(_PONG, payload)
        elif opcode == _CLOSE:
            self.pending += _frame(_CLOSE, payload[:2])
            self.closed = True
        elif opcode == _TEXT:
            raise BrokenConnection("a text frame: MQTT travels in binary frames (MQTT-6.0.0-1)")
        elif opcode != _PONG:
            raise BrokenConnection(f"a frame of the unknown kind {opcode:#x}")

    def _keep_head(self, head: bytes) -> None:
        if len(head) > _MAX_HEAD_BYTES:
            raise BrokenConnection("an answer without end to the WebSocket handshake")
        self._buffer = head

    def _check(self, head: bytes) -> None:
        """Check the answer to the handshake, RFC 6455 §4.1 and MQTT 5 §6.0."""
        status, *lines = head.split(b"\r\n")
        if status.split(b" ")[1:2] != [b"101"]:
            raise BrokenConnection(
                f"the WebSocket handshake at {self.path} was answered with "
                f"{status.decode(errors='replace')!r}; see the target's path"
            )
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in lines)
        }
        accept = base64.b64encode(_digest(self._key or b""))
        if headers.get(b"sec-websocket-accept") != accept:
            raise BrokenConnection("the answer to the WebSocket handshake is not to our question")
        if headers.get(b"sec-websocket-protocol") != self.subprotocol.encode():
            raise BrokenConnection(f"the server does not speak {self.subprotocol} over WebSocket")
        self.upgraded = True
        self._key = None


def _digest(key: bytes) -> bytes:
    """RFC 6455 §4.2.2; it proves that the server has read the key, no more."""
    return hashlib.sha1(key + _GUID, usedforsecurity=False).digest()


def _bounds(data: bytes, at: int) -> tuple[int, int] | None:
    """Return begin and end of the payload of the frame at `at`; None if it is not whole.

    RFC 6455 §5.2.
    """
    size = len(data)
    start = at + 2
    if start > size:
        return None
    length = data[at + 1]
    if data[at] & _RESERVED:
        raise BrokenConnection("a frame of an extension that nobody asked for")
    if length & _MASKED:
        raise BrokenConnection("a masked frame from the server (RFC 6455 §5.1)")
    if length >= _SHORT:
        start += 2 if length == _SHORT else 8
        if start > size:
            return None
        length = int.from_bytes(data[at + 2 : start], "big")
        if length > _MAX_FRAME_BYTES:
            raise BrokenConnection(f"a frame of {length} bytes")
    end = start + length
    return None if end > size else (start, end)


def _frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < _SHORT:
        head = bytes((_FINAL | opcode, _MASKED | size))
    elif size < _LONG:
        head = bytes((_FINAL | opcode, _MASKED | _SHORT)) + size.to_bytes(2, "big")
    else:
        head = bytes((_FINAL | opcode, _MASKED | _SHORT + 1)) + size.to_bytes(8, "big")
    mask = _bits(32).to_bytes(4, "big")
    # One exclusive-or of two long numbers: byte by byte it would take fifty times as long.
    long_mask = (mask * ((size >> 2) + 1))[:size]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(long_mask, "big")
    return head + mask + masked.to_bytes(size, "big")
