"""What a lean run saw: counts and histograms of each phase, and whether to trust them.

Lives here: `Phase`, `Progress`, `Report`, their JSON, and the rule that says when the rig itself
was the bottleneck. Rules: a phase is a stage of the shape, or what a command called so; a publish
counts in the phase in which it was made, its answer in the phase in which it came; a report is
whole at any moment. Must not come in: clocks, what a person sees (`command`).

The rig is the bottleneck of a phase when its own CPU was above 90 % of a core, or the 99th
percentile of its timers' lateness above 50 ms: then latencies are as much the rig's as the
system's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from load.histogram import Histogram

__all__ = ["MAX_CPU_SHARE", "MAX_LATENESS_SECONDS", "Phase", "Progress", "Report"]

MAX_CPU_SHARE: Final = 0.9
"""Of one core, above which the rig is the bottleneck."""
MAX_LATENESS_SECONDS: Final = 0.05
"""99th percentile, above which the rig is the bottleneck."""


@dataclass(slots=True)
class Phase:
    """Counts and durations of one part of a run; seconds are those of the run."""

    name: str
    began_seconds: float = 0.0
    ended_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of this process, user and system."""
    connected: int = 0
    """Connections made, those made again included."""
    failed: Counter[str] = field(default_factory=Counter)
    """Connects that failed, by reason."""
    lost: Counter[str] = field(default_factory=Counter)
    """Connections that were up and ended although nobody wanted it, by reason."""
    dropped: int = 0
    """Connections that the shape's storm dropped."""
    published: int = 0
    acknowledged: int = 0
    """PUBACK with success."""
    unrouted: int = 0
    """PUBACK that says that nobody is subscribed: taken and lost."""
    refused: int = 0
    """PUBACK with an error."""
    sent_again: int = 0
    skipped: int = 0
    """Publishes that were due when no device that is up had room for one: never made."""
    heard: int = 0
    """Messages that the rig's own subscriber got, repeated ones included."""
    connect: Histogram = field(default_factory=Histogram)
    """Begin of TCP's handshake to CONNACK."""
    puback: Histogram = field(default_factory=Histogram)
    """From when a publish was due to its PUBACK with success."""
    to_subscriber: Histogram = field(default_factory=Histogram)
    """From when a publish was due to its arrival at the rig's own subscriber."""
    lateness: Histogram = field(default_factory=Histogram)
    """How late the rig's timer was, at each of its ticks."""

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.ended_seconds - self.began_seconds

    @property
    def cpu_share(self) -> float:
        """Of one core."""
        return self.cpu_seconds / self.seconds if self.seconds > 0 else 0.0

    def bottlenecks(self) -> list[str]:
        """Return why the rig itself was the bottleneck, for people; empty if it was not.

        What lasted less than a second says nothing.
        """
        found: list[str] = []
        if self.seconds < 1:
            return found
        if self.cpu_share > MAX_CPU_SHARE:
            found.append(f"the rig's CPU was {self.cpu_share:.0%} of a core")
        late = self.lateness.quantile(0.99) if self.lateness.count else 0.0
        if late > MAX_LATENESS_SECONDS:
            found.append(f"the rig's timers were {late * 1000:.0f} ms late (p99)")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all of it for programs."""
        return {
            "name": self.name,
            "began_seconds": self.began_seconds,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "cpu_share": self.cpu_share,
            "connected": self.connected,
            "failed": dict(self.failed),
            "lost": dict(self.lost),
            "dropped": self.dropped,
            "published": self.published,
            "publish_rate": self.published / self.seconds if self.seconds > 0 else 0.0,
            "acknowledged": self.acknowledged,
            "unrouted": self.unrouted,
            "refused": self.refused,
            "sent_again": self.sent_again,
            "skipped": self.skipped,
            "heard": self.heard,
            "connect": self.connect.as_json(),
            "puback": self.puback.as_json(),
            "to_subscriber": self.to_subscriber.as_json(),
            "lateness": self.lateness.as_json(),
            "rig_is_the_bottleneck": self.bottlenecks(),
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run: counts since its start, rates and quantiles since the moment before."""

    seconds: float
    phase: str
    connected: int
    """Up now."""
    connecting: int
    waiting: int
    """Lost or not begun yet, waiting for their turn."""
    wanted: int
    """Connections that the shape asks for."""
    failed: int
    """Connects that failed."""
    lost: int
    connect_rate: float
    """Connects a second that may begin now, after all decay."""
    published: int
    acknowledged: int
    in_flight: int
    missing: int
    """Published with QoS 1, not in flight, not acknowledged with success."""
    skipped: int
    heard: int
    published_per_second: float
    connected_per_second: float
    connect_p99_seconds: float | None
    puback_p50_seconds: float | None
    puback_p99_seconds: float | None
    to_subscriber_p99_seconds: float | None
    lateness_p99_seconds: float | None
    cpu_share: float
    """Of one core."""
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """All of a run."""

    options: dict[str, Any]
    began_at: float
    """Seconds since 1970."""
    seconds: float
    interrupted: bool
    connections: int
    """Devices of this process."""
    published: int
    acknowledged: int
    missing: int
    """Published with QoS 1 and refused, taken without a subscriber, or without an answer."""
    unanswered: int
    unheard: int
    """Acknowledged publishes of watched devices that the rig's own subscriber did not get."""
    rss_bytes: int
    """Of this process, at its peak."""
    phases: list[Phase]
    samples: list[Progress]
    """One a second."""

    @property
    def whole(self) -> Phase:
        """All phases as one."""
        return whole(self.phases)

    @property
    def bottlenecks(self) -> list[str]:
        """Why the rig was the bottleneck, by phase."""
        return [f"{one.name}: {text}" for one in self.phases for text in one.bottlenecks()]

    def as_json(self) -> dict[str, Any]:
        """Return all of it for programs."""
        return {
            "options": self.options,
            "began_at": self.began_at,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "connections": self.connections,
            "published": self.published,
            "acknowledged": self.acknowledged,
            "missing": self.missing,
            "unanswered": self.unanswered,
            "unheard": self.unheard,
            "rss_bytes": self.rss_bytes,
            "rig_is_the_bottleneck": self.bottlenecks,
            "whole": self.whole.as_json(),
            "phases": [one.as_json() for one in self.phases],
            "samples": [{name: getattr(one, name) for name in _FIELDS} for one in self.samples],
        }


_FIELDS: Final = tuple(Progress.__dataclass_fields__)
_COUNTS: Final = (
    "cpu_seconds",
    "connected",
    "dropped",
    "published",
    "acknowledged",
    "unrouted",
    "refused",
    "sent_again",
    "skipped",
    "heard",
)
_HISTOGRAMS: Final = ("connect", "puback", "to_subscriber", "lateness")


def whole(phases: list[Phase]) -> Phase:
    """Return one phase of several that follow each other."""
    made = Phase("whole")
    if not phases:
        return made
    made.began_seconds, made.ended_seconds = phases[0].began_seconds, phases[-1].ended_seconds
    for one in phases:
        for name in _COUNTS:
            setattr(made, name, getattr(made, name) + getattr(one, name))
        for name in _HISTOGRAMS:
            getattr(made, name).merge(getattr(one, name))
        made.failed.update(one.failed)
        made.lost.update(one.lost)
    return made
