"""What a scale run says: bytes and CPU of a connection, rates, the storm, and who was the limit.

Lives here: figures out of readings, tables, curves, JSON, page. Rules: memory is what was added
since nobody was connected; CPU at rest is taken off before CPU of a publish is told; a phase whose
processors were all busy, or whose drivers were late, says so beside its figures. Pure but for
`write`. Must not come in: processes.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bench.report import machine
from load.stage.paper import Line, Panel, Table, number
from load.stage.plan import PORTS_OF_AN_ADDRESS
from load.stage.recovery import SHARES, Recovery, recovery_of
from load.stage.results import Results, leave

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from load.stage.accounting import Reading
    from load.stage.scale import Observed

__all__ = ["complete", "figures", "panels", "tables", "warnings", "write"]

KINDS = ("driver", "HAProxy", "broker")
PHASES = ("ramp", "idle", "publish", "storm")
_FULL_SHARE = 0.95
_MINUTE_SECONDS = 60.0
_MICRO = 1e6
_MB = 1e6


def complete(observed: Observed) -> bool:
    """Whether everybody was connected, and came back after the kill if there was one."""
    if observed.failed or observed.interrupted or observed.ramped_seconds is None:
        return False
    found = _recovery(observed)
    return found is None or found.back_seconds["100%"] is not None


def figures(observed: Observed) -> dict[str, Any]:
    """Return every figure by name; those of a phase that was not come to are missing."""
    return {
        "connections": observed.plan.connections,
        "connected": dict(observed.connected),
        "complete": complete(observed),
        "interrupted": observed.interrupted,
        "failed": observed.failed,
        "processes": _processes(observed),
        "a_connection": _a_connection(observed),
        "ramp": _ramp(observed),
        "phases": {name: _phase(observed, name) for name in PHASES if name in observed.phases},
        "storm": _storm(observed),
    }


def _processes(observed: Observed) -> dict[str, Any]:
    """Processes of each kind, and the most that one of them had."""
    plan = observed.plan
    numbers = {
        "driver": (plan.drivers, plan.a_driver),
        "HAProxy": (plan.ingresses, plan.an_ingress),
        "broker": (plan.brokers, plan.a_broker),
    }
    most: dict[str, int] = dict.fromkeys(KINDS, 0)
    for _, each in observed.readings:
        for kind in KINDS:
            most[kind] = max(most[kind], each.kinds[kind].most_descriptors)
    return {
        kind: {
            "processes": processes,
            "connections_each": each,
            "most_descriptors": most[kind],
            "descriptor_limit": plan.descriptors,
        }
        for kind, (processes, each) in numbers.items()
    }


def _a_connection(observed: Observed) -> dict[str, dict[str, float]]:
    """Bytes and CPU of one connection, by kind; of the kernel and the machine bytes alone."""
    found: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    idle, ramp, publish = (observed.phases.get(name) for name in ("idle", "ramp", "publish"))
    connected = observed.connected.get("idle", 0)
    if observed.empty is not None and idle is not None and connected:
        _add_bytes(found, observed.empty, idle[1], connected)
    if ramp is not None and observed.connected.get("ramp"):
        for kind in KINDS:
            used = ramp[3].kinds[kind].cpu_seconds - ramp[1].kinds[kind].cpu_seconds
            found[kind]["connect_cpu_us"] = used * _MICRO / observed.connected["ramp"]
    resting: dict[str, float] = {}
    if idle is not None and connected:
        resting = idle[3].cpu_share(idle[1])
        for kind in KINDS:
            a_minute = resting[kind] * _MICRO * _MINUTE_SECONDS / connected
            found[kind]["rest_cpu_us_a_minute"] = a_minute
    merged = observed.merged.get("publish")
    if publish is not None and merged is not None and merged.published and resting:
        seconds = publish[3].at - publish[1].at
        shares = publish[3].cpu_share(publish[1])
        for kind in KINDS:
            used = (shares[kind] - resting[kind]) * seconds
            found[kind]["publish_cpu_us"] = used * _MICRO / merged.published
    for name in ("connect_cpu_us", "rest_cpu_us_a_minute", "publish_cpu_us"):
        if "sum" in found and all(name in found[kind] for kind in KINDS):
            found["sum"][name] = sum(found[kind][name] for kind in KINDS)
    return found


def _add_bytes(
    found: dict[str, dict[str, float]], empty: Reading, full: Reading, connected: int
) -> None:
    for kind in KINDS:
        added = full.kinds[kind].pss_bytes - empty.kinds[kind].pss_bytes
        found[kind]["bytes"] = added / connected
    before, after = empty.machine, full.machine
    buffers = (after.socket_buffer_bytes - before.socket_buffer_bytes) / connected
    found["kernel: buffers of sockets"] = {"bytes": buffers}
    found["kernel: objects (slab)"] = {"bytes": (after.slab_bytes - before.slab_bytes) / connected}
    found["sum"] = {"bytes": sum(one["bytes"] for one in found.values())}
    gone = (before.available_bytes - after.available_bytes) / connected
    found["less memory available"] = {"bytes": gone}


def _ramp(observed: Observed) -> dict[str, Any]:
    merged = observed.merged.get("ramp")
    seconds = observed.ramped_seconds
    most = max((one.machine.tcp_sockets for _, one in observed.readings), default=0)
    found: dict[str, Any] = {
        "seconds": seconds,
        "connects_per_second": observed.plan.connections / seconds if seconds else None,
        "source_addresses": observed.source_addresses,
        "ports_of_an_address": PORTS_OF_AN_ADDRESS,
        "most_tcp_sockets": most,
        "most_time_wait": max((one.machine.time_wait for _, one in observed.readings), default=0),
    }
    if merged is not None:
        found["failed"] = dict(merged.failed)
        found["connect"] = _durations(merged.connect)
    return found


def _phase(observed: Observed, name: str) -> dict[str, Any]:
    began, first, ended, last = observed.phases[name]
    shares = last.cpu_share(first)
    if name == "storm":
        # A broker is gone, and its CPU with it: what the rest used is what can be told.
        shares["broker"] = _share_of_survivors(observed)
    found: dict[str, Any] = {
        "began_seconds": began,
        "seconds": ended - began,
        "cpu_share": shares,
        "busy_share": last.busy_share(first),
        "processors": os.cpu_count(),
    }
    merged = observed.merged.get(name)
    if merged is not None:
        found["drivers"] = merged.as_json()
    phases = observed.heard.get("phases")
    if isinstance(phases, dict) and phases.get(name, {}).get("count"):
        found["to_subscriber"] = {
            key: value for key, value in phases[name].items() if key != "buckets"
        }
    found["bottleneck"] = _bottleneck(found)
    return found


def _share_of_survivors(observed: Observed) -> float:
    """CPU of the brokers after the kill: of readings that have the same number of them."""
    began, _, ended, last = observed.phases["storm"]
    count = last.kinds["broker"].processes
    inside = [
        one
        for at, one in observed.readings
        if began <= at <= ended and one.kinds["broker"].processes == count
    ]
    return last.cpu_share(inside[0])["broker"] if inside and inside[0].at < last.at else math.nan


def _bottleneck(phase: Mapping[str, Any]) -> list[str]:
    """Say who was the limit of a phase; nobody: nothing."""
    found = []
    if phase["busy_share"] > _FULL_SHARE * (phase["processors"] or 1):
        shares = {
            kind: share for kind, share in phase["cpu_share"].items() if not math.isnan(share)
        }
        shares["other processes of this machine"] = phase["busy_share"] - sum(shares.values())
        most = max(shares, key=lambda kind: shares[kind])
        found.append(
            f"all {phase['processors']} processors were busy, most with {most} "
            f"({shares[most]:.2f} of them)"
        )
    drivers = phase.get("drivers")
    if drivers is not None:
        found += drivers["rig_is_the_bottleneck"]
    return found


def _recovery(observed: Observed) -> Recovery | None:
    if observed.killed_at is None:
        return None
    series = [(one.seconds, one.connected) for one in observed.samples]
    return recovery_of(series, observed.killed_at)


def _storm(observed: Observed) -> dict[str, Any] | None:
    found = _recovery(observed)
    if found is None:
        return None
    return {
        "killed_at_seconds": observed.killed_at,
        "lost_connections": _lost(observed),
        **asdict(found),
    }


def _lost(observed: Observed) -> int:
    """Count the connections that were lost since the kill, those lost twice twice."""
    samples = [one for one in observed.samples if one.seconds <= (observed.killed_at or 0.0)]
    return observed.samples[-1].lost - samples[-1].lost


def _durations(histogram: Any) -> dict[str, Any]:
    return {key: value for key, value in histogram.as_json().items() if key != "buckets"}


# ------------------------------------------------------------------ for people


def warnings(found: Mapping[str, Any]) -> list[str]:
    """Return what a reader has to know before the figures."""
    told = []
    if found["interrupted"]:
        told.append("Interrupted: only what was seen until then.")
    if found["failed"]:
        told.append(f"Failed: {found['failed'].splitlines()[0]}")
    if not found["interrupted"] and found["ramp"]["seconds"] is None:
        told.append(
            f"Not everybody was connected: {found['connected'].get('ramp', 0):,} of "
            f"{found['connections']:,}."
        )
    for name, phase in found["phases"].items():
        told += [f"The limit while in {name}: {text}." for text in phase["bottleneck"]]
    return told


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what there is."""
    made = [_processes_table(found), _connection_table(found), _phases_table(found)]
    if any("drivers" in phase for phase in found["phases"].values()):
        made.append(_latency_table(found))
    if found["storm"] is not None:
        made.append(_storm_table(found["storm"]))
    made.append(_sockets_table(found["ramp"]))
    return made


