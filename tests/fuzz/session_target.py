"""The ingest session under any bytes: messages in order, or one error, and nothing else.

Lives here: streams of a broker to begin with, and what must hold of a session that takes them:

- only `ProtocolViolation`, `MqttRefused` and `ConnectionLost` leave it;
- however the stream is cut, the same messages come out and the same kind of error;
- every right PUBLISH before the error is handed over once, in order, with what a second reader
  finds in it; nothing else is handed over, and no right PUBLISH is an error;
- no complete packet is waited for, and what waits stays below the Maximum Packet Size; aliases,
  events and answers stay few;
- the farewell of an error is a DISCONNECT with its code;
- in the connection around it, after the error nothing is handed over and nothing follows
  DISCONNECT, whatever else the broker sends, and the read buffer stays bounded.

Rules: every check begins with a new session. Must not come in: processes, progress.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, cast

import mqtt5

from shadowsvc.errors import ConnectionLost, MqttError, MqttRefused, ProtocolViolation
from shadowsvc.mqtt.session import Session, SessionOptions, State
from shadowsvc.mqtt.transport import Wire
from tests.fuzz.mutation import mutate
from tests.fuzz.publish_reader import PUBLISH, Message, frames_of, message_of
from tests.fuzz.target import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["SessionCase", "SessionTarget"]

_DOCUMENTED = (ProtocolViolation, MqttRefused, ConnectionLost)
_ALIAS_MAXIMUM = 4
_MAX_ANSWERS = 64
_BUFFER_BYTES = 512 * 1024
_GRANTED = mqtt5.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE
_OPENING = (
    mqtt5.ConnAckPacket().write(),
    mqtt5.SubAckPacket(1, [_GRANTED]).write(),
)
_TOPICS = ("things/d/shadow/update", "t", "é", "a/" * 20 + "😀")
_TEXTS = ("", "x", "seq", "timestamp", "é", "v" * 130)
_CODES = (0, 1, 2, 4, 128, 129, 130, 135, 142, 155, 255)
# The codec's enumerations can't be iterated.
_CONNACK_CODES, _SUBACK_CODES, _DISCONNECT_CODES = (
    [getattr(kind, name) for name in dir(kind) if name.isupper()]
    for kind in (mqtt5.ConnAckReasonCode, mqtt5.SubAckReasonCode, mqtt5.DisconnectReasonCode)
)
TOKENS = (
    b"\x30", b"\x32", b"\x3a", b"\x34", b"\x36", b"\x20\x03\x00\x00\x00",
    b"\x90\x04\x00\x01\x00\x01", b"\xd0\x00", b"\xe0\x00", b"\xe0\x01\x8e",
    b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff\x01", b"\x80\x00", b"\x00\x00", b"\xff\xff",
    b"\x23\x00\x01", b"\x23\x00\x00",
    b"\x23\xff\xff", b"\x26", b"\x26\x00\x01a\x00\x01b", b"\x0b\x00", b"\x02", b"\x00\x01t",
    b"\xc0\x80", b"\xed\xa0\x80", b"\x40\x02", b"\x10\x00", b"\x82\x00", b"\xf0\x00",
    b"\x32\x06\x00\x01t\x00\x01\x00", b"\x30\x04\x00\x01t\x00",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SessionCase:
    """What the broker sends, how it is cut, and how far the session was before."""

    data: bytes
    chance: int
    """Decides about the cuts."""
    opening: int = 2
    """Right packets that come before: 0, CONNACK, CONNACK and SUBACK."""
    maximum_packet_size_bytes: int = 100_000
    on_the_wire: bool = False
    """Whether a connection takes the stream too."""

    def with_data(self, data: bytes) -> Self:
        return replace(self, data=data)

    def as_json(self) -> dict[str, Any]:
        return {
            "data": self.data.hex(),
            "chance": self.chance,
            "opening": self.opening,
            "maximum_packet_size_bytes": self.maximum_packet_size_bytes,
            "on_the_wire": self.on_the_wire,
        }


class SessionTarget:
    """See the module's docstring."""

    name = "session"

    def __init__(self) -> None:
        self._loop = _Clockwork()

    def make(self, draw: random.Random) -> SessionCase:
        opening = 2 if draw.random() < 0.8 else draw.randrange(2)
        data = _stream(draw, opening)
        if draw.random() < 0.6:
            data = mutate(data, draw, tokens=TOKENS, other=lambda: _stream(draw, opening))
        return SessionCase(
            data,
            draw.randrange(1 << 30),
            opening,
            100_000 if draw.random() < 0.85 else draw.choice((20, 60, 300)),
            on_the_wire=draw.random() < 0.2,
        )

    def from_json(self, members: dict[str, Any]) -> SessionCase:
        return SessionCase(**(members | {"data": bytes.fromhex(members["data"])}))

    def check(self, case: SessionCase) -> str:
        whole = _in_packets(case)
        cut = _in_pieces(case)
        if cut.got != whole.got:
            raise Finding("cut elsewhere, other messages", f"{len(cut.got)}, {len(whole.got)}")
        if type(cut.error) is not type(whole.error):
            raise Finding("cut elsewhere, another error", f"{cut.error!r}, {whole.error!r}")
        if case.on_the_wire:
            self._on_the_wire(case, whole)
        if whole.error is None:
            return "all taken" if not whole.rest else "waits for more"
        return type(whole.error).__name__

    def _on_the_wire(self, case: SessionCase, whole: _Run) -> None:
        wire = _Taps(self._loop, case)
        for piece in _pieces(case, case.data):
            wire.take(piece)
        if wire.run.got != whole.got:
            raise Finding("through the connection, other messages")
        if type(wire.error) is not type(whole.error):
            raise Finding("through the connection, another end", repr(wire.error))
        if isinstance(wire.error, ConnectionLost) and wire.error.reason == "internal_error":
            raise Finding("the session raised what nobody expects")
        if wire.error is not None:
            # A right message, which comes too late.
            wire.take(b"\x32\x06\x00\x01t\x00\x01\x00" * 3)
            if wire.run.got != whole.got:
                raise Finding("handed over after the error")
        wire.check_sent()


