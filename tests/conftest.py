"""Fixtures shared by the tests: real services, keyspaces of their own, a service process.

One Cassandra serves the whole run (it takes ten seconds to start); every test gets a keyspace or
devices of its own. Brokers start in half a second: a test that stops or kills one has its own.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

import backing
from tests.keyspaces import dropped, make_schema, migrated_keyspace

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


# Examples take as long as the machine lets them.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what cannot be sent between processes: hostile text may hold half a surrogate pair."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def _only_our_settings() -> Iterator[None]:
    """No variable of the machine's leaks into a test's settings."""
    taken = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith("SHADOWSVC_") and not name.startswith("SHADOWSVC_BACKING")
    }
    yield
    os.environ.update(taken)


def pytest_report_header() -> list[str]:
    return [f"backing services: {backing.describe()}"]


@pytest.fixture(scope="session")
def cassandra() -> Iterator[backing.Database]:
    """The Cassandra of this run: `contact_points`, `port`, `dc`, `session()`."""
    with backing.database() as database:
        yield database


@pytest.fixture(scope="session")
def broker() -> Iterator[backing.Broker]:
    """A broker shared by tests that only publish and subscribe."""
    with backing.broker() as broker:
        yield broker


@pytest.fixture
def own_broker() -> Iterator[backing.Mosquitto]:
    """A broker that a test stops and kills; it keeps sessions in a file, saved every second."""
    with backing.Mosquitto(persistent=True) as broker:
        yield broker


@pytest.fixture
def unique() -> str:
    """A name that nothing else in this run has: for client ids, groups, devices."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def keyspace(cassandra: backing.Database) -> Iterator[str]:
    """The name of a keyspace that does not exist yet; dropped after the test."""
    with dropped(cassandra, f"t{uuid.uuid4().hex[:12]}") as name:
        yield name


@pytest.fixture(scope="session")
def migrated(cassandra: backing.Database) -> Iterator[str]:
    """A keyspace with the schema, shared by tests that use devices of their own."""
    with migrated_keyspace(cassandra) as name:
        yield name


@pytest.fixture
def own_cassandra(own_cassandra_of_the_run: backing.Cassandra) -> backing.Cassandra:
    """A Cassandra that a test may stop, kill and freeze, if it leaves it running.

    It keeps what it confirmed over a kill, its limits are low enough to meet them, and it allows
    batches of 32 partitions. The failure of one test is not that of the next: where it was left
    dead, it is started again.
    """
    if not own_cassandra_of_the_run.running:
        own_cassandra_of_the_run.start()
    return own_cassandra_of_the_run


@pytest.fixture(scope="session")
def own_cassandra_of_the_run() -> Iterator[backing.Cassandra]:
    """What `own_cassandra` gives."""
    settings = {
        "commitlog_sync": "batch",
        "max_mutation_size": "200KiB",
        "batch_size_fail_threshold": "20KiB",
        "batch_size_warn_threshold": "16KiB",
        "unlogged_batch_across_partitions_warn_threshold": 32,
    }
    with backing.Cassandra(settings=settings) as database:
        yield database


@pytest.fixture(scope="session")
def own_migrated(own_cassandra_of_the_run: backing.Cassandra) -> str:
    """A keyspace with the schema in `own_cassandra`."""
    name = "own"
    make_schema(own_cassandra_of_the_run, name)
    return name


@pytest.fixture(scope="session")
def cql(cassandra: backing.Database) -> Iterator[Any]:
    """A session of cassandra-driver, to read back what the service wrote."""
    with cassandra.session() as session:
        yield session
