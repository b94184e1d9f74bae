"""A back-up and its restore, step by step as docs/operations.md has them, on two real nodes.

Lives here: one node that is written to and backed up by `nodetool snapshot`, and after its end
another one, empty, that gets the files by `nodetool import`. nodetool is the real one, from
Cassandra's own jars, through JMX on the loopback. Rules: a step that the document does not name is
not taken here; what is compared is every row with its times. Must not come in: how rows are read
and shown (`test_reader`).
"""

from __future__ import annotations

import subprocess
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from backing import Cassandra
from backing.jars import cassandra_jars, java
from backing.ports import free_port
from shadowsvc.shadow.pointer import below
from tests.group import writes
from tests.keyspaces import put
from tests.oracle import Load
from tests.service import run_command
from tests.serving import serving, settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

KEYSPACE = "shadowsvc"
TABLES = ("shadow", "dead_letter", "slot")
"""What is restored; `shadowsvc migrate` makes schema_version and schema_lock anew."""
SNAPSHOT = "daily"
DEVICES = 200
LAMP = "lamp-7"
_NODETOOL_SECONDS = 90
# What Cassandra's own script opens of the JDK for nodetool.
_JDK_OPTIONS = (
    "--add-exports=java.base/jdk.internal.ref=ALL-UNNAMED",
    "--add-exports=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-opens=java.base/jdk.internal.ref=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
)
_STATEMENT_SECONDS = 60

_DELETE = (
    "DELETE FROM shadow USING TIMESTAMP %s WHERE device = %s AND shadow = %s AND section = %s AND "
)
_SELECT = {
    "shadow": (
        "SELECT device, shadow, section, path, value, WRITETIME(value), "
        "updated_at, WRITETIME(updated_at) FROM shadow"
    ),
    "dead_letter": (
        "SELECT bucket, shard, received_at, id, client_id, device, topic, reason, detail, payload, "
        "payload_bytes, payload_sha256, qos, retain, duplicate, user_properties, device_time, "
        "WRITETIME(reason) FROM dead_letter"
    ),
    "slot": "SELECT share_group, broker, number, created_at, owner, lease FROM slot",
}

Rows = dict[str, list[tuple[Any, ...]]]


class Node(NamedTuple):
    """A Cassandra that nodetool reaches."""

    cassandra: Cassandra
    jmx_port: int

    def nodetool(self, *arguments: str) -> str:
        """Run nodetool and return what it printed; it has to end with 0."""
        folder = self.cassandra.folder
        class_path = ":".join([str(folder / "conf"), *map(str, cassandra_jars())])
        command = [java()[0], "-Xmx128M", "-XX:-UsePerfData", "-XX:+UseSerialGC", *_JDK_OPTIONS]
        command += [f"-Duser.home={folder}"]  # its history goes there
        command += [f"-Dcassandra.storagedir={folder}", f"-Dcassandra.logdir={folder}"]
        command += ["-cp", class_path, "org.apache.cassandra.tools.NodeTool"]
        command += ["-h", "127.0.0.1", "-p", str(self.jmx_port), *arguments]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_NODETOOL_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"nodetool {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def shadowsvc(self, *arguments: str) -> str:
        """Run a command of the service and return what it printed; it has to end with 0."""
        settings = {
            "SHADOWSVC_CASSANDRA__CONTACT_POINTS": ",".join(self.cassandra.contact_points),
            "SHADOWSVC_CASSANDRA__PORT": str(self.cassandra.port),
            "SHADOWSVC_CASSANDRA__LOCAL_DC": self.cassandra.dc,
            "SHADOWSVC_CASSANDRA__KEYSPACE": KEYSPACE,
        }
        done = run_command(settings, *arguments, limit_seconds=120)
        assert done.returncode == 0, f"shadowsvc {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def table_folder(self, table: str) -> Path:
        """Return the folder of a table's files."""
        (found,) = (self.cassandra.folder / "data" / KEYSPACE).glob(f"{table}-*")
        return found


class BackUp(NamedTuple):
    """What was backed up, and what there was then and later."""

    folder: Path
    """One folder for each table."""
    first_us: int
    """Time of the first update; what came after the snapshot is two minutes later."""
    then: Rows
    later: Rows
    lamp: str
    """What `shadowsvc get` printed at the time of the snapshot."""


