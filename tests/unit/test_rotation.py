"""What is taken into use when certificates, keys and passwords change on disk, and what is not."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog.testing
from pydantic import SecretStr

from shadowsvc.config import load
from shadowsvc.credentials import Credentials, complaints, expiries, from_contents, read_files
from shadowsvc.credentials import load as load_credentials
from shadowsvc.errors import CredentialsUnusable
from shadowsvc.metrics import Metrics
from shadowsvc.rotation import Rotation, Watched
from tests.certificates import Authority, openssl
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowsvc.config import Settings
    from shadowsvc.rotation import Side

SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("authority"))
    made.issue("service", "DNS:service")
    made.issue("renewed", "DNS:service")
    made.issue("expired", "DNS:service", days=-1)
    return made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "other")


class Files:
    """The files of a broker with TLS and a password, as a service has them."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.ca, self.certificate, self.key, self.password = (
            folder / name for name in ("ca.pem", "tls.crt", "tls.key", "password")
        )
        self.ca.write_bytes(authority.ca.read_bytes())
        self.put(authority, "service")
        self.password.write_text("first-secret\n")
        self.environ = {
            "SHADOWSVC_MQTT__URL": "mqtts://127.0.0.1",
            "SHADOWSVC_MQTT__CA_FILE": str(self.ca),
            "SHADOWSVC_MQTT__CERTIFICATE_FILE": str(self.certificate),
            "SHADOWSVC_MQTT__KEY_FILE": str(self.key),
            "SHADOWSVC_MQTT__USERNAME": "service",
            "SHADOWSVC_MQTT__PASSWORD_FILE": str(self.password),
        }

    def put(self, authority: Authority, name: str) -> None:
        certificate, key = authority.pair(name)
        self.certificate.write_bytes(certificate.read_bytes())
        self.key.write_bytes(key.read_bytes())

    def settings(self) -> Settings:
        return load(self.environ)

    def watched(self) -> Watched:
        return Watched("mqtt", self.settings().mqtt, self.environ)


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Files:
    return Files(tmp_path, authority)


def password(watched: Watched) -> str:
    assert watched.current is not None
    assert watched.current.password is not None
    return watched.current.password.get_secret_value()


# ---------------------------------------------------------------- when a change counts


def test_what_is_there_at_the_start_is_in_use(files: Files) -> None:
    watched = files.watched()
    assert watched.fault is None
    assert password(watched) == "first-secret"
    assert watched.current is not None
    assert watched.current.context is not None
    assert watched.current.context.check_hostname
    assert watched.current.context.verify_mode is ssl.CERT_REQUIRED
    assert not watched.look()


def test_a_change_counts_when_two_looks_saw_the_same(files: Files) -> None:
    watched = files.watched()
    files.password.write_text("second")
    assert not watched.look()
    files.password.write_text("second-secret")
    assert not watched.look()
    assert password(watched) == "first-secret"
    assert watched.look()
    assert password(watched) == "second-secret"
    assert not watched.look()


def test_a_new_pair_makes_a_new_context(files: Files, authority: Authority) -> None:
    watched = files.watched()
    before = watched.current
    assert before is not None
    files.put(authority, "renewed")
    watched.look()
    assert watched.look()
    assert watched.current is not None
    assert watched.current.context is not before.context
    assert watched.current.certificate == authority.pair("renewed")[0].read_text()
    assert watched.current.key == authority.pair("renewed")[1].read_text()


