"""Certificates, authorities and passwords change under load: picked up, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import signal
import ssl
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import backing
from backing import ListenerTls, Mosquitto, free_port
from tests.certificates import LOCAL, Authority
from tests.oracle import Load, Oracle
from tests.service import ServiceProcess, variables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)

NAMES = ("ca.pem", "tls.crt", "tls.key", "password")


class Secret:
    """A folder of files as Kubernetes keeps a Secret: replaced whole, by one symbolic link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._version = 0
        folder.mkdir(parents=True)

    def put(self, **contents: bytes | str) -> None:
        """Replace some of ca, certificate, key and password; the others stay as they are."""
        names = dict(zip(("ca", "certificate", "key", "password"), NAMES, strict=True))
        self._version += 1
        version = self.folder / f"..{self._version}"
        version.mkdir()
        for name in NAMES:
            with contextlib.suppress(FileNotFoundError):
                (version / name).write_bytes((self.folder / name).read_bytes())
        for key, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            (version / names[key]).write_bytes(data)
        swap = self.folder / "..swap"
        swap.symlink_to(version.name)
        swap.rename(self.folder / "..data")
        for name in NAMES:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")

    def put_pair(self, authority: Authority, name: str, **more: bytes | str) -> None:
        certificate, key = authority.pair(name)
        self.put(certificate=certificate.read_bytes(), key=key.read_bytes(), **more)

    def variables(self, section: str) -> dict[str, str]:
        return {
            f"{section}__CA_FILE": str(self.folder / "ca.pem"),
            f"{section}__CERTIFICATE_FILE": str(self.folder / "tls.crt"),
            f"{section}__KEY_FILE": str(self.folder / "tls.key"),
            f"{section}__PASSWORD_FILE": str(self.folder / "password"),
        }


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("old"), "old")
    made.issue("server", LOCAL)
    made.issue("service", "DNS:service")
    made.issue("renewed", "DNS:service")
    return made


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("new"), "new")
    made.issue("server", LOCAL)
    return made


def ready_again(service: ServiceProcess, reason: str, times: int) -> None:
    service.wait_until(
        lambda: (
            service.metrics().total("disconnects_total", reason=reason) == times
            and not service.ready_reasons()
        ),
        f"it is ready again after {reason} for the {times}. time",
    )


# ---------------------------------------------------------------- the broker


class SecureBroker:
    """mosquitto with TLS, client certificates and passwords; the load has a plain listener."""

    def __init__(self, folder: Path, old: Authority, new: Authority) -> None:
        self.certificate, self.key, self.trusted = (
            folder / name for name in ("server.pem", "server.key", "trusted.pem")
        )
        self.show(old)
        self.trusted.write_bytes(old.ca.read_bytes() + new.ca.read_bytes())
        plain = free_port()
        self.broker = Mosquitto(
            users={"service": "first-secret", "load": "load"},
            tls=ListenerTls(self.certificate, self.key, self.trusted, True),
            persistent=True,
            extra_config=[f"listener {plain} 127.0.0.1"],
        )
        self.for_load: Any = SimpleNamespace(
            url=f"mqtt://load:load@127.0.0.1:{plain}", host="127.0.0.1", port=plain
        )

    def show(self, authority: Authority) -> None:
        certificate, key = authority.pair("server")
        self.certificate.write_bytes(certificate.read_bytes())
        self.key.write_bytes(key.read_bytes())

    def set_password(self, password: str) -> None:
        subprocess.run(
            ["mosquitto_passwd", "-b", self.broker.folder / "passwords", "service", password],
            check=True, capture_output=True, timeout=20,
        )  # fmt: skip

    def reload(self) -> None:
        self.broker._process.signal(signal.SIGHUP)


@pytest.fixture
def secure(tmp_path: Path, old: Authority, new: Authority) -> Iterator[SecureBroker]:
    folder = tmp_path / "broker"
    folder.mkdir()
    made = SecureBroker(folder, old, new)
    with made.broker:
        yield made


