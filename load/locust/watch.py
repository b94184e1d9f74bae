"""Whether the rig itself was the bottleneck: its CPU, and how late its timers were.

Lives here: the figures of one process in windows of ten seconds, and what they say. Rules: the
limits are those of the lean driver (`load.report`); a window is judged by itself, since an hour's
mean hides a minute in which every latency was the rig's own; what another process hands over is
JSON. Must not come in: timers, gevent; the caller says what the clock says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from load.histogram import Histogram
from load.report import MAX_CPU_SHARE, MAX_LATENESS_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["WINDOW_SECONDS", "Verdict", "Watch"]

WINDOW_SECONDS = 10.0


@dataclass(slots=True)
class Verdict:
    """What the windows of a process said so far."""

    seconds: float = 0.0
    """That were watched."""
    bad_seconds: float = 0.0
    """Of these, in windows in which the rig was the bottleneck."""
    worst_cpu_share: float = 0.0
    """Of one core, in one window."""
    worst_lateness_seconds: float = 0.0
    """99th percentile of a window."""

    def take(self, seconds: float, cpu_share: float, lateness_seconds: float) -> None:
        """Take one window."""
        self.seconds += seconds
        if cpu_share > MAX_CPU_SHARE or lateness_seconds > MAX_LATENESS_SECONDS:
            self.bad_seconds += seconds
        self.worst_cpu_share = max(self.worst_cpu_share, cpu_share)
        self.worst_lateness_seconds = max(self.worst_lateness_seconds, lateness_seconds)

    def words(self, name: str) -> str:
        """Return a sentence for people about the process `name`."""
        figures = (
            f"CPU at most {self.worst_cpu_share:.0%} of a core, timers at most "
            f"{self.worst_lateness_seconds * 1000:.0f} ms late (p99 of {WINDOW_SECONDS:.0f} s)"
        )
        if not self.bad_seconds:
            return f"{name} was not the bottleneck: {figures}"
        return (
            f"{name} was the bottleneck for {self.bad_seconds:.0f} s of {self.seconds:.0f} s, and "
            f"latencies of that time are its own: {figures}. Use more workers, or `scripts/load`"
        )

    def as_json(self) -> dict[str, float]:
        """Return all of it for programs."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return what `as_json` told of."""
        return cls(**data)


class Watch:
    """The watch over one process.

    Args:
        now: seconds of a monotonic clock.
        cpu_seconds: of this process so far, user and system.
    """

    def __init__(self, now: float, cpu_seconds: float) -> None:
        self._verdict = Verdict()
        self._begin(now, cpu_seconds)

    def late(self, seconds: float) -> None:
        """Take how late a timer was."""
        self._lateness.record(seconds)

    def look(self, now: float, cpu_seconds: float) -> None:
        """Close the window if it is long enough; call it about every second."""
        if now - self._began >= WINDOW_SECONDS:
            self._close(now, cpu_seconds)
            self._begin(now, cpu_seconds)

    def verdict(self, now: float, cpu_seconds: float) -> Verdict:
        """Return what is known, with the window of now if it says anything yet (1 s or more)."""
        found = Verdict(**asdict(self._verdict))
        if now - self._began >= 1.0:
            found.take(*self._window(now, cpu_seconds))
        return found

    def _window(self, now: float, cpu_seconds: float) -> tuple[float, float, float]:
        seconds = now - self._began
        lateness = self._lateness.quantile(0.99) if self._lateness.count else 0.0
        return seconds, (cpu_seconds - self._cpu_seconds) / seconds, lateness

    def _close(self, now: float, cpu_seconds: float) -> None:
        self._verdict.take(*self._window(now, cpu_seconds))

    def _begin(self, now: float, cpu_seconds: float) -> None:
        self._began = now
        self._cpu_seconds = cpu_seconds
        self._lateness = Histogram()