def test_a_folder_that_is_swapped_by_a_symbolic_link_is_seen(
    tmp_path: Path, authority: Authority
) -> None:
    """As Kubernetes does it: `tls.crt` → `..data/tls.crt`, `..data` → a folder of the moment."""
    folders = []
    for number, name in enumerate(("service", "renewed")):
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        certificate, key = authority.pair(name)
        (folder / "ca.pem").write_bytes(authority.ca.read_bytes())
        (folder / "tls.crt").write_bytes(certificate.read_bytes())
        (folder / "tls.key").write_bytes(key.read_bytes())
        (folder / "password").write_text(f"secret-{number}")
        folders.append(folder)
    (tmp_path / "..data").symlink_to(folders[0].name)
    for name in ("ca.pem", "tls.crt", "tls.key", "password"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    environ = {
        "SHADOWSVC_MQTT__URL": "mqtts://127.0.0.1",
        "SHADOWSVC_MQTT__CA_FILE": str(tmp_path / "ca.pem"),
        "SHADOWSVC_MQTT__CERTIFICATE_FILE": str(tmp_path / "tls.crt"),
        "SHADOWSVC_MQTT__KEY_FILE": str(tmp_path / "tls.key"),
        "SHADOWSVC_MQTT__USERNAME": "service",
        "SHADOWSVC_MQTT__PASSWORD_FILE": str(tmp_path / "password"),
    }
    watched = Watched("mqtt", load(environ).mqtt, environ)
    assert password(watched) == "secret-0"
    swap = tmp_path / "..tmp"
    swap.symlink_to(folders[1].name)
    swap.rename(tmp_path / "..data")
    watched.look()
    assert watched.look()
    assert password(watched) == "secret-1"
    assert watched.current is not None
    assert watched.current.certificate == authority.pair("renewed")[0].read_text()


def test_a_password_in_the_secrets_directory_is_watched_too(tmp_path: Path) -> None:
    file = tmp_path / "SHADOWSVC_CASSANDRA__PASSWORD"
    file.write_text("one")
    environ = {"SHADOWSVC_SECRETS_DIR": str(tmp_path), "SHADOWSVC_CASSANDRA__USERNAME": "service"}
    watched = Watched("cassandra", load(environ).cassandra, environ)
    assert password(watched) == "one"
    file.write_text("two")
    watched.look()
    assert watched.look()
    assert password(watched) == "two"


def test_what_the_environment_gives_is_not_replaced_by_a_file(files: Files) -> None:
    files.environ["SHADOWSVC_MQTT__PASSWORD"] = "of-the-environment"  # noqa: S105 - it is no secret
    watched = files.watched()
    files.password.write_text("of-the-file")
    watched.look()
    watched.look()
    assert password(watched) == "of-the-environment"


def test_a_broken_file_of_one_side_does_not_hold_up_the_other(tmp_path: Path, files: Files) -> None:
    cassandra = tmp_path / "cassandra-password"
    cassandra.write_text("secret")
    files.environ["SHADOWSVC_CASSANDRA__USERNAME"] = "service"
    files.environ["SHADOWSVC_CASSANDRA__PASSWORD_FILE"] = str(cassandra)
    watched = files.watched()
    cassandra.unlink()
    files.password.write_text("second-secret")
    watched.look()
    assert watched.look()
    assert (watched.fault, password(watched)) == (None, "second-secret")


# ---------------------------------------------------------------- what cannot be used


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda files: files.ca.unlink(), "CA_FILE"),
        (lambda files: files.ca.write_bytes(b""), "CA_FILE: there is no certificate"),
        (lambda files: half(files.ca), "CA_FILE: a certificate is cut short"),
        (lambda files: files.ca.write_bytes(b"\xff\xfe"), "CA_FILE: the file is no PEM text"),
        (lambda files: half(files.certificate), "CERTIFICATE_FILE"),
        (lambda files: half(files.key), "KEY_FILE"),
        (lambda files: files.key.unlink(), "KEY_FILE: no such file"),
        (lambda files: files.password.write_bytes(b""), "PASSWORD_FILE"),
        (lambda files: files.password.unlink(), "PASSWORD_FILE"),
        (lambda files: files.password.write_bytes(b"\xff"), "PASSWORD_FILE"),
    ],
)
def test_files_that_cannot_be_used_change_nothing_and_are_named(
    files: Files, spoil: Callable[[Files], Any], named: str
) -> None:
    watched = files.watched()
    before = watched.current
    kept = {path: path.read_bytes() for path in (files.ca, files.certificate, files.key,
                                                 files.password)}  # fmt: skip
    spoil(files)
    assert not watched.look()
    assert watched.look()
    assert watched.fault is not None
    assert f"SHADOWSVC_MQTT__{named}" in watched.fault
    assert "first-secret" not in watched.fault
    assert watched.current is before
    assert not watched.look()  # once is enough
    for path, content in kept.items():
        path.write_bytes(content)
    watched.look()
    assert watched.look()
    assert watched.fault is None
    assert watched.current is before  # the same again is no change


