"""The service in a process of its own, as the tests start, watch and end it.

Lives here: its environment, signals, exit code, probes and parsed metrics. Rules: every wait has a
limit, and what it reports holds the reasons of /readyz and the end of the log; the process ends
with the test, and with the test's own process. Must not come in: what is published and what has
to come of it (`tests.oracle`).
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

from prometheus_client.parser import text_string_to_metric_families

import shadowsvc
from backing.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from subprocess import Popen
    from types import TracebackType

    from prometheus_client.samples import Sample

    import backing

__all__ = [
    "COMMAND",
    "Figures",
    "Page",
    "ServiceProcess",
    "environment",
    "run_command",
    "variables",
]

COMMAND = (sys.executable, "-m", "shadowsvc")
START_SECONDS = 40.0
STOP_SECONDS = 40.0
_POLL_SECONDS = 0.05
_REQUEST_SECONDS = 5.0


def variables(
    broker: backing.Broker, database: backing.Database, keyspace: str, name: str, **more: object
) -> dict[str, str]:
    """Return the settings of a service with a session, a group and topics of its own.

    Args:
        broker: where to.
        database: likewise.
        keyspace: in the database.
        name: client id, share group and topic prefix.
        more: further settings without their prefix, for example `MQTT__RECEIVE_MAXIMUM=10`.
    """
    url = urlsplit(broker.url)
    settings: dict[str, object] = {
        "MQTT__URL": f"{url.scheme}://{url.hostname}:{url.port or broker.port}",
        "MQTT__CLIENT_ID": name,
        "MQTT__SHARE_GROUP": name,
        "MQTT__TOPIC_PREFIX": name,
        "MQTT__SESSION_EXPIRY_SECONDS": 600,
        "MQTT__RECONNECT_MAX_SECONDS": 0.5,
        "CASSANDRA__CONTACT_POINTS": ",".join(database.contact_points),
        "CASSANDRA__PORT": database.port,
        "CASSANDRA__LOCAL_DC": database.dc,
        "CASSANDRA__KEYSPACE": keyspace,
        "CASSANDRA__REPLICATION": 1,
        "CASSANDRA__RETRY_MAX_SECONDS": 0.5,
        "HTTP__HOST": "127.0.0.1",
        "HTTP__PORT": 0,
        "LOG__FORMAT": "json",
    }
    if url.username:
        settings["MQTT__USERNAME"] = unquote(url.username)
    if url.password:
        settings["MQTT__PASSWORD"] = unquote(url.password)
    return {f"SHADOWSVC_{key}": str(value) for key, value in (settings | more).items()}


def run_command(
    settings: Mapping[str, str], *arguments: str, limit_seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a `shadowsvc` command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_seconds,
        check=False,
    )


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a process with these settings, and no other settings of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHADOWSVC_")}
    # The tests may run from a source tree that is not installed.
    return {**kept, "PYTHONPATH": str(Path(shadowsvc.__file__).parents[1]), **settings}


class Page(NamedTuple):
    """An answer of the service's HTTP server."""

    status: int
    content_type: str
    body: str


class Figures:
    """What /metrics said at one moment."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = list(samples)

    def total(self, name: str, **labels: str) -> float:
        """Add up the samples of this name (without `shadowsvc_`) that have these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == f"shadowsvc_{name}"
            and all(sample.labels.get(label) == value for label, value in labels.items())
        )

    def since(self, before: Figures, name: str, **labels: str) -> float:
        """Return by how much `total` grew."""
        return self.total(name, **labels) - before.total(name, **labels)


