"""Lanes: which piece of work goes next, so that one sick replica set does not stop the others.

Theory. What is written to a replica set that is away holds its place in the window for a whole
time-out. A few such batches would take every place, although all other replica sets are well. So
every replica set has a *lane*:

1. Once work of several lanes was seen, one lane alone takes no more than three quarters of the
   window.
2. A lane whose last answer was an outage is *in doubt*: its share halves with each failure in a
   row, down to one request, and all lanes in doubt together get a quarter of the window. Its first
   good answer ends that.

What its lane has no room for waits here, and others pass by. Of one lane the oldest goes first,
also what was tried before: acks keep their order, so the oldest holds up the most. A lane that is
slow, but answers, is not in doubt: fewer requests would make it slower still, and the acks with it.

Rules: pure; a lane of which something waits is looked at again only when room may have come. Must
not come in: clocks, tasks, the store.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["LETTERS", "Job", "Lanes"]

LETTERS = -1
"""The lane of dead letters: a table of its own."""

_MAX_FAILURES = 8


class Job(Protocol):
    """A piece of work of one lane; the older is the lesser."""

    lane: int
    in_doubt: bool

    def __lt__(self, other: Self) -> bool: ...


AnyJob = TypeVar("AnyJob", bound=Job)


class Lanes(Generic[AnyJob]):
    """What runs in each lane, and what waits for room there."""

    __slots__ = ("_doubtful", "_failures", "_open", "_running", "_seen", "_waiting", "waiting")

    def __init__(self) -> None:
        """Make it with nothing in it."""
        self.waiting = 0
        """How many jobs wait for room in their lane."""
        self._running: dict[int, int] = {}
        self._failures: dict[int, int] = {}
        self._waiting: OrderedDict[int, list[AnyJob]] = OrderedDict()
        self._open: OrderedDict[int, None] = OrderedDict()  # those that may have room
        self._seen: set[int] = set()
        self._doubtful = 0

    @property
    def in_doubt(self) -> int:
        """How many lanes are in doubt."""
        return len(self._failures)

    @property
    def may_go(self) -> int:
        """How many lanes may have room for what waits in them."""
        return len(self._open)

    def is_in_doubt(self, lane: int) -> bool:
        """Whether the last answer of `lane` was an outage."""
        return lane in self._failures

    def has_room(self, lane: int, limit: int) -> bool:
        """Whether a job of `lane` may begin while `limit` may run in all."""
        failures = self._failures.get(lane)
        if failures is not None:
            share = max(1, limit >> failures)
            return self._doubtful < max(1, limit // 4) and self._running.get(lane, 0) < share
        if lane != LETTERS and len(self._seen) <= 1:
            return True
        return self._running.get(lane, 0) < max(1, limit - limit // 4)

    def is_full(self, lane: int, limit: int) -> bool:
        """Whether a lane that is in no doubt has all the places that it may have."""
        return lane not in self._failures and not self.has_room(lane, limit)

    def begin(self, job: AnyJob) -> None:
        """Count a job as running."""
        lane = job.lane
        running = self._running
        running[lane] = running.get(lane, 0) + 1
        if lane != LETTERS:
            self._seen.add(lane)
        job.in_doubt = lane in self._failures
        if job.in_doubt:
            self._doubtful += 1

    def end(self, job: AnyJob, *, outage: bool = False) -> None:
        """Count a job as ended, with what its answer told of its lane."""
        lane = job.lane
        running = self._running[lane] - 1
        if running:
            self._running[lane] = running
        else:
            del self._running[lane]
        if outage:
            self._failures[lane] = min(self._failures.get(lane, 0) + 1, _MAX_FAILURES)
        elif self._failures:
            self._failures.pop(lane, None)
        if job.in_doubt:
            self._doubtful -= 1
            self._open.update(dict.fromkeys(self._waiting))  # their room is shared
        elif lane in self._waiting:
            self._open[lane] = None

    def trust(self, lane: int) -> None:
        """End the doubt of a lane of which nothing is left to find out."""
        self._failures.pop(lane, None)

    def put(self, job: AnyJob) -> None:
        """Let a job wait for its turn."""
        heapq.heappush(self._waiting.setdefault(job.lane, []), job)
        self._open[job.lane] = None
        self.waiting += 1

    def take(self, limit: int) -> AnyJob | None:
        """Return a job that may begin while `limit` may run in all, or None; lanes take turns."""
        open_ = self._open
        while open_:
            lane, _ = open_.popitem(last=False)
            jobs = self._waiting.get(lane)
            if jobs is None or not self.has_room(lane, limit):
                continue
            job = heapq.heappop(jobs)
            self.waiting -= 1
            if jobs:
                open_[lane] = None
                self._waiting.move_to_end(lane)
            else:
                del self._waiting[lane]
            return job
        return None

    def drop(self, doomed: Callable[[AnyJob], bool]) -> None:
        """Forget the waiting jobs for which `doomed` says so."""
        for lane, jobs in list(self._waiting.items()):
            kept = [job for job in jobs if not doomed(job)]
            self.waiting -= len(jobs) - len(kept)
            if kept:
                heapq.heapify(kept)
                self._waiting[lane] = kept
            else:
                del self._waiting[lane]

    def __iter__(self) -> Iterator[AnyJob]:
        for jobs in self._waiting.values():
            yield from jobs