def _processes_table(found: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            kind,
            str(one["processes"]),
            f"{one['connections_each']:,}",
            f"{one['most_descriptors']:,}",
            f"{one['descriptor_limit']:,}",
        )
        for kind, one in found["processes"].items()
    )
    headings = ("kind", "processes", "connections each", "most descriptors", "allowed")
    return Table(f"{found['connections']:,} connections: the processes", headings, rows)


def _connection_table(found: Mapping[str, Any]) -> Table:
    headings = (
        "of one connection",
        "bytes",
        "CPU µs to connect",
        "CPU µs a minute at rest",
        "CPU µs a publish",
    )
    rows = tuple(
        (
            kind,
            number(one.get("bytes")),
            number(one.get("connect_cpu_us")),
            number(one.get("rest_cpu_us_a_minute")),
            number(one.get("publish_cpu_us")),
        )
        for kind, one in found["a_connection"].items()
    )
    return Table("What a connection costs", headings, rows)


def _phases_table(found: Mapping[str, Any]) -> Table:
    headings = (
        "phase", "s", "connected", "driver", "HAProxy", "broker", "all busy", "timers p99 ms",
        "the rig the limit",
    )  # fmt: skip
    rows = []
    for name, phase in found["phases"].items():
        drivers = phase.get("drivers", {})
        late = drivers.get("lateness", {}).get("p99_seconds")
        rows.append(
            (
                name,
                number(phase["seconds"]),
                f"{found['connected'].get(name, 0):,}",
                *(number(phase["cpu_share"].get(kind), 2) for kind in KINDS),
                f"{phase['busy_share']:.2f} of {phase['processors']}",
                number(None if late is None else late * 1000),
                "yes" if drivers.get("rig_is_the_bottleneck") else "no",
            )
        )
    return Table("Phases, and CPU in processors", headings, tuple(rows))


