"""What a headline run says: what was carried, at what latency, by whom, and what is missing.

Lives here: figures out of a run, tables, curves, JSON, page. Rules: what was carried stands beside
what was offered, and a rate that was not carried has no latency worth comparing: it says so; CPU of
every kind, the rig's and that of other processes stand beside; nothing is missing only if it was
read back. Pure but for `write`. Must not come in: processes.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bench.report import machine
from load.stage.paper import Line, Panel, Table, number
from load.stage.results import Results, leave

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from load.stage.headline import Observed, Sample, Step

__all__ = ["brief", "figures", "panels", "tables", "warnings", "whole", "write"]

KINDS = ("driver", "load generator", "HAProxy", "broker", "service", "Cassandra")
RIG = ("driver", "load generator")
OTHERS = "other processes"
GOAL_MS = 69.0
"""Mean from publish to subscriber of the system that shadowsvc is made for."""
_CARRIED_SHARE = 0.98
_FULL_SHARE = 0.95
_LATE_MS = 50.0


def whole(observed: Observed) -> bool:
    """Whether everything that was published was read back."""
    return not observed.failed and observed.missing == 0 and observed.fleet_missing == 0


def brief(earlier: Sample, now: Sample) -> str:
    """Return one line for progress."""
    rate = (now.durable - earlier.durable) / (now.seconds - earlier.seconds)
    shares = now.reading.cpu_share(earlier.reading)
    busy = ", ".join(f"{kind} {shares[kind]:.2f}" for kind in KINDS if kind in shares)
    return (
        f"{now.seconds:.0f} s: {rate:,.0f} durable/s, to subscriber {now.subscriber_mean_ms:.0f} "
        f"(p99 {now.subscriber_p99_ms:.0f}) ms, to durable {now.mean_ms:.0f} (p99 "
        f"{now.p99_ms:.0f}) ms, {now.connected:,} connected; processors: {busy}"
    )


def figures(observed: Observed) -> dict[str, Any]:
    """Return every figure by name."""
    return {
        "connections": observed.plan.connections,
        "connected": observed.connected,
        "interrupted": observed.interrupted,
        "failed": observed.failed,
        "steps": [_step(observed, step) for step in observed.steps if step.end],
        "published": observed.published + observed.fleet_acknowledged,
        "by_load_generator": observed.published,
        "by_persistent_connections": observed.fleet_published,
        "by_persistent_connections_acknowledged": observed.fleet_acknowledged,
        "by_persistent_connections_unanswered": observed.fleet_unanswered,
        "durable": observed.durable,
        "most_unacknowledged": observed.held,
        "reconnects_of_the_service": observed.reconnects,
        "acknowledged_again": observed.again,
        "missing": observed.missing,
        "missing_of_persistent_connections": observed.fleet_missing,
        "drained_seconds": observed.drained_seconds,
        "service_mb": observed.service_mb,
        "goal_ms": GOAL_MS,
    }


def _step(observed: Observed, step: Step) -> dict[str, Any]:
    end = step.end
    seconds = end["seconds"]
    found: dict[str, Any] = {
        "rate": step.rate,
        "fleet_rate": step.fleet_rate,
        "seconds": seconds,
        "offered_per_second": step.published / seconds,
        "carried_per_second": step.durable_in_time / seconds,
        "to_subscriber": {
            name: end[f"arrive_{name}"] for name in ("mean_ms", "p50_ms", "p99_ms", "max_ms")
        },
        "to_durable": {
            name: end[name] for name in ("mean_ms", "p50_ms", "p99_ms", "p999_ms", "max_ms")
        },
        "loadgen_late_p50_ms": end["late_p50_ms"],
        "loadgen_late_p99_ms": end["late_p99_ms"],
    }
    merged = observed.merged.get(f"at {step.rate:g}")
    if merged is not None:
        found["drivers"] = merged.as_json()
    shares: dict[str, float] = {}
    if step.began is not None and step.ended is not None:
        shares = step.ended.cpu_share(step.began)
        found["busy_share"] = step.ended.busy_share(step.began)
        shares[OTHERS] = max(0.0, found["busy_share"] - sum(shares.values()))
        found["cpu_share"] = shares
        found["cpu_us_an_update"] = {
            kind: share * seconds * 1e6 / max(1, step.durable_in_time)
            for kind, share in shares.items()
        }
        found["processors"] = os.cpu_count()
        found["memory_mb"] = {kind: use.pss_bytes / 1e6 for kind, use in step.ended.kinds.items()}
    found["carried"] = found["carried_per_second"] >= _CARRIED_SHARE * found["offered_per_second"]
    found["bottleneck"] = _bottleneck(found)
    return found


def _bottleneck(step: Mapping[str, Any]) -> list[str]:
    """Say who was the limit; nobody: nothing."""
    found = []
    if "busy_share" in step and step["busy_share"] > _FULL_SHARE * (step["processors"] or 1):
        shares = step["cpu_share"]
        ordered = sorted(shares, key=lambda kind: -shares[kind])
        told = ", ".join(f"{kind} {shares[kind]:.2f}" for kind in ordered)
        rig = sum(shares.get(kind, 0.0) for kind in RIG)
        found.append(
            f"all {step['processors']} processors were busy: {told}; the rig's own part is "
            f"{rig:.2f}"
        )
    found += [
        f"the {kind} used a whole processor"
        for kind in ("broker", "service")
        if step.get("cpu_share", {}).get(kind, 0.0) > _FULL_SHARE
    ]
    if step["loadgen_late_p99_ms"] > _LATE_MS:
        found.append(f"the load generator was {step['loadgen_late_p99_ms']:.0f} ms late (p99)")
    if "drivers" in step:
        found += step["drivers"]["rig_is_the_bottleneck"]
    return found


# ------------------------------------------------------------------ for people


def warnings(found: Mapping[str, Any]) -> list[str]:
    """Return what a reader has to know before the figures."""
    told = []
    if found["interrupted"]:
        told.append("Interrupted: the figures are those of the time until then.")
    if found["failed"]:
        told.append(f"Failed: {found['failed'].splitlines()[0]}")
    if found["connected"] < found["connections"]:
        told.append(f"Connected were {found['connected']:,} of {found['connections']:,}.")
    for step in found["steps"]:
        offered, carried = step["offered_per_second"], step["carried_per_second"]
        if not step["carried"]:
            told.append(
                f"NOT CARRIED: {offered:,.0f}/s were offered, {carried:,.0f}/s became durable "
                "meanwhile. The rest waited at the broker, so latency grew as long as the run "
                "lasted, and says how long it lasted, not how fast the system is."
            )
        told += [f"The limit at {step['rate']:,.0f}/s: {text}." for text in step["bottleneck"]]
    if found["reconnects_of_the_service"]:
        told.append(
            f"The service lost its connection {found['reconnects_of_the_service']} times, got "
            f"{found['acknowledged_again']:,} updates again that it had written; each counts once."
        )
    if found["missing"] is None or found["missing_of_persistent_connections"] is None:
        told.append("Not read back: nothing can be said about what is missing.")
    elif found["missing"] or found["missing_of_persistent_connections"]:
        told.append(
            f"MISSING: {found['missing']:,} of the load generator's, "
            f"{found['missing_of_persistent_connections']:,} of the persistent connections'."
        )
    return told


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what there is."""
    made = []
    if found["steps"]:
        made += [_rates(found), _cpu(found)]
    made.append(_whole(found))
    return made


