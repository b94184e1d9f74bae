"""What a benchmark shows: medians and spreads of its runs as a table, as JSON and as a picture.

Rules: every figure of a service is the median over the rounds, and its spread is half the distance
between the least and the greatest, so that nobody takes noise for a result. Ratios compare medians
of the same benchmark, never figures of two machines or days.
"""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from bench.measure import Phase, Run
from bench.services import REFERENCE

TITLES = {
    "saturation": "At saturation",
    "rate": "At a fixed rate",
}
# The kernel's own work and this program are always there.
_MAX_OTHERS_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Figure:
    """Median, least and greatest of the same thing over the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Make the figure of what the rounds showed."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return _number(self.median)

    @property
    def spread(self) -> str:
        """Half the distance from least to greatest, in percent of the median."""
        if not self.median or self.least == self.greatest:
            return ""
        return f"±{(self.greatest - self.least) / 2 / self.median:.0%}"


Summary = Mapping[str, Mapping[str, Mapping[str, Figure]]]
"""Service → phase (or "process") → name of the figure → figure."""


def summarize(runs: Iterable[Run]) -> Summary:
    by_service: dict[str, list[Run]] = {}
    for run in runs:
        by_service.setdefault(run.service, []).append(run)
    summary: dict[str, dict[str, dict[str, Figure]]] = {}
    for service, mine in by_service.items():
        phases = {
            phase: {
                field.name: Figure.of([getattr(run.phases[phase], field.name) for run in mine])
                for field in fields(Phase)
            }
            for phase in mine[0].phases
        }
        process = {"rss_mb": Figure.of([run.rss_mb for run in mine])}
        summary[service] = {**phases, "process": process}
    return summary


def table(summary: Summary) -> str:
    """Return what a person reads at the end of a benchmark."""
    parts = []
    for phase, title in TITLES.items():
        measured = {name: of for name, of in summary.items() if phase in of}
        if not measured:
            continue
        reference = measured[REFERENCE][phase] if REFERENCE in measured else {}
        rows = [_HEADINGS]
        for name, of in measured.items():
            figures = of[phase]
            rate, cpu = figures["updates_per_second"], figures["cpu_us"]
            rows.append(
                (
                    name,
                    str(rate),
                    rate.spread,
                    _ratio(rate, reference.get("updates_per_second")),
                    str(cpu),
                    cpu.spread,
                    _ratio(cpu, reference.get("cpu_us")),
                    str(figures["cassandra_cpu_us"]),
                    str(figures["broker_cpu_us"]),
                    str(figures["loadgen_cpu_us"]),
                    str(figures["p50_ms"]),
                    str(figures["p99_ms"]),
                    str(figures["p999_ms"]),
                    str(of["process"]["rss_mb"]),
                )
            )
        parts.append(f"{title}\n{_align(rows)}")
    worst = max(
        (
            figures["others_share"].greatest
            for of in summary.values()
            for name, figures in of.items()
            if name != "process"
        ),
        default=0.0,
    )
    if worst > _MAX_OTHERS_SHARE:
        parts.append(
            f"NOT A QUIET MACHINE: other processes used up to {worst:.0%} of all cores; "
            "throughput and latency are worse than they could be, and CPU an update is higher."
        )
    notes = f"ratio: to {REFERENCE}; CPU is µs an update; latency is publish to durable."
    return "\n\n".join([*parts, notes])


_HEADINGS = (
    "service", "updates/s", "", "ratio", "CPU", "", "ratio", "Cassandra", "broker", "load",
    "p50 ms", "p99 ms", "p99.9 ms", "RSS MB",
)  # fmt: skip


def goals(summary: Summary) -> str:
    """Return which of the project's goals this benchmark reached; empty without shadowsvc."""
    try:
        ours, single, batch = (summary[name] for name in ("shadowsvc", REFERENCE, "go-batch"))
        ours_sat, single_sat, batch_sat = (of["saturation"] for of in (ours, single, batch))
    except KeyError:
        return ""
    cpu = ours_sat["cpu_us"].median
    speed = ours_sat["updates_per_second"].median
    lines = [
        _goal("CPU an update, of go-single's", cpu / single_sat["cpu_us"].median, "≤", 0.5, 1 / 3),
        _goal("CPU an update, of go-batch's", cpu / batch_sat["cpu_us"].median, "<", 1.0, None),
        _goal("CPU an update, µs", cpu, "≤", None, 10.0),
        _goal(
            "updates/s, of go-single's",
            speed / single_sat["updates_per_second"].median, "≥", 1.8, 2.5,
        ),
        _goal("RSS, MB", ours["process"]["rss_mb"].median, "<", 150.0, None),
    ]  # fmt: skip
    if "rate" in ours:
        lines.append(_goal("p99 at the fixed rate, ms", ours["rate"]["p99_ms"].median, "<", 69, 20))
    return "\n".join(["Goals", *lines])


