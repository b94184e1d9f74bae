"""The machine under the service fails: log, names, files, processor, clock."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backing import free_port
from tests.faults.shim import NAME, Shim
from tests.faults.stage import KEEP_ALIVE_SECONDS
from tests.service import ServiceProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.conftest import MakeStage
    from tests.faults.pod import Pod

pytestmark = pytest.mark.timeout(180)

DURABLE = "updates_durable_total"
PIPE_BYTES = 4096


# ------------------------------------------------------------------ the log


class Unheard(ServiceProcess):
    """A service whose log goes where nobody can read it."""

    def wait_started(self, limit_seconds: float = 40) -> None:
        self.port = int(self.settings["SHADOWSVC_HTTP__PORT"])
        self.wait_until(self._answers, "it serves HTTP", limit_seconds)

    def log_tail(self) -> str:
        return " (its log is not readable)"

    def _lines(self, *, this_life: bool = False) -> list[str]:
        del this_life
        return []

    def _answers(self) -> bool:
        try:
            return self.live()
        except OSError:
            return False


@pytest.fixture
def blocked_pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe that somebody has open and never reads; it holds a page."""
    path = tmp_path / "blocked"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    yield path
    os.close(reader)


@pytest.mark.parametrize("where", ["a full disk", "a pipe that nobody reads"])
def test_a_log_that_cannot_be_written_holds_nothing_up(
    make_stage: MakeStage, blocked_pipe: Path, where: str
) -> None:
    full = where == "a full disk"
    stage = make_stage(pods=0)
    pod = stage.add_pod(
        log=Path("/dev/full") if full else blocked_pipe,
        make=Unheard,
        HTTP__PORT=free_port(),
        LOG__LEVEL="DEBUG",
    )
    stage.start()
    with stage.traffic():
        for number in range(1, 30):
            pod.broker(lambda proxy: proxy.reset())
            pod.wait_total(number, "sessions_total", state="resumed")
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.service.live()
    if full:
        assert pod.total("log_lines_dropped_total") > 0
    else:
        assert not _writable(blocked_pipe)
    assert pod.service.terminate() == 0


def _writable(pipe: Path) -> bool:
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    try:
        return os.write(writer, b"x" * PIPE_BYTES) > 0
    except BlockingIOError:
        return False
    finally:
        os.close(writer)


# ------------------------------------------------------------------ files and processor


def test_a_service_without_file_descriptors_waits_until_there_are_some(
    make_stage: MakeStage,
) -> None:
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        before = resource.prlimit(pod.service.pid, resource.RLIMIT_NOFILE)
        accepted = pod.broker(lambda proxy: proxy.counts.accepted)
        try:
            # What is open stays; one connection goes, and its place may not be taken again.
            resource.prlimit(pod.service.pid, resource.RLIMIT_NOFILE, (3, before[1]))
            assert pod.broker(lambda proxy: proxy.reset()) == 1
            time.sleep(3 * KEEP_ALIVE_SECONDS)
            assert pod.broker(lambda proxy: proxy.counts.accepted) == accepted
            assert pod.service.running
        finally:
            resource.prlimit(pod.service.pid, resource.RLIMIT_NOFILE, before)
        pod.service.wait_ready()
        assert pod.total("disconnects_total", reason="connect") > 0
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["resumed"] == 1


def test_a_starved_service_keeps_its_connection_and_its_promises(make_stage: MakeStage) -> None:
    """It gets a tenth of a processor, in slices, as a container above its quota does."""
    stage = make_stage().start()
    pod = stage.pod
    lag = 0.0
    with stage.traffic(rate=100):
        pod.wait_more(50, DURABLE)
        with starved(pod):
            deadline = time.monotonic() + 4 * KEEP_ALIVE_SECONDS
            while time.monotonic() < deadline:
                lag = max(lag, pod.total("loop_lag_seconds"))
                time.sleep(0.1)
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert lag > 0.1
    assert pod.wire.counts["connections"] == 1


