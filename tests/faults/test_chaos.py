"""A short schedule of random faults, that a seed always makes the same one, and the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.faults.chaos import run
from tests.faults.schedule import FAULTS, plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    import backing

pytestmark = pytest.mark.timeout(300)


def test_a_seed_makes_one_schedule_and_all_seeds_together_every_fault() -> None:
    assert plan(7, 600) == plan(7, 600)
    assert plan(7, 600) != plan(8, 600)
    drawn = {
        (step.fault.place, step.fault.name) for seed in range(20) for step in plan(seed, 600).steps
    }
    assert drawn == {(fault.place, fault.name) for fault in FAULTS}
    assert {plan(seed, 1)[:2] for seed in range(40)} == {
        (pods, slots) for pods in (1, 2, 3) for slots in (False, True)
    }


def test_two_faults_at_most_happen_at_once_and_never_two_at_one_place() -> None:
    for seed in range(20):
        steps = plan(seed, 600).steps
        for step in steps:
            others = [one for one in steps if one is not step and one.at <= step.at < one.until]
            assert len(others) <= 1
            assert step.target not in {one.target for one in others}


@pytest.mark.timeout(600)  # the schedule's clock stands still while Cassandra starts
@pytest.mark.parametrize(
    ("seed", "seconds"),
    [
        (10, 15),  # three services that lease their client ids
        pytest.param(1, 90, marks=pytest.mark.slow),
        pytest.param(5, 90, marks=pytest.mark.slow),
        pytest.param(6, 90, marks=pytest.mark.slow),
    ],
)
def test_whatever_fails_and_when_every_promise_is_kept(
    own_broker: backing.Mosquitto,
    own_cassandra: backing.Cassandra,
    own_migrated: str,
    tmp_path: Path,
    seed: int,
    seconds: float,
) -> None:
    outcome = run(seed, seconds, own_broker, own_cassandra, own_migrated, tmp_path)
    assert outcome.kept, "\n".join(outcome.lines())
    assert sum(outcome.faults.values()) >= seconds / 5
    assert outcome.seen["reconnects"] + outcome.seen["retries"] > 0
    assert outcome.verdict is not None
    assert outcome.verdict.durable > 0


# ------------------------------------------------------------------ the command


@contextmanager
def chaos(folder: Path) -> Iterator[Chaos]:
    """Run the command as a terminal does: in a process group of its own."""
    temporary = folder / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "tests.faults.chaos", "--minutes", "5", "--seed", "10"]
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
    with process:
        try:
            yield Chaos(process, folder / "said", temporary)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


class Chaos(NamedTuple):
    """The command as it runs, what it says, and where its temporary files are."""

    process: subprocess.Popen[str]
    said: Path
    temporary: Path

    def wait_said(self, text: str, count: int = 1, limit_seconds: float = 60) -> None:
        deadline = time.monotonic() + limit_seconds
        while self.said.read_text().count(text) < count:
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.1)

    def ctrl_c(self) -> None:
        """The terminal's: to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def servers(self) -> set[int]:
        """The processes that it has started."""
        found = set()
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(status.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found.add(int(status.parent.name))
        return found

    def assert_nothing_is_left(self, servers: set[int]) -> None:
        assert len(servers) >= 3, "broker, Cassandra, services"
        assert [pid for pid in servers if Path(f"/proc/{pid}").exists()] == []
        assert [path for path in self.temporary.iterdir() if "shadowsvc" in path.name] == []


@pytest.mark.slow
def test_ctrl_c_ends_the_schedule_compares_what_happened_and_stops_everything(
    tmp_path: Path,
) -> None:
    with chaos(tmp_path) as command:
        command.wait_said(" s] ", 5, 120)
        servers = command.servers()
        command.ctrl_c()
        ledger, _ = command.process.communicate(timeout=200)
        assert command.process.returncode == 130, command.said.read_text() + ledger
        assert "interrupted" in ledger
        assert "published" in ledger
        assert "every promise was kept" not in ledger
        command.assert_nothing_is_left(servers)


@pytest.mark.slow
def test_ctrl_c_twice_prints_what_is_known_and_stops_everything_at_once(tmp_path: Path) -> None:
    with chaos(tmp_path) as command:
        command.wait_said(" s] ", 3, 120)
        servers = command.servers()
        command.ctrl_c()
        command.wait_said("interrupted: ")
        for _ in range(3):  # more than enough: the end of everything is not broken into
            command.ctrl_c()
            time.sleep(0.3)
        ledger, _ = command.process.communicate(timeout=60)
        assert command.process.returncode == 130, command.said.read_text() + ledger
        assert "left before anything was compared" in ledger
        assert "--seed 10" in ledger
        command.assert_nothing_is_left(servers)
