"""Services that lease their client ids: several of one group, an oracle, and what the table says.

Rules: times are scaled, with a lease of four seconds; orphans are nobody's business unless a test
sets `SLOTS__ORPHAN_AFTER_SECONDS` lower; every wait has a limit. Must not come in: faults.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from tests.oracle import Oracle
from tests.service import ServiceProcess, run_command, variables
from tests.serving import wait_nothing_held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import backing

__all__ = ["LEASE_SECONDS", "Group", "MakeGroup", "client_id", "grouped", "writes"]

LEASE_SECONDS = 4
_SCALED = {
    "MQTT__CLIENT_ID": "",
    "MQTT__KEEP_ALIVE_SECONDS": 2,
    "MQTT__CONNECT_TIMEOUT_SECONDS": 3,
    "CASSANDRA__REQUEST_TIMEOUT_SECONDS": 1,
    "CASSANDRA__CONNECT_TIMEOUT_SECONDS": 2,
    "DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE": 1_000_000,
    "SLOTS__LEASE_SECONDS": LEASE_SECONDS,
    "SLOTS__RENEW_SECONDS": 0.5,
    "SLOTS__ORPHAN_AFTER_SECONDS": 500,
}


class Group:
    """Services of one group, an oracle, and what the table says."""

    def __init__(
        self,
        broker: backing.Broker,
        cassandra: backing.Database,
        keyspace: str,
        session: Any,
        name: str,
        folder: Path,
        more: dict[str, object],
    ) -> None:
        self.name = name
        self.keyspace = keyspace
        self.session = session
        self.oracle = Oracle(broker, session, keyspace, name)
        self.settings = variables(broker, cassandra, keyspace, name, **(_SCALED | more))
        self._folder = folder
        self._made = 0

    def service(self, **more: object) -> ServiceProcess:
        """Make one more."""
        self._made += 1
        settings = {f"SHADOWSVC_{key}": str(value) for key, value in more.items()}
        return ServiceProcess(self.settings | settings, self._folder / f"{self._made}.log")

    def owners(self) -> dict[str, str | None]:
        """Return who has which slot, as the command shows it."""
        done = run_command(self.settings, "slots", "--json")
        assert done.returncode == 0, done.stderr
        return {slot["name"]: slot["owner"] for slot in json.loads(done.stdout)["slots"]}

    def wait_free(self, number: int, limit_seconds: float = 60) -> None:
        """Wait until a lease has ended."""
        deadline = time.monotonic() + limit_seconds
        while True:
            row = self.session.execute(
                f"SELECT lease FROM {self.keyspace}.slot WHERE share_group = %s "  # noqa: S608
                "AND broker = 'default' AND number = %s",
                (self.name, number),
            ).one()
            if row[0] is None:
                return
            assert time.monotonic() < deadline, f"slot {number} does not get free"
            time.sleep(0.1)

    def settle(self, *services: ServiceProcess) -> None:
        """Wait until everything is in Cassandra, and compare."""
        self.oracle.wait_taken()
        self.oracle.wait_right(60)
        for service in services:
            wait_nothing_held(service)


class MakeGroup(Protocol):
    """Makes a group of these settings, in a context; for one test alone."""

    def __call__(self, **settings: object) -> AbstractContextManager[Group]: ...


@contextmanager
def grouped(
    broker: backing.Broker,
    cassandra: backing.Database,
    keyspace: str,
    name: str,
    folder: Path,
    **more: object,
) -> Iterator[Group]:
    """Make a group without services, whose oracle is connected."""
    with cassandra.session() as session:
        group = Group(broker, cassandra, keyspace, session, name, folder, more)
        with group.oracle:
            yield group


def client_id(service: ServiceProcess) -> str:
    """Return the client id of the last slot that it took."""
    return str(service.events("slot taken")[-1]["slot"])


def writes(service: ServiceProcess, more: float) -> Callable[[], bool]:
    """Return the question whether it has written so much more than now."""
    before = service.metrics().total("updates_durable_total")
    return lambda: service.metrics().total("updates_durable_total") >= before + more
