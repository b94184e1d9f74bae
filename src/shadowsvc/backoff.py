"""How long to wait before something that failed is tried again: full jitter.

Lives here: the one formula that everything that tries again uses, and that of refused logins. Pure.
Rules: the upper end doubles with each failure up to a limit, and the wait is drawn from the whole
range below it, so that many who failed together do not come back together ("full jitter"); it is
never nothing, so that no failure makes a busy loop. Must not come in: waiting, counting of
attempts, logging.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ceiling_seconds", "login_wait_seconds", "wait_seconds"]

_MAX_DOUBLINGS = 30


def ceiling_seconds(failures: int, least_seconds: float, most_seconds: float) -> float:
    """Return the upper end of the wait after `failures` failures in a row (1 or more).

    It is `least_seconds` after the first and doubles with each, up to `most_seconds`.
    """
    doublings = min(max(failures - 1, 0), _MAX_DOUBLINGS)
    return min(most_seconds, least_seconds * 2.0**doublings)


def wait_seconds(
    failures: int,
    least_seconds: float,
    most_seconds: float,
    draw: Callable[[float, float], float] = random.uniform,
) -> float:
    """Return how long to wait after `failures` failures in a row (1 or more).

    Drawn evenly by `draw` from half of `least_seconds` up to `ceiling_seconds`.
    """
    return draw(least_seconds / 2, ceiling_seconds(failures, least_seconds, most_seconds))


def login_wait_seconds(
    refusals: int,
    least_seconds: float,
    most_seconds: float,
    draw: Callable[[float, float], float] = random.uniform,
) -> float:
    """Return how long to wait after `refusals` refused logins in a row (1 or more).

    Never less than `least_seconds`, since servers lock accounts that try too often: drawn evenly by
    `draw` from there to twice as much after the first, doubling with each, up to `most_seconds`.
    """
    return draw(least_seconds, ceiling_seconds(refusals + 1, least_seconds, most_seconds))