def test_certificate_authority_and_password_of_the_broker_change_under_load(
    secure: SecureBroker,
    cassandra: backing.Database,
    migrated: str,
    cql: Any,
    old: Authority,
    new: Authority,
    unique: str,
    tmp_path: Path,
) -> None:
    secret = Secret(tmp_path / "secret")
    secret.put_pair(old, "service", ca=old.ca.read_bytes(), password="first-secret\n")
    settings = variables(
        secure.broker, cassandra, migrated, unique,
        MQTT__URL=f"mqtts://127.0.0.1:{secure.broker.port}",
        MQTT__USERNAME="service",
        LIMITS__LOGIN_RETRY_MIN_SECONDS=120,
        **secret.variables("MQTT"),
    )  # fmt: skip
    with (
        ServiceProcess(settings, tmp_path / "log") as service,
        Oracle(secure.for_load, cql, migrated, unique) as oracle,
    ):
        service.wait_ready()
        started = service.metrics()
        assert started.total("certificate_expiry_timestamp_seconds", file="broker_client") > 0
        assert started.total("certificate_expiry_timestamp_seconds", file="broker_ca") > 0
        with Load(oracle, unique):
            # Our own certificate.
            secret.put_pair(old, "renewed")
            ready_again(service, "credentials", 1)

            # The authority: both are trusted while the broker changes, then the new one alone.
            secret.put(ca=old.ca.read_bytes() + new.ca.read_bytes())
            ready_again(service, "credentials", 2)
            secure.show(new)
            secure.reload()
            secret.put(ca=new.ca.read_bytes())
            ready_again(service, "credentials", 3)
            assert service.events("broker not reachable") == []

            # The password, at the broker first: it throws us out, and our wait is a long one.
            secure.set_password("second-secret")
            secure.reload()
            service.wait_until(
                lambda: bool(service.events("broker not reachable")), "the login is refused"
            )
            (refused,) = service.events("broker not reachable")
            assert refused["reason"].startswith("connack_")
            assert refused["retry_seconds"] >= 120
            assert service.ready_reasons() == {"not_subscribed"}
            secret.put(password="second-secret\n")
            service.wait_ready()  # and it did not wait

            # The password, here first: the former one does until the broker has learned it.
            secret.put(password="third-secret\n")
            ready_again(service, "credentials", 4)
            assert len(service.events("broker not reachable")) == 2
            secure.set_password("third-secret")
            secure.reload()
            service.wait_until(
                lambda: (
                    len(service.events("broker not reachable")) == 3 and not service.ready_reasons()
                ),
                "the former one is refused and the new one taken",
            )
        oracle.wait_taken()
        oracle.wait_right()
        assert service.metrics().total("credentials_changed_total", of="broker") == 5
        assert service.metrics().total("sessions_total", state="new") == 1
        assert service.terminate() == 0
        assert "-secret" not in service.log_path.read_text()


def test_files_that_do_not_fit_are_reported_and_the_connection_stays(
    secure: SecureBroker,
    cassandra: backing.Database,
    migrated: str,
    old: Authority,
    unique: str,
    tmp_path: Path,
) -> None:
    secret = Secret(tmp_path / "secret")
    secret.put_pair(old, "service", ca=old.ca.read_bytes(), password="first-secret")
    settings = variables(
        secure.broker, cassandra, migrated, unique,
        MQTT__URL=f"mqtts://127.0.0.1:{secure.broker.port}",
        MQTT__USERNAME="service",
        **secret.variables("MQTT"),
    )  # fmt: skip
    with ServiceProcess(settings, tmp_path / "log") as service:
        service.wait_ready()
        before = service.metrics()
        secret.put(key=old.pair("renewed")[1].read_bytes())  # of another certificate
        service.wait_until(
            lambda: service.metrics().total("credentials_faulty", of="broker") == 1, "it is noticed"
        )
        unusable = "changed credentials can't be used; the old ones stay"
        service.wait_until(lambda: bool(service.events(unusable)), "it is logged")
        (event,) = service.events(unusable)
        assert "SHADOWSVC_MQTT__KEY_FILE" in event["error"]
        assert service.ready_reasons() == set()
        # Without a connection /readyz says so too; the old pair is good for another one.
        secure.broker.stop()
        service.wait_reasons({"not_subscribed"})
        (reason,) = json.loads(service.get("/readyz").body)["reasons"]
        assert "SHADOWSVC_MQTT__KEY_FILE" in reason["detail"]
        secure.broker.start()
        service.wait_ready()
        secret.put_pair(old, "renewed")
        service.wait_until(
            lambda: service.metrics().total("credentials_faulty", of="broker") == 0, "it is mended"
        )
        assert service.metrics().since(before, "credentials_unusable_total", of="broker") == 1
        assert service.terminate() == 0


# ---------------------------------------------------------------- Cassandra


def cassandra_settings(authority: Authority, trusted: Authority) -> dict[str, object]:
    return {
        "client_encryption_options": {
            "enabled": True,
            "keystore": str(authority.keystore("server", "storepass")),
            "keystore_password": "storepass",
            "require_client_auth": True,
            "truststore": str(trusted.truststore("storepass")),
            "truststore_password": "storepass",
            "store_type": "PKCS12",
        },
        "authenticator": "PasswordAuthenticator",
        "authorizer": "CassandraAuthorizer",
        "credentials_validity": "100ms",
        "commitlog_sync": "batch",
    }


