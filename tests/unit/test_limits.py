"""Everything that a device controls has a limit: the largest is taken, one more is rejected.

The figures are the defaults, so that a changed default is noticed here.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from shadowsvc.decoding import decoder_limits
from shadowsvc.errors import Rejected
from shadowsvc.settings import Settings
from shadowsvc.shadow.document import REASONS, Decoder
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.deadletter import DeadLetter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shadowsvc.shadow.update import Update

TOPIC = "things/lamp/shadow/update"
NOW_US = time.time_ns() // 1000


def decode(
    payload: bytes | dict[str, Any],
    topic: str = TOPIC,
    properties: Sequence[tuple[str, str]] = (),
) -> Update:
    decoder = Decoder(TopicParser("things"), decoder_limits(Settings()))
    if isinstance(payload, dict):
        payload = json.dumps(payload).encode()
    return decoder.decode(topic, payload, properties, NOW_US)


def reported(content: Any) -> dict[str, Any]:
    return {"state": {"reported": content}}


def rejected(reason: str, *arguments: Any) -> None:
    assert reason in REASONS
    with pytest.raises(Rejected) as caught:
        decode(*arguments)
    assert caught.value.reason == reason


def nested(levels: int) -> Any:
    node: Any = 1
    for _ in range(levels):
        node = {"k": node}
    return node


def text_payload(size: int) -> bytes:
    """Return a document of `size` bytes that is one long string."""
    bare = len(json.dumps(reported({"text": ""})))
    payload = json.dumps(reported({"text": "x" * (size - bare)})).encode()
    assert len(payload) == size
    return payload


def test_names_and_with_them_topics() -> None:
    longest = "d" * 128
    topic = f"things/{longest}/shadow/name/{longest}/update"
    assert decode(reported({"on": 1}), topic).device == longest
    assert decode(reported({"on": 1}), topic).shadow == longest
    rejected("device_name", reported({}), f"things/{longest}d/shadow/update")
    rejected("device_name", reported({}), f"things/{longest}d/shadow/name/a/update")
    rejected("topic", reported({}), f"things/lamp/shadow/name/{longest}s/update")
    rejected("topic", reported({}), topic + "e")
    rejected("device_name", reported({}), f"things/{'d' * 65_500}/shadow/update")


def test_payload_and_with_it_strings() -> None:
    (write,) = decode(text_payload(65_536)).writes
    assert len(write[2]) > 65_000
    rejected("payload_too_large", text_payload(65_537))


@pytest.mark.parametrize("kind", ["objects", "arrays"])
def test_depth(kind: str) -> None:
    def document(levels: int) -> dict[str, Any]:
        if kind == "objects":
            return reported(nested(levels))
        node: Any = 1
        for _ in range(levels - 1):
            node = [node]
        return reported({"a": node})

    assert len(decode(document(16)).writes) == 1
    rejected("too_deep", document(17))


def test_leaves() -> None:
    assert len(decode(reported({f"k{n}": n for n in range(500)})).writes) == 500
    rejected("too_many_leaves", reported({f"k{n}": n for n in range(501)}))
    assert len(decode(reported({f"k{n}": None for n in range(500)})).deletes) == 500
    rejected("too_many_leaves", reported({f"k{n}": None for n in range(501)}))


@pytest.mark.parametrize("char", ["k", "é", "\U0001f4a1", "/"])
def test_keys_and_paths(char: str) -> None:
    size = len(char.replace("/", "~1").encode())
    most = (1024 - 1) // size
    (write,) = decode(reported({char * most: 1})).writes
    assert 1024 - size < len(write[1].encode()) <= 1024
    rejected("path_too_long", reported({char * (most + 1): 1}))
    rejected("path_too_long", reported({char * (most + 1): None}))


def test_a_path_of_many_keys() -> None:
    inner = "k" * 200
    largest = "k" * (1024 - 4 * 201 - 1)
    (write,) = decode(reported({inner: {inner: {inner: {inner: {largest: 1}}}}})).writes
    assert len(write[1]) == 1024
    rejected("path_too_long", reported({inner: {inner: {inner: {inner: {largest + "k": 1}}}}}))


def test_the_number_of_user_properties() -> None:
    most = [(f"p{n}", "v") for n in range(64)]
    assert decode(reported({"on": 1}), TOPIC, most).writes
    rejected("properties_too_large", reported({"on": 1}), TOPIC, [*most, ("one", "more")])


def test_the_bytes_of_user_properties() -> None:
    assert decode(reported({"on": 1}), TOPIC, [("ab", "é" * 4095)]).writes
    rejected("properties_too_large", reported({"on": 1}), TOPIC, [("abc", "é" * 4095)])
    rejected("properties_too_large", reported({"on": 1}), TOPIC, [("x" * 8193, "")])


def test_a_million_user_properties_are_rejected_without_being_looked_at() -> None:
    class Counted(list[tuple[str, str]]):
        looked = 0

        def __iter__(self) -> Any:
            self.looked += 1
            return super().__iter__()

    many = Counted([("a", "b")] * 1_000_000)
    rejected("properties_too_large", reported({"on": 1}), TOPIC, many)
    letter = DeadLetter.of(
        topic=TOPIC, payload=b"", device="lamp", reason="properties_too_large", detail="",
        received_ms=0, client_id="c", qos=1, retain=False, duplicate=False, user_properties=many,
    )  # fmt: skip
    assert letter.user_properties == '["too long"]'
    assert many.looked == 0


def test_numbers_and_sequences_of_any_length() -> None:
    rejected("number_precision", b'{"state":{"reported":{"n":' + b"9" * 60_000 + b"}}}")
    rejected("bad_time", b'{"timestamp":' + b"9" * 19 + b',"state":{"reported":{"n":1}}}')
    rejected("bad_time", reported({"n": 1}), TOPIC, [("timestamp", "9" * 8000)])
    rejected("bad_time", {**reported({"n": 1}), "timestamp": 1_700_000_000}, TOPIC,
             [("seq", "9" * 8000)])  # fmt: skip


def test_a_dead_letter_is_bounded_in_every_part() -> None:
    letter = DeadLetter.of(
        topic="t" * 65_535, payload=b"x" * 1_000_000, device="d" * 65_535, reason="topic",
        detail="e" * 10_000, received_ms=0, client_id="c", qos=1, retain=False, duplicate=False,
        user_properties=[("n", "v" * 60_000)],
    )  # fmt: skip
    assert letter.device is not None
    assert (len(letter.topic), len(letter.device), len(letter.detail)) == (1024, 128, 512)
    assert (len(letter.payload), letter.payload_bytes) == (65_536, 1_000_000)
    assert letter.user_properties == '["too long"]'
