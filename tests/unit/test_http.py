"""What the HTTP server promises to probes and scrapers, and what it refuses to everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import pytest
import structlog.testing

from shadowsvc.errors import ConfigError
from shadowsvc.http import Limits, Request, Response, Route, Server, serve
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LIVE = Response(200, "text/plain", b"alive\n")


def echo(request: Request) -> Response:
    text = f"{request.method} {request.path} {request.query} {request.accept}"
    return Response(200, "text/plain", text.encode())


def broken(_: Request) -> Response:
    raise RuntimeError("no such luck")


def large(_: Request) -> Response:
    return Response(200, "text/plain", b"x" * 20_000_000)


ROUTES: dict[str, Route] = {
    "/livez": lambda _: LIVE,
    "/echo": echo,
    "/broken": broken,
    "/large": large,
    "/both": {"GET": echo, "POST": echo, "DELETE": echo},
    "/change": {"POST": echo},
}
QUICK = Limits(
    max_connections=3,
    max_head_bytes=2048,
    head_seconds=0.2,
    idle_seconds=0.4,
    write_seconds=0.3,
)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = await serve("127.0.0.1", 0, ROUTES)
    yield server
    await server.close()


@pytest.fixture
async def quick() -> AsyncIterator[Server]:
    server = await serve("127.0.0.1", 0, ROUTES, QUICK)
    yield server
    await server.close()


@contextlib.asynccontextmanager
async def connection(
    server: Server,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def response(reader: asyncio.StreamReader, *, body: bool = True) -> tuple[int, str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        int(line.partition(":")[2])
        for line in head.splitlines()
        if line.lower().startswith("content-length")
    )
    content = await reader.readexactly(length) if body else b""
    return int(head.split()[1]), head.lower(), content


async def ask(server: Server, raw: bytes) -> tuple[int, str, bytes]:
    """Send `raw`, return the response; the server must close the connection after it."""
    async with connection(server) as (reader, writer):
        writer.write(raw)
        answer = await response(reader)
        assert await reader.read() == b""
        return answer


def get(target: str, *headers: str, method: str = "GET", close: bool = False) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: test", *headers]
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


async def test_a_handler_sees_path_query_and_accept(server: Server) -> None:
    raw = get("/echo?name[]=a%20b", "Accept: text/plain", "accept: */*", close=True)
    status, head, body = await ask(server, raw)
    assert status == 200
    assert "content-type: text/plain" in head
    assert body == b"GET /echo name[]=a%20b text/plain, */*"


async def test_head_has_the_length_and_no_body(server: Server) -> None:
    async with connection(server) as (reader, writer):
        writer.write(get("/livez", method="HEAD", close=True))
        status, head, _ = await response(reader, body=False)
        assert status == 200
        assert f"content-length: {len(LIVE.body)}" in head
        assert await reader.read() == b""


async def test_a_connection_carries_many_requests_also_pipelined(server: Server) -> None:
    async with connection(server) as (reader, writer):
        for _ in range(3):
            writer.write(get("/livez"))
            assert (await response(reader))[2] == LIVE.body
        writer.write(get("/echo?1") + get("/echo?2"))
        assert (await response(reader))[2] == b"GET /echo 1 "
        assert (await response(reader))[2] == b"GET /echo 2 "
        assert server.connections == 1


async def test_a_request_may_come_in_any_pieces(server: Server) -> None:
    async with connection(server) as (reader, writer):
        for byte in get("/livez"):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert (await response(reader))[0] == 200


async def test_http_1_0_is_answered_and_closed(server: Server) -> None:
    status, _, body = await ask(server, b"GET /livez HTTP/1.0\r\n\r\n")
    assert (status, body) == (200, LIVE.body)


async def test_an_unknown_path_is_404_and_names_those_that_exist(server: Server) -> None:
    status, _, body = await ask(server, get("/", close=True))
    assert status == 404
    assert b"/livez" in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_other_methods_are_405_and_end_the_connection(server: Server, method: str) -> None:
    raw = get("/livez", "Content-Length: 4", method=method) + b"body"
    status, head, _ = await ask(server, raw)
    assert status == 405
    assert "allow: get, head" in head


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_a_route_answers_the_methods_that_it_names(server: Server, method: str) -> None:
    raw = get("/both?a=1", "Content-Length: 0", method=method, close=True)
    status, _, body = await ask(server, raw)
    assert (status, body) == (200, f"{method} /both a=1 ".encode())


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        ("/both", "PUT", "allow: delete, get, head, post"),
        ("/change", "GET", "allow: post"),
        ("/change", "HEAD", "allow: post"),
        ("/livez", "POST", "allow: get, head"),
    ],
)
async def test_a_method_that_a_route_does_not_name_is_405_and_names_those(
    server: Server, path: str, method: str, allowed: str
) -> None:
    async with connection(server) as (reader, writer):
        writer.write(get(path, method=method))
        status, head, _ = await response(reader, body=method != "HEAD")
        assert status == 405
        assert f"{allowed}\r\n" in head
        assert await ended(reader)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", ""])
async def test_no_page_in_a_browser_changes_anything(server: Server, origin: str) -> None:
    for method, path in (("POST", "/change"), ("DELETE", "/both")):
        raw = get(path, f"Origin: {origin}", method=method, close=True)
        assert (await ask(server, raw))[0] == 403
    assert (await ask(server, get("/both", f"Origin: {origin}", close=True)))[0] == 200


async def test_a_body_is_refused_whatever_the_method(server: Server) -> None:
    raw = get("/change", "Content-Length: 2", method="POST") + b"hi"
    assert (await ask(server, raw))[0] == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /livez\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET http://[::1/livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ],
    ids=["tls", "http0.9", "no-host", "two-hosts", "body", "chunked", "bad-target"],
)
async def test_what_is_no_proper_request_is_400(server: Server, raw: bytes) -> None:
    assert (await ask(server, raw))[0] == 400


async def test_a_head_too_large_is_431(quick: Server) -> None:
    status, _, _ = await ask(quick, get("/livez", "X-Padding: " + "x" * 3 * QUICK.max_head_bytes))
    assert status == 431


async def test_a_failing_handler_is_500_and_one_event_and_the_server_lives(server: Server) -> None:
    with structlog.testing.capture_logs() as events:
        status, _, body = await ask(server, get("/broken", close=True))
    assert status == 500
    assert b"no such luck" not in body
    assert [(event["event"], event["path"]) for event in events] == [
        ("http_handler_failed", "/broken")
    ]
    assert (await ask(server, get("/livez", close=True)))[0] == 200


async def test_a_request_that_never_ends_is_cut_off(quick: Server) -> None:
    async with connection(quick) as (reader, writer):
        writer.write(b"GET /livez HTTP/1.1\r\n")
        await asyncio.sleep(QUICK.head_seconds / 2)
        writer.write(b"X-Drip: 1\r\n")  # a drip does not buy more time
        assert await ended(reader)
    assert quick.connections == 0


async def test_a_silent_connection_is_closed(quick: Server) -> None:
    async with connection(quick) as (reader, writer):
        writer.write(get("/livez"))
        await response(reader)
        assert await ended(reader)


async def test_a_client_that_does_not_read_is_cut_off(quick: Server) -> None:
    async with connection(quick) as (_, writer):
        writer.write(get("/large"))
        await until(lambda: quick.connections == 1)
        await until(lambda: quick.connections == 0)


async def test_idle_clients_cannot_lock_out_a_probe(quick: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        idle = [await stack.enter_async_context(connection(quick)) for _ in range(3)]
        for reader, writer in idle:
            writer.write(get("/livez"))
            await response(reader)
        assert (await ask(quick, get("/livez", close=True)))[0] == 200
        assert await ended(idle[0][0])  # the one that was quiet for longest
        assert quick.connections <= QUICK.max_connections


async def test_close_ends_open_connections_and_frees_the_port(server: Server) -> None:
    port = server.port
    async with connection(server) as (reader, writer):
        writer.write(get("/livez"))
        await response(reader)
        await server.close()
        assert await ended(reader)
    again = await serve("127.0.0.1", port, ROUTES)
    await again.close()
    await again.close()


async def test_a_port_in_use_names_the_setting(server: Server) -> None:
    with pytest.raises(ConfigError, match=rf"SHADOWSVC_HTTP__PORT: .*{server.port}.* in use"):
        await serve("127.0.0.1", server.port, ROUTES)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
async def test_a_bad_address_names_the_setting(host: str) -> None:
    with pytest.raises(ConfigError, match="SHADOWSVC_HTTP__HOST"):
        await serve(host, 0, ROUTES)


async def test_a_client_that_resets_leaves_nothing_behind(server: Server) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.send(b"GET /livez")
    await until(lambda: server.connections == 1)
    sock.close()
    await until(lambda: server.connections == 0)
