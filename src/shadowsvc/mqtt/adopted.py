"""The session of an orphaned slot while it is emptied: `mqtt.session` with a marker, without I/O.

Theory. A broker's queue is first in, first out. A session that is given up by its share (no new
messages) and then gets a marker has delivered all that was before it when the marker comes.

Steps and what moves them, on top of the states of `Session`:

    CONNECT ──CONNACK, session_present=0──▶ ABSENT: there is nothing to fetch
       │ CONNACK, session_present=1
       ▼
    SUBSCRIBE (the marker's topic) ──SUBACK──▶ UNSUBSCRIBE (the share) ──UNSUBACK──▶ PUBLISH
                                                                                        │
                                     MARKED ◀──the marker, with the payload of this time┘

Three rules:
1. The share is never subscribed: an adopter's CONNECT must not make new messages go to the orphan.
2. A marker counts by its payload, which is another one for each attempt: that of an earlier attempt
   may still be in the queue.
3. Every message goes to the taker, markers too: they are acknowledged in their turn.

Must not come in: sockets, asyncio, publishing the marker, when the session may be ended.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import mqtt5

from shadowsvc.errors import MqttRefused, ProtocolViolation
from shadowsvc.mqtt.session import PublishHandler, Session, SessionOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AdoptedSession", "Marker", "Step"]

_PROTOCOL_ERROR = int(mqtt5.DisconnectReasonCode.PROTOCOL_ERROR)
_REFUSED = 128
_UNSUBSCRIBE_ID = 65_535
"""Far from the packet ids of SUBSCRIBE, which count from 1."""


class Marker(NamedTuple):
    """The message that tells the end of the queue: a topic that nobody else has, and a payload."""

    topic: str
    payload: bytes


class Step(enum.Enum):
    """How far the adoption is; see the module's diagram."""

    CONNECT = "connect"
    ABSENT = "absent"
    SUBSCRIBE = "subscribe"
    UNSUBSCRIBE = "unsubscribe"
    PUBLISH = "publish"
    MARKED = "marked"


class AdoptedSession(Session):
    """One connection's worth of an adoption; see the module's docstring."""

    def __init__(
        self,
        options: SessionOptions,
        share: Sequence[str],
        marker: Marker,
        on_publish: PublishHandler,
    ) -> None:
        """Make it.

        Args:
            options: of the orphan; `filters` is not used.
            share: the topic filters to give up.
            marker: what is subscribed and waited for.
            on_publish: takes every message.
        """
        super().__init__(replace(options, filters=(marker.topic,)), self._take)
        self.step = Step.CONNECT
        self.received = 0
        """Messages so far, markers and repetitions included."""
        self._share = list(share)
        self._marker = marker
        self._taker = on_publish
        self._resumed = False

    def subscribe(self) -> None:
        """Queue SUBSCRIBE for the marker's topic, unless the broker knows no such session."""
        if not self._resumed:
            self.step = Step.ABSENT
            return
        self.step = Step.SUBSCRIBE
        super().subscribe()

    def end(self) -> bytes:
        """Return DISCONNECT with session expiry 0: the broker forgets the session (§3.14.2.2.2)."""
        return mqtt5.DisconnectPacket(session_expiry_interval=0).write()

    def _take(self, topic: str, packet: mqtt5.PublishPacket) -> None:
        self.received += 1
        if (
            topic == self._marker.topic
            and self.step is Step.PUBLISH
            and packet.payload == self._marker.payload
        ):
            self.step = Step.MARKED
        self._taker(topic, packet)

    def _connack(self, packet: mqtt5.ConnAckPacket) -> None:
        self._resumed = packet.session_present
        super()._connack(packet)

    def _suback(self, packet: mqtt5.SubAckPacket) -> None:
        super()._suback(packet)
        if self.step is Step.SUBSCRIBE:
            self.step = Step.UNSUBSCRIBE
            self.outgoing.append(mqtt5.UnsubscribePacket(_UNSUBSCRIBE_ID, self._share).write())

    def _control(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.UnsubAckPacket):
            self._unsuback(packet)
        else:
            super()._control(packet)

    def _unsuback(self, packet: mqtt5.UnsubAckPacket) -> None:
        if self.step is not Step.UNSUBSCRIBE or packet.packet_id != _UNSUBSCRIBE_ID:
            raise ProtocolViolation(
                _PROTOCOL_ERROR, f"UNSUBACK for packet id {packet.packet_id}, which is not awaited"
            )
        for pattern, code in zip(self._share, packet.reason_codes, strict=False):
            # "No subscription existed" is as good: an earlier attempt may have given it up.
            if int(code) >= _REFUSED:
                raise MqttRefused(
                    f"unsuback_{code.name.lower()}",
                    f"the broker refused to give up {pattern} with {code.name} ({int(code)})",
                )
        if len(packet.reason_codes) != len(self._share):
            raise ProtocolViolation(_PROTOCOL_ERROR, "UNSUBACK does not answer every filter")
        self.step = Step.PUBLISH
