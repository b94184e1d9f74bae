"""A small HTTP/1.1 server on the event loop, for probes, metrics and an operator's few commands.

Lives here: connections, their limits, and the way from a request to a plain function. h11 reads and
writes the protocol (RFC 9112); this room gives it bytes and time limits.

Rules:
- GET and HEAD, and what else a route names. Another method, or a request with a body, is refused
  and ends the connection. No method that changes something is taken from a page in a browser (a
  request with the header Origin): there is no login here, so whoever reaches the port may call.
- Nobody holds memory or a connection for ever: a request's head has a size and a time limit, a
  connection without a request a longer one, a client that does not read its response another, and
  at `max_connections` the connection that was quiet for longest makes room for a new one, so that
  idle clients cannot lock out the probes.
- A handler is a plain function that must return at once: it runs on the loop. What it raises is one
  log event and a response 500.

What the answers say must not come in here.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import NoReturn, Self
from urllib.parse import unquote, urlsplit

import h11
import orjson
import structlog

from shadowsvc.errors import ConfigError

__all__ = ["Handler", "Limits", "Request", "Response", "Route", "Server", "serve"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """What a handler gets to see of a request."""

    method: str
    """One of those that the route has; HEAD where it has GET."""
    path: str
    """Decoded, without the query."""
    query: str
    """As it came, without the question mark."""
    headers: Mapping[str, str]
    """By lower-case name; values of a repeated header are joined by commas (RFC 9110 §5.3)."""

    @property
    def accept(self) -> str:
        """The Accept header, empty without one."""
        return self.headers.get("accept", "")


@dataclass(frozen=True, slots=True)
class Response:
    """What a handler answers with."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers."""

    @classmethod
    def text(cls, status: int, line: str, **headers: str) -> Self:
        """Answer with one line for people."""
        return cls(status, "text/plain; charset=utf-8", f"{line}\n".encode(), headers)

    @classmethod
    def json(cls, status: int, fields: object, *, indent: bool = False) -> Self:
        """Answer with JSON; indented where people read it."""
        option = orjson.OPT_APPEND_NEWLINE | (orjson.OPT_INDENT_2 if indent else 0)
        return cls(status, "application/json", orjson.dumps(fields, option=option))


Handler = Callable[[Request], Response]
Route = Handler | Mapping[str, Handler]
"""What answers GET, or what answers each method; where GET is answered, HEAD is too."""

_SAFE = frozenset({"GET", "HEAD"})


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all of them, may take."""

    max_connections: int = 64
    max_head_bytes: int = 16 * 1024
    """Request line and headers together; more is answered with 431."""
    head_seconds: float = 10
    """From the first byte of a request to the end of its head."""
    idle_seconds: float = 120
    """From one response to the next request; longer than usual scrape intervals."""
    write_seconds: float = 10
    """For a client to take a response."""


class Server:
    """A server that listens; `serve` makes it."""

    def __init__(self, routes: Mapping[str, Route], limits: Limits) -> None:
        self._routes: dict[str, dict[str, Handler]] = {
            path: dict(route) if isinstance(route, Mapping) else {"GET": route}
            for path, route in routes.items()
        }
        for handlers in self._routes.values():
            if "GET" in handlers:
                handlers["HEAD"] = handlers["GET"]
        self._limits = limits
        # The key is the connection's task; the one that was quiet for longest comes first.
        self._connections: OrderedDict[asyncio.Task[None], asyncio.StreamWriter] = OrderedDict()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """TCP port, also when 0 was asked for."""
        return int(self._listening().sockets[0].getsockname()[1])

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    async def close(self) -> None:
        """Stop listening and end open connections."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if server is not None:
            await server.wait_closed()

    def _listening(self) -> asyncio.Server:
        if self._server is None:
            raise RuntimeError("the HTTP server is closed")
        return self._server

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()
            return
        if len(self._connections) >= self._limits.max_connections:
            oldest, its_writer = next(iter(self._connections.items()))
            its_writer.transport.abort()
            oldest.cancel()
            self._connections.pop(oldest, None)
        # `drain` then waits until the client has taken everything.
        writer.transport.set_write_buffer_limits(high=0)
        connection = _Connection(reader, writer, self._limits, self._methods, self._answer)
        task = asyncio.ensure_future(connection.run(self._touch))
        task.set_name("http connection")
        self._connections[task] = writer
        task.add_done_callback(lambda done: self._connections.pop(done, None))

    def _touch(self) -> None:
        task = asyncio.current_task()
        if task is not None and task in self._connections:
            self._connections.move_to_end(task)

    def _methods(self, path: str) -> Collection[str]:
        handlers = self._routes.get(path)
        return _SAFE if handlers is None else handlers.keys()

    def _answer(self, request: Request) -> Response:
        handlers = self._routes.get(request.path)
        if handlers is None:
            return _plain(HTTPStatus.NOT_FOUND, "there are: " + " ".join(sorted(self._routes)))
        if request.method not in _SAFE and "origin" in request.headers:
            return _plain(HTTPStatus.FORBIDDEN, "this is nothing for a page in a browser")
        try:
            return handlers[request.method](request)
        except Exception:  # noqa: BLE001 - whatever it is, a probe must not end the server
            _log.exception("http_handler_failed", path=request.path)
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR, "see the log: http_handler_failed")