class _Run:
    """A session, what it handed over, and how it ended."""

    def __init__(self, case: SessionCase) -> None:
        self.got: list[tuple[str, mqtt5.PublishPacket]] = []
        self.error: MqttError | None = None
        self.rest = b""
        self.answers = 0
        self.session = Session(_options(case), self.publish)
        self.session.connect(0.0, 10)
        self.session.outgoing.clear()

    def publish(self, topic: str, packet: mqtt5.PublishPacket) -> None:
        self.got.append((topic, packet))

    def take(self, data: bytes) -> int | None:
        """Feed it; None after an error."""
        try:
            used = self.session.receive(memoryview(data), 0.0)
        except _DOCUMENTED as error:
            self.error = error
            _check_farewell(self.session, error)
            return None
        finally:
            self.answers += len(self.session.outgoing) + len(self.session.events)
            self.session.outgoing.clear()
            self.session.events.clear()
            if len(self.session._aliases) > _ALIAS_MAXIMUM:
                raise Finding("more aliases than announced")
        if not 0 <= used <= len(data):
            raise Finding("used more than there was", f"{used} of {len(data)}")
        return used


def _options(case: SessionCase) -> SessionOptions:
    return SessionOptions(
        "c",
        ("$share/g/a/+",),
        topic_alias_maximum=_ALIAS_MAXIMUM,
        maximum_packet_size_bytes=case.maximum_packet_size_bytes,
    )


def _in_packets(case: SessionCase) -> _Run:  # noqa: C901 - one promise after another
    """Hand in one packet at a time and see what comes of each."""
    run = _Run(case)
    for packet in _OPENING[: case.opening]:
        run.take(packet)
    frames, rest = frames_of(case.data)
    aliases: dict[int, str] = {}
    for frame in frames:
        before = len(run.got)
        may_publish = run.session.state in (State.SUBSCRIBING, State.LIVE)
        used = run.take(frame)
        message = message_of(frame)
        wanted = None
        if message is not None and may_publish:
            wanted = _resolved(message, aliases)
        if used is None:
            if wanted is not None and len(frame) <= case.maximum_packet_size_bytes:
                raise Finding("a right PUBLISH is an error", f"{run.error} {frame.hex()[:200]}")
            if len(run.got) != before:
                raise Finding("an error, and handed over all the same")
            return run
        if used != len(frame):
            raise Finding("a complete packet is waited for", frame.hex()[:200])
        if len(run.got) - before != (frame[0] >> 4 == PUBLISH):
            raise Finding("handed over another number of times than once")
        if frame[0] >> 4 == PUBLISH:
            _check_message(run.got[-1], wanted, frame)
            topic, publish = run.got[-1]
            if publish.topic_alias is not None:
                aliases[publish.topic_alias] = topic
    if run.answers > 2 * len(frames) + _MAX_ANSWERS:
        raise Finding("more answers than packets")
    used = run.take(rest) if rest else 0
    if used:
        raise Finding("half a packet was used", rest.hex()[:200])
    run.rest = rest
    return run


