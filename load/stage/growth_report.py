"""What the points of a growth run say: tables, curves, and extrapolations that are called so.

Lives here: `Result`, straight lines through points, the report as JSON, picture and page. Rules: a
line is fitted only through three points or more, and its fit stands beside it; what lies beyond the
last point is dashed and labelled. Must not come in: how a point is measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench import report as bench_report
from load.stage.paper import Line, Panel, Table, number
from load.stage.results import Results, leave

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["Fit", "Result", "brief", "extrapolations", "fit", "tables", "write"]

_LEAST_POINTS = 3
_MAX_OTHERS_SHARE = 0.1
_LATE_MS = 50.0

TITLES = {
    "devices": "Distinct devices",
    "leaves": "Leaves an update",
    "payload": "Bytes of a document",
    "pods": "Pods on the same two cores",
    "backlog": "Updates queued while the service was away",
    "nodes": "Cassandra nodes on the same two cores",
}
_LOG = frozenset({"devices", "payload", "leaves", "backlog"})
_BEYOND = {"leaves": (500,), "payload": (65_536,), "backlog": (10_000_000,)}
"""Values to extrapolate to: axes on which a straight line makes sense."""


@dataclass(frozen=True, slots=True)
class Result:
    """One point; CPU in µs an update, at saturation; latency at half of that rate.

    The last five are of the axis `backlog` alone, which has no latency.
    """

    axis: str
    value: int
    note: str
    updates_per_second: float
    cpu_us: float
    cassandra_cpu_us: float
    broker_cpu_us: float
    loadgen_cpu_us: float
    others_share: float
    rss_mb: float
    updates: int
    devices: int
    """That were written to at all."""
    half_per_second: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    late_p99_ms: float | None = None
    broker_mb: float | None = None
    injected_per_second: float | None = None
    seconds: float | None = None
    """From the first durable to the last."""
    held: int | None = None
    """Most that the service had unacknowledged."""


@dataclass(frozen=True, slots=True)
class Fit:
    """`base + slope * value`, by least squares, and the share of the variance that it explains."""

    base: float
    slope: float
    explained: float

    def at(self, value: float) -> float:
        """Return what the line has at `value`."""
        return self.base + self.slope * value


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Put a straight line through (value, figure); None for too few points or equal values."""
    if len(points) < _LEAST_POINTS:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    line = Fit(mean_y - slope * mean_x, slope, 0.0)
    total = sum((y - mean_y) ** 2 for _, y in points)
    rest = sum((y - line.at(x)) ** 2 for x, y in points)
    return Fit(line.base, line.slope, 1 - rest / total if total else 1.0)


_FIGURES: dict[str, tuple[str, str]] = {
    "leaves": ("cpu_us", "CPU of the service, µs an update"),
    "payload": ("cpu_us", "CPU of the service, µs an update"),
    "backlog": ("broker_mb", "memory of the broker, MB"),
}


