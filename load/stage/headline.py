"""9,779 publishes a second with the whole system on one machine, and many connections beside.

Lives here: the order of a headline run; `scripts/headline` starts it. Rules: broker, HAProxy,
Cassandra and service are real, and run as they would; persistent connections are held by lean
drivers, and the rate that these do not publish themselves comes from the benchmark's load generator
through the same HAProxy; latency is taken by its tap before the service, of every update; what was
published is compared with what the service acknowledged, and read back; an interrupt ends the
publishing and does all the rest. Must not come in: how figures are shown (`headline_report`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from backing import RAISED_THRESHOLDS, BackingError, Cassandra
from bench import measure
from bench.measure import BenchError, Load
from bench.services import SERVICES, Place
from load.check import compare
from load.errors import LoadError
from load.stage import headline_report
from load.stage.accounting import Reading, reading
from load.stage.console import command_line, interruptible, say
from load.stage.drivers import Drivers, Merged
from load.stage.plan import DoesNotFit, Plan, plan
from load.stage.results import OUT, add_options
from load.stage.site import Site, lift_descriptors

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Observed", "Sample", "Step", "main", "run"]

_SERVICE = SERVICES["shadowsvc"]
_RATE = 9779.0  # publishes a second of the system that shadowsvc is made for
_DEVICES = 20_000
_PUBLISHERS = 8
_PROGRESS_SECONDS = 5
_TAP_REST_SECONDS = 0.001
"""The tap would take each message by itself, at the cost of a fifth of two processors."""
_CONNECT_SECONDS = 60.0
_RAMP_PATIENCE = 4.0
_READ_BACK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A few seconds of a step; seconds since its begin, latencies of those seconds alone."""

    seconds: float
    durable: int
    connected: int
    mean_ms: float
    p99_ms: float
    subscriber_mean_ms: float
    subscriber_p99_ms: float
    reading: Reading


@dataclass(slots=True)
class Step:
    """One rate: what was offered, what came of it."""

    rate: float
    fleet_rate: float
    began: Reading | None = None
    ended: Reading | None = None
    end: dict[str, Any] = field(default_factory=dict)
    """What the load generator tells at its end; see bench/loadgen/main.go."""
    samples: list[Sample] = field(default_factory=list)
    published: int = 0
    """In this step, the drivers' included."""
    durable_in_time: int = 0
    """Of these, as long as it was published."""


