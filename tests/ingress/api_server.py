"""A small HTTP server that plays answers of the Kubernetes API.

Lives here: what a real API server does not do on demand: a version that has expired, a watch cut in
its middle, nonsense, silence. In the form of Kubernetes 1.33. Rules: it knows lists and watches of
EndpointSlices; every request is kept. Must not come in: what is easily seen on a real API server,
which `test_kubernetes.py` uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

__all__ = ["ApiServer", "endpoint_slice", "event", "expired"]


def endpoint_slice(
    name: str,
    addresses: dict[str, str],
    *,
    ports: dict[str, int] | None = None,
    ready: dict[str, bool] | None = None,
    version: str = "1",
    address_type: str = "IPv4",
) -> dict[str, Any]:
    """A slice of the Service `broker`; `addresses` by pod."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "shadowsvc",
            "uid": "2b4c1f6e-9d3a-4e57-8a55-0c2f5f1f6d11",
            "resourceVersion": version,
            "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"kubernetes.io/service-name": "broker"},
        },
        "addressType": address_type,
        "endpoints": [
            {
                "addresses": [address],
                "conditions": {
                    "ready": (ready or {}).get(pod, True),
                    "serving": True,
                    "terminating": not (ready or {}).get(pod, True),
                },
                "nodeName": "node-1",
                "targetRef": {"kind": "Pod", "name": pod, "namespace": "shadowsvc"},
            }
            for pod, address in addresses.items()
        ],
        "ports": [
            {"name": port, "port": number, "protocol": "TCP"}
            for port, number in (ports or {"mqtt": 1883}).items()
        ],
    }


def event(kind: str, thing: dict[str, Any]) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def expired(version: str = "1") -> dict[str, Any]:
    """What the API says when a version is too old."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": f"too old resource version: {version} (100)",
        "reason": "Expired",
        "code": 410,
    }


class ApiServer:
    """Answers with `slices`; a watch gets what is put into `lines`, and lasts until it is cut."""

    def __init__(self) -> None:
        self.slices: list[dict[str, Any]] = []
        self.version = "100"
        self.queries: list[dict[str, str]] = []
        self.status = 200
        """What a list is answered with; other than 200 with a message."""
        self.body: bytes | None = None
        """In place of a list."""
        self.on_watch: Callable[[dict[str, str]], Awaitable[bytes | None]] | None = None
        """Answers a watch at once with a line, or lets it go on with None."""
        self.page = 0
        """How many slices a page of a list has; 0: all."""
        self.open_watches = 0
        self._watches: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, on the same port each time."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Be away: connections break, new ones are refused."""
        if self._server is not None:
            self._server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._server.wait_closed()
            self._server = None

    def kubeconfig(self, folder: Path) -> Path:
        """A file that leads here."""
        file = folder / "kubeconfig"
        file.write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
            "contexts: [{name: c, context: {cluster: c, user: u}}]\n"
            f'clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{self._port}"}}}}]\n'
            "users: [{name: u, user: {token: t0ken}}]\n"
        )
        return file

    async def tell(self, line: bytes) -> None:
        """Send a line to every watch."""
        for writer in list(self._watches):
            writer.write(b"%x\r\n%s\r\n" % (len(line), line))
            await writer.drain()

    async def cut(self) -> None:
        """Break every watch in its middle."""
        for writer in list(self._watches):
            writer.write(b'40\r\n{"type":"MODI')
            await writer.drain()
            writer.transport.abort()

    async def end(self) -> None:
        """End every watch in good order, as a server does after its time."""
        for writer in list(self._watches):
            self._watches.discard(writer)
            writer.write(b"0\r\n\r\n")
            await writer.drain()

    @property
    def lists(self) -> list[dict[str, str]]:
        return [query for query in self.queries if "watch" not in query]

    @property
    def watches(self) -> list[dict[str, str]]:
        return [query for query in self.queries if "watch" in query]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                target = head.split(b" ", 2)[1].decode()
                assert b"Bearer t0ken" in head
                parts = urlsplit(target)
                assert parts.path.endswith("/namespaces/shadowsvc/endpointslices")
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                self.queries.append(query)
                if "watch" in query:
                    await self._watch(reader, writer, query)
                else:
                    self._list(writer, query)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._watches.discard(writer)
            writer.transport.abort()

    def _list(self, writer: asyncio.StreamWriter, query: dict[str, str]) -> None:
        begin = int(query.get("continue", "0"))
        end = begin + self.page if self.page else len(self.slices)
        metadata = {"resourceVersion": self.version}
        if end < len(self.slices):
            metadata["continue"] = str(end)
        made: dict[str, Any] = {
            "kind": "EndpointSliceList",
            "apiVersion": "discovery.k8s.io/v1",
            "metadata": metadata,
            "items": self.slices[begin:end],
        }
        if self.status != 200:
            made = {"kind": "Status", "message": "as the test wants it", "code": self.status}
        body = json.dumps(made).encode() if self.body is None else self.body
        writer.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (self.status, len(body), body)
        )

    async def _watch(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, query: dict[str, str]
    ) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        line = None if self.on_watch is None else await self.on_watch(query)
        if line is not None:
            writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(line), line))
            return
        await writer.drain()
        self._watches.add(writer)
        self.open_watches += 1
        try:
            with contextlib.suppress(OSError):
                while writer in self._watches and not reader.at_eof():  # noqa: ASYNC110 - two ends
                    await asyncio.sleep(0.02)
        finally:
            self.open_watches -= 1
