"""A real HAProxy under a supervisor, in the test's event loop, with real brokers behind.

Lives here: brokers on loopback addresses of their own, as pods are; the supervisor with settings
for the test; what HAProxy says. Rules: free ports, a folder of its own, nothing outlives the test.
Must not come in: assertions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from backing import Mosquitto, free_port
from backing.process import find_program
from shadowsvc.errors import HaproxyFailed
from shadowsvc.ingress.metrics import IngressMetrics
from shadowsvc.ingress.model import Broker
from shadowsvc.ingress.runtime import Runtime
from shadowsvc.ingress.supervise import Supervisor
from shadowsvc.settings import Ingress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["HAPROXY", "LISTEN", "Stage", "broker_of", "settings_of", "until"]

HAPROXY = find_program("haproxy", package="haproxy", folders=("/usr/local/sbin", "/usr/sbin"))
LISTEN = "127.0.0.1"
_LIMIT_SECONDS = 20.0


def settings_of(folder: Path, **given: Any) -> Ingress:
    """Settings on free ports; sockets lie in a short path, as the kernel wants it."""
    fields: dict[str, Any] = {
        "haproxy": HAPROXY,
        "start_haproxy": True,
        "directory": folder,
        "listen_host": LISTEN,
        "statistics_host": LISTEN,
        "listen_mqtt": free_port(),
        "listen_mqtts": free_port(),
        "listen_websocket": free_port(),
        "listen_websocket_tls": free_port(),
        "listen_statistics": free_port(),
        "mqtt_ports": ("mqtt",),
        "websocket_ports": ("ws",),
        "max_connections": 2000,
        "max_connection_rate": 0,
        "health_check_seconds": 0.2,
        "slow_start_seconds": 0,
        **given,
    }
    return Ingress.model_validate(fields)


def broker_of(name: str, mosquitto: Mosquitto) -> Broker:
    """The broker as the API would name it."""
    ports = {"mqtt": mosquitto.port}
    if mosquitto.websockets_port is not None:
        ports["ws"] = mosquitto.websockets_port
    return Broker(name, mosquitto.host, ports)


async def until(
    what: str, met: Callable[[], bool | Awaitable[bool]], limit_seconds: float = _LIMIT_SECONDS
) -> None:
    """Wait until something is so; raises AssertionError after the limit."""
    deadline = time.monotonic() + limit_seconds
    while True:
        found = met()
        if not isinstance(found, bool):
            found = await found
        if found:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_seconds:g} s: {what}")
        await asyncio.sleep(0.05)


class Stage:
    """A supervisor at work; an asynchronous context manager."""

    def __init__(self, settings: Ingress) -> None:
        self.settings = settings
        self.metrics = IngressMetrics()
        self.supervisor = Supervisor(settings, self.metrics, connections=settings.max_connections)
        self.runtime = Runtime(settings.directory / "runtime.sock")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.supervisor.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self.supervisor.stop(0.2)

    @property
    def pid(self) -> int | None:
        """Of HAProxy's master, if the supervisor started it."""
        return self.supervisor._process.pid

    async def have(self, *brokers: Broker) -> None:
        """Let the API name these, and wait until HAProxy has them and no others."""
        self.supervisor.brokers_changed(brokers)
        wanted = {broker.name for broker in brokers}
        await until(f"HAProxy has {wanted}", lambda: self._has(wanted))

    async def servers(self, *, backend: str | None = None) -> set[str]:
        """The servers that take connections, by name."""
        live = await self.runtime.servers()
        return {
            name
            for (its_backend, name), server in live.items()
            if server.takes_connections and backend in {None, its_backend}
        }

    async def _has(self, wanted: set[str]) -> bool:
        if self.supervisor.fault is not None:
            return False
        try:
            names = await self.servers()
        except HaproxyFailed:
            return False
        return {name.partition(".")[0] for name in names} == wanted

    async def connections(self) -> dict[str, int]:
        """Connections by pod, as HAProxy counts them."""
        lines = (await self.runtime.ask("show stat -1 4 -1")).splitlines()
        columns = lines[0].removeprefix("# ").split(",")
        found: dict[str, int] = {}
        for line in lines[1:]:
            row = dict(zip(columns, line.split(","), strict=False))
            pod = row["svname"].partition(".")[0]
            found[pod] = found.get(pod, 0) + int(row["scur"])
        return found


def folder_for(tmp_path: Path) -> Path:
    """A short path: a socket's may have 107 bytes."""
    folder = Path("/tmp") / f"ingress-{uuid.uuid4().hex[:8]}"  # noqa: S108 - removed by the fixture
    folder.mkdir()
    (tmp_path / "haproxy").symlink_to(folder)
    return folder


def mosquittos(hosts: Sequence[str], **given: Any) -> list[Mosquitto]:
    """Brokers, one on each address, not started."""
    return [Mosquitto(host=host, websockets=True, **given) for host in hosts]