class ServiceProcess:
    """One `shadowsvc run`, which may be started again after its end; a context manager.

    Leaving the context fails when the service logged a defect of its own: an event with a
    traceback, a critical one, or a line that is no event at all.
    """

    def __init__(self, settings: Mapping[str, str], log_path: Path) -> None:
        self.settings = dict(settings)
        self.log_path = log_path
        self.port = 0
        self._server = ServerProcess(
            "shadowsvc", [*COMMAND, "run"], log_path=log_path, env=environment(settings)
        )
        self._popen: Popen[bytes] | None = None
        self._lives: list[int] = []

    # ---------------------------------------------------------------- life

    def start(self) -> None:
        """Start the process; wait for nothing."""
        self._lives.append(self.log_path.stat().st_size if self.log_path.exists() else 0)
        self.port = 0
        self._server.start()
        self._popen = self._server._live()

    def wait_started(self, limit_seconds: float = START_SECONDS) -> None:
        """Wait until it serves HTTP; its first event says on which port."""

        def listens() -> bool:
            first = next(iter(self.events(this_life=True)), None)
            self.port = 0 if first is None else first["http_port"]
            return self.port != 0

        self.wait_until(listens, "it serves HTTP", limit_seconds)

    def wait_ready(self, limit_seconds: float = START_SECONDS) -> None:
        """Wait until /readyz says yes."""
        if not self.port:
            self.wait_started(limit_seconds)
        self.wait_until(lambda: not self.ready_reasons(), "it is ready", limit_seconds)

    def wait_reasons(self, wanted: set[str], limit_seconds: float = START_SECONDS) -> None:
        """Wait until /readyz gives exactly these reasons."""
        if not self.port:
            self.wait_started(limit_seconds)
        what = f"/readyz gives {sorted(wanted)}"
        self.wait_until(lambda: self.ready_reasons() == wanted, what, limit_seconds)

    def wait_until(
        self, condition: Callable[[], bool], what: str, limit_seconds: float = 30
    ) -> None:
        """Wait until `condition` is true, while the process runs; else fail with `what`."""
        deadline = time.monotonic() + limit_seconds
        while not condition():
            if not self._server.running:
                code = None if self._popen is None else self._popen.returncode
                raise AssertionError(f"waiting until {what}: ended with {code}{self.log_tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not within {limit_seconds:g} s: {what}; /readyz: "
                    f"{self._page_or_error('/readyz')}{self.log_tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def wait_exit(self, limit_seconds: float = STOP_SECONDS) -> int:
        """Wait until the process has ended; return its exit code (minus a signal's number)."""
        assert self._popen is not None, "it was never started"
        try:
            return self._popen.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            limit = f"{limit_seconds:g} s"
            raise AssertionError(f"it has not ended after {limit}{self.log_tail()}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._server.signal(number)

    def terminate(self, limit_seconds: float = STOP_SECONDS) -> int:
        """Send SIGTERM and wait for the end; return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_exit(limit_seconds)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self._server.kill()

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing is read."""
        self._server.pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self._server.resume()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._server.pid

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._server.running

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it; look at its log unless something failed already."""
        if kind is not None:
            self._server.kill()
            return
        self._server.stop(STOP_SECONDS)
        defects = self.defects()
        assert not defects, "the service logged defects:\n" + "\n".join(defects)

    # ---------------------------------------------------------------- what it says

    def get(self, path: str, accept: str = "*/*") -> Page:
        """Ask its HTTP server."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_REQUEST_SECONDS)
        try:
            connection.request("GET", path, headers={"Accept": accept})
            answer = connection.getresponse()
            body = answer.read().decode()
            return Page(answer.status, answer.getheader("Content-Type", ""), body)
        finally:
            connection.close()

    def ready_reasons(self) -> set[str]:
        """Return the names of all reasons not to be ready; none when it is."""
        page = self.get("/readyz")
        answer = json.loads(page.body)
        assert (page.status == http.HTTPStatus.OK) is answer["ready"], page
        return {reason["reason"] for reason in answer["reasons"]}

    def live(self) -> bool:
        """Whether /livez says yes."""
        return self.get("/livez").status == http.HTTPStatus.OK

    def metrics(self) -> Figures:
        """Ask /metrics."""
        families = text_string_to_metric_families(self.get("/metrics").body)
        return Figures(sample for family in families for sample in family.samples)

    def events(self, name: str | None = None, *, this_life: bool = False) -> list[dict[str, Any]]:
        """Return what it logged, lines that are no events left out."""
        found = []
        for line in self._lines(this_life=this_life):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if name is None or event["event"] == name:
                found.append(event)
        return found

    def defects(self) -> list[str]:
        """Return the lines of the log that no fault from outside explains."""
        found = []
        for line in self._lines():
            try:
                event = json.loads(line)
            except ValueError:
                found.append(line)
                continue
            # cassandra-driver tells an outage with a traceback.
            of_a_driver = event.get("logger", "").startswith("cassandra.")
            if ("exception" in event and not of_a_driver) or event["level"] == "critical":
                found.append(line)
        return found

    def log_tail(self) -> str:
        """Return the end of the log, for messages."""
        return self._server.log_tail()

    def _lines(self, *, this_life: bool = False) -> list[str]:
        if not self._lives:
            return []
        log = self.log_path.read_bytes()
        found: list[str] = []
        for start, end in zip(self._lives, [*self._lives[1:], len(log)], strict=True):
            if this_life and start != self._lives[-1]:
                continue
            # A kill may have cut the last line of a life, and that of the present one may grow.
            text = log[start:end].decode(errors="replace")
            lines = text[: text.rfind("\n") + 1].splitlines()
            found += [line for line in lines if line.strip()]
        return found

    def _page_or_error(self, path: str) -> str:
        try:
            return self.get(path).body if self.port else "no port yet"
        except OSError as error:
            return str(error)
