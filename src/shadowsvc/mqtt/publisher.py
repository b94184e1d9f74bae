"""The outbound connection: publishing over MQTT 5 through aiomqtt.

Lives here: one connection that publishes, with a window of unacknowledged publishes, reconnects,
and aiomqtt's and paho's errors turned into ours. Simulated devices, and everything else that
publishes, go through here; updates come in through `session`, which does not touch this room.

Rules:
- A publish ends with the broker's own reason code. `aiomqtt.Client.publish` throws that code away,
  so a publish refused by the broker would look like a success (MQTT 5 §3.4.2.1), and its cost grows
  with the number of publishes under way. So the paho client below aiomqtt is asked to publish, and
  its `on_publish` callback answers. `_Client` is the one class that knows aiomqtt's inside.
- At most `max_in_flight` publishes wait for their acknowledgement, fewer if the broker's Receive
  Maximum says so (MQTT 5 §3.2.2.3.3); paho itself ignores what the broker announces.
- What is in flight when the connection ends fails with `ConnectionLost`: nobody knows whether the
  broker has it. Sending it again is the caller's decision.
- Nothing here blocks the loop: aiomqtt connects in a thread, TLS files are read in one.

Subscriptions, and what a publish means, must not come in here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING, Any, Self

import aiomqtt
import structlog
from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY, MQTT_ERR_SUCCESS, error_string
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from shadowsvc.backoff import wait_seconds
from shadowsvc.errors import ConnectionLost, MqttError, MqttRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from paho.mqtt.client import Client as PahoClient
    from paho.mqtt.client import ConnectFlags

    from shadowsvc.settings import Mqtt

__all__ = ["NO_MATCHING_SUBSCRIBERS", "SUCCESS", "Publisher"]

SUCCESS = 0x00
"""PUBACK: the broker has the message."""
NO_MATCHING_SUBSCRIBERS = 0x10
"""PUBACK: the broker took the message and nobody gets it (MQTT 5 §3.4.2.1)."""

_FIRST_FAILURE_CODE = 0x80
_MAX_RECEIVE_MAXIMUM = 65_535
_LOGIN_CODES = frozenset({0x86, 0x87, 0x8C})

_log = structlog.get_logger(__name__)


class _TlsSocket(ssl.SSLSocket):
    """A socket that is closed when its handshake fails; paho would leave it open."""

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002 - its signature
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class _Client(aiomqtt.Client):
    """aiomqtt with what it hides: reason codes, the broker's Receive Maximum, paho's publish."""

    def __init__(self, on_done: Callable[[int, int], None], *args: Any, **kwargs: Any) -> None:
        self._on_done = on_done
        self.receive_maximum = _MAX_RECEIVE_MAXIMUM
        super().__init__(*args, **kwargs)
        self.paho: PahoClient = self._client
        # One formatted log call a packet, which nobody reads.
        self.paho.disable_logger()

    def _on_connect(
        self,
        client: PahoClient,
        userdata: Any,
        flags: ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        announced = getattr(properties, "ReceiveMaximum", None)
        if announced is not None:
            self.receive_maximum = int(announced)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self,
        client: PahoClient,  # noqa: ARG002 - the callback's signature
        userdata: Any,  # noqa: ARG002
        mid: int,
        reason_code: ReasonCode,
        properties: Properties,  # noqa: ARG002
    ) -> None:
        self._on_done(mid, reason_code.value)


class _Link:
    """One connection's life: the client, its window, and what is in flight on it."""

    def __init__(self, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.alive = True
        self.pending: dict[int, asyncio.Future[int]] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def room(self) -> None:
        """Wait until a publish more may be in flight, or until this connection has ended."""
        while self.alive and len(self.pending) >= self.max_in_flight:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._waiting = deque(other for other in self._waiting if other is not waiter)
                self._wake()  # our turn may have been given to us already
                raise

    def done(self, mid: int, code: int) -> None:
        """Take the broker's answer to a publish (or, for QoS 0, paho's that it was written)."""
        future = self.pending.pop(mid, None)
        if future is None:
            return
        if not future.done():
            if code < _FIRST_FAILURE_CODE:
                future.set_result(code)
            else:
                future.set_exception(_publish_refused(code))
        self._wake()

    def end(self, error: Exception) -> None:
        """Fail what is in flight and let go everybody who waits for room."""
        self.alive = False
        pending, self.pending = self.pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(error)
        while self._waiting:
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class Publisher:
    """A connection to the broker that publishes; an asynchronous context manager.

    Entering connects and fails if that fails. Afterwards a lost connection is made again, with full
    jitter between `reconnect_min_seconds` and `reconnect_max_seconds`, until the context is left.
    Measured on one core: about 20,000 QoS 1 publishes/s a connection with 100 bytes each.

    Args:
        settings: the `mqtt` part of the settings. Its `client_id` is the service's and not used.
        client_id: MQTT client identifier, of this connection alone.
        max_in_flight: publishes under way at the same time (1 to 65535). More than about 200 do not
            make a connection on a local network faster.
        reconnect: whether to reconnect at all; when False a lost connection stays lost.
    """

    def __init__(
        self,
        settings: Mqtt,
        *,
        client_id: str,
        max_in_flight: int = 128,
        reconnect: bool = True,
    ) -> None:
        if not 1 <= max_in_flight <= _MAX_RECEIVE_MAXIMUM:
            raise ValueError(f"max_in_flight is {max_in_flight}, not in 1..{_MAX_RECEIVE_MAXIMUM}")
        self._settings = settings
        self._client_id = client_id
        self._max_in_flight = max_in_flight
        self._reconnect = reconnect
        self._random = random.Random()  # noqa: S311 - jitter
        self._client: _Client | None = None
        self._link: _Link | None = None
        self._changed = asyncio.Event()  # a link came up, or none ever will
        self._failure: MqttError | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.reconnects = 0
        """Connections made after the first one."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._link is not None

    @property
    def in_flight(self) -> int:
        """Publishes not yet acknowledged."""
        return 0 if self._link is None else len(self._link.pending)

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            ConnectionLost: no connection; the message names the settings.
            MqttRefused: the broker refused CONNECT.
        """
        await self._connect()
        self._keeper = asyncio.create_task(self._keep(), name=f"publisher {self._client_id}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """`close`."""
        await self.close()

    async def close(self) -> None:
        """DISCONNECT; what is in flight fails with `ConnectionLost`. May be called twice."""
        self._give_up(ConnectionLost("closed", "the publisher is closed"))
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        await self._drop_client()

    async def send(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        user_properties: Iterable[tuple[str, str]] = (),
    ) -> asyncio.Future[int]:
        """Wait for a connection and for room in the window, publish; return the answer to come.

        The future's result is PUBACK's (PUBCOMP's) reason code below 0x80: `SUCCESS`, or
        `NO_MATCHING_SUBSCRIBERS`. For QoS 0 it comes when the packet was written. It fails with
        `MqttRefused` (reason code from 0x80) or `ConnectionLost`; its exception must be looked at.

        Raises:
            ConnectionLost: closed, or lost and not to be made again.
            ValueError: a topic with wildcards, or a QoS that is not 0, 1 or 2.
        """
        while True:
            link, client = self._link, self._client
            if link is None or client is None:
                await self._wait_connected()
                continue
            await link.room()
            if not link.alive:
                continue
            info = client.paho.publish(topic, payload, qos, retain, _properties(user_properties))
            if info.rc == MQTT_ERR_SUCCESS:
                break
            # The keeper will see the loss and end the link; until then there is nothing to send on.
            self._lost(link, ConnectionLost("lost", error_string(info.rc)))
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        link.pending[info.mid] = future
        return future

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        user_properties: Iterable[tuple[str, str]] = (),
        limit_seconds: float | None = None,
    ) -> int:
        """`send` and wait for the answer.

        Returns:
            The reason code, as of `send`.

        Raises:
            ConnectionLost: the connection ended before the answer, or `limit_seconds` passed.
            MqttRefused: the broker refused the message.
        """
        try:
            async with asyncio.timeout(limit_seconds):
                return await (
                    await self.send(
                        topic, payload, qos=qos, retain=retain, user_properties=user_properties
                    )
                )
        except TimeoutError:
            raise ConnectionLost(
                "publish_timeout", f"no answer to a publish within {limit_seconds:g} s"
            ) from None

    async def _wait_connected(self) -> None:
        while self._link is None:
            if self._failure is not None:
                raise self._failure
            await self._changed.wait()

    async def _connect(self) -> None:
        """Make a client and connect it; map what goes wrong."""
        settings = self._settings
        password = settings.password
        link = _Link(self._max_in_flight)
        client = _Client(
            link.done,
            settings.host,
            settings.port,
            username=settings.username,
            password=None if password is None else password.get_secret_value(),
            identifier=self._client_id,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=MQTT_CLEAN_START_FIRST_ONLY,
            timeout=settings.connect_timeout_seconds,
            keepalive=settings.keep_alive_seconds,
            # The window is ours: with a limit of its own paho looks at every message in flight
            # at each acknowledgement, and queues without bound behind it.
            max_inflight_messages=0,
            max_queued_outgoing_messages=0,
            tls_context=await self._tls() if settings.tls else None,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        client.paho.connect_timeout = settings.connect_timeout_seconds
        entering = asyncio.ensure_future(client.__aenter__())
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            # The thread that connects cannot be cancelled: wait for it (it has a time-out), so
            # that it does not leave a connection behind.
            with contextlib.suppress(Exception):
                await entering
            client.paho.disconnect()
            raise
        except aiomqtt.MqttError as error:
            client.paho.disconnect()
            raise self._connect_error(error) from error
        link.max_in_flight = min(self._max_in_flight, client.receive_maximum)
        self._client, self._link = client, link
        self._changed.set()

    async def _keep(self) -> None:
        """Watch the connection, and make a new one when it ended."""
        while self._client is not None:
            error = await self._watch(self._client)
            if self._link is not None:
                self._lost(self._link, error)
            await self._drop_client()
            if not self._reconnect:
                self._give_up(error)
                return
            _log.warning("publisher_connection_lost", client_id=self._client_id, error=str(error))
            await self._connect_again()
            self.reconnects += 1
            _log.info("publisher_reconnected", client_id=self._client_id)

    async def _watch(self, client: _Client) -> MqttError:
        """Return when the connection has ended. Nothing is subscribed, so no message comes."""
        try:
            async for _ in client.messages:
                pass
        except aiomqtt.MqttError as error:
            return ConnectionLost("lost", f"connection to {self._where()} lost: {_why(error)}")
        return ConnectionLost("lost", f"connection to {self._where()} ended")

    async def _connect_again(self) -> None:
        settings, tries = self._settings, 0
        least, most = settings.reconnect_min_seconds, settings.reconnect_max_seconds
        while True:
            await asyncio.sleep(wait_seconds(tries + 1, least, most, self._random.uniform))
            try:
                await self._connect()
            except MqttError as error:
                tries += 1
                if tries & (tries - 1) == 0:  # the 1st, 2nd, 4th, 8th ... try
                    _log.warning(
                        "publisher_connect_failed",
                        client_id=self._client_id,
                        error=str(error),
                        tries=tries,
                    )
            else:
                return

    def _lost(self, link: _Link, error: MqttError) -> None:
        if self._link is link:
            self._link = None
            self._changed.clear()
        link.end(error)

    def _give_up(self, error: MqttError) -> None:
        self._failure = self._failure or error
        if self._link is not None:
            self._lost(self._link, error)
        self._changed.set()

    async def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            # A broken connection has nothing more to tell than we know.
            with contextlib.suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)

    async def _tls(self) -> ssl.SSLContext:
        try:
            return await asyncio.to_thread(_tls_context, self._settings)
        except (OSError, ValueError) as error:
            raise MqttError(
                "bad_tls",
                f"cannot load TLS files: {error} (SHADOWSVC_MQTT__CA_FILE, "
                "SHADOWSVC_MQTT__CERTIFICATE_FILE, SHADOWSVC_MQTT__KEY_FILE)",
            ) from error

    def _where(self) -> str:
        return f"{self._settings.host}:{self._settings.port}"

    def _connect_error(self, error: aiomqtt.MqttError) -> MqttError:
        if isinstance(error, aiomqtt.MqttCodeError):
            code = error.rc.value if isinstance(error.rc, ReasonCode) else int(error.rc or 0)
            login = "SHADOWSVC_MQTT__USERNAME and SHADOWSVC_MQTT__PASSWORD"
            hint = f"; see {login}" if code in _LOGIN_CODES else ""
            return MqttRefused(
                "connect_refused",
                f"the broker at {self._where()} refused CONNECT: {error.rc} (0x{code:02x}){hint}",
            )
        text = str(error)
        settings = "SHADOWSVC_MQTT__URL"
        if "timed out" in text:
            settings += " and SHADOWSVC_MQTT__CONNECT_TIMEOUT_SECONDS"
        elif self._settings.tls:
            settings += " and SHADOWSVC_MQTT__CA_FILE"
        return ConnectionLost(
            "connect_failed", f"no connection to {self._where()}: {text}; see {settings}"
        )


def _tls_context(settings: Mqtt) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.ca_file)
    context.sslsocket_class = _TlsSocket
    if settings.certificate_file is not None:
        context.load_cert_chain(settings.certificate_file, settings.key_file)
    return context


def _properties(user_properties: Iterable[tuple[str, str]]) -> Properties | None:
    pairs = list(user_properties)
    if not pairs:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = pairs
    return properties


def _publish_refused(code: int) -> MqttRefused:
    name = ReasonCode(PacketTypes.PUBACK, identifier=code).getName()
    return MqttRefused("publish_refused", f"the broker refused a publish: {name} (0x{code:02x})")


def _why(error: BaseException) -> str:
    cause = error.__cause__
    return str(error if cause is None else cause)
