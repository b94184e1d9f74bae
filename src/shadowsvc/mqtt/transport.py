"""One network connection to the broker: socket, TLS and keep-alive around `mqtt.session`.

Lives here: everything about a subscriber's connection that waits for the network; `mqtt.connection`
keeps the ingest connection with it, `mqtt.adoption` the one that empties an orphaned slot. Rules:
reading and keep-alive never wait for anything but the network; a connect has a time limit, name
resolution included; a connection that is left is closed so that what was written last arrives.
Must not come in: reconnecting, what a message means, when it may be acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog

from shadowsvc.errors import ConnectionLost, CredentialsUnusable, MqttError, ProtocolViolation
from shadowsvc.mqtt.session import Connected, Session, State, SubscribedAgain

if TYPE_CHECKING:
    from collections.abc import Callable

    import mqtt5

__all__ = ["Endpoint", "Ingest", "Wire", "open_wire"]

_log = structlog.get_logger(__name__)

_BUFFER_BYTES = 256 * 1024
_FULL_READ_BYTES = 32 * 1024
_RECEIVE_BUFFER_BYTES = 192 * 1024
"""Of the kernel, which doubles it, and grants 208 KiB where nobody raised net.core.rmem_max. Left
alone it grows to megabytes: messages that wait for this process alone, in nobody's budget."""
_REST_SECONDS = 0.002
_BACKLOG_BYTES_A_SECOND = 16 * 1024
"""Messages that come faster than this may have an answer behind them."""
_TICKS_A_KEEP_ALIVE = 8
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

    `tls` returns the TLS context of each connect, so that rotated certificates are picked up, or
    raises `CredentialsUnusable`; None means plain TCP.
    """

    host: str
    port: int
    tls: Callable[[], ssl.SSLContext] | None = None
    connect_timeout_seconds: float = 10.0
    """Also for the answer to a SUBSCRIBE that is sent again."""
    reconnect_min_seconds: float = 0.2
    reconnect_max_seconds: float = 30.0
    login_retry_min_seconds: float = 10.0
    """After a refused login: a broker may lock accounts that try too often."""
    login_retry_max_seconds: float = 300.0
    resubscribe_seconds: float = 0.0
    """SUBSCRIBE again at this interval, give or take a fifth; 0: never."""


async def open_wire(endpoint: Endpoint, wire: Wire, deadline: float) -> None:
    """Connect `wire` by `deadline` (the loop's time), name resolution and TLS included.

    Raises `ConnectionLost`; its message names the setting to change.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(deadline):
            context = None if endpoint.tls is None else await asyncio.to_thread(endpoint.tls)
            transport, _ = await loop.create_connection(
                lambda: wire,
                endpoint.host,
                endpoint.port,
                ssl=context,
                server_hostname=endpoint.host if context else None,
                ssl_shutdown_timeout=_FAREWELL_SECONDS if context else None,
            )
            if not transport.is_closing():
                transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES
                )
    except TimeoutError:
        raise ConnectionLost(
            "connect_timeout",
            f"no connection within SHADOWSVC_MQTT__CONNECT_TIMEOUT_SECONDS "
            f"({endpoint.connect_timeout_seconds:g})",
        ) from None
    except CredentialsUnusable as error:
        raise ConnectionLost("tls", f"no TLS with these files: {error}") from None
    except ssl.SSLError as error:
        raise ConnectionLost("tls", f"TLS failed: {error}; see SHADOWSVC_MQTT__CA_FILE") from None
    except (OSError, UnicodeError) as error:  # UnicodeError: no name that DNS could hold
        raise ConnectionLost("connect", f"{error}; see SHADOWSVC_MQTT__URL") from None


