"""Bring the schema up to this release: the keyspace, and numbered CQL files applied once each.

Lives here: `migrate`, and the comparison of what was applied with what this release ships. Rules:

1. Any number of processes may migrate at the same time; `schema_lock` lets one through.
2. What precedes the lock (the keyspace, the lock's own table) is created through one and the same
   node by everybody, the first by address of the local data centre. Cassandra before 5.1 can make
   two tables of one name if two nodes create it at once.
3. After every statement all nodes must agree on the schema before the next one.
4. A crash may fall between a statement and its record, so every statement must be repeatable
   (`IF NOT EXISTS`).
5. A file never changes its meaning once released. Its checksum is of its statements, without
   comments and spacing; another one is a `SchemaConflict`.

Locks are LOCAL_SERIAL: migrate from one data centre at a time. Must not come in: reading or writing
shadows.
"""

from __future__ import annotations

import functools
import hashlib
import re
import time
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from cassandra import InvalidRequest
from cassandra.cluster import NoHostAvailable

from shadowsvc.errors import SchemaBehind, SchemaConflict, StoreUnavailable
from shadowsvc.store import cql, driver
from shadowsvc.store.schema_lock import SchemaLock, holder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shadowsvc.settings import Cassandra, Settings

__all__ = [
    "EXPECTED_VERSION",
    "SELECT_VERSIONS",
    "Migration",
    "MigrationReport",
    "current_version",
    "migrate",
    "migrations",
    "verify",
]

EXPECTED_VERSION = 3
"""The version that this release needs: the number of its last file."""

SELECT_VERSIONS = "SELECT version, name, checksum FROM schema_version WHERE service = 'shadowsvc'"
"""Ask for what `verify` judges; in the keyspace of the session."""

_SERVICE = "shadowsvc"
_FILE_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.cql")
_WANTED_REPLICAS = 3
# A schema change can take well over ten seconds on a slow or busy cluster, and a client that gives
# up earlier learns nothing.
_STATEMENT_SECONDS = 180.0
_AGREEMENT_SECONDS = 120.0
_POLL_SECONDS = 0.2

_SELECT_OWN_SCHEMA = "SELECT schema_version FROM system.local"
_SELECT_OTHER_SCHEMAS = "SELECT host_id, schema_version FROM system.peers"
_INSERT_VERSION = (
    "INSERT INTO schema_version (service, version, name, checksum, applied_at, applied_by) "
    "VALUES (%s, %s, %s, %s, toTimestamp(now()), %s)"
)


class Migration(NamedTuple):
    """One numbered file."""

    version: int
    name: str
    statements: tuple[str, ...]
    checksum: str


class MigrationReport(NamedTuple):
    """What `migrate` found and did."""

    keyspace: str
    created_keyspace: bool
    applied: tuple[str, ...]
    """names of the files applied now"""
    version: int
    """the version of the keyspace now; above `EXPECTED_VERSION` if a newer release was here"""
    replication: dict[str, int]
    """replicas by data centre; empty for another strategy than NetworkTopologyStrategy"""
    warnings: tuple[str, ...]


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """Return the files of this release in order, without a gap."""
    folder = resources.files("shadowsvc.store").joinpath("schema")
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        match = _FILE_NAME.fullmatch(file.name)
        if match:
            statements = cql.statements(file.read_text("utf-8"))
            digest = hashlib.sha256(";\n".join(statements).encode()).hexdigest()
            found.append(Migration(int(match[1]), file.name, statements, digest))
    return tuple(found)


def verify(rows: Iterable[tuple[int, str, str]]) -> int:
    """Return the version of a keyspace whose `SELECT_VERSIONS` gave `rows`.

    A version above `EXPECTED_VERSION` is fine: newer releases only add to the schema. Raises
    `SchemaBehind` for one below, `SchemaConflict` when a file is missing or was another one.
    """
    version = _compare(rows, migrations())
    if version < EXPECTED_VERSION:
        raise SchemaBehind(
            f"the schema has version {version}, this release needs {EXPECTED_VERSION}: "
            "run `shadowsvc migrate`"
        )
    return version


def current_version(session: Any) -> int:
    """Return the version of the keyspace of a cassandra-driver session; 0 while it has no tables.

    Raises `SchemaConflict`, and what the driver raises.
    """
    try:
        rows = list(session.execute(SELECT_VERSIONS))
    except InvalidRequest as error:
        if driver.is_missing(error):
            return 0
        raise
    return _compare(rows, migrations())


