"""HAProxy's configuration from settings, brokers and a template.

Lives here: what a template gets to see, and the two readings of a configuration. Pure: the same
arguments give the same text. Rules: a template that fails is `Refused` with its line and the
reason; an undefined name is a failure, too. Must not come in: files, sockets, processes.

A configuration has two parts. *Servers*, one for each port of a broker and each source address, can
be changed while HAProxy runs. All the rest is the *frame*. Its digest stands in the configuration
(`description`), and HAProxy shows it (`show info`): so a running process tells whether it has the
frame that is wanted. How a server is written, apart from its address, belongs to the frame.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import jinja2

from shadowsvc.errors import Refused
from shadowsvc.ingress.model import Broker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from shadowsvc.settings import Ingress

__all__ = ["DESCRIPTION", "Rendered", "Server", "max_connections", "render"]

DESCRIPTION: Final = "shadowsvc-ingress "
"""What stands in front of the digest in HAProxy's description."""

_RESERVED_FILES = 2000  # listeners, checks, sockets, certificates, the statistics
_RESERVED_SHARE = 10
_MOST_CONNECTIONS = 500_000  # HAProxy sets memory aside for each
_PLACEHOLDER = "192.0.2.1"  # RFC 5737


@dataclass(frozen=True, slots=True)
class Server:
    """One server of a backend, as HAProxy knows it."""

    backend: str
    name: str
    address: str
    port: int
    options: str
    """What follows the address, in the configuration and in `add server` alike."""

    @property
    def where(self) -> str:
        """Address and port as HAProxy reads them."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"

    @property
    def line(self) -> str:
        """The line of the configuration."""
        return f"server {self.name} {self.where} {self.options}".rstrip()


@dataclass(frozen=True, slots=True)
class Backend:
    """Servers for one protocol, for a template."""

    name: str
    servers: tuple[Server, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A configuration."""

    text: str
    digest: str
    """Of the frame."""
    servers: Mapping[tuple[str, str], Server]
    """By names of backend and server."""


def render(
    settings: Ingress,
    brokers: Sequence[Broker],
    template: str,
    *,
    connections: int,
    certificates: Sequence[str] = (),
    certificate_directory: Path | None = None,
) -> Rendered:
    """Return the configuration.

    Args:
        settings: of the ingress.
        brokers: those that take connections.
        template: in jinja2's language.
        connections: of devices at once, for all of HAProxy.
        certificates: names of the files in `certificate_directory`; without one there is no TLS.
        certificate_directory: where HAProxy finds them.

    Raises:
        Refused: the template can't be used.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - HAProxy's configuration is no HTML
    )
    try:
        parsed = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise Refused("template", f"line {error.lineno}: {error.message}") from error

    def fill(some: Sequence[Broker], digest: str) -> tuple[str, tuple[Backend, ...]]:
        backends = _backends(settings, some)
        try:
            text = parsed.render(
                settings=settings,
                backends=backends,
                connections=connections,
                certificates=tuple(certificates),
                certificate_directory=certificate_directory,
                description=f"{DESCRIPTION}{digest}",
                ms=lambda seconds: f"{max(1, round(seconds * 1000))}ms",
            )
        except Exception as error:  # a template may call and divide what it likes
            raise Refused("template", f"line {_line(error)}: {error}") from error
        return text, backends

    frame, _ = fill(_placeholders(settings), "")
    names = "\n".join(certificates)
    digest = hashlib.sha256(f"{frame}\0{names}".encode()).hexdigest()[:16]
    text, backends = fill(brokers, digest)
    if f"{DESCRIPTION}{digest}" not in text:
        raise Refused(
            "template", "there is no `description {{ description }}` in the section `global`"
        )
    servers = {(each.backend, each.name): each for one in backends for each in one.servers}
    for each in servers.values():
        if each.line not in text:
            raise Refused("template", f"the server {each.name} of {each.backend} is left out")
    return Rendered(text, digest, servers)


def max_connections(settings: Ingress, max_files: int) -> int:
    """Return how many devices may be connected, by the setting or else by file descriptors.

    Each takes two: one to the device, one to the broker. A tenth, at most 2,000, is kept for the
    rest. Without a limit of file descriptors it is 500,000.
    """
    if settings.max_connections:
        return settings.max_connections
    reserved = min(_RESERVED_FILES, max_files // _RESERVED_SHARE)
    return max(1, min(_MOST_CONNECTIONS, (max_files - reserved) // 2))


def _backends(settings: Ingress, brokers: Sequence[Broker]) -> tuple[Backend, ...]:
    sources: tuple[tuple[str, str], ...] = (("", ""),)
    if settings.source_addresses:
        sources = tuple(
            (f".{index}", address) for index, address in enumerate(settings.source_addresses)
        )
    backends = []
    for name, ports in (("mqtt", settings.mqtt_ports), ("websocket", settings.websocket_ports)):
        servers = [
            Server(
                backend=name,
                name=f"{broker.name}.{wanted}{suffix}",
                address=broker.address,
                port=port,
                options=_options(settings, source),
            )
            # Neighbours are different pods, for whoever takes the servers in turn.
            for wanted in ports
            for suffix, source in sources
            for broker in brokers
            if (port := broker.port(wanted)) is not None
        ]
        backends.append(Backend(name, tuple(servers)))
    return tuple(backends)


def _options(settings: Ingress, source: str) -> str:
    """Return what follows a server's address; all of it is allowed in `add server`, too."""
    parts = []
    if source:
        ports = f":{settings.source_ports}" if settings.source_ports else ""
        host = f"[{source}]" if ":" in source else source
        parts.append(f"source {host}{ports}")
    proxied = settings.proxy_protocol != "off"
    if proxied:
        parts.append("send-proxy" if settings.proxy_protocol == "v1" else "send-proxy-v2")
    if settings.health_check != "off":
        interval = max(1, round(settings.health_check_seconds * 1000))
        parts.append(f"check inter {interval}ms fall 3 rise 1")
        if proxied:
            parts.append("check-send-proxy")
        if settings.slow_start_seconds:
            parts.append(f"slowstart {max(1, round(settings.slow_start_seconds * 1000))}ms")
    return " ".join(parts)


def _placeholders(settings: Ingress) -> tuple[Broker, ...]:
    names = dict.fromkeys((*settings.mqtt_ports, *settings.websocket_ports), 1)
    return (Broker("placeholder", _PLACEHOLDER, names),)


def _line(error: BaseException) -> int | str:
    """Return the template's line that raised, as jinja2 has it in the traceback."""
    found: int | str = "?"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            found = trace.tb_lineno
        trace = trace.tb_next
    return found
