"""Whatever the network does to a stream, and whatever a broker sends, the session stays sane."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import mqtt5
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowsvc.errors import MqttError, ProtocolViolation
from shadowsvc.mqtt.session import Session, SessionOptions, State

OPTIONS = SessionOptions("c", ("$share/g/a/+",), maximum_packet_size_bytes=100_000)
GRANTED = mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE
OPENING = mqtt5.ConnAckPacket().write() + mqtt5.SubAckPacket(1, [GRANTED]).write()

# The codec's panic on text that is not UTF-8 leaves an exception that nobody can catch behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Surrogates and NUL are in no MQTT string, wildcards in no topic name.
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#"), max_size=20)


@st.composite
def publishes(draw: st.DrawFn) -> bytes:
    qos = draw(st.sampled_from([mqtt5.QoS.AT_MOST_ONCE, mqtt5.QoS.AT_LEAST_ONCE]))
    with_id = qos == mqtt5.QoS.AT_LEAST_ONCE
    return mqtt5.PublishPacket(
        draw(text.filter(bool)),
        draw(st.binary(max_size=200) | st.integers(1, 40_000).map(bytes)),
        qos=qos,
        packet_id=draw(st.integers(1, 65535)) if with_id else None,
        duplicate=with_id and draw(st.booleans()),
        retain=draw(st.booleans()),
        topic_alias=draw(st.none() | st.integers(1, 16)),
        user_properties=draw(st.lists(st.tuples(text, text), max_size=3)),
    ).write()


def session() -> tuple[Session, list[tuple[object, ...]]]:
    got: list[tuple[object, ...]] = []

    def take(topic: str, packet: mqtt5.PublishPacket) -> None:
        got.append(
            (topic, packet.payload, packet.packet_id, packet.duplicate, packet.user_properties)
        )

    made = Session(OPTIONS, take)
    made.connect(0, 10)
    made.receive(memoryview(OPENING), 0)
    assert made.state is State.LIVE
    return made, got


def feed(target: Session, chunks: list[bytes]) -> bytes:
    rest = b""
    for chunk in chunks:
        rest += chunk
        rest = rest[target.receive(memoryview(rest), 0) :]
    return rest


@given(st.lists(publishes() | st.just(mqtt5.PingRespPacket().write()), max_size=8), st.data())
def test_any_chunking_of_a_stream_gives_the_same_publishes(
    packets: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(packets)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20).map(sorted))
    whole, expected = session()
    feed(whole, [stream])
    pieces, got = session()
    bounds = [0, *cuts, len(stream)]
    rest = feed(pieces, [stream[a:b] for a, b in pairwise(bounds)])
    assert rest == b""
    assert got == expected
    assert len(got) == sum(packet[0] >> 4 == 3 for packet in packets)


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_random_bytes_are_refused_or_waited_for_and_nothing_else(chunks: list[bytes]) -> None:
    target, _ = session()
    try:
        feed(target, chunks)
    except MqttError as error:
        target.farewell(error.code if isinstance(error, ProtocolViolation) else 0)


@given(publishes(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4))
def test_a_damaged_packet_is_refused_or_waited_for_and_nothing_else(
    packet: bytes, damages: list[tuple[int, int]]
) -> None:
    damaged = bytearray(packet)
    for at, byte in damages:
        damaged[at % len(damaged)] = byte
    target, got = session()
    with suppress(MqttError):
        rest = feed(target, [bytes(damaged)])
        assert rest == b"" or rest == bytes(damaged)[-len(rest) :]
        assert len(got) <= 1 + len(damaged) // 4
