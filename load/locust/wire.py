"""One connection of one device: a socket, and bytes between it and the device without I/O.

Lives here: opening (source address, TLS, time limits), receiving for a while, sending, closing.
Rules: plain blocking sockets of the standard library. In Locust's processes gevent has replaced
them, and whatever blocks here lets the other devices run: what is waited for lies in the one epoll
of the process, so no descriptor is too high. Every wait has a limit. Whatever ends a connection is
`BrokenConnection`, with a short text that is fit to be counted. Must not come in: when to connect,
what an event means.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from typing import TYPE_CHECKING, Final, NamedTuple

from load.endpoints import bound_socket
from load.errors import BrokenConnection

if TYPE_CHECKING:
    from load.device import Device, Event
    from load.endpoints import Endpoint

__all__ = ["Address", "Wire"]

_READ_BYTES: Final = 16_384
_LEAST_WAIT_SECONDS: Final = 0.0001  # 0 would mean: never wait
_SEND_SECONDS: Final = 10.0


class Address(NamedTuple):
    """Where a connection goes, and where it comes from."""

    endpoint: Endpoint
    family: int
    sockaddr: tuple[str, int]
    """Resolved: a numeric address and a port."""
    source: str | None = None
    """Local address; the kernel's choice when None."""
    tls: ssl.SSLContext | None = None
    tls_name: str | None = None
    """Name that the certificate must have; None: the endpoint's host."""


class Wire:
    """The connection that `open` makes. A device has one at a time."""

    __slots__ = ("_socket", "device", "torn")

    def __init__(self, device: Device, connection: socket.socket) -> None:
        self.device = device
        self.torn = False
        """A packet was sent in part: nothing may follow it."""
        self._socket = connection

    @classmethod
    def open(cls, device: Device, address: Address, limit_seconds: float) -> Wire:
        """Connect, with TLS if asked for, and send what begins the device's connection.

        Args:
            device: what speaks.
            address: where to.
            limit_seconds: for TCP and for TLS, each.

        Raises:
            BrokenConnection: no connection.
        """
        connection = None
        try:
            if address.source is None:
                connection = socket.socket(address.family, socket.SOCK_STREAM)
            else:
                connection = bound_socket(address.source)
            connection.settimeout(limit_seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.connect(address.sockaddr)
            if address.tls is not None:
                name = address.tls_name or address.endpoint.host
                connection = address.tls.wrap_socket(connection, server_hostname=name)
            if device.websocket is not None:
                device.websocket.host = address.endpoint.authority
                device.websocket.path = address.endpoint.path or "/"
            wire = cls(device, connection)
            wire.send(device.connect())
        except OSError as error:
            if connection is not None:
                connection.close()
            raise BrokenConnection(_words(error)) from None
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        return wire

    @property
    def descriptor(self) -> int:
        """Number of the socket's file descriptor; -1 after `close`."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            BrokenConnection: the connection is over, or the other side has read nothing for 10 s.
        """
        self.torn = True
        try:
            self._socket.settimeout(_SEND_SECONDS)
            self._socket.sendall(data)
        except OSError as error:
            raise BrokenConnection(_words(error)) from None
        self.torn = False

    def receive(self, wait_seconds: float) -> list[Event]:
        """Wait for at most `wait_seconds` (0 or more), and return what came, if anything did.

        What the device has to answer is sent.

        Raises:
            BrokenConnection: the connection is over.
        """
        try:
            self._socket.settimeout(max(wait_seconds, _LEAST_WAIT_SECONDS))
            data = self._socket.recv(_READ_BYTES)
        except TimeoutError:
            return []
        except OSError as error:
            raise BrokenConnection(_words(error)) from None
        if not data:
            raise BrokenConnection("closed by the other side")
        events = self.device.receive(data)
        if answer := self.device.pending:
            self.device.pending = b""
            self.send(answer)
        return events

    def close(self) -> None:
        """Close at once; may be repeated."""
        self.device.connected = False
        with contextlib.suppress(OSError):
            self._socket.close()


_WORDS: Final = {
    errno.EADDRNOTAVAIL: "no port left at this source address (more --sources)",
    errno.EADDRINUSE: "no port left at this source address (more --sources)",
    errno.EMFILE: "no descriptor left (ulimit -n)",
}


def _words(error: OSError) -> str:
    """Return what happened, the same for the same kind of failure, since it is counted by it."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or type(error).__name__}"
    if error.errno is None:
        return str(error) or type(error).__name__
    return _WORDS.get(error.errno) or os.strerror(error.errno).lower()
