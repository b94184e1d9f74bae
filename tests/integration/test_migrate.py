"""Migrations against a real Cassandra."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest

from shadowsvc.config import Settings
from shadowsvc.errors import (
    SchemaBehind,
    SchemaConflict,
    StoreRefused,
    StoreUnavailable,
)
from shadowsvc.store import driver, schema_lock
from shadowsvc.store.migrate import (
    EXPECTED_VERSION,
    SELECT_VERSIONS,
    Migration,
    MigrationReport,
    current_version,
    migrate,
    migrations,
    verify,
)
from tests.keyspaces import settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import backing

pytestmark = pytest.mark.timeout(180)


def quiet(_: str) -> None:
    """Take progress and drop it."""


@pytest.fixture
def settings(cassandra: backing.Database, keyspace: str) -> Settings:
    """Settings of a keyspace that does not exist yet, and is dropped at the end."""
    return settings_of(cassandra, keyspace, request_timeout_seconds=30)


def changed(settings: Settings, **cassandra: Any) -> Settings:
    return Settings(cassandra=settings.cassandra.model_copy(update=cassandra))


@pytest.fixture
def session(settings: Settings) -> Iterator[Any]:
    with driver.connected(settings.cassandra) as connection:
        yield connection.session


def test_files_are_numbered_from_one_without_a_gap_and_the_last_is_the_version_needed() -> None:
    assert [file.version for file in migrations()] == list(range(1, EXPECTED_VERSION + 1))
    names = {
        file.name
        for file in resources.files("shadowsvc.store").joinpath("schema").iterdir()
        if file.name.endswith(".cql")
    }
    assert names == {file.name for file in migrations()} | {"bootstrap.cql"}


def test_every_statement_can_be_repeated() -> None:
    for file in migrations():
        assert all("IF NOT EXISTS" in statement for statement in file.statements)


def test_an_absent_keyspace_gets_the_whole_schema(settings: Settings, session: Any) -> None:
    lines: list[str] = []
    report = migrate(settings, lines.append)
    assert report.created_keyspace
    assert report.applied == tuple(file.name for file in migrations())
    assert report.version == EXPECTED_VERSION
    assert report.replication == {settings.cassandra.local_dc: 1}
    assert any("below 3" in warning for warning in report.warnings)
    assert any("0001_shadow.cql" in line for line in lines)

    session.set_keyspace(report.keyspace)
    assert current_version(session) == EXPECTED_VERSION
    assert verify(session.execute(SELECT_VERSIONS)) == EXPECTED_VERSION
    tables = session.execute(
        "SELECT table_name, gc_grace_seconds, default_time_to_live, compaction "
        "FROM system_schema.tables WHERE keyspace_name = %s",
        (report.keyspace,),
    )
    options = {name: rest for name, *rest in tables}
    assert set(options) == {"shadow", "dead_letter", "slot", "schema_version", "schema_lock"}
    assert options["shadow"][:2] == [864_000, 0]
    assert options["shadow"][2]["class"].endswith("LeveledCompactionStrategy")
    assert options["dead_letter"][:2] == [86_400, 2_592_000]
    assert options["slot"][:2] == [86_400, 0]
    assert options["dead_letter"][2]["class"].endswith("TimeWindowCompactionStrategy")


def test_the_columns_are_those_of_the_contract(settings: Settings, session: Any) -> None:
    migrate(settings, quiet)
    rows = session.execute(
        "SELECT column_name, kind, position, type FROM system_schema.columns "
        "WHERE keyspace_name = %s AND table_name = 'shadow'",
        (settings.cassandra.keyspace,),
    )
    assert {name: tuple(rest) for name, *rest in rows} == {
        "device": ("partition_key", 0, "text"),
        "shadow": ("clustering", 0, "text"),
        "section": ("clustering", 1, "text"),
        "path": ("clustering", 2, "text"),
        "value": ("regular", -1, "text"),
        "updated_at": ("static", -1, "timestamp"),
    }


def test_a_second_time_changes_nothing(settings: Settings, session: Any) -> None:
    migrate(settings, quiet)
    session.set_keyspace(settings.cassandra.keyspace)
    select = "SELECT version, applied_at, applied_by FROM schema_version"
    before = list(session.execute(select))
    report = migrate(settings, quiet)
    assert (report.created_keyspace, report.applied) == (False, ())
    assert list(session.execute(select)) == before


def test_several_at_once_apply_each_file_once(settings: Settings, session: Any) -> None:
    number = 6
    barrier = threading.Barrier(number)

    def one(_: int) -> MigrationReport:
        barrier.wait(30)
        return migrate(settings, quiet)

    with ThreadPoolExecutor(number) as pool:
        reports = list(pool.map(one, range(number)))
    assert sorted(name for report in reports for name in report.applied) == [
        file.name for file in migrations()
    ]
    assert [report.replication for report in reports] == [{settings.cassandra.local_dc: 1}] * number
    assert not any("stays so" in text for report in reports for text in report.warnings)
    session.set_keyspace(settings.cassandra.keyspace)
    assert current_version(session) == EXPECTED_VERSION
    assert list(session.execute("SELECT owner FROM schema_lock")) == []


def test_a_crash_between_statement_and_record_is_repeated(settings: Settings, session: Any) -> None:
    migrate(settings, quiet)
    session.set_keyspace(settings.cassandra.keyspace)
    last = migrations()[-1]
    session.execute(
        "DELETE FROM schema_version WHERE service = 'shadowsvc' AND version = %s", (last.version,)
    )
    assert current_version(session) == last.version - 1
    with pytest.raises(SchemaBehind, match="shadowsvc migrate"):
        verify(session.execute(SELECT_VERSIONS))
    assert migrate(settings, quiet).applied == (last.name,)


def test_an_existing_keyspace_keeps_its_replication(settings: Settings, session: Any) -> None:
    session.execute(
        f"CREATE KEYSPACE {settings.cassandra.keyspace} WITH replication = "
        "{'class': 'SimpleStrategy', 'replication_factor': 1}",
        timeout=60,
    )
    report = migrate(changed(settings, replication="2"), quiet)
    assert not report.created_keyspace
    assert report.version == EXPECTED_VERSION
    assert any(
        "SHADOWSVC_CASSANDRA__REPLICATION=2" in warning and "stays so" in warning
        for warning in report.warnings
    )
    kept = session.execute(
        "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = %s",
        (settings.cassandra.keyspace,),
    ).one()[0]
    assert kept["class"].endswith("SimpleStrategy")


@pytest.mark.parametrize("form", ["{number}", "{dc}:{number}"])
def test_replication_is_as_asked_for(settings: Settings, cassandra: Any, form: str) -> None:
    asked = form.format(dc=cassandra.dc, number=1)
    report = migrate(changed(settings, replication=asked), quiet)
    assert report.replication == {cassandra.dc: 1}
    assert report.warnings == ()
    assert migrate(changed(settings, replication=asked), quiet).warnings == ()


def test_replication_in_a_data_centre_that_is_not_there_is_refused_by_name(
    settings: Settings, cassandra: Any
) -> None:
    with pytest.raises(StoreUnavailable, match="SHADOWSVC_CASSANDRA__REPLICATION") as caught:
        migrate(changed(settings, replication=f"{cassandra.dc}:1,elsewhere:3"), quiet)
    assert "'elsewhere'" in str(caught.value)
    assert repr(cassandra.dc) in str(caught.value)


def test_another_file_under_an_applied_number_is_a_conflict(
    settings: Settings, session: Any
) -> None:
    migrate(settings, quiet)
    session.set_keyspace(settings.cassandra.keyspace)
    session.execute(
        "UPDATE schema_version SET checksum = 'x' WHERE service = 'shadowsvc' AND version = 1"
    )
    for act in (
        lambda: migrate(settings, quiet),
        lambda: current_version(session),
        lambda: verify(session.execute(SELECT_VERSIONS)),
    ):
        with pytest.raises(SchemaConflict, match=r"0001_shadow\.cql"):
            act()


def test_a_gap_is_a_conflict() -> None:
    last = migrations()[-1]
    with pytest.raises(SchemaConflict, match="1 was not"):
        verify([(last.version, last.name, last.checksum)])


def test_a_gap_is_mended_as_its_message_says(settings: Settings, session: Any) -> None:
    migrate(settings, quiet)
    session.set_keyspace(settings.cassandra.keyspace)
    session.execute("DELETE FROM schema_version WHERE service = 'shadowsvc' AND version = 1")
    session.execute("INSERT INTO slot (share_group, broker, number) VALUES ('g', 'b', 7)")
    with pytest.raises(SchemaConflict, match="empty it and run `shadowsvc migrate`"):
        migrate(settings, quiet)
    session.execute("TRUNCATE schema_version", timeout=60)
    assert migrate(settings, quiet).version == EXPECTED_VERSION
    assert verify(session.execute(SELECT_VERSIONS)) == EXPECTED_VERSION
    assert list(session.execute("SELECT number FROM slot")) == [(7,)]


def test_a_newer_schema_is_left_alone(settings: Settings, session: Any) -> None:
    migrate(settings, quiet)
    session.set_keyspace(settings.cassandra.keyspace)
    newer = EXPECTED_VERSION + 1
    session.execute(
        "INSERT INTO schema_version (service, version, name, checksum) "
        "VALUES ('shadowsvc', %s, 'later.cql', 'y')",
        (newer,),
    )
    assert migrate(settings, quiet).version == newer
    assert verify(session.execute(SELECT_VERSIONS)) == newer


def test_the_version_before_the_first_migration_is_zero(settings: Settings, session: Any) -> None:
    migrate(settings, quiet)
    session.set_keyspace(settings.cassandra.keyspace)
    session.execute("DROP TABLE schema_version", timeout=60)
    assert current_version(session) == 0


def test_a_statement_that_is_refused_is_told_and_not_recorded(
    settings: Settings, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Migration(EXPECTED_VERSION + 1, "0003_bad.cql", ("CREATE TABLE shadow (nothing)",), "z")
    files = (*migrations(), bad)
    monkeypatch.setattr("shadowsvc.store.migrate.migrations", lambda: files)
    monkeypatch.setattr("shadowsvc.store.migrate.EXPECTED_VERSION", bad.version)
    with pytest.raises(StoreRefused):
        migrate(settings, quiet)
    session.set_keyspace(settings.cassandra.keyspace)
    assert current_version(session) == EXPECTED_VERSION
    assert list(session.execute("SELECT owner FROM schema_lock")) == []


class TestLock:
    """The lock by itself."""

    @pytest.fixture
    def locked(
        self, settings: Settings, session: Any, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Settings, Any]:
        migrate(settings, quiet)
        session.set_keyspace(settings.cassandra.keyspace)
        monkeypatch.setattr(schema_lock, "_POLL_SECONDS", 0.05)
        return settings, session

    def test_who_waits_in_vain_is_told_for_whom(self, locked: tuple[Settings, Any]) -> None:
        settings, session = locked
        lines: list[str] = []
        other = schema_lock.SchemaLock(session, settings.cassandra, lines.append)
        with (
            schema_lock.SchemaLock(session, settings.cassandra, quiet).held(5),
            pytest.raises(StoreUnavailable, match="still changes the schema") as caught,
            other.held(0.3),
        ):
            pytest.fail("two hold the lock")
        assert schema_lock.holder() in str(caught.value)
        assert schema_lock.holder() in lines[0]

    def test_migrate_waits_for_the_lock(self, locked: tuple[Settings, Any]) -> None:
        settings, session = locked
        session.execute("TRUNCATE schema_version", timeout=60)
        with (
            schema_lock.SchemaLock(session, settings.cassandra, quiet).held(5),
            pytest.raises(StoreUnavailable, match="still changes the schema"),
        ):
            migrate(settings, quiet, lock_wait_seconds=0.3)
        assert migrate(settings, quiet, lock_wait_seconds=30).version == EXPECTED_VERSION

    def test_a_lock_whose_owner_died_is_free_after_its_time(
        self, locked: tuple[Settings, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings, session = locked
        monkeypatch.setattr(schema_lock, "_TTL_SECONDS", 1)
        dead = schema_lock.SchemaLock(session, settings.cassandra, quiet)
        dead._take(5)  # and never renewed or freed
        with schema_lock.SchemaLock(session, settings.cassandra, quiet).held(30):
            assert not dead._renew_once()

    def test_an_owner_stops_when_it_could_not_renew_in_time(
        self, locked: tuple[Settings, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings, session = locked
        monkeypatch.setattr(schema_lock, "_TRUSTED_SHARE", 0)
        lock = schema_lock.SchemaLock(session, settings.cassandra, quiet)
        with (
            lock.held(5),
            pytest.raises(StoreUnavailable, match="lost the lock"),
        ):
            lock.check()

    def test_a_living_owner_keeps_it_beyond_its_time(
        self, locked: tuple[Settings, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings, session = locked
        monkeypatch.setattr(schema_lock, "_TTL_SECONDS", 2)
        monkeypatch.setattr(schema_lock, "_RENEWAL_SECONDS", 0.3)
        lock = schema_lock.SchemaLock(session, settings.cassandra, quiet)
        with lock.held(5):
            time.sleep(3)
            lock.check()
            assert session.execute("SELECT owner FROM schema_lock").one()[0] == lock._owner
        assert list(session.execute("SELECT owner FROM schema_lock")) == []

    def test_a_transaction_with_an_unknown_outcome_that_was_applied_counts(
        self, locked: tuple[Settings, Any]
    ) -> None:
        settings, session = locked
        lock = schema_lock.SchemaLock(session, settings.cassandra, quiet)
        lock._take_once()  # its answer was lost
        with lock.held(5):
            lock.check()


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"port": 1}, "unreachable", ("CONTACT_POINTS", "CASSANDRA__PORT", "refused")),
        ({"contact_points": ("no-such-host.invalid",)}, "unreachable", ("CONTACT_POINTS",)),
        ({"local_dc": "mars"}, "local_dc", ("'mars'", "CASSANDRA__LOCAL_DC")),
        ({"tls": True}, "tls", ("CASSANDRA__TLS", "CASSANDRA__CA_FILE")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_way_in_that_is_wrong_names_its_setting(
    settings: Settings,
    capfd: pytest.CaptureFixture[str],
    wrong: dict[str, Any],
    kind: str,
    words: tuple[str, ...],
) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        migrate(changed(settings, **wrong), quiet)
    assert caught.value.kind == kind
    assert all(word in str(caught.value) for word in words)
    if kind == "local_dc":
        assert repr(settings.cassandra.local_dc) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_without_a_data_centre_the_contact_points_is_taken_and_told(
    settings: Settings, cassandra: Any
) -> None:
    report = migrate(changed(settings, local_dc=""), quiet)
    assert report.replication == {cassandra.dc: 1}
    assert any("SHADOWSVC_CASSANDRA__LOCAL_DC" in warning for warning in report.warnings)
