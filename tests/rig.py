"""A service with a proxy before its broker and one before its Cassandra, and an oracle.

Lives here: `Rig`, and `Pings`, which counts what keeps a connection alive. Rules: times are scaled,
with a keep-alive of two seconds and retries and reconnects after half a second at most. Must not
come in: faults (the tests), a witness of the wire (`tests.faults`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from backing import Direction
from tests.oracle import Oracle
from tests.proxied import Proxied
from tests.service import ServiceProcess, variables
from tests.serving import through

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing

__all__ = ["RECEIVE_MAXIMUM", "SCALED", "Pings", "Rig", "rigged"]

RECEIVE_MAXIMUM = 50
SCALED = {
    "MQTT__KEEP_ALIVE_SECONDS": 2,
    "MQTT__CONNECT_TIMEOUT_SECONDS": 3,
    "MQTT__RECEIVE_MAXIMUM": RECEIVE_MAXIMUM,
    "CASSANDRA__REQUEST_TIMEOUT_SECONDS": 1,
    "DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE": 1_000_000,
}
_PINGREQ = b"\xc0\x00"


class Pings:
    """How many pings went through a proxy: hand in `tap`."""

    def __init__(self) -> None:
        self.count = 0

    def tap(self, direction: Direction, data: bytes) -> None:
        """Look at what passes."""
        if direction is Direction.TO_SERVER and _PINGREQ in data:
            self.count += 1


class Rig:
    """What a test drives."""

    def __init__(
        self,
        service: ServiceProcess,
        oracle: Oracle,
        name: str,
        broker_proxy: Proxied,
        cassandra_proxy: Proxied,
        pings: Pings,
    ) -> None:
        self.service = service
        self.oracle = oracle
        self.name = name
        self.broker_proxy = broker_proxy
        self.cassandra_proxy = cassandra_proxy
        self._pings = pings

    @property
    def pings(self) -> int:
        """How many pings the service has sent."""
        return self._pings.count

    def publish(self, count: int) -> None:
        """Publish updates of a few devices and wait until the broker has them."""
        for number in range(count):
            state = {"n": number, f"of-{number % 3}": number}
            self.oracle.update(f"{self.name}-{number % 20}", {"reported": state})
        self.oracle.wait_taken()

    def wait_total(self, count: float, name: str, **labels: str) -> None:
        """Wait until the total of a figure is at least `count`."""
        self.service.wait_until(
            lambda: self.service.metrics().total(name, **labels) >= count,
            f"{name} {labels} is {count}",
        )


@contextmanager
def rigged(
    broker: backing.Broker,
    cassandra: backing.Database,
    keyspace: str,
    name: str,
    folder: Path,
    **more: object,
) -> Iterator[Rig]:
    """Make a rig whose service was not started yet, and whose oracle is not connected."""
    with ExitStack() as stack:
        pings = Pings()
        broker_proxy = stack.enter_context(Proxied(broker.host, broker.port, pings.tap))
        cassandra_proxy = stack.enter_context(Proxied(cassandra.contact_points[0], cassandra.port))
        proxied = {"MQTT__URL": f"mqtt://127.0.0.1:{broker_proxy.port}", **through(cassandra_proxy)}
        settings = variables(broker, cassandra, keyspace, name, **(SCALED | proxied | more))
        session = stack.enter_context(cassandra.session())
        service = ServiceProcess(settings, folder / "service.log")
        oracle = Oracle(broker, session, keyspace, name)
        yield Rig(service, oracle, name, broker_proxy, cassandra_proxy, pings)
