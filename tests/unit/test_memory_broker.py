"""The in-memory broker behaves as VerneMQ was measured to: other tests lean on it."""

from __future__ import annotations

import mqtt5

from tests.memory_broker import Link, MemoryBroker, matches

FILTER = "$share/g/things/+/shadow/update"


class Client:
    """A client that writes packets by hand and keeps what it gets."""

    def __init__(
        self,
        broker: MemoryBroker,
        client_id: str,
        *,
        expiry: int = 300,
        receive_maximum: int = 65535,
    ) -> None:
        self.got: list[mqtt5.Packet] = []
        self.closed = False
        self.link = Link(broker, self._take, self._close)
        self.send(
            mqtt5.ConnectPacket(
                client_id, session_expiry_interval=expiry, receive_max=receive_maximum
            )
        )

    def send(self, packet: mqtt5.Packet) -> None:
        self.link.receive(packet.write())

    def subscribe(self, pattern: str = FILTER) -> Client:
        topic_filter = mqtt5.TopicFilter(pattern, max_qos=mqtt5.QoS.AT_LEAST_ONCE)
        self.send(mqtt5.SubscribePacket(1, [topic_filter]))
        return self

    @property
    def publishes(self) -> list[mqtt5.PublishPacket]:
        return [packet for packet in self.got if isinstance(packet, mqtt5.PublishPacket)]

    @property
    def payloads(self) -> list[bytes]:
        return [packet.payload for packet in self.publishes]

    @property
    def connack(self) -> mqtt5.ConnAckPacket:
        assert isinstance(self.got[0], mqtt5.ConnAckPacket)
        return self.got[0]

    def ack(self, packet: mqtt5.PublishPacket) -> None:
        assert packet.packet_id is not None
        self.send(mqtt5.PubAckPacket(packet.packet_id))

    def vanish(self) -> None:
        self.link.closed()

    def _take(self, data: bytes) -> None:
        packet, size = mqtt5.read(memoryview(data))
        assert size == len(data)
        self.got.append(packet)

    def _close(self) -> None:
        self.closed = True


def publish(broker: MemoryBroker, count: int, *, qos: int = 1) -> list[bytes]:
    payloads = [str(number).encode() for number in range(count)]
    for payload in payloads:
        broker.publish("things/d/shadow/update", payload, qos=qos)
    return payloads


def test_a_share_is_spread_over_the_members_that_are_online() -> None:
    broker = MemoryBroker()
    members = [Client(broker, name).subscribe() for name in "abc"]
    members[2].vanish()
    sent = publish(broker, 100)
    assert sorted(members[0].payloads + members[1].payloads) == sorted(sent)
    assert members[0].payloads
    assert members[1].payloads
    assert not members[2].payloads


def test_receive_maximum_is_honoured_exactly_and_nothing_is_sent_twice() -> None:
    broker = MemoryBroker()
    client = Client(broker, "a", receive_maximum=3).subscribe()
    sent = publish(broker, 10)
    assert client.payloads == sent[:3]
    client.ack(client.publishes[1])
    assert client.payloads == sent[:4]
    assert not any(packet.duplicate for packet in client.publishes)


def test_a_resumed_session_gets_in_flight_as_duplicates_and_then_the_queue() -> None:
    broker = MemoryBroker()
    first = Client(broker, "a", receive_maximum=3).subscribe()
    sent = publish(broker, 5)
    first.ack(first.publishes[0])
    first.vanish()
    sent += publish(broker, 2)
    second = Client(broker, "a", receive_maximum=100)
    assert second.connack.session_present
    assert second.payloads == sent[1:]
    assert [packet.duplicate for packet in second.publishes] == [True] * 3 + [False] * 3
    assert [packet.packet_id for packet in second.publishes[:3]] == [
        packet.packet_id for packet in first.publishes[1:]
    ]


def test_session_expiry_zero_loses_everything() -> None:
    broker = MemoryBroker()
    Client(broker, "a", expiry=0).subscribe().vanish()
    publish(broker, 5)
    assert broker.unrouted == 5
    assert not Client(broker, "a").connack.session_present


def test_a_restart_loses_what_is_in_flight_to_present_sessions_only() -> None:
    broker = MemoryBroker()
    absent = Client(broker, "absent", receive_maximum=2).subscribe("$share/g/absent")
    present = Client(broker, "present", receive_maximum=2).subscribe("$share/g/present")
    for number in range(4):
        broker.publish("absent", b"%d" % number)
        broker.publish("present", b"%d" % number)
    absent.vanish()
    broker.restart()
    assert present.closed
    assert Client(broker, "absent").payloads == [b"0", b"1", b"2", b"3"]
    assert Client(broker, "present").payloads == [b"2", b"3"]


