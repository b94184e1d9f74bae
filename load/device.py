"""One MQTT 5 client, without I/O: bytes to send come out, bytes received go in, events come back.

Lives here: CONNECT to DISCONNECT of one device on the mqtt5 codec, plain or wrapped in WebSocket.
Rules:

- No clock, no socket, no task: the owner sends what is returned, reads, and decides when to ping.
- Every method that returns bytes returns what goes to the socket as it is, wrapped already.
- What the device has to answer by itself (PUBACK of a QoS 1 delivery, WebSocket pong) lies in
  `pending`; the owner sends and empties it after each `receive`.
- Packet ids count up and begin again (1 to 65535). The owner knows what is on its way, and never
  has as much as 65535 of that.
- A device at rest holds no buffer and no list: a rig has tens of thousands of them.

    device = Device("lamp-1", websocket=WebSocketClient("localhost:8080"))
    send(device.connect())
    for event in device.receive(data):  # Connected(session_present=False, …)
        packet_id, data = device.publish("things/lamp-1/shadow/update", b"{…}", qos=1)
        send(data)  # later: Acknowledged(packet_id, reason=0)

Must not come in: reconnecting, timing, statistics, what is published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import mqtt5

from load.errors import BrokenConnection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from load.websocket import WebSocketClient

__all__ = [
    "PONG",
    "Acknowledged",
    "Closed",
    "Connected",
    "Device",
    "Event",
    "Message",
    "Pong",
    "Subscribed",
]

_MAX_PACKET_ID: Final = 65_535
_REFUSED: Final = 128
_QOS: Final = (mqtt5.QoS.AT_MOST_ONCE, mqtt5.QoS.AT_LEAST_ONCE)
_PINGREQ: Final = mqtt5.PingReqPacket().write()
_DISCONNECT: Final = mqtt5.DisconnectPacket().write()


class Connected(NamedTuple):
    """CONNACK with success."""

    session_present: bool
    receive_maximum: int = _MAX_PACKET_ID
    """Publishes of QoS 1 that the broker takes without having answered, 1 to 65535."""
    keep_alive_seconds: int | None = None
    """What the broker sets instead of ours (MQTT-3.2.2-21); None: ours holds."""


class Subscribed(NamedTuple):
    """SUBACK; every filter was granted if no reason is 128 or more."""

    packet_id: int
    reasons: tuple[int, ...]

    @property
    def granted(self) -> bool:
        """Whether every filter was granted."""
        return all(reason < _REFUSED for reason in self.reasons)


class Acknowledged(NamedTuple):
    """PUBACK. Reason 0 is success, 16 that nobody is subscribed, 128 and more a refusal."""

    packet_id: int
    reason: int


class Message(NamedTuple):
    """A PUBLISH of the broker; its PUBACK, if it needs one, is in `pending` already."""

    topic: str
    payload: bytes
    duplicate: bool = False


class Pong(NamedTuple):
    """PINGRESP."""


class Closed(NamedTuple):
    """CONNACK with a refusal, DISCONNECT, or a WebSocket close: the connection is over."""

    reason: str
    """For people and as a key of counts: `connack not authorized`, `disconnect server busy`, …"""
    code: int = 0
    """MQTT's reason code."""


Event = Connected | Subscribed | Acknowledged | Message | Pong | Closed
PONG: Final = Pong()


