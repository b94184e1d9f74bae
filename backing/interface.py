"""What a broker and a database offer, wherever they run.

Code that works with any kind takes these; code that needs more (options, a process id, a folder)
makes a `Mosquitto` or a `Cassandra` itself.
"""

from contextlib import AbstractContextManager
from typing import Protocol, Self

from cassandra.cluster import Session


class Service(Protocol):
    """A server that is started on entering the context and is gone after leaving it.

    Where `steerable` is false the server is not ours, and `start`, `stop`, `kill`, `restart`,
    `pause` and `resume` raise BackingError.
    """

    @property
    def steerable(self) -> bool:
        """Whether the methods below may be used."""

    def start(self) -> None:
        """Start and wait until it answers; on the same port as before."""

    def wait_ready(self, limit_seconds: float = ...) -> None:
        """Wait until it answers."""

    def stop(self) -> None:
        """End it as an operator would."""

    def kill(self) -> None:
        """End it with SIGKILL."""

    def restart(self) -> None:
        """`stop`, then `start`."""

    def pause(self) -> None:
        """Freeze it: connections stay open and silent."""

    def resume(self) -> None:
        """Undo `pause`."""

    def close(self) -> None:
        """End it and remove what it stored."""

    def __enter__(self) -> Self:
        """Start it if it does not run."""

    def __exit__(self, *_: object) -> None:
        """`close`."""


class Broker(Service, Protocol):
    """An MQTT 5 broker."""

    @property
    def host(self) -> str:
        """Address or name."""

    @property
    def port(self) -> int:
        """TCP port."""

    @property
    def url(self) -> str:
        """`mqtt://host:port`, with a user where one is needed."""


class Database(Service, Protocol):
    """A Cassandra node or cluster."""

    @property
    def contact_points(self) -> tuple[str, ...]:
        """Addresses for drivers."""

    @property
    def port(self) -> int:
        """CQL port, the same on all nodes."""

    @property
    def dc(self) -> str:
        """Local data centre for drivers."""

    def session(self) -> AbstractContextManager[Session]:
        """Connect with cassandra-driver."""