def make_node() -> Node:
    """Return a node in a folder of its own, which is gone at its end; it is not started."""
    port = free_port()
    options = (f"-Dcassandra.jmx.local.port={port}",)
    return Node(Cassandra(heap="512M", jvm_options=options), port)


def rows_of(session: Any) -> Rows:
    """Return every row of the tables, in an order that is the same everywhere."""
    return {
        table: sorted((tuple(row) for row in session.execute(_SELECT[table])), key=repr)
        for table in TABLES
    }


def write_first(session: Any, time_us: int) -> None:
    """Write shadows, a dead letter and a slot."""
    for number in range(DEVICES):
        device = f"lamp-{number}"
        put(session, device, "/light/level", number, time_us + number)
        put(session, device, "/light/colour", "grün", time_us + number)
        put(session, device, "/fw", "2.1", time_us + number, shadow="firmware")
        put(session, device, "/light/level", 80, time_us + number, section="desired")
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0, tzinfo=None)
    session.execute(
        "INSERT INTO dead_letter (bucket, shard, received_at, id, device, topic, reason, payload, "
        "payload_bytes, qos) VALUES (%s, 3, %s, %s, %s, %s, 'not_json', %s, 1, 1)",
        (hour, hour, uuid.uuid4(), LAMP, f"things/{LAMP}/shadow/update", b"{"),
    )
    session.execute(
        "INSERT INTO slot (share_group, broker, number, created_at) "
        "VALUES ('shadowsvc', '', 0, toTimestamp(now())) IF NOT EXISTS"
    )


def write_second(session: Any, time_us: int) -> None:
    """Change and delete a part of it, so that files hold what others hide."""
    for number in range(0, DEVICES, 3):
        put(session, f"lamp-{number}", "/light/level", 0, time_us)
    one = f"{_DELETE} path = %s"
    session.execute(one, (time_us, "lamp-1", "", "reported", "/light/colour"))
    subtree = f"{_DELETE} path >= %s AND path < %s"
    session.execute(subtree, (time_us, "lamp-2", "", "reported", *below("/light")))
    for shadow, section in (("", "reported"), ("", "desired"), ("firmware", "reported")):
        session.execute(f"{_DELETE} path > ''", (time_us, "lamp-4", shadow, section))


def write_later(session: Any, time_us: int) -> None:
    """Do what devices do after the snapshot: change, delete, and come for the first time."""
    put(session, LAMP, "/light/level", 7, time_us)
    session.execute(f"{_DELETE} path = %s", (time_us, LAMP, "", "reported", "/light/colour"))
    put(session, "lamp-new", "/light/level", 1, time_us)


@pytest.fixture(scope="module")
def back_up(tmp_path_factory: pytest.TempPathFactory) -> BackUp:
    """Back up a node that goes on being written to, and ends for good afterwards."""
    folder = tmp_path_factory.mktemp("backup")
    first_us = time.time_ns() // 1000 - 600_000_000
    node = make_node()
    with node.cassandra:
        node.shadowsvc("migrate")
        with node.cassandra.session() as session:
            session.set_keyspace(KEYSPACE)
            write_first(session, first_us)
            node.nodetool("flush", KEYSPACE)
            write_second(session, first_us + 60_000_000)  # in memory only: the snapshot writes it
            then, lamp = rows_of(session), node.shadowsvc("get", LAMP, "--json")

            node.nodetool("snapshot", "-t", SNAPSHOT, KEYSPACE)
            write_later(session, first_us + 120_000_000)
            copy_snapshot(node, folder)
            later = rows_of(session)
    assert then != later
    return BackUp(folder, first_us, then, later, lamp)


@pytest.fixture(scope="module")
def new_node(back_up: BackUp) -> Iterator[Node]:
    """Another node with the schema and nothing else; it starts after the former one has ended."""
    assert back_up.then
    node = make_node()
    with node.cassandra:
        node.shadowsvc("migrate")
        yield node


def copy_snapshot(node: Node, folder: Path) -> None:
    """Copy it into a folder for each table, and remove it from the node."""
    for table in TABLES:
        files = node.table_folder(table) / "snapshots" / SNAPSHOT
        subprocess.run(["cp", "-r", files, folder / table], check=True, timeout=30)
    node.nodetool("clearsnapshot", "-t", SNAPSHOT, KEYSPACE)
    assert not any(node.table_folder("shadow").glob("snapshots/*"))


