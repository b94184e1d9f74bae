"""Publishing updates to a broker in a container, and reading back what became of them.

Lives here: an independent client (aiomqtt), the page of the load rig as a client of it, and rows as
Cassandra's own `cqlsh` shows them. Rules: every publish is acknowledged by the broker before it
counts; every wait has a limit. Must not come in: anything of the service, and how containers are
started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import aiomqtt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

__all__ = ["Publisher", "locust", "rows", "wait_for"]

QUERY = "SELECT JSON device, path, value FROM shadowsvc.shadow"
_POLL_SECONDS = 0.25


class Publisher:
    """A connection that publishes; one value for each device.

    Args:
        host: of the broker.
        port: likewise.
        prefix: the service's topic prefix.
        websocket: go over WebSocket, path `/mqtt`.
        login: user name and password; the name is the client id, too.
    """

    def __init__(
        self,
        host: str,
        port: int,
        prefix: str = "things",
        *,
        websocket: bool = False,
        login: tuple[str, str] | None = None,
    ) -> None:
        self._prefix = prefix
        transport = "websockets" if websocket else "tcp"
        user, password = login or (None, None)
        self._make = lambda: aiomqtt.Client(
            host,
            port,
            username=user,
            password=password,
            identifier=user,
            protocol=aiomqtt.ProtocolVersion.V5,
            transport=transport,  # type: ignore[arg-type]
            websocket_path="/mqtt" if websocket else None,
        )
        self.taken: dict[str, int] = {}
        """What the broker acknowledged: device and value."""

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[aiomqtt.Client]:
        async with self._make() as client:
            yield client

    async def publish(self, client: aiomqtt.Client, device: str, value: int) -> None:
        document = {
            "state": {"reported": {"value": value}},
            "timestamp": time.time_ns() // 1000,
        }
        topic = f"{self._prefix}/{device}/shadow/update"
        await client.publish(topic, json.dumps(document), qos=1, timeout=30)
        self.taken[device] = value

    def send(self, device: str, value: int) -> None:
        """Publish one update and wait for the broker's acknowledgement."""

        async def one() -> None:
            async with self.connected() as client:
                await self.publish(client, device, value)

        asyncio.run(one())

    def send_while(
        self, devices: Iterable[str], at: int, happens: Callable[[], object], *, rate: float = 100
    ) -> None:
        """Publish one update for each device; `happens` runs beside it from the `at`th on."""

        async def all_of_them() -> None:
            async with self.connected() as client, asyncio.TaskGroup() as group:
                for number, device in enumerate(devices):
                    if number == at:
                        group.create_task(asyncio.to_thread(happens))
                    group.create_task(self.publish(client, device, number))
                    await asyncio.sleep(1 / rate)

        asyncio.run(all_of_them())


def rows(output: str) -> dict[str, int]:
    """Return device and value of each row that `cqlsh` printed for `QUERY`."""
    found: dict[str, int] = {}
    for line in output.splitlines():
        if line.strip().startswith("{"):
            row: dict[str, Any] = json.loads(line)
            if row["path"] == "/value":
                found[row["device"]] = json.loads(row["value"])
    return found


def locust(port: int, path: str, **fields: str) -> Any:
    """Return what the load rig's page answers, to a form if there are fields.

    Raises:
        AssertionError: it does not answer, yet.
    """
    data = urllib.parse.urlencode(fields).encode() if fields else None
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", data, timeout=20) as page:
            return json.load(page)
    except OSError as error:
        raise AssertionError(error) from error


def wait_for(condition: Callable[[], object], what: str, limit_seconds: float = 60) -> None:
    """Wait until `condition` is true; an AssertionError in it counts as not yet."""
    deadline = time.monotonic() + limit_seconds
    while True:
        why: object = ""
        try:
            if condition():
                return
        except AssertionError as error:
            why = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_seconds:g} s: {what}; {why}")
        time.sleep(_POLL_SECONDS)
