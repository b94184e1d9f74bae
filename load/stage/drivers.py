"""Processes of the lean driver as one fleet, and the subscribers that listen to all brokers.

Lives here: start, commands divided among the drivers, what they say about now, and their reports as
one. Rules: a driver is `python -m load lean --control`, with device numbers of its own; it is ended
by SIGINT, so that it reports, and killed only if it does not; it never outlives us. Must not come
in: what is commanded when.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from backing import BackingError
from backing.process import die_with_parent
from bench.services import REPOSITORY
from load.histogram import Histogram
from load.report import MAX_CPU_SHARE, MAX_LATENESS_SECONDS
from load.shapes import share_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Drivers", "Ears", "Merged"]

_STOP_SECONDS = 60.0
_HURRY_SECONDS = 10.0
_READY_SECONDS = 60.0
_QUOTED_LINES = 20
_COUNTS = (
    "connected", "published", "acknowledged", "unrouted", "refused", "skipped", "sent_again"
)  # fmt: skip
_DURATIONS = ("connect", "puback", "lateness")
"""Of a phase."""


@dataclass(slots=True)
class Merged:
    """One phase of all drivers together."""

    name: str
    seconds: float = 0.0
    """The longest of any driver."""
    drivers: int = 0
    cpu_seconds: float = 0.0
    connected: int = 0
    published: int = 0
    acknowledged: int = 0
    unrouted: int = 0
    refused: int = 0
    skipped: int = 0
    sent_again: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    connect: Histogram = field(default_factory=Histogram)
    puback: Histogram = field(default_factory=Histogram)
    lateness: Histogram = field(default_factory=Histogram)
    worst_cpu_share: float = 0.0
    """Of one core, of the driver that used the most."""

    def add(self, phase: Mapping[str, Any]) -> None:
        """Take one driver's phase, as its report has it."""
        self.drivers += 1
        self.seconds = max(self.seconds, phase["seconds"])
        self.cpu_seconds += phase["cpu_seconds"]
        self.worst_cpu_share = max(self.worst_cpu_share, phase["cpu_share"])
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + phase[name])
        self.failed.update(phase["failed"])
        self.lost.update(phase["lost"])
        for name in _DURATIONS:
            getattr(self, name).merge(Histogram.from_json(phase[name]))

    @property
    def bottlenecks(self) -> list[str]:
        """Return why a driver itself was the bottleneck; empty if none was."""
        found = []
        if self.worst_cpu_share > MAX_CPU_SHARE:
            found.append(f"a driver's CPU was {self.worst_cpu_share:.0%} of a core")
        late = self.lateness.quantile(0.99) if self.lateness.count else 0.0
        if late > MAX_LATENESS_SECONDS:
            found.append(f"the drivers' timers were {late * 1000:.0f} ms late (p99)")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all of it, without the buckets."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "worst_cpu_share": self.worst_cpu_share,
            **{name: getattr(self, name) for name in _COUNTS},
            "failed": dict(self.failed),
            "lost": dict(self.lost),
            **{
                name: {
                    key: value
                    for key, value in getattr(self, name).as_json().items()
                    if key != "buckets"
                }
                for name in _DURATIONS
            },
            "rig_is_the_bottleneck": self.bottlenecks,
        }


class Drivers:
    """Drivers that together hold `connections`; a context manager.

    They start with no connection and do nothing but what they are told.

    Args:
        targets: URLs that devices connect to, in turn.
        connections: the most that there will be.
        drivers: how many processes.
        folder: for their logs.
        options: further options of `python -m load lean`.
        journals: whether each driver notes its acknowledged publishes in `folder`.
    """

    def __init__(
        self,
        targets: Sequence[str],
        connections: int,
        drivers: int,
        folder: Path,
        options: Sequence[str] = (),
        *,
        journals: bool = False,
    ) -> None:
        self.connections = connections
        self._drivers = [
            _Driver(
                [
                    *targets,
                    "--control",
                    f"--connections={share_of(connections, number, drivers)}",
                    f"--first-number={connections * number // drivers}",
                    "--shape=plateau:86400",
                    "--progress=json",
                    *options,
                    *([f"--journal={folder / f'journal-{number}'}"] if journals else []),
                ],
                folder / f"driver-{number}.log",
            )
            for number in range(drivers)
        ]
        self.journals = tuple(folder / f"journal-{at}" for at in range(drivers) if journals)
        self._reports: list[dict[str, Any]] | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Of all drivers that run."""
        return tuple(driver.pid for driver in self._drivers if driver.running)

    def __enter__(self) -> Self:
        """Start all, and wait until they say something."""
        try:
            for driver in self._drivers:
                driver.start()
            deadline = time.monotonic() + _READY_SECONDS
            for driver in self._drivers:
                driver.wait_ready(deadline)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, without waiting for reports."""
        for driver in self._drivers:
            driver.kill()

    def connect(self, connections: int, per_second: float) -> None:
        """Want so many connections, made at such a rate at most."""
        count = len(self._drivers)
        for number, driver in enumerate(self._drivers):
            driver.send(f"connect-rate {per_second / count:g}")
            driver.send(f"connections {share_of(connections, number, count)}")

    def publish(self, per_second: float) -> None:
        """Publish at such a rate, all together."""
        for driver in self._drivers:
            driver.send(f"publish-rate {per_second / len(self._drivers):g}")

    def phase(self, name: str) -> None:
        """Begin new statistics."""
        for driver in self._drivers:
            driver.send(f"phase {name}")

    def now(self, name: str) -> float:
        """Return the sum of a figure of `load.report.Progress`, of all drivers' latest."""
        return sum(driver.latest.get(name) or 0 for driver in self._drivers)

    def worst(self, name: str) -> float | None:
        """Return the largest of such a figure; None if nobody has it."""
        found = [driver.latest.get(name) for driver in self._drivers]
        return max((value for value in found if value is not None), default=None)

    def check(self) -> None:
        """Raise BackingError if a driver has ended."""
        for driver in self._drivers:
            driver.check()

    def stop(self) -> list[dict[str, Any]]:
        """End all in good order; return their reports, of those that could report."""
        if self._reports is None:
            for driver in self._drivers:
                driver.interrupt()
            deadline = time.monotonic() + _STOP_SECONDS
            self._reports = [
                report
                for driver in self._drivers
                if (report := driver.report(deadline)) is not None
            ]
        return self._reports

    def merged(self) -> dict[str, Merged]:
        """Return the phases of all reports by name, after `stop`."""
        found: dict[str, Merged] = {}
        for report in self._reports or ():
            for phase in report["phases"]:
                found.setdefault(phase["name"], Merged(phase["name"])).add(phase)
        return found


