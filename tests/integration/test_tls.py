"""TLS and logins on both sides: what is trusted is used, what is not is refused and named."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest

import backing
from backing import ListenerTls, Mosquitto
from shadowsvc.credentials import load
from shadowsvc.errors import StoreUnavailable
from shadowsvc.settings import Cassandra
from shadowsvc.store import driver
from shadowsvc.store.cassandra import CassandraStore
from tests.certificates import LOCAL, Authority
from tests.direct import one_node
from tests.oracle import Oracle
from tests.service import ServiceProcess, variables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# acsylla never closes the socket pairs of a cluster, and a collected socket is a warning.
_KEPT: list[Any] = []

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("certificates"), "test-ca")
    made.issue("broker", LOCAL)
    made.issue("service", "DNS:service")
    made.issue("elsewhere", "DNS:elsewhere.example")
    made.issue("expired", LOCAL, days=-1)
    made.issue("by-name", "DNS:localhost")
    made.issue("by-address", "IP:127.0.0.1")
    return made


@pytest.fixture(scope="module")
def tls_broker(certificates: Authority) -> Iterator[Mosquitto]:
    certificate, key = certificates.pair("broker")
    tls = ListenerTls(certificate, key, ca=certificates.ca, require_client_certificate=True)
    with Mosquitto(tls=tls) as broker:
        yield broker


def test_an_update_goes_over_mqtts_with_a_client_certificate(
    tls_broker: Mosquitto,
    cassandra: backing.Database,
    migrated: str,
    certificates: Authority,
    unique: str,
    tmp_path: Path,
) -> None:
    certificate, key = certificates.pair("service")
    settings = variables(
        tls_broker,
        cassandra,
        migrated,
        unique,
        MQTT__URL=f"mqtts://127.0.0.1:{tls_broker.port}",
        MQTT__CA_FILE=str(certificates.ca),
        MQTT__CERTIFICATE_FILE=str(certificate),
        MQTT__KEY_FILE=str(key),
    )
    with ServiceProcess(settings, tmp_path / "log") as service:
        service.wait_ready()
        subprocess.run(
            ["mosquitto_pub", "-V", "5", "-h", "127.0.0.1", "-p", str(tls_broker.port), "-q", "1",
             "--cafile", certificates.ca, "--cert", certificate, "--key", key,
             "-t", f"{unique}/lamp/shadow/update", "-m", '{"state":{"reported":{"on":true}}}'],
            check=True, timeout=20, capture_output=True,
        )  # fmt: skip
        service.wait_until(
            lambda: service.metrics().total("messages_acknowledged_total") == 1,
            "the update is acknowledged",
        )
        assert service.terminate() == 0
        assert service.defects() == []


@pytest.mark.parametrize("server", ["other authority", "wrong host", "expired"])
def test_a_broker_that_cannot_be_trusted_is_not_joined_and_the_setting_is_named(
    server: str,
    tls_broker: Mosquitto,
    cassandra: backing.Database,
    migrated: str,
    certificates: Authority,
    unique: str,
    tmp_path: Path,
) -> None:
    ca = certificates.ca
    if server == "other authority":
        ca = Authority(tmp_path, "other").ca
        broker = tls_broker
    else:
        certificate, key = certificates.pair("expired" if server == "expired" else "elsewhere")
        broker = Mosquitto(tls=ListenerTls(certificate, key))
        broker.start()
    try:
        settings = variables(
            broker,
            cassandra,
            migrated,
            unique,
            MQTT__URL=f"mqtts://127.0.0.1:{broker.port}",
            MQTT__CA_FILE=str(ca),
        )
        with ServiceProcess(settings, tmp_path / "log") as service:
            service.wait_started()
            service.wait_until(
                lambda: service.metrics().total("disconnects_total", reason="tls") >= 2,
                "TLS was refused and tried again",
            )
            assert service.live()
            assert service.ready_reasons() == {"not_subscribed"}
            refusals = service.events("broker not reachable")
            assert "SHADOWSVC_MQTT__CA_FILE" in refusals[0]["error"]
    finally:
        if broker is not tls_broker:
            broker.close()


def test_a_wrong_password_is_named_and_not_hammered(
    cassandra: backing.Database, migrated: str, unique: str, tmp_path: Path
) -> None:
    with Mosquitto(users={"shadowsvc": "right"}) as broker:
        settings = variables(
            broker,
            cassandra,
            migrated,
            unique,
            MQTT__USERNAME="shadowsvc",
            MQTT__PASSWORD="wrong-secret",
        )
        with ServiceProcess(settings, tmp_path / "log") as service:
            service.wait_started()
            refused = "broker not reachable"
            service.wait_until(lambda: bool(service.events(refused)), "it is refused")
            (event,) = service.events(refused)
            assert "SHADOWSVC_MQTT__PASSWORD" in event["error"]
            assert event["retry_seconds"] >= 10
            assert "wrong-secret" not in service.log_tail()
            assert service.terminate() == 0


def test_rows_arrive_over_tls_and_login_at_cassandra(
    broker: backing.Broker, certificates: Authority, unique: str, tmp_path: Path
) -> None:
    store = certificates.keystore("broker", "storepass")
    settings = {
        "client_encryption_options": {
            "enabled": True,
            "keystore": str(store),
            "keystore_password": "storepass",
            "store_type": "PKCS12",
        },
        "authenticator": "PasswordAuthenticator",
        "authorizer": "CassandraAuthorizer",
    }
    context = ssl.create_default_context(cafile=certificates.ca)
    with backing.Cassandra(
        settings=settings, heap="512M", user=("cassandra", "cassandra"), ssl_context=context
    ) as cassandra:
        wanted = variables(
            broker,
            cassandra,
            "shadowsvc",
            unique,
            CASSANDRA__TLS="true",
            CASSANDRA__CA_FILE=str(certificates.ca),
            CASSANDRA__USERNAME="cassandra",
            CASSANDRA__PASSWORD="cassandra",
            CASSANDRA__REPLICATION="1",
            CASSANDRA__MIGRATE_ON_START="true",
        )
        with (
            ServiceProcess(wanted, tmp_path / "log") as service,
            cassandra.session() as session,
            Oracle(broker, session, "shadowsvc", unique) as oracle,
        ):
            service.wait_ready(90)
            oracle.update("lamp", {"reported": {"on": True}})
            oracle.wait_taken()
            oracle.wait_right()
            service.wait_until(
                lambda: service.metrics().total("direct_connections") == 1, "logged in directly"
            )
            oracle.update("lamp", {"reported": {"on": False}})
            oracle.wait_taken()
            oracle.wait_right()
            assert service.metrics().total("batches_sent_total", way="direct") >= 1
            assert service.terminate() == 0
        refused = {**wanted, "SHADOWSVC_CASSANDRA__PASSWORD": "wrong-secret"}
        with ServiceProcess(refused, tmp_path / "log-refused") as service:
            service.wait_started()
            service.wait_until(
                lambda: "SHADOWSVC_CASSANDRA__PASSWORD" in service.log_tail(), "the login is named"
            )
            assert service.live()
            assert "wrong-secret" not in service.log_tail()


class Listener:
    """A port that speaks TLS by some certificate and keeps what clients say afterwards."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.heard = b""
        self.accepted = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="listener", daemon=True)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                plain, _ = self._socket.accept()
                self.accepted += 1
                plain.settimeout(2)
                with (
                    contextlib.suppress(OSError),
                    plain,
                    self._context.wrap_socket(plain, server_side=True) as secure,
                ):
                    self.heard += secure.recv(1000)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def cassandra_at(host: str, port: int, ca: Path) -> Cassandra:
    return Cassandra.model_validate(
        {
            "contact_points": host,
            "port": port,
            "local_dc": "dc1",
            "tls": True,
            "ca_file": ca,
            "username": "service",
            "password": "planted-secret",
            "connect_timeout_seconds": 3,
        }
    )


