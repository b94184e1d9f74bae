"""What a run counts and measures while it goes on.

Lives here: `Statistics`: the phases, the present one, and a window since the last sample. Rules:
time and CPU are given by the caller; a duration is recorded in the phase and in the window. Must
not come in: devices, what a report looks like (`report`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from load.histogram import Histogram
from load.report import Phase

if TYPE_CHECKING:
    from load.report import Progress

__all__ = ["Statistics"]


class Statistics:
    """Of one run.

    Args:
        now: monotonic seconds of the run's begin.
        cpu: CPU seconds of this process, then.
    """

    def __init__(self, now: float, cpu: float) -> None:
        self.began = now
        self.phase = Phase("start")
        self.phases = [self.phase]
        self.samples: list[Progress] = []
        self._begun = False
        self._phase_cpu = cpu
        self.window_began, self.window_cpu = now, cpu
        self._window_published = self._window_connected = 0
        self.connect, self.puback = Histogram(), Histogram()
        self.to_subscriber, self.lateness = Histogram(), Histogram()

    def begin_phase(self, name: str, now: float, cpu: float) -> None:
        """Begin a phase; what was before the first is part of it."""
        self.end_phase(now, cpu)
        if self._begun:
            self.phase = Phase(name)
            self.phases.append(self.phase)
        self._begun = True
        self.phase.name = name
        self.phase.began_seconds = self.phase.ended_seconds = now - self.began
        self._phase_cpu = cpu

    def end_phase(self, now: float, cpu: float) -> None:
        """Note how long the phase has lasted, and its CPU."""
        self.phase.ended_seconds = now - self.began
        self.phase.cpu_seconds = cpu - self._phase_cpu

    def connected(self, seconds: float) -> None:
        """Note a connection that was made in so many seconds."""
        self.phase.connected += 1
        self.phase.connect.record(seconds)
        self.connect.record(seconds)

    def acknowledged(self, seconds: float) -> None:
        """Note a PUBACK with success."""
        self.phase.acknowledged += 1
        self.phase.puback.record(seconds)
        self.puback.record(seconds)

    def heard(self, seconds: float) -> None:
        """Note a message at the rig's own subscriber."""
        self.phase.to_subscriber.record(seconds)
        self.to_subscriber.record(seconds)

    def late(self, seconds: float) -> None:
        """Note how late a tick was."""
        self.phase.lateness.record(seconds)
        self.lateness.record(seconds)

    def rates(self, now: float) -> tuple[float, float]:
        """Return publishes and connections made a second, since the last sample."""
        elapsed = max(now - self.window_began, 1e-9)
        published = self.total("published") - self._window_published
        connected = self.total("connected") - self._window_connected
        return published / elapsed, connected / elapsed

    def total(self, count: str) -> int:
        """Return a count of `report.Phase` over all phases."""
        return sum(int(getattr(one, count)) for one in self.phases)

    def sample(self, progress: Progress, now: float, cpu: float) -> None:
        """Keep a sample, and begin the next window."""
        self.samples.append(progress)
        self.next_window(now, cpu)

    def next_window(self, now: float, cpu: float) -> None:
        """Begin the next window."""
        self.window_began, self.window_cpu = now, cpu
        self._window_published = self.total("published")
        self._window_connected = self.total("connected")
        self.connect, self.puback = Histogram(), Histogram()
        self.to_subscriber, self.lateness = Histogram(), Histogram()
