"""Messages that trickle in are taken together: the protocol rests between small reads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import mqtt5

from shadowsvc.mqtt.session import Session, SessionOptions
from shadowsvc.mqtt.transport import _FULL_READ_BYTES, Wire
from tests.waiting import until

if TYPE_CHECKING:
    import pytest

GRANTED = mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE
WELCOME = mqtt5.ConnAckPacket().write() + mqtt5.SubAckPacket(1, [GRANTED]).write()


class Transport:
    """Remembers whether it reads."""

    def __init__(self) -> None:
        self.reading = True
        self.pauses = 0
        self.closing = False

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False
        self.pauses += 1

    def resume_reading(self) -> None:
        assert not self.closing, "a closing transport was touched"
        self.reading = True

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        pass

    def get_extra_info(self, _name: str) -> None:
        return None


class Taker:
    """Takes everything; says that there is room unless told otherwise."""

    def __init__(self) -> None:
        self.topics: list[str] = []
        self.full = False

    def connected(self, *, session_present: bool) -> None: ...
    def subscribed_now(self) -> None: ...
    def begin_chunk(self) -> None: ...
    def end_chunk(self) -> None: ...
    def disconnected(self, reason: str) -> None: ...

    def publish(self, topic: str, _packet: mqtt5.PublishPacket) -> None:
        self.topics.append(topic)

    def over_receive_maximum(self) -> bool:
        return self.full


def message(payload: bytes = b"{}") -> bytes:
    return mqtt5.PublishPacket("t", payload, qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=1).write()


def protocol() -> tuple[Any, Transport, Taker]:
    taker, transport = Taker(), Transport()
    session = Session(SessionOptions("c", ("t",)), taker.publish)
    made: Any = Wire(session, taker, asyncio.get_running_loop())  # type: ignore[arg-type]
    made.connection_made(transport)
    made.start(10, asyncio.get_running_loop().time() + 60)
    return made, transport, taker


def feed(made: Any, data: bytes) -> None:
    view = made.get_buffer(-1)
    view[: len(data)] = data
    made.buffer_updated(len(data))


async def reading_again(transport: Transport) -> None:
    await until(lambda: transport.reading)


async def test_reading_rests_after_a_small_read_and_goes_on_by_itself() -> None:
    made, transport, taker = protocol()
    feed(made, WELCOME)
    await reading_again(transport)
    feed(made, message())
    assert not transport.reading
    await reading_again(transport)
    assert taker.topics == ["t"]
    assert transport.pauses == 2


async def test_a_read_that_brought_much_is_followed_by_the_next_at_once() -> None:
    made, transport, taker = protocol()
    feed(made, WELCOME)
    await reading_again(transport)
    pauses = transport.pauses
    feed(made, message(b"x" * _FULL_READ_BYTES))
    assert transport.reading
    assert transport.pauses == pauses
    assert taker.topics == ["t"]


async def test_a_handshake_is_not_slowed_down() -> None:
    made, transport, _ = protocol()
    feed(made, mqtt5.ConnAckPacket().write())
    assert transport.reading


async def test_a_transport_that_closes_meanwhile_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, transport, _ = protocol()
    feed(made, WELCOME)
    assert not transport.reading
    monkeypatch.setattr(transport, "closing", True)
    await asyncio.sleep(0.01)
    assert not transport.reading


async def test_a_rest_does_not_end_the_wait_for_acks() -> None:
    made, transport, taker = protocol()
    feed(made, WELCOME)
    await reading_again(transport)
    taker.full = True
    feed(made, message())
    await asyncio.sleep(0.01)
    assert not transport.reading
    assert made.paused
    taker.full = False
    made.resume_if_room()
    assert transport.reading
