"""Send dead letters through the way of an update once more, with their original times.

Lives here: what a letter is good for (`Judge`, pure), and the writing of those that are updates
now (`Replay`). Rules:

1. The decoder, its limits, the merge and the store's write are the service's own.
2. The write time is the one that the update would have had at its receipt: the device's, or the
   time of receipt that the row holds. So a repetition writes the same cells again, and nothing
   that a device said later is undone. Only `restamp` gives another time, to those whose own time
   is impossible: that of the start of the command, less a microsecond for each letter before it,
   so that their order of receipt stays.
3. A time is judged as of the receipt and once more as of now: what was fine when it came may
   bring back by now what was deleted since.
4. No dead letter is ever written. What can't be replayed stays, and its reason of today is told.
5. An outage is retried for a while and then ends the command; what was done stays done.

Must not come in: reading the table (`shadowsvc.store.letters`), words for people.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections import Counter
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson
import structlog

from shadowsvc.backoff import wait_seconds
from shadowsvc.decoding import decoder_limits, max_age_us
from shadowsvc.errors import Rejected, ShadowsvcError, StoreError, StoreRefused
from shadowsvc.health import MAX_CLOCK_OFFSET_SECONDS
from shadowsvc.process import stop_on_signals
from shadowsvc.shadow.document import Decoder
from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.cassandra import CassandraStore
from shadowsvc.store.deadletter import MAX_TOPIC_CHARS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shadowsvc.settings import Settings
    from shadowsvc.shadow.document import Limits
    from shadowsvc.shadow.update import Mutations, Update
    from shadowsvc.store.deadletter import DeadLetter
    from shadowsvc.store.letters import Entry

__all__ = ["Judge", "Letters", "Options", "Outcome", "Replay", "Store", "Summary", "Verdict"]

_log = structlog.get_logger(__name__)

_NO_LIMIT_US = 2**62
_TIME_REASONS = frozenset({"time_in_future", "time_too_old"})
_SECOND_US = 1_000_000


class Outcome(StrEnum):
    """What came of a letter."""

    REPLAYED = "replayed"
    """it is in the shadow, durably (or would be: dry run)"""
    EMPTY = "nothing_to_write"
    """it is an update now, which changes nothing"""
    REJECTED = "rejected"
    """it is still none; or Cassandra refuses it"""
    TIME = "needs_restamp"
    """its own time is impossible"""
    TRUNCATED = "truncated"
    """the row holds a part of the message only"""
    DAMAGED = "damaged"
    """the row is not what the service wrote"""
    GONE = "gone"
    """the row expired or was deleted meanwhile"""
    GIVEN_UP = "given_up"
    """the run ended before its write was confirmed: in the shadow or not"""


DONE = frozenset({Outcome.REPLAYED, Outcome.EMPTY})
"""Outcomes after which a letter has done its work."""


class Verdict(NamedTuple):
    """What came of a letter, and why."""

    outcome: Outcome
    reason: str = ""
    """today's reason for a dead letter, where there is one"""
    detail: str = ""
    """for people"""
    time_us: int | None = None
    """the write time, where something was written or would be"""


