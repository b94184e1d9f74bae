"""How many bytes a leaf takes on Cassandra's disk, measured on a real node.

Lives here: the one measurement of the capacity model that no other rig makes. A Cassandra of its
own gets the table by `shadowsvc migrate` and one update of each device, of four leaves as the
benchmark has them, by the statements that the service has. Then the node is stopped, which writes
everything to disk, and the table's files are counted. Rules: compression and compaction are the
table's own; names and values are by chance, so that they compress badly; every leaf is there once,
so what overwriting leaves behind comes on top. Must not come in: traffic, latency.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from load.errors import BadOption, LoadError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from backing import Cassandra

__all__ = ["add_options", "disk_bytes", "run", "updates"]

_REPOSITORY: Final = Path(__file__).parents[2]
_KEYSPACE: Final = "shadowsvc"
_HEARD: Final = (
    "UPDATE shadowsvc.shadow USING TIMESTAMP ? SET value = ?, updated_at = ? "
    "WHERE device = ? AND shadow = '' AND section = 'reported' AND path = ?"
)
_WRITE: Final = (
    "UPDATE shadowsvc.shadow USING TIMESTAMP ? SET value = ? "
    "WHERE device = ? AND shadow = '' AND section = 'reported' AND path = ?"
)
_FIRST_TIME_US: Final = 1_790_000_000_000_000
_LEAVES: Final = 4
_MIGRATE_SECONDS: Final = 120.0
_CONCURRENCY: Final = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `scripts/capacity measure-storage`."""
    parser.add_argument("--devices", type=int, default=50_000, help="1,000 or more")


def run(options: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        BadOption: too few devices to tell anything.
        LoadError: the schema could not be made.
    """
    import backing  # noqa: PLC0415  # nothing else of the model starts servers

    least = 1000
    if options.devices < least:
        raise BadOption(f"--devices {options.devices}: has to be {least} or more")
    with tempfile.TemporaryDirectory(prefix="shadowsvc-storage-") as folder:
        cassandra = backing.Cassandra(folder=Path(folder))
        with cassandra:
            _migrate(cassandra)
            _write(cassandra, options.devices)
        total = disk_bytes(Path(folder))  # stopped by now, and so flushed
    leaves = options.devices * _LEAVES
    print(
        f"{leaves:,} leaves of {options.devices:,} devices: {total:,} bytes on disk, "
        f"{total / leaves:.1f} a leaf, {total / options.devices:.0f} a device"
    )
    return 0


def updates(random: Random) -> Iterator[tuple[str, str]]:
    """Yield path and value of each leaf: those of the benchmark's update, with values by chance."""
    yield "/temp", f"{random.uniform(15, 25):.1f}"
    yield "/battery", str(random.randint(0, 100))
    yield "/power/state", random.choice(('"on"', '"off"'))
    yield "/volume", str(random.randint(0, 10_000_000))


def disk_bytes(storage: Path) -> int:
    """Return the size of the table's files below Cassandra's folder; snapshots do not count.

    Raises:
        LoadError: there is no such table, or nothing of it was written to disk.
    """
    tables = list((storage / "data" / _KEYSPACE).glob("shadow-*"))
    total = sum(file.stat().st_size for table in tables for file in table.glob("*.*"))
    if total == 0:
        raise LoadError(f"nothing of the table shadow lies below {storage}: was Cassandra flushed?")
    return total


def _migrate(cassandra: Cassandra) -> None:
    settings = {
        "SHADOWSVC_MQTT__URL": "mqtt://127.0.0.1:1",  # not asked
        "SHADOWSVC_CASSANDRA__CONTACT_POINTS": cassandra.contact_points[0],
        "SHADOWSVC_CASSANDRA__PORT": str(cassandra.port),
        "SHADOWSVC_CASSANDRA__LOCAL_DC": cassandra.dc,
        "SHADOWSVC_CASSANDRA__KEYSPACE": _KEYSPACE,
        "PYTHONPATH": str(_REPOSITORY / "src"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "shadowsvc", "migrate"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=_MIGRATE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise LoadError(f"shadowsvc migrate ended with {done.returncode}: {done.stderr[-500:]}")


def _write(cassandra: Cassandra, devices: int) -> None:
    from cassandra.concurrent import (  # noqa: PLC0415  # nothing else of the model needs a driver
        execute_concurrent,
    )

    random = Random(1)  # noqa: S311  # the same rows each time
    with cassandra.session() as session:
        heard, write = session.prepare(_HEARD), session.prepare(_WRITE)

        def requests() -> Iterator[tuple[object, tuple[object, ...]]]:
            for device in range(devices):
                name = f"{random.getrandbits(128):032x}"
                time_us = _FIRST_TIME_US + device * 1000 + random.randrange(1000)
                for number, (path, value) in enumerate(updates(random)):
                    if number:
                        yield write, (time_us, value, name, path)
                    else:
                        yield heard, (time_us, value, time_us // 1000, name, path)

        execute_concurrent(session, requests(), concurrency=_CONCURRENCY)
