"""The same broker and database as containers, for machines with a Docker-compatible engine.

The images are `eclipse-mosquitto:2` and `cassandra:5.0`, started through testcontainers with the
configuration that local processes get. A server listens on the same port inside and outside, so
that it can be reached through the engine's port mapping and by the container's own address alike,
and it keeps this port over restarts.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from cassandra.cluster import Session
from docker.errors import DockerException
from testcontainers.core.container import DockerContainer

from backing import cassandra_config
from backing.cassandra import DATA_CENTRE
from backing.cql import accepts, answers, connect
from backing.errors import BackingError
from backing.mosquitto import broker_settings
from backing.ports import free_port

MOSQUITTO_IMAGE = "eclipse-mosquitto:2"
CASSANDRA_IMAGE = "cassandra:5.0"

_START_LIMIT_SECONDS = 180.0
_STOP_LIMIT_SECONDS = 30
_POLL_SECONDS = 0.1
_QUOTED_LINES = 30


class _Container:
    """Steers one container; made anew by `start` when there is none."""

    steerable = True

    def __init__(self, make: Callable[[], DockerContainer]) -> None:
        self._make = make
        self._container: DockerContainer | None = None
        self.port = free_port()

    @property
    def host(self) -> str:
        """Where the engine publishes ports.

        Raises:
            BackingError: not started.
        """
        # localhost may mean ::1, where the engine publishes nothing.
        host = str(self._live().get_container_host_ip())
        return "127.0.0.1" if host == "localhost" else host

    def start(self, limit_seconds: float = _START_LIMIT_SECONDS) -> None:
        """Make the container, or start the stopped one again, and wait until it answers.

        Raises:
            BackingError: the engine refuses, or it did not come up within `limit_seconds`.
        """
        try:
            if self._container is None:
                self._container = self._make()
                self._container.start()
            else:
                self._wrapped().start()
        except (DockerException, OSError) as error:
            raise BackingError(f"the container engine refuses to start it: {error}") from error
        self.wait_ready(limit_seconds)

    def wait_ready(self, limit_seconds: float = _START_LIMIT_SECONDS) -> None:
        """Wait until it answers.

        Raises:
            BackingError: not within `limit_seconds`, or the container ended.
        """
        deadline = time.monotonic() + limit_seconds
        while not self._answers():
            container = self._wrapped()
            container.reload()
            if container.status in {"exited", "dead"} or time.monotonic() > deadline:
                lines = container.logs().decode(errors="replace").splitlines()[-_QUOTED_LINES:]
                log = "\n".join(lines)
                raise BackingError(f"container {container.name} is {container.status}; log:\n{log}")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End the server with SIGTERM, and keep what it stored."""
        if self._container is not None:
            self._wrapped().stop(timeout=_STOP_LIMIT_SECONDS)

    def kill(self) -> None:
        """End the server with SIGKILL, and keep what it stored."""
        if self._container is not None:
            with contextlib.suppress(DockerException):  # ended already
                self._wrapped().kill()
            self._wrapped().wait()

    def restart(self) -> None:
        """`stop`, then `start`."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze all its processes."""
        self._wrapped().pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self._wrapped().unpause()

    def close(self) -> None:
        """Remove the container and what it stored."""
        if self._container is not None:
            self._container.stop()
            self._container.get_docker_client().client.close()
            self._container = None

    def __enter__(self) -> Self:
        if self._container is None:
            try:
                self.start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> bool:
        raise NotImplementedError

    def _live(self) -> DockerContainer:
        if self._container is None:
            raise BackingError("the container does not run")
        return self._container

    def _wrapped(self) -> Any:
        return self._live().get_wrapped_container()


class MosquittoContainer(_Container):
    """mosquitto in a container.

    Args:
        persistent: keep sessions and queues over `restart` and `kill`.
    """

    def __init__(self, *, persistent: bool = False) -> None:
        super().__init__(self._new)
        self._persistent = persistent

    @property
    def url(self) -> str:
        """`mqtt://host:port`."""
        return f"mqtt://{self.host}:{self.port}"

    def _new(self) -> DockerContainer:
        folder = "/mosquitto/data" if self._persistent else None
        lines = broker_settings(folder, autosave_interval=1, autosave_on_changes=True)
        lines += ["user root", "allow_anonymous true", f"listener {self.port} 0.0.0.0"]
        script = (
            'printf "%s" "$CONFIG" >/tmp/mosquitto.conf && exec mosquitto -c /tmp/mosquitto.conf'
        )
        return (
            DockerContainer(MOSQUITTO_IMAGE)
            .with_bind_ports(self.port, self.port)
            .with_env("CONFIG", "\n".join(lines) + "\n")
            .with_command(["sh", "-c", script])
        )

    def _answers(self) -> bool:
        return _greets(self.host, self.port)


class CassandraContainer(_Container):
    """One Cassandra node in a container.

    Args:
        heap: heap of the JVM.
        settings: further settings of cassandra.yaml.
    """

    dc = DATA_CENTRE

    def __init__(self, *, heap: str = "1G", settings: Mapping[str, object] | None = None) -> None:
        super().__init__(self._new)
        self._heap = heap
        self._settings = dict(settings or {})

    @property
    def contact_points(self) -> tuple[str, ...]:
        """Addresses for drivers."""
        return (self.host,)

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Connect with cassandra-driver."""
        with connect(self.contact_points, self.port) as session:
            yield session

    def _new(self) -> DockerContainer:
        yaml = cassandra_config.yaml(
            storage="/var/lib/cassandra",
            listen_address="127.0.0.1",
            rpc_address="0.0.0.0",  # noqa: S104 - inside the container
            port=self.port,
            storage_port=7000,
            seeds=["127.0.0.1"],
            cluster_name="shadowsvc",
            num_tokens=16,
            settings={"broadcast_rpc_address": "127.0.0.1", **self._settings},
        )
        # The image's own script would edit its own yaml; it finds none of its lines in ours.
        script = (
            'printf "%s" "$CONFIG_YAML" >/etc/cassandra/cassandra.yaml'
            ' && printf "%s" "$CONFIG_RACK" >/etc/cassandra/cassandra-rackdc.properties'
            ' && printf "%s" "$CONFIG_LOG" >/etc/cassandra/logback.xml'
            " && exec docker-entrypoint.sh cassandra -f"
        )
        return (
            DockerContainer(CASSANDRA_IMAGE)
            .with_bind_ports(self.port, self.port)
            .with_env("CONFIG_YAML", yaml)
            .with_env("CONFIG_RACK", cassandra_config.rack(DATA_CENTRE))
            .with_env("CONFIG_LOG", cassandra_config.logback())
            .with_env("MAX_HEAP_SIZE", self._heap)
            .with_env("HEAP_NEWSIZE", "200M")  # the image wants both or none
            .with_env("JVM_EXTRA_OPTS", " ".join(cassandra_config.ALONE_OPTIONS))
            .with_command(["sh", "-c", script])
        )

    def _answers(self) -> bool:
        return accepts(self.host, self.port) and answers(self.contact_points, self.port)


def _greets(host: str, port: int) -> bool:
    """Return whether a broker answers a CONNECT: an engine's proxy accepts for a dead one too."""
    connect_packet = bytes.fromhex("10 0d 0004 4d515454 05 02 0005 00 0000")
    try:
        with socket.create_connection((host, port), 1.0) as connection:
            connection.settimeout(1.0)
            connection.sendall(connect_packet)
            return connection.recv(1) == b"\x20"
    except OSError:
        return False
