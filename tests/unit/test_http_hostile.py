"""Clients that mean no good cannot keep probes and scrapers from the HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from shadowsvc.http import Limits, Response, serve
from tests.unit.test_http import ask, connection, ended, get, response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from shadowsvc.http import Server

ROUTES = {"/livez": lambda _: Response(200, "text/plain", b"alive\n")}
PATIENT = Limits(max_connections=8, max_head_bytes=2048, head_seconds=30, idle_seconds=30)


@pytest.fixture
async def patient() -> AsyncIterator[Server]:
    """A server whose time limits are too long to help."""
    server = await serve("127.0.0.1", 0, ROUTES, PATIENT)
    yield server
    await server.close()


async def drip(server: Server, stack: contextlib.AsyncExitStack) -> asyncio.StreamWriter:
    _, writer = await stack.enter_async_context(connection(server))
    writer.write(b"GET /livez HTTP/1.1\r\nHost: test\r\nX-Drip: ")
    return writer


async def test_heads_that_never_end_do_not_lock_out_a_probe(patient: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        writers = [await drip(patient, stack) for _ in range(10 * PATIENT.max_connections)]
        for writer in writers:
            writer.write(b"x")
        for _ in range(5):
            assert (await ask(patient, get("/livez", close=True)))[0] == 200
            assert patient.connections <= PATIENT.max_connections


async def test_a_flood_of_connections_is_bounded_and_a_probe_among_them_is_answered(
    patient: Server,
) -> None:
    async with contextlib.AsyncExitStack() as stack:

        async def flood() -> None:
            for _ in range(300):
                await stack.enter_async_context(connection(patient))
                assert patient.connections <= PATIENT.max_connections

        flooding = asyncio.create_task(flood())
        answered = 0
        while not flooding.done():
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                assert (await ask(patient, get("/livez", close=True)))[0] == 200
                answered += 1
        await flooding
        assert answered > 0


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: test\r\nX-Long: " + b"x" * 4096,
        b"GET /livez HTTP/1.1\r\nHost: test\r\n" + b"X-Many: x\r\n" * 400,
        b"GET /" + b"x" * 4096,
        b"GET /livez HTTP/1.1\r\nHost: test\r\nX-Folded: a\r\n" + b" a\r\n" * 1000,
    ],
    ids=["one long header", "many headers", "a long path", "a folded header"],
)
async def test_a_head_above_the_limit_is_refused_before_it_ends(
    patient: Server, head: bytes
) -> None:
    async with connection(patient) as (reader, writer):
        writer.write(head)
        status, _, _ = await response(reader)
        assert status == 431
        assert await ended(reader)


async def test_the_largest_head_below_the_limit_is_taken(patient: Server) -> None:
    bare = len(get("/livez", "X-Padding: ", close=True))
    padding = "X-Padding: " + "x" * (PATIENT.max_head_bytes - bare - 1)
    assert (await ask(patient, get("/livez", padding, close=True)))[0] == 200


async def test_one_client_that_sends_many_requests_at_once_does_not_hold_up_others(
    patient: Server,
) -> None:
    async with connection(patient) as (_, greedy):
        greedy.write(get("/livez") * 5000)
        for _ in range(3):
            assert (await ask(patient, get("/livez", close=True)))[0] == 200
