"""What the rig says of itself, for people: lines at the end and meanwhile, a part of the report.

Lives here: text and HTML from the figures of the rig's processes. Pure. Rules: the first line says
whether the rig was the bottleneck; what is not known is left out. Must not come in: Locust.
"""

from __future__ import annotations

import json
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any

from load.locust.watch import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["html_section", "lines", "progress", "with_section"]

Figures = dict[str, Any]


def totals(processes: Mapping[str, Figures]) -> Counter[str]:
    """Return the counts of all processes together."""
    sums: Counter[str] = Counter()
    for figures in processes.values():
        for name, value in figures.items():
            if isinstance(value, int) and name not in {"worker", "highest_descriptor"}:
                sums[name] += value
    return sums


def progress(processes: Mapping[str, Figures]) -> str:
    """Return one line about now."""
    sums = totals(processes)
    return (
        f"{sums['connected']} connected, {sums['connecting']} connecting, "
        f"{sums['connects_failed']} connects failed, {sums['dropped']} dropped, "
        f"{sums['published']} published, {sums['acknowledged']} acknowledged, "
        f"{sums['unanswered']} without an answer"
    )


def lines(processes: Mapping[str, Figures]) -> list[str]:
    """Return the summary at the end of a run; empty if there was none."""
    if not processes:
        return []
    sums = totals(processes)
    verdicts = {name: Verdict.from_json(one["verdict"]) for name, one in processes.items()}
    bad = sum(bool(verdict.bad_seconds) for verdict in verdicts.values())
    first = "The rig was the bottleneck" if bad else "The rig was not the bottleneck"
    made = [
        "",
        f"{first}: {bad} of {len(verdicts)} processes were at their limit.",
        *(f"  {verdict.words(name)}" for name, verdict in verdicts.items()),
    ]
    if "published" in sums:
        made.append(
            f"Devices: {sums['connects']} connects, {sums['connects_failed']} failed, "
            f"{sums['dropped']} dropped by the shape"
        )
        made.append(
            f"Updates: {sums['published']} published, {sums['acknowledged']} acknowledged, "
            f"{sums['unrouted']} taken while nobody was subscribed, {sums['refused']} refused, "
            f"{sums['unanswered']} without an answer, {sums['skipped']} not made since too many "
            "had none"
        )
    return made


def html_section(processes: Mapping[str, Figures]) -> str:
    """Return the part of an HTML page."""
    if not processes:
        return ""
    first, *rest = [line for line in lines(processes) if line]
    columns = (
        "process", "worst CPU", "worst timer, p99", "at its limit", "connects", "failed",
        "published", "acknowledged", "highest descriptor", "memory at its peak",
    )  # fmt: skip
    rows = []
    for name, figures in processes.items():
        verdict = Verdict.from_json(figures["verdict"])
        peak = figures.get("rss_bytes")
        rows.append(
            (
                name,
                f"{verdict.worst_cpu_share:.0%}",
                f"{verdict.worst_lateness_seconds * 1000:.0f} ms",
                f"{verdict.bad_seconds:.0f} of {verdict.seconds:.0f} s",
                *(figures.get(key, "") for key in _SHOWN),
                "" if peak is None else f"{peak / 2**20:.0f} MiB",
            )
        )
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        '<section id="load" style="font-family: sans-serif; margin: 2em; overflow-x: auto">'
        f"<h2>{escape(first)}</h2>"
        + "".join(f"<p>{escape(line.strip())}</p>" for line in rest if not line.startswith("  "))
        + f'<table border="1" cellpadding="6" style="border-collapse: collapse"><tr>{head}</tr>'
        + f"{body}</table>"
        # For programs: `</` would end the script.
        + '<script type="application/json" id="load-figures">'
        + json.dumps(dict(processes)).replace("</", "<\\/")
        + "</script></section>"
    )


def with_section(page: str, section: str) -> str:
    """Return a page with a section at the start of its body."""
    head, body, rest = page.partition("<body>")
    return head + body + section + rest if body else page + section


_SHOWN = ("connects", "connects_failed", "published", "acknowledged", "highest_descriptor")
