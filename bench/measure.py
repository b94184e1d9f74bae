"""One run of one service: start it on fresh ground, load it, measure it from outside, end it.

What is counted, and where:
- updates and latency in the load generator's tap (loadgen/tap.go), the same for every service;
- CPU in /proc/<pid>/stat (user and system time of all threads), at the two ends of the same window;
- memory in /proc/<pid>/status (`VmHWM`, the peak since the start).

Nothing of the service under test is asked or trusted.
"""

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from backing import Cassandra, Mosquitto
from backing.process import ServerProcess
from bench.services import PROGRAMS, Command, Place, Service, shadowsvc

_CONNECT_SECONDS = 60.0
_SETTLE_SECONDS = 1.0
_DRAIN_SECONDS = 60.0
_STOP_SECONDS = 30.0
_DEVICES = 20_000
_STEP = 7919  # as in loadgen/publisher.go


class BenchError(Exception):
    """A run that cannot be counted; the message says why and where the log is."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one run does, in order: saturation (if `saturate_seconds`), then the fixed rate."""

    saturate_warm_seconds: float
    saturate_seconds: float
    rate: float
    rate_warm_seconds: float
    rate_seconds: float
    window: int
    connections: int


@dataclass(frozen=True, slots=True)
class Phase:
    """What one measured window showed; CPU in µs an update, latency in milliseconds.

    `others_share` is the part of all cores (0 to 1) that went to none of the processes measured.
    """

    updates_per_second: float
    cpu_us: float
    cassandra_cpu_us: float
    broker_cpu_us: float
    loadgen_cpu_us: float
    others_share: float
    p50_ms: float
    p99_ms: float
    p999_ms: float


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of one service showed; `held` is the most that it had unacknowledged."""

    service: str
    round: int
    phases: Mapping[str, Phase]
    rss_mb: float
    published: int
    durable: int
    held: int
    missing: int


def run(service: Service, round_: int, load: Load, cassandra: Cassandra, logs: Path) -> Run:
    """Measure `service` once on a fresh broker and a fresh keyspace.

    Raises:
        BenchError: it did not start, did not subscribe, or lost updates.
        BackingError: a server did not start.
    """
    name = f"bench_{os.getpid()}_{service.name.replace('-', '_')}_{round_}"
    log = logs / f"{service.name}-{round_}.log"
    log.unlink(missing_ok=True)
    address = f"{cassandra.address}:{cassandra.port}"
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Mosquitto())
        loadgen = stack.enter_context(_Loadgen(service, broker, address, load, log))
        place = Place(loadgen.mqtt, loadgen.cassandra, cassandra.dc, name, name)
        stack.enter_context(_table(cassandra, replace(place, cassandra=address), log))
        process = stack.enter_context(_started(service.name, service.command(place), log))
        loadgen.wait("subscribed", _CONNECT_SECONDS, process)
        time.sleep(_SETTLE_SECONDS)
        processes = {
            "cpu_us": process,
            "cassandra_cpu_us": cassandra,
            "broker_cpu_us": broker,
            "loadgen_cpu_us": loadgen,
        }
        phases = {}
        if load.saturate_seconds:
            command = f"saturate {load.saturate_warm_seconds:g} {load.saturate_seconds:g}"
            phases["saturation"] = _phase(loadgen, command, processes)
            loadgen.drain(process)
        if load.rate_seconds:
            command = f"rate {load.rate:g} {load.rate_warm_seconds:g} {load.rate_seconds:g}"
            phases["rate"] = _phase(loadgen, command, processes)
        drained = loadgen.drain(process)
        rss_mb = _peak_bytes(process.pid) / 1e6
        missing = _missing(cassandra, name, drained["published"])
        if missing:
            raise BenchError(f"{service.name}: {missing} devices lack their last update; see {log}")
        return Run(
            service=service.name,
            round=round_,
            phases=phases,
            rss_mb=rss_mb,
            published=drained["published"],
            durable=drained["durable"],
            held=drained["held"],
            missing=missing,
        )


class _Loadgen:
    """The load generator: commands to its standard input, facts from its standard output."""

    def __init__(
        self, service: Service, broker: Mosquitto, cassandra: str, load: Load, log: Path
    ) -> None:
        self._argv = [
            str(PROGRAMS / "loadgen"),
            f"-broker={broker.host}:{broker.port}",
            f"-window={load.window}",
            f"-connections={load.connections}",
            f"-devices={_DEVICES}",
        ]
        if service.acknowledges_early:
            self._argv.append(f"-cassandra={cassandra}")
        self.mqtt = ""
        self.cassandra = cassandra
        self._log = log
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            # Its standard input closes when we end, however we end, and so it ends too.
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            listening = self.wait("listening", _CONNECT_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        self.mqtt = listening["address"]
        self.cassandra = listening.get("cassandra") or self.cassandra
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    def send(self, command: str) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def wait(
        self, wanted: str, limit_seconds: float, process: ServerProcess | None = None
    ) -> dict[str, Any]:
        """Return the next event, which must be `wanted`."""
        deadline = time.monotonic() + limit_seconds
        while True:
            try:
                event = self._events.get(timeout=0.2)
            except queue.Empty:
                if process is not None and not process.running:
                    raise BenchError(f"{process.name} ended{process.log_tail()}") from None
                if time.monotonic() > deadline:
                    tail = process.log_tail() if process else ""
                    limit = f"{limit_seconds:g} s"
                    raise BenchError(f"not {wanted} after {limit}; see {self._log}{tail}") from None
                continue
            if event["event"] != wanted:
                raise BenchError(f"the load generator is {event} instead of {wanted}: {self._log}")
            return event

    def drain(self, process: ServerProcess) -> dict[str, Any]:
        self.send(f"drain {_DRAIN_SECONDS:g}")
        drained = self.wait("drained", _DRAIN_SECONDS + 5, process)
        if drained["durable"] < drained["published"]:
            raise BenchError(f"{process.name}: not everything became durable: {drained}")
        return drained

    def cpu_seconds(self) -> float:
        return _cpu_seconds(self._process.pid)


def _phase(loadgen: _Loadgen, command: str, processes: Mapping[str, Any]) -> Phase:
    loadgen.send(command)
    process = processes["cpu_us"]
    loadgen.wait("start", 600, process)
    busy = _busy_seconds()
    before = {name: each.cpu_seconds() for name, each in processes.items()}
    end = loadgen.wait("end", 600, process)
    used = {name: each.cpu_seconds() - before[name] for name, each in processes.items()}
    others = max(0.0, _busy_seconds() - busy - sum(used.values()))
    updates = end["durable"]
    if not updates:
        raise BenchError(f"{process.name}: no update became durable{process.log_tail()}")
    return Phase(
        updates_per_second=updates / end["seconds"],
        others_share=others / end["seconds"] / (os.cpu_count() or 1),
        p50_ms=end["p50_ms"],
        p99_ms=end["p99_ms"],
        p999_ms=end["p999_ms"],
        **{name: seconds / updates * 1e6 for name, seconds in used.items()},
    )


@contextlib.contextmanager
def _started(name: str, command: Command, log: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(name, command.argv, log_path=log, env={**os.environ, **command.env})
    process.start()
    try:
        yield process
    finally:
        process.stop(_STOP_SECONDS)


@contextlib.contextmanager
def _table(cassandra: Cassandra, place: Place, log: Path) -> Iterator[None]:
    command = shadowsvc(place, "migrate")
    with log.open("ab") as output:
        done = subprocess.run(
            command.argv,
            env={**os.environ, **command.env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=_CONNECT_SECONDS,
            check=False,
        )
    try:
        if done.returncode:
            raise BenchError(f"shadowsvc migrate failed: see {log}")
        yield
    finally:
        with cassandra.session() as session:
            session.execute(f"DROP KEYSPACE IF EXISTS {place.keyspace}", timeout=60)


def _missing(cassandra: Cassandra, keyspace: str, published: int) -> int:
    """Count the devices whose last update is not in the table: leaf `/volume` is its number."""
    last: dict[str, str] = {}
    for sequence in range(max(0, published - _DEVICES), published):
        last[f"device-{sequence * _STEP % _DEVICES:05d}"] = str(sequence)
    with cassandra.session() as session:
        session.default_fetch_size = 5000
        query = f"SELECT device, path, value FROM {keyspace}.shadow"  # noqa: S608 - our own name
        rows = session.execute(query, timeout=60)
        found = {device: value for device, path, value in rows if path == "/volume"}
    return sum(found.get(device) != value for device, value in last.items())


def _busy_seconds() -> float:
    # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; of all cores together.
    ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _cpu_seconds(pid: int) -> float:
    # proc(5): the command in parentheses may hold anything, so count from the last ')'.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"/proc/{pid}/status has no VmHWM")
