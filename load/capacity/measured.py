"""Takes the figures of a run of `scripts/scale`, `growth` or `bench` into `constants.toml`.

Lives here: what each figure is in the JSON of a run, and the change of the file, which leaves its
comments and order alone. Rules: a run that was interrupted or failed gives nothing; what a run did
not measure stays as it is. Where a curve bends, the steepest part beyond the measured update
counts. Must not come in: runs.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from load.capacity.constants import CONSTANTS_FILE, read_constants
from load.errors import BadOption

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

__all__ = ["add_options", "figures", "filled", "run"]

_KERNEL: Final = ("kernel: buffers of sockets", "kernel: objects (slab)")
_SOCKETS: Final = {"broker": 1 / 4, "HAProxy": 2 / 4}
"""Of the four that a connection has on one machine: device, two of HAProxy, broker."""
_PARTS: Final = {"broker": "broker", "HAProxy": "ingress"}
_SECONDS_PER_MINUTE: Final = 60.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `scripts/capacity take`."""
    parser.add_argument("file", type=Path, help="out/scale.json, out/growth.json or out/bench.json")
    parser.add_argument("--constants", type=Path, default=CONSTANTS_FILE)


def run(options: argparse.Namespace) -> int:
    """Change the file and print what was changed.

    Raises:
        BadOption: the file is no result of a run, or of one that did not end well.
    """
    try:
        document = json.loads(options.file.read_text())
        changed = dt.datetime.fromtimestamp(options.file.stat().st_mtime, tz=dt.UTC).date()
    except (OSError, json.JSONDecodeError) as error:
        raise BadOption(f"take {options.file}: {error}") from error
    found = figures(document)
    if not found:
        raise BadOption(
            f"take {options.file}: nothing in it is a figure of this model, or the run did not end "
            "well"
        )
    known = {item.name for item in read_constants(options.constants).all}
    text = options.constants.read_text()
    for name, value in found.items():
        if name in known:
            text = filled(
                text,
                name,
                value,
                date=changed,
                command=_command(document),
                machine=_machine(document),
                source=options.file.name,
            )
            print(f"{name} = {value:g}")
    options.constants.write_text(text)
    read_constants(options.constants)
    return 0


def figures(document: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a run by the names that they have in `constants.toml`."""
    if document.get("interrupted") or document.get("failed"):
        return {}
    found = _of_scale(document) if "a_connection" in document else {}
    if "results" in document:
        found |= _of_growth(document["results"])
    if "summary" in document and not document["options"]["quick"]:
        found |= _of_bench(document["summary"].get("shadowsvc", {}))
    return {name: value for name, value in found.items() if math.isfinite(value) and value > 0}


def _of_scale(document: Mapping[str, Any]) -> dict[str, float]:
    if not document.get("complete"):
        return {}
    each = document["a_connection"]
    kernel = sum(each.get(name, {}).get("bytes", math.nan) for name in _KERNEL)
    found: dict[str, float] = {}
    for kind, part in _PARTS.items():
        figure = each.get(kind, {})
        wanted = {
            "memory_bytes_per_connection": figure.get("bytes", math.nan) + kernel * _SOCKETS[kind],
            "cpu_us_per_connect": figure.get("connect_cpu_us", math.nan),
            "cpu_us_per_connection_second": figure.get("rest_cpu_us_a_minute", math.nan)
            / _SECONDS_PER_MINUTE,
        }
        found |= {f"{part}.{name}": value for name, value in wanted.items()}
    # Of the broker that is no cost of a publish: with connections by the ten thousand it is what a
    # turn of mosquitto's loop costs, which many publishes share (bench.json has that).
    found["ingress.cpu_us_per_publish"] = each.get("HAProxy", {}).get("publish_cpu_us", math.nan)
    return found


def _of_bench(summary: Mapping[str, Any]) -> dict[str, float]:
    def medians(figure: str) -> list[float]:
        phases = (summary.get(phase) or {} for phase in ("saturation", "rate"))
        return [phase[figure]["median"] for phase in phases if figure in phase]

    found = {
        "service.cpu_us_per_update": medians("cpu_us"),
        "cassandra.cpu_us_per_update": medians("cassandra_cpu_us"),
        "broker.cpu_us_per_publish": medians("broker_cpu_us"),
        "service.updates_per_second_per_process": medians("updates_per_second"),
    }
    largest = {name: max(values) for name, values in found.items() if values}
    if "process" in summary:
        largest["service.memory_bytes"] = summary["process"]["rss_mb"]["median"] * 1e6
    return largest


def _of_growth(results: list[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for axis, unit, measured in (("leaves", "leaf", 4), ("payload", "payload_byte", 110)):
        for part, figure in (("service", "cpu_us"), ("cassandra", "cassandra_cpu_us")):
            points = sorted((one["value"], one[figure]) for one in results if one["axis"] == axis)
            before = [cost for value, cost in points if value == measured]
            beyond = [(value, cost) for value, cost in points if value > measured]
            if before and beyond:
                found[f"{part}.cpu_us_per_{unit}"] = max(
                    (cost - before[0]) / (value - measured) for value, cost in beyond
                )
    return found


def filled(
    text: str,
    name: str,
    value: float,
    *,
    date: dt.date,
    command: str,
    machine: str,
    source: str,
) -> str:
    """Return the text of `constants.toml` with one figure filled in, all else as it was."""
    head, header, rest = text.partition(f"[{name}]\n")
    if not header:
        raise BadOption(f"{name} has no table in the file of figures")
    end = re.search(r"^(?=\[|# ----)", rest, flags=re.MULTILINE)
    block, tail = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
    kept = [
        line
        for line in block.splitlines()
        if line.strip() and not re.match(r"(value|source|date|command|machine) =", line)
    ]
    rounded = float(f"{value:.4g}")
    lines = [
        f"value = {int(rounded) if rounded.is_integer() else rounded}",
        *kept[:2],  # unit and kind
        f"source = {json.dumps(source, ensure_ascii=False)}",
        f"date = {date.isoformat()}",
        f"command = {json.dumps(command, ensure_ascii=False)}",
        f"machine = {json.dumps(machine, ensure_ascii=False)}",
        *kept[2:],
    ]
    return head + header + "\n".join(lines) + "\n\n" + tail


def _command(document: Mapping[str, Any]) -> str:
    if "command" in document:
        return str(document["command"])
    options = document["options"]  # of the benchmark, whose file has no command line
    return (
        f"scripts/bench --rounds {options['rounds']} --seconds {options['seconds']:g} "
        f"--warm-up {options['warm_up']:g} --services {','.join(options['services'])}"
    )


def _machine(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    broker = machine.get("mosquitto")
    return (
        f"{machine['cores']} virtual cores ({machine['cpu']}), Python {machine['python']}"
        + (f", {broker}" if broker else "")
        + "; everything on the same cores"
    )
