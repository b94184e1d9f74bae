"""WebSocket frames, against wsproto as the server: it knows the standard and not our code."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    Request,
    TextMessage,
)

from load.errors import BrokenConnection
from load.websocket import WebSocketClient

if TYPE_CHECKING:
    from collections.abc import Iterator


def pair() -> tuple[WebSocketClient, WSConnection, bytes]:
    """A client that has asked, a server that has answered, and the server's answer."""
    client, server = WebSocketClient("there:80", "/mqtt"), WSConnection(ConnectionType.SERVER)
    server.receive_data(client.request())
    request = next(server.events())
    assert isinstance(request, Request)
    assert (request.host, request.target, request.subprotocols) == ("there:80", "/mqtt", ["mqtt"])
    return client, server, server.send(AcceptConnection(subprotocol="mqtt"))


def connected() -> tuple[WebSocketClient, WSConnection]:
    client, server, answer = pair()
    assert client.receive(answer) == []
    assert client.upgraded
    return client, server


def bytes_of(server: WSConnection) -> bytes:
    return b"".join(bytes(one.data) for one in server.events() if isinstance(one, BytesMessage))


def divisions(data: bytes) -> Iterator[tuple[bytes, ...]]:
    """Every division in two, and byte by byte."""
    for at in range(len(data) + 1):
        yield data[:at], data[at:]
    yield tuple(bytes((one,)) for one in data)


def test_the_handshake_is_understood_wherever_it_is_split() -> None:
    answer = pair()[2]
    for at in range(len(answer) + 1):
        client, server, answer = pair()
        following = server.send(BytesMessage(b"first"))
        whole = answer + following
        found = [*client.receive(whole[:at]), *client.receive(whole[at:])]
        assert client.upgraded
        assert found == [b"first"]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 300])
def test_a_frame_is_the_same_wherever_it_is_split(size: int) -> None:
    payload = bytes(number % 256 for number in range(size))
    server = connected()[1]
    frames = server.send(BytesMessage(payload)) + server.send(BytesMessage(b"next"))
    for parts in divisions(frames):
        client, _ = connected()
        found = [one for part in parts for one in client.receive(part)]
        assert b"".join(found) == payload + b"next"
        assert client._buffer == b"", "a connection at rest holds nothing"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 125, 126, 65_535, 65_536, 70_001])
def test_what_the_client_frames_is_what_the_server_reads(size: int) -> None:
    client, server = connected()
    payload = bytes(number * 7 % 256 for number in range(size))
    frame = client.frame(payload)
    server.receive_data(frame)
    assert bytes_of(server) == payload
    assert frame[1] & 0x80, "masked (RFC 6455 §5.3)"
    assert size < 16 or payload not in frame


@given(st.lists(st.binary(max_size=200), max_size=8), st.integers(1, 40))
def test_any_messages_in_any_division_arrive_whole(payloads: list[bytes], step: int) -> None:
    client, server = connected()
    data = b"".join(server.send(BytesMessage(one)) for one in payloads)
    found = [
        one for at in range(0, len(data), step) for one in client.receive(data[at : at + step])
    ]
    assert b"".join(found) == b"".join(payloads)


def test_a_message_in_several_frames_is_one_stream_of_bytes() -> None:
    client, server = connected()
    data = server.send(BytesMessage(b"ab", message_finished=False))
    data += server.send(Ping(b"between"))
    data += server.send(BytesMessage(b"cd"))
    assert b"".join(client.receive(data)) == b"abcd"
    server.receive_data(client.pending)
    assert [bytes(one.payload) for one in server.events() if isinstance(one, Pong)] == [b"between"]


def test_a_close_is_answered_and_ends_the_connection() -> None:
    client, server = connected()
    data = server.send(BytesMessage(b"last")) + server.send(CloseConnection(code=1001))
    assert client.receive(data + b"\x82\x01x") == [b"last"], "what follows a close is nothing"
    assert client.closed
    server.receive_data(client.pending)
    assert [one.code for one in server.events() if isinstance(one, CloseConnection)] == [1001]


def test_the_client_closes_with_code_1000() -> None:
    client, server = connected()
    server.receive_data(client.close())
    assert [one.code for one in server.events() if isinstance(one, CloseConnection)] == [1000]


def test_a_text_frame_is_no_mqtt() -> None:
    client, server = connected()
    with pytest.raises(BrokenConnection, match=r"text frame.*MQTT-6\.0\.0-1"):
        client.receive(server.send(TextMessage("text")))


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"\x82\x81\0\0\0\0x", "masked frame"),
        (b"\xc2\x01x", "extension"),
        (b"\x83\x00", "unknown kind"),
        (b"\x82\x7f" + (1 << 40).to_bytes(8, "big"), "a frame of 1099511627776 bytes"),
    ],
)
def test_a_frame_that_breaks_the_standard_ends_the_connection(frame: bytes, why: str) -> None:
    client, _ = connected()
    with pytest.raises(BrokenConnection, match=why):
        client.receive(frame)


def test_a_refused_handshake_tells_the_status_and_the_path() -> None:
    client, server, _ = pair()
    refusing = WSConnection(ConnectionType.SERVER)
    refusing.receive_data(client.request())
    assert server is not refusing
    with pytest.raises(BrokenConnection, match=r"/mqtt was answered with 'HTTP/1.1 404.*path"):
        client.receive(refusing.send(RejectConnection(status_code=404)))


@pytest.mark.parametrize("changed", ["accept", "protocol"])
def test_an_answer_to_another_question_is_refused(changed: str) -> None:
    client = WebSocketClient("there")
    key = client.request().partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r")[0]
    guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key + guid, usedforsecurity=False).digest())
    headers: dict[bytes, Any] = {
        b"Sec-WebSocket-Accept": accept,
        b"Sec-WebSocket-Protocol": b"mqtt",
    }
    if changed == "accept":
        headers[b"Sec-WebSocket-Accept"] = accept[::-1]
    else:
        headers[b"Sec-WebSocket-Protocol"] = b"chat"
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers.items())
    with pytest.raises(BrokenConnection, match=r"not to our question|does not speak mqtt"):
        client.receive(b"HTTP/1.1 101 Switching Protocols\r\n" + lines + b"\r\n")
    assert not client.upgraded


def test_an_answer_without_end_is_not_kept() -> None:
    client = WebSocketClient("there")
    client.request()
    for _ in range(16):
        client.receive(b"x" * 1000)
    with pytest.raises(BrokenConnection, match="without end"):
        client.receive(b"x" * 1000)


def test_a_second_request_begins_anew() -> None:
    client, server = connected()
    client.receive(server.send(BytesMessage(b"half a frame"))[:5])
    again = WSConnection(ConnectionType.SERVER)
    again.receive_data(client.request())
    next(again.events())
    answer = again.send(AcceptConnection(subprotocol="mqtt")) + again.send(BytesMessage(b"new"))
    assert client.receive(answer) == [b"new"]
