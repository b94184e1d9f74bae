"""Whether a series of figures grows, told from noise.

Lives here: one test of one series. Rules: the slope is the middle of the slopes of all pairs of
points (Theil and Sen), which a few wild points do not move; it is believed only if rising pairs
outnumber falling ones by far more than chance makes them (Mann and Kendall); and a rise that is
believed counts only if it is large beside the values themselves. Must not come in: what is
measured.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Trend", "trend_of"]

_MIN_POINTS: Final = 8
_MAX_POINTS: Final = 600
_BELIEVED: Final = 4.0
"""Standard deviations; neighbours are alike, so the usual 2 would believe too much."""
_HOUR_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Trend:
    """A series in a few figures."""

    begin: float
    """Middle of the first tenth."""
    median: float
    highest: float
    end: float
    """Middle of the last tenth."""
    per_hour: float
    """Slope."""
    score: float
    """Of Mann and Kendall, in standard deviations; 0 is no trend."""
    grows: bool


def trend_of(points: Sequence[tuple[float, float]], allowed: float) -> Trend | None:
    """Look at `(seconds, value)`, ascending; None when there are too few.

    Args:
        points: at least 8.
        allowed: share of the median by which it may rise over the whole time.
    """
    if len(points) < _MIN_POINTS:
        return None
    values = [value for _, value in points]
    tenth = max(1, len(values) // 10)
    median = statistics.median(values)
    thinned = points[:: math.ceil(len(points) / _MAX_POINTS)]
    pairs = list(combinations(thinned, 2))
    slope = statistics.median(
        (later - earlier) / (then - at) for (at, earlier), (then, later) in pairs if then > at
    )
    score = _score([value for _, value in thinned])
    rise = slope * (points[-1][0] - points[0][0])
    return Trend(
        begin=statistics.median(values[:tenth]),
        median=median,
        highest=max(values),
        end=statistics.median(values[-tenth:]),
        per_hour=slope * _HOUR_SECONDS,
        score=round(score, 2),
        grows=score > _BELIEVED and rise > allowed * abs(median),
    )


def _score(values: Sequence[float]) -> float:
    """Return the normalized Mann-Kendall statistic."""
    count = len(values)
    signs = sum((later > earlier) - (later < earlier) for earlier, later in combinations(values, 2))
    variance = count * (count - 1) * (2 * count + 5) / 18
    return 0.0 if not signs else (signs - math.copysign(1, signs)) / math.sqrt(variance)
