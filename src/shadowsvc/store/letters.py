"""Read and delete dead letters for people: what `shadowsvc dead-letters` works on.

Lives here: the statements on the table `dead_letter` other than the service's own insert. Rules:

1. Partitions are asked for one by one, an hour's eight together, the newest hour first; rows come
   in pages and without their payloads. So any number of rows goes through a bounded memory.
2. Reading is at LOCAL_QUORUM: an acknowledged letter is seen.
3. A delete's time is at least that of what it deletes: the clock of the process that wrote the row
   may be ahead of ours, and a delete with an earlier time would do nothing. It is never earlier
   than now either: a tombstone with the time of an old row would keep expired files on the disk
   (Cassandra `CompactionController.getFullyExpiredSSTables` compares the times of files).

Everything here blocks. Must not come in: what a letter is good for (`shadowsvc.replay`), and the
writing of letters (`shadowsvc.store.cassandra`).
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from shadowsvc.store import driver
from shadowsvc.store.deadletter import SHARDS, DeadLetter

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Collection, Iterator, Sequence

    from shadowsvc.settings import Settings

__all__ = ["HOUR_MS", "Entry", "LetterTable", "Selection", "Span", "opened"]

HOUR_MS = 3_600_000
"""A bucket, in milliseconds."""

_PAGE_ROWS = 100
_HOURS_AHEAD = 4
_REQUESTS = 32
_MIN_TIMEOUT_SECONDS = 10.0

# As numbers, since a time written by hand may lie beyond what a Python datetime holds. The names
# of keyspaces are plain (`shadowsvc.settings`), and nothing else is part of a statement's text.
# ruff: noqa: S608
_SCAN = (
    "SELECT toUnixTimestamp(received_at), id, device, topic, reason, detail, payload_bytes, "
    "WRITETIME(reason) FROM {keyspace}.dead_letter WHERE bucket = ? AND shard = ? "
    "AND received_at >= ? AND received_at < ? ORDER BY received_at DESC, id DESC"
)
_KEY = "bucket = ? AND shard = ? AND received_at = ? AND id = ?"
_READ = (
    "SELECT toUnixTimestamp(device_time), client_id, device, topic, reason, detail, payload, "
    "payload_bytes, payload_sha256, qos, retain, duplicate, user_properties "
    "FROM {keyspace}.dead_letter WHERE " + _KEY
)
_DELETE = "DELETE FROM {keyspace}.dead_letter USING TIMESTAMP ? WHERE " + _KEY
_DELETE_SPAN = (
    "DELETE FROM {keyspace}.dead_letter USING TIMESTAMP ? WHERE bucket = ? AND shard = ? "
    "AND received_at >= ? AND received_at < ?"
)


class Selection(NamedTuple):
    """Which letters; an empty collection stands for all. Times of receipt in ms since 1970."""

    since_ms: int
    """inclusive"""
    until_ms: int
    """exclusive"""
    reasons: Collection[str] = ()
    devices: Collection[str] = ()
    ids: tuple[uuid.UUID, ...] = ()

    @property
    def by_time_alone(self) -> bool:
        """Whether every letter of the time is meant."""
        return not (self.reasons or self.devices or self.ids)

    @property
    def hours(self) -> range:
        """The buckets, newest first."""
        newest = (self.until_ms - 1) // HOUR_MS * HOUR_MS
        oldest = self.since_ms // HOUR_MS * HOUR_MS
        return range(newest, oldest - 1, -HOUR_MS)

    @property
    def shards(self) -> list[int]:
        """The shards; that of a row of ours follows from its id (`DeadLetter.of`)."""
        if self.ids:
            return sorted({letter_id.int % SHARDS for letter_id in self.ids})
        return list(range(SHARDS))

    def takes(self, entry: Entry) -> bool:
        """Whether a letter of the right time is one of these."""
        return (
            (not self.reasons or entry.reason in self.reasons)
            and (not self.devices or entry.device in self.devices)
            and (not self.ids or entry.id in self.ids)
        )


class Entry(NamedTuple):
    """A letter without its payload. Times in ms since 1970, `written_us` in microseconds."""

    bucket_ms: int
    shard: int
    received_ms: int
    id: uuid.UUID
    device: str | None
    topic: str
    reason: str
    detail: str
    payload_bytes: int
    written_us: int
    """the time of the row itself (`WRITETIME`)"""


class Span(NamedTuple):
    """What a part of one partition holds."""

    bucket_ms: int
    shard: int
    written_us: int
    """the latest time of its rows"""


_received = attrgetter("received_ms")


class LetterTable:
    """The table, in a connected session. Raises `StoreError` alone; threads may share it."""

    def __init__(self, session: Any, settings: Settings) -> None:
        """Prepare the statements in a session of cassandra-driver."""
        self._session = session
        self._cassandra = settings.cassandra

        def prepared(text: str) -> Any:
            return session.prepare(text.format(keyspace=settings.cassandra.keyspace))

        with driver.errors(self._cassandra):
            self._scan, self._read, self._delete, self._delete_span = map(
                prepared, (_SCAN, _READ, _DELETE, _DELETE_SPAN)
            )
        self._scan.fetch_size = _PAGE_ROWS

    def scan(
        self,
        selection: Selection,
        on_hour: Callable[[int, int], None] = lambda _done, _all: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Entry]:
        """Yield the letters, newest first; `on_hour` is told how many hours of how many are read.

        With ids it ends when all were found, and at the next hour once `stopped` says so.
        """
        shards, hours = selection.shards, selection.hours
        missing = set(selection.ids)
        pages: deque[list[Any]] = deque()
        with driver.errors(self._cassandra):
            to_ask = iter(hours)
            for done, bucket_ms in enumerate(hours):
                while len(pages) < _HOURS_AHEAD and (ahead := next(to_ask, None)) is not None:
                    pages.append([self._ask(ahead, shard, selection) for shard in shards])
                on_hour(done, len(hours))
                if stopped():
                    return
                asked = zip(shards, pages.popleft(), strict=True)
                found = [_entries(bucket_ms, shard, answer) for shard, answer in asked]
                for entry in heapq.merge(*found, key=_received, reverse=True):
                    if selection.takes(entry):
                        yield entry
                        missing.discard(entry.id)
                        if selection.ids and not missing:
                            return
        on_hour(len(hours), len(hours))

    def read(self, entries: Sequence[Entry]) -> list[DeadLetter | None]:
        """Return whole rows in the order asked for; None for one that is gone meanwhile."""
        found: list[DeadLetter | None] = []
        with driver.errors(self._cassandra):
            for at in range(0, len(entries), _REQUESTS):
                part = entries[at : at + _REQUESTS]
                answers = [self._session.execute_async(self._read, _key(entry)) for entry in part]
                for entry, answer in zip(part, answers, strict=True):
                    row = answer.result().one()
                    found.append(None if row is None else _letter(entry, row))
        return found

    def delete(self, entries: Sequence[Entry]) -> None:
        """Delete rows, one by one. When it raises, any of them may be deleted."""
        now_us = time.time_ns() // 1000
        self._all(
            (self._delete, (max(now_us, entry.written_us), *_key(entry))) for entry in entries
        )

    def delete_spans(self, spans: Collection[Span], selection: Selection) -> None:
        """Delete all rows of the selection's time in partitions, one range tombstone each.

        A tombstone a row would make later reads of the hour step over each of them.
        """
        now_us = time.time_ns() // 1000
        since_ms, until_ms = selection.since_ms, selection.until_ms
        self._all(
            (
                self._delete_span,
                (max(now_us, span.written_us), span.bucket_ms, span.shard, since_ms, until_ms),
            )
            for span in spans
        )

    def _ask(self, bucket_ms: int, shard: int, selection: Selection) -> Any:
        values = (bucket_ms, shard, selection.since_ms, selection.until_ms)
        return self._session.execute_async(self._scan, values)

    def _all(self, requests: Iterator[tuple[Any, tuple[Any, ...]]]) -> None:
        under_way: deque[Any] = deque()
        with driver.errors(self._cassandra):
            for statement, values in requests:
                under_way.append(self._session.execute_async(statement, values))
                if len(under_way) >= _REQUESTS:
                    under_way.popleft().result()
            for answer in under_way:
                answer.result()


@contextmanager
def opened(settings: Settings) -> Iterator[tuple[LetterTable, str]]:
    """Connect; give the table and the data centre in use; disconnect at the end.

    Raises `StoreUnavailable`, and `SchemaBehind` if there is no such table.
    """
    cassandra = settings.cassandra
    with driver.connected(
        cassandra,
        keyspace=cassandra.keyspace,
        # Pages of an hour full of letters take longer than the one write that the setting is for.
        request_timeout_seconds=max(_MIN_TIMEOUT_SECONDS, cassandra.request_timeout_seconds),
    ) as connection:
        yield LetterTable(connection.session, settings), connection.local_dc


def _entries(bucket_ms: int, shard: int, answer: Any) -> Iterator[Entry]:
    for received_ms, letter_id, device, topic, reason, detail, size, written_us in answer.result():
        # Columns of rows written by hand may be missing.
        yield Entry(
            bucket_ms,
            shard,
            received_ms,
            letter_id,
            device,
            topic or "",
            reason or "",
            detail or "",
            size or 0,
            written_us or 0,
        )


def _letter(entry: Entry, row: Sequence[Any]) -> DeadLetter:
    device_ms, client_id, device, topic, reason, detail, payload, size, digest, *rest = row
    qos, retain, duplicate, user_properties = rest
    return DeadLetter(
        bucket_ms=entry.bucket_ms,
        shard=entry.shard,
        received_ms=entry.received_ms,
        device_ms=device_ms,
        id=entry.id,
        client_id=client_id or "",
        device=device,
        topic=topic or "",
        reason=reason or "",
        detail=detail or "",
        payload=payload or b"",
        payload_bytes=size or 0,
        payload_sha256=digest or b"",
        qos=qos or 0,
        retain=bool(retain),
        duplicate=bool(duplicate),
        user_properties=user_properties,
    )


def _key(entry: Entry) -> tuple[int, int, int, uuid.UUID]:
    return entry.bucket_ms, entry.shard, entry.received_ms, entry.id
