"""Dead letters: what is kept of a message that can never become an update.

Lives here: the row of the table `dead_letter`, made so that Cassandra can't refuse it. Pure, but
for the random id. Rules: the payload is kept up to 64 KiB with its full length and SHA-256; every
text is cut to a limit and holds no U+0000, which the driver would take for its end. A device that
sends too many in a minute is acknowledged and counted instead (`FloodGate`). Must not come in:
drivers.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_PAYLOAD_BYTES", "MAX_TOPIC_CHARS", "SHARDS", "DeadLetter", "FloodGate"]

MAX_PAYLOAD_BYTES = 65536
"""How much of a payload is kept."""

MAX_TOPIC_CHARS = 1024
"""How much of a topic is kept; one of this length may have been cut."""

SHARDS = 8
"""Partitions an hour."""

_HOUR_MS = 3_600_000
_MAX_DETAIL_CHARS = 512
_MAX_PROPERTIES = 1024
_MAX_PROPERTIES_BYTES = 8192
_MAX_DEVICE_CHARS = 128
_MAX_SENDERS = 10_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One row. Times in milliseconds since 1970."""

    bucket_ms: int
    shard: int
    received_ms: int
    device_ms: int | None
    id: uuid.UUID
    client_id: str
    device: str | None
    topic: str
    reason: str
    detail: str
    payload: bytes
    payload_bytes: int
    payload_sha256: bytes
    qos: int
    retain: bool
    duplicate: bool
    user_properties: str | None

    @classmethod
    def of(
        cls,
        *,
        topic: str,
        payload: bytes,
        device: str | None,
        reason: str,
        detail: str,
        received_ms: int,
        device_us: int | None = None,
        client_id: str,
        qos: int,
        retain: bool,
        duplicate: bool,
        user_properties: Sequence[tuple[str, str]],
    ) -> DeadLetter:
        """Make the row of a message, cut to what the table takes."""
        letter_id = uuid.uuid4()
        properties: str | None = None
        if len(user_properties) > _MAX_PROPERTIES:
            properties = '["too long"]'
        elif user_properties:
            text = orjson.dumps([list(pair) for pair in user_properties])
            properties = text.decode() if len(text) <= _MAX_PROPERTIES_BYTES else '["too long"]'
        return cls(
            bucket_ms=received_ms - received_ms % _HOUR_MS,
            shard=letter_id.int % SHARDS,
            received_ms=received_ms,
            device_ms=None if device_us is None else device_us // 1000,
            id=letter_id,
            client_id=client_id,
            device=None if device is None else _text(device, _MAX_DEVICE_CHARS),
            topic=_text(topic, MAX_TOPIC_CHARS),
            reason=reason,
            detail=_text(detail, _MAX_DETAIL_CHARS),
            payload=payload[:MAX_PAYLOAD_BYTES],
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).digest(),
            qos=qos,
            retain=retain,
            duplicate=duplicate,
            user_properties=properties,
        )


class FloodGate:
    """Counts dead letters by sender and minute; bounded in memory whatever comes in."""

    def __init__(self, max_per_minute: int) -> None:
        """Let `max_per_minute` letters a sender pass."""
        self.max_per_minute = max_per_minute
        self._minute = -1
        self._counts: dict[str, int] = {}

    def admits(self, sender: str, now: float) -> bool:
        """Say whether one more letter of `sender` is to be stored at `now` (seconds)."""
        minute = int(now // 60)
        if minute != self._minute:
            self._minute = minute
            self._counts.clear()
        if sender not in self._counts and len(self._counts) >= _MAX_SENDERS:
            sender = ""  # senders beyond the bound share one count
        count = self._counts.get(sender, 0) + 1
        self._counts[sender] = count
        return count <= self.max_per_minute


def _text(value: str, limit: int) -> str:
    return value[:limit].replace("\0", "\N{SYMBOL FOR NULL}")