# Which certificate the server shows, and what is wrong with it.
SERVERS = {
    "right": "broker",
    "right for this kind of contact point": "",
    "other authority": "broker",
    "wrong host": "elsewhere",
    "right for the other kind of contact point": "",
    "expired": "expired",
}
KINDS = {"127.0.0.1": "by-address", "localhost": "by-name"}


def server_of(
    server: str, host: str, certificates: Authority, folder: Path
) -> tuple[Listener, Path]:
    """Return the server, and the authority that is trusted."""
    name = SERVERS[server]
    if not name:
        other = "other kind" in server
        (name,) = (kind for point, kind in KINDS.items() if (point != host) is other)
    ca = Authority(folder, "other").ca if server == "other authority" else certificates.ca
    return Listener(*certificates.pair(name)), ca


@pytest.mark.parametrize("host", KINDS)
@pytest.mark.parametrize("server", SERVERS)
async def test_a_cassandra_that_cannot_be_trusted_is_not_written_to(
    server: str, host: str, certificates: Authority, tmp_path: Path
) -> None:
    made, ca = server_of(server, host, certificates, tmp_path)
    with made as listener:
        store = CassandraStore(cassandra_at(host, listener.port, ca), dead_letter_ttl_seconds=60)
        with pytest.raises(StoreUnavailable) as caught:
            await store.connect()
        await store.close()
        store._cluster.destroy()
        _KEPT.append(store._cluster)
        assert listener.accepted > 0
        if server in ("right", "right for this kind of contact point"):
            assert listener.heard != b""  # as far as it goes: this is no Cassandra
        else:
            assert listener.heard == b""
            assert "ssl" in caught.value.kind
        assert "planted-secret" not in str(caught.value)


@pytest.mark.parametrize("host", KINDS)
@pytest.mark.parametrize("server", SERVERS)
def test_a_cassandra_that_cannot_be_trusted_is_not_read_from(
    server: str, host: str, certificates: Authority, tmp_path: Path
) -> None:
    made, ca = server_of(server, host, certificates, tmp_path)
    with made as listener:
        opened: Any = driver.connected(cassandra_at(host, listener.port, ca))
        with pytest.raises(StoreUnavailable) as caught, opened:
            pass
        assert listener.accepted > 0
        if server in ("right", "right for this kind of contact point"):
            assert listener.heard != b""
        else:
            assert listener.heard == b""
            assert caught.value.kind == "tls"
        assert "planted-secret" not in str(caught.value)


@pytest.mark.parametrize("host", KINDS)
@pytest.mark.parametrize("server", SERVERS)
async def test_a_cassandra_that_cannot_be_trusted_gets_no_direct_connection(
    server: str, host: str, certificates: Authority, tmp_path: Path
) -> None:
    made, ca = server_of(server, host, certificates, tmp_path)
    with made as listener:
        settings = cassandra_at(host, listener.port, ca)
        store = CassandraStore(settings, dead_letter_ttl_seconds=60)
        store.direct.use(load("cassandra", settings))
        store.follow(one_node("127.0.0.1", listener.port, host))
        async with asyncio.timeout(20):
            while listener.accepted < 2:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert store.direct.connections == 0
        await store.close()
    if server in ("right", "right for this kind of contact point"):
        assert listener.heard.startswith(b"\x04\x00\x00")  # a request, and no login before one
        assert b"planted-secret" not in listener.heard
    else:
        assert listener.heard == b""
