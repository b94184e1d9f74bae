"""Which pods take connections, read out of EndpointSlices.

Lives here: brokers, and how many slices become one list of them. Pure. Rules: only what Kubernetes
calls ready takes new connections (a pod that ends is not ready); what is no address, no port or no
name is left out, since all of it ends up in a configuration; the order is always the same. Must not
come in: HAProxy, HTTP.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightkube.models.discovery_v1 import Endpoint, EndpointSlice

__all__ = ["Broker", "brokers_of"]

_POD_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # RFC 1123, as Kubernetes has it
_PORT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")  # RFC 6335 §5.1
_MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Broker:
    """One pod that takes connections."""

    name: str
    """Of the pod, or its address where no pod is behind it; unique."""
    address: str
    """IPv4 or IPv6, without brackets."""
    ports: Mapping[str, int]
    """By the name that the EndpointSlice gives them; a port without a name has its number."""

    def port(self, wanted: str) -> int | None:
        """Return the port of a name, or of a number that this broker has."""
        if wanted in self.ports:
            return self.ports[wanted]
        if wanted.isdecimal() and int(wanted) in self.ports.values():
            return int(wanted)
        return None


def brokers_of(slices: Iterable[EndpointSlice], address_type: str) -> tuple[Broker, ...]:
    """Return the brokers that are ready, by name.

    A Service with many pods, or with pods whose ports differ, has several slices; what they say of
    one pod is put together. `address_type` is `IPv4` or `IPv6`.
    """
    found: dict[str, tuple[str, dict[str, int]]] = {}
    for each in sorted(slices, key=_name):
        if each.addressType != address_type:
            continue
        ports = {
            port.name or str(port.port): port.port
            for port in each.ports or ()
            if port.port is not None
            and 0 < port.port <= _MAX_PORT
            and (port.protocol or "TCP") == "TCP"
            and (not port.name or _PORT_NAME.fullmatch(port.name))
        }
        for endpoint in each.endpoints or ():
            address = _address(endpoint)
            # No condition counts as ready (EndpointConditions.ready: nil is "unknown, as true").
            ready = endpoint.conditions is None or endpoint.conditions.ready is not False
            if address is None or not ready:
                continue
            name = endpoint.targetRef.name if endpoint.targetRef is not None else None
            if not name or not _POD_NAME.fullmatch(name):
                name = address.replace(":", "-")
            known, its_ports = found.setdefault(name, (address, {}))
            if known == address:
                its_ports.update(ports)
    return tuple(
        Broker(name, address, dict(sorted(ports.items())))
        for name, (address, ports) in sorted(found.items())
    )


def _name(each: EndpointSlice) -> str:
    return (each.metadata.name if each.metadata is not None else None) or ""


def _address(endpoint: Endpoint) -> str | None:
    # The first alone: "consumers should use only the first" (discovery.k8s.io/v1, Endpoint).
    try:
        return str(ipaddress.ip_address(endpoint.addresses[0]))
    except (ValueError, IndexError):
        return None