class Judge:
    """Tells which update a letter is now, if any. Pure; keeps no letter."""

    def __init__(self, topics: TopicParser, limits: Limits, *, restamp: bool = False) -> None:
        """Judge by the limits of the service; `restamp` replaces impossible times."""
        self.limits = limits
        self.restamp = restamp
        self._decoder = Decoder(topics, limits, unique_times=False)
        any_time = copy.copy(limits)
        any_time.max_ahead_us = any_time.max_age_us = _NO_LIMIT_US
        self._any_time = Decoder(topics, any_time, unique_times=False)

    def judge(self, letter: DeadLetter, now_us: int, restamp_us: int) -> Update | Verdict:
        """Return the update with its write time, or why there is none.

        `now_us` is the time now, `restamp_us` the time to give when `restamp` has to.
        """
        broken = _broken(letter)
        if broken is not None:
            return broken
        properties = _properties(letter.user_properties)
        if properties is None:
            return Verdict(Outcome.DAMAGED, detail="user_properties are no pairs of text in JSON")
        message = letter.topic, letter.payload, properties, letter.received_ms * 1000
        try:
            update = self._decoder.decode(*message)
            self._check_time(update.time_us, now_us)
        except Rejected as rejected:
            if rejected.reason not in _TIME_REASONS:
                return Verdict(Outcome.REJECTED, rejected.reason, rejected.detail)
            if not self.restamp:
                return Verdict(Outcome.TIME, rejected.reason, rejected.detail)
            update = self._any_time.decode(*message)
            update.time_us = restamp_us
        except Exception as error:  # noqa: BLE001 - a defect met this message before
            _log.debug("decoding failed", exc_info=error)
            return Verdict(Outcome.REJECTED, "internal_error", type(error).__name__)
        return update

    def _check_time(self, time_us: int, now_us: int) -> None:
        """Raise `Rejected` when a time that was fine at the receipt is impossible by now."""
        if time_us > now_us + self.limits.max_ahead_us:
            ahead = (time_us - now_us) // _SECOND_US
            raise Rejected("time_in_future", f"{ahead} s ahead of now")
        if time_us < now_us - self.limits.max_age_us:
            raise Rejected(
                "time_too_old",
                f"{(now_us - time_us) // _SECOND_US} s old by now, deletes are remembered for "
                f"{self.limits.max_age_us // _SECOND_US} s (gc_grace_seconds less a margin)",
            )


def _broken(letter: DeadLetter) -> Verdict | None:
    """Return the verdict on a letter whose row is not the whole message, else None."""
    kept = len(letter.payload)
    if kept < letter.payload_bytes:
        detail = f"the row holds {kept} of the payload's {letter.payload_bytes} bytes"
        return Verdict(Outcome.TRUNCATED, detail=detail)
    if hashlib.sha256(letter.payload).digest() != letter.payload_sha256:
        return Verdict(Outcome.DAMAGED, detail="the payload is not that of payload_sha256")
    if len(letter.topic) >= MAX_TOPIC_CHARS:
        return Verdict(Outcome.TRUNCATED, detail="the topic was too long to be kept whole")
    if letter.user_properties == '["too long"]':
        # One of them may have been the time of the update, or its sequence number.
        return Verdict(Outcome.TRUNCATED, detail="the user properties were too long to be kept")
    return None


def _properties(text: str | None) -> list[tuple[str, str]] | None:
    """Return the user properties of a row, None when they are not readable."""
    if text is None:
        return []
    try:
        return [(_str(name), _str(value)) for name, value in orjson.loads(text)]
    except (ValueError, TypeError):
        return None


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


class Letters(Protocol):
    """What `Replay` needs of the table. It blocks; several threads may use it."""

    def read(self, entries: Sequence[Entry]) -> list[DeadLetter | None]:
        """Return whole rows, None for one that is gone."""

    def delete(self, entries: Sequence[Entry]) -> None:
        """Delete rows."""


class Store(Protocol):
    """What `Replay` needs of the data plane; every call raises `StoreError` alone."""

    async def write(self, mutations: Sequence[Mutations | Update]) -> None:
        """Write durably, in one request."""

    async def write_in_parts(self, mutations: Mutations) -> None:
        """Write durably what is too large for one request."""

    async def write_probe(self) -> None:
        """Write something that can't be refused."""


class Options(NamedTuple):
    """Figures of a replay; times in seconds, sizes in bytes."""

    dry_run: bool = False
    purge: bool = False
    """delete the rows of what is done"""
    concurrency: int = 32
    """letters in memory and requests in flight at most; twice as many while the next are read"""
    max_request_bytes: int = 5120
    retry_min_seconds: float = 0.05
    retry_max_seconds: float = 5.0
    patience_seconds: float = 15.0
    """how long a write is retried"""


