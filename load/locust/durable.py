"""Publish-to-durable as one of Locust's statistics: the observer, on gevent.

Lives here: the proxy that stands between broker and service. What passes is understood by
`load.observer`, which says what the figure means and why it is taken here. Rules: alone or in the
master, never in a worker, so that there is one; it listens from the command's start to its end, as
the service connects before a run and stays after it; only what comes during a run is recorded.
Bytes are not changed. Must not come in: statistics other than this one.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

import gevent
from gevent.server import StreamServer

from backing import Direction
from load.observer import Link

if TYPE_CHECKING:
    from collections.abc import Callable

    from load.endpoints import Endpoint

__all__ = ["DURABLE", "Durable"]

DURABLE: Final = "publish to durable"
_CHUNK_BYTES: Final = 65_536
_CONNECT_SECONDS: Final = 10.0
_log = logging.getLogger("load")


class Durable:
    """The proxy; `start` it, and `close` it.

    Args:
        broker: plain MQTT.
        port: where the service connects, on 127.0.0.1; 0: any, see `port`.
        record: takes a latency in seconds, or None and why there is none.
    """

    def __init__(
        self, broker: Endpoint, port: int, record: Callable[[float | None, str], None]
    ) -> None:
        self.held = 0
        """Deliveries without a PUBACK."""
        self._broker = broker
        self._record = record
        self._server = StreamServer(("127.0.0.1", port), self._pass)

    @property
    def port(self) -> int:
        """Where the service connects; known after `start`."""
        return int(self._server.server_port)

    def start(self) -> None:
        """Listen; raises OSError."""
        self._server.start()
        _log.info(
            "publish to durable: the service's broker is mqtt://127.0.0.1:%d, and behind it %s",
            self.port,
            self._broker.authority,
        )

    def close(self) -> None:
        """Listen no more."""
        self._server.stop(timeout=1)

    def delivered(self, *, duplicate: bool) -> None:
        """Count it."""
        del duplicate
        self.held += 1

    def acknowledged(self, sent_us: int | None, *, refused: bool) -> None:
        """Record it."""
        self.held -= 1
        if refused:
            self._record(None, "the service's PUBACK is a refusal")
        elif sent_us is not None:
            self._record(max(0.0, time.time() - sent_us / 1e6), "")

    def _pass(self, service: socket.socket, _: object) -> None:
        """Stand between one connection and the broker, until both have ended it."""
        where = (self._broker.host, self._broker.port)
        try:
            broker = socket.create_connection(where, _CONNECT_SECONDS)
        except OSError as error:
            _log.warning("publish to durable: no broker at %s: %s", self._broker.authority, error)
            service.close()
            return
        broker.settimeout(None)
        for one in (service, broker):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(self)
        ways = [
            gevent.spawn(_pump, link, Direction.TO_SERVER, service, broker),
            gevent.spawn(_pump, link, Direction.TO_CLIENT, broker, service),
        ]
        try:
            gevent.joinall(ways)
        finally:
            gevent.killall(ways)
            link.ended()
            service.close()
            broker.close()


def _pump(link: Link, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            link.came(direction, data)
            sink.sendall(data)
    # The other way may have something to say yet; a connection that is broken says so at once.
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
