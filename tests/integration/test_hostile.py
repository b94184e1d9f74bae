"""Through the real broker: limits hold, nothing hostile gets out, no secret is shown anywhere."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import backing
from backing import Mosquitto
from tests.certificates import LOCAL, Authority
from tests.service import COMMAND, ServiceProcess, environment, run_command, variables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.samples import Sample

    from tests.serving import Serve

pytestmark = pytest.mark.timeout(180)

# What each limit takes and what it does not: (name of the device, payload, user properties).
Case = tuple[str, bytes, list[tuple[str, str]]]


def document(content: Any) -> bytes:
    return json.dumps({"state": {"reported": content}}).encode()


def nested(levels: int) -> Any:
    node: Any = 1
    for _ in range(levels):
        node = {"k": node}
    return node


def at_the_limit() -> dict[str, Case]:
    text = "x" * (65_536 - len(document({"t": ""})))
    return {
        "payload": ("payload", document({"t": text}), []),
        "name": ("n" * 128, document({"on": 1}), []),
        "depth": ("depth", document(nested(16)), []),
        "leaves": ("leaves", document({f"k{n}": n for n in range(500)}), []),
        "path": ("path", document({"k" * 1023: 1}), []),
        "properties": ("properties", document({"on": 1}), [(f"p{n}", "v") for n in range(64)]),
        "property bytes": ("bytes", document({"on": 1}), [("ab", "v" * 8190)]),
    }


def over_the_limit() -> dict[str, Case]:
    text = "x" * (65_537 - len(document({"t": ""})))
    return {
        "payload_too_large": ("payload", document({"t": text}), []),
        "device_name": ("n" * 129, document({"on": 1}), []),
        "too_deep": ("depth", document(nested(17)), []),
        "too_many_leaves": ("leaves", document({f"k{n}": n for n in range(501)}), []),
        "path_too_long": ("path", document({"k" * 1024: 1}), []),
        "properties_too_large": ("bytes", document({"on": 1}), [("abc", "v" * 8190)]),
    }


def test_each_limit_takes_the_largest_and_rejects_the_next(serve: Serve, unique: str) -> None:
    good, bad = at_the_limit(), over_the_limit()
    with serve() as (service, oracle):
        for device, payload, properties in good.values():
            oracle.raw(oracle.topic(f"{unique}{device}"[-128:]), payload, properties=properties)
        for device, payload, properties in bad.values():
            oracle.raw(oracle.topic(device), payload, properties=properties)
        many = [("p", "v")] * 10_000  # of which the broker minds none
        oracle.raw(oracle.topic("flood"), document({"on": 1}), properties=many)
        oracle.wait_taken()
        total = len(good) + len(bad) + 1
        service.wait_until(
            lambda: service.metrics().total("messages_acknowledged_total") == total, "all are acked"
        )
        figures = service.metrics()
        assert figures.total("updates_durable_total") == len(good)
        for reason in bad:
            expected = 2 if reason == "properties_too_large" else 1
            assert figures.total("dead_letters_total", reason=reason) == expected, reason
        assert service.ready_reasons() == set()
        assert service.terminate() == 0


# ---------------------------------------------------------------- hostile traffic


def labels(service: ServiceProcess) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    samples: list[Sample] = service.metrics()._samples
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for sample in samples
        if sample.name.startswith("shadowsvc_")
    }


HOSTILE_NAMES = [
    'x"} 1\nshadowsvc_ready{a="b',
    "\x1b[31mred\x1b[0m",
    'new\nline{"event":"forged"}',
    "\u2028\u2029\u202e\x85",
    "'; DROP KEYSPACE shadowsvc; --",
    "?",
    "%s%n{0}{keyspace}",
    "../../etc/passwd",
]


def test_hostile_names_and_values_stay_data(serve: Serve, unique: str) -> None:
    with serve() as (service, oracle):

        def send(round_number: int) -> None:
            before = service.metrics().total("messages_acknowledged_total")
            count = 0
            for number, text in enumerate(HOSTILE_NAMES):
                device = f"{unique}-{round_number}-{number}"
                # As key, value and user property they are data, whatever they say.
                # mosquitto lets no control character pass in a topic or a property.
                name = re.sub("[\x00-\x1f\x7f-\x9f+#/]", "", text)
                oracle.update(
                    device,
                    {"reported": {text: text, "n": {text: [text]}}},
                    properties=[(name, name)],
                )
                oracle.update(device, {"reported": {"plain": text}}, shadow="named")
                oracle.raw(f"{unique}/{name}/shadow/update", document({"on": 1}))
                oracle.raw(oracle.topic(device), text.encode(), properties=[("timestamp", name)])
                oracle.raw(oracle.topic(device), document({"n": 1})[:-1] + b',"timestamp":"%s"}')
                count += 5
            service.wait_until(
                lambda: service.metrics().total("messages_acknowledged_total") - before >= count,
                "all are acknowledged",
            )

        send(0)
        first = labels(service)
        send(1)
        send(2)
        assert labels(service) == first
        oracle.wait_right()
        log = service.log_path.read_bytes().decode()
        assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", log) is None
        assert all(event["event"] != "forged" for event in service.events())
        assert len(service.events()) == len(log.split("\n")) - 1
        assert service.terminate() == 0


# ---------------------------------------------------------------- secrets

BROKER_SECRET = "planted-secret-of-the-broker"  # noqa: S105 - of a test
STORE_SECRET = "planted-secret-of-the-store"  # noqa: S105 - likewise
KEY_LINE = re.compile(r"[A-Za-z0-9+/]{64}")


class Planted:
    """Settings with a secret in every place that may have one."""

    def __init__(self, folder: Path, base: Mapping[str, str], **more: str) -> None:
        authority = Authority(folder / "ca")
        certificate, key = authority.issue("client", LOCAL)
        (folder / "store-password").write_text(STORE_SECRET + "\n")
        self.settings = {
            **base,
            "SHADOWSVC_MQTT__URL": base["SHADOWSVC_MQTT__URL"].replace("mqtt://", "mqtts://"),
            "SHADOWSVC_MQTT__USERNAME": "service",
            "SHADOWSVC_MQTT__PASSWORD": BROKER_SECRET,
            "SHADOWSVC_MQTT__CA_FILE": str(authority.ca),
            "SHADOWSVC_MQTT__CERTIFICATE_FILE": str(certificate),
            "SHADOWSVC_MQTT__KEY_FILE": str(key),
            "SHADOWSVC_CASSANDRA__USERNAME": "service",
            "SHADOWSVC_CASSANDRA__PASSWORD_FILE": str(folder / "store-password"),
            "SHADOWSVC_LOG__LEVEL": "DEBUG",
            **more,
        }
        self.words = {BROKER_SECRET, STORE_SECRET, *KEY_LINE.findall(key.read_text())[:3]}
        self.words |= {repr(word) for word in self.words}

    def shown_in(self, text: str) -> list[str]:
        return [word for word in self.words if word in text]


@pytest.fixture
def refusing() -> Iterator[Mosquitto]:
    """A broker without TLS and with another password: each attempt fails in its own way."""
    with Mosquitto(users={"service": "another"}) as broker:
        yield broker


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("tls", ["tls", "plain"])
def test_no_secret_is_shown_by_a_service_that_cannot_get_in(
    refusing: Mosquitto,
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    tmp_path: Path,
    form: str,
    tls: str,
) -> None:
    quick = {"LIMITS__LOGIN_RETRY_MIN_SECONDS": 0.2, "LIMITS__LOGIN_RETRY_MAX_SECONDS": 0.5}
    base = variables(refusing, cassandra, migrated, unique, **quick)
    planted = Planted(tmp_path, base, SHADOWSVC_LOG__FORMAT="json")
    settings = dict(planted.settings)
    if tls == "plain":
        settings = {
            name: value
            for name, value in settings.items()
            if not name.endswith(("CA_FILE", "CERTIFICATE_FILE", "KEY_FILE"))
        } | {"SHADOWSVC_MQTT__URL": base["SHADOWSVC_MQTT__URL"]}
    with ServiceProcess(settings, tmp_path / "log") as service:
        service.wait_started()
        service.wait_until(
            lambda: len(service.events("broker not reachable")) >= 2, "it was refused twice"
        )
        (tmp_path / "store-password").write_bytes(STORE_SECRET.encode() + b"\xff")
        service.wait_until(
            lambda: service.metrics().total("credentials_faulty", of="cassandra") == 1,
            "a password file that is no text is noticed",
        )
        said = [service.get(path).body for path in ("/readyz", "/metrics", "/livez", "/startupz")]
        said.append(Path(f"/proc/{service.pid}/cmdline").read_bytes().decode())
        said += [path.read_text() for path in Path(f"/proc/{service.pid}/task").glob("*/comm")]
        said.append(service.log_path.read_text())
        assert planted.shown_in("\n".join(said)) == []
        assert service.terminate() == 0
        assert planted.shown_in(service.log_path.read_text()) == []
    (tmp_path / "store-password").write_text(STORE_SECRET)
    if form == "console":
        wrong = run_for_a_moment({**settings, "SHADOWSVC_LOG__FORMAT": form}, tmp_path)
        assert "broker not reachable" in wrong
        assert planted.shown_in(wrong) == []


def run_for_a_moment(settings: Mapping[str, str], folder: Path) -> str:
    """Run the service until its log speaks of the broker; return the log, which is for people."""
    log = folder / "console"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*COMMAND, "run"], env=environment(settings), stderr=stream, stdout=stream
        )
        try:
            for _ in range(400):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                if process.returncode is not None or "not reachable" in log.read_text():
                    break
        finally:
            process.terminate()
            process.wait(40)
    return log.read_text()


def test_no_secret_is_shown_by_any_command(
    refusing: Mosquitto, cassandra: backing.Database, unique: str, tmp_path: Path
) -> None:
    base = variables(refusing, cassandra, "absent", unique)
    planted = Planted(tmp_path, base)
    for arguments in (
        ("check-config",),
        ("get", "lamp"),
        ("migrate",),
        ("simulate", "--devices", "1", "--seconds", "0.1", "--rate", "10"),
        ("probe", "ready"),
        ("dead-letters", "list"),
        ("slots",),
    ):
        done = run_command(planted.settings, *arguments)
        assert planted.shown_in(done.stdout + done.stderr) == [], arguments
        if arguments == ("check-config",):
            assert done.returncode == 0, done.stderr
            assert "SHADOWSVC_MQTT__PASSWORD=****" in done.stdout
    shown = on_a_terminal(planted.settings, "check-config")
    assert "SHADOWSVC_CASSANDRA__PASSWORD" in shown
    assert planted.shown_in(shown) == []


def on_a_terminal(settings: Mapping[str, str], *arguments: str) -> str:
    """Run a command whose output is a terminal; return what it shows."""
    own, its = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env={**environment(settings), "COLUMNS": "400"},
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is gone when the process is
        while data := os.read(own, 65_536):
            shown += data
    os.close(own)
    assert process.wait(40) == 0
    return shown.decode()


@pytest.mark.parametrize(
    "wrong",
    [
        {"SHADOWSVC_MQTT__URL": f"mqtt://service:{BROKER_SECRET}@127.0.0.1:1"},
        {"SHADOWSVC_MQTT__URL": f"mqtt://{BROKER_SECRET}@[::1"},
        {"SHADOWSVC_CASSANDRA__CONTACT_POINTS": f"service:{BROKER_SECRET}@127.0.0.1"},
        {"SHADOWSVC_MQTT__PASSWRD": BROKER_SECRET},
        {"SHADOWSVC_CASSANDRA__PASSWORD": STORE_SECRET},  # without a name
    ],
)
def test_a_mistake_beside_a_secret_does_not_show_it(wrong: dict[str, str]) -> None:
    settings = {
        "SHADOWSVC_MQTT__CLIENT_ID": "client",
        "SHADOWSVC_CASSANDRA__LOCAL_DC": "dc1",
        **wrong,
    }
    for command in ("check-config", "run", "migrate"):
        done = run_command(settings, command)
        assert done.returncode == 2
        said = done.stdout + done.stderr
        assert next(iter(wrong)) in said
        assert BROKER_SECRET not in said
        assert STORE_SECRET not in said
