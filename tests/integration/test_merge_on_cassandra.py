"""The rule of merging against a real Cassandra: it makes of our writes what we say it does."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.shadow.update import Update
from shadowsvc.store.cassandra import CassandraStore
from shadowsvc.store.deadletter import DeadLetter
from tests.direct import connect_directly
from tests.keyspaces import settings_of
from tests.property.cassandra_model import Partition, Row

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Iterator

    import backing

pytestmark = pytest.mark.timeout(240)

few = settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

_KEPT: list[Any] = []

T0 = 1_700_000_000_000_000
# Neighbours of "/" in the order of bytes, keys that need escaping, and text of every UTF-8 length.
PATHS = st.sampled_from(
    ["/a", "/a/b", "/a/b/c", "/a-", "/a0", "/a/", "/a~1b", "/é", "/é/😀", "/a/\uffff", "/"]
)
SECTIONS = st.sampled_from(["reported", "desired"])
VALUES = st.sampled_from(
    [b"1", b"10", b"2", b'""', b'"z"', '"é"'.encode(), '"\U0010ffff"'.encode(), b"[null]", b"-1"]
)
# Four ticks within a microsecond or a millisecond of each other, so that ties are common.
TIMES = st.sampled_from([T0, T0 + 1, T0 + 999, T0 + 1000])


def updates(device: str, shape: list[Any]) -> list[Update]:
    return [Update.of(device, *fields, size_bytes=100) for fields in shape]


SHAPES = st.lists(
    st.tuples(
        st.sampled_from(["", "", "s"]),
        TIMES,
        st.lists(st.tuples(SECTIONS, PATHS, VALUES), max_size=4),
        st.lists(st.tuples(SECTIONS, PATHS | st.just("")), max_size=2),
    ).filter(lambda fields: bool(fields[2] or fields[3])),
    min_size=1,
    max_size=7,
)


class Table:
    """The service's own writer, and another driver's eyes."""

    def __init__(self, runner: asyncio.Runner, store: CassandraStore, session: Any) -> None:
        self._runner = runner
        self._session = session
        self.store = store
        self.keyspace = store.settings.keyspace

    def run(self, call: Awaitable[None]) -> None:
        async def awaited() -> None:
            await call

        self._runner.run(awaited())

    def write(self, batch: list[Update]) -> None:
        self.run(self.store.write([merge(batch)]))

    def select(self, query: str, *values: object) -> list[Any]:
        return list(self._session.execute(query.format(keyspace=self.keyspace), values))

    def rows(self, device: str) -> tuple[list[Row], tuple[int, int] | None]:
        found = self.select(
            "SELECT shadow, section, path, value, WRITETIME(value), "
            "toUnixTimestamp(updated_at), WRITETIME(updated_at) "
            "FROM {keyspace}.shadow WHERE device = %s",
            device,
        )
        # The static column comes in a row of its own when there is no other.
        rows = [Row(*row[:5]) for row in found if row[0] is not None]
        return rows, (tuple(found[0][5:7]) if found else None)


def expected(shape: list[Any]) -> tuple[list[Row], tuple[int, int] | None]:
    partition = Partition()
    for update in updates("d", shape):
        partition.write_update(update)
    return partition.rows(), partition.updated_at()


@pytest.fixture(scope="module", params=["direct", "driver"])
def table(
    request: pytest.FixtureRequest, cassandra: backing.Database, migrated: str
) -> Iterator[Table]:
    """By each of the two ways that a batch can take."""
    way: str = request.param
    settings = settings_of(cassandra, migrated, request_timeout_seconds=30).cassandra
    made = CassandraStore(settings, dead_letter_ttl_seconds=3600)
    with asyncio.Runner() as runner, cassandra.session() as session:
        runner.run(made.connect())
        if way == "direct":
            runner.run(connect_directly(made))
        yield Table(runner, made, session)
        runner.run(made.close())
        assert made.batches[way] == sum(made.batches.values()) > 0
    # acsylla never closes the socket pairs of a cluster, and a collected socket is a warning.
    _KEPT.append(made._cluster)


@few
@given(SHAPES)
def test_updates_written_one_by_one_leave_what_the_model_says(
    table: Table, shape: list[Any]
) -> None:
    device = uuid.uuid4().hex
    for update in updates(device, shape):
        table.write([update])
    assert table.rows(device) == expected(shape)


@few
@given(SHAPES, st.randoms(use_true_random=False))
def test_any_order_repetition_and_split_leaves_the_same_rows(
    table: Table, shape: list[Any], rng: random.Random
) -> None:
    device = uuid.uuid4().hex
    repeated = updates(device, shape)
    repeated += rng.choices(repeated, k=rng.randrange(3))
    rng.shuffle(repeated)
    while repeated:
        at = rng.randint(1, len(repeated))
        table.write(repeated[:at])
        repeated = repeated[at:]
    assert table.rows(device) == expected(shape)


@few
@given(SHAPES)
def test_updates_joined_into_one_leave_the_same_rows(table: Table, shape: list[Any]) -> None:
    device = uuid.uuid4().hex
    table.write(updates(device, shape))
    assert table.rows(device) == expected(shape)


@pytest.mark.parametrize("order", [1, -1])
def test_devices_that_share_a_batch_do_not_touch_each_other(table: Table, order: int) -> None:
    devices = [uuid.uuid4().hex for _ in range(10)]
    histories = [
        [
            ("", T0 + number, [("reported", "/a", str(number).encode())], []),
            ("s", T0 + number, [], [("desired", "")]),
        ]
        for number in range(10)
    ]
    mutations = [
        merge(updates(device, history)) for device, history in zip(devices, histories, strict=True)
    ]
    table.run(table.store.write(mutations[::order]))
    for device, history in zip(devices, histories, strict=True):
        assert table.rows(device) == expected(history)


def decoded(device: str, reported: dict[str, Any], **limits: Any) -> Update:
    payload = json.dumps({"state": {"reported": reported}, "timestamp": T0}, ensure_ascii=False)
    decoder = Decoder(TopicParser("things"), Limits(**limits))
    return decoder.decode(f"things/{device}/shadow/update", payload.encode(), (), T0)


def test_what_the_decoder_lets_through_is_stored_as_it_is(table: Table) -> None:
    """Text that a driver or a server might cut, refuse or change."""
    device = uuid.uuid4().hex
    texts = [
        "", " ", "\x01", "\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\ufeff", "\ufffd",
        "\ufffe", "\uffff", "\U00010000", "\U0010ffff", "~/", "'", "\\", "%s", "x" * 1000,
    ]  # fmt: skip
    update = decoded(device, {text: [text, "\0" + text] for text in texts})
    table.write([update])
    rows, heard = table.rows(device)
    assert {(row.path, row.value.encode()) for row in rows} == {
        write[1:] for write in update.writes
    }
    assert len(rows) == len(texts)
    assert heard == (T0 // 1000, T0)


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_largest_update_that_is_let_through_is_stored_whole(
    table: Table,
    in_parts: bool,  # noqa: FBT001
) -> None:
    device = uuid.uuid4().hex
    update = decoded(device, {"p" * 1000: {str(number): "x" * 100 for number in range(500)}})
    assert update.size_bytes > 500_000
    write = table.store.write_in_parts if in_parts else lambda one: table.store.write([one])
    table.run(write(merge([update])))
    rows, heard = table.rows(device)
    assert len(rows) == 500
    assert heard == (T0 // 1000, T0)


@pytest.mark.parametrize("unit", ["x", "é", "😀", "\0"])
@pytest.mark.parametrize("length", [0, 70_000])
def test_no_dead_letter_is_refused(table: Table, unit: str, length: int) -> None:
    text = unit * length
    letter = DeadLetter.of(
        topic=text,
        payload=text.encode(),
        device=text or None,
        reason="not_json",
        detail=text,
        received_ms=T0 // 1000,
        client_id="pod",
        qos=1,
        retain=True,
        duplicate=False,
        user_properties=[(text, text)],
    )
    table.run(table.store.write_dead_letter(letter))
    ((topic, device, detail, payload, size, digest, properties),) = table.select(
        "SELECT topic, device, detail, payload, payload_bytes, payload_sha256, user_properties "
        "FROM {keyspace}.dead_letter WHERE bucket = %s AND shard = %s AND received_at = %s "
        "AND id = %s",
        letter.bucket_ms,
        letter.shard,
        letter.received_ms,
        letter.id,
    )
    assert (topic, device, detail) == (letter.topic, letter.device, letter.detail)
    assert (payload, size, digest) == (
        letter.payload,
        letter.payload_bytes,
        letter.payload_sha256,
    )
    assert properties == letter.user_properties
