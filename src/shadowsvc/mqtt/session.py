"""The ingest session: one MQTT 5 client session as a state machine without I/O.

Theory. A session object lives as long as one network connection. Bytes go in by `receive`, time
by `tick`, bytes to send come out of `outgoing`, facts come out of `events`, and every PUBLISH goes
straight to the callback, in the order in which it came.

States and what moves them:

    NEW ──connect()──▶ CONNECTING ──CONNACK 0──▶ SUBSCRIBING ──SUBACK granted──▶ LIVE
                          │ CONNACK ≥ 0x80            │ SUBACK ≥ 0x80
                          ▼                           ▼
                       raises MqttRefused          raises MqttRefused
    LIVE ──subscribe_again()──▶ LIVE, SUBACK awaited ──granted──▶ LIVE; ≥ 0x80 raises MqttRefused
    any state ──DISCONNECT from the broker──▶ raises ConnectionLost
    any state ──bytes that MQTT 5 forbids──▶ raises ProtocolViolation (with the code to answer)
    any state ──nothing heard for 1.5 keep-alives──▶ tick() raises ConnectionLost

Three rules:
1. After an error the session is dead: its owner sends `farewell(code)`, closes, and makes a new
   session. Nothing of it is reused, so no packet id, alias or timer outlives its connection.
2. Publishes may arrive before SUBACK and even before LIVE (a resumed session is served at once,
   MQTT 5 §4.4): they are delivered in every state after CONNACK.
3. One SUBSCRIBE at a time waits for its SUBACK, and each has another packet id than the one before,
   so that an answer belongs to one question.

Must not come in: sockets, asyncio, reconnecting, acks (the ledger makes those), documents.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import mqtt5

from shadowsvc.errors import ConnectionLost, MqttRefused, ProtocolViolation

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Connected",
    "PublishHandler",
    "Session",
    "SessionOptions",
    "State",
    "Subscribed",
    "SubscribedAgain",
]

_MALFORMED = int(mqtt5.DisconnectReasonCode.MALFORMED_PACKET)
_PROTOCOL_ERROR = int(mqtt5.DisconnectReasonCode.PROTOCOL_ERROR)
_TOPIC_ALIAS_INVALID = int(mqtt5.DisconnectReasonCode.TOPIC_ALIAS_INVALID)
_PACKET_TOO_LARGE = int(mqtt5.DisconnectReasonCode.PACKET_TOO_LARGE)
_QOS_NOT_SUPPORTED = int(mqtt5.DisconnectReasonCode.QOS_NOT_SUPPORTED)

_MAX_HEADER_BYTES = 5
_REFUSED = 128
_MAX_PACKET_ID = 65_535
_QOS_2 = mqtt5.QoS.EXACTLY_ONCE


class PublishHandler(Protocol):
    """Takes one PUBLISH: topic (alias resolved), packet (payload, flags, properties)."""

    def __call__(self, topic: str, packet: mqtt5.PublishPacket) -> None:
        """Handle it without blocking and without raising."""


class State(enum.Enum):
    """Where the session is on its way; see the module's diagram."""

    NEW = "new"
    CONNECTING = "connecting"
    SUBSCRIBING = "subscribing"
    LIVE = "live"


@dataclass(frozen=True, slots=True)
class Connected:
    """CONNACK came; `session_present` as the broker said."""

    session_present: bool


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker granted every filter."""


@dataclass(frozen=True, slots=True)
class SubscribedAgain:
    """The broker granted every filter once more."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What CONNECT and SUBSCRIBE say. Sizes in bytes, times in seconds."""

    client_id: str
    filters: tuple[str, ...]
    keep_alive_seconds: int = 30
    session_expiry_seconds: int = 86400
    maximum_packet_size_bytes: int = 1_114_112
    topic_alias_maximum: int = 16
    username: str | None = None
    password: bytes | None = field(default=None, repr=False)
    clean_start: bool = False