class Wire(asyncio.BufferedProtocol):
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
        self.closed_by_broker = False
        """The broker has said that it sends nothing more."""
        self.lingers = False
        """Left in good order: whoever left reads to the end and closes."""
        self.subscribed_again: Callable[[], None] = lambda: None
        """Called when the broker granted every filter once more."""
        self._ingest = ingest
        self._loop = loop
        self._resting = False
        self.paused = False
        """Not reading: the broker sends beyond the Receive Maximum."""
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._filled = 0
        self._opening: asyncio.TimerHandle | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._suback_watch: asyncio.TimerHandle | None = None
        self._was_paused = False
        self._read_bytes = 0
        self._looked = (0, loop.time())
        """Bytes read until the last look for a late answer, and when that was."""

    def start(self, receive_maximum: int, deadline: float) -> None:
        """Send CONNECT; CONNACK and SUBACK have to be here at `deadline` (the loop's time)."""
        now = self._loop.time()
        self._opening = self._loop.call_at(deadline, self._check_open, deadline - now)
        self.session.connect(now, receive_maximum)
        self._flush()

    def send(self, data: bytes) -> None:
        """Write acks, unless the connection has ended: nothing may follow DISCONNECT."""
        if not self.ended.done() and self.transport is not None:
            self.transport.write(data)
            if self.paused:
                self.resume_if_room()

    def stop_timers(self) -> None:
        """Stop ticking: the connection has ended."""
        for timer in (self._opening, self._ticker, self._suback_watch):
            if timer is not None:
                timer.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self.transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the protocol's signature
        """asyncio: where to read to."""
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio: bytes were read. Hands them to the session and sends what it answers."""
        self._read_bytes += nbytes
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
            self.paused = self._was_paused = True
            self.transport.pause_reading()
            _log.warning(
                "the broker sends beyond the Receive Maximum: reading waits for acks",
                limit_by="receive_maximum",
            )

    def eof_received(self) -> bool:
        """asyncio: the broker sends nothing more."""
        self.closed_by_broker = True
        self.fail(ConnectionLost("closed_by_broker", "the broker closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the transport is gone."""
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
            self._give_up(error)
            return
        self._flush()
        self._tick_later()

    def _may_be_behind(self) -> bool:
        """Whether an answer that is late may come behind messages: not read yet, or not yet sent.

        A broker with a backlog for us puts SUBACK behind it. To leave then would bring the whole
        backlog again, and again the answer behind it. Who gets so much is subscribed anyway.
        """
        now = self._loop.time()
        read, since = self._looked
        self._looked = (self._read_bytes, now)
        return self.paused or self._read_bytes - read > _BACKLOG_BYTES_A_SECOND * (now - since)

    def _check_open(self, seconds: float) -> None:
        """End a connection whose CONNACK or SUBACK has not come within the connect time-out.

        A broker with a long queue may pause for a second; what came in as long as that tells more.
        """
        if self.subscribed_at is not None:
            return
        if self._may_be_behind():
            self._opening = self._loop.call_later(seconds, self._check_open, seconds)
            return
        what = "SUBACK" if self.session_started else "CONNACK"
        self._give_up(ConnectionLost("no_answer", f"the broker sent no {what} in time"))

    def subscribe_again(self, limit_seconds: float) -> bool:
        """Send SUBSCRIBE on a live session; tell whether it was sent.

        A refusal, or no answer within `limit_seconds`, ends the connection.
        """
        if self.ended.done() or not self.session.subscribe_again():
            return False
        self._flush()
        self._watch_suback(limit_seconds)
        return True

    def _watch_suback(self, seconds: float) -> None:
        self._was_paused = self.paused
        self._looked = (self._read_bytes, self._loop.time())
        due = self._loop.time() + seconds
        if self._suback_watch is not None:
            self._suback_watch.cancel()  # of a SUBSCRIBE that was answered
        self._suback_watch = self._loop.call_at(due, self._check_suback, seconds, due)

    def _check_suback(self, seconds: float, due: float) -> None:
        if self.ended.done() or not self.session.awaits_suback:
            return
        # Reading was paused in between, or this whole process.
        stopped = self._was_paused or self._loop.time() - due > _FAREWELL_SECONDS
        if stopped or self._may_be_behind():
            self._watch_suback(seconds)
            return
        self._give_up(ConnectionLost("no_answer", "the broker sent no SUBACK in time"))

    def fail(self, error: MqttError, farewell: int | bytes | None = None) -> None:
        """End with `error`, once; `farewell` is the DISCONNECT to send or its code, if any."""
        if self.ended.done():
            return
        self.ended.set_exception(error)
        # Whoever waits may be gone by now (the process is leaving): that is no lost exception.
        self.ended.exception()
        self.session.outgoing.clear()  # nothing may follow DISCONNECT
        if farewell is not None and self.transport is not None:
            if not isinstance(farewell, bytes):
                farewell = self.session.farewell(farewell)
            self.transport.write(farewell)

    def _give_up(self, error: ConnectionLost) -> None:
        """End with `error`, and with the connection: nobody answers at the other end."""
        self.fail(error)
        if self.transport is not None:
            self.transport.abort()

    async def close_gently(self) -> bool:
        """Half-close, read to the end, close; takes at most a second.

        A close with unread bytes would reset the connection and could lose the last acks on their
        way. TLS knows no half-close: there the broker closes when it has read DISCONNECT (MQTT 5
        §3.14.4). True when the broker closed by itself: it has read all then, unless the connection
        was lost at this very moment, which looks the same.
        """
        transport = self.transport
        if transport is None:
            return self.closed_by_broker
        if not transport.is_closing():
            transport.resume_reading()
            if transport.can_write_eof():
                with contextlib.suppress(OSError):  # the other end is gone, and is so at once
                    transport.write_eof()
        await asyncio.wait([self.closed], timeout=_FAREWELL_SECONDS)
        if not self.closed.done():
            transport.abort()
            return False
        return self.closed_by_broker

    def _report(self) -> None:
        for event in self.session.events:
            if isinstance(event, Connected):
                self.session_started = True
                # From here on the keep-alive is known; until then `_check_open` watches.
                self._tick_later()
                self._ingest.connected(session_present=event.session_present)
            elif isinstance(event, SubscribedAgain):
                self.subscribed_again()
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
