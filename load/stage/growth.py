"""How the service grows: one axis after another, everything else held still.

Lives here: the axes, their points, how a backlog is measured, and the order of the run;
`scripts/growth` starts it. Rules: a point is one run of `bench.measure` (a fresh broker and
keyspace, everything read back), so that its figures mean what the benchmark's mean; latency is
taken at half of what the point itself carried, since a rate that one point bears another does not;
a point that fails is told and the next one is run; an interrupt reports what there is. Must not
come in: how figures become tables and curves (`growth_report`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backing import RAISED_THRESHOLDS, BackingError, Cassandra, CassandraCluster, Mosquitto
from bench import measure
from bench.measure import BenchError, Load
from bench.services import SERVICES, Place
from load.stage import growth_report
from load.stage.console import command_line, interruptible, say
from load.stage.growth_report import Result
from load.stage.results import OUT, add_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_SERVICE = SERVICES["shadowsvc"]
_WARM_SECONDS = 3.0
_FILL_PER_SECOND = 8_000
_RATE_SHARE = 0.5
_CONNECT_SECONDS = 60.0
_INJECT_SECONDS = 650.0
_BACKLOG_SECONDS = 590.0
_OTHER_BYTES = 110
"""Of a document beside its text, about."""
_NODE_HEAP = "1G"


@dataclass(frozen=True, slots=True)
class Point:
    """One value of an axis, and what is run for it."""

    axis: str
    value: int
    load: Load
    note: str = ""
    nodes: int = 1
    backlog: int = 0


@dataclass(frozen=True, slots=True)
class Axis:
    """What grows; `quick` are the values of a run that only shows that it works."""

    what: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    points: Callable[[Load, int, argparse.Namespace], Iterator[Point]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the axes that were asked for; return the exit code."""
    options = _options(arguments)
    interruptible()
    results: list[Result] = []
    failed: list[str] = []
    interrupted = False
    try:
        _run(options, results, failed)
    except KeyboardInterrupt:
        say("interrupted; what was measured so far:")
        interrupted = True
    except (BenchError, BackingError) as error:
        failed.append(str(error))
        say(f"failed: {error}")
    growth_report.write(options, results, failed, interrupted=interrupted)
    return 130 if interrupted else 1 if failed or not results else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/growth",
        description="How CPU, memory and latency of the service grow with devices, leaves of an "
        "update, bytes of a payload, pods, backlog and Cassandra nodes. All of it takes about "
        "half an hour.",
    )
    add = parser.add_argument
    add("--only", metavar="AXIS,AXIS", type=lambda text: text.split(","), default=list(AXES),
        help=f"which, of {', '.join(AXES)} (default: all)")  # fmt: skip
    add("--values", metavar="N,N", type=lambda text: [int(one) for one in text.split(",")],
        help="other values, for one axis")  # fmt: skip
    add("--quick", action="store_true", help="few short points: to see that it works")
    add("--seconds", type=float, default=10.0,
        help="length of each of a point's two windows (default: %(default)s)")  # fmt: skip
    add("--warm-up", type=float, default=20.0,
        help="seconds of saturation before the first point, for the sake of Cassandra's compiler "
        "(default: %(default)s)")  # fmt: skip
    add("--fill-limit", type=int, default=1_000_000,
        help="on the axis of devices: as many are written once before the measurement, at most "
        "(default: %(default)s)")  # fmt: skip
    add("--heap", default="2G", help="heap of a single Cassandra node (default: %(default)s)")
    add_options(parser, "growth")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name not in AXES]
    if unknown:
        parser.error(f"unknown axis {', '.join(unknown)}: there are {', '.join(AXES)}")
    if options.values and len(options.only) != 1:
        parser.error("--values belongs to one axis: name it by --only")
    if options.quick:
        options.seconds, options.warm_up = 3.0, 5.0
        options.fill_limit = 10_000
    options.command = command_line("scripts/growth")
    options.logs = OUT / "growth" / "logs"
    options.logs.mkdir(parents=True, exist_ok=True)
    return options