def _goal(what: str, value: float, sign: str, must: float | None, aim: float | None) -> str:
    reached: Callable[[float], bool] = (
        (lambda limit: value >= limit) if sign == "≥" else (lambda limit: value <= limit)
    )
    words = [
        f"{word} {sign} {_number(limit)}: {'yes' if reached(limit) else 'NO'}"
        for word, limit in (("must", must), ("aim", aim))
        if limit is not None
    ]
    return f"  {what:32} {_number(value):>8}   {'   '.join(words)}"


def write_json(path: Path, runs: Sequence[Run], options: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine(),
        "options": options,
        "summary": {
            service: {
                phase: {name: asdict(figure) for name, figure in figures.items()}
                for phase, figures in of.items()
            }
            for service, of in summarize(runs).items()
        },
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Return what figures depend on: processor, kernel and programs."""
    info = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "go": _first_line("go", "version"),
        "mosquitto": _first_line("mosquitto", "-h"),
    }


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return ""
    return (done.stdout or done.stderr).partition("\n")[0]


def plot(path: Path, summary: Summary, title: str) -> None:
    """Draw the medians with bars from the least to the greatest.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl  # noqa: PLC0415 - slow, and only needed here

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    panels: list[tuple[str, str, tuple[str, ...], bool]] = [
        ("updates/s at saturation", "saturation", ("updates_per_second",), False),
        (
            "CPU µs an update at saturation", "saturation",
            ("cpu_us", "cassandra_cpu_us", "broker_cpu_us"), False,
        ),
        (
            "publish to durable at the fixed rate, ms", "rate",
            ("p50_ms", "p99_ms", "p999_ms"), True,
        ),
        ("peak memory (RSS), MB", "process", ("rss_mb",), False),
    ]  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    for axis, (heading, phase, names, is_log) in zip(axes.flat, panels, strict=True):
        services = [name for name, of in summary.items() if phase in of]
        axis.set_title(heading, fontsize=11)
        axis.set_xticks(range(len(services)), services)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        if is_log:
            axis.set_yscale("log")
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            shown = [summary[service][phase][name] for service in services]
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(shown))]
            bars = axis.bar(
                places,
                [one.median for one in shown],
                width * 0.92,
                yerr=[
                    [one.median - one.least for one in shown],
                    [one.greatest - one.median for one in shown],
                ],
                capsize=2,
                label=_LABELS[name],
            )
            axis.bar_label(bars, [str(one) for one in shown], fontsize=7, padding=2)
        if len(names) > 1:
            axis.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


_LABELS = {
    "updates_per_second": "updates/s",
    "cpu_us": "service",
    "cassandra_cpu_us": "Cassandra",
    "broker_cpu_us": "broker",
    "p50_ms": "p50",
    "p99_ms": "p99",
    "p999_ms": "p99.9",
    "rss_mb": "RSS",
}


def _number(value: float) -> str:
    if value >= 100:  # noqa: PLR2004 - three digits are enough to read
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"  # noqa: PLR2004 - likewise


def _ratio(one: Figure, reference: Figure | None) -> str:
    if reference is None or not reference.median:
        return ""
    return f"{one.median / reference.median:.2f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
