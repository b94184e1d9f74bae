"""A real broker and a real Cassandra for the demo, the tests and the benchmarks.

    with backing.broker() as broker, backing.database() as database:
        ...  # broker.url, database.contact_points, database.port, database.dc

`choose` picks containers where a Docker-compatible engine answers, else local processes, or servers
given by addresses in the environment; `describe` says which and why. Tests that need a certain
set-up make a `Mosquitto`, a `Cassandra` or a `CassandraCluster` themselves. A `FaultProxy` stands
between a client and a server and spoils their connection.

Rules: everything is on the loopback, on free ports, in temporary folders, and gone when the context
is left or this process dies. Nothing of shadowsvc is imported here, and shadowsvc imports nothing
from here: this package is not shipped.
"""

from backing.addresses import GivenBroker, GivenCassandra
from backing.cassandra import Cassandra, CassandraCluster
from backing.cassandra_config import RAISED_THRESHOLDS
from backing.choice import Kind, broker, choose, database, describe
from backing.cql import connect
from backing.errors import BackingError
from backing.interface import Broker, Database, Service
from backing.mosquitto import ListenerTls, Mosquitto
from backing.ports import free_port
from backing.proxy import Direction, FaultProxy, ProxyCounts, Tap, Watch

__all__ = [
    "RAISED_THRESHOLDS",
    "BackingError",
    "Broker",
    "Cassandra",
    "CassandraCluster",
    "Database",
    "Direction",
    "FaultProxy",
    "GivenBroker",
    "GivenCassandra",
    "Kind",
    "ListenerTls",
    "Mosquitto",
    "ProxyCounts",
    "Service",
    "Tap",
    "Watch",
    "broker",
    "choose",
    "connect",
    "database",
    "describe",
    "free_port",
]