def _run(options: argparse.Namespace, results: list[Result], failed: list[str]) -> None:
    base = base_load(options)
    points = [
        point
        for name in options.only
        for value in _values(name, options)
        for point in AXES[name].points(base, value, options)
    ]
    one_node = [point for point in points if point.nodes == 1]
    more_nodes = [point for point in points if point.nodes > 1]
    done = 0
    for group in (one_node, more_nodes):
        if not group:
            continue
        with _database(group[0].nodes, options) as database:
            if options.warm_up > 0:
                say(f"warming up Cassandra ({group[0].nodes} of it)")
                warm = replace(base, saturate_seconds=options.warm_up, rate_seconds=0)
                measure.run(_SERVICE, 0, warm, database, options.logs)
            for point in group:
                done += 1
                head = f"{done} of {len(points)}: {point.axis} {point.value:,} {point.note}".strip()
                try:
                    result = _measure(point, done, database, options.logs)
                except (BenchError, BackingError) as error:
                    say(f"{head}: failed: {error}")
                    failed.append(f"{point.axis} {point.value:,} {point.note}: {error}")
                    continue
                results.append(result)
                say(f"{head}: {growth_report.brief(result)}")


def base_load(options: argparse.Namespace) -> Load:
    """Return what every point does but for its own axis."""
    return Load(
        saturate_warm_seconds=_WARM_SECONDS,
        saturate_seconds=options.seconds,
        rate=0,
        rate_share=_RATE_SHARE,
        rate_warm_seconds=2,
        rate_seconds=options.seconds,
        window=1000,
        connections=8,
    )


def _values(name: str, options: argparse.Namespace) -> tuple[int, ...]:
    if options.values:
        return tuple(options.values)
    return AXES[name].quick if options.quick else AXES[name].values


@contextlib.contextmanager
def _database(nodes: int, options: argparse.Namespace) -> Iterator[measure.Database]:
    say(f"starting Cassandra, {nodes} of it")
    if nodes == 1:
        with Cassandra(heap=options.heap, settings=RAISED_THRESHOLDS) as one:
            yield one
    else:
        with CassandraCluster(nodes, heap=_NODE_HEAP) as cluster:
            yield cluster


def _measure(point: Point, number: int, database: measure.Database, logs: Path) -> Result:
    if point.backlog:
        return _backlog(point, number, database, logs)
    done = measure.run(_SERVICE, number, point.load, database, logs)
    full, half = done.phases["saturation"], done.phases["rate"]
    return Result(
        axis=point.axis,
        value=point.value,
        note=point.note,
        updates_per_second=full.updates_per_second,
        cpu_us=full.cpu_us,
        cassandra_cpu_us=full.cassandra_cpu_us,
        broker_cpu_us=full.broker_cpu_us,
        loadgen_cpu_us=full.loadgen_cpu_us,
        others_share=max(full.others_share, half.others_share),
        rss_mb=done.rss_mb,
        updates=done.published,
        devices=min(done.published, point.load.devices),
        half_per_second=half.updates_per_second,
        p50_ms=half.p50_ms,
        p99_ms=half.p99_ms,
        late_p99_ms=half.late_p99_ms,
    )


