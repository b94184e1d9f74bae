"""What a demo and a soak begin and end alike: servers, the service, a session to read rows by.

Lives here: in which order they are started, and the folder that is kept when something went wrong.
Rules: all that is started ends with the context; the service's log stays when a run failed. Must
not come in: what is published, shown and judged.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from service import Service, ServiceError, environment

import backing
from shadowsvc.config import load
from shadowsvc.errors import ConfigError, ShadowsvcError
from shadowsvc.store import driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shadowsvc.config import Settings

__all__ = ["READ_LIMIT_SECONDS", "Staged", "carry_out", "keyspace_mistakes", "staged"]

READ_LIMIT_SECONDS: Final = 20.0
"""Of one request that reads rows back."""

_INTERRUPTED: Final = 130


class Staged(NamedTuple):
    """Everything of one run; the service is ready."""

    broker: backing.Broker
    database: backing.Database
    settings: Settings
    service: Service
    session: Any
    """Of cassandra-driver, in the keyspace."""


def carry_out(
    what: str, run: Callable[[Path], bool], tell: Callable[[str], None], interrupted: str
) -> int:
    """Call `run` with a folder of its own; return the exit code: 0 when it returns true.

    Args:
        what: is carried out.
        run: raises `ServiceError`, `BackingError` or `ShadowsvcError` when it fails.
        tell: says something to people.
        interrupted: what to say after Ctrl-C; the exit code is 130 then.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"shadowsvc-{what}-"))
    failed = True
    try:
        failed = not run(folder)
    except KeyboardInterrupt:
        tell(f"\n{interrupted}")
        failed = False
        return _INTERRUPTED
    except (ServiceError, backing.BackingError, ShadowsvcError) as error:
        tell(f"\nthe {what} failed: {error}")
    finally:
        log = folder / "shadowsvc.log"
        if failed and log.exists():
            tell(f"the service's log is kept: {log}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


@contextlib.contextmanager
def staged(name: str, keyspace: str, folder: Path, tell: Callable[[str], None]) -> Iterator[Staged]:
    """Start broker, Cassandra and service.

    Args:
        name: of this run, as of `service.environment`.
        keyspace: in Cassandra; it is migrated.
        folder: for the service's log.
        tell: says something to people.
    """
    tell(backing.describe())
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        broker = stack.enter_context(backing.broker(persistent=False))
        tell(f"broker: {broker.host}:{broker.port}; starting Cassandra …")
        database = stack.enter_context(backing.database())
        took = time.monotonic() - started
        points = ",".join(database.contact_points)
        tell(f"Cassandra: {points} port {database.port}, after {took:.0f} s")
        variables = environment(broker, database, name=name, keyspace=keyspace)
        settings = load(variables)
        service = stack.enter_context(Service(variables, folder))
        service.migrate()
        service.start()
        tell(f"service: ready, {service.address}/metrics, pid {service.pid}")
        session = stack.enter_context(
            driver.connected(
                settings.cassandra,
                keyspace=settings.cassandra.keyspace,
                request_timeout_seconds=READ_LIMIT_SECONDS,
            )
        ).session
        yield Staged(broker, database, settings, service, session)


def keyspace_mistakes(keyspace: str) -> list[str]:
    """Return what is wrong with the name of a keyspace, one line for each mistake."""
    try:
        load({"SHADOWSVC_CASSANDRA__KEYSPACE": keyspace})
    except ConfigError as error:
        return list(error.mistakes)
    return []
