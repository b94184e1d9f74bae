"""What a shape means to Locust, and to one device.

Lives here: users and spawn rate of a moment, and a device's schedule. Pure. Rules: both follow from
the shape and the time since the start alone, so that master and workers agree without a word. Must
not come in: Locust, clocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from load.shapes import Shape

__all__ = ["Schedule", "schedule", "users_and_rate"]

_LEAST_RATE: Final = 0.1
_LOOK_SECONDS: Final = 5.0
_CHANGING: Final = ("ramp", "drain")


class Schedule(NamedTuple):
    """What a device has to do for a while."""

    interval_seconds: float
    """Between two of its publishes; infinite: none."""
    until: float
    """When another schedule holds, by the clock that was asked about; infinite: never."""
    stage: int = 0
    drop_share: float = 0.0
    """Share of the connections that are dropped once as the stage begins, 0 to 1."""


def schedule(shape: Shape, passed: float, interval_seconds: float) -> Schedule:
    """Return a device's schedule `passed` seconds after the start; `until` counts from there, too.

    A device publishes so often that all that the shape wants now make the rate that it wants now.

    Args:
        shape: of the whole rig.
        passed: seconds, 0 or more.
        interval_seconds: of a device, for a shape that says no rate anywhere.
    """
    target = shape.at(passed)
    if target is None:
        return Schedule(math.inf, math.inf)
    stages = shape.stages[: target.stage + 1]
    stage = stages[-1]
    until = sum(one.seconds for one in stages)
    connections, rate = target.connections, target.publish_rate
    if stage.kind in _CHANGING:
        until = min(until, passed + _LOOK_SECONDS)
        if not (connections and rate):  # a ramp at its very start
            connections, rate = stage.connections, stage.publish_rate
    if all(one.publish_rate == 0 for one in shape.stages):
        interval = interval_seconds
    else:
        interval = connections / rate if connections and rate else math.inf
    return Schedule(interval, until, target.stage, target.drop_share)


def users_and_rate(shape: Shape, passed: float) -> tuple[int, float] | None:
    """Return the users at the end of the stage, and how many a second lead there; None: it is over.

    It is the same for as long as a stage lasts, since Locust begins anew whenever it changes. A
    stage that changes nothing keeps the rate of the last that did: a ramp that Locust has not
    finished goes on.
    """
    target = shape.at(passed)
    if target is None:
        return None
    rate, before = _LEAST_RATE, 0
    for stage in shape.stages[: target.stage + 1]:
        change = abs(stage.connections - before)
        if change:
            rate = max(change / stage.seconds, _LEAST_RATE)
        before = stage.connections
    return before, rate
