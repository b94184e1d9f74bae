"""A recording drives any number of devices, with times and sequence numbers of the rig's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
import pytest

from load.errors import BadOption
from load.families import sent_at_us, sequence_of
from load.replay import Recorded, Replay, line

if TYPE_CHECKING:
    from pathlib import Path

NOW_US = 1_795_409_268_693_123


def shadow(**reported: object) -> bytes:
    return orjson.dumps({"state": {"reported": reported}, "timestamp": 1, "version": 4})


def recording(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / "recording"
    path.write_bytes(b"".join(lines))
    return path


def test_what_is_recorded_is_what_is_read(tmp_path: Path) -> None:
    path = recording(
        tmp_path,
        line(0.0, "things/a/shadow/update", shadow(on=True)),
        line(0.5, "things/b/shadow/update", b"\xff\x00 no text"),
        line(2.0, "things/a/shadow/update", shadow(on=False)),
    )
    replay = Replay.load(path)
    assert (replay.devices, replay.seconds, replay.rate) == (2, 2.0, 1.5)
    assert orjson.loads(replay.document(0, 0, NOW_US))["state"]["reported"] == {
        "seq": 0,
        "on": True,
    }
    assert replay.document(1, 0, NOW_US) == b"\xff\x00 no text"


def test_a_document_gets_the_rig_s_time_sequence_and_trail() -> None:
    payload = orjson.dumps(
        {"state": {"desired": {"x": [1]}, "reported": {"seq": 9, "on": True}}, "timestamp": 1}
    )
    made = Replay([Recorded(0, "a", payload)], trail=True).document(0, 5, NOW_US)
    assert orjson.loads(made) == {
        "state": {
            "reported": {"seq": 5, "trail": {"5": True}, "on": True},
            "desired": {"x": [1]},
        },
        "timestamp": NOW_US,
    }
    assert (sequence_of(made), sent_at_us(made)) == (5, NOW_US)


@pytest.mark.parametrize("state", [{"desired": None}, {"reported": {}}, {}])
def test_documents_that_report_nothing_still_get_a_sequence(state: dict[str, object]) -> None:
    replay = Replay([Recorded(0, "a", orjson.dumps({"state": state}))])
    made = orjson.loads(replay.document(0, 3, NOW_US))
    assert made["state"] == {**state, "reported": {"seq": 3}}


def test_more_devices_than_recorded_play_the_same_again() -> None:
    replay = Replay([Recorded(0, "a", shadow(who="a")), Recorded(0, "b", shadow(who="b"))])
    whose = [
        orjson.loads(replay.document(number, 7, NOW_US))["state"]["reported"]["who"]
        for number in range(4)
    ]
    assert whose == ["a", "b", "a", "b"]


def test_each_message_is_due_once_at_its_time() -> None:
    replay = Replay([Recorded(at, topic, shadow()) for at, topic in ((0, "a"), (1, "b"), (1, "a"))])
    assert [replay.due(at) for at in (0.0, 0.5, 1.0, 9.0)] == [[0], [], [1, 0], []]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "empty"),
        (b"no json\n", r"recording:1 is not"),
        (b'{"offset_seconds": 0, "topic": "a"}\n', r":1 is not"),
        (b'{"offset_seconds": -1, "topic": "a", "payload": "x"}\n', r":1 is not"),
        (line(5, "a", b"x") + line(4, "a", b"x"), "4 s falls"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_with_the_line(
    tmp_path: Path, text: bytes, why: str
) -> None:
    with pytest.raises(BadOption, match=why):
        Replay.load(recording(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="absent can't be read"):
        Replay.load(tmp_path / "absent")
