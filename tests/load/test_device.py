"""A device without I/O, wired in memory to what a broker would say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mqtt5
import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection

from load.device import (
    Acknowledged,
    Closed,
    Connected,
    Device,
    Event,
    Message,
    Pong,
    Subscribed,
)
from load.errors import BrokenConnection
from load.websocket import WebSocketClient

if TYPE_CHECKING:
    from collections.abc import Iterable

TOPIC = "things/lamp/shadow/update"
# What a broker says to a device, of every kind, small and large.
SAID: tuple[mqtt5.Packet, ...] = (
    mqtt5.ConnAckPacket(session_present=True, receive_max=20, server_keep_alive=30),
    mqtt5.SubAckPacket(1, [mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE]),
    mqtt5.PubAckPacket(7),
    mqtt5.PubAckPacket(300, reason_code=mqtt5.PubAckReasonCode.NO_MATCHING_SUBSCRIBERS),
    mqtt5.PublishPacket(TOPIC, b"{}"),
    mqtt5.PublishPacket(TOPIC, b"x" * 200, qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=9),
    mqtt5.PingRespPacket(),
    mqtt5.DisconnectPacket(reason_code=mqtt5.DisconnectReasonCode.SERVER_SHUTTING_DOWN),
)
MEANS: tuple[Event, ...] = (
    Connected(session_present=True, receive_maximum=20, keep_alive_seconds=30),
    Subscribed(1, (1,)),
    Acknowledged(7, 0),
    Acknowledged(300, 16),
    Message(TOPIC, b"{}"),
    Message(TOPIC, b"x" * 200),
    Pong(),
    Closed("disconnect server shutting down", 139),
)


class Broker:
    """The other end: reads what the device sends, wraps what it is to be told."""

    def __init__(self, *, websocket: bool) -> None:
        self._websocket = WSConnection(ConnectionType.SERVER) if websocket else None
        self.device = Device(
            "lamp",
            keep_alive_seconds=45,
            clean_start=False,
            session_expiry_seconds=100,
            username="me",
            password=b"secret",
            websocket=WebSocketClient("there") if websocket else None,
        )

    def begin(self) -> bytes:
        """Return the handshake's answer, if there is one."""
        first = self.device.connect()
        if self._websocket is None:
            self.first = first
            return b""
        self._websocket.receive_data(first)
        next(self._websocket.events())
        return self._websocket.send(AcceptConnection(subprotocol="mqtt"))

    def says(self, *packets: mqtt5.Packet) -> bytes:
        data = b"".join(one.write() for one in packets)
        return data if self._websocket is None else self._websocket.send(BytesMessage(data))

    def reads(self, data: bytes) -> list[mqtt5.Packet]:
        if self._websocket is not None:
            self._websocket.receive_data(data)
            events = list(self._websocket.events())
            data = b"".join(bytes(one.data) for one in events if isinstance(one, BytesMessage))
            self.closed = any(isinstance(one, CloseConnection) for one in events)
        packets = []
        while data:
            packet, size = mqtt5.read(memoryview(data))
            packets.append(packet)
            data = data[size:]
        return packets

    def hears(self, parts: Iterable[bytes]) -> list[Event]:
        return [event for part in parts for event in self.device.receive(part)]

    def up(self) -> Device:
        """The device, connected."""
        self.device.receive(self.begin())
        self.device.pending = b""
        self.device.receive(self.says(mqtt5.ConnAckPacket()))
        return self.device


