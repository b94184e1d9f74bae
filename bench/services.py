"""How each service under test is started, and how it is given a fresh table.

A service is a command line and an environment, nothing else: it is measured from outside. Adding a
peer is adding an entry to `SERVICES`.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = REPOSITORY / "out" / "bench"
COMPILED = REPOSITORY / "out" / "compiled"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a service works in one run: all of it is fresh, so that runs cannot meet.

    `mqtt` and `cassandra` are `host:port`; `name` serves as client id and share group, unless there
    is a `client`. Without a `replication` the service's own is taken.
    """

    mqtt: str
    cassandra: str
    data_centre: str
    keyspace: str
    name: str
    client: str = ""
    replication: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute; `env` comes on top of ours."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Service:
    """A service under test.

    `acknowledges_early` marks one whose PUBACK does not wait for the write: what is durable is then
    seen at Cassandra's answers instead.
    """

    name: str
    what: str
    command: Callable[[Place], Command]
    acknowledges_early: bool = False


def shadowsvc(place: Place, *arguments: str, source: Path = REPOSITORY / "src") -> Command:
    """Return the command of shadowsvc with `arguments`, imported from the folder `source`."""
    host, _, port = place.cassandra.rpartition(":")
    replication = {"SHADOWSVC_CASSANDRA__REPLICATION": place.replication}
    return Command(
        (sys.executable, "-m", "shadowsvc", *arguments),
        {
            "PYTHONPATH": os.pathsep.join(
                [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "SHADOWSVC_MQTT__URL": f"mqtt://{place.mqtt}",
            "SHADOWSVC_MQTT__CLIENT_ID": place.client or place.name,
            "SHADOWSVC_MQTT__SHARE_GROUP": place.name,
            "SHADOWSVC_CASSANDRA__CONTACT_POINTS": host,
            "SHADOWSVC_CASSANDRA__PORT": port,
            "SHADOWSVC_CASSANDRA__LOCAL_DC": place.data_centre,
            "SHADOWSVC_CASSANDRA__KEYSPACE": place.keyspace,
            "SHADOWSVC_HTTP__HOST": "127.0.0.1",
            "SHADOWSVC_HTTP__PORT": "0",
            **(replication if place.replication else {}),
        },
    )


def _narrow(place: Place) -> Command:
    """As beside a Cassandra whose batch thresholds nobody raised."""
    command = shadowsvc(place, "run", source=COMPILED)
    return Command(
        command.argv,
        {
            **command.env,
            "SHADOWSVC_CASSANDRA__BATCH_MAX_PARTITIONS": "10",
            "SHADOWSVC_CASSANDRA__BATCH_MAX_BYTES": "5120",
        },
    )


def _listener(mode: str, *options: str) -> Callable[[Place], Command]:
    def command(place: Place) -> Command:
        return Command(
            (
                str(PROGRAMS / "listener"),
                f"-mode={mode}",
                f"-mqtt=mqtt://{place.mqtt}",
                f"-client-id={place.name}",
                f"-group={place.name}",
                f"-cassandra={place.cassandra}",
                f"-dc={place.data_centre}",
                f"-keyspace={place.keyspace}",
                *options,
                *os.environ.get("BENCH_GO_OPTIONS", "").split(),
            ),
        )

    return command


def _bento(place: Place) -> Command:
    return Command(
        (
            str(PROGRAMS / "bento"),
            "run",
            str(REPOSITORY / "bench" / "peers" / "bento" / "bento.yaml"),
        ),
        {
            "MQTT_ADDRESS": place.mqtt,
            "CLIENT_ID": place.name,
            "SHARE_GROUP": place.name,
            "CASSANDRA_ADDRESS": place.cassandra,
            "KEYSPACE": place.keyspace,
        },
    )


SERVICES: Mapping[str, Service] = {
    service.name: service
    for service in (
        Service(
            "shadowsvc",
            "shadowsvc with its defaults, compiled as its image has it",
            lambda place: shadowsvc(place, "run", source=COMPILED),
        ),
        Service(
            "shadowsvc-source",
            "shadowsvc, from its sources",
            lambda place: shadowsvc(place, "run"),
        ),
        Service("go-single", "Go listener, one request an update", _listener("single")),
        Service("go-batch", "Go listener, batches of 32 updates", _listener("batch", "-batch=32")),
        Service("shadowsvc-10", "shadowsvc, batches of 10 updates", _narrow),
        Service("go-batch-10", "Go listener, batches of 10 updates", _listener("batch")),
        Service("bento", "Bento 1.10", _bento, acknowledges_early=True),
        Service("go-statements", "Go listener, one request a leaf", _listener("statements")),
    )
}

DEFAULT_SERVICES = ("shadowsvc", "go-single", "go-batch", "bento")
REFERENCE = "go-single"