async def serve(
    host: str, port: int, routes: Mapping[str, Route], limits: Limits | None = None
) -> Server:
    """Listen on `host` and `port` (0: any free one) and answer with `routes`, by exact path.

    Raises:
        ConfigError: it cannot listen there; names SHADOWSVC_HTTP__PORT or SHADOWSVC_HTTP__HOST.
    """
    limits = limits or Limits()
    server = Server(routes, limits)
    try:
        server._server = await asyncio.start_server(  # noqa: SLF001 - its own factory
            server._accept,  # noqa: SLF001
            host,
            port,
            limit=limits.max_head_bytes,
        )
    except (OSError, OverflowError) as error:
        _refuse(host, port, error)
    return server


class _Connection:
    """One client: requests one after another, each answered before the next is looked at."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: Limits,
        methods: Callable[[str], Collection[str]],
        answer: Callable[[Request], Response],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._methods = methods
        self._answer = answer
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.max_head_bytes)

    async def run(self, touch: Callable[[], None]) -> None:
        """Serve until either side is done; errors of the network end it quietly."""
        graceful = False
        try:
            while await self._one():
                touch()
            graceful = True
        except (OSError, TimeoutError, h11.LocalProtocolError):
            pass
        finally:
            if graceful:
                self._writer.close()
            else:
                self._writer.transport.abort()

    async def _one(self) -> bool:
        """Read a request and answer it; tell whether another may follow."""
        try:
            request = await self._request()
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            await self._respond(_plain(status, str(error)), head=False, last=True)
            return False
        if request is None:
            return False
        head = request.method == b"HEAD"
        asked = self._look_at(request)
        if isinstance(asked, Response):
            await self._respond(asked, head=head, last=True)
            return False
        await self._respond(self._answer(asked), head=head, last=False)
        if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
            return False
        self._h11.start_next_cycle()
        return True

    def _look_at(self, event: h11.Request) -> Request | Response:
        """Return the request as a handler sees it, or the answer that refuses it."""
        try:
            asked = _request(event)
        except ValueError as error:
            return _plain(HTTPStatus.BAD_REQUEST, str(error))
        methods = self._methods(asked.path)
        if asked.method not in methods:
            allowed = ", ".join(sorted(methods))
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, f"there is {allowed}", allow=allowed)
        if _has_body(event) or not isinstance(self._h11.next_event(), h11.EndOfMessage):
            return _plain(HTTPStatus.BAD_REQUEST, "a request has no body here")
        return asked

    async def _request(self) -> h11.Request | None:
        """Return the next request's head, or None when the client is done or too slow."""
        limit = self._limits.head_seconds if self._h11.trailing_data[0] else None
        try:
            async with asyncio.timeout(limit or self._limits.idle_seconds) as deadline:
                while (event := self._h11.next_event()) is h11.NEED_DATA:
                    data = await self._reader.read(self._limits.max_head_bytes)
                    if data and limit is None:
                        limit = self._limits.head_seconds
                        deadline.reschedule(asyncio.get_running_loop().time() + limit)
                    self._h11.receive_data(data)
        except TimeoutError:
            return None
        return event if isinstance(event, h11.Request) else None

    async def _respond(self, response: Response, *, head: bool, last: bool) -> None:
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Cache-Control", "no-store"),
            *response.headers.items(),
        ]
        if last:
            headers.append(("Connection", "close"))
        status = HTTPStatus(response.status)
        parts = [
            self._h11.send(
                h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
            ),
            None if head else self._h11.send(h11.Data(data=response.body)),
            self._h11.send(h11.EndOfMessage()),
        ]
        self._writer.write(b"".join(filter(None, parts)))
        async with asyncio.timeout(self._limits.write_seconds):
            await self._writer.drain()


def _request(event: h11.Request) -> Request:
    headers: dict[str, str] = {}
    for raw_name, raw_value in event.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    target = urlsplit(event.target.decode("ascii"))
    return Request(event.method.decode("ascii"), unquote(target.path), target.query, headers)


def _has_body(event: h11.Request) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in event.headers
    )


def _plain(status: HTTPStatus, text: str, **headers: str) -> Response:
    return Response.text(status, f"{status} {status.phrase}: {text}", **headers)


def _refuse(host: str, port: int, error: Exception) -> NoReturn:
    number = getattr(error, "errno", None)
    where = f"cannot listen on {host}:{port} for HTTP"
    if number == errno.EADDRINUSE:
        line = f"SHADOWSVC_HTTP__PORT: {where}: the port is in use; choose another, or 0 for any"
    elif number == errno.EACCES or isinstance(error, OverflowError):
        line = f"SHADOWSVC_HTTP__PORT: {where}: {error}"
    elif isinstance(error, socket.gaierror) or number == errno.EADDRNOTAVAIL:
        line = f"SHADOWSVC_HTTP__HOST: {where}: {error}"
    else:
        line = f"SHADOWSVC_HTTP__HOST, SHADOWSVC_HTTP__PORT: {where}: {error}"
    raise ConfigError([line]) from error
