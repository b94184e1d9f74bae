"""Decode: one message becomes one update, or is rejected with a reason."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from shadowsvc.errors import Rejected
from shadowsvc.shadow.document import REASONS, Decoder, Limits
from shadowsvc.shadow.topic import TopicParser

if TYPE_CHECKING:
    from shadowsvc.shadow.update import Update

TOPIC = "things/d/shadow/update"
NOW = 1_700_000_000_000_000
SECOND = 1_000_000


def decoder(**limits: Any) -> Decoder:
    return Decoder(TopicParser("things"), Limits(**limits))


def decode(payload: bytes | str, *properties: tuple[str, str], **limits: Any) -> Update:
    text = payload.encode() if isinstance(payload, str) else payload
    return decoder(**limits).decode(TOPIC, text, properties, NOW)


def reported(content: str, **more: object) -> str:
    rest = "".join(f', "{name}": {json.dumps(value)}' for name, value in more.items())
    return f'{{"state": {{"reported": {content}}}{rest}}}'


def reason_of(payload: bytes | str, *properties: tuple[str, str], **limits: Any) -> str:
    with pytest.raises(Rejected) as caught:
        decode(payload, *properties, **limits)
    assert caught.value.reason in REASONS
    assert caught.value.detail
    return caught.value.reason


def time_of(stamp: str, *properties: tuple[str, str], version: str = "", **limits: Any) -> int:
    sequence = f', "version": {version}' if version else ""
    payload = f'{{"state": {{}}, "timestamp": {stamp}{sequence}}}'
    return decode(payload, *properties, **limits).time_us


# ---------------------------------------------------------------- state


def test_leaves_of_both_sections_become_writes() -> None:
    update = decode(
        '{"state": {"reported": {"a": 1, "b": {"c": "x", "d": [1, {"e": null}]}},'
        ' "desired": {"a": true}}}'
    )
    assert (update.device, update.shadow) == ("d", "")
    assert update.writes == [
        ("reported", "/a", b"1"),
        ("reported", "/b/c", b'"x"'),
        ("reported", "/b/d", b'[1,{"e":null}]'),
        ("desired", "/a", b"true"),
    ]
    assert update.deletes == []


def test_the_topic_names_device_and_shadow() -> None:
    update = decoder().decode("things/x/shadow/name/y/update", b'{"state": {}}', (), NOW)
    assert (update.device, update.shadow) == ("x", "y")


@pytest.mark.parametrize(
    ("state", "deletes"),
    [
        ('{"reported": {"a": null}}', [("reported", "/a")]),
        ('{"reported": {"a": {"b": null}}}', [("reported", "/a/b")]),
        ('{"desired": null}', [("desired", "")]),
        ('{"reported": null, "desired": null}', [("reported", ""), ("desired", "")]),
        ("null", [("reported", ""), ("desired", "")]),
        ("{}", []),
        ('{"reported": {}}', []),
        ('{"reported": {"a": {"b": {}}}}', []),
    ],
)
def test_null_deletes_and_an_empty_object_changes_nothing(
    state: str, deletes: list[tuple[str, str]]
) -> None:
    update = decode(f'{{"state": {state}}}')
    assert update.deletes == deletes
    assert update.writes == []


@pytest.mark.parametrize(
    ("content", "writes", "deletes"),
    [
        ('{"a": 1, "a": 2}', [("reported", "/a", b"2")], []),
        ('{"a": 1, "a": null}', [], [("reported", "/a")]),
        ('{"a": null, "a": 1}', [("reported", "/a", b"1")], []),
        ('{"a": {"b": 1}, "a": {"c": 2}}', [("reported", "/a/c", b"2")], []),
        ('{"a": 1, "\\u0061": 2}', [("reported", "/a", b"2")], []),
        ('{"a": [{"k": 1, "k": 2}]}', [("reported", "/a", b'[{"k":2}]')], []),
    ],
)
def test_of_a_key_given_twice_the_last_counts(
    content: str, writes: list[tuple[str, str, bytes]], deletes: list[tuple[str, str]]
) -> None:
    update = decode(reported(content))
    assert (update.writes, update.deletes) == (writes, deletes)


def test_of_a_state_or_section_or_time_given_twice_the_last_counts() -> None:
    update = decode(
        '{"state": {"reported": {"a": 1}}, "timestamp": 3,'
        ' "state": {"reported": {"b": 1}, "reported": {"c": 2}}, "timestamp": 1700000000}'
    )
    assert update.writes == [("reported", "/c", b"2")]
    assert update.time_us == NOW


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("", "/"),
        ("/", "/~1"),
        ("~", "/~0"),
        ("~1", "/~01"),
        ("a/b~c", "/a~1b~0c"),
        ("0", "/0"),
        (" ", "/ "),
        ("é😀", "/é😀"),
        ("\x7f\x80\x9f", "/\x7f\x80\x9f"),
        ("\x01\n", "/\x01\n"),
        ("\ufeff\uffff\U0010ffff", "/\ufeff\uffff\U0010ffff"),
        ("reported", "/reported"),
        ("state", "/state"),
    ],
)
def test_any_key_but_nul_has_a_path(key: str, path: str) -> None:
    content = json.dumps({key: 1, "o": {key: {key: 2}}})
    assert decode(reported(content)).writes == [
        ("reported", path, b"1"),
        ("reported", f"/o{path}{path}", b"2"),
    ]
    assert decode(reported(json.dumps({key: None}))).deletes == [("reported", path)]


@pytest.mark.parametrize(
    "content",
    [
        '{"\\u0000": 1}',
        '{"a\\u0000b": 1}',
        '{"a": {"\\u0000": 1}}',
        '{"a": {"\\u0000": {"b": 1}}}',
        '{"\\u0000": null}',
    ],
)
def test_a_key_with_nul_is_rejected_wherever_it_stands(content: str) -> None:
    assert reason_of(reported(content)) == "bad_key"


@pytest.mark.parametrize("value", ['"\\u0000"', '"a\\u0000b"', '["\\u0000"]', '[{"\\u0000": 1}]'])
def test_nul_inside_a_value_is_kept_escaped(value: str) -> None:
    ((_, path, text),) = decode(reported(f'{{"a": {value}}}')).writes
    assert path == "/a"
    assert b"\0" not in text
    assert json.loads(text) == json.loads(value)


@pytest.mark.parametrize(
    "value",
    [
        "true", "false", '""', '"x"', "[]", "[[]]", "[{}]", "[null]", '[{"a": {}}]', "0", "-1",
        '"\\"\\\\\\/\\b\\f\\n\\r\\t"', '"\\u00e9\\ud83d\\ude00"', '"\\u007f\\u0001"',
    ],
)  # fmt: skip
def test_any_value_is_kept_as_json(value: str) -> None:
    ((_, _, text),) = decode(reported(f'{{"a": {value}}}')).writes
    assert json.loads(text) == json.loads(value)


# ---------------------------------------------------------------- rejections


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "empty_payload"),
        (b" ", "not_json"),
        (b"\0", "not_json"),
        (b"{", "not_json"),
        (b"{}{}", "not_json"),
        (b'{"state": {}}\0', "not_json"),
        (b"{'state': {}}", "not_json"),
        (b'{"state": {},}', "not_json"),
        (b'{"state": {"reported": {"a": NaN}}}', "not_json"),
        (b'{"state": {"reported": {"a": Infinity}}}', "not_json"),
        (b'{"state": {"reported": {"a": -Infinity}}}', "not_json"),
        (b'{"state": {"reported": {"a": 01}}}', "not_json"),
        (b'{"state": {"reported": {"a": "\x01"}}}', "not_json"),
        (b'{"state": {"reported": {"a": "\\ud800"}}}', "not_json"),
        (b'{"state": {"reported": {"a": "\\udc00\\ud800"}}}', "not_json"),
        (b'{"state": {"reported": {"\\ud800": 1}}}', "not_json"),
        (b'\xef\xbb\xbf{"state": {}}', "not_json"),
        (b"\xff", "not_utf8"),
        (b'{"state": {"reported": {"a": "\xe9"}}}', "not_utf8"),
        (b'{"state": {"reported": {"a": "\xed\xa0\x80"}}}', "not_utf8"),
        (b'{"state": {"reported": {"a": "\xc0\x80"}}}', "not_utf8"),
        ('{"state": {}}'.encode("utf-16"), "not_utf8"),
        (b"null", "wrong_type"),
        (b"1", "wrong_type"),
        (b'"x"', "wrong_type"),
        (b"[]", "wrong_type"),
        (b"{}", "wrong_type"),
        (b'{"State": {}}', "wrong_type"),
        (b'{"state": 1}', "wrong_type"),
        (b'{"state": []}', "wrong_type"),
        (b'{"state": ""}', "wrong_type"),
        (b'{"state": false}', "wrong_type"),
        (b'{"state": {"reported": 1}}', "wrong_type"),
        (b'{"state": {"reported": []}}', "wrong_type"),
        (b'{"state": {"delta": {}}}', "wrong_type"),
        (b'{"state": {"reported": {}, "Desired": {}}}', "wrong_type"),
        (b'{"state": {"": {}}}', "wrong_type"),
    ],
)
def test_what_is_no_update_is_rejected_with_its_reason(payload: bytes, reason: str) -> None:
    assert reason_of(payload) == reason


def test_a_topic_that_names_nothing_is_rejected_before_the_payload_is_read() -> None:
    with pytest.raises(Rejected, match=r"^topic: "):
        decoder().decode("things/d/shadow/get", b"\xff", (), NOW)
    with pytest.raises(Rejected, match=r"^device_name: "):
        decoder().decode("things/é/shadow/update", b"\xff", (), NOW)


def test_the_device_is_known_for_every_topic_that_names_one() -> None:
    assert decoder().device_of(TOPIC) == "d"
    assert decoder().device_of("things/x/shadow/name/y/update") == "x"
    assert decoder().device_of("things/é/shadow/update") is None
    assert decoder().device_of("") is None


def test_a_payload_over_the_limit_is_rejected_and_one_at_the_limit_is_not() -> None:
    payload = reported('{"a": 1}')
    assert decode(payload, max_payload_bytes=len(payload)).writes
    assert reason_of(payload, max_payload_bytes=len(payload) - 1) == "payload_too_large"
    assert reason_of(b"\xff" * 10, max_payload_bytes=9) == "payload_too_large"


def nested(levels: int, inner: str = "1") -> str:
    return '{"a": ' * levels + inner + "}" * levels


@pytest.mark.parametrize("limit", [1, 2, 16, 128])
@pytest.mark.parametrize("leaf", ["1", "null", "{}", "[]", '[{"k": [1]}]'])
def test_objects_and_arrays_share_one_depth_limit(limit: int, leaf: str) -> None:
    own = {"{}": 1, "[]": 1, '[{"k": [1]}]': 3}.get(leaf, 0)
    if limit > own:
        decode(reported(nested(limit - own, leaf)), max_depth=limit)
    over = max(1, limit - own + 1)
    assert reason_of(reported(nested(over, leaf)), max_depth=limit) == "too_deep"


@pytest.mark.parametrize("levels", [17, 200, 300, 500, 1000, 1019])
@pytest.mark.parametrize("kind", ["object", "array", "mixed"])
def test_depth_is_limited_below_what_any_json_library_bears(levels: int, kind: str) -> None:
    if kind == "object":
        content = nested(levels)
    elif kind == "array":
        content = '{"a": ' + "[" * levels + "]" * levels + "}"
    else:
        content = '{"a": ' + '[{"b": ' * (levels // 2) + "1" + "}]" * (levels // 2) + "}"
    assert reason_of(reported(content)) == "too_deep"


def test_a_document_that_no_decoder_can_nest_is_too_deep() -> None:
    assert reason_of("[" * 5000 + "]" * 5000) == "too_deep"
    assert reason_of("[" * 5000) == "too_deep"
    assert reason_of('{"a":' * 5000) == "too_deep"


@pytest.mark.parametrize("levels", [100, 900, 985, 1000, 1020])
def test_depth_beside_the_state_never_breaks_the_look_at_numbers(levels: int) -> None:
    deep = "[" * levels + "]" * levels
    payload = f'{{"state": {{"reported": {{"a": 1.5e0}}}}, "clientToken": {deep}}}'
    try:
        assert decode(payload).writes == [("reported", "/a", b"1.5")]
    except Rejected as rejected:
        assert rejected.reason == "too_deep"


def test_leaves_and_deletes_share_one_limit() -> None:
    mixed = json.dumps({"a": 1, "b": {"c": None, "d": [1, 2, 3]}})
    assert len(decode(reported(mixed), max_leaves=3).writes) == 2
    assert reason_of(reported(mixed), max_leaves=2) == "too_many_leaves"
    assert reason_of('{"state": null}', max_leaves=1) == "too_many_leaves"


@pytest.mark.parametrize(
    ("content", "length"),
    [
        ('{"aaaa": 1}', 5),
        ('{"aaaa": null}', 5),
        ('{"é": 1}', 3),
        ('{"😀": 1}', 5),
        ('{"a": {"b": {"c": 1}}}', 6),
        ('{"////": 1}', 9),
        ('{"~~~~": null}', 9),
        ('{"a": {"/": {"b": 1}}}', 7),
    ],
)
def test_the_path_limit_counts_the_bytes_of_the_pointer(content: str, length: int) -> None:
    decode(reported(content), max_path_bytes=length)
    assert reason_of(reported(content), max_path_bytes=length - 1) == "path_too_long"


@pytest.mark.parametrize("key", ["/", "~", "a", "é", "a/"])
@pytest.mark.parametrize("limit", [40, 64, 100, 1024])
def test_no_key_makes_a_path_longer_than_the_limit(key: str, limit: int) -> None:
    """Escaping doubles a key, so a short payload can make a long path."""
    for length in range(1, limit + 2):
        payload = reported(json.dumps({key * length: 1}, ensure_ascii=False))
        try:
            ((_, path, _),) = decode(payload, max_path_bytes=limit).writes
        except Rejected as rejected:
            assert rejected.reason == "path_too_long"
        else:
            assert len(path.encode()) <= limit


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "number",
    [
        "0", "-0", "-0.0", "1", "-1", "1.0", "1.5", "-273.15", "0.1", "1e5", "1E5", "1e-5", "1e+5",
        "9007199254740993", "9223372036854775807", "-9223372036854775808", "18446744073709551615",
        "1e22", "123456789012345", "0.123456789012345", "1.7976931348623157e308", "5e-324",
        "100000000000000000000", "1e20", "1.50000000000000000000000000", "0.000000000000000000001",
        "20.10", "0e10", "0.5000000000000000000000000",
    ],
)  # fmt: skip
def test_a_number_that_64_bits_hold_is_kept(number: str) -> None:
    ((_, _, text),) = decode(reported(f'{{"a": {number}}}')).writes
    assert Decimal(text.decode()) == Decimal(number)
    ((_, _, text),) = decode(reported(f'{{"a": [{{"b": [{number}]}}]}}')).writes
    kept = json.loads(text, parse_float=Decimal, parse_int=Decimal)
    assert kept == [{"b": [Decimal(number)]}]


@pytest.mark.parametrize(
    "number",
    [
        "18446744073709551617", "-9223372036854775809", "9007199254740993.0", "1e400", "-1e400",
        "1e-400", "4e-324", "0.1234567890123456789", "123456789012345678901234567890",
        "1.0000000000000000001", "9" * 400, "-" + "9" * 400, "0." + "0" * 400 + "1",
        "9007199254740993e0", "1e999999999999999999999",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "content",
    ['{"a": %s}', '{"a": {"b": %s}}', '{"a": [%s]}', '{"a": [[{"b": [1, %s]}]]}'],
)
def test_a_number_that_would_change_is_rejected_wherever_it_stands(
    number: str, content: str
) -> None:
    assert reason_of(reported(content % number)) == "number_precision"


@pytest.mark.parametrize(
    "text", ['"12345678901234567890123"', '"1e400"', '"0.1234567890123456789"', '"...........e"']
)
def test_digits_in_a_string_are_no_number(text: str) -> None:
    update = decode(reported(f'{{"a": {text}, "b": 1.5, {text}: 2}}'))
    assert update.writes[0] == ("reported", "/a", text.encode())
    assert update.writes[1] == ("reported", "/b", b"1.5")


# ---------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("stamp", "time_us"),
    [
        ("1700000000", NOW),
        ("1700000000000", NOW),
        ("1700000000000000", NOW),
        ("1700000000.0", NOW),
        ("1700000000.5", NOW + 500_000),
        ("1700000000.123456", NOW + 123_456),
        ("1700000000123.0", NOW + 123_000),
        ("1700000000123.456", NOW + 123_456),
        ("1.7e9", NOW),
        ("1.7e12", NOW),
        ("1.7e15", NOW),
    ],
)
def test_auto_tells_the_unit_by_magnitude(stamp: str, time_us: int) -> None:
    assert time_of(stamp) == time_us


@pytest.mark.parametrize(
    ("unit", "stamp", "time_us"),
    [
        ("seconds", "1700000000", NOW),
        ("milliseconds", "1700000000000", NOW),
        ("microseconds", "1700000000000000", NOW),
        ("seconds", "1700000000.25", NOW + 250_000),
        ("milliseconds", "1700000000000.5", NOW + 500),
        ("microseconds", "1700000000000000.0", NOW),
    ],
)
def test_a_set_unit_holds_whatever_the_magnitude(unit: Any, stamp: str, time_us: int) -> None:
    assert time_of(stamp, unit=unit) == time_us
    assert decode('{"state": {}}', ("timestamp", stamp), unit=unit).time_us == time_us


@pytest.mark.parametrize(
    ("stamp", "unit_us"),
    [
        (10**11 - 1, SECOND),
        (10**11, 1000),
        (10**14 - 1, 1000),
        (10**14, 1),
    ],
)
def test_the_borders_of_the_units_are_where_they_are_written_down(stamp: int, unit_us: int) -> None:
    everything = {"max_ahead_us": 2**62, "max_age_us": 2**62}
    assert time_of(str(stamp), **everything) == stamp * unit_us
    if stamp * unit_us <= 2**53:
        assert time_of(f"{stamp}.0", **everything) == stamp * unit_us


@pytest.mark.parametrize(
    "stamp",
    [
        "null", "true", "false", '"1700000000"', "[]", "{}", "0", "-1", "-1700000000", "1e300",
        "-1e300", "0.0", "18446744073709551615", "18446744073709551616", "4611686018427387904",
        "1e-300",
    ],
)  # fmt: skip
def test_a_timestamp_that_is_no_time_is_rejected(stamp: str) -> None:
    assert reason_of(f'{{"state": {{}}, "timestamp": {stamp}}}') == "bad_time"


@pytest.mark.parametrize(
    ("stamp", "version", "low"),
    [
        ("1700000000", "0", 0),
        ("1700000000", "7", 7),
        ("1700000000", "999999", 999_999),
        ("1700000000", "1000000", 0),
        ("1700000000", "18446744073709551615", 551_615),
        ("1700000000000", "7", 7),
        ("1700000000000", "999", 999),
        ("1700000000000", "1000", 0),
        ("1700000000000000", "7", 0),
        ("1700000000", "null", 0),
    ],
)
def test_a_sequence_fills_the_digits_that_the_unit_leaves_and_wraps(
    stamp: str, version: str, low: int
) -> None:
    assert time_of(stamp, version=version) == NOW + low
    if version != "null":
        assert time_of(stamp, ("seq", version)) == NOW + low


@pytest.mark.parametrize("version", ["-1", "1.0", "1.5", "true", '"1"', "[]", "{}", "1e3"])
def test_a_sequence_that_is_no_whole_number_is_rejected(version: str) -> None:
    payload = f'{{"state": {{}}, "timestamp": 1700000000, "version": {version}}}'
    assert reason_of(payload) == "bad_time"


def test_the_document_precedes_the_user_properties() -> None:
    assert time_of("1700000000", ("timestamp", "1600000000"), ("seq", "5"), version="3") == NOW + 3
    assert time_of("1700000000", ("seq", "5"), version="null") == NOW + 5


def test_of_a_user_property_given_twice_the_last_counts() -> None:
    update = decode(
        '{"state": {}}',
        ("timestamp", "1600000000"),
        ("seq", "1"),
        ("other", "x"),
        ("timestamp", "1700000000"),
        ("seq", "2"),
    )
    assert update.time_us == NOW + 2


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "x", "nan", "NaN", "sNaN", "inf", "-inf", "Infinity", "-1", "0", "1e999", "1" * 21,
        "--1", "1700000000x", "0x10", "²", "١٢٣x", "\0", "1e-999999", "9" * 20,
    ],
)  # fmt: skip
def test_a_user_property_that_is_no_time_is_rejected(text: str) -> None:
    assert reason_of('{"state": {}}', ("timestamp", text)) == "bad_time"


@pytest.mark.parametrize("text", ["", "x", "-1", "1.0", "1e3", " 1", "²", "1" * 21, "\0"])
def test_a_user_property_that_is_no_sequence_is_rejected(text: str) -> None:
    payload = '{"state": {}, "timestamp": 1700000000}'
    assert reason_of(payload, ("seq", text)) == "bad_time"


@pytest.mark.parametrize("over", [0, 1])
def test_the_border_of_the_future_is_exact(over: int) -> None:
    stamp = str(NOW + 300 * SECOND + over)
    if over:
        assert reason_of(f'{{"state": {{}}, "timestamp": {stamp}}}') == "time_in_future"
        assert time_of(stamp, on_future="server_time") == NOW
    else:
        assert time_of(stamp) == time_of(stamp, on_future="server_time") == int(stamp)


@pytest.mark.parametrize("over", [0, 1])
def test_the_border_of_the_past_is_exact(over: int) -> None:
    stamp = str(NOW - 9 * 86400 * SECOND - over)
    if over:
        assert reason_of(f'{{"state": {{}}, "timestamp": {stamp}}}') == "time_too_old"
        assert time_of(stamp, on_ancient="server_time") == NOW
    else:
        assert time_of(stamp) == time_of(stamp, on_ancient="server_time") == int(stamp)


@pytest.mark.parametrize("policy", ["reject", "server_time"])
@pytest.mark.parametrize("away", [-400 * 86400 * SECOND, 400 * 86400 * SECOND])
def test_with_a_clock_in_doubt_no_time_is_judged(policy: Any, away: int) -> None:
    doubting = decoder(on_future=policy, on_ancient=policy)
    doubting.clock_trusted = False
    payload = json.dumps({"state": {}, "timestamp": NOW + away}).encode()
    assert doubting.decode(TOPIC, payload, (), NOW).time_us == NOW + away
    assert doubting.without_device_time == 0


def test_a_clock_in_doubt_still_rejects_what_is_no_time() -> None:
    doubting = decoder()
    doubting.clock_trusted = False
    with pytest.raises(Rejected, match="bad_time"):
        doubting.decode(TOPIC, b'{"state": {}, "timestamp": -1}', (), NOW)


def test_receive_times_increase_strictly_whatever_the_clock_does() -> None:
    timeless = decoder()
    clock = [NOW, NOW, NOW, NOW - 10, NOW + 5, NOW - SECOND, NOW + 6]
    times = [timeless.decode(TOPIC, b'{"state": {}}', (), now).time_us for now in clock]
    assert times[0] == NOW
    assert times == sorted(set(times))
    assert timeless.without_device_time == len(clock)


def test_times_replaced_by_policy_are_receive_times_and_counted() -> None:
    lenient = decoder(on_future="server_time", on_ancient="server_time")
    documents = [
        b'{"state": {}}',
        b'{"state": {}, "timestamp": 1}',
        b'{"state": {}, "timestamp": 1800000000}',
        b'{"state": {}, "timestamp": 1700000000}',
    ]
    times = [lenient.decode(TOPIC, payload, (), NOW).time_us for payload in documents]
    assert times == [NOW, NOW + 1, NOW + 2, NOW]
    assert lenient.without_device_time == 3


# ---------------------------------------------------------------- weight


def test_an_update_weighs_at_least_what_its_rows_hold() -> None:
    prefix = "p" * 900
    update = decode(reported(json.dumps({prefix: {str(key): 1 for key in range(400)}})))
    text = sum(len(path) + len(value) for _, path, value in update.writes)
    assert text > 300_000
    assert update.size_bytes >= text
    growing = decode(reported('{"a": [' + "1E15," * 2000 + "1]}"))
    assert growing.size_bytes >= len(growing.writes[0][2]) > 30_000


def test_the_usual_update_weighs_its_payload_and_a_little_for_each_row() -> None:
    payload = reported('{"a": 1, "b": null}')
    assert len(payload) < decode(payload).size_bytes < len(payload) + 200


def test_every_reason_is_listed_once() -> None:
    assert len(set(REASONS)) == len(REASONS)
    assert orjson.loads(orjson.dumps(REASONS)) == list(REASONS)
