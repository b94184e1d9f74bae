"""The session of an orphan without I/O: what it asks for, what it recognises, when it is over."""

from __future__ import annotations

import mqtt5
import pytest

from shadowsvc.errors import ConnectionLost, MqttRefused, ProtocolViolation
from shadowsvc.mqtt.adopted import AdoptedSession, Marker, Step
from shadowsvc.mqtt.adoption import End, Patience, Watch
from shadowsvc.mqtt.session import SessionOptions

SHARE = ("$share/g/things/+/shadow/update", "$share/g/things/+/shadow/name/+/update")
MARKER = Marker("shadowsvc/marker/g-1", b"this time")
GRANTED = mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE
GONE = mqtt5.UnsubAckReasonCode.SUCCESS
NONE_EXISTED = mqtt5.UnsubAckReasonCode.NO_SUBSCRIPTION_EXISTED


class Bench:
    """A session, and what it sent and took."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self.session = AdoptedSession(
            SessionOptions("g-1", SHARE),
            SHARE,
            MARKER,
            lambda topic, packet: self.taken.append((topic, packet.payload)),
        )
        self.session.connect(0.0, 100)
        self.sent()

    def sent(self) -> list[mqtt5.Packet]:
        packets = []
        for data in self.session.outgoing:
            packet, size = mqtt5.read(memoryview(data))
            assert size == len(data)
            packets.append(packet)
        self.session.outgoing.clear()
        return packets

    def receive(self, *packets: mqtt5.Packet) -> list[mqtt5.Packet]:
        data = b"".join(packet.write() for packet in packets)
        assert self.session.receive(memoryview(data), 0.0) == len(data)
        return self.sent()

    def publish(self, topic: str, payload: bytes) -> None:
        self.receive(mqtt5.PublishPacket(topic, payload, qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=7))

    def resumed(self) -> mqtt5.SubscribePacket:
        (subscribe,) = self.receive(mqtt5.ConnAckPacket(session_present=True))
        assert isinstance(subscribe, mqtt5.SubscribePacket)
        return subscribe

    def unsubscribing(self) -> mqtt5.UnsubscribePacket:
        subscribe = self.resumed()
        (unsubscribe,) = self.receive(mqtt5.SubAckPacket(subscribe.packet_id, [GRANTED]))
        assert isinstance(unsubscribe, mqtt5.UnsubscribePacket)
        return unsubscribe

    def given_up(self) -> None:
        unsubscribe = self.unsubscribing()
        assert not self.receive(mqtt5.UnsubAckPacket(unsubscribe.packet_id, [GONE, GONE]))


def test_the_share_is_given_up_and_never_subscribed() -> None:
    bench = Bench()
    subscribe = bench.resumed()
    assert [one.pattern for one in subscribe.topic_filters] == [MARKER.topic]
    assert bench.session.step is Step.SUBSCRIBE
    (unsubscribe,) = bench.receive(mqtt5.SubAckPacket(subscribe.packet_id, [GRANTED]))
    assert isinstance(unsubscribe, mqtt5.UnsubscribePacket)
    assert unsubscribe.patterns == list(SHARE)
    assert bench.session.step is Step.UNSUBSCRIBE
    assert not bench.receive(mqtt5.UnsubAckPacket(unsubscribe.packet_id, [GONE, NONE_EXISTED]))
    assert bench.session.step is Step.PUBLISH


def test_a_session_that_the_broker_does_not_know_is_asked_for_nothing() -> None:
    bench = Bench()
    assert not bench.receive(mqtt5.ConnAckPacket(session_present=False))
    assert bench.session.step is Step.ABSENT


def test_the_marker_of_this_time_is_recognised_and_no_other() -> None:
    bench = Bench()
    bench.given_up()
    bench.publish("things/d/shadow/update", MARKER.payload)
    bench.publish(MARKER.topic, b"of an earlier time")
    assert bench.session.step is Step.PUBLISH
    bench.publish(MARKER.topic, MARKER.payload)
    assert bench.session.step is Step.MARKED
    assert len(bench.taken) == bench.session.received == 3


def test_messages_are_taken_in_every_step() -> None:
    bench = Bench()
    subscribe = bench.resumed()
    bench.publish("things/a/shadow/update", b"1")
    (unsubscribe,) = bench.receive(mqtt5.SubAckPacket(subscribe.packet_id, [GRANTED]))
    bench.publish("things/a/shadow/update", b"2")
    assert isinstance(unsubscribe, mqtt5.UnsubscribePacket)
    bench.receive(mqtt5.UnsubAckPacket(unsubscribe.packet_id, [GONE, GONE]))
    bench.publish("things/a/shadow/update", b"3")
    bench.publish(MARKER.topic, MARKER.payload)
    bench.publish("things/a/shadow/update", b"late")
    assert [payload for _, payload in bench.taken] == [b"1", b"2", b"3", MARKER.payload, b"late"]
    assert bench.session.step is Step.MARKED


def test_a_refused_unsubscribe_ends_the_attempt() -> None:
    bench = Bench()
    unsubscribe = bench.unsubscribing()
    refused = mqtt5.UnsubAckReasonCode.NOT_AUTHORIZED
    with pytest.raises(MqttRefused, match=r"refused to give up .*NOT_AUTHORIZED") as caught:
        bench.receive(mqtt5.UnsubAckPacket(unsubscribe.packet_id, [GONE, refused]))
    assert caught.value.reason == "unsuback_not_authorized"


@pytest.mark.parametrize("codes", [[], [GONE], [GONE] * 3])
def test_an_unsuback_that_does_not_answer_every_filter_is_a_violation(
    codes: list[mqtt5.UnsubAckReasonCode],
) -> None:
    bench = Bench()
    unsubscribe = bench.unsubscribing()
    with pytest.raises(ProtocolViolation, match="does not answer every filter"):
        bench.receive(mqtt5.UnsubAckPacket(unsubscribe.packet_id, codes))


def test_an_unsuback_that_nobody_asked_for_is_a_violation() -> None:
    bench = Bench()
    bench.given_up()
    with pytest.raises(ProtocolViolation, match="not awaited"):
        bench.receive(mqtt5.UnsubAckPacket(1, [GONE, GONE]))


def test_the_session_ends_by_expiry_0() -> None:
    packet, _ = mqtt5.read(memoryview(Bench().session.end()))
    assert isinstance(packet, mqtt5.DisconnectPacket)
    assert packet.session_expiry_interval == 0
    assert int(packet.reason_code) == 0


# -------------------------------------------------------------------- when it is over

PATIENCE = Patience(quiet_seconds=1.0, stalled_seconds=3.0, restless_seconds=5.0)


def ticks(start: float, end: float) -> list[float]:
    return [start + 0.1 * number for number in range(1, round((end - start) / 0.1) + 1)]


def test_quiet_counts_from_the_last_message_and_only_when_all_is_settled() -> None:
    watch = Watch(PATIENCE, 0.0)
    for now in ticks(0.0, 1.0):
        assert watch.look(now, Step.MARKED, received=5, finished=4, settled=False) is None
    for now in ticks(1.0, 1.9):
        # One more message comes, and is settled.
        assert watch.look(now, Step.MARKED, received=6, finished=6, settled=True) is None
    assert watch.look(2.2, Step.MARKED, received=6, finished=6, settled=True) is End.EMPTIED


def test_it_is_not_over_before_the_marker_however_long_it_is_quiet() -> None:
    watch = Watch(PATIENCE, 0.0)
    for now in ticks(0.0, 2.9):
        assert watch.look(now, Step.PUBLISH, received=5, finished=5, settled=True) is None


def test_time_for_which_nobody_looked_is_not_quiet() -> None:
    watch = Watch(PATIENCE, 0.0)
    assert watch.look(0.1, Step.MARKED, received=5, finished=5, settled=True) is None
    assert watch.look(60.0, Step.MARKED, received=5, finished=5, settled=True) is None
    for now in ticks(60.0, 60.8):
        assert watch.look(now, Step.MARKED, received=5, finished=5, settled=True) is None
    assert watch.look(61.2, Step.MARKED, received=5, finished=5, settled=True) is End.EMPTIED


@pytest.mark.parametrize(
    "step", [Step.CONNECT, Step.SUBSCRIBE, Step.UNSUBSCRIBE, Step.PUBLISH, Step.MARKED]
)
def test_a_step_in_which_nothing_happens_is_given_up(step: Step) -> None:
    watch = Watch(PATIENCE, 0.0)
    for now in ticks(0.0, 2.9):
        assert watch.look(now, step, received=0, finished=0, settled=False) is None
    with pytest.raises(ConnectionLost) as caught:
        watch.look(3.3, step, received=0, finished=0, settled=False)
    assert caught.value.reason == f"stalled_{step.value}"


def test_whatever_still_moves_is_waited_for() -> None:
    watch = Watch(PATIENCE, 0.0)
    for number, now in enumerate(ticks(0.0, 20.0)):
        received, finished = (number, 0) if number < 100 else (100, number)
        assert watch.look(now, Step.PUBLISH, received, finished, settled=False) is None


def test_a_session_that_never_falls_quiet_is_given_up() -> None:
    watch = Watch(PATIENCE, 0.0)
    for number, now in enumerate(ticks(0.0, 5.0)):
        assert watch.look(now, Step.MARKED, number, number, settled=True) is None
    with pytest.raises(ConnectionLost, match="a subscription that these settings do not name"):
        watch.look(5.3, Step.MARKED, 60, 60, settled=True)


def test_an_absent_session_is_over_at_once() -> None:
    watch = Watch(PATIENCE, 0.0)
    assert watch.look(0.1, Step.ABSENT, received=0, finished=0, settled=True) is End.ABSENT
