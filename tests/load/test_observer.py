"""The observer between broker and service: every PUBACK is seen, however the bytes are divided."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import mqtt5
import pytest

import backing
from backing import Direction
from load.device import Connected, Device, Message, Subscribed
from load.errors import BrokenConnection
from load.families import Mix
from load.observer import Observer
from tests.load.rig import options_for, run, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(60)

QOS_1 = mqtt5.QoS.AT_LEAST_ONCE


def publish(packet_id: int, *, sequence: int = 0, duplicate: bool = False) -> bytes:
    payload = Mix().document(packet_id, sequence, time.time_ns() // 1000 - 2_000_000)
    return mqtt5.PublishPacket(
        "things/x/shadow/update", payload, qos=QOS_1, packet_id=packet_id, duplicate=duplicate
    ).write()


def puback(packet_id: int, code: int = 0) -> bytes:
    return mqtt5.PubAckPacket(packet_id, reason_code=mqtt5.PubAckReasonCode(code)).write()


def test_every_ack_is_seen_wherever_the_bytes_are_split() -> None:
    to_service = publish(7) + mqtt5.PingRespPacket().write() + publish(300)
    to_broker = mqtt5.PingReqPacket().write() + puback(7) + puback(300)
    for size in range(1, len(to_service)):
        observer = Observer("there", 1)
        link = observer._watch()
        for at in range(0, len(to_service), size):
            link.came(Direction.TO_CLIENT, to_service[at : at + size])
        assert observer.held == 2
        for at in range(0, len(to_broker), size):
            link.came(Direction.TO_SERVER, to_broker[at : at + size])
        assert (observer.durable, observer.held, observer.most_held) == (2, 0, 2)
        took = observer.seen.phase.puback
        assert took.count == 2
        assert 1.9 < took.least_seconds <= took.most_seconds < 60


def test_what_is_refused_or_has_no_time_is_counted_apart() -> None:
    observer = Observer("there", 1)
    link = observer._watch()
    stranger = mqtt5.PublishPacket("t", b"stranger", qos=QOS_1, packet_id=2).write()
    quiet = mqtt5.PublishPacket("t", b"QoS 0").write()
    link.came(Direction.TO_CLIENT, publish(1) + stranger + quiet)
    link.came(Direction.TO_SERVER, puback(1, 131) + puback(2) + puback(2) + puback(9))
    assert (observer.seen.phase.refused, observer.durable, observer.unstamped) == (1, 1, 1)
    assert observer.seen.phase.puback.count == 0
    assert observer.held == 0


def test_a_delivery_of_a_connection_that_ended_is_not_held_any_more() -> None:
    observer = Observer("there", 1)
    link = observer._watch()
    link.came(Direction.TO_CLIENT, publish(1) + publish(2))
    link.ended()
    assert observer.held == 0
    again = observer._watch()
    again.came(Direction.TO_CLIENT, publish(1, duplicate=True))
    again.came(Direction.TO_SERVER, puback(1))
    phase = observer.seen.phase
    assert (phase.published, phase.sent_again, phase.acknowledged, phase.connected) == (3, 1, 1, 2)


def test_what_is_no_mqtt_ends_the_connection() -> None:
    link = Observer("there", 1)._watch()
    with pytest.raises(BrokenConnection, match="plain MQTT alone"):
        link.came(Direction.TO_CLIENT, b"\xff" * 9)


@pytest.fixture
def mosquitto() -> Iterator[backing.Mosquitto]:
    with backing.Mosquitto() as broker:
        yield broker


async def serve(port: int, pattern: str, ready: asyncio.Event) -> None:
    """A service that acknowledges each message as it comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    device = Device(f"service-{port}")
    writer.write(device.connect())
    count = 0
    try:
        while data := await reader.read(65_536):
            for event in device.receive(data):
                match event:
                    case Connected():
                        writer.write(device.subscribe(pattern))
                    case Subscribed():
                        ready.set()
                    case Message():
                        count += 1
            writer.write(device.pending)
            device.pending = b""
    finally:
        writer.close()


async def test_every_publish_becomes_durable_as_the_observer_sees_it(
    mosquitto: backing.Mosquitto, unique: str
) -> None:
    async with Observer(mosquitto.host, mosquitto.port) as observer:
        ready = asyncio.Event()
        service = asyncio.create_task(serve(observer.port, f"{unique}/+/shadow/update", ready))
        await asyncio.wait_for(ready.wait(), 20)
        observer.begin_phase("load")
        options = options_for(
            unique, mosquitto.url, shape="ramp:0.3:10,plateau:1:200", alone=False, watch=0
        )
        report = await run(options)
        await until("all is durable", lambda: observer.durable == report.acknowledged)
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)
    assert report.missing == 0
    assert report.acknowledged > 100
    figures = observer.as_json()
    load = next(one for one in figures["phases"] if one["name"] == "load")
    assert load["to_durable"]["count"] == load["delivered"] == report.acknowledged
    assert figures["held"] == figures["unstamped"] == 0
    assert load["lateness"]["count"] > 0
