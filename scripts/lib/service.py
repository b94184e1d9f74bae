"""The service as the demo runs it: a process with settings, its probes and its metrics.

Lives here: environment, start, kill, readiness, and figures from /metrics that survive a restart.
Rules: what we start ends with us, by its process id; a failure quotes the end of the service's log.
Must not come in: what is shown and what is compared.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

from prometheus_client.parser import text_string_to_metric_families

from backing import free_port
from backing.errors import BackingError
from backing.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from backing import Broker, Database

__all__ = ["Figures", "Service", "ServiceError", "environment"]

_COMMAND = (sys.executable, "-m", "shadowsvc")
_MIGRATE_SECONDS = 180
_REQUEST_SECONDS = 2
_STOP_SECONDS = 40
_QUOTED_LINES = 25


class ServiceError(Exception):
    """The service did not do what the demo needs; the message holds the end of its log."""


def environment(broker: Broker, database: Database, *, name: str, keyspace: str) -> dict[str, str]:
    """Return the settings of a service that uses `broker` and `database`, as variables.

    Args:
        broker: started.
        database: started.
        name: of this run: the share group, and the client id's beginning.
        keyspace: in Cassandra.
    """
    url = urlsplit(broker.url)
    variables = {
        "MQTT__URL": f"{url.scheme}://{url.hostname}:{url.port or broker.port}",
        "MQTT__CLIENT_ID": f"{name}-0",
        "MQTT__SHARE_GROUP": name,
        # Long enough for any restart; a broker that is not ours forgets us afterwards.
        "MQTT__SESSION_EXPIRY_SECONDS": "600",
        "CASSANDRA__CONTACT_POINTS": ",".join(database.contact_points),
        "CASSANDRA__PORT": str(database.port),
        "CASSANDRA__LOCAL_DC": database.dc,
        "CASSANDRA__KEYSPACE": keyspace,
        "HTTP__HOST": "127.0.0.1",
        "HTTP__PORT": str(free_port()),
        "LOG__FORMAT": "json",
        # All bad documents are to be found again.
        "DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE": "1000000",
    }
    if url.username:
        variables["MQTT__USERNAME"] = unquote(url.username)
    if url.password:
        variables["MQTT__PASSWORD"] = unquote(url.password)
    return {f"SHADOWSVC_{name}": value for name, value in variables.items()}


@dataclass(slots=True)
class Figures:
    """What /metrics says, added up over all lives of the process since the start."""

    counters: Counter[str] = field(default_factory=Counter)
    """Counters by name, over all labels; histogram buckets by (name, upper bound)."""
    gauges: dict[str, float] = field(default_factory=dict)
    """Gauges of now."""
    buckets: dict[str, Counter[float]] = field(default_factory=dict)
    """By histogram: cumulative counts by upper bound."""

    def quantile(self, name: str, share: float, before: Figures | None = None) -> float | None:
        """Return an upper bound of the quantile in seconds; None without values.

        Args:
            name: the histogram's.
            share: 0 to 1.
            before: count only what came after this.
        """
        bounds = Counter(self.buckets.get(name, {}))
        if before is not None:
            bounds.subtract(before.buckets.get(name, {}))
        ordered = sorted(bounds.items())
        if not ordered or ordered[-1][1] <= 0:
            return None
        wanted = share * ordered[-1][1]
        lower, below = 0.0, 0.0
        for bound, count in ordered:
            if count >= wanted:
                if bound == float("inf"):
                    return lower
                # Even within a bucket, as Prometheus's histogram_quantile does.
                inside = (wanted - below) / ((count - below) or 1)
                return lower + (bound - lower) * inside
            lower, below = bound, count
        return None


class Service:
    """The service's process; a context manager that ends it."""

    def __init__(self, variables: Mapping[str, str], folder: Path) -> None:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("SHADOWSVC_")
        }
        self.variables = dict(variables)
        self._environment = {**inherited, **variables}
        self._process = ServerProcess(
            "shadowsvc",
            [*_COMMAND, "run"],
            log_path=folder / "shadowsvc.log",
            env=self._environment,
        )
        self.address = f"http://127.0.0.1:{variables['SHADOWSVC_HTTP__PORT']}"
        self.kills = 0
        self._given_up = False
        self._past = Figures()
        self._latest = Figures()

    @property
    def log_path(self) -> Path:
        """Log of all lives."""
        return self._process.log_path

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process.running

    def __enter__(self) -> Self:
        """Nothing yet: `start` starts."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, gracefully if it takes less than 40 s."""
        self._process.stop(_STOP_SECONDS)

    def migrate(self) -> str:
        """Run `shadowsvc migrate`; return what it said.

        Raises:
            ServiceError: it failed, or took more than 3 minutes.
        """
        try:
            done = subprocess.run(
                [*_COMMAND, "migrate"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_MIGRATE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ServiceError(f"shadowsvc migrate took over {_MIGRATE_SECONDS} s") from None
        if done.returncode:
            output = "\n".join((done.stdout + done.stderr).splitlines()[-_QUOTED_LINES:])
            raise ServiceError(f"shadowsvc migrate ended with {done.returncode}:\n{output}")
        return done.stdout.strip()

    def start(self, limit_seconds: float = 60) -> None:
        """Start and wait until /readyz says yes.

        Raises:
            ServiceError: it ended, or is not ready within `limit_seconds`.
        """
        deadline = time.monotonic() + limit_seconds
        try:
            self._process.start()
        except BackingError as error:
            raise ServiceError(str(error)) from error
        reasons = "no answer"
        while True:
            self.check()
            if self._given_up:
                raise ServiceError("nobody waits any more for the service")
            try:
                with self._get("readyz"):
                    return
            except urllib.error.HTTPError as error:
                with error:
                    reasons = error.read().decode(errors="replace").strip()
            except OSError:
                pass
            if time.monotonic() > deadline:
                waited = f"within {limit_seconds:g} s"
                raise ServiceError(f"the service is not ready {waited}: {reasons}{self.log_tail()}")
            time.sleep(0.1)

    def give_up(self) -> None:
        """Let a `start` that waits in another thread fail."""
        self._given_up = True

    def check(self) -> None:
        """Do nothing, while the process runs.

        Raises:
            ServiceError: it has ended.
        """
        if not self._process.running:
            raise ServiceError(f"the service has ended{self.log_tail()}")

    def kill(self) -> None:
        """Kill -9."""
        self._process.kill()
        self.kills += 1

    def log_tail(self) -> str:
        """Return the end of the log with a heading."""
        return self._process.log_tail()

    def figures(self) -> Figures | None:
        """Ask /metrics; None when nobody answers, as while the service starts."""
        try:
            with self._get("metrics") as page:
                now = _parse(page.read().decode())
        except OSError:
            return None
        name = "shadowsvc_messages_received"
        if now.counters[name] < self._latest.counters[name]:  # a new life
            self._past = _sum(self._past, self._latest)
        self._latest = now
        return _sum(self._past, now)

    def _get(self, path: str) -> Any:
        return urllib.request.urlopen(f"{self.address}/{path}", timeout=_REQUEST_SECONDS)  # noqa: S310 - ours

    def readiness(self) -> str:
        """Return what /readyz says now, for messages."""
        try:
            with self._get("readyz") as page:
                return str(json.loads(page.read()))
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode(errors="replace").strip()
        except (OSError, ValueError) as error:
            return str(error)


def _parse(text: str) -> Figures:
    figures = Figures()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.type == "counter" and sample.name.endswith("_total"):
                figures.counters[family.name] += sample.value  # type: ignore[assignment]
            elif family.type == "gauge":
                figures.gauges[family.name] = sample.value
            elif family.type == "histogram" and sample.name.endswith("_bucket"):
                bucket = figures.buckets.setdefault(family.name, Counter())
                bucket[float(sample.labels["le"])] += int(sample.value)
    return figures


def _sum(past: Figures, now: Figures) -> Figures:
    names = dict.fromkeys(itertools.chain(past.buckets, now.buckets))
    return Figures(
        counters=past.counters + now.counters,
        gauges=now.gauges,
        buckets={
            name: past.buckets.get(name, Counter()) + now.buckets.get(name, Counter())
            for name in names
        },
    )
