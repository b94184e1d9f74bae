"""`record`: what devices publish, written into a file that `replay` plays.

Lives here: one subscriber. Rules: offsets count from the first message; a lost connection ends the
recording, since a gap in it would be played too. Must not come in: the file's form.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import time
from typing import TYPE_CHECKING, Final

import uvloop

from load.console import on_signals
from load.device import Closed, Connected, Device, Message, Subscribed
from load.endpoints import Endpoint
from load.errors import BadOption, BrokenConnection
from load.replay import line
from load.websocket import WebSocketClient

if TYPE_CHECKING:
    import argparse
    from typing import BinaryIO

__all__ = ["record"]

_PING_SECONDS: Final = 20.0
_CONNECT_SECONDS: Final = 30.0


def record(given: argparse.Namespace) -> int:
    """Record until Ctrl-C or the time is over; return the exit code.

    Raises:
        BadOption: the file can't be written, or nobody answers at the target.
        BrokenConnection: the connection was lost.
    """
    endpoint = Endpoint.parse(given.target)
    try:
        with (
            given.file.open("wb") as file,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            count = runner.run(_record(endpoint, given.filter, given.seconds, file))
    except (OSError, TimeoutError) as error:
        raise BadOption(f"{given.target} to {given.file}: {str(error) or 'no answer'}") from None
    sys.stdout.write(f"{count:,} messages in {given.file}\n")
    return 0


async def _record(endpoint: Endpoint, pattern: str, seconds: float, file: BinaryIO) -> int:
    loop = asyncio.get_running_loop()
    recorder = _Recorder(endpoint, pattern, file)
    on_signals(recorder.stop)
    timer = loop.call_later(seconds, recorder.stop) if seconds else None
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            transport, _ = await loop.create_connection(
                lambda: recorder,
                endpoint.host,
                endpoint.port,
                ssl=ssl.create_default_context() if endpoint.tls else None,
            )
            await recorder.subscribed.wait()
        return await recorder.ended
    finally:
        if timer is not None:
            timer.cancel()
        recorder.stop()
        if transport is not None:
            transport.close()


class _Recorder(asyncio.Protocol):
    def __init__(self, endpoint: Endpoint, pattern: str, file: BinaryIO) -> None:
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.subscribed = asyncio.Event()
        """Set by the end as well: nobody need wait for it then."""
        websocket = (
            None if endpoint.path is None else WebSocketClient(endpoint.authority, endpoint.path)
        )
        self._device = Device(f"recorder-{time.time_ns()}", websocket=websocket)
        self._pattern = pattern
        self._file = file
        self._count = 0
        self._began = 0.0
        self._transport: asyncio.Transport

    def stop(self) -> None:
        self.subscribed.set()
        if not self.ended.done():
            self.ended.set_result(self._count)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's is a Transport
        self._transport.write(self._device.connect())
        self._ping()

    def data_received(self, data: bytes) -> None:
        try:
            events = self._device.receive(data)
        except BrokenConnection as error:
            self._fail(str(error))
            return
        self._transport.write(self._device.pending)
        self._device.pending = b""
        for event in events:
            match event:
                case Message(topic, payload):
                    now = time.monotonic()
                    self._began = self._began or now
                    self._file.write(line(now - self._began, topic, payload))
                    self._count += 1
                case Connected():
                    self._transport.write(self._device.subscribe(self._pattern))
                case Subscribed() if not event.granted:
                    self._fail(f"the subscription {self._pattern} was refused")
                case Subscribed():
                    self.subscribed.set()
                case Closed():
                    self._fail(event.reason)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(str(exc or "the broker closed the connection"))

    def _fail(self, why: str) -> None:
        self.subscribed.set()
        if not self.ended.done():
            self.ended.set_exception(BrokenConnection(f"the recording ended early: {why}"))

    def _ping(self) -> None:
        if self.ended.done() or self._transport.is_closing():
            return
        if self._device.connected:
            self._transport.write(self._device.ping())
        asyncio.get_running_loop().call_later(_PING_SECONDS, self._ping)