class Ears:
    """The subscribers of all brokers, in one process (`load.stage.ear`); a context manager."""

    def __init__(self, addresses: Sequence[str], folder: Path) -> None:
        self._brokers = len(addresses)
        self._process = _Piped(["-m", "load.stage.ear", *addresses], folder / "ears.log")

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the process, while it runs."""
        return (self._process.pid,) if self._process.running else ()

    def __enter__(self) -> Self:
        """Start it, and wait until it listens to all brokers; raises BackingError."""
        self._process.start()
        deadline = time.monotonic() + _READY_SECONDS
        while not self._process.latest and self._process.running and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._process.latest.get("listening") != self._brokers:
            tail = self._process.tail()
            self._process.kill()
            raise BackingError(f"the rig's own subscribers do not listen to all brokers{tail}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()

    def phase(self, name: str) -> None:
        """Begin a histogram of this name."""
        self._process.send(name)

    def stop(self) -> dict[str, Any]:
        """End it; return what it heard, or nothing if it could not tell."""
        self._process.interrupt()
        deadline = time.monotonic() + _HURRY_SECONDS
        while self._process.reading and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._process.latest


class _Piped:
    """A Python program with commands on its standard input and JSON lines on its output."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._argv = [*die_with_parent(), sys.executable, *arguments]
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.latest: dict[str, Any] = {}
        """What it said last."""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def reading(self) -> bool:
        """Whether more may come."""
        return self._reader is not None and self._reader.is_alive()

    @property
    def pid(self) -> int:
        assert self._process is not None  # noqa: S101 - it was started
        return self._process.pid

    def start(self) -> None:
        path = os.pathsep.join(
            [str(REPOSITORY), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
        )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
                start_new_session=True,  # Ctrl-C reaches us alone
            )
        self._reader = threading.Thread(target=self._read, name="driver-reader", daemon=True)
        self._reader.start()

    def send(self, command: str) -> None:
        """Give a command; nothing happens if it has ended."""
        assert self._process is not None  # noqa: S101 - it was started
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()

    def interrupt(self) -> None:
        if self.running:
            self._signal(signal.SIGINT)

    def kill(self) -> None:
        if self._process is None:
            return
        if self.running:
            self._signal(signal.SIGKILL)
        self._process.wait()
        if self._reader is not None:
            self._reader.join(_HURRY_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = None

    def tail(self) -> str:
        """Return the end of the log with a heading."""
        lines = self._log.read_text(errors="replace").splitlines()[-_QUOTED_LINES:]
        return "\n".join([f"; the end of {self._log}:", *(lines or ["(empty)"])])

    def take(self, said: dict[str, Any]) -> None:
        """Keep what it said."""
        self.latest = said

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _read(self) -> None:
        process = self._process
        assert process is not None  # noqa: S101 - the thread starts after it
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # a line that was cut short by a kill
                self.take(json.loads(line))


class _Driver(_Piped):
    """One lean driver."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        super().__init__(["-m", "load", "lean", *arguments], log)
        self._report: dict[str, Any] | None = None

    def take(self, said: dict[str, Any]) -> None:
        if said.get("event") == "report":
            self._report = said
        else:
            self.latest = said

    def wait_ready(self, deadline: float) -> None:
        """Return when it says something; raises BackingError."""
        while not self.latest:
            self.check()
            if time.monotonic() > deadline:
                raise BackingError(f"a driver says nothing after {_READY_SECONDS:g} s{self.tail()}")
            time.sleep(0.05)

    def check(self) -> None:
        if not self.running:
            raise BackingError(f"a driver has ended{self.tail()}")

    def report(self, deadline: float) -> dict[str, Any] | None:
        """Wait for its report; None if there is none by then, even after a second SIGINT."""
        self._wait(deadline)
        if self._report is None and self.running:
            self.interrupt()
            self._wait(time.monotonic() + _HURRY_SECONDS)
        return self._report

    def _wait(self, deadline: float) -> None:
        while self._report is None and self.reading and time.monotonic() < deadline:
            time.sleep(0.05)
