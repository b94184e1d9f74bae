"""The containers that tests may take in place of local processes keep the same promises."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

import backing
from backing import BackingError, Kind
from backing.containers import MosquittoContainer
from tests.member import Member, session_present
from tests.oracle import Oracle
from tests.service import ServiceProcess, run_command, variables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import docker

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("engine"),
]


@pytest.fixture(scope="module")
def database(engine: docker.DockerClient) -> Iterator[backing.Database]:
    del engine
    with backing.database(Kind.CONTAINERS) as made:
        yield made


def test_an_engine_that_answers_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "_MQTT_URL", "_CASSANDRA"):
        monkeypatch.delenv(f"SHADOWSVC_BACKING{name}", raising=False)
    assert backing.choose() is Kind.CONTAINERS
    assert "a Docker-compatible engine answers" in backing.describe()
    assert isinstance(backing.broker(), MosquittoContainer)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_persistent_broker_keeps_its_port_and_its_sessions(end: str, unique: str) -> None:
    with backing.broker(Kind.CONTAINERS, persistent=True) as broker:
        url = broker.url
        with Member(broker, unique) as member:
            assert not member.session_present
            member.subscribe("things/+")
            member.disconnect(600)
        getattr(broker, end)()
        with pytest.raises(OSError, match=r"."):
            Member(broker, unique)
        broker.start()
        assert broker.url == url
        assert session_present(broker, unique)


def test_a_broker_that_is_not_persistent_forgets(unique: str) -> None:
    with backing.broker(Kind.CONTAINERS) as broker:
        with Member(broker, unique) as member:
            member.disconnect(600)
        broker.restart()
        assert not session_present(broker, unique)


def test_a_frozen_broker_is_silent_until_it_is_thawed(unique: str) -> None:
    with backing.broker(Kind.CONTAINERS) as broker:
        broker.pause()
        with socket.create_connection((broker.host, broker.port), 5) as connection:
            connection.settimeout(1)
            connection.sendall(bytes.fromhex("100d00044d51545405020005000000"))
            with pytest.raises(TimeoutError):
                connection.recv(1)
        broker.resume()
        broker.wait_ready()
        assert not session_present(broker, unique)


def test_nothing_is_left_when_the_context_is_left(engine: docker.DockerClient) -> None:
    broker = MosquittoContainer()
    with broker:
        name = broker._wrapped().name
        assert name in {container.name for container in engine.containers.list()}
    assert name not in {container.name for container in engine.containers.list(all=True)}
    with pytest.raises(BackingError, match="does not run"):
        _ = broker.host


def test_a_container_that_ends_at_once_is_reported_with_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("backing.containers.broker_settings", lambda *_, **__: ["no such setting"])
    with (
        pytest.raises(BackingError, match=r"is exited; log:\n(?s:.*)no such setting|Unknown"),
        MosquittoContainer(),
    ):
        pass


def test_the_service_works_on_containers_and_they_may_be_killed(
    database: backing.Database, unique: str, tmp_path: Path
) -> None:
    with backing.broker(Kind.CONTAINERS, persistent=True) as broker:
        settings = variables(broker, database, unique, unique)
        migrated = run_command(settings, "migrate")
        assert migrated.returncode == 0, migrated.stderr
        with ServiceProcess(settings, tmp_path / "log") as service:
            service.wait_ready()
            with database.session() as session, Oracle(broker, session, unique, unique) as oracle:
                for number in range(50):
                    oracle.update(f"lamp-{number}", {"reported": {"number": number}})
                oracle.wait_taken()
                oracle.wait_right()
            broker.kill()
            service.wait_reasons({"not_subscribed"})
            broker.start()
            service.wait_ready()
            database.stop()
            service.wait_reasons({"cassandra_unavailable"}, 90)
            database.start()
            service.wait_ready(120)
            with database.session() as session, Oracle(broker, session, unique, unique) as oracle:
                oracle.update("lamp-after", {"reported": {"number": -1}})
                oracle.wait_taken()
                oracle.wait_right()
            assert service.metrics().total("sessions_total", state="resumed") >= 1
            assert service.terminate() == 0
