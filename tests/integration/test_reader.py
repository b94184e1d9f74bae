"""Reading a shadow back from a real Cassandra."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pytest

from shadowsvc.config import Settings
from shadowsvc.errors import SchemaBehind
from shadowsvc.shadow.pointer import below
from shadowsvc.shadow.view import RawRow, document, visible
from shadowsvc.store import driver
from shadowsvc.store.reader import read_shadow, select_shadow
from tests.keyspaces import migrated_keyspace, put, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import backing

pytestmark = pytest.mark.timeout(120)

T0 = 1_700_000_000_000_000


@pytest.fixture(scope="module")
def settings(cassandra: backing.Database) -> Iterator[Settings]:
    """Settings of a keyspace of this module with the whole schema."""
    with migrated_keyspace(cassandra) as keyspace:
        yield settings_of(cassandra, keyspace, request_timeout_seconds=30)


@pytest.fixture(scope="module")
def session(settings: Settings) -> Iterator[Any]:
    with driver.connected(settings.cassandra, keyspace=settings.cassandra.keyspace) as connection:
        yield connection.session


@pytest.fixture
def device() -> str:
    return f"lamp-{secrets.token_hex(4)}"


def test_a_device_never_heard_of_is_none(settings: Settings, device: str) -> None:
    assert read_shadow(settings, device, "") is None


def test_rows_come_with_their_times_and_the_version(
    settings: Settings, session: Any, device: str
) -> None:
    put(session, device, "/a", 1, T0)
    put(session, device, "/b/c", [1, None], T0 + 5_000_001, section="desired")
    found = read_shadow(settings, device)
    assert found is not None
    assert (found.device, found.shadow) == (device, "")
    assert sorted(found.rows) == [
        RawRow("desired", "/b/c", "[1, null]", T0 + 5_000_001),
        RawRow("reported", "/a", "1", T0),
    ]
    assert found.version_us == T0 + 5_000_001
    assert found.updated_at_ms == (T0 + 5_000_001) // 1000
    assert found.shadows == ()
    assert document(found.rows, version_us=found.version_us, updated_at_ms=found.updated_at_ms) == {
        "state": {"reported": {"a": 1}, "desired": {"b": {"c": [1, None]}}},
        "metadata": {
            "reported": {"a": {"timestamp": 1_700_000_000}},
            "desired": {"b": {"c": {"timestamp": 1_700_000_005}}},
        },
        "version": T0 + 5_000_001,
        "timestamp": 1_700_000_005,
    }


def test_hidden_rows_are_read_too(session: Any, device: str) -> None:
    put(session, device, "/light", "off", T0)
    put(session, device, "/light/level", 80, T0 + 1)
    found = select_shadow(session, device, "")
    assert found is not None
    assert len(found.rows) == 2
    assert [row.path for row in visible(found.rows)] == ["/light/level"]


def test_a_device_whose_leaves_are_all_deleted_was_still_heard_from(
    session: Any, device: str
) -> None:
    put(session, device, "/a", 1, T0)
    session.execute(
        "DELETE FROM shadow USING TIMESTAMP %s WHERE device = %s AND shadow = '' "
        "AND section = 'reported'",
        (T0 + 1, device),
    )
    session.execute(
        "UPDATE shadow USING TIMESTAMP %s SET updated_at = %s WHERE device = %s",
        (T0 + 1, T0 // 1000, device),
    )
    found = select_shadow(session, device, "")
    assert found is not None
    assert found.rows == ()
    assert found.shadows == ()
    assert found.version_us == T0 + 1
    assert found.updated_at_ms == T0 // 1000


def test_a_deleted_subtree_takes_what_lies_below_and_nothing_beside(
    session: Any, device: str
) -> None:
    paths = ["/a", "/a-", "/a/", "/a/b", "/a/b/c", "/a0", "/a~1b", "/b"]
    for path in paths:
        put(session, device, path, 1, T0)
    first, end = below("/a")
    session.execute(
        "DELETE FROM shadow USING TIMESTAMP %s WHERE device = %s AND shadow = '' "
        "AND section = 'reported' AND path >= %s AND path < %s",
        (T0 + 1, device, first, end),
    )
    found = select_shadow(session, device, "")
    assert found is not None
    assert [row.path for row in found.rows] == ["/a", "/a-", "/a0", "/a~1b", "/b"]


def test_an_absent_shadow_names_those_that_there_are(session: Any, device: str) -> None:
    put(session, device, "/a", 1, T0)
    put(session, device, "/a", 1, T0 + 1, shadow="firmware")
    put(session, device, "/b", 1, T0 + 1, shadow="firmware")
    found = select_shadow(session, device, "typo")
    assert found is not None
    assert found.rows == ()
    assert found.shadows == ("", "firmware")
    assert found.version_us == T0 + 1


def test_a_shadow_of_many_pages_is_whole(session: Any, device: str) -> None:
    number = 250
    for index in range(number):
        put(session, device, f"/{index}", index, T0 + index)
    usual = session.default_fetch_size
    session.default_fetch_size = 60
    try:
        found = select_shadow(session, device, "")
    finally:
        session.default_fetch_size = usual
    assert found is not None
    assert {row.value for row in found.rows} == {str(index) for index in range(number)}
    assert found.version_us == T0 + number - 1


def test_rows_written_by_hand_do_not_make_it_fail(session: Any, device: str) -> None:
    insert = "INSERT INTO shadow (device, shadow, section, path, value) VALUES (%s, '', %s, %s, %s)"
    session.execute(f"{insert} USING TIMESTAMP {T0}", (device, "reported", "/a", "not json"))
    session.execute(f"{insert} USING TIMESTAMP {T0}", (device, "other", "x", "1"))
    session.execute(insert, (device, "reported", "/null", None))
    found = select_shadow(session, device, "")
    assert found is not None
    assert {row.path for row in found.rows} == {"/a", "x"}
    assert found.version_us == T0  # there is no updated_at
    assert found.updated_at_ms == T0 // 1000
    made = document(found.rows, version_us=found.version_us, updated_at_ms=found.updated_at_ms)
    assert made["state"] == {"reported": {"a": None}}
    assert len(made["errors"]) == 2


def test_a_time_beyond_the_calendar_is_read(session: Any, device: str) -> None:
    session.execute("UPDATE shadow SET updated_at = %s WHERE device = %s", (2**62, device))
    found = select_shadow(session, device, "")
    assert found is not None
    assert found.updated_at_ms == 2**62


def test_without_the_keyspace_it_says_to_migrate(settings: Settings, unique: str) -> None:
    absent = Settings(cassandra=settings.cassandra.model_copy(update={"keyspace": unique}))
    with pytest.raises(SchemaBehind, match="shadowsvc migrate"):
        read_shadow(absent, "d", "")
