"""Nodes of Cassandra by the names in their certificates, for cassandra-driver.

Lives here: which name a node's certificate has to have. Rules: where all contact points are names,
a node goes by its name, else by its address, as acsylla has it; a contact point goes by the name
that was configured, other nodes by what the reverse look-up of their address says; without an
answer the address is the name. Everything here blocks. Must not come in: connecting.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any

from cassandra.connection import DefaultEndPoint, DefaultEndPointFactory

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NamedEndPointFactory", "by_name", "named"]


def by_name(contact_points: Sequence[str]) -> bool:
    """Whether nodes go by their names."""
    return not any(map(_is_address, contact_points))


def named(contact_points: Sequence[str], port: int) -> list[Any]:
    """Return an end point for each address of each contact point.

    What cannot be resolved is returned as it is: the driver has words for it.
    """
    points: list[Any] = []
    for name in contact_points:
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            points.append(name)
            continue
        addresses = dict.fromkeys(str(place[0]) for *_, place in found)
        points.extend(_NamedEndPoint(address, port, name) for address in addresses)
    return points


class _NamedEndPoint(DefaultEndPoint):  # type: ignore[misc] # the driver is untyped
    """An address whose certificate has to have a certain name."""

    def __init__(self, address: str, port: int, name: str) -> None:
        super().__init__(address, port)
        self._name = name

    @property
    def ssl_options(self) -> dict[str, str]:
        """What the driver passes to the TLS handshake."""
        return {"server_hostname": self._name}


class NamedEndPointFactory(DefaultEndPointFactory):  # type: ignore[misc] # likewise
    """Makes end points of the nodes that the driver finds."""

    def create(self, row: dict[str, Any]) -> _NamedEndPoint:
        """Return the end point of a row of `system.peers`."""
        plain = super().create(row)
        return _NamedEndPoint(plain.address, plain.port, _name_of(plain.address))


def _name_of(address: str) -> str:
    try:
        return socket.getnameinfo((address, 0), socket.NI_NAMEREQD)[0]
    except OSError:
        return address


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
