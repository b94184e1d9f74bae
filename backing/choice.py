"""Which kind of broker and Cassandra a run gets, and why.

Order: what `SHADOWSVC_BACKING` says; addresses, if they are given; containers, if a
Docker-compatible engine answers; else local processes.
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from backing.addresses import (
    CASSANDRA_VARIABLE,
    MQTT_URL_VARIABLE,
    GivenBroker,
    GivenCassandra,
)
from backing.cassandra import Cassandra
from backing.errors import BackingError
from backing.interface import Broker, Database
from backing.mosquitto import Mosquitto

KIND_VARIABLE = "SHADOWSVC_BACKING"

_DOCKER_SOCKET = Path("/var/run/docker.sock")
_PING_LIMIT_SECONDS = 5


class Kind(StrEnum):
    """Where the servers come from; the value is what `SHADOWSVC_BACKING` takes."""

    ADDRESSES = "addresses"
    CONTAINERS = "containers"
    PROCESSES = "processes"


def choose() -> Kind:
    """Return the kind that this environment asks for or allows.

    Raises:
        BackingError: a variable has a bad value, or what it asks for is not there.
    """
    return _choose()[0]


def describe() -> str:
    """Return one line that says which kind is taken, and why.

    Raises:
        BackingError: as `choose`.
    """
    kind, reason = _choose()
    what = {
        Kind.ADDRESSES: "a broker and a Cassandra given by addresses",
        Kind.CONTAINERS: "containers (eclipse-mosquitto:2, cassandra:5.0)",
        Kind.PROCESSES: "local processes (mosquitto, Cassandra from Maven Central)",
    }[kind]
    return f"backing services: {what}, because {reason}"


def broker(
    kind: Kind | None = None, *, persistent: bool = False, websockets: bool = False
) -> Broker:
    """Make a broker of the given kind, or of the kind that `choose` returns; not yet started.

    Args:
        kind: where it comes from.
        persistent: keep sessions over `restart`, and over `kill` but for its last milliseconds.
        websockets: listen for MQTT over WebSocket too. Local processes alone have that.

    Raises:
        BackingError: as `choose`.
    """
    kind = kind or choose()
    if kind is Kind.ADDRESSES:
        return GivenBroker(os.environ[MQTT_URL_VARIABLE])
    if kind is Kind.CONTAINERS:
        from backing.containers import MosquittoContainer  # noqa: PLC0415 - slow, seldom needed

        return MosquittoContainer(persistent=persistent)
    return Mosquitto(persistent=persistent, autosave_on_changes=persistent, websockets=websockets)


def database(
    kind: Kind | None = None, *, heap: str = "1G", settings: Mapping[str, object] | None = None
) -> Database:
    """Make a Cassandra of the given kind, or of the kind that `choose` returns; not yet started.

    Args:
        kind: where it comes from.
        heap: heap of the JVM.
        settings: further settings of cassandra.yaml. A given Cassandra has its own.

    Raises:
        BackingError: as `choose`.
    """
    kind = kind or choose()
    if kind is Kind.ADDRESSES:
        return GivenCassandra(os.environ[CASSANDRA_VARIABLE])
    if kind is Kind.CONTAINERS:
        from backing.containers import CassandraContainer  # noqa: PLC0415 - slow, seldom needed

        return CassandraContainer(heap=heap, settings=settings)
    return Cassandra(heap=heap, settings=settings)


def _choose() -> tuple[Kind, str]:
    wanted = os.environ.get(KIND_VARIABLE, "").strip().lower()
    if wanted:
        return _forced(wanted), f"{KIND_VARIABLE}={wanted} says so"
    given = [name for name in (MQTT_URL_VARIABLE, CASSANDRA_VARIABLE) if os.environ.get(name)]
    if given:
        _check_addresses()
        return Kind.ADDRESSES, f"{MQTT_URL_VARIABLE} and {CASSANDRA_VARIABLE} are set"
    problem = engine_problem()
    if problem is None:
        return Kind.CONTAINERS, "a Docker-compatible engine answers"
    return Kind.PROCESSES, f"no container engine answers ({problem})"


def _forced(wanted: str) -> Kind:
    try:
        kind = Kind(wanted)
    except ValueError:
        kinds = ", ".join(Kind)
        raise BackingError(f"{KIND_VARIABLE}={wanted!r} is not one of {kinds}") from None
    if kind is Kind.ADDRESSES:
        _check_addresses()
    if kind is Kind.CONTAINERS and (problem := engine_problem()) is not None:
        raise BackingError(f"{KIND_VARIABLE}=containers, but no engine answers: {problem}")
    return kind


def _check_addresses() -> None:
    for name in (MQTT_URL_VARIABLE, CASSANDRA_VARIABLE):
        if not os.environ.get(name):
            both = f"{MQTT_URL_VARIABLE} and {CASSANDRA_VARIABLE}"
            raise BackingError(f"{name} is not set: servers given by addresses need {both}")
    GivenBroker(os.environ[MQTT_URL_VARIABLE])
    GivenCassandra(os.environ[CASSANDRA_VARIABLE])


def engine_problem() -> str | None:
    """Return why no container engine can be used, or None if one answers."""
    where = os.environ.get("DOCKER_HOST") or f"unix://{_DOCKER_SOCKET}"
    if not os.environ.get("DOCKER_HOST") and not _DOCKER_SOCKET.exists():
        return f"DOCKER_HOST is not set and there is no {_DOCKER_SOCKET}"
    if where.startswith("unix://"):
        # Asked first, because the docker package leaves its socket open when nobody listens.
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(where.removeprefix("unix://"))
            except OSError as error:
                return f"{where}: {error}"
    import docker  # noqa: PLC0415 - slow, seldom needed
    import docker.errors  # noqa: PLC0415

    try:
        with contextlib.closing(docker.from_env(timeout=_PING_LIMIT_SECONDS)) as client:
            client.ping()
    except (docker.errors.DockerException, OSError) as error:
        return f"{where}: {error}"
    return None
