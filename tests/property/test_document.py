"""Decode over any input: numbers keep their value, keys survive, only `Rejected` is raised."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from shadowsvc.errors import Rejected
from shadowsvc.shadow.document import REASONS, Decoder, Limits
from shadowsvc.shadow.pointer import join, split
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.shadow.update import SECTIONS, Update
from shadowsvc.shadow.view import RawRow, document

TOPIC = "things/d/shadow/update"
NOW = 1_700_000_000_000_000

thorough = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NUMBERS = st.from_regex(
    r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?", fullmatch=True
) | st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from([2**53, 2**63, 2**64, 10**16, 10**17]).flatmap(
        lambda border: st.integers(-2, 2).map(lambda off: str(border + off))
    ),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.decimals(allow_nan=False, allow_infinity=False, places=6).map(lambda value: f"{value:f}"),
)
# Where a number may stand, and the way to it in the value of the leaf `/a`.
PLACES: list[tuple[str, tuple[Any, ...]]] = [
    ('{"a": %s}', ()),
    ('{"a": [%s]}', (0,)),
    ('{"x": "y", "a": [1, {"b": [[], {"c": %s}]}]}', (1, "b", 1, "c")),
    ('{"a": 1, "a": %s}', ()),
]
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
)
IN_ARRAYS = st.recursive(
    SCALARS | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.recursive(
    st.dictionaries(KEYS, SCALARS | st.none() | st.lists(IN_ARRAYS, max_size=3), max_size=4),
    lambda inner: st.dictionaries(KEYS, SCALARS | inner, max_size=3),
    max_leaves=10,
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
PROPERTIES = st.lists(
    st.tuples(
        st.sampled_from(["timestamp", "seq", "x"]),
        st.text(max_size=8)
        | st.text("0123456789.eE+-_nainf ", max_size=22)
        | st.integers().map(str)
        | st.sampled_from(["1700000000", "1700000000000", "nan", "inf", "1e309", "1_0"]),
    ),
    max_size=3,
)


def decoder(**limits: Any) -> Decoder:
    return Decoder(TopicParser("things"), Limits(**limits))


def exact(text: bytes) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def leaves(node: dict[str, Any], keys: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= leaves(value, (*keys, key))
        else:
            found[join((*keys, key))] = value
    return found


def without_nulls(node: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in node.items():
        if isinstance(value, dict):
            inner = without_nulls(value)
            if inner:
                kept[key] = inner
        elif value is not None:
            kept[key] = value
    return kept


def fits_64_bits(number: str) -> bool:
    """Whether an integer of 64 bits or a double has exactly this value."""
    value = Decimal(number)
    if not {".", "e", "E"} & set(number) and -(2**63) <= int(number) < 2**64:
        return True
    return Decimal(repr(float(number))) == value


@thorough
@given(NUMBERS, st.sampled_from(PLACES))
@example("-0", PLACES[0])
@example("-0.0", PLACES[1])
@example("9007199254740993", PLACES[2])
@example("9007199254740993.0", PLACES[2])
@example("1e400", PLACES[2])
@example("1E-400", PLACES[0])
def test_a_number_keeps_its_value_or_the_document_is_rejected(
    number: str, place: tuple[str, tuple[Any, ...]]
) -> None:
    content, way = place
    payload = f'{{"state": {{"reported": {content % number}}}, "timestamp": 1700000000}}'
    try:
        update = decoder().decode(TOPIC, payload.encode(), (), NOW)
    except Rejected as rejected:
        assert rejected.reason == "number_precision"
        assert not fits_64_bits(number), "it need not have been rejected"
        return
    kept = exact(next(value for _, path, value in update.writes if path == "/a"))
    for step in way:
        kept = kept[step]
    assert kept == Decimal(number)
    assert fits_64_bits(number)


@thorough
@given(st.lists(NUMBERS, min_size=1, max_size=8))
def test_one_number_too_many_rejects_them_all(numbers: list[str]) -> None:
    content = ", ".join(f'"{index}": {number}' for index, number in enumerate(numbers))
    payload = f'{{"state": {{"desired": {{{content}}}}}}}'.encode()
    if all(map(fits_64_bits, numbers)):
        update = decoder().decode(TOPIC, payload, (), NOW)
        kept = [Decimal(value.decode()) for _, _, value in update.writes]
        assert kept == [Decimal(number) for number in numbers]
    else:
        with pytest.raises(Rejected, match=r"^number_precision"):
            decoder().decode(TOPIC, payload, (), NOW)


@thorough
@given(OBJECTS, OBJECTS, st.booleans())
def test_every_leaf_becomes_a_write_and_every_null_a_delete(
    reported: dict[str, Any],
    desired: dict[str, Any],
    ascii_only: bool,  # noqa: FBT001
) -> None:
    text = json.dumps(
        {"state": {"reported": reported, "desired": desired}}, ensure_ascii=ascii_only
    )
    update = decoder().decode(TOPIC, text.encode(), (), NOW)
    for section, content in (("reported", reported), ("desired", desired)):
        expected = leaves(content)
        written = {
            path: json.loads(value) for name, path, value in update.writes if name == section
        }
        deleted = [path for name, path in update.deletes if name == section]
        assert written == {path: value for path, value in expected.items() if value is not None}
        assert sorted(deleted) == sorted(path for path, value in expected.items() if value is None)
        assert all(split(path) for path in (*written, *deleted))


@thorough
@given(OBJECTS)
def test_what_was_decoded_is_read_back_as_it_was_sent(reported: dict[str, Any]) -> None:
    text = json.dumps({"state": {"reported": reported}, "timestamp": 1700000000})
    update = decoder().decode(TOPIC, text.encode(), (), NOW)
    rows = [
        RawRow(section, path, value.decode(), update.time_us)
        for section, path, value in update.writes
    ]
    made = document(rows, version_us=1, updated_at_ms=1)
    assert "errors" not in made
    assert made["state"].get("reported", {}) == without_nulls(reported)


def check(update: Update, limits: Limits) -> None:
    """What every update promises the rooms behind it."""
    assert 0 < update.time_us < 2**62
    assert len(update.writes) + len(update.deletes) <= limits.max_leaves
    for section, path, value in update.writes:
        assert section in SECTIONS
        assert split(path)
        assert isinstance(value, bytes)
        assert b"\0" not in value
        json.loads(value)
    for section, path in update.deletes:
        assert section in SECTIONS
        assert path == "" or split(path)
    for path in [path for _, path, *_ in (*update.writes, *update.deletes)]:
        assert "\0" not in path
        assert len(path.encode()) <= limits.max_path_bytes
    assert update.size_bytes > 0


def decode_anything(
    topic: str, payload: bytes, properties: list[tuple[str, str]], **limits: Any
) -> None:
    made = decoder(**limits)
    try:
        update = made.decode(topic, payload, properties, NOW)
    except Rejected as rejected:
        assert rejected.reason in REASONS
        assert rejected.reason not in {"refused_by_store", "internal_error"}
        assert rejected.detail
        rejected.detail.encode()
    else:
        check(update, made.limits)


@thorough
@given(st.binary(max_size=200), PROPERTIES)
def test_no_bytes_raise_anything_but_rejected(
    payload: bytes, properties: list[tuple[str, str]]
) -> None:
    decode_anything(TOPIC, payload, properties)


@thorough
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "state": ANY_JSON
            | st.fixed_dictionaries(
                {}, optional={"reported": ANY_JSON | OBJECTS, "desired": ANY_JSON | OBJECTS}
            ),
            "timestamp": ANY_JSON | st.integers() | st.just(1_700_000_000),
            "version": ANY_JSON | st.integers(),
            "clientToken": ANY_JSON,
        },
    ),
    PROPERTIES,
    st.sampled_from(["auto", "seconds", "milliseconds", "microseconds"]),
    st.sampled_from(["reject", "server_time"]),
    st.integers(1, 40),
)
def test_no_document_raises_anything_but_rejected(
    made: dict[str, Any],
    properties: list[tuple[str, str]],
    unit: str,
    policy: str,
    small: int,
) -> None:
    payload = json.dumps(made).encode()
    limits = {"unit": unit, "on_future": policy, "on_ancient": policy}
    decode_anything(TOPIC, payload, properties, **limits)
    decode_anything(
        TOPIC,
        payload,
        properties,
        max_depth=min(small, 4),
        max_leaves=small,
        max_path_bytes=small,
        **limits,
    )


@thorough
@given(st.binary(min_size=1, max_size=3), st.integers(0, 200), st.integers(0, 3), st.integers(0, 3))
def test_a_damaged_document_raises_nothing_but_rejected(
    noise: bytes, at: int, cut: int, kind: int
) -> None:
    whole = (
        b'{"state": {"reported": {"a": 1.5e0, "b": {"\\u0000~/": [null, {"c": -0}]}},'
        b' "desired": null}, "timestamp": 1700000000.5, "version": 18446744073709551616}'
    )
    at %= len(whole)
    damaged = (
        whole[:at],
        whole[:at] + noise + whole[at + cut :],
        whole[at:],
        whole[:at] + noise * 50 + whole[at:],
    )[kind]
    decode_anything(TOPIC, damaged, [])


@thorough
@given(st.text(max_size=40), st.binary(max_size=20))
def test_no_topic_raises_anything_but_rejected(topic: str, payload: bytes) -> None:
    decode_anything(topic, payload, [])
    decode_anything(f"things/{topic}/shadow/update", payload, [])
    decode_anything(f"things/d/shadow/name/{topic}/update", payload, [])


@thorough
@given(st.integers(0, 2**64), st.integers(0, 2**64), st.sampled_from([1, 1000, 1_000_000]))
def test_a_later_sequence_is_a_later_time_until_it_wraps(
    first: int, second: int, unit_us: int
) -> None:
    assume(first < second < 2**64)
    unit = {1: "microseconds", 1000: "milliseconds", 1_000_000: "seconds"}[unit_us]
    made = decoder(unit=unit)
    times = [
        made.decode(
            TOPIC,
            f'{{"state": {{}}, "timestamp": {NOW // unit_us}, "version": {version}}}'.encode(),
            (),
            NOW,
        ).time_us
        for version in (first, second)
    ]
    assert all(NOW <= time_us < NOW + unit_us for time_us in times)
    if unit_us > 1 and first // unit_us == second // unit_us:
        assert times[0] < times[1]


@pytest.mark.parametrize("levels", [10, 985, 1015])
def test_deep_documents_are_rejected_within_any_stack(levels: int) -> None:
    """The caller's own frames leave less of Python's limit."""
    deep = "[" * levels + "]" * levels
    payload = f'{{"state": {{"reported": {{"a": 0.5e0}}}}, "x": {deep}}}'.encode()

    def at_depth(frames: int) -> None:
        if frames:
            at_depth(frames - 1)
        else:
            decode_anything(TOPIC, payload, [])

    at_depth(100)


VETERAN = decoder(max_path_bytes=40)
"""A decoder that has seen every document of every example."""


@thorough
@given(st.lists(OBJECTS | st.dictionaries(st.text("/~ab", max_size=30), SCALARS), max_size=3))
def test_what_was_decoded_before_never_shows(contents: list[dict[str, Any]]) -> None:
    for content in contents:
        payload = json.dumps({"state": {"reported": content}, "timestamp": 1700000000}).encode()
        seen = []
        for made in (VETERAN, decoder(max_path_bytes=40)):
            try:
                seen.append(repr(made.decode(TOPIC, payload, (), NOW)))
            except Rejected as rejected:
                seen.append(str(rejected))
        assert seen[0] == seen[1]


def test_no_stream_of_new_keys_makes_a_decoder_forget_the_rules_or_grow_without_bound() -> None:
    made = decoder(max_path_bytes=100)
    for number in range(300):
        keys = {f"{number}-{key}": {"x": key} for key in range(30)}
        payload = json.dumps({"state": {"desired": keys}}).encode()
        paths = [path for _, path, _ in made.decode(TOPIC, payload, (), NOW).writes]
        assert paths == [f"/{number}-{key}/x" for key in range(30)]
    for _ in range(2):
        with pytest.raises(Rejected, match="path_too_long"):
            made.decode(TOPIC, json.dumps({"state": {"desired": {"/" * 60: 1}}}).encode(), (), NOW)
    held = [path for paths in made._paths.values() for path in paths.values()]
    assert len(held) + len(made._paths) <= 5000
    assert all(len(path) <= 128 for path in held)
