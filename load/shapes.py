"""How a load grows, stays, breaks and ends, as a pure function of time.

Lives here: `Shape`, a row of stages, and its short text form. Rules: `at` depends on nothing but
the time since the start; what a rig really reached is its own affair; a stage's connections and
rate are totals of the rig, which divides them among its processes. Must not come in: clocks,
devices.

The text form, stages joined by commas:

    ramp:60:5000       in 60 s from what was up to 5000 connections, evenly
    plateau:120:300    for 120 s what was, with 300 publishes/s; without the last, the rate that was
    storm:60:0.5       half of all lose their connection at once, then 60 s to see them come back
    drain:30           in 30 s down to none

`ramp:60:5000:300` publishes too, with a rate that grows with the connections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from load.errors import BadOption

__all__ = ["KINDS", "Shape", "Stage", "Target", "share_of"]

KINDS: Final = ("ramp", "plateau", "storm", "drain")


class Target(NamedTuple):
    """What is wanted at a moment."""

    stage: int
    """Index of the stage; a new one begins new statistics."""
    name: str
    """Of the stage: its kind."""
    connections: int
    connect_rate: float
    """Connects a second that lead there; 0: as fast as the rig's own limit allows."""
    publish_rate: float
    """Messages a second, of all devices together."""
    drop_share: float
    """Share of the connections to be dropped once, as this stage begins; 0 to 1."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a shape; connections and publish rate are those at its end."""

    kind: str
    """One of `KINDS`."""
    seconds: float
    connections: int
    publish_rate: float = 0.0
    drop_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Stages, one after another."""

    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def most_connections(self) -> int:
        """At any time."""
        return max((stage.connections for stage in self.stages), default=0)

    def at(self, seconds: float) -> Target | None:
        """Return what is wanted `seconds` (0 or more) after the start; None when it is over."""
        begun = 0.0
        before = Stage("plateau", 0.0, 0)
        for index, stage in enumerate(self.stages):
            passed = seconds - begun
            if passed < stage.seconds:
                return _within(index, stage, before, passed)
            begun += stage.seconds
            before = stage
        return None

    def share(self, part: int, parts: int) -> Shape:
        """Return what process number `part` (from 0) of `parts` does of it."""
        return Shape(
            tuple(
                Stage(
                    one.kind,
                    one.seconds,
                    share_of(one.connections, part, parts),
                    one.publish_rate / parts,
                    one.drop_share,
                )
                for one in self.stages
            )
        )

    @classmethod
    def steady(cls, connections: int, publish_rate: float, seconds: float) -> Shape:
        """Return a plateau alone: connect at the rig's own rate, and publish from the start."""
        return cls((Stage("plateau", seconds, connections, publish_rate),))

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read the text form; see the module.

        Raises:
            BadOption: it is not understood.
        """
        stages: list[Stage] = []
        for part in text.split(","):
            kind, *rest = part.strip().split(":")
            try:
                seconds, *figures = [float(one) for one in rest]
                stages.append(_stage(kind, seconds, figures, stages[-1] if stages else None))
            except (ValueError, IndexError, OverflowError):
                raise BadOption(
                    f"the stage {part!r} of the shape is not understood: ramp:SECONDS:CONNECTIONS"
                    "[:RATE], plateau:SECONDS[:RATE], storm:SECONDS:SHARE[:RATE] or drain:SECONDS"
                ) from None
        return cls(tuple(stages))


def share_of(total: int, number: int, parts: int) -> int:
    """Return what process `number` (from 0) of `parts` has of a total; the shares add up to it."""
    return total * (number + 1) // parts - total * number // parts


def _stage(kind: str, seconds: float, figures: list[float], before: Stage | None) -> Stage:
    """Raises ValueError, IndexError or OverflowError on figures that are not for this kind."""
    connections = before.connections if before else 0
    rate = before.publish_rate if before else 0.0
    drop = 0.0
    if kind == "ramp":
        connections = int(figures.pop(0))
    elif kind == "storm":
        drop = figures.pop(0)
    elif kind == "drain":
        connections, rate = 0, 0.0
    if figures and kind != "drain":
        rate = figures.pop(0)
    if kind not in KINDS or figures or not seconds > 0 or connections < 0 or not 0 <= drop <= 1:
        raise ValueError
    if not 0 <= rate < math.inf:
        raise ValueError
    return Stage(kind, seconds, connections, rate, drop)


def _within(index: int, stage: Stage, before: Stage, passed: float) -> Target:
    connections, rate, connect_rate = stage.connections, stage.publish_rate, 0.0
    if stage.kind in ("ramp", "drain"):
        done = passed / stage.seconds
        change = stage.connections - before.connections
        connections = before.connections + round(change * done)
        connect_rate = max(0.0, change / stage.seconds)
        rate = before.publish_rate + (stage.publish_rate - before.publish_rate) * done
    return Target(index, stage.kind, connections, connect_rate, rate, stage.drop_share)
