"""As many connections as fit: ramp, rest, publish, kill a broker, see everybody come back.

Lives here: the order of a scale run; `scripts/scale` starts it. Rules: every connection is a device
of the lean driver, over WebSocket, through HAProxy as it is deployed, to one of several brokers;
a phase begins and ends with a reading of everything; an interrupt ends the phase and reports. Must
not come in: what the readings become (`scale_report`).
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backing import BackingError
from load.backoff import BACKOFFS
from load.errors import LoadError
from load.stage import scale_report
from load.stage.accounting import Reading, machine_use, process_use, reading
from load.stage.console import command_line, interruptible, say
from load.stage.drivers import Drivers, Ears, Merged
from load.stage.plan import DoesNotFit, Plan, fitting, plan
from load.stage.results import add_options
from load.stage.site import Site, lift_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Observed", "Sample", "main", "run"]

_AIM = 50_000
_SAMPLE_SECONDS = 0.5
_READINGS_EVERY = 6
_SAY_SECONDS = 5.0
_SETTLE_SECONDS = 5.0
_RAMP_PATIENCE = 4.0
_RAMP_EXTRA_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment of the run; seconds since the first connection was wanted."""

    seconds: float
    connected: int
    connecting: int
    lost: int
    """Since the start."""
    published: int
    acknowledged: int
    puback_p99_seconds: float | None
    lateness_p99_seconds: float | None