def test_a_second_connect_takes_over() -> None:
    broker = MemoryBroker()
    first = Client(broker, "a").subscribe()
    second = Client(broker, "a")
    farewell = first.got[-1]
    assert isinstance(farewell, mqtt5.DisconnectPacket)
    assert int(farewell.reason_code) == 142
    assert first.closed
    assert second.connack.session_present


def test_what_is_queued_is_delivered_after_unsubscribe_and_a_marker_comes_last() -> None:
    broker = MemoryBroker()
    Client(broker, "a", receive_maximum=2).subscribe().vanish()
    sent = publish(broker, 5)
    assert Client(broker, "other").subscribe().payloads == []
    second = Client(broker, "a", receive_maximum=2)
    second.subscribe("marker")
    second.send(mqtt5.UnsubscribePacket(2, [FILTER, "never"]))
    answer = second.got[-1]
    assert isinstance(answer, mqtt5.UnsubAckPacket)
    assert [int(code) for code in answer.reason_codes] == [0, 17]
    publish(broker, 3)
    broker.publish("marker", b"the end")
    for number in range(6):
        second.ack(second.publishes[number])
    assert second.payloads == [*sent, b"the end"]


def test_a_disconnect_with_expiry_0_ends_the_session() -> None:
    broker = MemoryBroker()
    client = Client(broker, "a").subscribe()
    client.send(mqtt5.DisconnectPacket(session_expiry_interval=0))
    assert client.closed
    assert not Client(broker, "a").connack.session_present


def test_like_mosquitto_it_may_share_with_the_absent() -> None:
    broker = MemoryBroker()
    broker.shares_with_absent = True
    Client(broker, "absent").subscribe().vanish()
    present = Client(broker, "present").subscribe()
    publish(broker, 100)
    assert 0 < len(present.payloads) < 100


def test_a_node_down_grants_and_subscribes_nothing() -> None:
    broker = MemoryBroker()
    broker.subscribes_nothing = True
    client = Client(broker, "a").subscribe()
    assert isinstance(client.got[-1], mqtt5.SubAckPacket)
    assert int(client.got[-1].reason_codes[0]) == 1
    publish(broker, 1)
    assert broker.unrouted == 1


def test_qos_0_is_not_queued_and_retained_never_reaches_a_share() -> None:
    broker = MemoryBroker()
    broker.publish("things/d/shadow/update", b"retained", retain=True)
    shared = Client(broker, "a").subscribe()
    plain = Client(broker, "b").subscribe("things/#")
    assert (shared.payloads, plain.payloads) == ([], [b"retained"])
    shared.vanish()
    plain.vanish()
    publish(broker, 3, qos=0)
    assert Client(broker, "a").payloads == []


def test_a_packet_above_the_clients_maximum_vanishes_silently() -> None:
    broker = MemoryBroker()
    client = Client(broker, "a").subscribe()
    client.link.maximum_packet_size = 100
    broker.publish("things/d/shadow/update", bytes(200))
    broker.publish("things/d/shadow/update", b"small")
    assert client.payloads == [b"small"]


def test_topic_filters_match_as_mqtt_says() -> None:
    assert matches("a/+/c", "a/b/c")
    assert matches("a/#", "a")
    assert matches("#", "a/b")
    assert not matches("a/+", "a/b/c")
    assert not matches("a/b/c", "a/b")
    assert not matches("#", "$SYS/x")
    assert not matches("+/x", "$SYS/x")


def test_where_clients_may_publish_they_are_answered_and_others_get_it_unless_refused() -> None:
    broker = MemoryBroker()
    broker.takes_publishes = True
    member = Client(broker, "member").subscribe()
    sender = Client(broker, "sender")
    code = mqtt5.PubAckReasonCode
    for number, answer in enumerate((code.SUCCESS, code.NOT_AUTHORIZED), start=1):
        broker.puback = None if answer is code.SUCCESS else answer
        sender.send(
            mqtt5.PublishPacket(
                "things/d/shadow/update",
                b"%d" % number,
                qos=mqtt5.QoS.AT_LEAST_ONCE,
                packet_id=number,
            )
        )
        last = sender.got[-1]
        assert isinstance(last, mqtt5.PubAckPacket)
        assert (last.packet_id, last.reason_code) == (number, answer)
    assert member.payloads == [b"1"]