def extrapolations(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return what straight lines say beyond the last point, for the axes where they make sense."""
    found = []
    for axis, (name, what) in _FIGURES.items():
        points = [
            (float(one.value), float(getattr(one, name)))
            for one in results
            if one.axis == axis and getattr(one, name) is not None
        ]
        line = fit(points)
        if line is None:
            continue
        found.append(
            {
                "axis": axis,
                "figure": name,
                "what": what,
                "points": len(points),
                "base": line.base,
                "slope": line.slope,
                "explained": line.explained,
                "extrapolated": {str(value): line.at(value) for value in _BEYOND[axis]},
            }
        )
    return found


def brief(result: Result) -> str:
    """Return one line for progress."""
    parts = [
        f"{number(result.updates_per_second)} updates/s",
        f"{number(result.cpu_us)} µs of CPU an update",
        f"{number(result.rss_mb)} MB",
    ]
    if result.p99_ms is not None:
        parts.append(f"p99 {number(result.p99_ms)} ms at {number(result.half_per_second)}/s")
    if result.seconds is not None:
        parts.append(f"drained in {number(result.seconds)} s")
    return ", ".join(parts)


def tables(results: Sequence[Result]) -> list[Table]:
    """Return a table for each axis that was run, and one of the extrapolations."""
    found = [_table(axis, results) for axis in TITLES if any(one.axis == axis for one in results)]
    rows = tuple(
        (
            TITLES[one["axis"]].lower(),
            one["what"],
            f"{number(one['base'])} + {number(one['slope'])} x value",
            f"{one['explained']:.3f} ({one['points']})",
            "; ".join(
                f"at {int(value):,}: {number(figure)}"
                for value, figure in one["extrapolated"].items()
            ),
        )
        for one in extrapolations(results)
    )
    if rows:
        headings = ("axis", "figure", "straight line", "R² (points)", "extrapolated, not measured")
        found.append(Table("Straight lines and extrapolations", headings, rows))
    return found


def _table(axis: str, results: Sequence[Result]) -> Table:
    mine = [one for one in results if one.axis == axis]
    backlog = axis == "backlog"
    headings = [
        "value", "updates/s", "service µs", "Cassandra µs", "broker µs", "load µs", "service MB",
    ]  # fmt: skip
    if backlog:
        headings += ["broker MB", "filled at /s", "drained in s", "unacknowledged"]
    else:
        headings += ["devices written to", "at /s", "p50 ms", "p99 ms", "load late p99 ms"]
    rows = []
    for one in mine:
        row = [
            f"{one.value:,}{f' ({one.note})' if one.note else ''}",
            number(one.updates_per_second),
            number(one.cpu_us),
            number(one.cassandra_cpu_us),
            number(one.broker_cpu_us),
            number(one.loadgen_cpu_us),
            number(one.rss_mb),
        ]
        if backlog:
            row += [
                number(one.broker_mb),
                number(one.injected_per_second),
                number(one.seconds),
                number(one.held),
            ]
        else:
            row += [
                number(one.devices),
                number(one.half_per_second),
                number(one.p50_ms),
                number(one.p99_ms),
                number(one.late_p99_ms),
            ]
        rows.append(tuple(row))
    return Table(TITLES[axis], tuple(headings), tuple(rows))


def panels(results: Sequence[Result]) -> list[Panel]:
    """Return the curves: CPU and latency, or memory, of each axis."""
    found = []
    for axis, title in TITLES.items():
        mine = [one for one in results if one.axis == axis]
        if not mine:
            continue
        xs = [float(one.value) for one in mine]
        lines = [
            Line("service", xs, [one.cpu_us for one in mine]),
            Line("Cassandra", xs, [one.cassandra_cpu_us for one in mine]),
            Line("broker", xs, [one.broker_cpu_us for one in mine]),
            Line("load generator", xs, [one.loadgen_cpu_us for one in mine]),
        ]
        lines += _beyond(axis, "cpu_us", results)
        shape: dict[str, Any] = {"log_x": axis in _LOG, "dots": True}
        found.append(
            Panel(
                f"{title}: CPU", title.lower(), "µs an update", tuple(lines),
                log_y=axis in ("leaves", "payload"), **shape,
            )
        )  # fmt: skip
        second = [Line("service", xs, [one.rss_mb for one in mine])]
        label, what = "MB", "memory"
        if axis == "backlog":
            second.append(Line("broker", xs, [one.broker_mb or 0.0 for one in mine]))
            second += _beyond(axis, "broker_mb", results)
        else:
            second += [
                Line("p50, ms", xs, [one.p50_ms or 0.0 for one in mine]),
                Line("p99, ms", xs, [one.p99_ms or 0.0 for one in mine]),
            ]
            label, what = "MB, or ms at half the load", "memory and latency"
        found.append(
            Panel(f"{title}: {what}", title.lower(), label, tuple(second), log_y=True, **shape)
        )
    return found


def _beyond(axis: str, figure: str, results: Sequence[Result]) -> list[Line]:
    lines = []
    for one in extrapolations(results):
        if one["axis"] == axis and one["figure"] == figure:
            last = max(each.value for each in results if each.axis == axis)
            line = Fit(one["base"], one["slope"], one["explained"])
            xs = [float(last), *(float(value) for value in one["extrapolated"])]
            lines.append(Line("extrapolated", xs, [line.at(x) for x in xs], dashed=True))
    return lines


def warnings(results: Sequence[Result], failed: Sequence[str], *, interrupted: bool) -> list[str]:
    """Return what a reader has to know before the figures."""
    found = []
    if interrupted:
        found.append("Interrupted: only what was measured until then.")
    found += [f"Failed: {one.splitlines()[0]}" for one in failed]
    busy = max((one.others_share for one in results), default=0.0)
    if busy > _MAX_OTHERS_SHARE:
        found.append(
            f"Not a quiet machine: other processes used up to {busy:.0%} of all cores. Throughput "
            "and latency are worse than they could be."
        )
    late = max((one.late_p99_ms or 0.0 for one in results), default=0.0)
    if late > _LATE_MS:
        found.append(
            f"The load generator was up to {late:.0f} ms late (p99): at such points the rig was "
            "the bottleneck, and latency contains its lateness."
        )
    return found


def write(
    options: argparse.Namespace, results: Sequence[Result], failed: Sequence[str], *,
    interrupted: bool,
) -> None:  # fmt: skip
    """Print the tables, and write JSON, picture and page."""
    told = warnings(results, failed, interrupted=interrupted)
    leave(
        options,
        Results(
            name="growth",
            title="How the service grows",
            caption="Curves",
            note="CPU is µs an update at saturation; latency is publish to durable, at half of it.",
            warnings=told,
            tables=tables(results),
            panels=panels(results),
            document={
                "machine": bench_report.machine(),
                "interrupted": interrupted,
                "warnings": told,
                "failed": list(failed),
                "results": [asdict(one) for one in results],
                "extrapolations": extrapolations(results),
            },
        ),
    )