def migrate(
    settings: Settings,
    progress: Callable[[str], None],
    *,
    lock_wait_seconds: float = 300.0,
) -> MigrationReport:
    """Create the keyspace if it is absent, and apply the files that it lacks.

    `progress` gets a line for each step; `lock_wait_seconds` bounds the wait for another process
    that migrates. Blocks: seconds as a rule, minutes on a slow cluster. Doing it again changes
    nothing. Raises `StoreError`: `StoreUnavailable` (it may be run again as it is),
    `SchemaConflict`, `StoreRefused`.
    """
    cassandra = settings.cassandra
    with driver.connected(
        cassandra,
        metadata=True,
        all_nodes=True,
        request_timeout_seconds=_STATEMENT_SECONDS,
        schema_agreement_seconds=_AGREEMENT_SECONDS,
    ) as connection:
        run = _Run(cassandra, connection, progress)
        for warning in connection.warnings:
            run.warn(warning)
        return run.run(lock_wait_seconds)


def _compare(rows: Iterable[tuple[int, str, str]], files: tuple[Migration, ...]) -> int:
    """Return the highest version applied; raise `SchemaConflict` if it is not as `files` say."""
    applied = {version: (name, checksum) for version, name, checksum in rows}
    highest = max(applied, default=0)
    for version in range(1, highest + 1):
        if version not in applied:
            raise SchemaConflict(
                f"schema version {highest} was applied but {version} was not: "
                "the table schema_version was changed by hand, or restored in part: "
                "empty it and run `shadowsvc migrate`, which may repeat every file"
            )
    for file in files:
        if file.version not in applied:
            continue
        name, checksum = applied[file.version]
        if checksum != file.checksum:
            raise SchemaConflict(
                f"{file.name} is not what was applied as version {file.version} ({name}): "
                "another build of shadowsvc owns this keyspace "
                "(look at SHADOWSVC_CASSANDRA__KEYSPACE)"
            )
    return highest


