"""Fixtures of the fault suite: a stage on the shared Cassandra, with a broker of its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from backing import Mosquitto
from tests.conftest import _migrate
from tests.faults.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing


class MakeStage(Protocol):
    """Makes a stage; its services are not started yet."""

    def __call__(self, *, pods: int = 1, **settings: object) -> Stage: ...


@pytest.fixture
def own_broker() -> Iterator[Mosquitto]:
    """A broker that a test stops and kills; it keeps sessions in a file, saved every second."""
    with Mosquitto(persistent=True) as broker:
        yield broker


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

        def make(*, pods: int = 1, **settings: object) -> Stage:
            stage = Stage(
                own_broker, cassandra, migrated, unique, tmp_path, pods=pods, settings=settings
            )
            return stack.enter_context(stage)

        yield make


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

        def make(*, pods: int = 1, **settings: object) -> Stage:
            stage = Stage(
                own_broker,
                own_cassandra,
                own_migrated,
                unique,
                tmp_path,
                pods=pods,
                settings=settings,
            )
            return stack.enter_context(stage)

        yield make


@pytest.fixture
def make_stage_with_keyspace(
    own_broker: Mosquitto,
    cassandra: backing.Database,
    keyspace: str,
    unique: str,
    tmp_path: Path,
) -> Iterator[tuple[MakeStage, str]]:
    """For tests that change the schema: with a keyspace of their own, and its name."""
    _migrate(cassandra, keyspace)
    with ExitStack() as stack:

        def make(*, pods: int = 1, **settings: object) -> Stage:
            stage = Stage(
                own_broker, cassandra, keyspace, unique, tmp_path, pods=pods, settings=settings
            )
            return stack.enter_context(stage)

        yield make, keyspace
