"""A broker and a Cassandra that somebody else runs, given by addresses in the environment.

We use them and never stop them: what steers a server raises.
"""

import contextlib
import socket
from collections.abc import Iterator
from functools import cached_property
from typing import NoReturn, Self
from urllib.parse import urlsplit

from cassandra.cluster import Session

from backing.cql import answers, connect
from backing.errors import BackingError

MQTT_URL_VARIABLE = "SHADOWSVC_BACKING_MQTT_URL"
CASSANDRA_VARIABLE = "SHADOWSVC_BACKING_CASSANDRA"

_MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_CONNECT_LIMIT_SECONDS = 5.0
_CQL_PORT = 9042
_MAX_PORT = 65_535


class _Given:
    """What both have in common: they cannot be steered."""

    steerable = False
    _variable = ""

    def start(self) -> None:
        """Not ours to do."""
        self._refuse("started")

    def stop(self) -> None:
        """Not ours to do."""
        self._refuse("stopped")

    def kill(self) -> None:
        """Not ours to do."""
        self._refuse("killed")

    def restart(self) -> None:
        """Not ours to do."""
        self._refuse("restarted")

    def pause(self) -> None:
        """Not ours to do."""
        self._refuse("paused")

    def resume(self) -> None:
        """Not ours to do."""
        self._refuse("resumed")

    def close(self) -> None:
        """Leave it running."""

    def wait_ready(self, limit_seconds: float = _CONNECT_LIMIT_SECONDS) -> None:
        """Check that it answers; what is given by an address runs already.

        Raises:
            BackingError: it does not.
        """
        raise NotImplementedError

    def _refuse(self, done: str) -> NoReturn:
        raise BackingError(f"a server given by {self._variable} cannot be {done}: it is not ours")

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GivenBroker(_Given):
    """A broker by its URL, `mqtt://[user:password@]host[:port]` or `mqtts://…`.

    Raises:
        BackingError: not such a URL.
    """

    _variable = MQTT_URL_VARIABLE

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise BackingError(f"{MQTT_URL_VARIABLE}={url!r}: {error}") from error
        if parts.scheme not in _MQTT_PORTS or not parts.hostname:
            raise BackingError(f"{MQTT_URL_VARIABLE}={url!r} is not mqtt://host:port")
        self.url = url
        self.host = parts.hostname
        self.port = port or _MQTT_PORTS[parts.scheme]

    def wait_ready(self, limit_seconds: float = _CONNECT_LIMIT_SECONDS) -> None:
        """Check that the port accepts a connection.

        Raises:
            BackingError: it does not.
        """
        try:
            socket.create_connection((self.host, self.port), limit_seconds).close()
        except OSError as error:
            message = f"no broker at {MQTT_URL_VARIABLE} ({self.host}:{self.port}): {error}"
            raise BackingError(message) from error


class GivenCassandra(_Given):
    """A Cassandra by its addresses, `host:port[,host:port…]`, all with the same port.

    Raises:
        BackingError: not such a list.
    """

    _variable = CASSANDRA_VARIABLE

    def __init__(self, addresses: str) -> None:
        hosts: list[str] = []
        ports: set[int] = set()
        for item in filter(None, map(str.strip, addresses.split(","))):
            host, colon, port = item.rpartition(":")
            if not colon:
                host, port = item, str(_CQL_PORT)
            if not host or not port.isdecimal() or not 0 < int(port) <= _MAX_PORT:
                raise BackingError(f"{CASSANDRA_VARIABLE}: {item!r} is not host:port")
            hosts.append(host)
            ports.add(int(port))
        if len(ports) != 1:
            message = f"{CASSANDRA_VARIABLE}={addresses!r} must name nodes with one port"
            raise BackingError(message)
        self.contact_points = tuple(hosts)
        (self.port,) = ports

    @cached_property
    def dc(self) -> str:
        """Data centre of the first node that answers."""
        with self.session() as session:
            return str(session.execute("SELECT data_center FROM system.local").one()[0])

    def wait_ready(self, limit_seconds: float = _CONNECT_LIMIT_SECONDS) -> None:
        """Check that it answers CQL; the driver's own time limit counts, not `limit_seconds`.

        Raises:
            BackingError: it does not.
        """
        del limit_seconds
        if not answers(self.contact_points, self.port):
            where = f"{','.join(self.contact_points)} port {self.port}"
            raise BackingError(f"no Cassandra at {CASSANDRA_VARIABLE} ({where})")

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Connect with cassandra-driver."""
        with connect(self.contact_points, self.port) as session:
            yield session
