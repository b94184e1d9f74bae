"""The binary protocol: what we send, read by a reader of the test's own, and what we take."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.update import Mutations, Update
from shadowsvc.store import frames
from shadowsvc.store.cassandra import CassandraStore
from shadowsvc.store.statements import STATEMENTS
from tests.unit.reading_frames import Reader, read_batch, response, rows

if TYPE_CHECKING:
    from shadowsvc.store.direct import Direct

IDS = {name: f"id of {name}".encode() for name in STATEMENTS}
T0 = 1_700_000_000_000_000
KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)
WRITES = st.tuples(st.sampled_from(["reported", "desired"]), KEYS.map("/{}".format), st.binary())
DELETES = st.tuples(st.sampled_from(["reported", "desired"]), st.just("") | KEYS.map("/{}".format))
UPDATES = st.builds(
    Update.of,
    KEYS,
    st.just("") | KEYS,
    st.integers(T0, T0 + 2),
    st.lists(WRITES, max_size=5),
    st.lists(DELETES, max_size=3),
    st.just(100),
)


class Driver:
    """Stands where acsylla's prepared statements do, and keeps what is bound."""

    def __init__(self, store: CassandraStore) -> None:
        self.bound: list[tuple[str, list[Any]]] = []
        store._statements = {name: _Statement(name) for name in STATEMENTS}
        self._store = store

    def fill(self, mutations: list[Mutations]) -> list[tuple[str, list[bytes]]]:
        self._store._fill(mutations, self.bound.append)
        return [(name, [_as_bytes(value) for value in values]) for name, values in self.bound]


class _Statement:
    def __init__(self, name: str) -> None:
        self._name = name

    def bind(self, values: list[Any]) -> tuple[str, list[Any]]:
        return self._name, values