class _Run:
    """One call of `migrate`."""

    def __init__(
        self,
        settings: Cassandra,
        connection: driver.Connection,
        progress: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._session = connection.session
        self._keyspace = settings.keyspace
        self._progress = progress
        self._warnings: list[str] = []

    def warn(self, text: str) -> None:
        self._warnings.append(text)
        self._progress(f"warning: {text}")

    def run(self, lock_wait_seconds: float) -> MigrationReport:
        wanted = self._wanted_replication()
        created = self._select_replication() is None
        if created:
            self._create_keyspace(wanted)
        self._enter_keyspace()
        # Not before: another process's new keyspace is seen before its replication is.
        replication = self._replication()
        if not created:
            self._compare_replication(wanted, replication)
        with driver.errors(self._settings):
            version = current_version(self._session)
        applied: list[str] = []
        if version < EXPECTED_VERSION:
            for statement in cql.statements(_read("bootstrap.cql")):
                self._change(statement)
            lock = SchemaLock(self._session, self._settings, self._progress)
            with lock.held(lock_wait_seconds):
                applied = self._apply_missing(lock)
                version = current_version(self._session)
        self._progress(f"keyspace {self._keyspace!r} has schema version {version}")
        return MigrationReport(
            self._keyspace, created, tuple(applied), version, replication, tuple(self._warnings)
        )

    def _apply_missing(self, lock: SchemaLock) -> list[str]:
        applied = []
        with driver.errors(self._settings):
            version = current_version(self._session)
        for file in migrations()[version:]:
            self._progress(f"applying {file.name}")
            for statement in file.statements:
                lock.check()
                self._change(statement)
            lock.check()
            with driver.errors(self._settings):
                self._session.execute(
                    _INSERT_VERSION, (_SERVICE, file.version, file.name, file.checksum, holder())
                )
            applied.append(file.name)
        return applied

    def _create_keyspace(self, wanted: dict[str, int]) -> None:
        short = self._settings.replication == "auto" and wanted[self._connection.local_dc] < (
            _WANTED_REPLICAS
        )
        if short:
            nodes = wanted[self._connection.local_dc]
            self.warn(
                f"{nodes} replica{'s' if nodes > 1 else ''} for want of nodes in "
                f"{self._connection.local_dc!r}: below {_WANTED_REPLICAS} the loss of a node stops "
                "the service or loses data; when there are more, ALTER KEYSPACE and repair"
            )
        # A name comes from the operator or from the cluster; a quote in it ends no string.
        quoted = {name.replace("'", "''"): number for name, number in wanted.items()}
        options = ", ".join(f"'{name}': '{number}'" for name, number in quoted.items())
        self._progress(f"creating keyspace {self._keyspace!r} with replicas {options}")
        self._change(
            f'CREATE KEYSPACE IF NOT EXISTS "{self._keyspace}" WITH replication = '
            f"{{'class': 'NetworkTopologyStrategy', {options}}} AND durable_writes = true"
        )

    def _wanted_replication(self) -> dict[str, int]:
        """Return what the setting asks for: replicas by data centre."""
        setting = self._settings.replication
        local_dc = self._connection.local_dc
        if setting == "auto":
            nodes = len(self._connection.nodes(local_dc))
            return {local_dc: max(1, min(_WANTED_REPLICAS, nodes))}
        if setting.isdecimal():
            return {local_dc: int(setting)}
        pairs = (part.rpartition(":") for part in setting.split(","))
        wanted = {name: int(number) for name, _, number in pairs}
        known = self._connection.data_centres()
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise StoreUnavailable(
                "replication",
                f"there is no data centre {', '.join(map(repr, unknown))}; this cluster has "
                f"{', '.join(map(repr, known))}: change SHADOWSVC_CASSANDRA__REPLICATION",
            )
        return wanted

    def _compare_replication(self, wanted: dict[str, int], found: dict[str, int]) -> None:
        local_dc = self._connection.local_dc
        if self._settings.replication == "auto":
            differs = found.get(local_dc, 0) < wanted[local_dc]
        else:
            differs = found != wanted
        if differs:
            self.warn(
                f"keyspace {self._keyspace!r} exists with replicas {found or 'of another kind'} "
                f"and stays so, although SHADOWSVC_CASSANDRA__REPLICATION="
                f"{self._settings.replication} asks for {wanted}: ALTER KEYSPACE and repair"
            )

    def _replication(self) -> dict[str, int]:
        options = dict(self._select_replication() or {})
        if not options.pop("class", "").endswith("NetworkTopologyStrategy"):
            return {}
        return {name: int(number) for name, number in options.items() if number.isdecimal()}

    def _select_replication(self) -> dict[str, str] | None:
        with driver.errors(self._settings):
            row = self._session.execute(
                "SELECT replication FROM system_schema.keyspaces WHERE keyspace_name = %s",
                (self._keyspace,),
            ).one()
        return None if row is None else dict(row[0] or {})

    def _change(self, statement: str) -> None:
        """Execute a schema change through the first node, and wait until all nodes agree."""
        with driver.errors(self._settings):
            self._at_first_node(statement)
        self._await_agreement(f"after {statement.partition('(')[0].strip()!r}")

    def _at_first_node(self, statement: str) -> Any:
        for host in self._connection.nodes(self._connection.local_dc):
            if host.is_up is not False:
                try:
                    return self._session.execute(statement, host=host)
                except NoHostAvailable:  # no connection to this one: the next
                    continue
        return self._session.execute(statement)

    def _enter_keyspace(self) -> None:
        """Set the keyspace, which another process may be creating at this moment.

        A node shows a keyspace in its tables a little before it can be used.
        """
        self._await_agreement("before any change")
        deadline = time.monotonic() + _AGREEMENT_SECONDS
        while True:
            try:
                with driver.errors(self._settings):
                    self._session.set_keyspace(self._keyspace)
            except SchemaBehind:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_POLL_SECONDS)
            else:
                return

    def _await_agreement(self, when: str) -> None:
        """Wait until the nodes that are up have the schema of the first node.

        It has to be asked what it knows of the others: another node may not have heard of a change
        yet and calls it agreement. The driver waits by itself only after a request that changed
        something, not if another process was first.
        """
        deadline = time.monotonic() + _AGREEMENT_SECONDS
        while True:
            with driver.errors(self._settings):
                versions = {row[0] for row in self._at_first_node(_SELECT_OWN_SCHEMA)}
                down = {
                    host.host_id
                    for host in self._connection.cluster.metadata.all_hosts()
                    if host.is_up is False
                }
                for host_id, version in self._at_first_node(_SELECT_OTHER_SCHEMAS):
                    if version is not None and host_id not in down:
                        versions.add(version)
            if len(versions) == 1:
                return
            if time.monotonic() >= deadline:
                raise StoreUnavailable(
                    "schema_agreement",
                    "the nodes did not agree on the schema within "
                    f"{_AGREEMENT_SECONDS:.0f} s {when}: look at `nodetool describecluster`, then "
                    "run `shadowsvc migrate` again",
                )
            time.sleep(_POLL_SECONDS)


def _read(name: str) -> str:
    return resources.files("shadowsvc.store").joinpath("schema", name).read_text("utf-8")