class starved:  # noqa: N801 - reads as what it does
    """Stop a service for nine tenths of the time, until the context is left."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="starve")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self._pod.service.signal(signal.SIGSTOP)
            time.sleep(0.27)
            self._pod.service.signal(signal.SIGCONT)
            time.sleep(0.03)


# ------------------------------------------------------------------ names and clock


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[Shim]:
    if Shim.compiler() is None:
        pytest.skip("no C compiler: names and clocks of a process cannot be bent")
    with Shim(tmp_path) as shim:
        yield shim


@pytest.mark.parametrize("names", ["gone", pytest.param("slow", marks=pytest.mark.slow)])
def test_names_that_are_gone_or_slow_hold_nothing_up(
    make_stage: MakeStage, shim: Shim, names: str
) -> None:
    stage = make_stage(pods=0)
    pod = stage.add_pod(broker_host=NAME, environment=shim.environment)
    stage.start()
    gone = names == "gone"
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        # Slow: longer than a connection may take altogether.
        shim.names(gone=gone, seconds=0 if gone else 4)
        before = shim.look_ups
        pod.broker(lambda proxy: proxy.reset())
        reason = "connect" if gone else "connect_timeout"
        pod.wait_total(2, "disconnects_total", reason=reason)
        assert shim.look_ups >= before + 2
        assert pod.service.live()
        assert pod.service.ready_reasons() == {"not_subscribed"}
        shim.names()
        pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
        # And nobody waits for a name to end.
        shim.names(seconds=30)
        looked = shim.look_ups
        pod.broker(lambda proxy: proxy.reset())
        pod.service.wait_until(lambda: shim.look_ups > looked, "a name is looked up")
        assert pod.service.terminate() == 0
        shim.names()
        pod.start()
        pod.service.wait_ready()
    verdict = stage.settle()
    assert verdict.excused == 0


def test_a_clock_that_is_ten_minutes_wrong_and_steps_costs_nothing(
    make_stage: MakeStage, shim: Shim
) -> None:
    """Ahead at the start, then behind, then right; poison of time would be judged wrongly, so none.

    Updates without a time of their own get the service's: these never go back within a process.
    """
    stage = make_stage(pods=0)
    pod = stage.add_pod(broker_host=NAME, environment=shim.environment)
    shim.step_clock(600)
    pod.start()
    pod.service.wait_reasons({"clock_skew"})
    timeless = stage.publisher()
    stage.publishers.remove(timeless)  # what becomes of its messages is asserted here
    device = f"{stage.name}-timeless"

    def say(number: int) -> None:
        payload = b'{"state":{"reported":{"n":%d}}}' % number
        timeless.raw(timeless.topic(device), payload)
        timeless.wait_answered()
        pod.service.wait_until(lambda: heard() == [str(number)], f"{number} is there")

    def heard() -> list[str]:
        (rows,) = stage.witness._read([device])
        return [row.value for row in rows if row.path == "/n"]

    with stage.traffic(poison=0):
        pod.wait_more(50, DURABLE)
        assert pod.total("clock_offset_seconds") > 590
        say(1)
        for number, ahead_seconds in enumerate((-600, 600, -600), 2):
            shim.step_clock(ahead_seconds)
            pod.wait_more(20, DURABLE)
            say(number)
        pod.service.wait_until(
            lambda: pod.total("clock_offset_seconds") < -590, "it has seen the step"
        )
        assert pod.service.ready_reasons() == {"clock_skew"}
        assert pod.service.live()
        shim.step_clock(0)
        pod.service.wait_ready()
        say(5)
        pod.wait_more(50, DURABLE)
    assert pod.total("updates_without_device_time_total") == 5
    told = [one for one in pod.service.events("cassandra driver") if "Clock" in str(one)]
    assert len(told) < 10, "the driver says it once a second, the log every ten"
    verdict = stage.settle()
    assert verdict.excused == 0
    assert verdict.dead_letters == 0
    assert pod.wire.counts["connections"] == 1
