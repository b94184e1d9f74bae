"""One service that is ready, and an oracle that publishes to it: how most tests of processes begin.

Lives here: how the two are put together, and the wait until all that was published is durable.
Rules: every wait has a limit; leaving the context ends the service and looks for defects in its
log. Must not come in: faults, and tests that begin in another way.
"""

from __future__ import annotations

import contextlib
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tests.oracle import Oracle
from tests.service import ServiceProcess, variables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing
    from tests.proxied import Proxied

__all__ = ["Serve", "Served", "serving", "settle", "through", "wait_nothing_held"]


class Served(NamedTuple):
    """A service and its oracle."""

    service: ServiceProcess
    oracle: Oracle


class Serve(Protocol):
    """Gives a service that is ready, and its oracle, in a context; for one test alone."""

    def __call__(
        self, broker: backing.Broker | None = None, /, **settings: object
    ) -> contextlib.AbstractContextManager[Served]: ...


@contextmanager
def serving(
    broker: backing.Broker,
    database: backing.Database,
    keyspace: str,
    name: str,
    log_path: Path,
    *,
    session: Any = None,
    **settings: object,
) -> Iterator[Served]:
    """Give a service that is ready, and an oracle.

    Args:
        broker: where to.
        database: likewise.
        keyspace: with the schema.
        name: client id, share group and topic prefix.
        log_path: of the service.
        session: of the oracle; one of its own when None.
        settings: further ones without their prefix, as of `tests.service.variables`.
    """
    with ExitStack() as stack:
        if session is None:
            session = stack.enter_context(database.session())
        oracle = stack.enter_context(Oracle(broker, session, keyspace, name))
        known = variables(broker, database, keyspace, name, **settings)
        service = stack.enter_context(ServiceProcess(known, log_path))
        service.wait_ready()
        yield Served(service, oracle)


def through(cassandra: Proxied) -> dict[str, object]:
    """Return the settings of a service that finds Cassandra behind this proxy."""
    return {"CASSANDRA__CONTACT_POINTS": "127.0.0.1", "CASSANDRA__PORT": cassandra.port}


def settle(service: ServiceProcess, oracle: Oracle, limit_seconds: float = 30) -> None:
    """Wait until all is in Cassandra and nothing is on its way in the service; compare."""
    oracle.wait_taken()
    oracle.wait_right(limit_seconds)
    wait_nothing_held(service)


def wait_nothing_held(service: ServiceProcess, limit_seconds: float = 30) -> None:
    """Wait until the service holds no delivery any more."""
    service.wait_until(
        lambda: service.metrics().total("deliveries_held") == 0,
        "nothing is held any more",
        limit_seconds,
    )
