"""Documents of devices: the same in every process, and what the service takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from load.errors import BadOption
from load.families import NAMES, Family, Mix, sent_at_us, sequence_of
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser

NOW_US = 1_795_409_268_693_123


def reported(payload: bytes) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(payload)["state"]["reported"]
    return found


@pytest.mark.parametrize("name", [*NAMES, "leaves:7", "leaves:200:9000"])
@pytest.mark.parametrize("trail", [False, True])
def test_the_service_takes_every_document_with_its_time(name: str, *, trail: bool) -> None:
    decoder = Decoder(TopicParser("things"), Limits(max_age_us=2**60, max_ahead_us=2**60))
    family = Family(name, seed=3, trail=trail)
    for sequence in range(300):
        payload = family.document(5, sequence, NOW_US + sequence)
        update = decoder.decode("things/lamp/shadow/update", payload, [], NOW_US)
        assert update.time_us == NOW_US + sequence


@given(st.integers(0, 10**6), st.integers(0, 10**9), st.integers(10**15, 10**16 - 1))
def test_sequence_and_time_are_found_in_every_document(
    number: int, sequence: int, now_us: int
) -> None:
    for mix in (MIX, TRAIL):
        payload = mix.document(number, sequence, now_us)
        assert sequence_of(payload) == sequence == reported(payload)["seq"]
        assert sent_at_us(payload) == now_us == orjson.loads(payload)["timestamp"]


MIX, TRAIL = Mix(seed=1), Mix(seed=1, trail=True)


def test_the_same_numbers_give_the_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib\nfrom load.families import Mix\nmix = Mix(seed=7, trail=True)\n"
        "print(hashlib.sha256(b''.join(mix.document(n, s, 10**15 + s) "
        "for n in range(20) for s in range(20))).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            timeout=50,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2)
    }
    assert len(found) == 1


def test_another_seed_gives_other_documents() -> None:
    one, other = Mix(seed=1), Mix(seed=2)
    same = sum(one.document(n, 3, NOW_US) == other.document(n, 3, NOW_US) for n in range(200))
    assert same < 50


def test_a_device_first_reports_everything_and_then_changes() -> None:
    for name in NAMES:
        family = Family(name)
        full = reported(family.document(1, 0, NOW_US))
        sizes = [len(reported(family.document(1, sequence, NOW_US))) for sequence in range(1, 50)]
        assert len(full) >= max(sizes) if name == "sensor" else len(full) > min(sizes)


def test_devices_of_a_family_differ_from_each_other() -> None:
    family = Family("thermostat")
    assert len({family.document(number, 1, NOW_US) for number in range(200)}) > 150


def test_with_a_trail_every_document_writes_a_leaf_that_no_other_does() -> None:
    leaves = [
        leaf
        for sequence in range(50)
        for leaf in reported(TRAIL.document(2, sequence, NOW_US))["trail"]
    ]
    assert leaves == [str(sequence) for sequence in range(50)]


@pytest.mark.parametrize(("count", "size"), [(1, 200), (20, 1000), (200, 6000)])
def test_a_family_for_measurements_has_the_leaves_and_bytes_that_were_asked_for(
    count: int, size: int
) -> None:
    payload = Family(f"leaves:{count}:{size}").document(1, 5, NOW_US)
    assert len(reported(payload)) == count + 1
    assert len(payload) == size
    plain = reported(Family(f"leaves:{count}").document(1, 5, NOW_US))
    assert len(plain) == count + 1


@pytest.mark.parametrize("name", ["toaster", "leaves:0", "leaves:500", "leaves:x", "leaves:1:2:3"])
def test_a_family_that_there_is_not_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadOption, match=f"family '{name}'"):
        Family(name)


def test_no_family_at_all_is_refused() -> None:
    with pytest.raises(BadOption, match="at least one"):
        Mix(())


@pytest.mark.parametrize("payload", [b"", b"{}", b'{"state":{}}', b'{"timestamp":5}', b"x" * 100])
def test_other_messages_have_neither_time_nor_sequence(payload: bytes) -> None:
    assert sent_at_us(payload) is None
    assert sequence_of(payload) is None
