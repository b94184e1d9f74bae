"""The writers: from planned to durable.

Lives here: the workers that write batches and dead letters, and what becomes of those that fail.

Rules:
1. A job, a batch or a dead letter, is in one place: it waits in its lane (`lanes`) or for its next
   attempt (`_due`), or a worker has it at the store. `_jobs` has them all, and what the batcher has
   not handed out is nowhere else.
2. No more jobs are at the store than the window (`window`) and their lane allow. One that failed
   gives up its worker while it waits, so that an outage of some costs the others nothing.
3. An outage is retried for ever, the same statements with the same times, with full jitter. A
   refused batch is halved until one update stands alone; that is condemned only if it is refused
   again after a write that can't be refused has succeeded.
4. A job ends as completed, split, condemned, or left to the broker, and in no other way.

Must not come in: acks and their order, connections, decoding, drivers.
"""

from __future__ import annotations

import asyncio
import time
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog

from shadowsvc.backoff import wait_seconds
from shadowsvc.errors import StoreError, StoreRefused
from shadowsvc.jobs import Job
from shadowsvc.lanes import LETTERS, Lanes
from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.update import Mutations
from shadowsvc.store.batch import halves
from shadowsvc.troubles import Troubles
from shadowsvc.window import Window

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from shadowsvc.metrics import Metrics
    from shadowsvc.shadow.update import Update
    from shadowsvc.store.batch import Batcher
    from shadowsvc.store.deadletter import DeadLetter

__all__ = ["Figures", "Store", "Writers"]

_log = structlog.get_logger(__name__)

_WEDGED_TIMEOUTS = 5
_WEDGED_IDLE_SECONDS = 5.0
_DOUBTFUL_ATTEMPTS = 3
_GOOD_TIMEOUTS = 1 / 200
_SEAL_ALL_SECONDS = 1.0
_SEAL_AGAIN_SECONDS = 0.01


class Store(Protocol):
    """What the writers need from Cassandra; every call raises `StoreError` alone."""

    async def write(self, mutations: Sequence[Mutations | Update]) -> None:
        """Write durably, in one request."""

    async def write_in_parts(
        self, mutations: Mutations, on_part: Callable[[], None] | None = None
    ) -> None:
        """Write durably, one device that is too large for one request; tell of each part."""

    async def write_dead_letter(self, letter: DeadLetter) -> None:
        """Write a dead letter durably."""

    async def write_probe(self) -> None:
        """Write something that can't be refused."""


class Figures(NamedTuple):
    """Figures of the writers; times in seconds, sizes in bytes."""

    linger_seconds: float
    min_concurrency: int
    concurrency: int
    request_timeout_seconds: float
    retry_min_seconds: float
    retry_max_seconds: float
    failing_after_seconds: float


