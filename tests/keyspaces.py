"""Keyspaces with the service's schema in a Cassandra of the tests, and their rows by hand.

Rules: who makes a keyspace drops it, or the whole Cassandra ends with it. Must not come in:
fixtures, and what rows there must be (`tests.oracle`).
"""

from __future__ import annotations

import json
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import backing
    from shadowsvc.config import Settings

__all__ = ["cells", "dropped", "make_schema", "migrated_keyspace", "put", "settings_of"]

_DROP_SECONDS = 60.0
_SET = (
    "UPDATE shadow USING TIMESTAMP %s SET value = %s, updated_at = %s "
    "WHERE device = %s AND shadow = %s AND section = %s AND path = %s"
)


def settings_of(database: backing.Database, keyspace: str, **cassandra: object) -> Settings:
    """Return settings of this keyspace, and further ones of the section `cassandra`."""
    # Imported here: collecting tests does not need it.
    from shadowsvc.config import Settings

    known = {
        "contact_points": database.contact_points,
        "port": database.port,
        "local_dc": database.dc,
        "keyspace": keyspace,
    }
    return Settings.model_validate({"cassandra": known | cassandra})


def make_schema(
    database: backing.Database, keyspace: str, *, replicas: int = 1, **cassandra: object
) -> None:
    """Make a keyspace, if it is absent, and all tables of this release.

    Args:
        database: where.
        keyspace: its name.
        replicas: how often there is each row.
        cassandra: further settings of that section, for example `request_timeout_seconds=30`.
    """
    # Imported here: collecting tests does not need it.
    from shadowsvc.store.migrate import migrate

    settings = settings_of(database, keyspace, replication=str(replicas), **cassandra)
    migrate(settings, lambda _: None)


@contextmanager
def dropped(database: backing.Database, keyspace: str) -> Iterator[str]:
    """Give the name, and drop the keyspace when the context is left, if somebody made it."""
    yield keyspace
    with database.session() as session:
        session.execute(f"DROP KEYSPACE IF EXISTS {keyspace}", timeout=_DROP_SECONDS)


@contextmanager
def migrated_keyspace(database: backing.Database) -> Iterator[str]:
    """Give a keyspace with the schema that nobody else has; it is dropped afterwards."""
    with dropped(database, f"k{uuid.uuid4().hex[:12]}") as keyspace:
        make_schema(database, keyspace)
        yield keyspace


def put(
    session: Any,
    device: str,
    path: str,
    value: object,
    time_us: int,
    *,
    shadow: str = "",
    section: str = "reported",
) -> None:
    """Write a leaf as the service does; the session is in the keyspace."""
    session.execute(
        _SET, (time_us, json.dumps(value), time_us // 1000, device, shadow, section, path)
    )


def cells(session: Any, keyspace: str, device: str) -> list[tuple[Any, ...]]:
    """Return all that Cassandra holds of a device, with its write times."""
    return [
        tuple(row)
        for row in session.execute(
            "SELECT shadow, section, path, value, WRITETIME(value), WRITETIME(updated_at) "  # noqa: S608
            f"FROM {keyspace}.shadow WHERE device = %s",
            (device,),
        )
    ]
