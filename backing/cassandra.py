"""Cassandra as local processes, one node or several, that keep ports and data over restarts.

All that a node writes lies in one folder. Its configuration is made in `cassandra_config`.
"""

import contextlib
import shutil
import ssl
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from cassandra.cluster import Session

from backing import cassandra_config
from backing.cql import accepts, answers, connect
from backing.jars import cassandra_jars, java
from backing.ports import free_port
from backing.process import ServerProcess

DATA_CENTRE = "dc1"
DEFAULT_START_LIMIT_SECONDS = 120.0


class Cassandra:
    """One node on the loopback.

    Args:
        folder: where configuration, data and log lie; a temporary one, removed by `close`, when
            None.
        address: address of this node; all of 127.0.0.0/8 is there on Linux.
        port: CQL port; a free one when None.
        storage_port: port between nodes; a free one when None.
        seeds: addresses of the seeds; this node alone when empty.
        cluster_name: name that all nodes of a cluster share.
        data_centre: data centre that the node says it is in.
        heap: heap of the JVM, as `-Xmx` writes it.
        num_tokens: virtual nodes.
        settings: further settings of cassandra.yaml; they replace ours of the same name.
        jvm_options: further options of the JVM, before the main class.
        user: user name and password for our own connections, with an `authenticator` in `settings`.
        ssl_context: TLS of our own connections, with `client_encryption_options` in `settings`.
    """

    steerable = True

    def __init__(
        self,
        *,
        folder: Path | None = None,
        address: str = "127.0.0.1",
        port: int | None = None,
        storage_port: int | None = None,
        seeds: Sequence[str] = (),
        cluster_name: str = "shadowsvc",
        data_centre: str = DATA_CENTRE,
        heap: str = "1G",
        num_tokens: int = 16,
        settings: Mapping[str, object] | None = None,
        jvm_options: Sequence[str] = (),
        user: tuple[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        program, java_version = java()
        jars = cassandra_jars()
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="shadowsvc-cassandra-"))
        self.address = address
        self.port = free_port((address,)) if port is None else port
        self.storage_port = free_port((address,)) if storage_port is None else storage_port
        self.dc = data_centre
        self._seeds = tuple(seeds) or (address,)
        self._cluster_name = cluster_name
        self._num_tokens = num_tokens
        self._settings = dict(settings or {})
        self._user = user
        self._ssl_context = ssl_context
        self._process = ServerProcess(
            f"Cassandra {address}",
            cassandra_config.command(
                program,
                java_version=java_version,
                jars=jars,
                folder=self.folder,
                heap=heap,
                alone=self._seeds == (address,) and not seeds,
                jvm_options=jvm_options,
            ),
            log_path=self.folder / "cassandra.log",
            cwd=self.folder,
        )

    @property
    def contact_points(self) -> tuple[str, ...]:
        """Addresses for drivers."""
        return (self.address,)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process.running

    @property
    def log_path(self) -> Path:
        """Log of all starts, level WARN and above."""
        return self._process.log_path

    def start(self, limit_seconds: float = DEFAULT_START_LIMIT_SECONDS) -> None:
        """Write the configuration, start, and wait until it answers CQL.

        Raises:
            BackingError: it runs already or did not come up within `limit_seconds`.
        """
        self.launch()
        try:
            self.wait_ready(limit_seconds)
        except BaseException:
            self._process.kill()
            raise

    def launch(self) -> None:
        """Do as `start` does, without waiting.

        Raises:
            BackingError: it runs already.
        """
        self._write_config()
        self._process.start()

    def wait_ready(self, limit_seconds: float = DEFAULT_START_LIMIT_SECONDS) -> None:
        """Wait until a driver can connect and query.

        Raises:
            BackingError: not within `limit_seconds`, or the process ended.
        """
        self._process.wait_ready(self._answers, limit_seconds)

    def stop(self, limit_seconds: float = 60.0) -> None:
        """End with SIGTERM: the node drains; killed after `limit_seconds`."""
        self._process.stop(limit_seconds)

    def kill(self) -> None:
        """End with SIGKILL.

        With the periodic commit log, Cassandra's default and ours, the next start does not find
        what it acknowledged in about the last 0.1 s (measured; other replicas would have it). A
        test that kills the only replica passes `settings={"commitlog_sync": "batch"}`, which
        loses nothing.
        """
        self._process.kill()

    def restart(self) -> None:
        """`stop`, then `start` on the same ports and data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze: connections stay open, requests time out."""
        self._process.pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self._process.resume()

    def cpu_seconds(self) -> float:
        """CPU time used since the last start."""
        return self._process.cpu_seconds()

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Connect with cassandra-driver to this node alone; a session that is closed at the end."""
        with connect(
            self.contact_points, self.port, user=self._user, ssl_context=self._ssl_context
        ) as session:
            yield session

    def close(self) -> None:
        """End the process and remove the folder if it is a temporary one."""
        if self._own_folder:
            self.kill()  # nobody will read the data: no need to drain
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self.stop()

    def __enter__(self) -> Self:
        if not self.running:
            try:
                self.start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> bool:
        return accepts(self.address, self.port) and answers(
            self.contact_points, self.port, user=self._user, ssl_context=self._ssl_context
        )

    def _write_config(self) -> None:
        conf = self.folder / "conf"
        conf.mkdir(parents=True, exist_ok=True)
        (self.folder / "tmp").mkdir(exist_ok=True)
        (conf / "logback.xml").write_text(cassandra_config.logback())
        (conf / "cassandra-rackdc.properties").write_text(cassandra_config.rack(self.dc))
        text = cassandra_config.yaml(
            storage=str(self.folder),
            listen_address=self.address,
            rpc_address=self.address,
            port=self.port,
            storage_port=self.storage_port,
            seeds=self._seeds,
            cluster_name=self._cluster_name,
            num_tokens=self._num_tokens,
            settings=self._settings,
        )
        (conf / "cassandra.yaml").write_text(text)


class CassandraCluster:
    """Several nodes of one cluster, on 127.0.0.1, 127.0.0.2 and so on, with the same ports.

    The nodes start one after another, the first is the seed. `nodes[i]` is steered by itself.

    Args:
        size: number of nodes.
        folder: parent of the nodes' folders; a temporary one, removed by `close`, when None.
        heap: heap of each node.
        options: further arguments of every `Cassandra`.
    """

    steerable = True

    def __init__(
        self,
        size: int = 3,
        *,
        folder: Path | None = None,
        heap: str = "1G",
        **options: Any,
    ) -> None:
        addresses = [f"127.0.0.{number}" for number in range(1, size + 1)]
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="shadowsvc-cassandra-"))
        self.port = free_port(addresses)
        self._storage_port = free_port(addresses)
        self._heap = heap
        self._options = options
        self._last_number = size
        self._seeds = addresses[:1]
        self.nodes = tuple(self._node(address) for address in addresses)

    @property
    def contact_points(self) -> tuple[str, ...]:
        """Addresses for drivers, of all nodes."""
        return tuple(node.address for node in self.nodes)

    @property
    def dc(self) -> str:
        """Data centre of all nodes."""
        return self.nodes[0].dc

    def start(self, limit_seconds: float = DEFAULT_START_LIMIT_SECONDS) -> None:
        """Start the nodes that do not run, one after another.

        Raises:
            BackingError: a node did not come up within `limit_seconds`.
        """
        for node in self.nodes:
            if not node.running:
                node.start(limit_seconds)

    def add(self, *, replaces: Cassandra | None = None) -> Cassandra:
        """Make one more node, at the next address; it is not started.

        Started, it streams what it is to hold before it answers CQL. With `replaces`, a node that
        has ended and is not the seed, it takes over that one's tokens, and `nodes` has it instead.

        Args:
            replaces: the node that will never come back.
        """
        self._last_number += 1
        more = dict(self._options)
        more["settings"] = {**(more.get("settings") or {}), "auto_bootstrap": True}
        if replaces is not None:
            option = f"-Dcassandra.replace_address_first_boot={replaces.address}"
            more["jvm_options"] = (*more.get("jvm_options", ()), option)
        node = self._node(f"127.0.0.{self._last_number}", **more)
        self.nodes = (*(one for one in self.nodes if one is not replaces), node)
        return node

    def stop(self) -> None:
        """Stop all nodes, the last first."""
        for node in reversed(self.nodes):
            node.stop()

    def cpu_seconds(self) -> float:
        """CPU time of all running nodes since their last start."""
        return sum(node.cpu_seconds() for node in self.nodes if node.running)

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Connect with cassandra-driver to the first node."""
        with self.nodes[0].session() as session:
            yield session

    def close(self) -> None:
        """End all nodes and remove the folder if it is a temporary one."""
        for node in self.nodes:
            if self._own_folder:
                node.kill()
            else:
                node.stop()
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _node(self, address: str, **more: Any) -> Cassandra:
        return Cassandra(
            folder=self.folder / address,
            address=address,
            port=self.port,
            storage_port=self._storage_port,
            seeds=self._seeds,
            heap=self._heap,
            **(more or self._options),
        )

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
