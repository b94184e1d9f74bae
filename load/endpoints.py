"""Where devices connect to and from: targets by URL, source addresses, the limits of both.

Lives here: reading `ws://127.0.0.1:8080/mqtt` and `127.0.0.2-127.0.0.9`, and the socket of a
connection that has a source address. Rules: targets are taken in turn by device number and attempt,
so that a device whose node died comes to the next; all sources are combined with all targets, since
a source has some 28,000 ports for each target. Must not come in: MQTT.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from load.errors import BadOption

__all__ = ["Endpoint", "bound_socket", "parse_sources", "route"]

# scheme: TLS, WebSocket, usual port
_SCHEMES: Final = {
    "mqtt": (False, False, 1883),
    "mqtts": (True, False, 8883),
    "ws": (False, True, 80),
    "wss": (True, True, 443),
}
# ip(7): the kernel chooses the port at connect, so that one port serves several targets. Python
# names it from 3.12 on.
_IP_BIND_ADDRESS_NO_PORT: Final = 24
_MAX_SOURCES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One target."""

    host: str
    port: int
    path: str | None
    """Of the WebSocket handshake; None: plain MQTT."""
    tls: bool

    @property
    def authority(self) -> str:
        """For the header `Host`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read `mqtt://host:port`, `mqtts://…`, `ws://host:port/path` or `wss://…`.

        Raises:
            BadOption: it is none of these.
        """
        try:
            parts = urlsplit(url)
            tls, websocket, usual = _SCHEMES[parts.scheme]
            host, port = parts.hostname, parts.port or usual
        except (KeyError, ValueError):
            host, port, tls, websocket = None, 0, False, False
        if not host or (not websocket and parts.path.strip("/")):
            raise BadOption(
                f"target {url!r}: mqtt://HOST:PORT, mqtts://HOST:PORT, ws://HOST:PORT/PATH or "
                "wss://HOST:PORT/PATH"
            )
        return cls(host, port, (parts.path or "/mqtt") if websocket else None, tls)


def parse_sources(text: str) -> tuple[str, ...]:
    """Read addresses and ranges, joined by commas: `127.0.0.2-127.0.0.9,10.0.0.1`.

    Raises:
        BadOption: it is not understood.
    """
    found: list[str] = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        first, _, last = part.partition("-")
        try:
            begin = ipaddress.ip_address(first)
            end = ipaddress.ip_address(last or first)
            count = int(end) - int(begin) + 1
        except ValueError:
            count = 0
        if not 1 <= count <= _MAX_SOURCES or begin.version != end.version:
            raise BadOption(f"source {part!r}: an IP address, or FIRST-LAST")
        found += [str(begin + step) for step in range(count)]
    return tuple(found)


def route(number: int, attempt: int, targets: int, sources: int) -> tuple[int, int]:
    """Return the indices of target and source for a device's attempt (both from 0)."""
    return (number + attempt) % targets, (number // targets) % max(1, sources)


def bound_socket(source: str) -> socket.socket:
    """Return a socket that will connect from `source`; raises OSError if it is not ours."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        made.bind((source, 0))
    except OSError:
        made.close()
        raise
    return made
