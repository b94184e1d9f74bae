"""Lean devices: thousands of MQTT connections, plain or over WebSocket, in one event loop.

Lives here: a protocol on the mqtt5 codec that connects, answers whether it still lives, and knows
by whom it was closed. Rules: every wait has a limit; a device never connects again by itself. Must
not come in: the ingress.
"""

from __future__ import annotations

import asyncio
import base64
import os
from typing import TYPE_CHECKING, Self

import mqtt5

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

__all__ = ["Device", "Fleet"]

_LIMIT_SECONDS = 30.0
_KEEP_ALIVE_SECONDS = 3600
_BINARY = 0x82
_CLOSE = 0x88


class Device(asyncio.Protocol):
    """One connection."""

    def __init__(self, name: str, *, websocket: bool) -> None:
        self.name = name
        self.lost = False
        self._websocket = websocket
        self._upgraded = not websocket
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self._connected: asyncio.Future[None] = loop.create_future()
        self._pong: asyncio.Future[None] | None = None

    @classmethod
    async def connect(
        cls,
        host: str,
        port: int,
        *,
        name: str,
        websocket: bool = False,
        tls: ssl.SSLContext | None = None,
        limit_seconds: float = _LIMIT_SECONDS,
    ) -> Self:
        """Connect and wait for CONNACK; raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limit_seconds):
            _, device = await loop.create_connection(
                lambda: cls(name, websocket=websocket),
                host,
                port,
                ssl=tls,
                server_hostname="localhost" if tls else None,
            )
            try:
                await device._connected
            except BaseException:
                device.close()
                raise
        return device

    async def ping(self, limit_seconds: float = _LIMIT_SECONDS) -> bool:
        """Whether the broker answers PINGREQ on this connection."""
        if self.lost or self._transport is None:
            return False
        self._pong = asyncio.get_running_loop().create_future()
        self._send(mqtt5.PingReqPacket().write())
        try:
            async with asyncio.timeout(limit_seconds):
                await self._pong
        except (TimeoutError, ConnectionError):
            return False
        return True

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 0."""
        self._send(mqtt5.PublishPacket(topic=topic, payload=payload).write())

    @property
    def certificate(self) -> bytes:
        """What the server showed, DER."""
        assert self._transport is not None
        shown: bytes = self._transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return shown

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._websocket:
            key = base64.b64encode(os.urandom(16)).decode()
            transport.write(
                "GET /mqtt HTTP/1.1\r\nHost: ingress\r\nUpgrade: websocket\r\n"
                f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n".encode()
            )
        else:
            self._hello()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded:
            head, end, rest = bytes(self._buffer).partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._fail(ConnectionError(f"refused: {head[:60]!r}"))
                return
            self._upgraded = True
            self._buffer = bytearray(rest)
            self._hello()
        # Small packets come whole, one in each frame of the broker's.
        while packet := self._next():
            kind = packet[0] >> 4
            if kind == 2 and not self._connected.done():
                read, _ = mqtt5.read(memoryview(packet))
                assert isinstance(read, mqtt5.ConnAckPacket)
                if int(read.reason_code):
                    self._fail(ConnectionError(f"CONNACK {read.reason_code}"))
                else:
                    self._connected.set_result(None)
            elif kind == 13 and self._pong is not None and not self._pong.done():
                self._pong.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("closed"))

    # ---------------------------------------------------------------- packets

    def _hello(self) -> None:
        packet = mqtt5.ConnectPacket(
            client_id=self.name, clean_start=True, keep_alive=_KEEP_ALIVE_SECONDS
        )
        self._send(packet.write())

    def _send(self, data: bytes) -> None:
        assert self._transport is not None
        if self._websocket:  # RFC 6455 §5.2; a mask of zeros leaves the payload as it is
            assert len(data) < 126
            data = bytes((_BINARY, 0x80 | len(data), 0, 0, 0, 0)) + data
        self._transport.write(data)

    def _next(self) -> bytes | None:
        if len(self._buffer) < 2:
            return None
        size = self._buffer[1]
        assert size < 126, "the devices' packets are small"
        if len(self._buffer) < 2 + size:
            return None
        data = bytes(self._buffer[: 2 + size])
        del self._buffer[: 2 + size]
        if not self._websocket:
            return data
        if data[0] == _CLOSE:
            self._fail(ConnectionError("closed by the broker"))
            return None
        return data[2:]

    def _fail(self, error: Exception) -> None:
        self.lost = True
        for future in (self._connected, self._pong):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # looked at: a device may be closed while nobody waits


class Fleet:
    """Many devices."""

    def __init__(self, devices: Iterable[Device] = ()) -> None:
        self.devices = list(devices)

    async def grow(
        self, count: int, host: str, port: int, *, websocket: bool = True, at_once: int = 100
    ) -> None:
        """Connect `count` more; raises what the first failure raises."""
        start = len(self.devices)
        for base in range(start, start + count, at_once):
            group = range(base, min(base + at_once, start + count))
            self.devices += await asyncio.gather(
                *(
                    Device.connect(host, port, name=f"device-{number}", websocket=websocket)
                    for number in group
                )
            )

    async def alive(self) -> int:
        """How many answer."""
        return sum(await asyncio.gather(*(device.ping() for device in self.devices)))

    @property
    def lost(self) -> int:
        return sum(device.lost for device in self.devices)

    def close(self) -> None:
        for device in self.devices:
            device.close()