class Session:
    """One connection's worth of MQTT 5; see the module's docstring."""

    def __init__(self, options: SessionOptions, on_publish: PublishHandler) -> None:
        self.options = options
        self.state = State.NEW
        self.outgoing: list[bytes] = []
        """Packets to send, oldest first; the owner empties it."""
        self.events: list[Connected | Subscribed | SubscribedAgain] = []
        """Facts, oldest first; the owner empties it."""
        self.keep_alive_seconds = float(options.keep_alive_seconds)
        self.awaits_suback = False
        """Whether a SUBSCRIBE was sent that has no answer yet."""
        self._on_publish = on_publish
        self._subscribe_id = 0
        self._aliases: dict[int, str] = {}
        self._last_heard = 0.0
        self._last_sent = 0.0
        self._last_tick = 0.0
        self._ping_sent: float | None = None

    def connect(self, now: float, receive_maximum: int) -> None:
        """Queue CONNECT, announcing `receive_maximum` (1 to 65535)."""
        options = self.options
        self.state = State.CONNECTING
        self._last_heard = self._last_sent = self._last_tick = now
        self.outgoing.append(
            mqtt5.ConnectPacket(
                options.client_id,
                username=options.username,
                password=options.password,
                clean_start=options.clean_start,
                keep_alive=options.keep_alive_seconds,
                session_expiry_interval=options.session_expiry_seconds,
                receive_max=receive_maximum,
                topic_alias_max=options.topic_alias_maximum,
                max_packet_size=options.maximum_packet_size_bytes,
            ).write()
        )

    def subscribe_again(self) -> bool:
        """Queue SUBSCRIBE on a live session, where it changes nothing unless something was lost.

        MQTT 5 §3.8.4: a subscription that is there already is replaced, and no message is lost by
        it. False, and nothing is sent, while the session is not live or an answer is awaited.
        """
        if self.state is not State.LIVE or self.awaits_suback:
            return False
        self.subscribe()
        return True

    def subscribe(self) -> None:
        """Queue SUBSCRIBE for every filter, QoS 1, no retained messages (retain handling 2)."""
        self._subscribe_id = self._subscribe_id % _MAX_PACKET_ID + 1
        self.awaits_suback = True
        self.outgoing.append(
            mqtt5.SubscribePacket(
                self._subscribe_id,
                [
                    mqtt5.TopicFilter(
                        pattern,
                        max_qos=mqtt5.QoS.AT_LEAST_ONCE,
                        retain_handling=mqtt5.RetainHandling.SEND_NEVER,
                    )
                    for pattern in self.options.filters
                ],
            ).write()
        )

    def receive(
        self,
        view: memoryview,
        now: float,
        read: Callable[[memoryview], tuple[mqtt5.Packet, int]] = mqtt5.read,
        publish: type[mqtt5.PublishPacket] = mqtt5.PublishPacket,
    ) -> int:
        """Take what came from the network; return how many bytes were used.

        The rest is the beginning of a packet: hand it in again with what follows. Raises
        `ProtocolViolation`, `MqttRefused` or `ConnectionLost`.
        """
        self._last_heard = now
        self._ping_sent = None
        used = 0
        end = len(view)
        on_publish = self._on_publish
        accepting = self.state is State.LIVE
        limit = self.options.maximum_packet_size_bytes
        while used < end:
            try:
                packet, size = read(view[used:])
            except IndexError:
                self._check_size(view[used:])
                break
            except ValueError as error:
                raise ProtocolViolation(_MALFORMED, f"malformed packet: {error}") from None
            except BaseException as error:
                # The codec's panic on a topic that is not UTF-8 derives from BaseException.
                if type(error).__name__ != "PanicException":
                    raise
                raise ProtocolViolation(_MALFORMED, "malformed packet") from None
            used += size
            if size > limit:
                raise self._too_large(size)
            if packet.__class__ is publish:
                # The usual one goes straight through; whatever is odd is looked at.
                if (
                    accepting
                    and packet.topic_alias is None
                    and packet.topic
                    and packet.qos is not _QOS_2
                    and packet.packet_id != 0
                ):
                    on_publish(packet.topic, packet)
                    continue
                self._publish(packet)
            else:
                self._control(packet)
        return used

    def heard(self, now: float) -> None:
        """Note that the silence is ours: the owner does not read at present."""
        self._last_heard = now

    def tick(self, now: float) -> None:
        """Let time pass: ping when due; raises `ConnectionLost` when the broker fell silent.

        Call it at least four times a keep-alive. A broker that went away without a word is
        found within 1.5 keep-alives of the last byte heard, as MQTT 5 §3.1.2.10 asks of servers.
        Time for which nobody called is not held against the broker: a process that was stopped
        or starved has to read what waits for it first.
        """
        keep_alive = self.keep_alive_seconds
        if not keep_alive or self.state is State.NEW:
            return
        late = now - self._last_tick - 0.25 * keep_alive
        self._last_tick = now
        if late > 0:
            self._last_heard = min(now, self._last_heard + late)
        if now - self._last_heard >= 1.25 * keep_alive:
            raise ConnectionLost(
                "keep_alive", f"nothing heard from the broker for {now - self._last_heard:.1f} s"
            )
        if self.state is State.CONNECTING:
            return
        if now - self._last_sent >= 0.5 * keep_alive or (
            now - self._last_heard >= 0.5 * keep_alive and self._ping_sent is None
        ):
            self._ping_sent = self._last_sent = now
            self.outgoing.append(_PINGREQ)

    def farewell(self, code: int = 0) -> bytes:
        """Return DISCONNECT with reason `code`; the session expiry stays as CONNECT set it."""
        return mqtt5.DisconnectPacket(reason_code=mqtt5.DisconnectReasonCode(code)).write()

    def _publish(self, packet: mqtt5.PublishPacket) -> None:
        if self.state is State.CONNECTING or self.state is State.NEW:
            raise ProtocolViolation(_PROTOCOL_ERROR, "PUBLISH before CONNACK")
        if packet.qos == 2:  # noqa: PLR2004 - QoS 2
            raise ProtocolViolation(_QOS_NOT_SUPPORTED, "QoS 2 to a subscription of QoS 1")
        if packet.packet_id == 0:
            raise ProtocolViolation(_PROTOCOL_ERROR, "packet id 0")
        topic = packet.topic
        alias = packet.topic_alias
        if alias is not None:
            if alias > self.options.topic_alias_maximum:
                raise ProtocolViolation(_TOPIC_ALIAS_INVALID, f"topic alias {alias} is too large")
            if topic:
                self._aliases[alias] = topic
            else:
                known = self._aliases.get(alias)
                if known is None:
                    raise ProtocolViolation(_PROTOCOL_ERROR, f"topic alias {alias} is unknown")
                topic = known
        elif not topic:
            raise ProtocolViolation(_PROTOCOL_ERROR, "PUBLISH with neither topic nor alias")
        self._on_publish(topic, packet)

    def _control(self, packet: mqtt5.Packet) -> None:
        # No `match`: the compiler knows no class pattern of a package that it does not see.
        if isinstance(packet, mqtt5.ConnAckPacket) and self.state is State.CONNECTING:
            self._connack(packet)
        elif isinstance(packet, mqtt5.SubAckPacket) and self.state in (
            State.SUBSCRIBING,
            State.LIVE,
        ):
            self._suback(packet)
        elif isinstance(packet, mqtt5.DisconnectPacket):
            code = packet.reason_code
            text = f": {packet.reason_str}" if packet.reason_str else ""
            raise ConnectionLost(
                code.name.lower(), f"the broker disconnected with {code.name} ({code}){text}"
            )
        elif not isinstance(packet, _NOTHING_TO_DO):
            raise ProtocolViolation(
                _PROTOCOL_ERROR, f"{type(packet).__name__} in state {self.state.value}"
            )

    def _connack(self, packet: mqtt5.ConnAckPacket) -> None:
        code = packet.reason_code
        if int(code) >= _REFUSED:  # the codec's enumerations are no ints at run time
            raise MqttRefused(
                f"connack_{code.name.lower()}",
                f"the broker refused the connection with {code.name} ({int(code)}); "
                f"{_ADVICE.get(int(code), 'look at the log of the broker')}",
            )
        if packet.shared_subscription_available is False:
            raise MqttRefused(
                "shared_subscriptions_not_supported", "the broker has no shared subscriptions"
            )
        # MQTT-3.2.2-21: the broker's keep-alive holds. To ping more often than it asks is allowed,
        # so neither 0 (never) nor an hour makes a broker that vanished harder to find.
        if packet.server_keep_alive:
            theirs = float(packet.server_keep_alive)
            self.keep_alive_seconds = min(self.keep_alive_seconds or theirs, theirs)
        self.state = State.SUBSCRIBING
        self.events.append(Connected(packet.session_present))
        self.subscribe()

    def _suback(self, packet: mqtt5.SubAckPacket) -> None:
        if packet.packet_id != self._subscribe_id or not self.awaits_suback:
            raise ProtocolViolation(
                _PROTOCOL_ERROR, f"SUBACK for packet id {packet.packet_id}, which is not awaited"
            )
        for pattern, code in zip(self.options.filters, packet.reason_codes, strict=False):
            if int(code) >= _REFUSED:
                raise MqttRefused(
                    f"suback_{code.name.lower()}",
                    f"the broker refused the subscription {pattern} with {code.name} "
                    f"({int(code)}); look at its ACL for SHADOWSVC_MQTT__USERNAME",
                )
        if any(int(code) < 1 for code in packet.reason_codes):
            # At QoS 0 nothing is ever repeated: the promise of durability would be void.
            raise MqttRefused(
                "suback_qos_0", "the broker grants QoS 0 alone; QoS 1 must be allowed for the share"
            )
        if len(packet.reason_codes) != len(self.options.filters):
            raise ProtocolViolation(_PROTOCOL_ERROR, "SUBACK does not answer every filter")
        self.awaits_suback = False
        self.events.append(SubscribedAgain() if self.state is State.LIVE else Subscribed())
        self.state = State.LIVE

    def _check_size(self, view: memoryview) -> None:
        """Raise when the packet that begins here announces more bytes than we allow."""
        length = 0
        for index, byte in enumerate(view[1:_MAX_HEADER_BYTES]):
            length |= (byte & 0x7F) << (7 * index)
            if not byte & 0x80:
                total = length + index + 2
                if total > self.options.maximum_packet_size_bytes:
                    raise self._too_large(total)
                return
        if len(view) >= _MAX_HEADER_BYTES:
            raise ProtocolViolation(_MALFORMED, "malformed packet: remaining length")

    def _too_large(self, size: int) -> ProtocolViolation:
        return ProtocolViolation(
            _PACKET_TOO_LARGE,
            f"a packet of {size} bytes, SHADOWSVC_MQTT__MAXIMUM_PACKET_SIZE_BYTES is "
            f"{self.options.maximum_packet_size_bytes}",
        )


_PINGREQ = mqtt5.PingReqPacket().write()
_NOTHING_TO_DO = (mqtt5.PingRespPacket, mqtt5.PubAckPacket, mqtt5.UnsubAckPacket)

_CODE = mqtt5.ConnAckReasonCode
_ADVICE = {
    int(
        _CODE.BAD_USER_NAME_OR_PASSWORD
    ): "see SHADOWSVC_MQTT__USERNAME and SHADOWSVC_MQTT__PASSWORD",
    int(_CODE.NOT_AUTHORIZED): "see SHADOWSVC_MQTT__USERNAME, SHADOWSVC_MQTT__PASSWORD and the ACL",
    int(_CODE.CLIENT_ID_NOT_VALID): "see SHADOWSVC_MQTT__CLIENT_ID",
    int(_CODE.UNSUPPORTED_PROTOCOL_VERSION): "the broker must speak MQTT 5",
    int(_CODE.SERVER_UNAVAILABLE): "a node of the broker's cluster may be down",
}
