"""A member of a shared subscription that takes messages and acknowledges none; on a plain socket.

Lives here: `Member`, and `session_present`, which asks a broker what it remembers. Rules: packets
by the codec alone, every wait has a limit. Must not come in: the code under test.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Self

import mqtt5

if TYPE_CHECKING:
    import backing

__all__ = ["Member", "session_present"]

_LIMIT_SECONDS = 20.0


class Member:
    """One connection by `client_id`; leaving the context closes it without DISCONNECT."""

    def __init__(
        self,
        broker: backing.Broker,
        client_id: str,
        *,
        receive_maximum: int = 65_535,
        expiry_seconds: int = 600,
    ) -> None:
        self.packets: list[mqtt5.Packet] = []
        self._rest = b""
        self._socket = socket.create_connection((broker.host, broker.port), _LIMIT_SECONDS)
        self.send(
            mqtt5.ConnectPacket(
                client_id,
                clean_start=False,
                session_expiry_interval=expiry_seconds,
                receive_max=receive_maximum,
            )
        )
        answer = self.read()
        assert isinstance(answer, mqtt5.ConnAckPacket), answer
        self.session_present = answer.session_present

    def send(self, packet: mqtt5.Packet) -> None:
        self._socket.sendall(packet.write())

    def read(self) -> mqtt5.Packet:
        """Return the next packet."""
        while True:
            try:
                packet, size = mqtt5.read(memoryview(self._rest))
            except IndexError:
                data = self._socket.recv(65_536)
                assert data, "the broker closed the connection"
                self._rest += data
                continue
            self._rest = self._rest[size:]
            self.packets.append(packet)
            return packet

    def subscribe(self, *patterns: str) -> None:
        filters = [
            mqtt5.TopicFilter(pattern, max_qos=mqtt5.QoS.AT_LEAST_ONCE) for pattern in patterns
        ]
        self.send(mqtt5.SubscribePacket(1, filters))
        while not isinstance(self.read(), mqtt5.SubAckPacket):
            pass

    def take(self, count: int) -> list[mqtt5.PublishPacket]:
        """Wait until so many messages came; return them."""
        while len(self.messages) < count:
            self.read()
        return self.messages

    @property
    def messages(self) -> list[mqtt5.PublishPacket]:
        return [packet for packet in self.packets if isinstance(packet, mqtt5.PublishPacket)]

    def disconnect(self, expiry_seconds: int | None = None) -> None:
        """Leave in good order, and wait until the broker knows."""
        self.send(mqtt5.DisconnectPacket(session_expiry_interval=expiry_seconds))
        while self._socket.recv(65_536):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def session_present(broker: backing.Broker, client_id: str) -> bool:
    """Ask whether a broker remembers a session; it does not when it was asked."""
    with Member(broker, client_id, expiry_seconds=0) as member:
        member.disconnect()
        return member.session_present
