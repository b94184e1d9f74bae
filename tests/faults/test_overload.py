"""A Cassandra that says OVERLOADED: it has a limit of requests a second, and refuses what is above.

Lives here: what a service makes of the refusal itself; of requests that time out instead,
`test_cassandra.py` has the tests. Cassandra refuses only those who ask for it in STARTUP, and reads
more slowly from others. The service's driver does not ask; a relay before Cassandra does it for it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING, Self

import pytest

import backing
from tests.faults.stage import Stage
from tests.keyspaces import make_schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from backing import Mosquitto

pytestmark = pytest.mark.timeout(180)

KEYSPACE = "small"
RECEIVE_MAXIMUM = 500
OVERLOADED = "server_overloaded"
LIMITS = {
    "native_transport_rate_limiting_enabled": True,
    "native_transport_max_requests_per_second": 200,
}


@pytest.fixture(scope="module")
def small_cassandra() -> Iterator[backing.Cassandra]:
    with backing.Cassandra(heap="512M", settings=LIMITS) as database:
        make_schema(database, KEYSPACE)
        yield database


@pytest.fixture
def relay(small_cassandra: backing.Cassandra) -> Iterator[Relay]:
    with Relay(small_cassandra.address, small_cassandra.port) as relay:
        yield relay


def test_what_an_overloaded_cassandra_refuses_is_sent_again_and_the_window_shrinks(
    own_broker: Mosquitto,
    small_cassandra: backing.Cassandra,
    relay: Relay,
    unique: str,
    tmp_path: Path,
) -> None:
    settings = {"MQTT__RECEIVE_MAXIMUM": RECEIVE_MAXIMUM, "CASSANDRA__BATCH_MAX_PARTITIONS": 1}
    with Stage(
        own_broker, small_cassandra, KEYSPACE, unique, tmp_path, settings=settings, pods=0
    ) as stage:
        pod = stage.add_pod(CASSANDRA__PORT=relay.port)
        stage.start()
        # More than it takes a second, and dead letters among them.
        with stage.traffic(rate=1500, count=400, max_messages=4000, poison=0.1) as traffic:
            pod.wait_total(20, "write_errors_total", kind=OVERLOADED)
            traffic.join(30)
        verdict = stage.settle(90)
        assert verdict.excused == 0
        assert verdict.dead_letters > 300
        assert relay.asked > 0
        assert pod.total("write_retries_total", kind=OVERLOADED) >= 20
        assert pod.total("writes_limit_changes_total", reason="overload") > 0
        assert pod.total("dead_letters_total", reason="refused_by_store") == 0
        assert pod.wire.counts["connections"] == 1


class Relay:
    """Hands on what it gets, with THROW_ON_OVERLOAD in every STARTUP. A context manager.

    Cassandra's native protocol, version 4, section 2: a frame's header has nine bytes, the last
    four of them the length of its body. STARTUP's body is a map of strings (section 4.1.1).
    """

    _HEADER = struct.Struct(">BBHBI")
    _STARTUP = 0x01
    _OPTION = b"".join(struct.pack(">H", len(one)) + one for one in (b"THROW_ON_OVERLOAD", b"1"))

    def __init__(self, host: str, port: int) -> None:
        self.asked = 0
        """Connections whose STARTUP asked for it."""
        self._target = host, port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="relay", daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(10)
        for one in (self._server, *self._sockets):
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # shut down
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(self._target)
                self._sockets += client, server
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for work, start in ((self._to_server, (client, server)), (_copy, (server, client))):
                    thread = threading.Thread(target=work, args=start, name="relay", daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _to_server(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), client.makefile("rb") as reader:
            operation = None
            while operation != self._STARTUP:
                header = reader.read(self._HEADER.size)
                if len(header) < self._HEADER.size:
                    return
                version, flags, stream, operation, length = self._HEADER.unpack(header)
                body = reader.read(length)
                if operation == self._STARTUP:
                    (count,) = struct.unpack_from(">H", body)
                    body = struct.pack(">H", count + 1) + body[2:] + self._OPTION
                    self.asked += 1
                server.sendall(
                    self._HEADER.pack(version, flags, stream, operation, len(body)) + body
                )
            while data := reader.read1(65_536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
