"""The ingest connection: kept, and made again whenever it ends.

Lives here: when to connect, and how long to wait before. Rules: reconnects back off with full
jitter; the broker's session is never ended or unsubscribed, only left. Must not come in: what a
message means, when it may be acknowledged, bytes and sockets (`mqtt.transport`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from shadowsvc.backoff import login_wait_seconds, wait_seconds
from shadowsvc.errors import ConnectionLost, MqttError
from shadowsvc.mqtt.session import Session, SessionOptions
from shadowsvc.mqtt.transport import Endpoint, Ingest, Wire, open_wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Connection", "Endpoint", "Ingest"]

_log = structlog.get_logger(__name__)

_STABLE_SECONDS = 10.0
# By these a broker says that it does not like who we are; the names are MQTT 5's (§3.2.2.2).
_REFUSED_LOGINS = frozenset(
    {"connack_bad_user_name_or_password", "connack_not_authorized", "connack_banned"}
)
_INTERVAL_JITTER = 0.2


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
        self.last_error: str | None = None
        """What ended the last connection, for people."""
        self.identify: Callable[[], Awaitable[str]] | None = None
        """Awaited before every CONNECT: the client id to use. It may take as long as it likes."""
        self.subscribed_again: Callable[[], None] = lambda: None
        """Called when the broker granted every filter once more."""
        self._ingest = ingest
        self._jitter = jitter
        self._protocol: Wire | None = None
        self._stopping = asyncio.Event()
        self._away: set[str] = set()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._hurry = asyncio.Event()
        self._logins = [_login(options)]
        """The login that counts, and the one before while the broker refuses it."""
        self._refusals = 0

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
                failures = 1 if self._was_stable or self._away else failures + 1
                delay = self._delay(error, failures)
                if not stopping.is_set() and not self._away:
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
                        await self._hurry.wait()
                self._hurry.clear()
            await self._wanted.wait()

    def send(self, data: bytes) -> None:
        """Write to the present connection.

        Without one, or once it has ended, the bytes are dropped: they are stale acks, and
        nothing may follow a DISCONNECT (MQTT-3.14.4-1).
        """
        protocol = self._protocol
        if protocol is not None:
            protocol.send(data)

    def reconnect(self, reason: str) -> None:
        """Leave the present connection, keeping the session, and make a new one."""
        protocol = self._protocol
        if protocol is not None:
            protocol.fail(ConnectionLost(reason, "leaving to connect anew"), farewell=0)

    def renew_login(self, username: str | None, password: bytes | None) -> None:
        """Use another login, or other certificates with the same one: connect anew, at once.

        The broker may learn of a new login later than we do. So while it refuses the new one, the
        one before is tried in turn with it.
        """
        new, old = (username, password), _login(self.options)
        self._logins = [new] if new == old else [new, old]
        self.options = replace(self.options, username=username, password=password)
        self._refusals = 0
        self.reconnect("credentials")
        self._hurry.set()

    def subscribe_again(self) -> bool:
        """Send SUBSCRIBE once more; False when not subscribed or when an answer is awaited.

        Idempotent (MQTT 5 §3.8.4). A refusal, or no answer within `connect_timeout_seconds`, ends
        the connection.
        """
        protocol = self._protocol
        return protocol is not None and protocol.subscribe_again(
            self.endpoint.connect_timeout_seconds
        )

    async def finish(self) -> None:
        """Leave for good: DISCONNECT keeping the session, then close; takes at most a second."""
        self._stopping.set()
        self._wanted.set()
        self._hurry.set()
        await self._depart(ConnectionLost("stopping", "leaving for good"))

    async def leave(self, reason: str) -> None:
        """Leave as `finish` does, and stay away until `come_back` with the same `reason`.

        Reasons are metric labels; there may be several at a time. What is being connected is given
        up before CONNECT is sent.
        """
        self._away.add(reason)
        if not self._stopping.is_set():
            self._wanted.clear()
        await self._depart(ConnectionLost(reason, f"leaving for a while: {reason}"))

    def come_back(self, reason: str) -> None:
        """Take back `leave`; with the last reason gone the service connects again."""
        self._away.discard(reason)
        if not self._away:
            self._wanted.set()

    async def _depart(self, error: ConnectionLost) -> None:
        protocol = self._protocol
        if protocol is None or protocol.transport is None:
            return
        protocol.lingers = True
        protocol.fail(error, farewell=0)
        await protocol.close_gently()

    @property
    def _was_up(self) -> bool:
        return self._protocol is not None and self._protocol.session_started

    @property
    def _was_stable(self) -> bool:
        since = None if self._protocol is None else self._protocol.subscribed_at
        return since is not None and asyncio.get_running_loop().time() - since > _STABLE_SECONDS

    def _delay(self, error: MqttError, failures: int) -> float:
        """Return how long to wait after `error`: longer, and never short, after a refused login."""
        used = None if self._protocol is None else _login(self._protocol.session.options)
        if error.reason not in _REFUSED_LOGINS:
            if self._was_up:
                self._refusals = 0
                if used == self._logins[0]:
                    del self._logins[1:]
            return self._backoff(failures)
        if used != _login(self.options):
            return self._backoff(1)  # another one came meanwhile
        self._refusals += 1
        if len(self._logins) > 1:
            username, password = self._logins[1 - self._logins.index(used)]
            self.options = replace(self.options, username=username, password=password)
            if self._refusals == 1:
                return self._backoff(1)
        endpoint = self.endpoint
        return login_wait_seconds(
            self._refusals,
            endpoint.login_retry_min_seconds,
            endpoint.login_retry_max_seconds,
            self._jitter,
        )

    def _backoff(self, failures: int) -> float:
        endpoint = self.endpoint
        return wait_seconds(
            failures, endpoint.reconnect_min_seconds, endpoint.reconnect_max_seconds, self._jitter
        )

    async def _serve(self) -> None:
        """One connection from connect to its end; raises the `MqttError` that ended it."""
        self._protocol = None
        endpoint = self.endpoint
        loop = asyncio.get_running_loop()
        receive_maximum = await self._ingest.begin_connection()
        self._go_on()
        if self.identify is not None:
            client_id = await self.identify()
            self._go_on()
            self.options = replace(self.options, client_id=client_id)
        session = Session(self.options, self._ingest.publish)
        protocol = Wire(session, self._ingest, loop)
        deadline = loop.time() + endpoint.connect_timeout_seconds
        try:
            await open_wire(endpoint, protocol, deadline)
            self._go_on()
            self._protocol = protocol
            protocol.subscribed_again = self.subscribed_again
            protocol.start(receive_maximum, deadline)
            while not protocol.ended.done():
                await asyncio.wait([protocol.ended], timeout=self._resubscribe_seconds())
                protocol.subscribe_again(endpoint.connect_timeout_seconds)
            protocol.ended.result()
        finally:
            protocol.stop_timers()
            # `_depart` closes by itself, when it has read to the end.
            if protocol.transport is not None and not protocol.lingers:
                protocol.transport.close()

    def _resubscribe_seconds(self) -> float | None:
        seconds = self.endpoint.resubscribe_seconds
        if not seconds:
            return None
        return seconds * self._jitter(1 - _INTERVAL_JITTER, 1 + _INTERVAL_JITTER)

    def _go_on(self) -> None:
        """Raise when `finish` or `leave` came while something was waited for."""
        if self._stopping.is_set():
            raise ConnectionLost("stopping", "leaving for good")
        for reason in self._away:
            raise ConnectionLost(reason, f"leaving for a while: {reason}")


def _login(options: SessionOptions) -> tuple[str | None, bytes | None]:
    return options.username, options.password