def _resolved(message: Message, aliases: dict[int, str]) -> Message | None:
    """Return it with its topic; None when its alias makes it wrong (MQTT 5 §3.3.2.3.4)."""
    if message.alias is not None and message.alias > _ALIAS_MAXIMUM:
        return None
    if message.topic:
        return message
    if message.alias in aliases:
        return message._replace(topic=aliases[message.alias])
    return None


def _check_message(
    got: tuple[str, mqtt5.PublishPacket], wanted: Message | None, frame: bytes
) -> None:
    if wanted is None:  # in doubt, and the codec took it
        return
    topic, packet = got
    seen = Message(
        topic,
        bytes(packet.payload or b""),
        packet.packet_id,
        packet.duplicate,
        packet.retain,
        int(packet.qos),
        packet.topic_alias,
        tuple(packet.user_properties or ()),
    )
    if seen != wanted:
        raise Finding("another message than was sent", f"{seen} of {frame.hex()}"[:400])


def _in_pieces(case: SessionCase) -> _Run:
    """Hand in the same bytes, cut anywhere."""
    run = _Run(case)
    for piece in _pieces(case, b"".join(_OPENING[: case.opening]) + case.data):
        run.rest += piece
        used = run.take(run.rest)
        if used is None:
            return run
        run.rest = run.rest[used:]
        if len(run.rest) > case.maximum_packet_size_bytes:
            raise Finding("more waits than a packet may have", str(len(run.rest)))
    return run