def test_a_key_of_another_certificate_changes_nothing(files: Files, authority: Authority) -> None:
    watched = files.watched()
    before = watched.current
    files.key.write_bytes(authority.pair("renewed")[1].read_bytes())
    watched.look()
    assert watched.look()
    assert watched.fault is not None
    assert "the key is not the certificate's" in watched.fault
    assert watched.current is before
    files.certificate.write_bytes(authority.pair("renewed")[0].read_bytes())
    watched.look()
    assert watched.look()
    assert watched.fault is None
    assert watched.current is not before


def test_a_certificate_that_has_ended_does_not_replace_one_that_has_not(
    files: Files, authority: Authority
) -> None:
    watched = files.watched()
    before = watched.current
    files.put(authority, "expired")
    watched.look()
    assert watched.look()
    assert watched.fault == "SHADOWSVC_MQTT__CERTIFICATE_FILE: the certificate has expired"
    assert watched.current is before


def test_at_the_start_the_broker_judges_what_has_ended(files: Files, authority: Authority) -> None:
    files.put(authority, "expired")
    assert files.watched().current is not None


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(
    files: Files, tmp_path: Path
) -> None:
    openssl("rsa", "-aes256", "-passout", "pass:x", "-in", files.key, "-out", tmp_path / "locked")
    files.key.write_bytes((tmp_path / "locked").read_bytes())
    watched = files.watched()
    assert watched.current is None
    assert watched.fault is not None
    assert "passphrase" in watched.fault


def test_an_authority_is_trusted_alone_and_not_beside_those_of_the_system(files: Files) -> None:
    watched = files.watched()
    assert watched.current is not None
    assert watched.current.context is not None
    assert len(watched.current.context.get_ca_certs()) == 1


def test_of_a_bundle_all_authorities_are_trusted(
    files: Files, authority: Authority, other: Authority
) -> None:
    watched = files.watched()
    files.ca.write_bytes(b"# old and new\n" + authority.ca.read_bytes() + other.ca.read_bytes())
    watched.look()
    assert watched.look()
    assert watched.current is not None
    assert watched.current.context is not None
    assert len(watched.current.context.get_ca_certs()) == 2
    files.ca.write_bytes(other.ca.read_bytes())  # and the old one is trusted no more
    watched.look()
    assert watched.look()
    (one,) = watched.current.context.get_ca_certs()
    assert one["subject"] == ((("commonName", "other"),),)


# ---------------------------------------------------------------- dates


def test_the_end_of_a_certificate_is_read_as_openssl_reads_it(authority: Authority) -> None:
    context = ssl.create_default_context(cadata=authority.ca.read_text())
    (shown,) = context.get_ca_certs()
    wanted = ssl.cert_time_to_seconds(str(shown["notAfter"]))
    assert expiries(authority.ca.read_bytes()) == (wanted,)


def test_the_ends_of_a_large_bundle_are_read_as_openssl_reads_them() -> None:
    if not SYSTEM_BUNDLE.exists():
        pytest.skip("this system has no bundle of authorities")
    context = ssl.create_default_context(cadata=SYSTEM_BUNDLE.read_text())
    wanted = sorted(
        ssl.cert_time_to_seconds(str(shown["notAfter"])) for shown in context.get_ca_certs()
    )
    assert len(wanted) > 50
    assert sorted(expiries(SYSTEM_BUNDLE.read_bytes())) == wanted


def test_years_beyond_2049_have_four_digits(tmp_path: Path) -> None:
    far = Authority(tmp_path, "far", days=20_000)
    (end,) = expiries(far.ca.read_bytes())
    assert abs(end - time.time() - 20_000 * 86_400) < 3600


def test_damaged_certificates_raise_one_kind_of_error(authority: Authority) -> None:
    draw = random.Random(5)
    der = ssl.PEM_cert_to_DER_cert(authority.ca.read_text())
    raised = 0
    for _ in range(3000):
        damaged = bytearray(der)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(der))] = draw.randrange(256)
        pem = ssl.DER_cert_to_PEM_cert(
            bytes(damaged[: draw.choice((len(der), draw.randrange(99)))])
        )
        try:
            expiries(pem.encode())
        except (ValueError, IndexError):
            raised += 1
    assert raised > 100


def test_of_several_authorities_the_next_to_end_counts_and_those_that_ended_do_not() -> None:
    made = Credentials(ca_expiries=(100.0, 300.0, 200.0), certificate_expiries=(400.0, 50.0))
    assert made.ca_expiry(0) == 100
    assert made.ca_expiry(100) == 200
    assert made.ca_expiry(1000) == 300
    assert made.certificate_expiry() == 50  # a chain is as good as its weakest link
    assert Credentials().ca_expiry(0) is None
    assert Credentials().certificate_expiry() is None


