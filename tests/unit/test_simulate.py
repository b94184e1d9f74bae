"""What simulated devices publish, and what is expected of Cassandra afterwards."""

from __future__ import annotations

import random
from dataclasses import replace

import orjson
import pytest

from shadowsvc.errors import ConfigError, Rejected
from shadowsvc.settings import Mqtt
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.simulate import (
    FAMILIES,
    Expected,
    Fleet,
    Message,
    Options,
    Row,
    Shape,
    Simulation,
    Summary,
)
from shadowsvc.simulate.command import as_json, lines

NOW_MS = 1_790_000_000_000
ALL = Shape(families=tuple(FAMILIES), bad_share=0.05, repeat_share=0.05, late_share=0.05)


def messages(count: int, *, seed: int = 7, devices: int = 20, shape: Shape = ALL) -> list[Message]:
    fleet = Fleet([f"d{n}" for n in range(devices)], seed=seed, shape=shape)
    made = [fleet.next(NOW_MS + number // 3) for number in range(count)]
    return made + fleet.rest()


def decoder() -> Decoder:
    return Decoder(TopicParser("things"), Limits())


def one(state: dict[str, object], time_us: int, *, shadow: str = "", bad: bool = False) -> Message:
    return Message("d", shadow, "things/d/shadow/update", b"{}", time_us, state, bad)


def rows(*known: tuple[str, object, int], section: str = "reported") -> list[Row]:
    return [
        Row("", section, path, orjson.dumps(value).decode(), time_us)
        for path, value, time_us in known
    ]


def test_one_seed_gives_the_same_messages_and_another_does_not() -> None:
    assert messages(500) == messages(500)
    assert messages(500) != messages(500, seed=8)


def test_a_devices_first_message_is_its_whole_state() -> None:
    plain = replace(ALL, bad_share=0, repeat_share=0, late_share=0)
    first = messages(20, shape=plain)
    assert [message.device for message in first] == [f"d{n}" for n in range(20)]
    assert all(list(message.state) == ["reported"] for message in first)


def test_a_devices_family_is_that_of_its_number() -> None:
    shape = Shape(families=("sensor", "meter"), repeat_share=0, late_share=0)
    fleet = Fleet(["d1", "d3", "d4"], seed=1, shape=shape, numbers=[1, 3, 4])
    states = [fleet.next(NOW_MS).state["reported"] for _ in range(3)]
    assert ["obis" in state for state in states] == [True, True, False]


def test_write_times_of_a_device_never_repeat_even_when_the_clock_stands_still() -> None:
    fleet = Fleet(["d"], seed=1, shape=Shape(repeat_share=0, late_share=0))
    times = [fleet.next(NOW_MS).time_us for _ in range(3000)]
    assert times == sorted(set(times))
    assert times[-1] < (NOW_MS + 10) * 1000


def test_repeated_and_late_messages_lose_nothing_and_are_as_often_as_asked() -> None:
    made = messages(4000)
    payloads = [message.payload for message in made if not message.bad]
    repeated = len(payloads) - len(set(payloads))
    latest: dict[str, int] = {}
    late = 0
    for message in made:
        if not message.bad:
            late += message.time_us < latest.get(message.device, 0)
            latest[message.device] = max(message.time_us, latest.get(message.device, 0))
    assert 100 < repeated < 350
    assert late > 20
    assert sum(message.bad for message in made) > 100


def test_the_service_takes_good_messages_with_the_very_time_and_names() -> None:
    decode = decoder().decode
    good = [message for message in messages(3000) if not message.bad]
    for message in good:
        update = decode(message.topic, message.payload, (), NOW_MS * 1000)
        assert (update.device, update.shadow) == (message.device, message.shadow)
        assert update.time_us == message.time_us
        assert update.writes or update.deletes
    assert {message.shadow for message in good} == {"", "firmware"}
    assert {tuple(message.state) for message in good} >= {("desired",), ("desired", "reported")}


def test_the_service_rejects_bad_messages_for_many_reasons_and_no_two_are_alike() -> None:
    bad = [message for message in messages(3000) if message.bad]
    reasons = set()
    for message in bad:
        with pytest.raises(Rejected) as caught:
            decoder().decode(message.topic, message.payload, (), NOW_MS * 1000)
        reasons.add(caught.value.reason)
    assert reasons == {"not_utf8", "not_json", "wrong_type", "number_precision", "time_in_future"}
    assert len({message.sha256() for message in bad}) == len(bad)


def test_the_plain_load_has_four_leaves_and_about_100_bytes() -> None:
    shape = Shape(families=("sensor",), repeat_share=0, late_share=0)
    made = messages(100, devices=100, shape=shape)
    sizes = [len(message.payload) for message in made]
    assert 85 <= sum(sizes) / len(sizes) <= 115
    assert {len(message.state["reported"]) for message in made} == {4}


@pytest.mark.parametrize("seed", range(8))
def test_any_order_repetition_and_merge_by_the_service_give_the_expected_rows(seed: int) -> None:
    chance = random.Random(seed)
    made = [message for message in messages(400, seed=seed, devices=3) if not message.bad]
    expected = Expected()
    shuffled = made + chance.sample(made, 100)
    chance.shuffle(shuffled)
    for message in shuffled:
        expected.apply(message)
    decode = decoder().decode
    assert sorted(expected.devices) == ["d0", "d1", "d2"]
    for device in expected.devices:
        updates = [
            decode(message.topic, message.payload, (), NOW_MS * 1000)
            for message in shuffled
            if message.device == device
        ]
        # What Cassandra keeps of it: a delete takes the range at and below its path.
        merged = merge(updates)
        kept = [
            Row(shadow, section, path, value.decode(), time_us)
            for time_us, value, shadow, section, path in merged.writes
            if not any(
                deleted_us >= time_us
                and (of_shadow, of_section) == (shadow, section)
                and (path == above or path.startswith(f"{above}/"))
                for deleted_us, of_shadow, of_section, above in merged.deletes
            )
        ]
        assert expected.compare(device, kept, merged.heard_us) == []
        assert len(kept) > 5


def test_a_delete_takes_what_is_below_and_older_and_nothing_else() -> None:
    expected = Expected()
    expected.apply(one({"reported": {"a": {"b": 1, "c/d": 2}, "ab": 3}}, 10))
    expected.apply(one({"reported": {"a": {"new": 4}}}, 30))
    expected.apply(one({"reported": {"a": None}}, 20))
    expected.apply(one({"desired": {"a": {"b": 5}}}, 10))
    expected.apply(one({"desired": None}, 11))
    kept = rows(("/ab", 3, 10), ("/a/new", 4, 30))
    assert expected.compare("d", kept, 30) == []
    assert expected.leaves() == 2


def test_scalar_and_object_at_one_place_are_both_rows() -> None:
    expected = Expected()
    expected.apply(one({"reported": {"color": "white"}}, 10))
    expected.apply(one({"reported": {"color": {"hue": 7}}}, 20))
    both = rows(("/color", "white", 10), ("/color/hue", 7, 20))
    assert expected.compare("d", both, 20) == []


@pytest.mark.parametrize(
    ("found", "heard_us", "kinds"),
    [
        (rows(("/a", 1, 10), ("/b~1c", [1, None], 20)), 20, []),
        (rows(("/a", 1, 10)), 20, ["missing"]),
        (rows(("/a", 1, 9), ("/b~1c", [1, None], 20)), 20, ["missing"]),
        (rows(("/a", 1, 11), ("/b~1c", [1, None], 20)), 20, ["wrong"]),
        (rows(("/a", 1.0, 10), ("/b~1c", [1, None], 20)), 20, ["wrong"]),
        (rows(("/a", 1, 10), ("/b~1c", [1, None], 20), ("/x", 1, 5)), 20, ["wrong"]),
        (rows(("/a", 1, 10), ("/b~1c", [1, None], 20)), None, ["missing"]),
        (rows(("/a", 1, 10), ("/b~1c", [1, None], 20)), 21, ["wrong"]),
        ([], None, ["missing", "missing", "missing"]),
    ],
    ids=["same", "no row", "older", "later", "type", "extra", "unheard", "heard later", "nothing"],
)
def test_each_difference_is_found(found: list[Row], heard_us: int | None, kinds: list[str]) -> None:
    expected = Expected()
    expected.apply(one({"reported": {"a": 1}}, 10))
    expected.apply(one({"reported": {"b/c": [1, None]}}, 20))
    assert [each.kind for each in expected.compare("d", found, heard_us)] == kinds


def test_bad_messages_are_dead_letters_and_no_rows() -> None:
    expected = Expected()
    message = one({}, 0, bad=True)
    expected.apply(message)
    expected.apply(message)
    assert expected.dead_letters == {message.sha256()}
    assert expected.devices == []


def test_a_device_with_an_unanswered_message_is_in_doubt() -> None:
    expected = Expected()
    expected.doubt(one({"reported": {"a": 1}}, 10))
    expected.doubt(replace(one({}, 0, bad=True), device="other"))
    assert expected.uncertain == {"d"}


def test_every_senseless_option_is_named() -> None:
    shape = Shape(families=("toaster",), bad_share=2)
    options = Options(devices=0, rate=-1, seconds=-1, connections=0, qos=3, shape=shape)
    with pytest.raises(ConfigError) as caught:
        Simulation(Mqtt(), options)
    named = {line.split()[0].rstrip(":") for line in caught.value.mistakes}
    assert named == {
        "--devices",
        "--rate",
        "--seconds",
        "--connections",
        "--qos",
        "--families",
        "--bad-share",
    }


def test_a_connection_serves_no_less_than_a_device() -> None:
    assert Options(devices=3).parts() == 3
    assert Options(devices=100).parts() == 8
    assert Options(devices=100, connections=100).parts() == 100


def test_the_summary_says_what_was_lost() -> None:
    summary = Summary(
        devices=1,
        connections=1,
        seconds=2.0,
        published=10,
        acknowledged=4,
        bad=1,
        unrouted=3,
        refused=2,
        unknown=1,
        sent_again=5,
        reconnects=1,
        payload_bytes=1000,
        ack_p50_seconds=0.001,
        ack_p99_seconds=0.002,
        interrupted=True,
    )
    text = "\n".join(lines(summary))
    for part in ("10 messages of 100 bytes", "5/s", "3 LOST", "2 refused", "1 without an answer"):
        assert part in text
    assert as_json(summary)["complete"] is False
    assert orjson.loads(orjson.dumps(as_json(summary)))["rate"] == 5.0