def _pieces(case: SessionCase, data: bytes) -> list[bytes]:
    draw = random.Random(case.chance)
    if draw.random() < 0.1 and len(data) < 400:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(8)))
    bounds = [0, *cuts, len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


def _check_farewell(session: Session, error: MqttError) -> None:
    code = error.code if isinstance(error, ProtocolViolation) else 0
    packet, _ = mqtt5.read(memoryview(session.farewell(code)))
    if not isinstance(packet, mqtt5.DisconnectPacket) or int(packet.reason_code) != code:
        raise Finding("a farewell that says something else", repr(packet))
    if not str(error) or not error.reason:
        raise Finding("an error without words")


# ------------------------------------------------------------------ the connection around it


class _Clockwork:
    """As much of a loop as the protocol needs; no time passes."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def __del__(self) -> None:
        self._loop.close()

    def create_future(self) -> asyncio.Future[None]:
        return self._loop.create_future()

    def time(self) -> float:
        return 0.0

    def call_later(self, _seconds: float, _call: Callable[..., None], *_: object) -> _Timer:
        return _Timer()

    call_at = call_later


class _Timer:
    def cancel(self) -> None:
        """Nothing was going to happen."""


class _Taps:
    """A connection's protocol on a transport and an ingest that take notes."""

    def __init__(self, loop: _Clockwork, case: SessionCase) -> None:
        self.run = _Run(case)
        self._sent: list[bytes] = []
        session = Session(_options(case), self.run.publish)
        self._protocol = Wire(session, cast("Any", self), cast("Any", loop))
        self._protocol.connection_made(cast("Any", self))
        self._protocol.start(10, 1.0)
        self._limit = case.maximum_packet_size_bytes + _BUFFER_BYTES
        for packet in _OPENING[: case.opening]:
            self.take(packet)

    @property
    def error(self) -> BaseException | None:
        ended = self._protocol.ended
        return ended.exception() if ended.done() else None

    def take(self, data: bytes) -> None:
        while data:
            room = self._protocol.get_buffer(-1)
            if not len(room):
                raise Finding("no room to read into")
            count = min(len(room), len(data))
            room[:count] = data[:count]
            self._protocol.buffer_updated(count)
            data = data[count:]
            if len(self._protocol._buffer) > self._limit:
                raise Finding("the read buffer grows", str(len(self._protocol._buffer)))

    def check_sent(self) -> None:
        """See that what was sent is whole packets and that nothing follows DISCONNECT."""
        stream = b"".join(self._sent)
        frames, rest = frames_of(stream)
        if rest:
            raise Finding("half a packet was sent")
        kinds = [frame[0] >> 4 for frame in frames]
        if 14 in kinds[:-1]:
            raise Finding("something was sent after DISCONNECT")
        if isinstance(self.error, ProtocolViolation) and kinds[-1] != 14:
            raise Finding("a violation without a farewell")

    # As a transport.

    def write(self, data: bytes) -> None:
        self._sent.append(bytes(data))

    def pause_reading(self) -> None:
        """Go on all the same: bytes that were under way arrive."""

    resume_reading = pause_reading

    def is_closing(self) -> bool:
        return False

    # As an ingest.

    def begin_chunk(self) -> None:
        """Nothing to do."""

    end_chunk = begin_chunk
    subscribed_now = begin_chunk

    def connected(self, *, session_present: bool) -> None:
        """Nothing to do."""

    def over_receive_maximum(self) -> bool:
        return False


# ------------------------------------------------------------------ streams to begin with


def _stream(draw: random.Random, opening: int) -> bytes:
    packets = [_packet(draw) for _ in range(draw.choice((1, 2, 3, 3, 5, 8)))]
    if opening == 0:
        packets.insert(0, _connack(draw))
    if opening < 2 and draw.random() < 0.8:
        packets.insert(draw.randrange(2), _suback(draw))
    return b"".join(packets)


def _connack(draw: random.Random) -> bytes:
    code = draw.choice(_CONNACK_CODES) if draw.random() < 0.3 else None
    more: dict[str, Any] = {} if code is None else {"reason_code": code}
    return mqtt5.ConnAckPacket(
        session_present=code is None and draw.random() < 0.5,
        server_keep_alive=draw.choice((None, 0, 1, 60)),
        **more,
    ).write()


def _suback(draw: random.Random) -> bytes:
    codes = [_GRANTED] * draw.choice((0, 1, 1, 1, 1, 2))
    if draw.random() < 0.3:
        codes = [draw.choice(_SUBACK_CODES)]
    return mqtt5.SubAckPacket(draw.choice((1, 1, 1, 2, 65535)), codes).write()


def _packet(draw: random.Random) -> bytes:  # noqa: PLR0911 - a table
    chance = draw.random()
    if chance < 0.75:
        return _publish(draw)
    if chance < 0.83:
        return mqtt5.PingRespPacket().write()
    if chance < 0.87:
        return _suback(draw)
    if chance < 0.88:
        return _connack(draw)
    if chance < 0.9:
        code = draw.choice(_DISCONNECT_CODES)
        return mqtt5.DisconnectPacket(reason_code=code, reason_str=draw.choice((None, "x"))).write()
    if chance < 0.93:
        # Any code, also of the packets that have none like it.
        kind = draw.choice((0x20, 0xE0, 0x40, 0xB0, 0x90))
        body = bytes((draw.randrange(2), draw.choice(_CODES), 0, draw.choice(_CODES)))
        return bytes((kind, len(body))) + body
    if chance < 0.95:
        return draw.choice(_UNUSUAL)
    body = draw.randbytes(draw.randrange(12))
    return bytes((draw.randrange(256), len(body))) + body


_UNUSUAL = (
    mqtt5.PubAckPacket(1).write(),
    mqtt5.PubRecPacket(1).write(),
    mqtt5.PubRelPacket(1).write(),
    mqtt5.PubCompPacket(1).write(),
    mqtt5.PingReqPacket().write(),
    mqtt5.ConnectPacket("x").write(),
    mqtt5.UnsubAckPacket(1, [mqtt5.UnsubAckReasonCode.SUCCESS]).write(),
    mqtt5.DisconnectPacket().write(),
    mqtt5.AuthPacket().write(),
)


def _publish(draw: random.Random) -> bytes:
    qos = draw.randrange(2)
    alias = draw.choice((None, None, None, 1, 2, _ALIAS_MAXIMUM))
    properties: Sequence[tuple[str, str]] = ()
    if draw.random() < 0.3:
        properties = [(draw.choice(_TEXTS), draw.choice(_TEXTS)) for _ in range(draw.randint(1, 3))]
    size = draw.choice((0, 3, 30, 100, 126, 127, 128, 300))
    if draw.random() < 0.01:
        size = draw.choice((16_384, 70_000))
    return mqtt5.PublishPacket(
        "" if alias is not None and draw.random() < 0.5 else draw.choice(_TOPICS),
        draw.randbytes(size),
        qos=mqtt5.QoS(qos),
        packet_id=draw.choice((1, 2, 255, 256, 65535)) if qos else None,
        duplicate=bool(qos) and draw.random() < 0.2,
        retain=draw.random() < 0.2,
        topic_alias=alias,
        user_properties=list(properties),
        message_expiry_interval=draw.choice((None, None, 0, 5)),
        content_type=draw.choice((None, None, "application/json")),
        response_topic=draw.choice((None, None, "r")),
        correlation_data=draw.choice((None, None, b"\x00\x01")),
    ).write()
