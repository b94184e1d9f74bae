"""From a Secret's files to files that HAProxy reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shadowsvc.config import load
from shadowsvc.errors import ConfigError
from shadowsvc.ingress.certificates import gather
from tests.certificates import Authority, openssl

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def test_a_secrets_two_files_become_one(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("one", "DNS:one.example")
    # As kubelet mounts a Secret: links to a folder that is swapped as a whole.
    data = tmp_path / "secret" / "..2026_01_01"
    data.mkdir(parents=True)
    (data / "tls.crt").write_bytes(certificate.read_bytes())
    (data / "tls.key").write_bytes(key.read_bytes())
    (tmp_path / "secret" / "..data").symlink_to(data.name)
    for name in ("tls.crt", "tls.key"):
        (tmp_path / "secret" / name).symlink_to(f"..data/{name}")
    found = gather(tmp_path / "secret", tmp_path / "certs")
    assert found.files == ("tls.pem",)
    assert found.faults == ()
    made = tmp_path / "certs" / "tls.pem"
    assert made.read_bytes() == certificate.read_bytes() + key.read_bytes()
    assert made.stat().st_mode & 0o007 == 0  # nothing for others
    assert len(found.fingerprints["tls.pem"]) == 40
    assert [file.name for file in (tmp_path / "certs").iterdir()] == ["tls.pem"]


def test_a_key_with_a_passphrase_is_refused_and_not_asked_for(
    authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("locked", "DNS:locked.example")
    (tmp_path / "a.crt").write_bytes(certificate.read_bytes())
    openssl("rsa", "-aes128", "-passout", "pass:x", "-in", key, "-out", tmp_path / "a.key")
    found = gather(tmp_path, tmp_path / "certs")
    assert found.files == ()
    assert found.faults == ("a.crt: certificate and key can't be used, or are no pair",)


def test_what_cannot_be_used_leaves_the_others_and_what_was(
    authority: Authority, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "certs"
    source.mkdir()
    for name in ("good", "later-bad", "gone"):
        certificate, key = authority.issue(name, f"DNS:{name}.example")
        (source / f"{name}.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    assert gather(source, target).files == ("gone.pem", "good.pem", "later-bad.pem")
    before = (target / "later-bad.pem").read_bytes()
    (source / "later-bad.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n")
    (source / "no-key.crt").write_bytes(certificate.read_bytes())
    (source / "readme.txt").write_text("not ours")
    (source / "gone.pem").unlink()
    found = gather(source, target)
    assert found.files == ("good.pem", "later-bad.pem")
    assert (target / "later-bad.pem").read_bytes() == before
    assert {fault.partition(":")[0] for fault in found.faults} == {"later-bad.pem", "no-key.key"}


def test_a_directory_that_is_away_leaves_what_was(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("kept", "DNS:kept.example")
    source = tmp_path / "source"
    source.mkdir()
    (source / "kept.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    gather(source, tmp_path / "certs")
    found = gather(tmp_path / "nowhere", tmp_path / "certs")
    assert found.files == ("kept.pem",)
    assert "no such file" in found.faults[0]


def test_when_all_are_gone_the_last_ones_stay(authority: Authority, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    assert gather(source, tmp_path / "certs").files == ()  # none yet: no TLS, and no fault
    certificate, key = authority.issue("last", "DNS:last.example")
    (source / "last.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    assert gather(source, tmp_path / "certs").files == ("last.pem",)
    (source / "last.pem").unlink()
    found = gather(source, tmp_path / "certs")
    assert found.files == ("last.pem",)
    assert "all certificates are gone" in found.faults[0]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"LISTEN_MQTT": "8883"}, "LISTEN_MQTTS: the default is '8883'; SHADOWSVC_INGRESS__LISTEN"),
        ({"SOURCE_PORTS": "1-5"}, "SOURCE_PORTS: got '1-5' from environment; it does nothing"),
        ({"SOURCE_PORTS": "5-1"}, "SOURCE_PORTS: got '5-1' from environment; it is no range"),
        ({"SOURCE_ADDRESSES": "host"}, "SOURCE_ADDRESSES: got 'host' from environment; 'host'"),
        ({"SOURCE_ADDRESSES": "::1,::1"}, "SOURCE_ADDRESSES: got '::1,::1' from environment; an"),
        ({"MQTT_PORTS": "a b"}, "MQTT_PORTS: got 'a b' from environment; 'a b' is no name of a"),
        ({"LISTEN_HOST": "host"}, "LISTEN_HOST: got 'host' from environment; 'host' does not"),
        ({"SERVICE": "A;b"}, "SERVICE: got 'A;b' from environment; it is no name that"),
    ],
)
def test_settings_that_would_spoil_a_configuration_are_mistakes(
    given: dict[str, str], line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load({f"SHADOWSVC_INGRESS__{name}": value for name, value in given.items()})
    assert any(each.startswith(f"SHADOWSVC_INGRESS__{line}") for each in caught.value.mistakes), (
        caught.value.mistakes
    )


def test_a_port_that_is_off_is_no_port_twice() -> None:
    load(
        {
            f"SHADOWSVC_INGRESS__LISTEN_{name}": "0"
            for name in ("MQTT", "MQTTS", "WEBSOCKET", "WEBSOCKET_TLS", "STATISTICS")
        }
    )
