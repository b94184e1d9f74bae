"""Documents out of a recorded file instead of a family.

Lives here: the file's form, and `Replay`, a `families.Source`. Rules:

- A file has one JSON object a line: `{"offset_seconds": 1.25, "topic": "things/a/shadow/update",
  "payload": "{…}"}`, with the payload as text, or as `payload_base64`. Offsets never fall.
- Recorded devices are told apart by topic, in the order of their first message. Device `number` of
  the rig plays recorded device `number` modulo their count, beginning again at the end: a recording
  of a hundred devices drives a hundred thousand.
- A payload that is a shadow document is given the rig's time, sequence number and trail, so that a
  check can find it; what it says of `desired` stays. What is no such document is published as it
  was, and no check looks for it.

Must not come in: clocks, connections.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import orjson

from load.errors import BadOption
from load.families import document

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Recorded", "Replay", "line"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One message of a recording."""

    offset_seconds: float
    """After the recording's start, 0 or more."""
    topic: str
    payload: bytes


class Replay:
    """A recording as a source of documents.

    Args:
        messages: in the order of their offsets.
        trail: whether each document gets a leaf that only it writes.

    Raises:
        BadOption: there is none, or offsets fall.
    """

    def __init__(self, messages: Iterable[Recorded], *, trail: bool = False) -> None:
        self._trail = trail
        devices: dict[str, int] = {}
        self._documents: list[list[_Document]] = []
        self._offsets: list[tuple[float, int]] = []
        last = 0.0
        for message in messages:
            if message.offset_seconds < last:
                raise BadOption(f"the recording's offset {message.offset_seconds:g} s falls")
            last = message.offset_seconds
            device = devices.setdefault(message.topic, len(devices))
            if device == len(self._documents):
                self._documents.append([])
            self._documents[device].append(_Document.of(message.payload))
            self._offsets.append((message.offset_seconds, device))
        if not self._documents:
            raise BadOption("the recording is empty")
        self._next = 0

    @classmethod
    def load(cls, path: Path, *, trail: bool = False) -> Self:
        """Read a file.

        Raises:
            BadOption: it cannot be read; the message names the line.
        """
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise BadOption(f"the recording {path} can't be read: {error.strerror}") from None
        return cls(
            [_recorded(text, f"{path}:{at}") for at, text in enumerate(lines, 1) if text.strip()],
            trail=trail,
        )

    @property
    def devices(self) -> int:
        """Recorded devices."""
        return len(self._documents)

    @property
    def seconds(self) -> float:
        """Offset of the last message."""
        return self._offsets[-1][0]

    @property
    def rate(self) -> float:
        """Messages a second over the whole recording; 0 if it has no length."""
        return len(self._offsets) / self.seconds if self.seconds else 0.0

    def document(self, number: int, sequence: int, now_us: int) -> bytes:
        """Return a document; see `families.Source`."""
        recorded = self._documents[number % len(self._documents)]
        return recorded[sequence % len(recorded)].stamped(sequence, now_us, trail=self._trail)

    def due(self, seconds: float) -> list[int]:
        """Return the recorded devices whose messages have become due by `seconds` after the start.

        Each message is returned once; after the last there are no more.
        """
        start = self._next
        offsets = self._offsets
        while self._next < len(offsets) and offsets[self._next][0] <= seconds:
            self._next += 1
        return [device for _, device in offsets[start : self._next]]


@dataclass(frozen=True, slots=True)
class _Document:
    payload: bytes
    inner: bytes | None
    """Members of `reported`, each after a comma; None: no shadow document."""
    desired: bytes

    @classmethod
    def of(cls, payload: bytes) -> Self:
        try:
            state = orjson.loads(payload)["state"]
            reported, desired = state.get("reported", {}), state.get("desired", ...)
            good = isinstance(reported, dict)
        except (ValueError, TypeError, KeyError, AttributeError):
            good = False
        if not good:
            return cls(payload, None, b"")
        for ours in ("seq", "trail"):
            reported.pop(ours, None)
        text = orjson.dumps(reported)[1:-1]
        tail = b"" if desired is ... else b',"desired":' + orjson.dumps(desired)
        return cls(b"", b"," + text if text else b"", tail)

    def stamped(self, sequence: int, now_us: int, *, trail: bool) -> bytes:
        if self.inner is None:
            return self.payload
        made = document(self.inner, sequence, now_us, trail=trail)
        if not self.desired:
            return made
        head, mark, time = made.rpartition(b'},"timestamp":')
        return head + self.desired + mark + time


def line(offset_seconds: float, topic: str, payload: bytes) -> bytes:
    """Return one line of a recording."""
    kept: dict[str, Any] = {"offset_seconds": round(offset_seconds, 6), "topic": topic}
    try:
        kept["payload"] = payload.decode()
    except UnicodeDecodeError:
        kept["payload_base64"] = base64.b64encode(payload).decode()
    return orjson.dumps(kept) + b"\n"


def _recorded(text: bytes, where: str) -> Recorded:
    try:
        fields = orjson.loads(text)
        if "payload_base64" in fields:
            payload = base64.b64decode(fields["payload_base64"], validate=True)
        else:
            payload = fields["payload"].encode()
        offset, topic = float(fields["offset_seconds"]), fields["topic"]
        good = offset >= 0 and isinstance(topic, str) and topic != ""
    except (ValueError, TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise BadOption(f'{where} is not {{"offset_seconds": …, "topic": …, "payload": …}}')
    return Recorded(offset, topic, payload)