@pytest.mark.slow
def test_certificate_password_and_authority_of_cassandra_change_under_load(
    broker: backing.Broker, old: Authority, new: Authority, unique: str, tmp_path: Path
) -> None:
    context = ssl.create_default_context(cafile=old.ca)
    context.load_verify_locations(new.ca)
    context.load_cert_chain(*old.pair("service"))
    secret = Secret(tmp_path / "secret")
    secret.put_pair(old, "service", ca=old.ca.read_bytes(), password="first-secret\n")
    with backing.Cassandra(
        settings=cassandra_settings(old, old), heap="512M", user=("cassandra", "cassandra"),
        ssl_context=context,
    ) as database:  # fmt: skip
        settings = variables(
            broker, database, "rotation", unique,
            CASSANDRA__TLS="true",
            CASSANDRA__USERNAME="service",
            CASSANDRA__MIGRATE_ON_START="true",
            LIMITS__LOGIN_RETRY_MIN_SECONDS=1,
            LIMITS__LOGIN_RETRY_MAX_SECONDS=2,
            **secret.variables("CASSANDRA"),
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(database.session())
            role = (
                "ROLE service WITH PASSWORD = 'first-secret' AND LOGIN = true AND SUPERUSER = true"
            )
            session.execute(f"CREATE {role}")
            service = stack.enter_context(ServiceProcess(settings, tmp_path / "log"))
            service.wait_ready(90)
            oracle = stack.enter_context(Oracle(broker, session, "rotation", unique))
            load = Load(oracle, unique, burst=5)
            with load:

                def renewed(result: str, times: int) -> None:
                    durable = service.metrics().total("updates_durable_total")
                    service.wait_until(
                        lambda: (
                            service.metrics().total("store_renewals_total", result=result) >= times
                            and service.metrics().total("updates_durable_total") > durable
                        ),
                        f"sessions {result}: {times}, and writes go on",
                        60,
                    )

                secret.put_pair(old, "renewed")
                renewed("changed", 1)
                session.execute("ALTER ROLE service WITH PASSWORD = 'second-secret'")
                secret.put(password="second-secret\n")
                renewed("changed", 2)
                assert service.events("writes fail and are retried") == []

                # A password that Cassandra does not know: the old session goes on.
                secret.put(password="wrong-secret\n")
                renewed("failed", 1)
                (event,) = {
                    event["kind"]: event
                    for event in service.events("no new session with Cassandra; the old one stays")
                }.values()
                assert event["kind"] == "server_bad_credentials"
                assert service.ready_reasons() == set()
                secret.put(password="second-secret\n")
                renewed("changed", 3)

                # Another authority: here first, where nothing changes for the old session.
                failed = service.metrics().total("store_renewals_total", result="failed")
                secret.put(ca=new.ca.read_bytes())
                renewed("failed", int(failed) + 1)
                database.stop()
                database._settings = cassandra_settings(new, old)
                database.start()
                service.wait_until(
                    lambda: service.metrics().total("store_renewals_total", result="retried") >= 1,
                    "a session trusts the new authority",
                    60,
                )
                service.wait_ready()
            oracle.wait_taken(60)
            oracle.session = stack.enter_context(database.session())
            oracle.wait_right()
            figures = service.metrics()
            assert figures.total("certificate_expiry_timestamp_seconds", file="cassandra_ca") > 0
            assert (
                figures.total("certificate_expiry_timestamp_seconds", file="cassandra_client") > 0
            )
            assert service.terminate() == 0
            assert "-secret" not in service.log_path.read_text()


@pytest.mark.slow
def test_a_session_that_was_locked_out_for_a_while_comes_back_by_itself(
    broker: backing.Broker, unique: str, tmp_path: Path
) -> None:
    """acsylla closes its pools for good after one refused login; a new session is made then."""
    database = backing.Cassandra(
        settings={
            "authenticator": "PasswordAuthenticator",
            "credentials_validity": "100ms",
            "commitlog_sync": "batch",
        },
        heap="512M",
        user=("cassandra", "cassandra"),
    )
    with database, contextlib.ExitStack() as stack:
        with database.session() as session:
            session.execute(
                "CREATE ROLE service WITH PASSWORD = 'right' AND LOGIN = true AND SUPERUSER = true"
            )
        settings = variables(
            broker, database, "lockout", unique,
            CASSANDRA__USERNAME="service",
            CASSANDRA__PASSWORD="right",
            CASSANDRA__MIGRATE_ON_START="true",
            LIMITS__LOGIN_RETRY_MIN_SECONDS=1,
            LIMITS__LOGIN_RETRY_MAX_SECONDS=2,
        )  # fmt: skip
        service = stack.enter_context(ServiceProcess(settings, tmp_path / "log"))
        service.wait_ready(90)
        with database.session() as session:
            session.execute("ALTER ROLE service WITH PASSWORD = 'other'")
        database.restart()
        service.wait_until(
            lambda: service.metrics().total("store_renewals_total", result="failed") >= 1,
            "a new session was tried, and refused",
            60,
        )
        # The first attempts may meet a node that is still starting.
        service.wait_until(
            lambda: "BadCredentials" in service.get("/readyz").body, "it names the refusal", 60
        )
        service.wait_reasons({"cassandra_unavailable"})
        with database.session() as session:
            session.execute("ALTER ROLE service WITH PASSWORD = 'right'")
        service.wait_ready()
        assert service.metrics().total("store_renewals_total", result="retried") == 1
        with (
            database.session() as session,
            Oracle(broker, session, "lockout", unique) as oracle,
        ):
            oracle.update("lamp", {"reported": {"on": True}})
            oracle.wait_taken()
            oracle.wait_right()
        assert service.terminate() == 0
