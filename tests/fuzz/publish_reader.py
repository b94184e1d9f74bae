"""A second reader of PUBLISH packets, by the standard and nothing else.

Lives here: cutting a stream into packets, and reading a PUBLISH that is right beyond doubt. Rules:
what MQTT 5 leaves to the receiver (control characters, subscription identifiers that nobody asked
for) is in doubt and reads as None; nothing of the codec under test is used. Must not come in: what
a session does with a packet.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Message", "frames_of", "message_of"]

PUBLISH = 3
_MAX_LENGTH_BYTES = 4
_CERTAIN_LIMIT = 0x20
_NON_CHARACTERS = range(0xFDD0, 0xFDF0)


class Message(NamedTuple):
    """What a PUBLISH says."""

    topic: str
    payload: bytes
    packet_id: int | None
    duplicate: bool
    retain: bool
    qos: int
    alias: int | None
    user_properties: tuple[tuple[str, str], ...]


class _DoubtfulError(Exception):
    """It is wrong, or the standard lets receivers decide."""


def frames_of(stream: bytes) -> tuple[list[bytes], bytes]:
    """Cut at the packets' own lengths; return the packets and what is none (MQTT 5 §2.1.4)."""
    frames: list[bytes] = []
    at = 0
    while True:
        length = 0
        for index in range(_MAX_LENGTH_BYTES):
            if at + 1 + index >= len(stream):
                return frames, stream[at:]
            byte = stream[at + 1 + index]
            length |= (byte & 0x7F) << (7 * index)
            if not byte & 0x80:
                break
        else:
            return frames, stream[at:]
        end = at + 2 + index + length
        if end > len(stream):
            return frames, stream[at:]
        frames.append(stream[at:end])
        at = end


def message_of(frame: bytes) -> Message | None:
    """Read a complete packet; None unless it is a PUBLISH and right beyond doubt (§3.3)."""
    if frame[0] >> 4 != PUBLISH:
        return None
    try:
        return _Reader(frame).message()
    except _DoubtfulError:
        return None


class _Reader:
    def __init__(self, frame: bytes) -> None:
        self._data = frame
        self._at = 1

    def message(self) -> Message:
        flags = self._data[0] & 0x0F
        qos = flags >> 1 & 3
        duplicate = bool(flags & 8)
        self._sure(qos in (0, 1) and not (duplicate and not qos))
        self._varint()  # the packet's length, by which it was cut
        topic = self._text()
        self._sure("+" not in topic and "#" not in topic)
        packet_id = None
        if qos:
            packet_id = self._number(2)
            self._sure(packet_id != 0)
        alias, user = self._properties()
        return Message(
            topic, self._data[self._at :], packet_id, duplicate, bool(flags & 1), qos, alias, user
        )

    def _properties(self) -> tuple[int | None, tuple[tuple[str, str], ...]]:
        length = self._varint()
        end = self._at + length
        alias = None
        user = []
        seen = set()
        while self._at < end:
            kind = self._number(1)
            self._sure(kind not in seen)
            if kind == 0x26:
                user.append((self._text(), self._text()))
                continue
            seen.add(kind)
            if kind == 0x01:
                self._sure(self._number(1) < 2)
            elif kind == 0x02:
                self._number(4)
            elif kind == 0x23:
                alias = self._number(2)
                self._sure(alias != 0)
            elif kind == 0x03:
                self._text()
            elif kind == 0x08:
                text = self._text()
                self._sure(bool(text) and "+" not in text and "#" not in text)
            elif kind == 0x09:
                self._bytes(self._number(2))
            else:
                raise _DoubtfulError
        self._sure(self._at == end)
        return alias, tuple(user)

    def _varint(self) -> int:
        value = 0
        for index in range(_MAX_LENGTH_BYTES):
            byte = self._number(1)
            value |= (byte & 0x7F) << (7 * index)
            if not byte & 0x80:
                self._sure(byte != 0 or index == 0)  # the shortest form (MQTT-1.5.5-1)
                return value
        raise _DoubtfulError

    def _text(self) -> str:
        try:
            text = self._bytes(self._number(2)).decode()
        except UnicodeDecodeError:
            raise _DoubtfulError from None
        for character in text:
            code = ord(character)
            self._sure(
                code >= _CERTAIN_LIMIT
                and not 0x7F <= code < 0xA0
                and code not in _NON_CHARACTERS
                and code & 0xFFFE != 0xFFFE
            )
        return text

    def _number(self, count: int) -> int:
        return int.from_bytes(self._bytes(count), "big")

    def _bytes(self, count: int) -> bytes:
        self._sure(self._at + count <= len(self._data))
        self._at += count
        return self._data[self._at - count : self._at]

    def _sure(self, condition: bool) -> None:  # noqa: FBT001 - private
        if not condition:
            raise _DoubtfulError