@dataclass(slots=True)
class Observed:
    """All that a run saw; what it did not come to is missing."""

    plan: Plan
    empty: Reading | None = None
    """Brokers, HAProxies and drivers run, nobody is connected."""
    samples: list[Sample] = field(default_factory=list)
    readings: list[tuple[float, Reading]] = field(default_factory=list)
    """(seconds, reading), every few seconds."""
    phases: dict[str, tuple[float, Reading, float, Reading]] = field(default_factory=dict)
    """By name: (seconds, reading) at its two ends."""
    connected: dict[str, int] = field(default_factory=dict)
    """At the end of each phase."""
    ramped_seconds: float | None = None
    """Until everybody was connected."""
    killed_at: float | None = None
    merged: dict[str, Merged] = field(default_factory=dict)
    heard: dict[str, object] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    source_addresses: int = 0
    interrupted: bool = False
    failed: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit code: 1 if not everybody was connected, or came back."""
    options = _options(arguments)
    interruptible()
    descriptors = lift_descriptors()
    wanted = options.connections or fitting(_AIM, machine_use().available_bytes)
    try:
        made = plan(
            wanted,
            descriptors,
            brokers=options.brokers,
            ingresses=options.ingresses,
            drivers=options.drivers,
        )
    except DoesNotFit as error:
        say(str(error))
        return 2
    observed = run(made, options)
    scale_report.write(options, observed)
    if observed.interrupted:
        return 130
    return 0 if scale_report.complete(observed) else 1


def run(made: Plan, options: argparse.Namespace) -> Observed:
    """Do all phases; what goes wrong stands in what is returned."""
    observed = Observed(made)
    observed.options = {
        name: value
        for name, value in vars(options).items()
        if isinstance(value, int | float | str | None)
    }
    say(
        f"{made.connections:,} connections: {made.brokers} brokers, {made.ingresses} HAProxies, "
        f"{made.drivers} drivers, {made.descriptors:,} descriptors a process"
    )
    try:
        _stage(made, options, observed)
    except KeyboardInterrupt:
        say("interrupted; ending everything, then the report of what there is")
        observed.interrupted = True
    except (BackingError, LoadError, OSError) as error:
        observed.failed = str(error)
        say(f"failed: {error}")
    return observed


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/scale",
        description="Persistent WebSocket connections on one machine, through HAProxy, to several "
        "brokers: bytes and CPU of each, connect rate, publish latency with all of them, and the "
        "storm after a broker is killed.",
    )
    add = parser.add_argument
    add("--connections", type=int, default=0, metavar="N",
        help=f"0: what memory allows, at most {_AIM:,} (default)")  # fmt: skip
    for name in ("brokers", "ingresses", "drivers"):
        add(f"--{name}", type=int, default=0, metavar="N", help="0: as many as it takes (default)")
    add("--connect-rate", type=float, default=500.0, metavar="N",
        help="connects a second at most (default: %(default)g)")  # fmt: skip
    add("--storm-connect-rate", type=float, default=2000.0, metavar="N",
        help="likewise after the kill (default: %(default)g)")  # fmt: skip
    add("--keep-alive", type=int, default=300, metavar="SECONDS",
        help="of each device; a device at rest pings (default: %(default)s)")  # fmt: skip
    add("--idle-seconds", type=float, default=60.0, metavar="N",
        help="at rest, for CPU a connection (default: %(default)g)")  # fmt: skip
    add("--publish-rate", type=float, default=200.0, metavar="N",
        help="publishes a second, of all devices together (default: %(default)g)")  # fmt: skip
    add("--publish-seconds", type=float, default=60.0, metavar="N",
        help="0: no publishing, no latency (default: %(default)g)")  # fmt: skip
    add("--storm-seconds", type=float, default=300.0, metavar="N",
        help="at most, until all are back; 0: none is killed (default: %(default)g)")  # fmt: skip
    add("--storm-publish-rate", type=float, default=100.0, metavar="N",
        help="publishes a second during the storm (default: %(default)g)")  # fmt: skip
    add("--backoff", choices=sorted(BACKOFFS), default="full-jitter",
        help="a device's wait before it connects again (default: %(default)s)")  # fmt: skip
    add("--quick", action="store_true", help="short phases: to see that it works")
    add_options(parser, "scale")
    options = parser.parse_args(arguments)
    if options.connections < 0 or min(options.connect_rate, options.storm_connect_rate) <= 0:
        parser.error("--connections and the rates of connects must be above 0")
    if options.quick:
        options.idle_seconds, options.publish_seconds = 5.0, 5.0
        options.storm_seconds = min(options.storm_seconds, 90.0)
    options.command = command_line("scripts/scale")
    return options


def _stage(made: Plan, options: argparse.Namespace, observed: Observed) -> None:
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(Site(made))
        observed.source_addresses = len(site.ingresses)
        ears = stack.enter_context(
            Ears([f"{broker.host}:{broker.port}" for broker in site.brokers], site.folder)
        )
        fleet = stack.enter_context(
            Drivers(
                site.targets,
                made.connections,
                made.drivers,
                site.folder,
                [f"--keep-alive={options.keep_alive}", f"--backoff={options.backoff}"],
            )
        )
        watch = _Watch(site, fleet, ears, observed)
        try:
            _phases(site, fleet, watch, options, observed)
        finally:
            # Not by the stack: reports are wanted after an interrupt, too.
            watch.stop()
            say("ending the drivers")
            fleet.stop()
            observed.merged = fleet.merged()
            observed.heard = ears.stop()


def _phases(
    site: Site, fleet: Drivers, watch: _Watch, options: argparse.Namespace, observed: Observed
) -> None:
    wanted = observed.plan.connections
    time.sleep(1)
    observed.empty = watch.read()
    watch.start()
    with watch.phase("ramp"):
        fleet.connect(wanted, options.connect_rate)
        limit = wanted / options.connect_rate * _RAMP_PATIENCE + _RAMP_EXTRA_SECONDS
        if watch.until(lambda: fleet.now("connected") >= wanted, limit):
            observed.ramped_seconds = watch.seconds
        else:
            say(f"only {fleet.now('connected'):,.0f} of {wanted:,} connected after {limit:.0f} s")
    watch.wait(_SETTLE_SECONDS)
    with watch.phase("idle"):
        watch.wait(options.idle_seconds)
    if options.publish_seconds:
        with watch.phase("publish"):
            fleet.publish(options.publish_rate)
            watch.wait(options.publish_seconds)
            fleet.publish(0)
        watch.wait(1)
    if not options.storm_seconds:
        return
    with watch.phase("storm"):
        fleet.connect(wanted, options.storm_connect_rate)
        fleet.publish(options.storm_publish_rate)
        watch.wait(2)
        before = fleet.now("connected")
        chosen = random.Random(1).choice(site.brokers)  # noqa: S311 - the same one each time
        observed.killed_at = watch.seconds
        say(f"killing the broker at {chosen.host}, which has {watch.connections_of(chosen.pid)}")
        chosen.kill()
        # First they have to be seen as lost, and that may take a broker's death a moment.
        lost = fleet.now("lost")
        watch.until(lambda: fleet.now("lost") > lost, _RAMP_EXTRA_SECONDS)
        watch.wait(2)
        back = watch.until(lambda: fleet.now("connected") >= before, options.storm_seconds)
        say("all are back" if back else "not all came back")
        fleet.publish(0)
        watch.wait(1)


class _Watch:
    """Samples and readings beside the run, and waits that say how far it is."""

    def __init__(self, site: Site, fleet: Drivers, ears: Ears, observed: Observed) -> None:
        self._site = site
        self._fleet = fleet
        self._ears = ears
        self._observed = observed
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="samples", daemon=True)
        self._name = "start"

    @property
    def seconds(self) -> float:
        """Since the first connection was wanted."""
        return time.monotonic() - self._began

    def start(self) -> None:
        """Begin to count, and to sample."""
        self._began = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End sampling."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def read(self) -> Reading:
        """Read everything now."""
        return reading({**self._site.pids, "driver": self._fleet.pids, "ears": self._ears.pids})

    def connections_of(self, pid: int) -> str:
        """Say how many connections a broker has, about."""
        return f"{process_use([pid]).descriptors:,} descriptors"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Begin a phase everywhere; a reading at both ends, even if it was interrupted."""
        say(name)
        self._name = name
        self._fleet.phase(name)
        self._ears.phase(name)
        began, first = self.seconds, self.read()
        try:
            yield
        finally:
            self._observed.phases[name] = (began, first, self.seconds, self.read())
            self._observed.connected[name] = int(self._fleet.now("connected"))
            self._fleet.phase(f"after {name}")
            self._ears.phase(f"after {name}")

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.until(lambda: False, seconds)

    def until(self, met: Callable[[], bool], limit_seconds: float) -> bool:
        """Wait until something is so; return whether it became so. Raises BackingError."""
        deadline = time.monotonic() + limit_seconds
        said = time.monotonic()
        while not met():
            now = time.monotonic()
            if now >= deadline:
                return False
            self._fleet.check()
            if now - said >= _SAY_SECONDS:
                said = now
                self._say()
            time.sleep(min(0.1, deadline - now))
        return True

    def _say(self) -> None:
        fleet = self._fleet
        parts = [f"{self._name}: {fleet.now('connected'):,.0f} connected"]
        if connecting := fleet.now("connecting") + fleet.now("waiting"):
            parts.append(f"{connecting:,.0f} on the way")
        if rate := fleet.now("connected_per_second"):
            parts.append(f"{rate:,.0f} connects/s")
        if rate := fleet.now("published_per_second"):
            parts.append(f"{rate:,.0f} publishes/s")
            parts.append(f"PUBACK p99 {(fleet.worst('puback_p99_seconds') or 0) * 1000:.0f} ms")
        parts.append(
            f"a driver's CPU {fleet.worst('cpu_share') or 0:.0%}, timers "
            f"{(fleet.worst('lateness_p99_seconds') or 0) * 1000:.0f} ms late"
        )
        say(", ".join(parts))

    def _look(self) -> None:
        turn = 0
        while not self._over.wait(_SAMPLE_SECONDS):
            fleet = self._fleet
            self._observed.samples.append(
                Sample(
                    self.seconds,
                    int(fleet.now("connected")),
                    int(fleet.now("connecting")),
                    int(fleet.now("lost")),
                    int(fleet.now("published")),
                    int(fleet.now("acknowledged")),
                    fleet.worst("puback_p99_seconds"),
                    fleet.worst("lateness_p99_seconds"),
                )
            )
            if turn % _READINGS_EVERY == 0:
                self._observed.readings.append((self.seconds, self.read()))
            turn += 1


if __name__ == "__main__":
    sys.exit(main())