@dataclass(slots=True)
class Observed:
    """All that a run saw."""

    plan: Plan
    steps: list[Step] = field(default_factory=list)
    connected: int = 0
    """At the end of the last step."""
    merged: dict[str, Merged] = field(default_factory=dict)
    published: int = 0
    """By the load generator, over all steps."""
    fleet_published: int = 0
    fleet_acknowledged: int = 0
    fleet_unanswered: int = 0
    durable: int = 0
    """That the service acknowledged, over all steps."""
    held: int = 0
    reconnects: int = 0
    """How often the service lost its connection, and came back."""
    again: int = 0
    """Updates that it acknowledged before, and got again after that."""
    missing: int | None = None
    """Updates that the service did not acknowledge, and devices without their last update."""
    fleet_missing: int | None = None
    """Of the drivers' updates, as read back."""
    drained_seconds: float | None = None
    service_mb: float = 0.0
    interrupted: bool = False
    failed: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit code: 0 if nothing is missing, as read back."""
    options = _options(arguments)
    interruptible()
    try:
        made = plan(
            options.connections, lift_descriptors(), drivers=options.drivers, spare_brokers=0
        )
    except DoesNotFit as error:
        say(str(error))
        return 2
    if made.brokers > 1:
        say(
            f"--connections {made.connections:,} need {made.brokers} brokers, and a share is one "
            "broker's: mosquitto has no cluster. Fewer connections, or more descriptors (ulimit -n)"
        )
        return 2
    observed = run(made, options)
    headline_report.write(options, observed)
    if observed.interrupted:
        return 130
    return 0 if headline_report.whole(observed) else 1


def run(made: Plan, options: argparse.Namespace) -> Observed:
    """Do all steps; what goes wrong stands in what is returned."""
    observed = Observed(made)
    try:
        with Cassandra(heap=options.heap, settings=RAISED_THRESHOLDS) as cassandra:
            if options.warm_up > 0:
                say(f"Cassandra is up; warming it up for {options.warm_up:g} s")
                measure.run(_SERVICE, 0, _load(options.warm_up), cassandra, options.logs)
            _system(made, options, cassandra, observed)
    except KeyboardInterrupt:
        observed.interrupted = True
    except (BackingError, BenchError, LoadError, OSError) as error:
        observed.failed = str(error)
        say(f"failed: {error}")
    return observed


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/headline",
        description="9,779 publishes/s through broker, HAProxy, service and Cassandra on this "
        "machine, with many persistent WebSocket connections: latency to the subscriber and to "
        "durable beside 69 ms, who was the bottleneck, and whether anything is missing.",
    )
    add = parser.add_argument
    add("--connections", type=int, default=2_000, metavar="N",
        help="persistent WebSocket connections through HAProxy (default: %(default)s)")  # fmt: skip
    add("--minutes", type=float, default=10.0, metavar="N",
        help="of each rate (default: %(default)g)")  # fmt: skip
    add("--rates", type=lambda text: [float(one) for one in text.split(",")], default=[_RATE],
        metavar="N,N",
        help=f"publishes a second, one rate after another (default: {_RATE:g})")  # fmt: skip
    add("--fleet-rate", type=float, default=200.0, metavar="N",
        help="of these, as many are published by the persistent connections themselves, and the "
        "rest by the load generator; a publish costs a driver several times as much CPU "
        "(default: %(default)g)")  # fmt: skip
    add("--publishers", type=int, default=_PUBLISHERS, metavar="N",
        help="connections of the load generator; mosquitto reads one packet of each in a turn "
        "(default: %(default)s)")  # fmt: skip
    add("--transport", choices=("websocket", "mqtt"), default="websocket",
        help="of the persistent connections (default: %(default)s)")  # fmt: skip
    add("--pods", type=int, default=1, metavar="N", help="of the service (default: %(default)s)")
    add("--drivers", type=int, default=0, metavar="N", help="0: as many as it takes (default)")
    add("--connect-rate", type=float, default=400.0, metavar="N",
        help="connects a second (default: %(default)g)")  # fmt: skip
    add("--keep-alive", type=int, default=300, metavar="SECONDS",
        help="of each device (default: %(default)s)")  # fmt: skip
    add("--warm-up", type=float, default=20.0, metavar="SECONDS",
        help="of saturation before anything counts, for the sake of Cassandra's compiler "
        "(default: %(default)g)")  # fmt: skip
    add("--drain-limit", type=float, default=600.0, metavar="SECONDS",
        help="until all that was published has to be durable (default: %(default)g)")  # fmt: skip
    add("--heap", default="2G", help="Cassandra's heap (default: %(default)s)")
    add("--quick", action="store_true", help="500 connections, 10 s: to see that it works")
    add_options(parser, "headline")
    options = parser.parse_args(arguments)
    if options.quick:
        options.connections = min(options.connections, 500)
        options.minutes = min(options.minutes, 1 / 6)
        options.warm_up = min(options.warm_up, 5.0)
    if min(options.connections, options.publishers) < 1:
        parser.error("--connections and --publishers must be above 0")
    if options.minutes <= 0 or min(options.rates) <= 0:
        parser.error("--minutes and --rates must be above 0")
    options.command = command_line("scripts/headline")
    options.logs = OUT / "headline" / "logs"
    options.logs.mkdir(parents=True, exist_ok=True)
    return options


def _load(saturate_seconds: float, publishers: int = _PUBLISHERS, pods: int = 1) -> Load:
    return Load(
        saturate_warm_seconds=0,
        saturate_seconds=saturate_seconds,
        rate=0,
        rate_warm_seconds=0,
        rate_seconds=0,
        window=1000,
        connections=publishers,
        devices=_DEVICES,
        pods=pods,
    )


def _system(
    made: Plan, options: argparse.Namespace, cassandra: Cassandra, observed: Observed
) -> None:
    name = f"headline_{os.getpid()}"
    log = options.logs / "shadowsvc.log"
    log.unlink(missing_ok=True)
    address = f"{cassandra.address}:{cassandra.port}"
    load = _load(0, options.publishers, options.pods)
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(Site(made))
        broker, node = site.brokers[0], site.ingresses[0]
        more = [
            f"-publish-to={node.host}:{node.mqtt_port}",
            "-arrivals",
            f"-rest={_TAP_REST_SECONDS}s",
            f"-every={_PROGRESS_SECONDS}s",
        ]
        loadgen = stack.enter_context(measure.Loadgen(_SERVICE, broker, address, load, log, more))
        place = Place(loadgen.mqtt, address, cassandra.dc, name, name)
        stack.enter_context(measure.table(cassandra, place, log))
        pods = stack.enter_context(measure.started(_SERVICE, place, log, options.pods))
        loadgen.wait("subscribed", _CONNECT_SECONDS, pods)
        fleet = stack.enter_context(
            Drivers(
                site.targets if options.transport == "websocket" else site.mqtt_targets,
                made.connections,
                made.drivers,
                site.folder,
                [f"--keep-alive={options.keep_alive}"],
                journals=True,
            )
        )
        system = _System(site, fleet, loadgen, pods, cassandra, observed)
        try:
            system.connect(options.connect_rate)
            for number, rate in enumerate(options.rates):
                if number:
                    system.drain(options.drain_limit)
                system.publish(Step(rate, min(rate, options.fleet_rate)), options.minutes * 60)
                if observed.interrupted:
                    break
        except KeyboardInterrupt:
            observed.interrupted = True
        system.settle(options.drain_limit)
        system.read_back(name)


class _System:
    """The running system, and what is done with it."""

    def __init__(
        self,
        site: Site,
        fleet: Drivers,
        loadgen: measure.Loadgen,
        pods: measure.Pods,
        cassandra: Cassandra,
        observed: Observed,
    ) -> None:
        self._site = site
        self._fleet = fleet
        self._loadgen = loadgen
        self._pods = pods
        self._cassandra = cassandra
        self._observed = observed

    def connect(self, per_second: float) -> None:
        """Connect everybody, or as many as will."""
        wanted = self._observed.plan.connections
        say(f"connecting {wanted:,} devices through {len(self._site.ingresses)} HAProxies")
        self._fleet.phase("connect")
        self._fleet.connect(wanted, per_second)
        deadline = time.monotonic() + wanted / per_second * _RAMP_PATIENCE + _CONNECT_SECONDS
        while self._fleet.now("connected") < wanted:
            self._fleet.check()
            if time.monotonic() > deadline:
                say(f"only {self._fleet.now('connected'):,.0f} connected; going on with these")
                break
            time.sleep(0.2)

    def publish(self, step: Step, seconds: float) -> None:
        """Publish at a rate for a time, or until interrupted."""
        observed = self._observed
        observed.steps.append(step)
        rest = step.rate - step.fleet_rate
        say(
            f"{step.rate:,.0f} publishes/s for {seconds:,.0f} s: {rest:,.0f} by the load "
            f"generator, {step.fleet_rate:,.0f} by the persistent connections"
        )
        self._fleet.phase(f"at {step.rate:g}")
        before = self._published()
        self._fleet.publish(step.fleet_rate)
        # A rate of nothing would still be a rate: one a second is nothing beside the fleet's.
        self._loadgen.send(f"rate {max(rest, 1.0):g} 0 {seconds:g}")
        self._loadgen.wait("start", _CONNECT_SECONDS, self._pods)
        step.began = self._read()
        try:
            step.end = self._wait_end(step, seconds + _CONNECT_SECONDS)
        except KeyboardInterrupt:
            say("interrupted; what was published until now still counts, and is read back")
            observed.interrupted = True
            self._loadgen.interrupt()
            step.end = self._wait_end(step, _CONNECT_SECONDS)
        step.ended = self._read()
        self._fleet.publish(0)
        time.sleep(1.5)  # until the drivers have said how many it were
        step.durable_in_time = step.end["durable"]
        step.published = step.end["published"] + self._published() - before
        observed.connected = int(self._fleet.now("connected"))
        self._fleet.phase("after")

    def drain(self, limit_seconds: float) -> None:
        """Wait until all that was published is durable, or as long as it may take."""
        say("waiting until everything is durable, before the next rate")
        others = int(self._fleet.now("acknowledged"))
        self._loadgen.send(f"drain {limit_seconds:g} {others}")
        self._loadgen.wait("drained", limit_seconds + _CONNECT_SECONDS, self._pods)

    def settle(self, limit_seconds: float) -> None:
        """End the drivers, and wait until all that was published is durable."""
        observed = self._observed
        say("ending the drivers, then waiting until everything is durable")
        reports = self._fleet.stop()
        observed.merged = self._fleet.merged()
        observed.fleet_published = sum(one["published"] for one in reports)
        observed.fleet_acknowledged = sum(one["acknowledged"] for one in reports)
        observed.fleet_unanswered = sum(one["unanswered"] for one in reports)
        began = time.monotonic()
        self._loadgen.send(f"drain {limit_seconds:g} {observed.fleet_acknowledged}")
        drained = self._loadgen.wait("drained", limit_seconds + _CONNECT_SECONDS, self._pods)
        observed.drained_seconds = time.monotonic() - began
        observed.published = drained["published"]
        observed.durable = drained["durable"]
        observed.held = drained["held"]
        observed.reconnects = drained["connected"] - len(self._pods.processes)
        observed.again = drained["again"]
        observed.service_mb = self._pods.peak_bytes() / 1e6

    def read_back(self, keyspace: str) -> None:
        """Compare Cassandra with what was published."""
        observed = self._observed
        say("reading everything back")
        lacking = measure.missing(self._cassandra, keyspace, observed.published, _DEVICES)
        unacknowledged = observed.published + observed.fleet_acknowledged - observed.durable
        observed.missing = max(0, unacknowledged) + lacking
        with self._cassandra.session() as session:
            session.set_keyspace(keyspace)
            verdict = compare(session, self._fleet.journals, wait_seconds=_READ_BACK_SECONDS)
        observed.fleet_missing = sum(map(len, verdict.missing.values())) + len(verdict.wrong)

    def _published(self) -> int:
        return int(self._fleet.now("published"))

    def _wait_end(self, step: Step, limit_seconds: float) -> dict[str, Any]:
        def progress(event: dict[str, Any]) -> None:
            self._fleet.check()
            began = step.began
            if began is None:
                return
            now = self._read()
            sample = Sample(
                now.at - began.at,
                event["durable"],
                int(self._fleet.now("connected")),
                event["mean_ms"],
                event["p99_ms"],
                event["arrive_mean_ms"],
                event["arrive_p99_ms"],
                now,
            )
            earlier = step.samples[-1] if step.samples else None
            step.samples.append(sample)
            if earlier is not None:
                say(headline_report.brief(earlier, sample))

        return self._loadgen.wait("end", limit_seconds, self._pods, progress)

    def _read(self) -> Reading:
        return reading(
            {
                **self._site.pids,
                "driver": self._fleet.pids,
                "load generator": (self._loadgen.pid,),
                "service": self._pods.pids,
                "Cassandra": (self._cassandra.pid,),
            }
        )


if __name__ == "__main__":
    sys.exit(main())
