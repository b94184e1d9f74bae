"""Devices of the load rig, one by one: connections, plain or over WebSocket, that a test looks at.

Lives here: an asyncio protocol around `load.device` that connects, answers whether it still lives,
and knows that it was closed. Rules: every wait has a limit; a device never connects again by
itself. Must not come in: the ingress, and how packets and frames look.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from load import device as rig
from load.errors import BrokenConnection
from load.websocket import WebSocketClient

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

__all__ = ["Device", "Fleet"]

_LIMIT_SECONDS = 30.0
_KEEP_ALIVE_SECONDS = 3600


class Device(asyncio.Protocol):
    """One connection."""

    def __init__(self, name: str, *, websocket: bool) -> None:
        self.name = name
        self.lost = False
        self._device = rig.Device(
            name,
            keep_alive_seconds=_KEEP_ALIVE_SECONDS,
            websocket=WebSocketClient("ingress") if websocket else None,
        )
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
        self._send(self._device.ping())
        try:
            async with asyncio.timeout(limit_seconds):
                await self._pong
        except (TimeoutError, ConnectionError):
            return False
        return True

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 0."""
        self._send(self._device.publish(topic, payload, 0)[1])

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
        self._send(self._device.connect())

    def data_received(self, data: bytes) -> None:
        try:
            events = self._device.receive(data)
        except BrokenConnection as error:
            self._fail(ConnectionError(str(error)))
            return
        self._send(self._device.pending)
        self._device.pending = b""
        for event in events:
            match event:
                case rig.Connected() if not self._connected.done():
                    self._connected.set_result(None)
                case rig.Pong() if self._pong is not None and not self._pong.done():
                    self._pong.set_result(None)
                case rig.Closed():
                    self._fail(ConnectionError(event.reason))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("closed"))

    def _send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

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