@pytest.fixture(params=[False, True], ids=["tcp", "websocket"])
def websocket(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_every_packet_means_the_same_wherever_it_is_split(*, websocket: bool) -> None:
    for packet, means in zip(SAID, MEANS, strict=True):
        for at in range(250):
            broker = Broker(websocket=websocket)
            broker.device.receive(broker.begin())
            said = broker.says(packet)
            if at > len(said):
                break
            assert broker.hears((said[:at], said[at:])) == [means]


def test_a_whole_connection_means_the_same_byte_by_byte(*, websocket: bool) -> None:
    broker = Broker(websocket=websocket)
    whole = broker.begin() + b"".join(broker.says(one) for one in SAID)
    assert broker.hears(bytes((one,)) for one in whole) == list(MEANS)
    assert broker.device._buffer == b""


def test_several_packets_in_one_chunk_keep_their_order(*, websocket: bool) -> None:
    broker = Broker(websocket=websocket)
    whole = broker.begin() + broker.says(*SAID)
    assert broker.hears([whole]) == list(MEANS)


def test_connect_says_who_and_how(*, websocket: bool) -> None:
    broker = Broker(websocket=websocket)
    answer = broker.begin()
    broker.device.receive(answer)
    (packet,) = broker.reads(broker.device.pending if websocket else broker.first)
    assert isinstance(packet, mqtt5.ConnectPacket)
    assert (packet.client_id, packet.username, packet.password) == ("lamp", "me", b"secret")
    assert (packet.keep_alive, packet.clean_start, packet.session_expiry_interval) == (
        45,
        False,
        100,
    )
    assert not broker.device.connected


def test_connect_is_sent_once_although_the_handshake_comes_in_parts() -> None:
    broker = Broker(websocket=True)
    for byte in broker.begin():
        broker.device.receive(bytes((byte,)))
    assert len(broker.reads(broker.device.pending)) == 1


def test_a_publish_has_the_id_that_its_puback_will_have(*, websocket: bool) -> None:
    broker = Broker(websocket=websocket)
    device = broker.up()
    assert device.connected
    packet_id, data = device.publish(TOPIC, b"{1}", 1)
    (packet,) = broker.reads(data)
    assert isinstance(packet, mqtt5.PublishPacket)
    assert (packet.topic, packet.payload, packet.packet_id) == (TOPIC, b"{1}", packet_id)
    assert packet.qos == mqtt5.QoS.AT_LEAST_ONCE
    assert not packet.duplicate
    answer = broker.says(mqtt5.PubAckPacket(packet_id))
    assert device.receive(answer) == [Acknowledged(packet_id, 0)]


def test_a_publish_sent_again_keeps_its_id_and_says_so(*, websocket: bool) -> None:
    broker = Broker(websocket=websocket)
    device = broker.up()
    packet_id, _ = device.publish(TOPIC, b"{}", 1)
    again, data = device.publish(TOPIC, b"{}", 1, again=packet_id)
    (packet,) = broker.reads(data)
    assert isinstance(packet, mqtt5.PublishPacket)
    assert again == packet.packet_id == packet_id
    assert packet.duplicate


def test_qos_0_has_no_id() -> None:
    broker = Broker(websocket=False)
    packet_id, data = broker.up().publish(TOPIC, b"{}", 0)
    (packet,) = broker.reads(data)
    assert isinstance(packet, mqtt5.PublishPacket)
    assert (packet_id, packet.packet_id, packet.qos) == (0, None, mqtt5.QoS.AT_MOST_ONCE)


def test_packet_ids_count_up_and_begin_again_with_1() -> None:
    device = Broker(websocket=False).up()
    ids = [device.publish(TOPIC, b"", 1)[0] for _ in range(65_540)]
    assert ids[:3] == [1, 2, 3]
    assert ids[65_533:65_537] == [65_534, 65_535, 1, 2]


def test_what_a_subscription_brings_is_acknowledged_if_it_has_qos_1(*, websocket: bool) -> None:
    broker = Broker(websocket=websocket)
    device = broker.up()
    (packet,) = broker.reads(device.subscribe(["a/+", "b"], 1))
    assert isinstance(packet, mqtt5.SubscribePacket)
    assert [one.pattern for one in packet.topic_filters] == ["a/+", "b"]
    device.receive(
        broker.says(
            mqtt5.PublishPacket("b", b"0"),
            mqtt5.PublishPacket("b", b"1", qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=77),
        )
    )
    (ack,) = broker.reads(device.pending)
    assert isinstance(ack, mqtt5.PubAckPacket)
    assert ack.packet_id == 77


def test_a_subscription_that_is_refused_in_part_is_not_granted() -> None:
    assert Subscribed(1, (0, 1)).granted
    assert not Subscribed(1, (1, 135)).granted


def test_ping_and_disconnect_are_what_they_say(*, websocket: bool) -> None:
    broker = Broker(websocket=websocket)
    device = broker.up()
    assert [type(one) for one in broker.reads(device.ping())] == [mqtt5.PingReqPacket]
    assert [type(one) for one in broker.reads(device.disconnect())] == [mqtt5.DisconnectPacket]
    assert not device.connected
    assert not websocket or broker.closed


def test_a_refused_connection_is_closed_and_tells_why(*, websocket: bool) -> None:
    broker = Broker(websocket=websocket)
    broker.device.receive(broker.begin())
    code = mqtt5.ConnAckReasonCode.NOT_AUTHORIZED
    said = broker.says(mqtt5.ConnAckPacket(reason_code=code))
    assert broker.hears([said]) == [Closed("connack not authorized", 135)]
    assert not broker.device.connected


def test_a_websocket_close_ends_the_device_s_connection() -> None:
    broker = Broker(websocket=True)
    device = broker.up()
    assert device.receive(b"\x88\x02\x03\xe8") == [Closed("websocket close")]
    assert not device.connected
    assert device.pending, "the close is answered"


# The codec's panic on text that is not UTF-8 leaves an exception that nobody can catch behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "data",
    [
        b"\x20\xff\xff\xff\xff\xff",
        b"\x32\x07\x00\x02\xff\xfe\x00\x01\x00",
        mqtt5.PingReqPacket().write(),
    ],
    ids=["a length without end", "a topic that is not UTF-8", "a packet for servers"],
)
def test_bytes_that_break_the_standard_are_an_error(data: bytes) -> None:
    device = Broker(websocket=False).up()
    with pytest.raises(BrokenConnection, match=r"malformed|not for a device"):
        device.receive(data)


def test_a_new_connection_forgets_half_a_packet_but_not_the_packet_ids() -> None:
    broker = Broker(websocket=False)
    device = broker.up()
    first, _ = device.publish(TOPIC, b"{}", 1)
    device.receive(mqtt5.PubAckPacket(first).write()[:2])
    device.connect()
    assert device.receive(mqtt5.ConnAckPacket().write()) == [Connected(session_present=False)]
    assert device.publish(TOPIC, b"{}", 1)[0] == first + 1
