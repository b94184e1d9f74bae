"""TLS and logins on both sides: what is trusted is used, what is not is refused and named."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest

import backing
from backing import ListenerTls, Mosquitto
from tests.oracle import Oracle
from tests.service import ServiceProcess, variables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(180)


class Certificates(NamedTuple):
    """PEM files of one authority."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def pair(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def issue(self, name: str, alternative_names: str) -> None:
        certificate, key = self.pair(name)
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text(
            f"subjectAltName={alternative_names}\n"
            "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
        )
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request,
                "-subj", f"/CN={name}")  # fmt: skip
        openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self.folder / "ca.key",
                "-CAcreateserial", "-days", "2", "-out", certificate,
                "-extfile", extensions)  # fmt: skip
        key.chmod(0o644)  # mosquitto drops to its own user


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.fail("openssl is missing: apt-get install openssl")
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    made.folder.chmod(0o755)
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test-ca",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
            "-keyout", made.folder / "ca.key", "-out", made.ca)  # fmt: skip
    made.issue("broker", "IP:127.0.0.1,DNS:localhost")
    made.issue("service", "DNS:service")
    made.issue("elsewhere", "DNS:elsewhere.example")
    return made


@pytest.fixture(scope="module")
def tls_broker(certificates: Certificates) -> Iterator[Mosquitto]:
    certificate, key = certificates.pair("broker")
    tls = ListenerTls(certificate, key, ca=certificates.ca, require_client_certificate=True)
    with Mosquitto(tls=tls) as broker:
        yield broker


def test_an_update_goes_over_mqtts_with_a_client_certificate(
    tls_broker: Mosquitto,
    cassandra: backing.Database,
    migrated: str,
    certificates: Certificates,
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


@pytest.mark.parametrize("server", ["other authority", "wrong host"])
def test_a_broker_that_cannot_be_trusted_is_not_joined_and_the_setting_is_named(
    server: str,
    tls_broker: Mosquitto,
    cassandra: backing.Database,
    migrated: str,
    certificates: Certificates,
    unique: str,
    tmp_path: Path,
) -> None:
    certificate, key = certificates.pair("elsewhere")
    ca = certificates.ca
    if server == "other authority":
        ca = tmp_path / "other.pem"
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=other",
                "-addext", "keyUsage=critical,keyCertSign,cRLSign",
                "-keyout", tmp_path / "other.key", "-out", ca)  # fmt: skip
        broker = tls_broker
    else:
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
            service.wait_until(lambda: len(service.events(refused)) >= 2, "refused twice")
            event = service.events(refused)[0]
            assert "SHADOWSVC_MQTT__PASSWORD" in event["error"]
            assert event["retry_seconds"] > 0
            assert "wrong-secret" not in service.log_tail()
            assert service.terminate() == 0


def test_rows_arrive_over_tls_and_login_at_cassandra(
    broker: backing.Broker, certificates: Certificates, unique: str, tmp_path: Path
) -> None:
    certificate, key = certificates.pair("broker")
    store = tmp_path / "store.p12"
    openssl("pkcs12", "-export", "-in", certificate, "-inkey", key, "-certfile", certificates.ca,
            "-out", store, "-passout", "pass:storepass", "-name", "node")  # fmt: skip
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
            assert service.terminate() == 0
        refused = {**wanted, "SHADOWSVC_CASSANDRA__PASSWORD": "wrong-secret"}
        with ServiceProcess(refused, tmp_path / "log-refused") as service:
            service.wait_started()
            service.wait_until(
                lambda: "SHADOWSVC_CASSANDRA__PASSWORD" in service.log_tail(), "the login is named"
            )
            assert service.live()
            assert "wrong-secret" not in service.log_tail()
