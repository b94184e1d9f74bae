"""A lean run in words: a moment, a table of phases, and what the table does not show.

Lives here: `line`, `table`, `summary`. Rules: text and the colour it deserves, for a terminal, a
pipe and a page alike. Must not come in: consoles, HTML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from load.console import milliseconds
from load.report import MAX_CPU_SHARE

if TYPE_CHECKING:
    from load.histogram import Histogram
    from load.report import Progress, Report

__all__ = ["COLUMNS", "line", "summary", "table"]

COLUMNS: Final = (
    "phase", "s", "connected", "failed", "lost", "published", "/s", "acked", "connect p50/p99",
    "PUBACK p50/p99", "subscriber p50/p99", "rig CPU", "timers p99",
)  # fmt: skip
_SHOWN: Final = 8
Coloured = tuple[str, str]
"""Text, and the colour that it deserves: empty for none."""


def line(now: Progress) -> list[Coloured]:
    """Return a moment, in pieces."""
    whole = now.connected == now.wanted
    pieces: list[Coloured] = [
        (f"{now.seconds:6.0f} s {now.phase:<8}", ""),
        (f" {now.connected:,} of {now.wanted:,} up", "green" if whole else "yellow"),
    ]
    if now.connecting or now.waiting:
        pieces.append((f" ({now.connecting:,} connecting, {now.waiting:,} waiting)", ""))
    if now.failed or now.lost:
        pieces.append((f"  {now.failed:,} failed, {now.lost:,} lost", "red"))
    pieces.append((f"  {now.published_per_second:,.0f}/s, {now.published:,} published", ""))
    pieces.append((f"  PUBACK p99 {milliseconds(now.puback_p99_seconds)}", ""))
    if now.to_subscriber_p99_seconds is not None:
        pieces.append((f"  subscriber p99 {milliseconds(now.to_subscriber_p99_seconds)}", ""))
    if now.missing or now.skipped:
        pieces.append((f"  {now.missing:,} missing, {now.skipped:,} skipped", "red"))
    late = milliseconds(now.lateness_p99_seconds)
    busy = "red" if now.cpu_share > MAX_CPU_SHARE else ""
    pieces.append((f"  rig: CPU {now.cpu_share:.0%}, timers {late}", busy))
    return pieces


def table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows: the phases, and all of them."""
    rows: list[tuple[str, ...]] = []
    for one in [*report.phases, report.whole]:
        rate = one.published / one.seconds if one.seconds > 0 else 0.0
        rows.append(
            (
                one.name,
                f"{one.seconds:.1f}",
                f"{one.connected:,}",
                f"{one.failed.total():,}",
                f"{one.lost.total():,}",
                f"{one.published:,}",
                f"{rate:,.0f}",
                f"{one.acknowledged:,}",
                _pair(one.connect),
                _pair(one.puback),
                _pair(one.to_subscriber),
                f"{one.cpu_share:.0%}",
                milliseconds(one.lateness.quantile(0.99)),
            )
        )
    return COLUMNS, rows


def summary(report: Report) -> list[Coloured]:
    """Return what the table does not show."""
    whole = report.whole
    lines: list[Coloured] = []
    for what, counts in (("failed", whole.failed), ("lost", whole.lost)):
        if counts:
            told = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common(_SHOWN))
            lines.append((f"connections {what}: {told}", "red"))
    if report.missing:
        told = (
            f"{report.missing:,} MISSING: {whole.refused:,} refused, {whole.unrouted:,} taken "
            f"without a subscriber, {report.unanswered:,} without an answer"
        )
        lines.append((told, "bold red"))
    if report.unheard:
        lines.append((f"{report.unheard:,} not heard by the rig's subscriber", "bold red"))
    if whole.skipped:
        lines.append((f"{whole.skipped:,} skipped: no device had room for one more", "red"))
    if whole.sent_again:
        lines.append((f"{whole.sent_again:,} published again after a lost connection", ""))
    lines += [(f"THE RIG WAS THE BOTTLENECK: {text}", "bold red") for text in report.bottlenecks]
    lines.append((f"peak memory of the rig: {report.rss_bytes / 1e6:,.0f} MB", ""))
    if report.interrupted:
        lines.append(("stopped before its time", "yellow"))
    return lines


def _pair(histogram: Histogram) -> str:
    p50, p99 = (milliseconds(histogram.quantile(share)) for share in (0.5, 0.99))
    return f"{p50} / {p99}"