def _backlog(point: Point, number: int, database: measure.Database, logs: Path) -> Result:
    """Fill the broker's queue of a service that is away, then let it come back.

    The service subscribes, ends keeping its session, and comes back when all is queued. Measured
    is from the first update that becomes durable to the last.
    """
    name = f"bench_{os.getpid()}_backlog_{number}"
    log = logs / f"backlog-{number}.log"
    log.unlink(missing_ok=True)
    address = f"{database.contact_points[0]}:{database.port}"
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Mosquitto())
        loadgen = stack.enter_context(measure.Loadgen(_SERVICE, broker, address, point.load, log))
        place = Place(loadgen.mqtt, address, database.dc, name, name)
        stack.enter_context(measure.table(database, place, log))
        pods = stack.enter_context(measure.started(_SERVICE, place, log))
        loadgen.wait("subscribed", _CONNECT_SECONDS, pods)
        time.sleep(1)
        pods.stop()
        loadgen.send(f"inject {point.backlog}")
        injected = loadgen.wait("injected", _INJECT_SECONDS)
        broker_mb = measure.peak_bytes(broker.pid) / 1e6
        pods.start()
        processes = {
            "cpu_us": pods,
            "cassandra_cpu_us": database,
            "broker_cpu_us": broker,
            "loadgen_cpu_us": loadgen,
        }
        drained = measure.phase(loadgen, f"watch {_BACKLOG_SECONDS:g}", processes)
        counted = loadgen.drain(pods)
        rss_mb = pods.peak_bytes() / 1e6
        lacking = measure.missing(database, name, counted["published"], point.load.devices)
        if lacking:
            raise BenchError(f"{lacking} devices lack their last update; see {log}")
        return Result(
            axis=point.axis,
            value=point.value,
            note=point.note,
            updates_per_second=drained.updates_per_second,
            cpu_us=drained.cpu_us,
            cassandra_cpu_us=drained.cassandra_cpu_us,
            broker_cpu_us=drained.broker_cpu_us,
            loadgen_cpu_us=drained.loadgen_cpu_us,
            others_share=drained.others_share,
            rss_mb=rss_mb,
            updates=counted["published"],
            devices=min(counted["published"], point.load.devices),
            broker_mb=broker_mb,
            injected_per_second=injected["published"] / injected["seconds"],
            seconds=point.backlog / drained.updates_per_second,
            held=counted["held"],
        )


# ------------------------------------------------------------------ axes


def _devices(base: Load, value: int, options: argparse.Namespace) -> Iterator[Point]:
    fill = min(value, options.fill_limit)
    warm = max(base.saturate_warm_seconds, fill / _FILL_PER_SECOND)
    load = replace(base, devices=value, saturate_warm_seconds=warm)
    yield Point("devices", value, load, "" if fill == value else "not all written to")


def _leaves(base: Load, value: int, _: argparse.Namespace) -> Iterator[Point]:
    yield Point("leaves", value, replace(base, leaves=value))


def _payload(base: Load, value: int, _: argparse.Namespace) -> Iterator[Point]:
    text = max(0, value - _OTHER_BYTES)
    yield Point("payload", value, replace(base, text_bytes=text))


def _pods(base: Load, value: int, _: argparse.Namespace) -> Iterator[Point]:
    yield Point("pods", value, replace(base, pods=value))


def _backlogs(base: Load, value: int, _: argparse.Namespace) -> Iterator[Point]:
    yield Point("backlog", value, base, backlog=value)


def _nodes(base: Load, value: int, _: argparse.Namespace) -> Iterator[Point]:
    for copies in sorted({1, min(3, value)}):
        note = f"{copies} cop{'y' if copies == 1 else 'ies'}"
        yield Point("nodes", value, replace(base, replication=str(copies)), note, nodes=value)


AXES: dict[str, Axis] = {
    "devices": Axis(
        "distinct devices",
        (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
        (1_000, 100_000),
        _devices,
    ),
    "leaves": Axis("leaves an update", (1, 2, 4, 10, 30, 100, 200), (1, 4, 30), _leaves),
    "payload": Axis("bytes of a document", (110, 512, 1024, 4096, 16_384), (110, 4096), _payload),
    "pods": Axis("pods of the service", (1, 2, 3, 4), (1, 2), _pods),
    "backlog": Axis(
        "updates queued at the broker", (300_000, 1_000_000, 3_000_000), (30_000,), _backlogs
    ),
    "nodes": Axis("Cassandra nodes", (1, 3), (1, 3), _nodes),
}
"""By name, in the order in which they are run; those of one Cassandra node first."""


if __name__ == "__main__":
    sys.exit(main())