def restore(node: Node, folder: Path, *tables: str) -> None:
    """Import tables, of which the back-up keeps its files."""
    before = sorted(folder.rglob("*"))
    assert any(path.name.endswith("-Data.db") for path in before)
    for table in tables:
        node.nodetool("import", "--copy-data", KEYSPACE, table, str(folder / table))
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def empty(new_node: Node) -> Iterator[Any]:
    """A session of the new node, whose tables hold nothing."""
    with new_node.cassandra.session() as session:
        session.set_keyspace(KEYSPACE)
        for table in TABLES:
            session.execute(f"TRUNCATE {table}", timeout=_STATEMENT_SECONDS)
        assert not any(rows_of(session).values())
        yield session


def test_an_empty_node_gets_every_row_of_the_snapshot_with_its_times(
    new_node: Node, back_up: BackUp, empty: Any
) -> None:
    restore(new_node, back_up.folder, *TABLES)
    assert rows_of(empty) == back_up.then
    assert len(back_up.then["shadow"]) > 3 * DEVICES
    assert new_node.shadowsvc("get", LAMP, "--json") == back_up.lamp
    (lifetime,) = (row[0] for row in empty.execute("SELECT TTL(reason) FROM dead_letter"))
    assert 0 < lifetime <= 30 * 86_400  # it still expires


def test_devices_that_publish_again_bring_a_restored_node_up_to_date(
    new_node: Node, back_up: BackUp, empty: Any
) -> None:
    restore(new_node, back_up.folder, "shadow")
    assert rows_of(empty)["shadow"] != back_up.later["shadow"]
    write_later(empty, back_up.first_us + 120_000_000)
    assert rows_of(empty)["shadow"] == back_up.later["shadow"]


def test_a_restore_over_live_data_undoes_neither_updates_nor_deletes(
    new_node: Node, back_up: BackUp, empty: Any
) -> None:
    write_later(empty, back_up.first_us + 120_000_000)
    restore(new_node, back_up.folder, "shadow")
    assert rows_of(empty)["shadow"] == back_up.later["shadow"]
    restore(new_node, back_up.folder, "shadow")  # once more
    assert rows_of(empty)["shadow"] == back_up.later["shadow"]


def test_a_delete_that_cassandra_has_forgotten_is_undone_by_a_restore(
    new_node: Node, back_up: BackUp, empty: Any
) -> None:
    def colours() -> list[str]:
        select = "SELECT value FROM shadow WHERE device = %s AND shadow = '' AND section = %s"
        rows = empty.execute(f"{select} AND path = '/light/colour'", (LAMP, "reported"))
        return [row[0] for row in rows]

    def keep_deletes_for(seconds: int) -> None:
        alter = f"ALTER TABLE shadow WITH gc_grace_seconds = {seconds}"
        empty.execute(alter, timeout=_STATEMENT_SECONDS)

    write_later(empty, back_up.first_us + 120_000_000)
    keep_deletes_for(0)
    try:
        time.sleep(1.1)  # Cassandra counts the age of a delete in whole seconds
        new_node.nodetool("flush", KEYSPACE, "shadow")
        new_node.nodetool("compact", KEYSPACE, "shadow")
        assert colours() == []
        restore(new_node, back_up.folder, "shadow")
        assert colours() == ['"gr\\u00fcn"']
    finally:
        keep_deletes_for(864_000)


def test_a_snapshot_and_a_restore_while_the_service_writes_cost_nothing(
    new_node: Node, empty: Any, broker: backing.Broker, unique: str, tmp_path: Path
) -> None:
    folder = tmp_path / "backup"
    folder.mkdir()
    with serving(
        broker, new_node.cassandra, KEYSPACE, unique, tmp_path / "service.log", session=empty
    ) as (service, oracle):
        with Load(oracle, unique, burst=10, pause_seconds=0.1):
            service.wait_until(writes(service, 100), "it writes")
            new_node.nodetool("snapshot", "-t", SNAPSHOT, KEYSPACE)
            copy_snapshot(new_node, folder)
            service.wait_until(writes(service, 100), "it writes after the snapshot")
            restore(new_node, folder, "shadow")
            service.wait_until(writes(service, 100), "it writes after the restore")
        settle(service, oracle, 60)