def _as_bytes(value: Any) -> bytes:
    """What the driver makes of a value: texts, times in µs, and seconds that become ms."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, float):
        return struct.pack(">q", int(value * 1000))
    return struct.pack(">q", value)


def store() -> CassandraStore:
    from shadowsvc.config import Settings

    return CassandraStore(Settings().cassandra, dead_letter_ttl_seconds=60)


def body_maker() -> frames.BatchBody:
    statements: Direct = store().direct
    assert set(statements.statements) == set(STATEMENTS)
    known = {name: (IDS[name], text.count("?")) for name, text in statements.statements.items()}
    return frames.BatchBody(known, frames.CONSISTENCIES["LOCAL_QUORUM"])


def names_of(body: bytes) -> list[tuple[str, list[bytes]]]:
    batch = read_batch(body)
    assert (batch.kind, batch.consistency, batch.flags) == (1, 6, 0)
    names = {known: name for name, known in IDS.items()}
    return [(names[known], values) for known, values in batch.rows]


@given(st.lists(UPDATES, min_size=1, max_size=5))
def test_a_batch_says_the_same_to_cassandra_by_either_way(updates: list[Update]) -> None:
    wanted = Driver(store()).fill([merge((update,)) for update in updates])
    assert names_of(body_maker().encode(updates)) == wanted


@given(st.lists(st.lists(UPDATES, min_size=1, max_size=4), min_size=1, max_size=3))
def test_merged_updates_say_the_same_by_either_way(groups: list[list[Update]]) -> None:
    merged = [merge(updates) for updates in groups]
    assert names_of(body_maker().encode(merged)) == Driver(store()).fill(merged)


def test_a_usual_update_is_one_statement_a_leaf_with_the_last_contact_in_the_first() -> None:
    update = Update("lamp", "", T0, ["/on", "/dim"], [b"true", b"7"], 2, [], 100)
    time, stamp = struct.pack(">q", T0), struct.pack(">q", T0 // 1000)
    assert names_of(body_maker().encode([update])) == [
        ("write_usual_heard", [time, b"true", stamp, b"lamp", b"/on"]),
        ("write_usual", [time, b"7", b"lamp", b"/dim"]),
    ]


def test_paths_that_devices_make_up_are_not_kept_for_ever() -> None:
    maker = body_maker()
    for at in range(5000):
        maker.encode([Update("d", "", T0, [f"/{at}"], [b"1"], 1, [], 100)])
    long = "/" + "x" * 1000
    maker.encode([Update("d", "", T0, [long], [b"1"], 1, [], 100)])
    assert len(maker._paths) <= 1024
    assert long not in maker._paths


@pytest.mark.parametrize(
    "update",
    [
        Update("d", "", 1 << 63, ["/a"], [b"1"], 1, [], 100),
        Update("d\ud800", "", T0, ["/a"], [b"1"], 1, [], 100),
        Update("d", "", T0, ["/\ud800"], [b"1"], 1, [], 100),
        Update("d", "", T0, ["/a"] * 65_536, [b"1"] * 65_536, 65_536, [], 100),
    ],
    ids=["time", "device", "path", "rows"],
)
def test_what_the_protocol_has_no_room_for_is_a_value_error(update: Update) -> None:
    with pytest.raises(ValueError, match=r"."):
        body_maker().encode([update])


ANSWERS = st.lists(
    st.tuples(st.integers(0, 32_767), st.sampled_from([0, 2, 8, 12]), st.binary(max_size=40)),
    max_size=6,
)


@given(ANSWERS, st.data())
def test_answers_are_found_however_they_are_split(
    answers: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(response(*answer) for answer in answers)
    taken = frames.Answers()
    found = []
    while stream:
        at = data.draw(st.integers(1, len(stream)))
        found += taken.take(stream[:at])
        stream = stream[at:]
    assert found == answers


@pytest.mark.parametrize("flags", range(0, 16, 2))
def test_tracing_warnings_and_payload_before_a_body_are_left_out(flags: int) -> None:
    extras = b""
    if flags & 2:
        extras += bytes(16)
    if flags & 8:
        extras += struct.pack(">HH3sH0s", 2, 3, b"big", 0, b"")
    if flags & 4:
        extras += struct.pack(">HH1si2sH1si", 2, 1, b"a", 2, b"xy", 1, b"b", -1)
    answer = response(7, frames.RESULT, extras + b"body", flags=flags)
    answers = frames.Answers()
    assert answers.take(answer) == [(7, frames.RESULT, b"body")]
    assert answers.warnings == (["big", ""] if flags & 8 else [])


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        response(0, frames.READY, b"", version=0x85),
        response(0, frames.READY, b"", version=0x04),
        struct.pack(">BBhBi", 0x84, 0, 0, 2, -1),
        struct.pack(">BBhBi", 0x84, 0, 0, 2, 1 << 30),
        response(0, frames.RESULT, b"\0", flags=8),
    ],
)
def test_what_no_server_may_send_is_told(data: bytes) -> None:
    with pytest.raises(frames.BadAnswer):
        frames.Answers().take(data)


def test_a_prepared_statement_is_known_by_the_id_of_the_answer() -> None:
    body = struct.pack(">iH4s", 4, 4, b"abcd") + b"metadata"
    assert frames.prepared_id(body) == b"abcd"
    for bad in (b"", struct.pack(">i", 1), struct.pack(">iH2s", 4, 4, b"ab"), body[:6]):
        with pytest.raises(frames.BadAnswer):
            frames.prepared_id(bad)


def test_an_error_has_a_code_and_a_message() -> None:
    assert frames.error_of(struct.pack(">iH3s", 0x1100, 3, b"not") + b"more") == (0x1100, "not")
    with pytest.raises(frames.BadAnswer):
        frames.error_of(b"\0")


def test_requests_are_as_the_specification_has_them() -> None:
    assert frames.frame(3, frames.OPTIONS, b"") == b"\x04\0\0\x03\x05\0\0\0\0"
    startup = Reader(frames.startup_body())
    assert [startup.short(), startup.string(), startup.string()] == [1, "CQL_VERSION", "3.0.0"]
    assert frames.prepare_body("é") == b"\0\0\0\x02\xc3\xa9"
    assert frames.plain_login("me", "pass") == b"\0\0\0\x08\0me\0pass"


def test_a_question_names_its_consistency_and_has_no_values() -> None:
    reader = Reader(frames.query_body("SELECT now()", frames.CONSISTENCIES["ONE"]))
    assert reader.value() == b"SELECT now()"
    assert (reader.short(), reader.byte(), reader.left) == (0x0001, 0, 0)


ROWS = st.lists(st.lists(st.none() | st.binary(max_size=20), min_size=3, max_size=3), max_size=4)


@given(found=ROWS, described=st.booleans())
def test_rows_are_read_with_and_without_a_description_of_columns(
    *, found: list[list[bytes | None]], described: bool
) -> None:
    body = rows(*found, columns=3, described=described)
    assert frames.rows_of(body) == found
    for size in range(len(body)):
        with pytest.raises(frames.BadAnswer):
            frames.rows_of(body[:size])


def test_rows_of_one_page_of_many_and_of_a_table_for_each_column_are_read() -> None:
    paged = struct.pack(">iii", 2, 0x04 | 0x02, 1) + struct.pack(">i2s", 2, b"on")
    assert frames.rows_of(paged + struct.pack(">ii1s", 1, 1, b"x")) == [[b"x"]]
    column = b"\0\1k\0\1t\0\1c\0\x09"
    own_table = struct.pack(">iii", 2, 0, 1) + column + struct.pack(">ii", 1, -1)
    assert frames.rows_of(own_table) == [[None]]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(struct.pack(">iii", 1, 0, 0), id="no rows"),
        pytest.param(struct.pack(">iiii", 2, 0x04, 0, 1), id="no columns"),
        pytest.param(
            struct.pack(">iii", 2, 0x01, 1) + b"\0\0\0\0\0\0" + b"\0\x22", id="a column of sets"
        ),
    ],
)
def test_what_is_no_plain_rows_is_told(body: bytes) -> None:
    with pytest.raises(frames.BadAnswer):
        frames.rows_of(body)
