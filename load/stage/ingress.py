"""HAProxy processes with the configuration that `shadowsvc ingress` writes.

Lives here: settings as one ingress node would have them, rendered by the ingress' own `render` and
its own template, then one HAProxy process for each. Rules: nothing of the configuration is written
here, so that what is measured is what is deployed; every process has a loopback address of its own,
to listen on and to connect to brokers from, as a node has; as many connections as `render` allows
for the limit of descriptors. Must not come in: brokers' processes, Kubernetes.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Self

from backing import Mosquitto, free_port
from backing.process import ServerProcess, find_program
from shadowsvc.ingress.model import Broker
from shadowsvc.ingress.render import max_connections, render
from shadowsvc.ingress.runtime import Runtime
from shadowsvc.ingress.supervise import read_template
from shadowsvc.settings import Ingress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["IngressNode", "address_of"]

_START_SECONDS = 15.0
_CONNECT_SECONDS = 1.0
_MAX_HOST = 254


def address_of(kind: int, number: int) -> str:
    """Return a loopback address: 127.0.KIND.NUMBER.

    Args:
        kind: 1 to 254, the same for all nodes of a kind.
        number: of the node, from 1 to 254.

    Raises:
        ValueError: there is no such address.
    """
    if not (0 < kind <= _MAX_HOST and 0 < number <= _MAX_HOST):
        raise ValueError(f"127.0.{kind}.{number} is no address of a node")
    return f"127.0.{kind}.{number}"


class IngressNode:
    """One HAProxy in front of `brokers`; a context manager.

    Args:
        folder: for the configuration, the socket and the log; a short path, since a socket's may
            have 107 bytes.
        host: address to listen on and to connect to brokers from.
        brokers: by name; with WebSocket listeners.
        descriptors: what the process may open.
        settings: further settings of the ingress; they replace ours.
    """

    def __init__(
        self,
        folder: Path,
        host: str,
        brokers: Sequence[tuple[str, Mosquitto]],
        *,
        descriptors: int,
        **settings: Any,
    ) -> None:
        sbin = ("/usr/local/sbin", "/usr/sbin")
        program = find_program("haproxy", package="haproxy", folders=sbin)
        self.host = host
        fields: dict[str, Any] = {
            "directory": folder,
            "listen_host": host,
            "statistics_host": host,
            "source_addresses": (host,),
            "listen_mqtt": free_port((host,)),
            "listen_mqtts": 0,
            "listen_websocket": free_port((host,)),
            "listen_websocket_tls": 0,
            "listen_statistics": 0,
            "mqtt_ports": ("mqtt",),
            "websocket_ports": ("ws",),
            **settings,
        }
        self.settings = Ingress.model_validate(fields)
        self.port = self.settings.listen_websocket
        self.mqtt_port = self.settings.listen_mqtt
        self.max_connections = max_connections(self.settings, descriptors)
        rendered = render(
            self.settings,
            [_broker(name, mosquitto) for name, mosquitto in brokers],
            read_template(None),
            connections=self.max_connections,
        )
        folder.mkdir(parents=True, exist_ok=True)
        configuration = folder / "haproxy.cfg"
        configuration.write_text(rendered.text)
        self._runtime = Runtime(folder / "runtime.sock")
        self._process = ServerProcess(
            f"HAProxy {host}",
            # -db: one process, whose descriptors, memory and CPU are all there is to read
            [program, "-db", "-f", str(configuration)],
            log_path=folder / "haproxy.log",
            cwd=folder,
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        """Start, and wait until it accepts connections; raises BackingError."""
        self._process.start()
        try:
            self._process.wait_ready(self._accepts, _START_SECONDS)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it at once: a soft stop would wait for the devices."""
        self._process.kill()

    def connections(self) -> int:
        """Ask HAProxy how many connections it has; raises HaproxyFailed."""
        for line in asyncio.run(self._runtime.ask("show info")).splitlines():
            name, _, value = line.partition(":")
            if name == "CurrConns":
                return int(value)
        return 0

    def _accepts(self) -> bool:
        try:
            with socket.create_connection((self.host, self.mqtt_port), _CONNECT_SECONDS):
                return True
        except OSError:
            return False


def _broker(name: str, mosquitto: Mosquitto) -> Broker:
    ports = {"mqtt": mosquitto.port}
    if mosquitto.websockets_port is not None:
        ports["ws"] = mosquitto.websockets_port
    return Broker(name, mosquitto.host, ports)
