"""A histogram of durations that costs the same however many it holds.

Lives here: buckets, quantiles, merging, and the form in a report. Rules: a bucket is at most 1/32
of its value wide (log-linear: powers of two, each in 32 equal parts; below 64 µs a microsecond), so
a quantile is within 3.2 % of the truth and never below it; least, most, sum and count are exact;
two histograms merge without loss. Must not come in: clocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Histogram"]

_PART_BITS: Final = 5
_PARTS: Final = 1 << _PART_BITS
_MOST_MICROSECONDS: Final = (1 << 36) - 1
_BUCKETS: Final = (36 - _PART_BITS) * _PARTS + _PARTS
_MICROSECOND: Final = 1e-6


class Histogram:
    """Durations from 0 to 19 hours; a longer one counts as 19 hours, a negative one as 0."""

    __slots__ = ("_counts", "count", "least_seconds", "most_seconds", "total_seconds")

    def __init__(self) -> None:
        self.count = 0
        """How many were recorded."""
        self.total_seconds = 0.0
        self.least_seconds = math.inf
        """Infinity while there is none."""
        self.most_seconds = 0.0
        self._counts = [0] * _BUCKETS

    def record(self, seconds: float) -> None:
        """Take one duration."""
        seconds = max(seconds, 0.0)
        micros = min(int(seconds * 1e6), _MOST_MICROSECONDS)
        shift = micros.bit_length() - _PART_BITS - 1
        self._counts[micros if shift <= 0 else (shift << _PART_BITS) + (micros >> shift)] += 1
        self.count += 1
        self.total_seconds += seconds
        self.most_seconds = max(self.most_seconds, seconds)
        self.least_seconds = min(self.least_seconds, seconds)

    def merge(self, other: Histogram) -> None:
        """Take all that `other` holds."""
        self._counts = [mine + its for mine, its in zip(self._counts, other._counts, strict=True)]
        self.count += other.count
        self.total_seconds += other.total_seconds
        self.most_seconds = max(self.most_seconds, other.most_seconds)
        self.least_seconds = min(self.least_seconds, other.least_seconds)

    @classmethod
    def merged(cls, parts: Iterable[Histogram]) -> Self:
        """Return one of all."""
        whole = cls()
        for part in parts:
            whole.merge(part)
        return whole

    @property
    def mean_seconds(self) -> float:
        """NaN while there is none."""
        return self.total_seconds / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """Return the upper end of the bucket that holds `share` (0 to 1) of all, in seconds.

        NaN while there is none; never above the longest that was recorded.
        """
        if not self.count:
            return math.nan
        wanted = max(1, math.ceil(share * self.count))
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return max(self.least_seconds, min(_upper_seconds(index), self.most_seconds))
        return self.most_seconds

    def buckets(self) -> list[tuple[float, int]]:
        """Return (upper end in seconds, count) of every bucket that is not empty, ascending."""
        return [(_upper_seconds(at), count) for at, count in enumerate(self._counts) if count]

    def as_json(self) -> dict[str, Any]:
        """Return figures for people and what `from_json` makes the histogram of again."""
        if not self.count:
            return {"count": 0, "buckets": {}}
        return {
            "count": self.count,
            "mean_seconds": self.mean_seconds,
            "p50_seconds": self.quantile(0.5),
            "p90_seconds": self.quantile(0.9),
            "p99_seconds": self.quantile(0.99),
            "p999_seconds": self.quantile(0.999),
            "least_seconds": self.least_seconds,
            "most_seconds": self.most_seconds,
            "total_seconds": self.total_seconds,
            "buckets": {str(at): count for at, count in enumerate(self._counts) if count},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the histogram that `as_json` told of."""
        made = cls()
        made.count = data["count"]
        if made.count:
            made.total_seconds = data["total_seconds"]
            made.least_seconds = data["least_seconds"]
            made.most_seconds = data["most_seconds"]
            for at, count in data["buckets"].items():
                made._counts[int(at)] = count
        return made


def _upper_seconds(index: int) -> float:
    """Return the least duration above the bucket."""
    if index < 2 * _PARTS:
        return (index + 1) * _MICROSECOND
    shift = (index >> _PART_BITS) - 1
    return ((index - (shift << _PART_BITS)) + 1 << shift) * _MICROSECOND