def _rates(found: Mapping[str, Any]) -> Table:
    headings = (
        "publishes/s", "offered", "carried", "s", "to subscriber: mean ms", "p50", "p99",
        "to durable: mean ms", "p50", "p99", "the goal ms", "rig late p99 ms",
    )  # fmt: skip
    rows = tuple(
        (
            number(step["rate"]),
            number(step["offered_per_second"]),
            number(step["carried_per_second"]),
            number(step["seconds"]),
            *(number(step["to_subscriber"][name]) for name in ("mean_ms", "p50_ms", "p99_ms")),
            *(number(step["to_durable"][name]) for name in ("mean_ms", "p50_ms", "p99_ms")),
            number(found["goal_ms"]),
            f"{number(step['loadgen_late_p99_ms'])}; drivers {_driver_late(step)}",
        )
        for step in found["steps"]
    )
    title = f"{found['connections']:,} connections, and the whole system on one machine"
    return Table(title, headings, rows)


def _driver_late(step: Mapping[str, Any]) -> str:
    late = step.get("drivers", {}).get("lateness", {}).get("p99_seconds")
    return number(None if late is None else late * 1000)


def _cpu(found: Mapping[str, Any]) -> Table:
    kinds = (*KINDS, OTHERS)
    headings = ("publishes/s", *(f"{kind}" for kind in kinds), "all busy")
    rows: list[tuple[str, ...]] = []
    for step in found["steps"]:
        if "cpu_share" not in step:
            continue
        name = number(step["rate"])
        of = step["processors"]
        rows += [
            (
                f"{name}: processors",
                *(number(step["cpu_share"].get(kind), 2) for kind in kinds),
                f"{step['busy_share']:.2f} of {of}",
            ),
            (
                f"{name}: µs an update",
                *(number(step["cpu_us_an_update"].get(kind)) for kind in kinds),
                number(sum(step["cpu_us_an_update"].values())),
            ),
            (
                f"{name}: memory (PSS), MB",
                *(number(step["memory_mb"].get(kind)) for kind in kinds),
                number(sum(step["memory_mb"].values())),
            ),
        ]
    return Table("CPU and memory of every part, the rig's included", headings, tuple(rows))


