"""A lean run's report as one HTML page with plots.

Lives here: `page`. Rules: the page needs no other file, no script and no library: plots are SVG;
what is told on the terminal stands on the page in the same words. Must not come in: what figures
mean.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Final

from load.lean_view import summary, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from load.report import Progress, Report

__all__ = ["page"]

_WIDTH: Final = 860
_HEIGHT: Final = 170
_LEFT: Final = 70
_BELOW: Final = 24
_COLOURS: Final = ("#1f6feb", "#d1570b", "#2da44e")
_STYLE: Final = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 66em; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
th, td { border-bottom: 1px solid #ccc; padding: .25em .6em; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { display: block; margin: .5em 0 1.5em } svg text { font: 12px system-ui, sans-serif }
.told { white-space: pre-wrap }
"""

_Value = tuple[str, "Callable[[Progress], float | None]"]
_PLOTS: Final[tuple[tuple[str, tuple[_Value, ...]], ...]] = (
    (
        "connections",
        (("up", lambda one: one.connected), ("wanted", lambda one: one.wanted)),
    ),
    (
        "connects a second",
        (
            ("made", lambda one: one.connected_per_second),
            ("allowed", lambda one: one.connect_rate),
        ),
    ),
    ("publishes a second", (("published", lambda one: one.published_per_second),)),
    (
        "latency, ms",
        (
            ("PUBACK p50", lambda one: _ms(one.puback_p50_seconds)),
            ("PUBACK p99", lambda one: _ms(one.puback_p99_seconds)),
            ("subscriber p99", lambda one: _ms(one.to_subscriber_p99_seconds)),
        ),
    ),
    ("the rig's CPU, % of a core", (("CPU", lambda one: 100 * one.cpu_share),)),
    ("the rig's timers late, ms", (("p99", lambda one: _ms(one.lateness_p99_seconds)),)),
)


def page(report: Report, command: str) -> str:
    """Return the page; `command` is what was run."""
    columns, rows = table(report)
    parts = ["<h1>Load</h1>", f"<pre>{html.escape(command)}</pre>"]
    parts += [f'<p class="told">{html.escape(text)}</p>' for text, _ in summary(report)]
    parts.append(f"<table><tr>{_cells('th', columns)}</tr>")
    parts += [f"<tr>{_cells('td', row)}</tr>" for row in rows]
    parts.append("</table>")
    for title, values in _PLOTS:
        parts.append(f"<h2>{html.escape(title)}</h2>{_plot(report.samples, values)}")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Load</title>'
        f"<style>\n{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _cells(kind: str, texts: Sequence[str]) -> str:
    return "".join(f"<{kind}>{html.escape(text)}</{kind}>" for text in texts)


def _plot(samples: Sequence[Progress], values: Sequence[_Value]) -> str:
    lines = [
        (name, [(one.seconds, value) for one in samples if (value := read(one)) is not None])
        for name, read in values
    ]
    points = [point for _, line in lines for point in line]
    if not points:
        return "<p>nothing to show</p>"
    last = max(at for at, _ in points) or 1.0
    most = max(value for _, value in points) or 1.0
    bottom = _HEIGHT - _BELOW

    def place(at: float, value: float) -> str:
        x = _LEFT + at / last * (_WIDTH - _LEFT - 10)
        return f"{x:.1f},{bottom - value / most * (bottom - 10):.1f}"

    drawn = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img">',
        f'<path d="M{_LEFT},10V{bottom}H{_WIDTH - 10}" fill="none" stroke="#888"/>',
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{most:,.6g}</text>',
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">0</text>',
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 6}" text-anchor="end">{last:,.0f} s</text>',
    ]
    for index, (name, line) in enumerate(lines):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(place(*point) for point in line)
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        x = _LEFT + 10 + 150 * index
        drawn.append(f'<text x="{x}" y="{_HEIGHT - 6}" fill="{colour}">{html.escape(name)}</text>')
    return "".join([*drawn, "</svg>"])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