class Summary:
    """What a replay did so far."""

    def __init__(self) -> None:
        """Make an empty one."""
        self.outcomes: Counter[Outcome] = Counter()
        self.kept: Counter[tuple[Outcome, str]] = Counter()
        """Letters that are not done, by outcome and today's reason."""
        self.deleted = 0
        self.interrupted = False
        self.error: StoreError | None = None
        """The outage that ended it."""

    @property
    def letters(self) -> int:
        """How many were looked at."""
        return self.outcomes.total()

    @property
    def complete(self) -> bool:
        """Whether every letter chosen is done."""
        return not (self.kept or self.interrupted or self.error)


class Replay:
    """One run over chosen letters. Belongs to the running loop."""

    def __init__(
        self,
        letters: Letters,
        store: Store,
        judge: Judge,
        options: Options,
        report: Callable[[Entry, Verdict], None],
        stopping: asyncio.Event,
    ) -> None:
        """Make it; `report` is told of every letter, in the order of the scan.

        Once `stopping` is set it ends after what is at the driver then.
        """
        self.summary = Summary()
        self._letters = letters
        self._store = store
        self._judge = judge
        self._options = options
        self._report = report
        self._stopping = stopping

    async def run(self, entries: Iterator[Entry], now: Callable[[], int]) -> Summary:
        """Replay `entries`, which must be newest first; `now` gives microseconds since 1970.

        An outage ends it: see `Summary.error`.
        """
        restamp_us = now()
        coming = asyncio.create_task(asyncio.to_thread(self._next, entries), name="read letters")
        try:
            while not self._stopping.is_set() and (part := await coming):
                coming = asyncio.create_task(
                    asyncio.to_thread(self._next, entries), name="read letters"
                )
                await self._replay(part, now(), restamp_us)
                restamp_us -= len(part)
                if self.summary.error is not None:
                    break
        except StoreError as error:
            self.summary.error = error
        finally:
            # A thread can't be cancelled; it ends with its requests' time-outs.
            await asyncio.gather(coming, return_exceptions=True)
        self.summary.interrupted = self._stopping.is_set()
        return self.summary

    def _next(self, entries: Iterator[Entry]) -> list[tuple[Entry, DeadLetter | None]]:
        """Read the next letters; in a thread."""
        if self._stopping.is_set():
            return []
        part = list(islice(entries, self._options.concurrency))
        return list(zip(part, self._letters.read(part), strict=True))

    async def _replay(
        self, part: list[tuple[Entry, DeadLetter | None]], now_us: int, restamp_us: int
    ) -> None:
        judged = [
            Verdict(Outcome.GONE)
            if letter is None
            else self._judge.judge(letter, now_us, restamp_us - place)
            for place, (_, letter) in enumerate(part)
        ]
        verdicts = await asyncio.gather(
            *(self._write(one) for one in judged), return_exceptions=True
        )
        summary = self.summary
        done: list[Entry] = []
        for (entry, _), verdict in zip(part, verdicts, strict=True):
            if isinstance(verdict, StoreError):
                if not self._stopping.is_set():
                    summary.error = verdict
                verdict = Verdict(Outcome.GIVEN_UP, verdict.kind, str(verdict))  # noqa: PLW2901
            if isinstance(verdict, BaseException):
                raise verdict
            summary.outcomes[verdict.outcome] += 1
            if verdict.outcome in DONE:
                done.append(entry)
            elif verdict.outcome is not Outcome.GONE:
                summary.kept[verdict.outcome, verdict.reason] += 1
            self._report(entry, verdict)
        if self._options.purge and done and not self._options.dry_run:
            await asyncio.to_thread(self._letters.delete, done)
            summary.deleted += len(done)

    async def _write(self, judged: Update | Verdict) -> Verdict:
        """Write an update. Raises the `StoreError` of an outage that does not end in time."""
        if isinstance(judged, Verdict):
            return judged
        if not judged.writes and not judged.deletes:
            return Verdict(Outcome.EMPTY)
        if self._options.dry_run:
            return Verdict(Outcome.REPLAYED, time_us=judged.time_us)
        patience = _Patience(self._options, self._stopping)
        proven = False
        while True:
            try:
                if judged.size_bytes > self._options.max_request_bytes:
                    await self._store.write_in_parts(merge((judged,)))
                else:
                    await self._store.write([judged])
            except StoreRefused as error:
                if proven:
                    return Verdict(Outcome.REJECTED, "refused_by_store", str(error))
                # Refused again after a write that can't be refused: then it is guilty.
                await self._prove_store(patience)
                proven = True
            except StoreError as error:
                proven = False
                await patience.wait(error)
            else:
                return Verdict(Outcome.REPLAYED, time_us=judged.time_us)

    async def _prove_store(self, patience: _Patience) -> None:
        while True:
            try:
                await self._store.write_probe()
            except StoreError as error:
                await patience.wait(error)
            else:
                return


