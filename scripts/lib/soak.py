"""The soak: a steady rate for a long time, and whether anything grows.

Lives here: the order of events, the samples, the table and the JSON. Rules: everything is the real
thing, on this machine; what is sampled comes from /metrics alone; at the end every row is read back
and compared, as in the demo; Ctrl-C ends it with the figures so far. Must not come in: how a trend
is told from noise (`trend`), how rows are compared (`readback`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop
from readback import settle
from service import Figures, Service, ServiceError
from staging import carry_out, keyspace_mistakes, staged
from trend import Trend, trend_of

from shadowsvc.simulate import Difference, Expected, Options, Shape, Simulation, Summary

if TYPE_CHECKING:
    from shadowsvc.config import Settings

_SETTLE_SECONDS: Final = 120.0
_WARM_UP_SHARE: Final = 0.2
_MIN_WARM_UP_SECONDS: Final = 60.0
_SHOWN_DIFFERENCES: Final = 10
_MB: Final = 1e6
_ACK = "shadowsvc_receive_to_ack_seconds"
_DURABLE = "shadowsvc_device_to_durable_seconds"


@dataclass(frozen=True, slots=True)
class Sample:
    """What /metrics said at a moment; rates and latencies are those since the sample before."""

    seconds: float
    """Since the devices began."""
    rss_bytes: float
    open_fds: float
    loop_lag_seconds: float
    unacknowledged: float
    oldest_unacknowledged_seconds: float
    durable_rate: float
    """Updates a second."""
    cpu_share: float
    """Of one processor."""
    ack_p50_seconds: float | None
    ack_p99_seconds: float | None
    durable_p50_seconds: float | None
    durable_p99_seconds: float | None


# Name of a series in the summary: the field, and by how much of its middle value it may rise over
# the time that was measured before it is said to grow.
_SERIES: Final[dict[str, tuple[str, float]]] = {
    "memory": ("rss_bytes", 0.05),
    "open files": ("open_fds", 0.2),
    "ack p50": ("ack_p50_seconds", 0.5),
    "ack p99": ("ack_p99_seconds", 1.0),
    "durable p50": ("durable_p50_seconds", 0.5),
    "durable p99": ("durable_p99_seconds", 1.0),
    "CPU": ("cpu_share", 0.3),
}


def main() -> int:
    """Run the soak; return the exit code."""
    options = _arguments()
    interrupted = "interrupted before there was anything to tell"
    return carry_out("soak", partial(_soak, options), _say, interrupted)


def _soak(options: argparse.Namespace, folder: Path) -> bool:
    name = f"soak-{os.getpid()}-{int(time.time()) % 100_000}"
    with staged(name, options.keyspace, folder, _say) as run:
        _say(
            f"{options.minutes:g} minutes at {options.rate:g} updates/s, "
            f"a sample every {options.every:g} s"
        )
        expected = Expected()
        publishing = _publish(options, run.settings, run.service, expected, name)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            summary, samples = runner.run(publishing)
        found, bad = settle(run.session, expected, run.service.check, _SETTLE_SECONDS)
        report = _report(options, summary, samples, found, bad)
        _tell(report, found)
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
            print(f"written: {options.json}")
    return bool(report["ok"])


async def _publish(
    options: argparse.Namespace,
    settings: Settings,
    service: Service,
    expected: Expected,
    name: str,
) -> tuple[Summary, list[Sample]]:
    """Publish for the whole time and sample beside it."""
    simulation = Simulation(
        settings.mqtt,
        Options(
            devices=options.devices,
            rate=options.rate,
            seconds=options.minutes * 60,
            seed=options.seed,
            shape=Shape(bad_share=0.001),
            name_prefix=name,
            drain_seconds=20,
        ),
        expected,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, simulation.stop)
    samples: list[Sample] = []
    sampling = asyncio.create_task(_sample(options, service, samples))
    publishing = asyncio.create_task(simulation.run())
    try:
        await asyncio.wait([sampling, publishing], return_when=asyncio.FIRST_COMPLETED)
        if sampling.done():  # it never ends by itself: it has failed
            sampling.result()
        return await publishing, samples
    finally:
        for task in (sampling, publishing):
            task.cancel()
        await asyncio.gather(sampling, publishing, return_exceptions=True)


async def _sample(options: argparse.Namespace, service: Service, samples: list[Sample]) -> None:
    started = last_time = time.monotonic()
    last = await asyncio.to_thread(service.figures)
    if last is None:
        raise ServiceError(f"no answer from /metrics{service.log_tail()}")
    next_line = 0.0
    while True:
        await asyncio.sleep(options.every)
        await asyncio.to_thread(service.check)
        figures = await asyncio.to_thread(service.figures)
        if figures is None:
            print("no answer from /metrics", flush=True)
            continue
        now = time.monotonic()
        sample = _sample_of(figures, last, now - started, now - last_time)
        samples.append(sample)
        last, last_time = figures, now
        if sample.seconds >= next_line:
            next_line = sample.seconds + options.line_every
            print(_line(sample), flush=True)


def _sample_of(figures: Figures, last: Figures, seconds: float, span: float) -> Sample:
    def rate(name: str) -> float:
        return (figures.counters[name] - last.counters[name]) / span

    def gauge(name: str) -> float:
        return figures.gauges.get(name, 0.0)

    return Sample(
        seconds=round(seconds, 3),
        rss_bytes=gauge("process_resident_memory_bytes"),
        open_fds=gauge("process_open_fds"),
        loop_lag_seconds=gauge("shadowsvc_loop_lag_seconds"),
        unacknowledged=gauge("shadowsvc_unacknowledged_deliveries"),
        oldest_unacknowledged_seconds=gauge("shadowsvc_oldest_unacknowledged_seconds"),
        durable_rate=rate("shadowsvc_updates_durable"),
        cpu_share=rate("process_cpu_seconds"),
        ack_p50_seconds=figures.quantile(_ACK, 0.5, last),
        ack_p99_seconds=figures.quantile(_ACK, 0.99, last),
        durable_p50_seconds=figures.quantile(_DURABLE, 0.5, last),
        durable_p99_seconds=figures.quantile(_DURABLE, 0.99, last),
    )


# ------------------------------------------------------------------ what came of it


def _report(
    options: argparse.Namespace,
    summary: Summary,
    samples: list[Sample],
    found: list[Difference],
    bad: int,
) -> dict[str, Any]:
    end = samples[-1].seconds if samples else 0.0
    warm_up = min(end / 2, max(_MIN_WARM_UP_SECONDS, _WARM_UP_SHARE * end))
    kept = [sample for sample in samples if sample.seconds >= warm_up]
    series: dict[str, Any] = {}
    grows = []
    for name, (field, allowed) in _SERIES.items():
        points = [
            (sample.seconds, value)
            for sample in kept
            if (value := getattr(sample, field)) is not None
        ]
        trend = trend_of(points, allowed)
        if trend is None:
            continue
        series[name] = asdict(trend)
        if trend.grows:
            grows.append(name)
    for name in ("loop_lag_seconds", "oldest_unacknowledged_seconds", "unacknowledged"):
        values = [getattr(sample, name) for sample in kept]
        if values:
            series[name] = {"median": statistics.median(values), "highest": max(values)}
    complete = summary.complete and summary.acknowledged > 0
    return {
        "ok": not (found or bad or grows) and complete and bool(kept),
        "minutes": round(summary.seconds / 60, 2),
        "rate": options.rate,
        "devices": summary.devices,
        "published": summary.published,
        "acknowledged_by_the_broker": summary.acknowledged,
        "missing_or_wrong": len(found) + bad,
        "interrupted": summary.interrupted,
        "warm_up_seconds": round(warm_up, 1),
        "series": series,
        "grows": grows,
        "samples": [asdict(sample) for sample in samples],
    }


def _tell(report: dict[str, Any], found: list[Difference]) -> None:
    print(
        f"\n{report['minutes']:g} minutes at {report['rate']:g}/s, "
        f"{report['published']:,} updates; the first {report['warm_up_seconds']:g} s left out"
        + (" (interrupted)" if report["interrupted"] else "")
    )
    print(f"{'':<14}{'begin':>10}{'median':>10}{'highest':>10}{'end':>10}{'an hour':>11}")
    for name, (field, _) in _SERIES.items():
        if name in report["series"]:
            print(_row(name, field, Trend(**report["series"][name])))
    for name, what in (
        ("loop_lag_seconds", "loop lag"),
        ("oldest_unacknowledged_seconds", "oldest unacked"),
    ):
        if name in report["series"]:
            one = report["series"][name]
            median, highest = _shown(name, one["median"]), _shown(name, one["highest"])
            print(f"{what:<14}{'':>10}{median:>10}{highest:>10}")
    for difference in found[:_SHOWN_DIFFERENCES]:
        print(f"  {difference.kind}: {difference.device} {difference.leaf}: {difference.detail}")
    print(f"missing or wrong: {report['missing_or_wrong']:,}")
    print(f"grows: {', '.join(report['grows']) or 'nothing'}")


def _row(name: str, field: str, trend: Trend) -> str:
    cells = (trend.begin, trend.median, trend.highest, trend.end)
    sign = "+" if trend.per_hour >= 0 else "-"
    slope = sign + _shown(field, abs(trend.per_hour))
    shown = "".join(f"{_shown(field, cell):>10}" for cell in cells)
    return f"{name:<14}{shown}{slope:>11}{'  GROWS' if trend.grows else ''}"


def _shown(field: str, value: float) -> str:
    if field.endswith("bytes"):
        return f"{value / _MB:.1f} MB"
    if field.endswith("seconds"):
        return f"{value * 1000:.1f} ms"
    if field.endswith("share"):
        return f"{value:.1%}"
    return f"{value:.1f}"


def _line(sample: Sample) -> str:
    cells = [
        f"{sample.seconds:7.0f} s",
        f"{sample.durable_rate:,.0f}/s",
        f"{sample.rss_bytes / _MB:.1f} MB",
        f"{sample.open_fds:.0f} files",
        f"CPU {sample.cpu_share:.0%}",
        f"lag {sample.loop_lag_seconds * 1000:.1f} ms",
        f"oldest {sample.oldest_unacknowledged_seconds * 1000:.0f} ms",
    ]
    if sample.ack_p50_seconds is not None and sample.ack_p99_seconds is not None:
        p50, p99 = sample.ack_p50_seconds * 1000, sample.ack_p99_seconds * 1000
        cells.append(f"ack {p50:.1f} / {p99:.1f} ms")
    return "  ".join(cells)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description=(
            "Starts a broker, Cassandra and shadowsvc, publishes at a steady rate, samples "
            "/metrics, and tells whether memory, open files, latency or CPU grow. At the end every "
            "row is read back. Exit code 0: nothing grows, and nothing is missing or wrong."
        ),
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="how long devices publish (60)")
    add("--rate", type=float, default=1000, help="updates a second, of all (1000)")
    add("--devices", type=int, default=2000, help="how many (2000)")
    add("--seed", type=int, default=1, help="of all chance (1)")
    add("--every", type=float, default=5, help="seconds between samples (5)")
    add("--line-every", type=float, default=60, help="seconds between lines (60)")
    add("--json", type=Path, help="file for the samples and the summary")
    add("--keyspace", default="shadowsvc_soak", help="in Cassandra (shadowsvc_soak)")
    options = parser.parse_args()
    if min(options.minutes, options.rate, options.every) <= 0:
        parser.error("--minutes, --rate and --every must be above 0")
    if options.devices < 1:
        parser.error("--devices must be 1 or more")
    if mistakes := keyspace_mistakes(options.keyspace):
        parser.error("; ".join(mistakes))
    return options


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
