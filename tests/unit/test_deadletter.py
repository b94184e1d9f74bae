"""Dead letters: what is kept of a message, cut so that no table refuses it."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowsvc.store.deadletter import MAX_PAYLOAD_BYTES, SHARDS, DeadLetter, FloodGate

RECEIVED_MS = 1_700_000_123_456


def letter(**changes: Any) -> DeadLetter:
    message: dict[str, Any] = {
        "topic": "things/d/shadow/update",
        "payload": b"{",
        "device": "d",
        "reason": "not_json",
        "detail": "unexpected end",
        "received_ms": RECEIVED_MS,
        "client_id": "pod-1",
        "qos": 1,
        "retain": False,
        "duplicate": True,
        "user_properties": (),
    }
    return DeadLetter.of(**message | changes)


def test_a_small_message_is_kept_whole() -> None:
    made = letter(user_properties=[("a", "1"), ("a", "é\0")])
    assert (made.topic, made.device, made.reason, made.detail, made.client_id) == (
        "things/d/shadow/update", "d", "not_json", "unexpected end", "pod-1",
    )  # fmt: skip
    assert (made.qos, made.retain, made.duplicate) == (1, False, True)
    assert (made.payload, made.payload_bytes) == (b"{", 1)
    assert made.received_ms == RECEIVED_MS
    assert made.user_properties is not None
    assert json.loads(made.user_properties) == [["a", "1"], ["a", "é\0"]]


@pytest.mark.parametrize("length", [0, 1, 65535, 65536, 65537, 300_000])
def test_a_payload_is_kept_up_to_64_kib_with_length_and_digest_of_the_whole(length: int) -> None:
    payload = bytes(range(256)) * (length // 256 + 1)
    payload = payload[:length]
    made = letter(payload=payload)
    assert made.payload == payload[:MAX_PAYLOAD_BYTES]
    assert len(made.payload) <= 65536
    assert made.payload_bytes == length
    assert made.payload_sha256 == hashlib.sha256(payload).digest()


@pytest.mark.parametrize("field", ["topic", "device", "detail"])
@pytest.mark.parametrize("unit", ["x", "é", "😀", "\0"])
def test_texts_are_cut_and_hold_no_nul(field: str, unit: str) -> None:
    for length in (0, 1, 65535):
        made = getattr(letter(**{field: unit * length}), field)
        assert len(made) == min(length, {"topic": 1024, "device": 128, "detail": 512}[field])
        assert "\0" not in made
        made.encode()


def test_a_topic_that_names_no_device_leaves_it_empty() -> None:
    assert letter(device=None).device is None


def test_no_user_properties_leave_the_column_empty() -> None:
    assert letter().user_properties is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3000), st.text(max_size=3000)), max_size=6))
def test_user_properties_are_json_of_bounded_size(pairs: list[tuple[str, str]]) -> None:
    text = letter(user_properties=pairs).user_properties
    if not pairs:
        assert text is None
        return
    assert text is not None
    assert "\0" not in text
    assert len(text.encode()) <= 8192
    assert json.loads(text) in ([list(pair) for pair in pairs], ["too long"])


@pytest.mark.parametrize(
    ("received", "bucket"),
    [
        ("2023-11-14T22:00:00.000", "2023-11-14T22:00:00"),
        ("2023-11-14T22:59:59.999", "2023-11-14T22:00:00"),
        ("2023-11-14T23:00:00.000", "2023-11-14T23:00:00"),
    ],
)
def test_the_bucket_is_the_hour_in_utc(received: str, bucket: str) -> None:
    def milliseconds(text: str) -> int:
        return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)

    assert letter(received_ms=milliseconds(received)).bucket_ms == milliseconds(bucket)


def test_letters_have_ids_of_their_own_and_spread_over_the_shards() -> None:
    letters = [letter() for _ in range(400)]
    assert len({made.id for made in letters}) == 400
    assert {made.shard for made in letters} == set(range(SHARDS))


# ---------------------------------------------------------------- flood gate


def test_a_sender_may_have_so_many_a_minute() -> None:
    gate = FloodGate(3)
    assert [gate.admits("d", 60.0 + second) for second in range(5)] == [True] * 3 + [False] * 2
    assert gate.admits("d", 120.0)


def test_a_flood_of_one_sender_costs_no_other() -> None:
    gate = FloodGate(1)
    assert gate.admits("loud", 0.0)
    assert not gate.admits("loud", 0.0)
    assert gate.admits("quiet", 0.0)


def test_none_may_pass_when_none_is_allowed() -> None:
    assert not FloodGate(0).admits("d", 0.0)


def test_senders_beyond_the_bound_share_one_count_and_memory_stays_bounded() -> None:
    gate = FloodGate(2)
    admitted = sum(gate.admits(f"d{number}", 1.0) for number in range(30_000))
    assert admitted == 10_000 + 2
    assert len(gate._counts) <= 10_001
    assert gate.admits("d0", 1.0), "a sender within the bound keeps its own count"
    assert gate.admits("d29999", 60.0), "the next minute starts anew"
    assert len(gate._counts) == 1