def test_check_config_tells_what_cannot_be_used_and_what_ends_soon(
    files: Files, authority: Authority
) -> None:
    first, second = complaints(files.settings())  # all certificates here live for two days
    assert first.startswith("SHADOWSVC_MQTT__CA_FILE: a certificate ends in ")
    assert second.startswith("SHADOWSVC_MQTT__CERTIFICATE_FILE: a certificate ends in ")
    files.put(authority, "expired")
    assert "SHADOWSVC_MQTT__CERTIFICATE_FILE: a certificate has expired" in complaints(
        files.settings()
    )
    files.key.write_bytes(b"no key")
    (line,) = complaints(files.settings())
    assert line.startswith("SHADOWSVC_MQTT__CERTIFICATE_FILE and SHADOWSVC_MQTT__KEY_FILE: ")
    assert complaints(load({})) == []


# ---------------------------------------------------------------- nothing is shown


def test_nothing_of_credentials_is_shown(files: Files) -> None:
    watched = files.watched()
    key = files.key.read_text().splitlines()[3]
    for text in (repr(watched.current), str(watched.current), repr(watched._seen)):
        assert "first-secret" not in text
        assert key not in text
    with pytest.raises(CredentialsUnusable) as caught:
        from_contents(
            "mqtt",
            files.settings().mqtt,
            {"ca_file": b"first-secret", "key_file": files.key.read_bytes()},
            username="u",
            password=SecretStr("first-secret"),
        )
    assert "first-secret" not in str(caught.value)


def test_without_tls_no_file_is_looked_at() -> None:
    settings = load({})
    assert read_files("mqtt", settings.mqtt) == {}
    assert load_credentials("cassandra", settings.cassandra) == Credentials()


# ---------------------------------------------------------------- the thread and the loop


async def test_a_change_comes_to_the_loop_and_is_counted(
    files: Files, authority: Authority
) -> None:
    metrics = Metrics()
    rotation = Rotation(files.settings(), metrics, files.environ, poll_seconds=0.01)
    got: asyncio.Queue[tuple[Side, Credentials]] = asyncio.Queue()
    (end,) = expiries(files.certificate.read_bytes())
    assert metrics.certificate_expiry["broker_client"] == end
    assert set(metrics.certificate_expiry) == {"broker_client", "broker_ca"}
    rotation.start(lambda side, credentials: got.put_nowait((side, credentials)))
    try:
        before = rotation.broker_context()
        files.put(authority, "renewed")
        async with asyncio.timeout(10):
            side, credentials = await got.get()
        assert side == "broker"
        assert rotation.current("broker") is credentials
        assert rotation.broker_context() is credentials.context is not before
        assert metrics.credentials_changed == {"broker": 1}
        assert metrics.credentials_faulty == {"broker": 0, "cassandra": 0}

        with structlog.testing.capture_logs() as events:
            files.key.write_bytes(b"no key")
            await until(lambda: rotation.fault("broker") is not None)
        assert metrics.credentials_unusable == {"broker": 1}
        assert metrics.credentials_faulty["broker"] == 1
        assert rotation.broker_context() is credentials.context
        (event,) = events
        assert event["log_level"] == "error"
        assert "SHADOWSVC_MQTT__KEY_FILE" in event["error"]
        assert got.empty()
    finally:
        rotation.stop()


async def test_files_that_were_never_usable_give_a_reason_instead_of_a_context(
    files: Files,
) -> None:
    files.key.write_bytes(b"no key")
    metrics = Metrics()
    rotation = Rotation(files.settings(), metrics, files.environ, poll_seconds=0.01)
    with pytest.raises(CredentialsUnusable, match="SHADOWSVC_MQTT__KEY_FILE"):
        rotation.broker_context()
    assert metrics.credentials_faulty["broker"] == 1
    with structlog.testing.capture_logs() as events:
        rotation.start(lambda *_: None)
    rotation.stop()
    assert [event["event"] for event in events] == ["credentials can't be used"]


def test_no_descriptor_is_left_behind(files: Files) -> None:
    files.watched()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - of this process
    for _ in range(10):
        files.watched()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208 - likewise
