"""Troubles: what has failed at Cassandra and has not succeeded since.

Lives here: the facts by which the service calls itself failing. Pure. Rules: one failure that
passes is no trouble to speak of; in a partial outage successes of others end nothing, only that of
all that failed does; that nothing at all succeeds is counted apart, since it means more. Must not
come in: clocks (times are handed in, seconds on any steady clock), retrying, logging.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shadowsvc.jobs import Job

__all__ = ["Troubles"]


class Troubles:
    """The jobs that are being retried, and since when nothing has succeeded."""

    __slots__ = ("_failure", "_lanes", "_since", "_told", "none_since")

    def __init__(self) -> None:
        """Make it with none."""
        self.none_since: float | None = None
        """Since when every answer was a failure; None after a success."""
        self._since: dict[Job, float] = {}
        self._lanes: Counter[int] = Counter()
        self._failure = ""
        self._told = False

    def __bool__(self) -> bool:
        """Whether anything is wrong."""
        return bool(self._since) or self.none_since is not None

    def __contains__(self, job: Job) -> bool:
        return job in self._since

    def failed(self, job: Job, now: float, failure: str) -> bool:
        """Note that a job failed, and why; return whether that is news."""
        if self.none_since is None:
            self.none_since = now
        self._failure = failure
        self._add(job, now)
        told, self._told = self._told, True
        return not told

    def split(self, job: Job, part: Job) -> None:
        """Note that `part` is what is left of `job`."""
        if job in self._since:
            self._add(part, self._since[job])

    def _add(self, job: Job, since: float) -> None:
        if job not in self._since:
            self._since[job] = since
            self._lanes[job.lane] += 1

    def ended(self, job: Job) -> bool:
        """Note that a job is done with, one way or the other; return whether it had failed."""
        if self._since.pop(job, None) is None:
            return False
        self._lanes[job.lane] -= 1
        return True

    def is_lane_clear(self, lane: int) -> bool:
        """Whether nothing of a lane is being retried."""
        if self._lanes[lane] > 0:
            return False
        del self._lanes[lane]
        return True

    def are_over(self) -> bool:
        """Whether what was news once has passed; True once."""
        if self._told and not self:
            self._told = False
            return True
        return False

    def failing(self, now: float, after_seconds: float) -> str | None:
        """Say what fails, if anything has failed for `after_seconds` by now; else None."""
        since = min(self._since.values(), default=self.none_since)
        if since is None or now - since < after_seconds:
            return None
        return self._failure
