"""The ingest connection: socket, TLS, keep-alive and reconnecting around `mqtt.session`.

Lives here: everything about the ingest side that waits. Rules: reading and keep-alive never wait
for anything but the network; a connect has a time limit, name resolution included; reconnects
back off with full jitter; the broker's session is never ended or unsubscribed, only left. Must not
come in: what a message means, when it may be acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog

from shadowsvc.errors import ConnectionLost, MqttError, ProtocolViolation
from shadowsvc.mqtt.session import Connected, Session, SessionOptions, State

if TYPE_CHECKING:
    from collections.abc import Callable

    import mqtt5

__all__ = ["Connection", "Endpoint", "Ingest"]

_log = structlog.get_logger(__name__)

_BUFFER_BYTES = 256 * 1024
_FULL_READ_BYTES = 32 * 1024
_REST_SECONDS = 0.002
_TICKS_A_KEEP_ALIVE = 8
_STABLE_SECONDS = 10.0
_FAREWELL_SECONDS = 1.0
_IMPLEMENTATION_SPECIFIC_ERROR = 131


class Ingest(Protocol):
    """What the connection needs from whoever takes the messages."""

    async def begin_connection(self) -> int:
        """Start a new epoch; return the Receive Maximum to announce (1 to 65535)."""

    def connected(self, *, session_present: bool) -> None:
        """CONNACK came."""

    def subscribed_now(self) -> None:
        """Every filter was granted."""

    def begin_chunk(self) -> None:
        """Bytes arrived; `publish` calls follow."""

    def publish(self, topic: str, packet: mqtt5.PublishPacket) -> None:
        """One message."""

    def end_chunk(self) -> None:
        """All messages of the chunk were handed over."""

    def over_receive_maximum(self) -> bool:
        """Whether the broker has more unacknowledged messages under way than was announced."""

    def disconnected(self, reason: str) -> None:
        """The connection is gone; `reason` is a bounded metric label."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the broker is and how long things may take, in seconds.

    `tls` builds the TLS context anew for each connect, so that rotated certificates are picked
    up; None means plain TCP.
    """

    host: str
    port: int
    tls: Callable[[], ssl.SSLContext] | None = None
    connect_timeout_seconds: float = 10.0
    reconnect_min_seconds: float = 0.2
    reconnect_max_seconds: float = 30.0


class Connection:
    """Keep one session connected for as long as the process wants it."""

    def __init__(
        self,
        endpoint: Endpoint,
        options: SessionOptions,
        ingest: Ingest,
        *,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Make it; nothing happens before `run`."""
        self.endpoint = endpoint
        self.options = options
        self.receive_maximum = 0
        """What the present connection announced."""
        self.last_error: str | None = None
        """What ended the last connection, for people."""
        self._ingest = ingest
        self._jitter = jitter
        self._protocol: _Protocol | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Connect, serve, and connect again until `finish` or cancellation.

        Everything that ends a connection is logged and reported to the ingest; nothing is raised.
        """
        failures = 0
        stopping = self._stopping
        while not stopping.is_set():
            try:
                await self._serve()
            except MqttError as error:
                failures = 1 if self._was_stable else failures + 1
                delay = self._backoff(failures)
                if not stopping.is_set():
                    _log.warning(
                        "broker connection lost" if self._was_up else "broker not reachable",
                        reason=error.reason,
                        error=str(error),
                        broker=f"{self.endpoint.host}:{self.endpoint.port}",
                        retry_seconds=round(delay, 3),
                    )
                self.last_error = str(error)
                self._ingest.disconnected(error.reason)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await stopping.wait()

    def send(self, data: bytes) -> None:
        """Write to the present connection.

        Without one, or once it has ended, the bytes are dropped: they are stale acks, and
        nothing may follow a DISCONNECT (MQTT-3.14.4-1).
        """
        protocol = self._protocol
        if protocol is not None and not protocol.ended.done() and protocol.transport is not None:
            protocol.transport.write(data)
            if protocol.paused:
                protocol.resume_if_room()

    def reconnect(self, reason: str) -> None:
        """Leave the present connection, keeping the session, and make a new one."""
        protocol = self._protocol
        if protocol is not None:
            protocol.fail(ConnectionLost(reason, "leaving to connect anew"), farewell=0)

    async def finish(self) -> None:
        """Leave for good: DISCONNECT keeping the session, half-close, read to the end, close.

        Takes at most a second. A close with unread bytes would reset the connection and could
        lose the last acks on their way. TLS knows no half-close: there the broker closes when it
        has read DISCONNECT (MQTT 5 §3.14.4).
        """
        self._stopping.set()
        protocol = self._protocol
        if protocol is None or protocol.transport is None:
            return
        transport = protocol.transport
        protocol.fail(ConnectionLost("stopping", "leaving for good"), farewell=0)
        transport.resume_reading()
        if transport.can_write_eof() and not transport.is_closing():
            transport.write_eof()
        await asyncio.wait([protocol.closed], timeout=_FAREWELL_SECONDS)
        if not protocol.closed.done():
            transport.abort()

    @property
    def _was_up(self) -> bool:
        return self._protocol is not None and self._protocol.session_started

    @property
    def _was_stable(self) -> bool:
        since = None if self._protocol is None else self._protocol.subscribed_at
        return since is not None and asyncio.get_running_loop().time() - since > _STABLE_SECONDS

    def _backoff(self, failures: int) -> float:
        """Full jitter: anything up to a limit that doubles each time, but never nothing."""
        endpoint = self.endpoint
        ceiling = min(
            endpoint.reconnect_max_seconds,
            endpoint.reconnect_min_seconds * 2 ** min(failures - 1, 16),
        )
        return self._jitter(endpoint.reconnect_min_seconds / 2, ceiling)

    async def _serve(self) -> None:
        """One connection from connect to its end; raises the `MqttError` that ended it."""
        self._protocol = None
        endpoint = self.endpoint
        loop = asyncio.get_running_loop()
        receive_maximum = await self._ingest.begin_connection()
        self._go_on()
        session = Session(self.options, self._ingest.publish)
        protocol = _Protocol(session, self._ingest, loop)
        deadline = loop.time() + endpoint.connect_timeout_seconds
        try:
            async with asyncio.timeout_at(deadline):
                context = None if endpoint.tls is None else await asyncio.to_thread(endpoint.tls)
                await loop.create_connection(
                    lambda: protocol,
                    endpoint.host,
                    endpoint.port,
                    ssl=context,
                    server_hostname=endpoint.host if context else None,
                    ssl_shutdown_timeout=_FAREWELL_SECONDS if context else None,
                )
        except TimeoutError:
            raise ConnectionLost(
                "connect_timeout",
                f"no connection within SHADOWSVC_MQTT__CONNECT_TIMEOUT_SECONDS "
                f"({endpoint.connect_timeout_seconds:g})",
            ) from None
        except ssl.SSLError as error:
            raise ConnectionLost(
                "tls", f"TLS failed: {error}; see SHADOWSVC_MQTT__CA_FILE"
            ) from None
        except (OSError, UnicodeError) as error:  # UnicodeError: no name that DNS could hold
            raise ConnectionLost("connect", f"{error}; see SHADOWSVC_MQTT__URL") from None
        try:
            self._go_on()
            self._protocol = protocol
            self.receive_maximum = receive_maximum
            protocol.start(receive_maximum, deadline)
            await asyncio.shield(protocol.ended)
        finally:
            protocol.stop_timers()
            # `finish` closes by itself, when it has read to the end.
            if protocol.transport is not None and (
                protocol is not self._protocol or not self._stopping.is_set()
            ):
                protocol.transport.close()

    def _go_on(self) -> None:
        """Raise when `finish` came while something was waited for."""
        if self._stopping.is_set():
            raise ConnectionLost("stopping", "leaving for good")


class _Protocol(asyncio.BufferedProtocol):
    """Feeds one session from one transport, without copying what was read."""

    def __init__(self, session: Session, ingest: Ingest, loop: asyncio.AbstractEventLoop) -> None:
        self.session = session
        self.transport: asyncio.Transport | None = None
        self.session_started = False
        self.subscribed_at: float | None = None
        self.ended: asyncio.Future[None] = loop.create_future()
        """Carries the error that ended the connection."""
        self.closed: asyncio.Future[None] = loop.create_future()
        """Done when the transport is gone."""
        self._ingest = ingest
        self._loop = loop
        self._resting = False
        self.paused = False
        """Not reading: the broker sends beyond the Receive Maximum."""
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._filled = 0
        self._opening: asyncio.TimerHandle | None = None
        self._ticker: asyncio.TimerHandle | None = None

    def start(self, receive_maximum: int, deadline: float) -> None:
        """Send CONNECT; CONNACK and SUBACK have to be here at `deadline` (the loop's time)."""
        self._opening = self._loop.call_at(deadline, self._check_open)
        self.session.connect(self._loop.time(), receive_maximum)
        self._flush()

    def stop_timers(self) -> None:
        for timer in (self._opening, self._ticker):
            if timer is not None:
                timer.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the protocol's signature
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        end = self._filled + nbytes
        if self.ended.done():
            self._filled = 0
            return
        now = self._loop.time()
        ingest = self._ingest
        ingest.begin_chunk()
        try:
            used = self.session.receive(self._buffer[:end], now)
        except ProtocolViolation as error:
            self.fail(error, farewell=error.code)
            used = end
        except MqttError as error:
            self.fail(error)
            used = end
        except Exception:  # noqa: BLE001 - a defect of the taker costs one connection, no message
            _log.exception("taking messages failed", limit_by="ingest")
            self.fail(
                ConnectionLost("internal_error", "taking messages failed"),
                farewell=_IMPLEMENTATION_SPECIFIC_ERROR,
            )
            used = end
        self._report()
        ingest.end_chunk()
        self._flush()
        rest = end - used
        if rest and used:
            self._buffer[:rest] = self._buffer[used:end]
        self._filled = rest
        self._resize(rest)
        if self.ended.done():
            return
        if ingest.over_receive_maximum():
            self._pause()
        elif nbytes < _FULL_READ_BYTES and self.session.state is State.LIVE:
            self._rest()

    def _rest(self) -> None:
        """Let messages gather for two milliseconds.

        A broker sends each message by itself; taking each as it comes costs more than the message.
        A read that brought much already is followed by the next at once.
        """
        if self.transport is not None and not self._resting:
            self._resting = True
            self.transport.pause_reading()
            self._loop.call_later(_REST_SECONDS, self._read_on)

    def _read_on(self) -> None:
        self._resting = False
        transport = self.transport
        if transport is not None and not self.paused and not transport.is_closing():
            transport.resume_reading()

    def resume_if_room(self) -> None:
        """Read on when enough was acknowledged."""
        if not self._ingest.over_receive_maximum():
            self.paused = False
            self.session.heard(self._loop.time())
            if self.transport is not None:
                self.transport.resume_reading()

    def _pause(self) -> None:
        """Stop reading from a broker that sends beyond the Receive Maximum.

        MQTT 5 §3.3.4 lets a client disconnect such a server. mosquitto does so whenever it resumes
        a session with a queue, and would do it again: TCP's back pressure bounds memory instead.
        A broker that keeps to the Receive Maximum never gets here.
        """
        if self.transport is not None and not self.paused:
            self.paused = True
            self.transport.pause_reading()
            _log.warning(
                "the broker sends beyond the Receive Maximum: reading waits for acks",
                limit_by="receive_maximum",
            )

    def eof_received(self) -> bool:
        self.fail(ConnectionLost("closed_by_broker", "the broker closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.fail(ConnectionLost("network", str(exc) if exc else "the connection was closed"))
        if not self.closed.done():
            self.closed.set_result(None)

    def _tick_later(self) -> None:
        self._ticker = self._loop.call_later(
            self.session.keep_alive_seconds / _TICKS_A_KEEP_ALIVE, self._tick
        )

    def _tick(self) -> None:
        if self.ended.done():
            return
        now = self._loop.time()
        if self.paused:
            self.session.heard(now)
        try:
            self.session.tick(now)
        except ConnectionLost as error:
            self.fail(error)
            if self.transport is not None:
                self.transport.abort()
            return
        self._flush()
        self._tick_later()

    def _check_open(self) -> None:
        """End a connection whose CONNACK or SUBACK has not come within the connect time-out."""
        if self.subscribed_at is not None:
            return
        if self.paused:  # the answer may be among what is not read yet
            self._opening = self._loop.call_later(_FAREWELL_SECONDS, self._check_open)
            return
        what = "SUBACK" if self.session_started else "CONNACK"
        self.fail(ConnectionLost("no_answer", f"the broker sent no {what} in time"))
        if self.transport is not None:
            self.transport.abort()

    def fail(self, error: MqttError, farewell: int | None = None) -> None:
        if self.ended.done():
            return
        self.ended.set_exception(error)
        # Whoever waits may be gone by now (the process is leaving): that is no lost exception.
        self.ended.exception()
        self.session.outgoing.clear()  # nothing may follow DISCONNECT
        if farewell is not None and self.transport is not None:
            self.transport.write(self.session.farewell(farewell))

    def _report(self) -> None:
        for event in self.session.events:
            if isinstance(event, Connected):
                self.session_started = True
                # From here on the keep-alive is known; until then `_check_open` watches.
                self._tick_later()
                self._ingest.connected(session_present=event.session_present)
            else:
                self.subscribed_at = self._loop.time()
                self._ingest.subscribed_now()
        self.session.events.clear()

    def _flush(self) -> None:
        outgoing = self.session.outgoing
        if outgoing:
            if self.transport is not None:
                self.transport.write(b"".join(outgoing))
            outgoing.clear()

    def _resize(self, rest: int) -> None:
        """Grow for a packet larger than the buffer, shrink back when it is through."""
        size = len(self._buffer)
        if rest == size:
            limit = self.session.options.maximum_packet_size_bytes + _BUFFER_BYTES
            grown = memoryview(bytearray(min(size * 4, max(limit, size + _BUFFER_BYTES))))
            grown[:rest] = self._buffer
            self._buffer = grown
        elif size > _BUFFER_BYTES and not rest:
            self._buffer = memoryview(bytearray(_BUFFER_BYTES))
