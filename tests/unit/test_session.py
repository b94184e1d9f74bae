"""What the ingest session promises, driven byte by byte and second by second, without I/O."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import mqtt5
import pytest

from shadowsvc.errors import ConnectionLost, MqttRefused, ProtocolViolation
from shadowsvc.ledger import Ledger
from shadowsvc.mqtt.session import (
    Connected,
    Session,
    SessionOptions,
    State,
    Subscribed,
    SubscribedAgain,
)
from tests.memory_broker import Link, MemoryBroker

if TYPE_CHECKING:
    from collections.abc import Callable

FILTERS = ("$share/g/things/+/shadow/update", "$share/g/things/+/shadow/name/+/update")
OPTIONS = SessionOptions("client", FILTERS, keep_alive_seconds=10, maximum_packet_size_bytes=5000)

MALFORMED = 0x81
PROTOCOL_ERROR = 0x82
TOPIC_ALIAS_INVALID = 0x94
PACKET_TOO_LARGE = 0x95
QOS_NOT_SUPPORTED = 0x9B

CONNACK = mqtt5.ConnAckPacket().write()
SUBACK = mqtt5.SubAckPacket(1, [mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE] * 2).write()
PINGRESP = mqtt5.PingRespPacket().write()
PINGREQ = mqtt5.PingReqPacket().write()


def codes(kind: type) -> list[int]:
    """Every reason code of an enumeration of the codec."""
    found = []
    for number in range(256):
        try:
            kind(number)
        except ValueError:
            continue
        found.append(number)
    return found


def publish(
    payload: bytes = b"{}",
    *,
    topic: str = "things/d/shadow/update",
    packet_id: int | None = 7,
    duplicate: bool = False,
    alias: int | None = None,
    user_properties: list[tuple[str, str]] | None = None,
) -> bytes:
    return mqtt5.PublishPacket(
        topic,
        payload,
        qos=mqtt5.QoS.AT_MOST_ONCE if packet_id is None else mqtt5.QoS.AT_LEAST_ONCE,
        packet_id=packet_id,
        duplicate=duplicate,
        topic_alias=alias,
        user_properties=user_properties or [],
    ).write()


class Driver:
    """Feeds a session as a connection does: what was not used comes again with what follows."""

    def __init__(self, options: SessionOptions = OPTIONS, *, now: float = 0.0) -> None:
        self.got: list[tuple[str, mqtt5.PublishPacket]] = []
        self.events: list[Connected | Subscribed | SubscribedAgain] = []
        self.session = Session(options, lambda topic, packet: self.got.append((topic, packet)))
        self.session.connect(now, 1000)
        self.sent = [self.session.outgoing.pop()]
        self.now = now
        self._rest = b""

    def feed(self, data: bytes) -> Driver:
        self._rest += data
        used = self.session.receive(memoryview(self._rest), self.now)
        self._rest = self._rest[used:]
        self._collect()
        return self

    def tick(self, now: float) -> int:
        """Tick as often as the session asks for up to `now`; return how many pings were sent."""
        before = self.sent.count(PINGREQ)
        step = self.session.keep_alive_seconds / 8
        while self.now < now:
            self.now = min(now, self.now + step)
            self.session.tick(self.now)
            self._collect()
        return self.sent.count(PINGREQ) - before

    def _collect(self) -> None:
        self.sent += self.session.outgoing
        self.session.outgoing.clear()
        self.events += self.session.events
        self.session.events.clear()


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def live() -> Driver:
    return Driver().feed(CONNACK + SUBACK)


def violation(action: Callable[[], object]) -> int:
    with pytest.raises(ProtocolViolation) as caught:
        action()
    assert caught.value.reason == "protocol_error"
    return caught.value.code


# -------------------------------------------------------------------- opening


def test_connect_says_what_the_options_say() -> None:
    options = SessionOptions(
        "me",
        FILTERS,
        keep_alive_seconds=17,
        session_expiry_seconds=123,
        maximum_packet_size_bytes=4567,
        topic_alias_maximum=9,
        username="u",
        password=b"p",
    )
    packet, _ = mqtt5.read(memoryview(Driver(options).sent[0]))
    assert isinstance(packet, mqtt5.ConnectPacket)
    assert (packet.client_id, packet.username, packet.password) == ("me", "u", b"p")
    assert (packet.keep_alive, packet.session_expiry_interval) == (17, 123)
    assert (packet.receive_max, packet.topic_alias_max) == (1000, 9)
    assert packet.max_packet_size == 4567
    assert not packet.clean_start


def test_subscribe_asks_for_qos_1_and_no_retained_messages(driver: Driver) -> None:
    driver.feed(CONNACK)
    packet, _ = mqtt5.read(memoryview(driver.sent[-1]))
    assert isinstance(packet, mqtt5.SubscribePacket)
    assert [topic_filter.pattern for topic_filter in packet.topic_filters] == list(FILTERS)
    for topic_filter in packet.topic_filters:
        assert topic_filter.max_qos == mqtt5.QoS.AT_LEAST_ONCE
        assert topic_filter.retain_handling == mqtt5.RetainHandling.SEND_NEVER
        assert not topic_filter.no_local  # MQTT-3.8.3-4: an error on a share


@pytest.mark.parametrize("present", [False, True])
def test_connack_and_suback_make_the_session_live(driver: Driver, present: bool) -> None:  # noqa: FBT001
    driver.feed(mqtt5.ConnAckPacket(session_present=present).write())
    states = [driver.session.state, driver.feed(SUBACK).session.state]
    assert states == [State.SUBSCRIBING, State.LIVE]
    assert driver.events == [Connected(present), Subscribed()]


@pytest.mark.parametrize("code", [code for code in codes(mqtt5.ConnAckReasonCode) if code])
def test_every_refusal_in_connack_is_named(driver: Driver, code: int) -> None:
    reason = mqtt5.ConnAckReasonCode(code)
    with pytest.raises(MqttRefused, match=rf"{reason.name} \({code}\)") as caught:
        driver.feed(mqtt5.ConnAckPacket(reason_code=reason).write())
    assert caught.value.reason == f"connack_{reason.name.lower()}"
    assert not driver.events


def test_wrong_credentials_name_the_settings(driver: Driver) -> None:
    reason = mqtt5.ConnAckReasonCode.BAD_USER_NAME_OR_PASSWORD
    with pytest.raises(MqttRefused, match="SHADOWSVC_MQTT__PASSWORD"):
        driver.feed(mqtt5.ConnAckPacket(reason_code=reason).write())


def test_a_broker_without_shared_subscriptions_is_refused(driver: Driver) -> None:
    with pytest.raises(MqttRefused, match="no shared subscriptions"):
        driver.feed(mqtt5.ConnAckPacket(shared_subscription_available=False).write())


@pytest.mark.parametrize("code", codes(mqtt5.SubAckReasonCode))
def test_every_answer_in_suback_is_a_grant_or_a_named_refusal(driver: Driver, code: int) -> None:
    driver.feed(CONNACK)
    reason = mqtt5.SubAckReasonCode(code)
    granted = mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE
    answer = mqtt5.SubAckPacket(1, [granted, reason]).write()
    if code == 0:
        # A share at QoS 0 repeats nothing: it would make every acknowledgement worthless.
        with pytest.raises(MqttRefused, match="QoS 1 must be allowed") as caught:
            driver.feed(answer)
        assert caught.value.reason == "suback_qos_0"
    elif code < 0x80:
        driver.feed(answer)
        assert driver.events[-1] == Subscribed()
    else:
        with pytest.raises(MqttRefused, match=r"name/\+/update with") as caught:
            driver.feed(answer)
        assert caught.value.reason == f"suback_{reason.name.lower()}"
        assert Subscribed() not in driver.events


@pytest.mark.parametrize("count", [0, 1, 3])
def test_suback_answers_every_filter(driver: Driver, count: int) -> None:
    driver.feed(CONNACK)
    granted = mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE
    answer = mqtt5.SubAckPacket(1, [granted] * count).write()
    assert violation(lambda: driver.feed(answer)) == PROTOCOL_ERROR


def test_a_suback_for_what_was_never_sent_is_refused(driver: Driver) -> None:
    driver.feed(CONNACK)
    granted = mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE
    answer = mqtt5.SubAckPacket(2, [granted] * 2).write()
    assert violation(lambda: driver.feed(answer)) == PROTOCOL_ERROR


def subscribed_ids(sent: list[bytes]) -> list[int]:
    packets = [mqtt5.read(memoryview(data))[0] for data in sent]
    return [packet.packet_id for packet in packets if isinstance(packet, mqtt5.SubscribePacket)]


def suback(packet_id: int, code: int = 1) -> bytes:
    return mqtt5.SubAckPacket(packet_id, [mqtt5.SubAckReasonCode(code)] * 2).write()


def test_a_live_session_subscribes_again_with_the_same_filters_and_another_packet_id(
    live: Driver,
) -> None:
    for packet_id in (2, 3):
        assert live.session.subscribe_again()
        live.feed(publish(b"%d" % packet_id) + suback(packet_id))
        assert live.events[-1] == SubscribedAgain()
        assert live.session.state is State.LIVE
    assert subscribed_ids(live.sent) == [1, 2, 3]
    first, *others = [
        packet
        for data in live.sent
        if isinstance(packet := mqtt5.read(memoryview(data))[0], mqtt5.SubscribePacket)
    ]
    assert all(packet.topic_filters == first.topic_filters for packet in others)
    assert [payload for _, payload, *_ in seen(live)] == [b"2", b"3"]
    assert live.events.count(Subscribed()) == 1


def test_one_subscribe_at_a_time_waits_for_its_answer(driver: Driver) -> None:
    assert not driver.session.subscribe_again()
    driver.feed(CONNACK)
    assert driver.session.awaits_suback
    assert not driver.session.subscribe_again()
    driver.feed(SUBACK)
    assert not driver.session.awaits_suback
    assert driver.session.subscribe_again()
    assert not driver.session.subscribe_again()
    driver.feed(PINGRESP)
    assert subscribed_ids(driver.sent) == [1, 2]


def test_packet_ids_of_subscribes_begin_anew_after_the_last(live: Driver) -> None:
    live.session._subscribe_id = 65_534
    for packet_id in (65_535, 1):
        assert live.session.subscribe_again()
        live.feed(suback(packet_id))
    assert subscribed_ids(live.sent) == [1, 65_535, 1]


@pytest.mark.parametrize("code", [0x80, 0x87, 0x8F, 0x97, 0x00])
def test_a_subscription_that_is_refused_later_ends_the_session_with_its_reason(
    live: Driver, code: int
) -> None:
    live.session.subscribe_again()
    with pytest.raises(MqttRefused) as caught:
        live.feed(suback(2, code))
    name = mqtt5.SubAckReasonCode(code).name.lower()
    assert caught.value.reason == (f"suback_{name}" if code else "suback_qos_0")


@pytest.mark.parametrize("packet_id", [1, 3])
def test_a_suback_that_is_not_awaited_is_refused(live: Driver, packet_id: int) -> None:
    assert violation(lambda: live.feed(suback(packet_id))) == PROTOCOL_ERROR
    other = Driver().feed(CONNACK + SUBACK)
    other.session.subscribe_again()
    assert violation(lambda: other.feed(suback(packet_id))) == PROTOCOL_ERROR


def test_publishes_of_a_resumed_session_are_taken_before_suback(driver: Driver) -> None:
    driver.feed(mqtt5.ConnAckPacket(session_present=True).write() + publish(b"1", duplicate=True))
    driver.feed(publish(b"2", packet_id=8) + SUBACK + publish(b"3", packet_id=9))
    assert [packet.payload for _, packet in driver.got] == [b"1", b"2", b"3"]
    assert [packet.duplicate for _, packet in driver.got] == [True, False, False]


# -------------------------------------------------------------------- ends


@pytest.mark.parametrize("code", codes(mqtt5.DisconnectReasonCode))
def test_every_disconnect_of_the_broker_ends_the_session_by_name(live: Driver, code: int) -> None:
    reason = mqtt5.DisconnectReasonCode(code)
    with pytest.raises(ConnectionLost, match=rf"{reason.name} \({code}\): why$") as caught:
        live.feed(mqtt5.DisconnectPacket(reason_code=reason, reason_str="why").write())
    assert caught.value.reason == reason.name.lower()


def test_disconnect_before_connack_ends_the_session(driver: Driver) -> None:
    with pytest.raises(ConnectionLost, match="SERVER_BUSY"):
        driver.feed(bytes([0xE0, 0x01, 0x89]))


@pytest.mark.parametrize("code", codes(mqtt5.DisconnectReasonCode))
def test_a_farewell_keeps_the_session_expiry(live: Driver, code: int) -> None:
    packet, _ = mqtt5.read(memoryview(live.session.farewell(code)))
    assert isinstance(packet, mqtt5.DisconnectPacket)
    assert int(packet.reason_code) == code
    assert packet.session_expiry_interval is None


# -------------------------------------------------------------------- what the broker may not send


@pytest.mark.parametrize(
    "data",
    [
        pytest.param("00 00", id="packet type 0"),
        pytest.param("d1 00", id="flags of PINGRESP"),
        pytest.param("d0 01 00", id="length of PINGRESP"),
        pytest.param("36 06 0001 61 0005 00", id="QoS 3"),
        pytest.param("30 ff ff ff ff 01", id="remaining length of five bytes"),
        pytest.param("30 81 00", id="remaining length longer than needed"),
        pytest.param("30 00", id="empty PUBLISH"),
        pytest.param("30 03 0064 00", id="topic longer than the packet"),
        pytest.param("32 04 0001 61 00", id="no packet id"),
        pytest.param("30 06 0001 61 09 2300", id="properties longer than the packet"),
        pytest.param("30 05 0001 61 01 7f", id="unknown property"),
        pytest.param("30 0a 0001 61 06 230001 230001", id="property twice"),
        pytest.param("30 07 0001 61 03 210001", id="property of another packet"),
        pytest.param("30 03 0000 00", id="neither topic nor alias"),
        pytest.param("30 06 0000 03 230000", id="alias 0"),
        pytest.param("30 04 0001 ff 00", id="topic that is not UTF-8"),
        pytest.param("30 0a 0001 61 06 26 0001ff 0000", id="user property that is not UTF-8"),
        pytest.param("20 03 02 00 00", id="flags of CONNACK"),
        pytest.param("20 03 00 01 00", id="reason code of CONNACK"),
        pytest.param("90 04 0001 00 33", id="reason code of SUBACK"),
        pytest.param("e0 01 07", id="reason code of DISCONNECT"),
    ],
)
# The codec's panic on text that is not UTF-8 leaves an exception that nobody can catch behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_malformed_packets_are_answered_as_malformed(live: Driver, data: str) -> None:
    good = publish(b"before")
    assert violation(lambda: live.feed(good + bytes.fromhex(data))) == MALFORMED
    assert [packet.payload for _, packet in live.got] == [b"before"]


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(mqtt5.ConnAckPacket(), id="second CONNACK"),
        pytest.param(mqtt5.ConnectPacket("x"), id="CONNECT"),
        pytest.param(mqtt5.PingReqPacket(), id="PINGREQ"),
        pytest.param(mqtt5.AuthPacket(), id="AUTH"),
        pytest.param(mqtt5.PubRelPacket(1), id="PUBREL"),
        pytest.param(mqtt5.PubRecPacket(1), id="PUBREC"),
        pytest.param(mqtt5.PubCompPacket(1), id="PUBCOMP"),
        pytest.param(mqtt5.SubscribePacket(1, [mqtt5.TopicFilter("a")]), id="SUBSCRIBE"),
        pytest.param(mqtt5.UnsubscribePacket(1, ["a"]), id="UNSUBSCRIBE"),
    ],
)
def test_packets_out_of_place_are_protocol_errors(live: Driver, packet: mqtt5.Packet) -> None:
    assert violation(lambda: live.feed(packet.write())) == PROTOCOL_ERROR


@pytest.mark.parametrize("data", [publish(), publish(packet_id=None), SUBACK])
def test_nothing_comes_before_connack(driver: Driver, data: bytes) -> None:
    assert violation(lambda: driver.feed(data)) == PROTOCOL_ERROR
    assert not driver.got


def test_packet_id_0_is_a_protocol_error(live: Driver) -> None:
    data = bytes.fromhex("32 06 0001 61 0000 00")
    assert violation(lambda: live.feed(data)) == PROTOCOL_ERROR


def test_qos_2_is_refused(live: Driver) -> None:
    data = mqtt5.PublishPacket("a", b"x", qos=mqtt5.QoS.EXACTLY_ONCE, packet_id=1).write()
    assert violation(lambda: live.feed(data)) == QOS_NOT_SUPPORTED
    assert not live.got


@pytest.mark.parametrize("packet_id", [1, 65535])
def test_every_packet_id_is_taken(live: Driver, packet_id: int) -> None:
    live.feed(publish(packet_id=packet_id))
    assert live.got[0][1].packet_id == packet_id


# -------------------------------------------------------------------- size


def sized(size: int) -> bytes:
    """Return a PUBLISH of exactly `size` bytes."""
    overhead = len(publish(bytes(1000))) - 1000
    data = publish(bytes(size - overhead))
    assert len(data) == size
    return data


def test_a_packet_of_the_maximum_size_is_taken(live: Driver) -> None:
    live.feed(sized(5000))
    assert len(live.got) == 1


@pytest.mark.parametrize("size", [3, 4, 100, 5001])
def test_a_larger_packet_is_refused_as_soon_as_its_length_is_known(live: Driver, size: int) -> None:
    data = sized(5001)
    live.feed(data[:2])  # type and half of the length
    assert violation(lambda: live.feed(data[2:size])) == PACKET_TOO_LARGE
    assert not live.got


def test_a_length_of_gigabytes_is_refused_with_the_setting_to_change(live: Driver) -> None:
    with pytest.raises(ProtocolViolation, match="SHADOWSVC_MQTT__MAXIMUM_PACKET_SIZE_BYTES"):
        live.feed(b"\x30\xff\xff\xff\x7f")


# -------------------------------------------------------------------- topic aliases


def test_an_alias_stands_for_its_last_topic(live: Driver) -> None:
    live.feed(publish(b"1", topic="a", alias=3) + publish(b"2", topic="", alias=3))
    live.feed(publish(b"3", topic="b", alias=3) + publish(b"4", topic="", alias=3))
    assert [(topic, packet.payload) for topic, packet in live.got] == [
        ("a", b"1"),
        ("a", b"2"),
        ("b", b"3"),
        ("b", b"4"),
    ]


def test_aliases_do_not_outlive_their_connection(live: Driver) -> None:
    live.feed(publish(topic="a", alias=1))
    other = Driver().feed(CONNACK + SUBACK)
    assert violation(lambda: other.feed(publish(topic="", alias=1))) == PROTOCOL_ERROR


def test_an_alias_above_the_maximum_is_refused(live: Driver) -> None:
    live.feed(publish(topic="a", alias=16))
    assert violation(lambda: live.feed(publish(topic="a", alias=17))) == TOPIC_ALIAS_INVALID


def test_without_an_alias_maximum_every_alias_is_refused() -> None:
    live = Driver(SessionOptions("c", FILTERS, topic_alias_maximum=0)).feed(CONNACK + SUBACK)
    assert violation(lambda: live.feed(publish(topic="a", alias=1))) == TOPIC_ALIAS_INVALID


# -------------------------------------------------------------------- splitting and joining

STREAM = [
    mqtt5.ConnAckPacket(
        session_present=True, reason_str="hello", user_properties=[("k", "Größe")]
    ).write(),
    publish(b"early", duplicate=True),
    SUBACK,
    publish(b"", packet_id=None),
    PINGRESP,
    publish(bytes(300), packet_id=300, user_properties=[("seq", "1"), ("timestamp", "2")]),
    publish(b"x", alias=2),
    publish(b"y", topic="", alias=2, packet_id=9),
    mqtt5.UnsubAckPacket(3, [mqtt5.UnsubAckReasonCode.SUCCESS]).write(),
]


def seen(driver: Driver) -> list[tuple[str, bytes, int | None, bool]]:
    return [
        (topic, packet.payload, packet.packet_id, packet.duplicate) for topic, packet in driver.got
    ]


def test_several_packets_in_one_segment_are_taken_in_order() -> None:
    driver = Driver().feed(b"".join(STREAM))
    assert [entry[1] for entry in seen(driver)] == [b"early", b"", bytes(300), b"x", b"y"]
    assert driver.events == [Connected(session_present=True), Subscribed()]


def test_every_packet_may_be_split_at_every_byte() -> None:
    whole = b"".join(STREAM)
    expected = seen(Driver().feed(whole))
    for at in range(1, len(whole)):
        driver = Driver().feed(whole[:at]).feed(whole[at:])
        assert seen(driver) == expected
        assert driver.events == [Connected(session_present=True), Subscribed()]


def test_a_stream_may_come_byte_by_byte() -> None:
    driver = Driver()
    for byte in b"".join(STREAM):
        driver.feed(bytes([byte]))
    assert seen(driver) == seen(Driver().feed(b"".join(STREAM)))


@pytest.mark.parametrize("data", [*STREAM, b"\xe0\x02\x8e\x00"])
def test_a_truncated_packet_waits_and_uses_nothing(data: bytes) -> None:
    for end in range(len(data)):
        driver = Driver()
        assert driver.session.receive(memoryview(data[:end]), 0) == 0
        assert (driver.got, driver.session.events) == ([], [])


def test_what_was_taken_does_not_change_when_the_buffer_is_used_again(live: Driver) -> None:
    buffer = bytearray(publish(b"first", user_properties=[("a", "b")]))
    live.session.receive(memoryview(buffer), 0)
    buffer[:] = bytes(len(buffer))
    topic, packet = live.got[0]
    assert (topic, packet.payload, packet.user_properties) == (
        "things/d/shadow/update",
        b"first",
        [("a", "b")],
    )


# -------------------------------------------------------------------- keep-alive


def test_an_idle_session_pings_well_within_the_keep_alive(live: Driver) -> None:
    last = live.now
    for second in range(1, 601):
        if live.tick(second / 2):
            assert live.now - last <= 10
            last = live.now
            live.feed(PINGRESP)
    assert live.now - last <= 10


def test_a_busy_session_pings_too_since_acks_may_fail_to_come(live: Driver) -> None:
    pings = 0
    for second in range(1, 101):
        pings += live.tick(second)
        live.feed(publish(packet_id=second))
    assert pings >= 10


def test_a_broker_that_fell_silent_is_found_within_one_and_a_half_keep_alives(
    live: Driver,
) -> None:
    live.tick(3)
    live.feed(PINGRESP)
    with pytest.raises(ConnectionLost, match=r"nothing heard from the broker") as caught:
        live.tick(100)
    assert caught.value.reason == "keep_alive"
    assert 10 < live.now - 3 <= 15


def test_any_packet_is_a_sign_of_life(live: Driver) -> None:
    for second in range(1, 61):
        live.tick(second)
        live.feed(publish(packet_id=second))
    assert live.now == 60


def test_the_keep_alive_of_the_broker_holds() -> None:
    driver = Driver().feed(mqtt5.ConnAckPacket(server_keep_alive=2).write() + SUBACK)
    assert driver.session.keep_alive_seconds == 2
    assert driver.tick(1.5) >= 1
    with pytest.raises(ConnectionLost):
        driver.tick(3)


@pytest.mark.parametrize("server_keep_alive", [0, 3600])
def test_a_longer_or_no_keep_alive_of_the_broker_does_not_hide_its_death(
    server_keep_alive: int,
) -> None:
    connack = mqtt5.ConnAckPacket(server_keep_alive=server_keep_alive).write()
    driver = Driver().feed(connack + SUBACK)
    with pytest.raises(ConnectionLost):
        driver.tick(15)


def test_no_ping_is_sent_before_connack(driver: Driver) -> None:
    assert driver.tick(10) == 0


def test_a_broker_that_never_answers_connect_is_found_too(driver: Driver) -> None:
    with pytest.raises(ConnectionLost):
        driver.tick(15)


def test_a_process_that_was_stopped_reads_before_it_blames_the_broker(live: Driver) -> None:
    live.tick(3)
    live.now = 1000  # SIGSTOP, SIGCONT: the timer runs before what waits in the socket is read
    live.session.tick(live.now)
    assert live.session.outgoing == [PINGREQ]
    live.feed(PINGRESP)
    live.tick(1004)
    live.feed(PINGRESP)


def test_a_broker_that_died_while_the_process_was_stopped_is_found_in_time(live: Driver) -> None:
    live.tick(3)
    live.now = 1000
    live.session.tick(live.now)
    with pytest.raises(ConnectionLost):
        live.tick(1015)


# -------------------------------------------------------------------- with a broker in memory


def test_with_a_broker_that_loses_connections_every_message_is_acknowledged_once_in_order() -> None:
    broker = MemoryBroker()
    ledger = Ledger()
    chance = random.Random(7)
    sent = [b"%d" % number for number in range(500)]
    waiting = list(sent)
    taken: list[bytes] = []
    while len(broker.acked) < len(sent):
        to_session: list[bytes] = []
        link = Link(broker, to_session.append, lambda: None)
        ledger.begin_epoch()

        def take(topic: str, packet: mqtt5.PublishPacket) -> None:
            assert topic == "things/d/shadow/update"
            taken.append(packet.payload)
            assert packet.packet_id is not None
            delivery = ledger.receive(packet.packet_id, 1, 0)
            if chance.random() < 0.9:
                ledger.complete([delivery])

        session = Session(OPTIONS, take)
        session.connect(0, 10)
        while chance.random() > 0.02:
            for data in session.outgoing:
                link.receive(data)
            session.outgoing.clear()
            for _ in range(min(3, len(waiting))):
                if session.state is State.LIVE:
                    broker.publish("things/d/shadow/update", waiting.pop(0))
            data = b"".join(to_session)
            to_session.clear()
            assert session.receive(memoryview(data), 0) == len(data)
            link.receive(ledger.take_acks())
            if ledger.unacknowledged == 10:
                break
        link.closed()
    assert sorted(message.payload for message in broker.acked) == sorted(sent)
    assert set(taken) == set(sent)
    assert not any(link.strangers for link in broker.links)
