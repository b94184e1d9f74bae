"""Fixtures of the integration tests: a service of the test's own, or several, and an oracle."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.group import grouped
from tests.serving import Serve, serving

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    import backing
    from tests.group import MakeGroup
    from tests.serving import Served


@pytest.fixture
def serve(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    cql: Any,
    unique: str,
    tmp_path: Path,
) -> Serve:
    """For tests that leave Cassandra itself alone; a broker of their own may be given."""
    return _serve(broker, cassandra, migrated, unique, tmp_path, cql)


@pytest.fixture
def serve_own(
    broker: backing.Broker,
    own_cassandra: backing.Cassandra,
    own_migrated: str,
    unique: str,
    tmp_path: Path,
) -> Serve:
    """For tests that need the Cassandra with low limits, or stop and kill it."""
    return _serve(broker, own_cassandra, own_migrated, unique, tmp_path)


def _serve(
    shared: backing.Broker,
    database: backing.Database,
    keyspace: str,
    name: str,
    folder: Path,
    session: Any = None,
) -> Serve:
    def make(
        broker: backing.Broker | None = None, /, **settings: object
    ) -> AbstractContextManager[Served]:
        log = folder / "service.log"
        where = broker or shared
        return serving(where, database, keyspace, name, log, session=session, **settings)

    return make


@pytest.fixture
def make_group(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    tmp_path: Path,
) -> MakeGroup:
    """For services that lease their client ids."""
    return partial(grouped, broker, cassandra, migrated, unique, tmp_path)