class Device:
    """One client.

    Args:
        client_id: as the broker shall know it.
        keep_alive_seconds: announced in CONNECT, 0 to 65535; 0: none.
        clean_start: whether the broker forgets an older session of this id.
        session_expiry_seconds: how long the broker keeps the session after the connection.
        username: None: none is sent.
        password: likewise.
        websocket: wraps everything if given; the device takes it over.
    """

    __slots__ = (
        "_buffer",
        "_packet_id",
        "clean_start",
        "client_id",
        "connected",
        "keep_alive_seconds",
        "password",
        "pending",
        "session_expiry_seconds",
        "username",
        "websocket",
    )

    def __init__(
        self,
        client_id: str,
        *,
        keep_alive_seconds: int = 60,
        clean_start: bool = True,
        session_expiry_seconds: int = 0,
        username: str | None = None,
        password: bytes | None = None,
        websocket: WebSocketClient | None = None,
    ) -> None:
        self.client_id = client_id
        self.keep_alive_seconds = keep_alive_seconds
        self.clean_start = clean_start
        self.session_expiry_seconds = session_expiry_seconds
        self.username = username
        self.password = password
        self.websocket = websocket
        self.connected = False
        """CONNACK came and the connection is not over, as far as the device was told."""
        self.pending = b""
        """To be sent, in answer to what came; the owner empties it."""
        self._packet_id = 0
        self._buffer = b""

    def connect(self) -> bytes:
        """Return what begins a connection: CONNECT, or WebSocket's handshake (CONNECT follows it).

        What an earlier connection left is forgotten, but packet ids go on.
        """
        self.connected = False
        self.pending = self._buffer = b""
        if self.websocket is not None:
            return self.websocket.request()
        return self._hello()

    def subscribe(self, topic: str | Iterable[str], qos: int = 1) -> bytes:
        """Return SUBSCRIBE for one filter or several, at most `qos` (0 or 1)."""
        filters = [topic] if isinstance(topic, str) else list(topic)
        packet = mqtt5.SubscribePacket(
            self._next_id(), [mqtt5.TopicFilter(one, max_qos=_QOS[qos]) for one in filters]
        )
        return self._wrap(packet.write())

    def publish(
        self,
        topic: str,
        payload: bytes,
        qos: int = 1,
        *,
        again: int | None = None,
    ) -> tuple[int, bytes]:
        """Return packet id (0 for QoS 0) and PUBLISH.

        Args:
            topic: a topic name.
            payload: any bytes.
            qos: 0 or 1.
            again: packet id of an earlier publish that the resumed session still knows: it is sent
                once more with that id and DUP (MQTT-4.4.0-1).
        """
        if qos == 0:
            return 0, self._wrap(mqtt5.PublishPacket(topic, payload).write())
        packet_id = self._next_id() if again is None else again
        packet = mqtt5.PublishPacket(
            topic, payload, qos=_QOS[1], packet_id=packet_id, duplicate=again is not None
        )
        return packet_id, self._wrap(packet.write())

    def ping(self) -> bytes:
        """Return PINGREQ."""
        return self._wrap(_PINGREQ)

    def disconnect(self) -> bytes:
        """Return DISCONNECT with success, upon which the broker drops the will."""
        self.connected = False
        data = self._wrap(_DISCONNECT)
        return data if self.websocket is None else data + self.websocket.close()

    def receive(self, data: bytes) -> list[Event]:
        """Take what came from the network, in any division; return what it means, in order.

        Raises:
            BrokenConnection: bytes that break a standard; the connection has to be closed.
        """
        events: list[Event] = []
        websocket = self.websocket
        if websocket is not None:
            was_upgraded = websocket.upgraded
            parts = websocket.receive(data)
            if not was_upgraded and websocket.upgraded:
                self.pending += self._hello()
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            if websocket.pending:
                self.pending += websocket.pending
                websocket.pending = b""
        if data:
            self._read(data, events)
        if websocket is not None and websocket.closed:
            self.connected = False
            events.append(Closed("websocket close"))
        return events

    def _read(self, data: bytes, events: list[Event]) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        view = memoryview(data)
        used, size = 0, len(data)
        while used < size:
            try:
                packet, length = mqtt5.read(view[used:] if used else view)
            except IndexError:
                self._buffer = data[used:]
                return
            except ValueError as error:
                raise BrokenConnection(f"malformed packet: {error}") from None
            except BaseException as error:
                # The codec's panic on a topic that is not UTF-8 derives from BaseException.
                if type(error).__name__ != "PanicException":
                    raise
                raise BrokenConnection("malformed packet") from None
            used += length
            events.append(self._event(packet))

    def _event(self, packet: mqtt5.Packet) -> Event:
        match packet:
            case mqtt5.PubAckPacket():
                return Acknowledged(packet.packet_id, int(packet.reason_code))
            case mqtt5.PublishPacket():
                if packet.packet_id is not None:
                    self.pending += self._wrap(mqtt5.PubAckPacket(packet.packet_id).write())
                return Message(packet.topic, packet.payload, packet.duplicate)
            case mqtt5.PingRespPacket():
                return PONG
            case mqtt5.ConnAckPacket():
                return self._connack(packet)
            case mqtt5.SubAckPacket():
                return Subscribed(packet.packet_id, tuple(int(one) for one in packet.reason_codes))
            case mqtt5.DisconnectPacket():
                self.connected = False
                return Closed(f"disconnect {_words(packet.reason_code)}", int(packet.reason_code))
            case _:
                raise BrokenConnection(f"{type(packet).__name__} is not for a device")

    def _connack(self, packet: mqtt5.ConnAckPacket) -> Event:
        code = int(packet.reason_code)
        if code >= _REFUSED:
            return Closed(f"connack {_words(packet.reason_code)}", code)
        self.connected = True
        return Connected(packet.session_present, packet.receive_max, packet.server_keep_alive)

    def _hello(self) -> bytes:
        return self._wrap(
            mqtt5.ConnectPacket(
                self.client_id,
                username=self.username,
                password=self.password,
                clean_start=self.clean_start,
                keep_alive=self.keep_alive_seconds,
                session_expiry_interval=self.session_expiry_seconds,
            ).write()
        )

    def _next_id(self) -> int:
        self._packet_id = self._packet_id % _MAX_PACKET_ID + 1
        return self._packet_id

    def _wrap(self, data: bytes) -> bytes:
        return data if self.websocket is None else self.websocket.frame(data)


def _words(code: mqtt5.ConnAckReasonCode | mqtt5.DisconnectReasonCode) -> str:
    return code.name.lower().replace("_", " ")