def _latency_table(found: Mapping[str, Any]) -> Table:
    rows = []

    def add(what: str, of: Mapping[str, Any] | None, of_seconds: float | None = None) -> None:
        if of and of.get("count"):
            a_second = number(of["count"] / of_seconds) if of_seconds else "-"
            rows.append(
                (
                    what,
                    f"{of['count']:,}",
                    a_second,
                    *(
                        number(of[name] * 1000)
                        for name in ("mean_seconds", "p50_seconds", "p99_seconds", "most_seconds")
                    ),
                )
            )

    add("connect, TCP to CONNACK", found["ramp"].get("connect"), found["ramp"]["seconds"])
    for name in ("publish", "storm"):
        phase = found["phases"].get(name)
        if phase is not None and "drivers" in phase:
            words = "all connected" if name == "publish" else "in the storm"
            add(f"publish to PUBACK, {words}", phase["drivers"]["puback"], phase["seconds"])
            add(f"publish to subscriber, {words}", phase.get("to_subscriber"), phase["seconds"])
    headings = ("latency", "count", "a second", "mean ms", "p50 ms", "p99 ms", "most ms")
    return Table("Rates and latencies", headings, tuple(rows))


def _storm_table(storm: Mapping[str, Any]) -> Table:
    rows = [
        ("connected before", f"{storm['before']:,}"),
        ("connections lost", f"{storm['lost_connections']:,}"),
        ("most that were missing at once, of a second's samples", f"{storm['lost']:,}"),
        ("until then, s", number(storm["lowest_seconds"])),
    ]
    rows += [
        (f"until {share:.0%} of these were back, s", number(storm["back_seconds"][f"{share:.0%}"]))
        for share in SHARES
    ]
    rows.append(("half-life of the missing, s", number(storm["half_life_seconds"])))
    rows.append(("most connects in a second", number(storm["most_connects_per_second"])))
    return Table("A broker is killed", ("storm", "value"), tuple(rows))


