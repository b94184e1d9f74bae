"""A disk of Cassandra's is full: its data lie on a small file system in memory, by a mount.

Each test proves that the disk was full, and that all is in its place once there is room again. The
commit log lies elsewhere: what Cassandra itself confirms by half when that one has no room is said
in `docs/guarantees.md`, and no service can mend it.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

import pytest

import backing
from tests.faults.stage import KEEP_ALIVE_SECONDS, RECEIVE_MAXIMUM, Stage
from tests.keyspaces import make_schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from backing import Mosquitto
    from tests.faults.pod import Pod

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

DURABLE = "updates_durable_total"
RETRIES = "write_retries_total"
KEYSPACE = "small"
DISK_BYTES = 48 * 1024 * 1024
STAYS = {"LIMITS__ISOLATE_AFTER_SECONDS": 600}
"""Cassandra takes longer to come back than a service stays otherwise."""
_BLOCK = bytes(64 * 1024)


class SmallDisk:
    """A file system in memory, to be filled and emptied; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def __enter__(self) -> Self:
        self.folder.mkdir()
        options = f"size={DISK_BYTES},mode=700"
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder],
            check=True,
            capture_output=True,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        # Lazily: should Cassandra still have a file open, that goes with the process.
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def fill(self) -> None:
        """Take all that is left."""
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(_BLOCK)
            except OSError as error:
                assert error.errno == errno.ENOSPC

    @property
    def is_full(self) -> bool:
        """Whether there is no room for a block of the ballast."""
        return shutil.disk_usage(self.folder).free < len(_BLOCK)

    def free(self) -> None:
        """Undo `fill`."""
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(SmallDisk(tmp_path / "disk"))
        except (OSError, subprocess.CalledProcessError) as error:
            why = f"no small file system can be mounted: {getattr(error, 'stderr', error)}"
            if os.environ.get("CI"):
                pytest.fail(why)
            pytest.skip(why)
        yield disk


def on_the_disk(disk: SmallDisk, elsewhere: Path) -> dict[str, object]:
    """Return the settings of a Cassandra whose tables are there; its own of the node elsewhere."""
    return {
        "commitlog_sync": "batch",
        "data_file_directories": [str(disk.folder)],
        "local_system_data_file_directory": str(elsewhere / "system"),
    }


@contextmanager
def flushing(settings: dict[str, object]) -> Iterator[backing.Cassandra]:
    """Give a Cassandra that writes its tables to the disk every second."""
    with backing.Cassandra(heap="512M", settings=settings) as database:
        make_schema(database, KEYSPACE)
        with database.session() as session:
            session.execute(
                f"ALTER TABLE {KEYSPACE}.shadow WITH memtable_flush_period_in_ms = 1000"
            )
        yield database


@pytest.mark.parametrize("policy", ["stop", "die"])
def test_a_cassandra_whose_disk_is_full_costs_nothing_that_was_acknowledged(
    own_broker: Mosquitto, disk: SmallDisk, unique: str, tmp_path: Path, policy: str
) -> None:
    """It refuses clients, or ends, by its policy; once there is room it is started again."""
    settings = on_the_disk(disk, tmp_path) | {"disk_failure_policy": policy}
    with (
        flushing(settings) as database,
        Stage(own_broker, database, KEYSPACE, unique, tmp_path, settings=STAYS) as stage,
    ):
        pod = stage.start().pod
        with stage.traffic(rate=200):
            pod.wait_more(100, DURABLE)
            disk.fill()
            pod.service.wait_reasons({"cassandra_unavailable"}, 60)
            assert disk.is_full
            wait_closed(database, pod, ends=policy == "die")
            assert_nothing_is_acknowledged(pod)
            disk.free()
            database.kill()
            database.start()
            pod.service.wait_ready()
            pod.wait_more(100, DURABLE)
        verdict = stage.settle()
        assert verdict.excused == 0
        assert pod.total(RETRIES) > 0
        assert pod.total("dead_letters_total", reason="refused_by_store") == 0
        assert pod.wire.counts["connections"] == 1


def wait_closed(database: backing.Cassandra, pod: Pod, *, ends: bool) -> None:
    """Wait until Cassandra has done what its policy says, because of the disk."""

    def is_closed() -> bool:
        log = database.log_path.read_text(errors="replace")
        return "No space left on device" in log and (
            not database.running if ends else "Stopping transports" in log
        )

    pod.service.wait_until(is_closed, "Cassandra ends" if ends else "Cassandra refuses clients")
    assert database.running is not ends


def assert_nothing_is_acknowledged(pod: Pod) -> None:
    # What was under way when Cassandra closed may have been confirmed still.
    pod.wait_total(RECEIVE_MAXIMUM, "unacknowledged_deliveries")
    pod.wait_more(RECEIVE_MAXIMUM, RETRIES)
    acked = pod.wire.counts["PUBACK"]
    pings = pod.wire.counts["PINGREQ"]
    time.sleep(2 * KEEP_ALIVE_SECONDS)
    assert pod.wire.counts["PUBACK"] == acked
    assert pod.wire.counts["PINGREQ"] > pings
    assert pod.service.live()
    assert pod.service.ready_reasons() == {"cassandra_unavailable"}
