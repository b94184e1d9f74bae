"""A stage for real: two mosquittos, one HAProxy, 200 devices, and a broker that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from load.stage import scale, scale_report
from load.stage.plan import plan
from load.stage.site import lift_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).parents[2]
CONNECTIONS = 200
pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


def _arguments(folder: Path, *more: str) -> list[str]:
    return [
        f"--connections={CONNECTIONS}",
        "--connect-rate=200",
        "--idle-seconds=3",
        "--publish-rate=100",
        "--publish-seconds=4",
        "--storm-seconds=60",
        f"--json={folder / 'scale.json'}",
        f"--plot={folder / 'scale.png'}",
        f"--page={folder / 'scale.html'}",
        *more,
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, scale.Observed, dict[str, Any]]:
    """One run of everything, and its report."""
    folder = tmp_path_factory.mktemp("scale")
    options = scale._options(_arguments(folder))
    observed = scale.run(plan(CONNECTIONS, lift_descriptors()), options)
    scale_report.write(options, observed)
    return folder, observed, json.loads((folder / "scale.json").read_text())


def test_everybody_connects_and_comes_back_after_a_broker_was_killed(
    done: tuple[Path, scale.Observed, dict[str, Any]],
) -> None:
    _, observed, told = done
    assert told["failed"] is None
    assert told["connected"]["idle"] == CONNECTIONS
    assert told["storm"]["lost_connections"] >= CONNECTIONS // 4, "nobody was lost: no storm"
    assert told["phases"]["storm"]["drivers"]["lost"], "the drivers lost nothing"
    assert told["storm"]["back_seconds"]["100%"] is not None
    assert told["connected"]["storm"] == CONNECTIONS
    assert told["complete"]
    assert scale_report.complete(observed)


def test_the_processes_are_those_of_the_plan(
    done: tuple[Path, scale.Observed, dict[str, Any]],
) -> None:
    _, observed, told = done
    assert [told["processes"][kind]["processes"] for kind in scale_report.KINDS] == [1, 1, 2]
    empty = observed.empty
    assert empty is not None
    assert [empty.kinds[kind].processes for kind in scale_report.KINDS] == [1, 1, 2]
    # Each connection is one descriptor at the driver and two at HAProxy.
    assert told["processes"]["driver"]["most_descriptors"] >= CONNECTIONS
    assert told["processes"]["HAProxy"]["most_descriptors"] >= 2 * CONNECTIONS
    last = observed.phases["storm"][3]
    assert last.kinds["broker"].processes == 1, "no broker was killed"


def test_the_figures_of_a_report_add_up(
    done: tuple[Path, scale.Observed, dict[str, Any]],
) -> None:
    _, observed, told = done
    drivers = told["phases"]["publish"]["drivers"]
    assert drivers["published"] > 0
    # Answers may come a moment after the phase has ended, and none is missing.
    answered = sum(phase.acknowledged for phase in observed.merged.values())
    assert answered == sum(phase.published for phase in observed.merged.values())
    assert all(not phase.unrouted for phase in observed.merged.values())
    assert told["phases"]["publish"]["to_subscriber"]["count"] > 0
    assert told["phases"]["storm"]["drivers"]["puback"]["count"] > 0, "nobody published meanwhile"
    assert told["ramp"]["connect"]["count"] == CONNECTIONS
    parts = told["a_connection"]
    rows = [*scale_report.KINDS, "kernel: buffers of sockets", "kernel: objects (slab)"]
    assert parts["sum"]["bytes"] == pytest.approx(sum(parts[row]["bytes"] for row in rows))
    for name in ("connect_cpu_us", "rest_cpu_us_a_minute", "publish_cpu_us"):
        of_kinds = sum(parts[kind][name] for kind in scale_report.KINDS)
        assert parts["sum"][name] == pytest.approx(of_kinds)
    missing = told["storm"]["missing"]
    assert max(count for _, count in missing) == told["storm"]["lost"]


def test_picture_and_page_are_written(done: tuple[Path, scale.Observed, dict[str, Any]]) -> None:
    folder, _, told = done
    assert (folder / "scale.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "scale.html").read_text()
    assert "A broker is killed" in text
    assert "data:image/png;base64," in text
    assert len(told["samples"]) > 10


def test_an_interrupted_run_ends_everything_and_reports(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "load.stage.scale", *_arguments(tmp_path, "--idle-seconds=60")]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            argv,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}"},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
    children: list[int] = []
    try:
        _wait("idle", lambda: " idle" in (tmp_path / "said").read_text())
        children = _children(process.pid)
        assert len(children) >= 5  # two brokers, HAProxy, driver, subscribers
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Interrupted" in out
    told = json.loads((tmp_path / "scale.json").read_text())
    assert told["interrupted"]
    assert told["connected"]["ramp"] == CONNECTIONS
    assert not told["complete"]
    _wait("all processes have ended", lambda: not any(map(_lives, children)))


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == pid:
                found.append(int(folder.name))
    return found


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _wait(what: str, met: Callable[[], bool], limit_seconds: float = 90.0) -> None:
    deadline = time.monotonic() + limit_seconds
    while not met():
        assert time.monotonic() < deadline, f"not within {limit_seconds:g} s: {what}"
        time.sleep(0.1)
