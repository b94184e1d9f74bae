"""The messages of simulated devices: topics, documents, times, and what real ones get wrong.

Lives here: `Fleet`, which makes one message after another. Rules: under one seed and shape the
same calls give the same messages, but for the times, which the caller gives; a device's times never
repeat; a share of the messages comes again, late, or bad. Must not come in: connections, clocks.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Final

import orjson

from shadowsvc.simulate.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shadowsvc.simulate.families import Family

__all__ = ["Fleet", "Message", "Shape"]

_NAMED_SHARE: Final = 0.02
_WISH_SHARE: Final = 0.03
_UNWISH_SHARE: Final = 0.01
_MOST_LATE: Final = 50
_SEQUENCE_WRAP: Final = 1000
"""`version` fills the three digits below a millisecond."""
_FAR_FUTURE_MS: Final = 30 * 86_400_000


@dataclass(frozen=True, slots=True)
class Shape:
    """What a fleet publishes; shares are fractions of all messages, 0 to 1."""

    families: tuple[str, ...] = ("speaker", "lamp", "thermostat", "meter")
    """Names in `FAMILIES`; device n is of the nth, over and over."""
    repeat_share: float = 0.01
    """Published twice, as after a lost acknowledgement."""
    late_share: float = 0.01
    """Held back until up to 50 later messages are out."""
    bad_share: float = 0.0
    """Documents that must become dead letters."""


@dataclass(frozen=True, slots=True)
class Message:
    """One publish."""

    device: str
    shadow: str
    """Name, or empty for the unnamed one."""
    topic: str
    payload: bytes
    time_us: int
    """Write time of its leaves, microseconds since 1970."""
    state: dict[str, Any]
    """Section to patch; empty when bad."""
    bad: bool = False

    def sha256(self) -> bytes:
        """Digest of the payload: how a dead letter is known again."""
        return hashlib.sha256(self.payload).digest()


class _Device:
    __slots__ = ("family", "last_us", "name", "started", "version")

    def __init__(self, name: str, family: Family) -> None:
        self.name = name
        self.family = family
        self.started = False
        self.version = 0
        self.last_us = 0

    def stamp(self, now_ms: int) -> tuple[int, int]:
        """Return the next (milliseconds, version); their write time is later than all before."""
        self.version += 1
        below = self.version % _SEQUENCE_WRAP
        if now_ms * 1000 + below <= self.last_us:
            now_ms = self.last_us // 1000
            if now_ms * 1000 + below <= self.last_us:
                now_ms += 1
        self.last_us = now_ms * 1000 + below
        return now_ms, self.version


class Fleet:
    """Devices that take turns: each first reports everything, then chance picks who changes.

    Args:
        names: the devices; 1 or more. Topic-safe: letters, digits, `_.:@=+-`.
        seed: of all chance.
        shape: what is published.
        numbers: the devices' numbers, which say of which family each is; 0, 1, 2 … when None.
        topic_prefix: what leads the topics.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        seed: int | str,
        shape: Shape,
        numbers: Sequence[int] | None = None,
        topic_prefix: str = "things",
    ) -> None:
        self._random = Random(seed)  # noqa: S311 - repeatable chance is the purpose
        self._shape = shape
        self._prefix = topic_prefix
        makers: list[Callable[[Random], Family]] = [FAMILIES[name] for name in shape.families]
        self._devices = [
            _Device(name, makers[number % len(makers)](self._random))
            for number, name in zip(numbers or range(len(names)), names, strict=True)
        ]
        self._next_first = 0
        self._again: deque[Message] = deque()
        self._late: deque[tuple[int, Message]] = deque()
        self._made = 0
        self._bad = 0

    def next(self, now_ms: int) -> Message:
        """Make the next message, of the time `now_ms` (milliseconds since 1970)."""
        self._made += 1
        if self._again:
            return self._again.popleft()
        if self._late and self._late[0][0] <= self._made:
            return self._late.popleft()[1]
        random, shape = self._random, self._shape
        device = self._pick()
        if device.started and shape.bad_share and random.random() < shape.bad_share:
            return self._bad_message(device, now_ms)
        message = self._message(device, now_ms)
        chance = random.random()
        if chance < shape.repeat_share:
            self._again.append(message)
        elif chance < shape.repeat_share + shape.late_share:
            due = self._made + random.randrange(1, _MOST_LATE)
            self._late.append((max(due, self._late[-1][0] if self._late else 0), message))
            return self._message(self._pick(), now_ms)
        return message

    def rest(self) -> list[Message]:
        """Return what was held back and is still to be published."""
        rest = [*self._again, *(message for _, message in self._late)]
        self._again.clear()
        self._late.clear()
        return rest

    def _pick(self) -> _Device:
        if self._next_first < len(self._devices):
            self._next_first += 1
            return self._devices[self._next_first - 1]
        return self._devices[int(self._random.random() * len(self._devices))]

    def _message(self, device: _Device, now_ms: int) -> Message:
        random = self._random
        shadow = ""
        state: dict[str, Any]
        chance = random.random()
        if not device.started:
            device.started = True
            state = {"reported": device.family.full(random)}
        elif chance < _NAMED_SHARE:
            shadow = "firmware"
            percent = random.randrange(101)
            progress = {"percent": percent} if percent else None
            state = {"reported": {"version": f"1.{percent % 7}.0", "progress": progress}}
        elif chance < _NAMED_SHARE + _WISH_SHARE:
            wish = device.family.wish(random)
            state = {"desired": wish, "reported": device.family.change(random)}
        elif chance < _NAMED_SHARE + _WISH_SHARE + _UNWISH_SHARE:
            state = {"desired": None}
        else:
            state = {"reported": device.family.change(random)}
        milliseconds, version = device.stamp(now_ms)
        document = {"state": state, "timestamp": milliseconds, "version": version}
        return Message(
            device.name,
            shadow,
            self._topic(device.name, shadow),
            orjson.dumps(document),
            device.last_us,
            state,
        )

    def _bad_message(self, device: _Device, now_ms: int) -> Message:
        """Make a document that no service may accept, different from all others."""
        self._bad += 1
        mark = f"{device.name} {self._bad}".encode()
        kinds = (
            b"\xff\xfe not UTF-8 " + mark,
            b'{"state": {"reported": ' + mark,
            b'{"state": {"reported": {"ratio": NaN}}, "clientToken": "' + mark + b'"}',
            b'["' + mark + b'"]',
            b'{"state": "' + mark + b'"}',
            b'{"state": {"reported": {"n": 0.12345678901234567891}}, "clientToken": "%b"}' % mark,
            b'{"state": {"reported": {"n": 1}}, "clientToken": "%b", "timestamp": %d}'
            % (mark, now_ms + _FAR_FUTURE_MS),
        )
        payload = kinds[self._bad % len(kinds)]
        return Message(device.name, "", self._topic(device.name, ""), payload, 0, {}, bad=True)

    def _topic(self, device: str, shadow: str) -> str:
        named = f"/name/{shadow}" if shadow else ""
        return f"{self._prefix}/{device}/shadow{named}/update"