def _whole(found: Mapping[str, Any]) -> Table:
    rows = (
        ("published by the load generator", number(found["by_load_generator"])),
        ("published by persistent connections", number(found["by_persistent_connections"])),
        (
            "of these without an answer of the broker",
            number(found["by_persistent_connections_unanswered"]),
        ),
        ("acknowledged by the service", number(found["durable"])),
        ("acknowledged once more", number(found["acknowledged_again"])),
        ("missing, of the load generator's", number(found["missing"])),
        ("missing, of persistent connections", number(found["missing_of_persistent_connections"])),
        ("most unacknowledged at a time", number(found["most_unacknowledged"])),
        ("connections that the service lost", number(found["reconnects_of_the_service"])),
        ("seconds until all was durable", number(found["drained_seconds"])),
        ("peak memory of the service, MB", number(found["service_mb"])),
    )
    return Table("Everything read back", ("what", "value"), rows)


def panels(observed: Observed) -> list[Panel]:
    """Return the curves of the run, its steps one after another."""
    begins: list[float] = []
    at: list[float] = []
    samples: list[Sample] = []
    passed = 0.0
    for step in observed.steps:
        begins.append(passed)
        at += [passed + one.seconds for one in step.samples]
        samples += step.samples
        passed += step.end.get("seconds", 0.0)
    if len(samples) < 2:  # noqa: PLR2004 - a curve has two points
        return []
    marks = tuple(
        (begin, f"{step.rate:,.0f}/s") for begin, step in zip(begins, observed.steps, strict=True)
    )
    pairs = [
        (when, now, earlier)
        for when, earlier, now in zip(at[1:], samples, samples[1:], strict=False)
        if now.seconds > earlier.seconds
    ]
    later = [when for when, _, _ in pairs]
    rates = [
        (now.durable - earlier.durable) / (now.seconds - earlier.seconds)
        for _, now, earlier in pairs
    ]
    shares = [now.reading.cpu_share(earlier.reading) for _, now, earlier in pairs]
    return [
        Panel("Updates", "s", "durable/s", (Line("durable/s", later, rates),), marks),
        Panel(
            "Latency",
            "s",
            "ms",
            (
                Line("to subscriber, mean", at, [one.subscriber_mean_ms for one in samples]),
                Line("to subscriber, p99", at, [one.subscriber_p99_ms for one in samples]),
                Line("to durable, mean", at, [one.mean_ms for one in samples]),
                Line("to durable, p99", at, [one.p99_ms for one in samples]),
                Line("69 ms", [at[0], at[-1]], [GOAL_MS, GOAL_MS], dashed=True),
            ),
            marks,
            log_y=True,
        ),
        Panel(
            "CPU, in processors",
            "s",
            "processors",
            tuple(Line(kind, later, [share.get(kind, 0.0) for share in shares]) for kind in KINDS),
            marks,
        ),
        Panel(
            "Connections",
            "s",
            "connected",
            (Line("connected", at, [float(one.connected) for one in samples]),),
            marks,
        ),
    ]


def write(options: argparse.Namespace, observed: Observed) -> None:
    """Print the tables, and write JSON, picture and page."""
    found = figures(observed)
    told = warnings(found)
    names = (
        "seconds", "durable", "connected", "mean_ms", "p99_ms", "subscriber_mean_ms",
        "subscriber_p99_ms",
    )  # fmt: skip
    samples = [
        {name: getattr(one, name) for name in names}
        for step in observed.steps
        for one in step.samples
    ]
    leave(
        options,
        Results(
            name="headline",
            title=f"{observed.plan.connections:,} connections, the whole system on one machine",
            caption="Rate, latency and CPU over time",
            note="Latency counts from when a publish was due; CPU is user and system time.",
            warnings=told,
            tables=tables(found),
            panels=panels(observed),
            document={
                "machine": machine(),
                "plan": asdict(observed.plan),
                "warnings": told,
                **found,
                "samples": samples,
            },
        ),
    )