def _sockets_table(ramp: Mapping[str, Any]) -> Table:
    rows = (
        ("source addresses towards the brokers", number(ramp["source_addresses"])),
        ("ports of one address towards one port", number(ramp["ports_of_an_address"])),
        ("most TCP sockets at a time", number(ramp["most_tcp_sockets"])),
        ("most in TIME_WAIT beside", number(ramp["most_time_wait"])),
    )
    return Table("Sockets of the machine", ("what", "value"), rows)


def panels(observed: Observed, found: Mapping[str, Any]) -> list[Panel]:
    """Return the curves of the run."""
    samples = observed.samples
    if not samples:
        return []
    seconds = [one.seconds for one in samples]
    marks = [(phase["began_seconds"], name) for name, phase in found["phases"].items()]
    if observed.killed_at is not None:
        marks.append((observed.killed_at, "kill"))
    drawn = [
        Panel(
            "Connections",
            "s",
            "connected",
            (Line("connected", seconds, [one.connected for one in samples]),),
            tuple(marks),
        )
    ]
    if len(observed.readings) > 1 and observed.empty is not None:
        drawn += [_cpu_panel(observed, marks), _memory_panel(observed, observed.empty, marks)]
    storm = found["storm"]
    if storm is not None:
        missing = storm["missing"]
        drawn.append(
            Panel(
                "After the kill",
                "s since the kill",
                "connections missing",
                (Line("missing", [at for at, _ in missing], [count for _, count in missing]),),
            )
        )
    return drawn


def _cpu_panel(observed: Observed, marks: Sequence[tuple[float, str]]) -> Panel:
    at = [seconds for seconds, _ in observed.readings[1:]]
    lines = []
    for kind in KINDS:
        shares = [
            # A process that came or went would look like CPU that was given back.
            now.cpu_share(earlier)[kind]
            if now.kinds[kind].processes == earlier.kinds[kind].processes
            else math.nan
            for (_, earlier), (_, now) in pairwise(observed.readings)
        ]
        lines.append(Line(kind, at, shares))
    return Panel("CPU, in processors", "s", "processors", tuple(lines), tuple(marks))


def _memory_panel(observed: Observed, empty: Reading, marks: Sequence[tuple[float, str]]) -> Panel:
    at = [seconds for seconds, _ in observed.readings]
    readings = [one for _, one in observed.readings]
    lines = [
        Line(
            kind,
            at,
            [(one.kinds[kind].pss_bytes - empty.kinds[kind].pss_bytes) / _MB for one in readings],
        )
        for kind in KINDS
    ]
    for label, name in (("buffers", "socket_buffer_bytes"), ("objects", "slab_bytes")):
        start = getattr(empty.machine, name)
        added = [(getattr(one.machine, name) - start) / _MB for one in readings]
        lines.append(Line(f"kernel: {label}", at, added))
    title = "Memory, more than with nobody connected"
    return Panel(title, "s", "MB", tuple(lines), tuple(marks))


def write(options: argparse.Namespace, observed: Observed) -> None:
    """Print the tables, and write JSON, picture and page."""
    found = figures(observed)
    told = warnings(found)
    leave(
        options,
        Results(
            name="scale",
            title=f"{observed.plan.connections:,} WebSocket connections on one machine",
            caption="Connections, CPU and memory over time",
            note="Memory is PSS, and what was added since nobody was connected; "
            "CPU is user and system.",
            warnings=told,
            tables=tables(found),
            panels=panels(observed, found),
            document={
                "options": observed.options,
                "machine": {**machine(), "descriptors": observed.plan.descriptors},
                "plan": asdict(observed.plan),
                "warnings": told,
                **found,
                "samples": [asdict(one) for one in observed.samples],
            },
        ),
    )
