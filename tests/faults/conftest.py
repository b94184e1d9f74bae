"""Fixtures of the fault suite: a stage on the shared Cassandra, with a broker of its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.faults.stage import Stage
from tests.keyspaces import make_schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing
    from backing import Mosquitto


class MakeStage(Protocol):
    """Makes a stage; its services are not started yet."""

    def __call__(self, *, pods: int = 1, **settings: object) -> Stage: ...


@pytest.fixture
def make_stage(
    own_broker: Mosquitto,
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    tmp_path: Path,
) -> Iterator[MakeStage]:
    """For tests that leave Cassandra itself alone."""
    with ExitStack() as stack:
        yield _maker(stack, own_broker, cassandra, migrated, unique, tmp_path)


@pytest.fixture
def make_own_stage(
    own_broker: Mosquitto,
    own_cassandra: backing.Cassandra,
    own_migrated: str,
    unique: str,
    tmp_path: Path,
) -> Iterator[MakeStage]:
    """For tests that stop, kill or freeze Cassandra."""
    with ExitStack() as stack:
        yield _maker(stack, own_broker, own_cassandra, own_migrated, unique, tmp_path)


@pytest.fixture
def make_stage_with_keyspace(
    own_broker: Mosquitto,
    cassandra: backing.Database,
    keyspace: str,
    unique: str,
    tmp_path: Path,
) -> Iterator[tuple[MakeStage, str]]:
    """For tests that change the schema: with a keyspace of their own, and its name."""
    make_schema(cassandra, keyspace)
    with ExitStack() as stack:
        yield _maker(stack, own_broker, cassandra, keyspace, unique, tmp_path), keyspace


def _maker(
    stack: ExitStack,
    broker: Mosquitto,
    database: backing.Database,
    keyspace: str,
    name: str,
    folder: Path,
) -> MakeStage:
    def make(*, pods: int = 1, **settings: object) -> Stage:
        stage = Stage(broker, database, keyspace, name, folder, pods=pods, settings=settings)
        return stack.enter_context(stage)

    return make
