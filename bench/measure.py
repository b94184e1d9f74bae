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
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from cassandra.concurrent import execute_concurrent_with_args

from backing import Cassandra, CassandraCluster, Mosquitto
from backing.process import ServerProcess
from bench.services import PROGRAMS, Command, Place, Service, shadowsvc

_CONNECT_SECONDS = 60.0
_SETTLE_SECONDS = 1.0
_DRAIN_SECONDS = 60.0
_STOP_SECONDS = 30.0
_DEVICES = 20_000
_LEAVES = 4
_STEP = 7919  # as in loadgen/publisher.go
_READ_LIMIT_SECONDS = 60.0
_READ_CONCURRENCY = 64

Database = Cassandra | CassandraCluster


class BenchError(Exception):
    """A run that cannot be counted; the message says why and where the log is."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one run does, in order: saturation (if `saturate_seconds`), then the fixed rate.

    `rate_share` puts a share of what saturation carried in place of `rate`. `devices` is no
    multiple of 7919; `text_bytes` is the size of one leaf that is a text, 0: the usual one. `pods`
    processes of the service share the subscription; `replication` is Cassandra's, as shadowsvc
    writes it.
    """

    saturate_warm_seconds: float
    saturate_seconds: float
    rate: float
    rate_warm_seconds: float
    rate_seconds: float
    window: int
    connections: int
    rate_share: float = 0.0
    devices: int = _DEVICES
    leaves: int = _LEAVES
    text_bytes: int = 0
    pods: int = 1
    replication: str = ""


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
    mean_ms: float = 0.0
    late_p99_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of one service showed; `held` is the most that it had unacknowledged.

    With several pods `rss_mb` is the sum of their peaks.
    """

    service: str
    round: int
    phases: Mapping[str, Phase]
    rss_mb: float
    published: int
    durable: int
    held: int
    missing: int


def run(service: Service, round_: int, load: Load, cassandra: Database, logs: Path) -> Run:
    """Measure `service` once on a fresh broker and a fresh keyspace.

    Raises:
        BenchError: it did not start, did not subscribe, or lost updates.
        BackingError: a server did not start.
    """
    name = f"bench_{os.getpid()}_{service.name.replace('-', '_')}_{round_}"
    log = logs / f"{service.name}-{round_}.log"
    log.unlink(missing_ok=True)
    address = f"{cassandra.contact_points[0]}:{cassandra.port}"
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Mosquitto())
        loadgen = stack.enter_context(Loadgen(service, broker, address, load, log))
        place = Place(
            loadgen.mqtt, loadgen.cassandra, cassandra.dc, name, name, replication=load.replication
        )
        stack.enter_context(table(cassandra, replace(place, cassandra=address), log))
        process = stack.enter_context(started(service, place, log, load.pods))
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
            phases["saturation"] = phase(loadgen, command, processes)
            loadgen.drain(process)
        if load.rate_seconds:
            rate = load.rate
            if load.rate_share and "saturation" in phases:
                rate = load.rate_share * phases["saturation"].updates_per_second
            command = f"rate {rate:g} {load.rate_warm_seconds:g} {load.rate_seconds:g}"
            phases["rate"] = phase(loadgen, command, processes)
        drained = loadgen.drain(process)
        rss_mb = process.peak_bytes() / 1e6
        lacking = missing(cassandra, name, drained["published"], load.devices)
        if lacking:
            raise BenchError(f"{service.name}: {lacking} devices lack their last update; see {log}")
        return Run(
            service=service.name,
            round=round_,
            phases=phases,
            rss_mb=rss_mb,
            published=drained["published"],
            durable=drained["durable"],
            held=drained["held"],
            missing=lacking,
        )


class Loadgen:
    """The load generator: commands to its standard input, facts from its standard output.

    `options` are further options of it, see loadgen/main.go.
    """

    def __init__(
        self,
        service: Service,
        broker: Mosquitto,
        cassandra: str,
        load: Load,
        log: Path,
        options: Sequence[str] = (),
    ) -> None:
        self._argv = [
            str(PROGRAMS / "loadgen"),
            f"-broker={broker.host}:{broker.port}",
            f"-window={load.window}",
            f"-connections={load.connections}",
            f"-devices={load.devices}",
            *options,
        ]
        if (load.leaves, load.text_bytes) != (_LEAVES, 0):
            self._argv += [f"-leaves={load.leaves}", f"-text-bytes={load.text_bytes}"]
        if load.pods > 1:
            self._argv.append(f"-services={load.pods}")
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
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
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
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a command that nobody read
                    pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    def send(self, command: str) -> None:
        """Give a command."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def interrupt(self) -> None:
        """End what is being published; it tells of it as if the time were over."""
        self._process.send_signal(signal.SIGINT)

    def wait(
        self,
        wanted: str,
        limit_seconds: float,
        process: "Pods | None" = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Return the next event, which must be `wanted`; what is on the way goes to `progress`."""
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
            if event["event"] == "progress":
                if progress is not None:
                    progress(event)
                continue
            if event["event"] != wanted:
                raise BenchError(f"the load generator is {event} instead of {wanted}: {self._log}")
            return event

    def drain(self, process: "Pods", limit_seconds: float = _DRAIN_SECONDS) -> dict[str, Any]:
        """Wait until everything is durable; raises BenchError if it is not in time."""
        self.send(f"drain {limit_seconds:g}")
        drained = self.wait("drained", limit_seconds + 5, process)
        if drained["durable"] < drained["published"]:
            raise BenchError(f"{process.name}: not everything became durable: {drained}")
        return drained

    def cpu_seconds(self) -> float:
        """CPU of the load generator since its start."""
        return _cpu_seconds(self._process.pid)


class Pods:
    """The processes of one service, as one."""

    def __init__(self, name: str, processes: Sequence[ServerProcess]) -> None:
        self.name = name
        self.processes = tuple(processes)

    @property
    def running(self) -> bool:
        """Whether all run."""
        return all(process.running for process in self.processes)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of those that run."""
        return tuple(process.pid for process in self.processes if process.running)

    def log_tail(self) -> str:
        """Return the end of the log that they share."""
        return self.processes[0].log_tail()

    def cpu_seconds(self) -> float:
        """CPU of all since each start."""
        return sum(process.cpu_seconds() for process in self.processes)

    def peak_bytes(self) -> int:
        """Return the sum of the peaks of memory (`VmHWM`)."""
        return sum(peak_bytes(process.pid) for process in self.processes)

    def stop(self) -> None:
        """Stop all, in good order."""
        for process in self.processes:
            process.stop(_STOP_SECONDS)

    def start(self) -> None:
        """Start all, again or for the first time."""
        for process in self.processes:
            process.start()


def phase(loadgen: Loadgen, command: str, processes: Mapping[str, Any]) -> Phase:
    """Let the load generator measure one window; `processes` use the CPU that is counted."""
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
        mean_ms=end.get("mean_ms", 0.0),
        late_p99_ms=end.get("late_p99_ms", 0.0),
        **{name: seconds / updates * 1e6 for name, seconds in used.items()},
    )


