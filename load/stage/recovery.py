"""What a series of connected devices says about a storm. Pure.

Lives here: how many were lost when something was killed, how the missing became fewer, and how fast
they came back. Rules: time counts from the kill; what never happened is None, not the end of the
run. Must not come in: what was killed, why devices wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["SHARES", "Recovery", "recovery_of"]

SHARES = (0.5, 0.9, 0.99, 1.0)
"""Shares of the lost connections whose return is told."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What followed a kill, in a few figures; seconds since then."""

    before: int
    """Connections at the kill."""
    lost: int
    """The most that were missing at once."""
    lowest_seconds: float
    """When that was."""
    back_seconds: Mapping[str, float | None]
    """By share of the lost, as `50%`: when no more than the rest was missing, for good."""
    half_life_seconds: float | None
    """From the lowest point until half of the lost were back."""
    most_connects_per_second: float
    missing: tuple[tuple[float, int], ...]
    """(seconds, missing) of every sample."""


def recovery_of(series: Sequence[tuple[float, int]], killed_at: float) -> Recovery | None:
    """Look at `(seconds, connected)`, ascending, around a kill; None without samples after it.

    Args:
        series: of all devices together; at least one sample before the kill.
        killed_at: on the same clock.
    """
    earlier = [connected for at, connected in series if at <= killed_at]
    later = [(at - killed_at, connected) for at, connected in series if at > killed_at]
    if not earlier or not later:
        return None
    before = earlier[-1]
    missing = tuple((at, max(0, before - connected)) for at, connected in later)
    lowest_at, lost = max(missing, key=lambda sample: sample[1])
    back = {f"{share:.0%}": _back(missing, lost * (1 - share)) for share in SHARES}
    half = back["50%"]
    rates = [
        (then_connected - connected) / (then - at)
        for (at, connected), (then, then_connected) in pairwise(later)
        if then > at
    ]
    return Recovery(
        before=before,
        lost=lost,
        lowest_seconds=lowest_at,
        back_seconds=back,
        half_life_seconds=None if half is None else half - lowest_at,
        most_connects_per_second=max((0.0, *rates)),
        missing=missing,
    )


def _back(missing: Sequence[tuple[float, int]], allowed: float) -> float | None:
    """Return when the missing were at most `allowed` and stayed so."""
    found = None
    for at, count in missing:
        if count > allowed:
            found = None
        elif found is None:
            found = at
    return found
