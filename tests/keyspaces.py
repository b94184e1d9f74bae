"""Keyspaces with the service's schema, in a Cassandra of the tests.

Rules: who makes one drops it, or the whole Cassandra ends with it. Must not come in: fixtures.
"""

from __future__ import annotations

import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import backing

__all__ = ["dropped", "make_schema", "migrated_keyspace"]

_DROP_SECONDS = 60.0


def make_schema(database: backing.Database, keyspace: str) -> None:
    """Make a keyspace, if it is absent, and all tables of this release."""
    # Imported here: collecting tests needs neither.
    from shadowsvc.config import Settings
    from shadowsvc.store.migrate import migrate

    cassandra = {
        "contact_points": database.contact_points,
        "port": database.port,
        "local_dc": database.dc,
        "keyspace": keyspace,
        "replication": "1",
    }
    migrate(Settings.model_validate({"cassandra": cassandra}), lambda _: None)


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