@contextlib.contextmanager
def started(service: Service, place: Place, log: Path, pods: int = 1) -> Iterator[Pods]:
    """Run so many processes of a service; each has a client id of its own."""
    commands = [service.command(place)]
    if pods > 1:
        names = [f"{place.name}_{number}" for number in range(pods)]
        commands = [service.command(replace(place, client=name)) for name in names]
    both = Pods(service.name, [_process(service.name, command, log) for command in commands])
    try:
        both.start()
        yield both
    finally:
        both.stop()


def _process(name: str, command: Command, log: Path) -> ServerProcess:
    return ServerProcess(name, command.argv, log_path=log, env={**os.environ, **command.env})


@contextlib.contextmanager
def table(cassandra: Database, place: Place, log: Path) -> Iterator[None]:
    """Make the keyspace and its tables; they are dropped at the end."""
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


def missing(cassandra: Database, keyspace: str, published: int, devices: int = _DEVICES) -> int:
    """Count the devices whose last update is not in the table: leaf `/volume` is its number.

    Of more than 20,000 devices those are looked at that were published to last.
    """
    last: dict[str, str] = {}
    for sequence in range(max(0, published - min(devices, _DEVICES)), published):
        last[f"device-{sequence * _STEP % devices:05d}"] = str(sequence)
    query = f"SELECT device, path, value FROM {keyspace}.shadow"  # noqa: S608 - our own name
    with cassandra.session() as session:
        session.default_fetch_size = 5000
        if devices <= _DEVICES:
            rows = session.execute(query, timeout=_READ_LIMIT_SECONDS)
            found = {device: value for device, path, value in rows if path == "/volume"}
        else:
            select = session.prepare(f"{query} WHERE device = ?")
            results = execute_concurrent_with_args(
                session, select, [(device,) for device in last], concurrency=_READ_CONCURRENCY
            )
            found = {
                device: value
                for _, of_one in results
                for device, path, value in of_one
                if path == "/volume"
            }
    return sum(found.get(device) != value for device, value in last.items())


def _busy_seconds() -> float:
    # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; of all cores together.
    ticks = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _cpu_seconds(pid: int) -> float:
    # proc(5): the command in parentheses may hold anything, so count from the last ')'.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes(pid: int) -> int:
    """Return the peak of a process's memory since its start."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"/proc/{pid}/status has no VmHWM")
