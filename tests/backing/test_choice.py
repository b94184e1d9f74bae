"""The environment decides where broker and Cassandra come from, and mistakes name the variable."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import backing
from backing import BackingError, Kind, choice

VARIABLES = (
    "SHADOWSVC_BACKING",
    "SHADOWSVC_BACKING_MQTT_URL",
    "SHADOWSVC_BACKING_CASSANDRA",
    "DOCKER_HOST",
)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choice, "_DOCKER_SOCKET", tmp_path / "docker.sock")


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOWSVC_BACKING_MQTT_URL", "mqtt://user:secret@broker.example")
    monkeypatch.setenv("SHADOWSVC_BACKING_CASSANDRA", "10.0.0.1:9999, 10.0.0.2:9999")


@pytest.fixture
def dead_socket(tmp_path: Path) -> Iterator[Path]:
    """A socket file that nobody listens at."""
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        yield path


def test_without_an_engine_local_processes_are_taken_and_the_reason_is_said() -> None:
    assert backing.choose() is Kind.PROCESSES
    assert "local processes" in backing.describe()
    assert "no container engine answers" in backing.describe()


def test_an_engine_that_does_not_answer_is_none(
    monkeypatch: pytest.MonkeyPatch, dead_socket: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{dead_socket}")
    assert backing.choose() is Kind.PROCESSES
    monkeypatch.setenv("SHADOWSVC_BACKING", "containers")
    with pytest.raises(BackingError, match="SHADOWSVC_BACKING=containers, but no engine answers"):
        backing.choose()


@pytest.mark.usefixtures("addresses")
def test_addresses_are_taken_when_both_are_given() -> None:
    assert backing.choose() is Kind.ADDRESSES
    broker = backing.broker()
    assert (broker.host, broker.port) == ("broker.example", 1883)
    assert broker.url == "mqtt://user:secret@broker.example"
    database = backing.database()
    assert database.contact_points == ("10.0.0.1", "10.0.0.2")
    assert database.port == 9999
    assert "secret" not in backing.describe()


@pytest.mark.usefixtures("addresses")
def test_a_given_server_is_never_steered() -> None:
    broker = backing.broker()
    assert not broker.steerable
    for steer in (broker.start, broker.stop, broker.kill, broker.restart, broker.pause):
        with pytest.raises(BackingError, match="SHADOWSVC_BACKING_MQTT_URL cannot be"):
            steer()


@pytest.mark.usefixtures("addresses")
def test_the_variable_overrules_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOWSVC_BACKING", "Processes")
    assert backing.choose() is Kind.PROCESSES


def test_a_value_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOWSVC_BACKING", "cloud")
    with pytest.raises(BackingError, match="SHADOWSVC_BACKING='cloud' is not one of"):
        backing.choose()


@pytest.mark.usefixtures("addresses")
@pytest.mark.parametrize("name", ["SHADOWSVC_BACKING_MQTT_URL", "SHADOWSVC_BACKING_CASSANDRA"])
def test_one_address_alone_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(BackingError, match=f"{name} is not set"):
        backing.choose()


@pytest.mark.usefixtures("addresses")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHADOWSVC_BACKING_MQTT_URL", "http://broker"),
        ("SHADOWSVC_BACKING_MQTT_URL", "mqtt://broker:99999"),
        ("SHADOWSVC_BACKING_MQTT_URL", "broker:1883"),
        ("SHADOWSVC_BACKING_CASSANDRA", "node:x"),
        ("SHADOWSVC_BACKING_CASSANDRA", "node:0"),
        ("SHADOWSVC_BACKING_CASSANDRA", "one:1,two:2"),
        ("SHADOWSVC_BACKING_CASSANDRA", ","),
    ],
)
def test_a_bad_address_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BackingError, match=name):
        backing.choose()