class _Patience:
    """The waits of one letter's retries: full jitter, and an end."""

    def __init__(self, options: Options, stopping: asyncio.Event) -> None:
        self._options = options
        self._stopping = stopping
        self._failures = 0
        self._deadline: float | None = None

    async def wait(self, error: StoreError) -> None:
        """Wait before the next attempt; raise `error` when it is time to give up."""
        options, now = self._options, time.monotonic()
        if self._deadline is None:
            self._deadline = now + options.patience_seconds
        if now >= self._deadline or self._stopping.is_set():
            raise error
        self._failures += 1
        seconds = wait_seconds(self._failures, options.retry_min_seconds, options.retry_max_seconds)
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return


async def perform(
    settings: Settings,
    letters: Letters,
    entries: Iterator[Entry],
    *,
    options: Options,
    restamp: bool,
    report: Callable[[Entry, Verdict], None],
    watch: Callable[[Summary], None],
    stopping: asyncio.Event,
    leave: Callable[[], None],
) -> Summary:
    """Replay with a data plane of its own; the first SIGINT or SIGTERM ends it early.

    `settings.cassandra.local_dc` has to be set; `watch` is given the summary that will grow; the
    signal sets `stopping`; `leave` is called when the second one ends the process at once.
    Raises `StoreError` when there is no way in, and `ShadowsvcError` when the clocks of this
    machine and Cassandra are too far apart to judge any time.
    """
    cassandra = settings.cassandra
    store = CassandraStore(cassandra, dead_letter_ttl_seconds=settings.dead_letters.ttl_seconds)
    # Before anything else: a connect that is cancelled leaves the driver hanging.
    stop_on_signals(stopping, at_once=lambda _signal: leave())
    try:
        await store.connect()
        await _check_clock(store)
        limits = decoder_limits(settings)
        limits.max_age_us = max_age_us(await store.gc_grace_seconds())
        judge = Judge(TopicParser(settings.mqtt.topic_prefix), limits, restamp=restamp)
        options = options._replace(
            concurrency=min(options.concurrency, cassandra.concurrency),
            max_request_bytes=store.limits.size_bytes,
            retry_min_seconds=cassandra.retry_min_seconds,
            retry_max_seconds=cassandra.retry_max_seconds,
        )
        replay = Replay(letters, store, judge, options, report, stopping)
        watch(replay.summary)
        return await replay.run(entries, lambda: time.time_ns() // 1000)
    finally:
        await store.close()


async def _check_clock(store: CassandraStore) -> None:
    offset = await store.clock_offset_seconds()
    if abs(offset) > MAX_CLOCK_OFFSET_SECONDS:
        raise ShadowsvcError(
            f"the clocks of this machine and of Cassandra are {abs(offset):.0f} s apart, so no "
            "time can be judged: mend NTP, here first"
        )