class Writers:
    """Write what the batcher has ready. Belongs to the running loop."""

    def __init__(
        self,
        figures: Figures,
        batcher: Batcher,
        store: Store,
        metrics: Metrics,
        *,
        completed: Callable[[Iterable[Any]], None],
        condemned: Callable[[Update, StoreRefused], None],
    ) -> None:
        """Make it, and start the workers.

        `completed` is called with the deliveries of what is durable, `condemned` with an update
        that the store will never take.
        """
        self.figures = figures
        self.batcher = batcher
        self.metrics = metrics
        self.window = Window(
            min(figures.min_concurrency, figures.concurrency),
            figures.concurrency,
            now=time.monotonic(),
            good_seconds=figures.request_timeout_seconds * _GOOD_TIMEOUTS,
            changes=metrics.window_changes,
        )
        self._store = store
        self._completed = completed
        self._condemned = condemned
        self._loop = asyncio.get_running_loop()
        self._lanes = Lanes[Job]()
        self._jobs: set[Job] = set()
        self._due: set[Job] = set()
        self._troubles = Troubles()
        self._numbers = count()
        self._calls: dict[Job, float] = {}
        self._running = 0
        self._idle: list[asyncio.Future[None]] = []
        self._woken = 0
        self._linger: asyncio.TimerHandle | None = None
        self._lingered = False
        self._sealed_all = 0.0
        self._stalled_since: float | None = None
        self._workers = [
            asyncio.create_task(self._work(), name=f"writer {number}")
            for number in range(figures.concurrency)
        ]
        for worker in self._workers:
            worker.add_done_callback(_report_death)

    # ---------------------------------------------------------------- from the pipeline

    def wake(self) -> None:
        """Let idle workers take what is planned, as far as the window allows."""
        idle = self._idle
        if idle:
            planned = len(self.batcher.ready) + self._lanes.may_go
            room = self.window.limit - self._running
            for _ in range(min(planned, room, len(idle) + self._woken) - self._woken):
                future = idle.pop()
                if not future.done():
                    self._woken += 1
                    future.set_result(None)

    def linger(self) -> None:
        """Have the open batches written after a while, whether they are full by then or not."""
        if self._linger is None:
            self._linger = self._loop.call_later(self.figures.linger_seconds, self._linger_is_over)

    def add_letter(self, letter: DeadLetter, delivery: Any) -> None:
        """Write a dead letter; `wake` when all are there."""
        job = Job(next(self._numbers), LETTERS, None, letter, delivery)
        self._jobs.add(job)
        self._lanes.put(job)

    @property
    def has_work(self) -> bool:
        """Whether something may be begun."""
        return bool(self.batcher.ready) or self._lanes.may_go > 0

    def deliveries(self) -> Iterator[Any]:
        """Every delivery that a job has, at the store or not."""
        for job in self._jobs:
            yield from job.deliveries()

    def abandon(self, leave: Callable[[Any], None]) -> None:
        """Let `leave` mark deliveries that are left to the broker, and forget what became empty.

        Those at the store are finished, but in an outage, when that may take for ever.
        """
        in_outage = bool(self._troubles)
        for job in list(self._jobs):
            if not job.running or in_outage:
                for delivery in job.deliveries():
                    leave(delivery)
            if not job.running and not job.is_wanted():
                self._forget(job)
        self._lanes.drop(lambda job: job not in self._jobs)

    async def close(self) -> None:
        """Stop the workers; what they were writing has an unknown outcome."""
        if self._linger is not None:
            self._linger.cancel()
        for job in self._due:
            if job.timer is not None:
                job.timer.cancel()
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    # ---------------------------------------------------------------- for health

    @property
    def in_flight(self) -> int:
        """Requests at the store now."""
        return len(self._calls)

    @property
    def in_trouble(self) -> bool:
        """Whether something is being retried, or nothing succeeds."""
        return bool(self._troubles)

    @property
    def failing(self) -> str | None:
        """Why writes fail, while one has been retried for more than a moment; else None."""
        return self._troubles.failing(time.monotonic(), self.figures.failing_after_seconds)

    @property
    def failing_since(self) -> float | None:
        """Since when every answer was a failure, monotonic seconds; None after a success."""
        return self._troubles.none_since

    def wedged(self, now: float) -> str | None:
        """Say why the writers can't go on by themselves, or None. An outage is no wedge."""
        limit = _WEDGED_TIMEOUTS * self.figures.request_timeout_seconds
        for started in self._calls.values():
            if now - started > limit:
                return f"a request to Cassandra has had no answer for {now - started:.0f} s"
        dead = sum(worker.done() for worker in self._workers)
        if dead:
            return f"{dead} writers have ended"
        planned = bool(self.batcher.ready or self._lanes.waiting)
        if not planned or self._calls or self._due:
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now  # it may have been planned in this very turn of the loop
        elif now - self._stalled_since > _WEDGED_IDLE_SECONDS:
            return "work is planned and nothing is in flight"
        return None

    # ---------------------------------------------------------------- workers

    async def _work(self) -> None:
        while True:
            job = self._next()
            if job is not None:
                self._running += 1
                if self._idle:
                    self.wake()  # the window or a lane may have opened for more than one
                try:
                    await self._write(job)
                finally:
                    self._running -= 1
            elif self._running >= self.window.limit:
                await self._rest()
            elif self._lingered and self.batcher.is_open:
                self._lingered = False
                self._seal()
            else:
                self._lingered = False
                await self._rest()

    async def _rest(self) -> None:
        future = self._loop.create_future()
        self._idle.append(future)
        await future
        self._woken -= 1

    def _next(self) -> Job | None:
        """Return the job that is to be written next, or None: no work, or no room for it."""
        limit = self.window.limit
        if self._running >= limit:
            return None
        lanes = self._lanes
        while (waited := lanes.take(limit)) is not None:
            if waited.is_wanted():
                return waited
            self._forget(waited)
        ready = self.batcher.ready
        while ready:
            batch = ready.popleft()
            job = Job(next(self._numbers), batch.group, batch)
            self._jobs.add(job)
            if lanes.has_room(job.lane, limit):
                return job
            lanes.put(job)
        return None

    def _linger_is_over(self) -> None:
        self._linger = None
        if self._idle and self._running < self.window.limit:
            self._seal()
            self.wake()
        else:
            # Every place is taken: the open batches fill up until one is free.
            self._lingered = True

    def _seal(self) -> None:
        """Seal the open batches, but those of lanes in doubt seldom: they fill up meanwhile."""
        batcher = self.batcher
        if not self._lanes.in_doubt:
            batcher.seal()
            return
        now = time.monotonic()
        if now - self._sealed_all < _SEAL_ALL_SECONDS:
            batcher.seal(self._lanes.is_in_doubt)
        else:
            self._sealed_all = now
            batcher.seal()
        if batcher.is_open and self._linger is None:
            self._linger = self._loop.call_later(_SEAL_AGAIN_SECONDS, self._linger_is_over)

    async def _write(self, job: Job) -> None:
        """Have a job at the store until it is durable, or something else is to become of it."""
        self._lanes.begin(job)
        job.running = True
        outage = False
        try:
            while True:
                try:
                    written = await self._ask(job)
                except StoreRefused as error:
                    if job.batch is None or job.probing:
                        outage = True  # neither can be refused
                        self._postpone(job, error)
                    elif not self._search(job, error):
                        continue
                except StoreError as error:
                    outage = True
                    self._postpone(job, error)
                else:
                    if job.probing:
                        job.probing = False
                        job.proven = True
                        if job.is_wanted():
                            continue
                    else:
                        self._durable(job, written)
                    self._forget(job)
                return
        finally:
            self._ended(job, outage=outage)

    def _ended(self, job: Job, *, outage: bool) -> None:
        """Note that a job is not at the store any more, and what its lane told."""
        job.running = False
        lanes = self._lanes
        doubts = lanes.in_doubt
        lanes.end(job, outage=outage)
        if lanes.in_doubt != doubts:
            self.metrics.replica_sets_in_doubt += lanes.in_doubt - doubts
        if outage:
            self._trust_if_clear(job.lane)

    async def _ask(self, job: Job) -> list[Mutations | Update]:
        """Send the one request that a job needs now; return what is durable then."""
        batch = job.batch
        if batch is None:
            await self._call(job, self._store.write_dead_letter(job.letter))  # type: ignore[arg-type]
            return []
        if job.probing:
            await self._call(job, self._store.write_probe())
            return []
        # An update that is alone needs no merging: the store takes it as it is.
        mutations = [
            updates[0] if len(updates) == 1 else merge(updates)
            for updates in batch.devices.values()
        ]
        if batch.size_bytes > self.batcher.max_bytes and len(mutations) == 1:
            whole = merge(next(iter(batch.devices.values())))
            mutations = [whole]

            def on_part() -> None:
                self._calls[job] = time.monotonic()  # it goes on, however many parts there are

            await self._call(job, self._store.write_in_parts(whole, on_part), one=False)
        else:
            await self._call(job, self._store.write(mutations))
        return mutations

    async def _call(self, job: Job, request: Awaitable[None], *, one: bool = True) -> None:
        """Await the store; count the request, its time and its failure."""
        window = self.window
        started = time.monotonic()
        self._calls[job] = started
        self._stalled_since = None
        # A lane that may not take every place fills the window when it has its own share.
        full = self._lanes.is_full(job.lane, window.limit)
        window.sent(window.limit if full else self._running)
        try:
            await request
        except StoreError as error:
            self.metrics.write_errors[error.kind] += 1
            if error.overload and not job.in_doubt:
                window.overloaded(time.monotonic(), started)
            raise
        else:
            self._troubles.none_since = None
        finally:
            del self._calls[job]
            now = time.monotonic()
            self.metrics.write_seconds.observe(now - started)
        if one:
            window.answered(now, now - started)

    # ---------------------------------------------------------------- what becomes of a job

    def _durable(self, job: Job, written: list[Mutations | Update]) -> None:
        metrics = self.metrics
        batch = job.batch
        if batch is None:
            metrics.dead_letters[job.letter.reason] += 1  # type: ignore[union-attr]
            self._completed((job.delivery,))
            return
        now_us = time.time_ns() // 1000
        updates = batch.updates()
        metrics.device_to_durable_us.observe_each([now_us - update.time_us for update in updates])
        number = len(updates)
        metrics.updates_durable += number
        metrics.batch_partitions.observe(len(written))
        if number > len(written):
            metrics.updates_merged += number - len(written)
            metrics.leaves_merged_away += sum(
                mutation.merged_away for mutation in written if isinstance(mutation, Mutations)
            )
        self._completed([update.token for update in updates])

    def _search(self, job: Job, error: StoreRefused) -> bool:
        """Go one step to the culprit of a refused batch; False: ask once more at once."""
        batch = job.batch
        if batch is None or not job.is_wanted():
            self._forget(job)
        elif len(batch) > 1:
            self._split(job)
        elif not job.proven:
            # Refused again after a write that can't be refused: then it is guilty. A table that
            # refuses everything is an outage, not a bad update.
            job.probing = True
            return False
        else:
            _log.error("the store refuses an update", error=str(error), limit_by=error.kind)
            self._condemned(batch.updates()[0], error)
            self._forget(job)
            self.wake()
        return True

    def _split(self, job: Job) -> None:
        """Put two halves in the place of a batch."""
        self.metrics.batches_split += 1
        for batch in halves(job.batch) or ():  # type: ignore[arg-type]
            part = Job(job.number, job.lane, batch)
            self._jobs.add(part)
            self._troubles.split(job, part)
            self._lanes.put(part)
        self._forget(job)

    def _postpone(self, job: Job, error: StoreError) -> None:
        """Let a job wait for its next attempt: full jitter, doubling up to the limit.

        Whatever is tried again is an outage: a refused probe or dead letter too.
        """
        if self._troubles.failed(job, time.monotonic(), f"{error.kind}: {error}"):
            _log.warning("writes fail and are retried", kind=error.kind, error=str(error))
        self.metrics.write_retries[error.kind] += 1
        if not job.is_wanted():
            self._forget(job)
            return
        job.proven = False
        job.attempts += 1
        if error.doubtful and job.attempts >= _DOUBTFUL_ATTEMPTS and len(job.batch or ()) > 1:
            # One update may be what a replica fails on. It is no dead letter for that, since it
            # may be the replica; but it need not hold up its neighbours.
            self._split(job)
            return
        figures = self.figures
        self._due.add(job)
        self.metrics.retries_waiting += 1
        job.timer = self._loop.call_later(
            wait_seconds(job.attempts, figures.retry_min_seconds, figures.retry_max_seconds),
            self._try_again,
            job,
        )

    def _trust_if_clear(self, lane: int) -> None:
        """End the doubt of a lane when nothing is left that would: it was left to the broker."""
        if self._troubles.is_lane_clear(lane) and self._lanes.is_in_doubt(lane):
            self._lanes.trust(lane)
            self.metrics.replica_sets_in_doubt -= 1

    def _try_again(self, job: Job) -> None:
        self._no_longer_due(job)
        self._lanes.put(job)
        self.wake()

    def _no_longer_due(self, job: Job) -> None:
        if job.timer is not None:
            job.timer.cancel()
            job.timer = None
            self._due.discard(job)
            self.metrics.retries_waiting -= 1

    def _forget(self, job: Job) -> None:
        """End a job."""
        self._jobs.discard(job)
        troubles = self._troubles
        if troubles.ended(job):
            self._no_longer_due(job)
            self._trust_if_clear(job.lane)
        if troubles.are_over():
            _log.info("writes succeed again")


def _report_death(worker: asyncio.Task[None]) -> None:
    if not worker.cancelled() and (error := worker.exception()) is not None:
        _log.critical("a writer ended", exc_info=error)
