"""What the settings promise: the contract's names and defaults, and one good line a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from shadowsvc import config_rules
from shadowsvc.config import (
    Mqtt,
    Settings,
    adopted_receive_maximum,
    advice,
    describe,
    load,
    load_with_origins,
    require_for_run,
    worst_case_held_bytes,
)
from shadowsvc.errors import ConfigError
from shadowsvc.settings import all_settings
from shadowsvc.store import deadletter

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-Zx9"  # noqa: S105 - what must never be shown
NAMES = {setting.variable: setting for setting in all_settings()}


def mistakes(environ: dict[str, str], config_file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(environ, config_file)
    for line in caught.value.mistakes:
        assert "\n" not in line
        assert SECRET not in line
    return caught.value.mistakes


def mistake(environ: dict[str, str], config_file: Path | None = None) -> str:
    lines = mistakes(environ, config_file)
    assert len(lines) == 1, lines
    return lines[0]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_without_any_variable_the_defaults_are_those_of_the_contract() -> None:
    settings = load({})
    assert settings == Settings()
    assert settings.mqtt.url == "mqtt://127.0.0.1:1883"
    assert settings.mqtt.client_id == ""
    assert settings.mqtt.share_group == "shadowsvc"
    assert settings.mqtt.topic_prefix == "things"
    assert settings.mqtt.receive_maximum == 1000
    assert settings.mqtt.session_expiry_seconds == 86_400
    assert settings.mqtt.maximum_packet_size_bytes == 1_048_576 + 65_536
    assert settings.cassandra.contact_points == ("127.0.0.1",)
    assert settings.cassandra.port == 9042
    assert settings.cassandra.keyspace == "shadowsvc"
    assert settings.cassandra.consistency == "LOCAL_QUORUM"
    assert settings.cassandra.replication == "auto"
    assert settings.cassandra.migrate_on_start is False
    assert settings.http.port == 8080
    assert (settings.log.level, settings.log.format) == ("INFO", "auto")
    assert settings.dead_letters.ttl_seconds == 30 * 86_400


def test_the_defaults_keep_every_rule_and_need_no_advice() -> None:
    assert advice(load({})) == []


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_setting_has_a_description_and_what_is_allowed(name: str) -> None:
    setting = NAMES[name]
    assert setting.description.endswith(".")
    assert setting.allowed
    assert name == f"SHADOWSVC_{setting.section.upper()}__{setting.name.upper()}"


def test_settings_cannot_be_changed() -> None:
    settings = load({})
    with pytest.raises(ValidationError, match="frozen"):
        settings.mqtt.url = "mqtt://other"
    with pytest.raises(ValidationError, match="frozen"):
        settings.mqtt = Mqtt()


def test_settings_made_by_hand_ignore_the_process_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHADOWSVC_HTTP__PORT", "99")
    assert Settings().http.port == 8080
    assert load().http.port == 99


def test_a_comma_list_of_contact_points_becomes_a_tuple() -> None:
    settings = load({"SHADOWSVC_CASSANDRA__CONTACT_POINTS": " a , b.example,::1,"})
    assert settings.cassandra.contact_points == ("a", "b.example", "::1")


def test_an_empty_variable_counts_as_not_given() -> None:
    settings = load({"SHADOWSVC_MQTT__SHARE_GROUP": "", "SHADOWSVC_MQTT__PASSWORD_FILE": ""})
    assert settings.mqtt.share_group == "shadowsvc"
    assert settings.mqtt.password is None


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://broker", "broker", 1883, False),
        ("mqtts://broker", "broker", 8883, True),
        ("mqtts://broker:8884/", "broker", 8884, True),
        ("mqtt://[::1]:1884", "::1", 1884, False),
        ("MQTT://Broker", "broker", 1883, False),
    ],
)
def test_a_url_gives_host_port_and_encryption(url: str, host: str, port: int, tls: bool) -> None:  # noqa: FBT001
    mqtt = load({"SHADOWSVC_MQTT__URL": url}).mqtt
    assert (mqtt.host, mqtt.port, mqtt.tls) == (host, port, tls)


@pytest.mark.parametrize(
    "url",
    [
        "broker",
        "tcp://broker",
        "mqtt://",
        "mqtt://broker:0",
        "mqtt://broker:65536",
        "mqtt://broker:x",
        "mqtt://broker/path",
        "mqtt://broker?x=1",
        "mqtt://[::1",
        "mqtt://bro\nker",
    ],
)
def test_a_bad_url_is_one_mistake(url: str) -> None:
    line = mistake({"SHADOWSVC_MQTT__URL": url})
    assert line.startswith("SHADOWSVC_MQTT__URL: got '")
    assert "allowed: mqtt://HOST[:PORT]" in line


@pytest.mark.parametrize(
    "url",
    [
        f"mqtt://user:{SECRET}@broker",
        f"mqtt://{SECRET}@broker",
        f"user:{SECRET}@broker",
        f"mqtt://u:{SECRET}@[bad",
        f"mqtt://u:{SECRET}@x@broker",
    ],
)
def test_a_password_in_the_url_is_refused_and_not_shown(url: str) -> None:
    line = mistake({"SHADOWSVC_MQTT__URL": url})
    assert "SHADOWSVC_MQTT__USERNAME" in line
    assert "SHADOWSVC_MQTT__PASSWORD" in line


def test_a_password_among_the_contact_points_is_not_shown() -> None:
    line = mistake({"SHADOWSVC_CASSANDRA__CONTACT_POINTS": f"a,u:{SECRET}@b"})
    assert "SHADOWSVC_CASSANDRA__PASSWORD" in line


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("SHADOWSVC_MQTT__RECEIVE_MAXIMUM", "0", "a whole number from 1 to 65535"),
        ("SHADOWSVC_MQTT__RECEIVE_MAXIMUM", "65536", "a whole number from 1 to 65535"),
        ("SHADOWSVC_MQTT__RECEIVE_MAXIMUM", "1.5", "a whole number"),
        ("SHADOWSVC_MQTT__RECEIVE_MAXIMUM", "many", "a whole number"),
        ("SHADOWSVC_MQTT__SESSION_EXPIRY_SECONDS", "0", "a whole number from 1 to"),
        ("SHADOWSVC_MQTT__KEEP_ALIVE_SECONDS", "0", "a whole number from 1 to 65535"),
        ("SHADOWSVC_MQTT__CONNECT_TIMEOUT_SECONDS", "nan", "a number above 0"),
        ("SHADOWSVC_MQTT__CONNECT_TIMEOUT_SECONDS", "inf", "a number above 0"),
        ("SHADOWSVC_MQTT__CLIENT_ID", "a\x00b", "no control characters"),
        ("SHADOWSVC_MQTT__CLIENT_ID", "a" * 129, "up to 128 characters"),
        ("SHADOWSVC_MQTT__SHARE_GROUP", "a/b", 'no "/", "+" or "#"'),
        ("SHADOWSVC_MQTT__SHARE_GROUP", "a+", 'no "/", "+" or "#"'),
        ("SHADOWSVC_MQTT__SHARE_GROUP", "#", 'no "/", "+" or "#"'),
        ("SHADOWSVC_MQTT__TOPIC_PREFIX", "$aws/things", 'no "$"'),
        ("SHADOWSVC_MQTT__TOPIC_PREFIX", "/things", 'no "$" or "/" in front'),
        ("SHADOWSVC_MQTT__TOPIC_PREFIX", "things/", 'no "/" at the end'),
        ("SHADOWSVC_MQTT__TOPIC_PREFIX", "a//b", "topic levels"),
        ("SHADOWSVC_MQTT__TOPIC_PREFIX", "a/+/b", 'without "+" and "#"'),
        ("SHADOWSVC_MQTT__TOPIC_PREFIX", "a/#", 'without "+" and "#"'),
        ("SHADOWSVC_CASSANDRA__PORT", "0", "a whole number from 1 to 65535"),
        ("SHADOWSVC_CASSANDRA__CONTACT_POINTS", ",", "separated by commas"),
        ("SHADOWSVC_CASSANDRA__CONTACT_POINTS", "a:9042", "SHADOWSVC_CASSANDRA__PORT"),
        ("SHADOWSVC_CASSANDRA__KEYSPACE", "Big", "1 to 48 of a-z"),
        ("SHADOWSVC_CASSANDRA__KEYSPACE", "a" * 49, "1 to 48 of a-z"),
        ("SHADOWSVC_CASSANDRA__KEYSPACE", "a; DROP", "1 to 48 of a-z"),
        ("SHADOWSVC_CASSANDRA__CONSISTENCY", "ANY", "LOCAL_QUORUM"),
        ("SHADOWSVC_CASSANDRA__CONSISTENCY", "SERIAL", "EACH_QUORUM"),
        ("SHADOWSVC_CASSANDRA__REPLICATION", "0", "dc1:3,dc2:3"),
        ("SHADOWSVC_CASSANDRA__REPLICATION", "dc1:0", "dc1:3,dc2:3"),
        ("SHADOWSVC_CASSANDRA__REPLICATION", "dc1:3,dc1:2", "dc1:3,dc2:3"),
        ("SHADOWSVC_CASSANDRA__REPLICATION", "dc'1:3", "dc1:3,dc2:3"),
        ("SHADOWSVC_CASSANDRA__TLS", "perhaps", "true or false"),
        ("SHADOWSVC_CASSANDRA__CONCURRENCY", "257", "a whole number from 1 to 256"),
        ("SHADOWSVC_CASSANDRA__LINGER_SECONDS", "1.01", "a number from 0 to 1"),
        (
            "SHADOWSVC_CASSANDRA__BATCH_MAX_BYTES",
            "511",
            "auto, or a whole number from 512 to 16777216",
        ),
        (
            "SHADOWSVC_CASSANDRA__BATCH_MAX_PARTITIONS",
            "0",
            "auto, or a whole number from 1 to 1000",
        ),
        ("SHADOWSVC_CASSANDRA__BATCH_MAX_PARTITIONS", "most", "auto, or a whole number from 1 to"),
        ("SHADOWSVC_SHADOW__TIMESTAMP_UNIT", "minutes", "one of auto, seconds"),
        ("SHADOWSVC_SHADOW__ON_FUTURE", "ignore", "one of reject, server_time"),
        ("SHADOWSVC_LOG__LEVEL", "loud", "one of DEBUG, INFO, WARNING, ERROR"),
        ("SHADOWSVC_LOG__FORMAT", "xml", "one of auto, json, console"),
    ],
)
def test_a_bad_value_names_variable_what_was_given_and_what_is_allowed(
    name: str, given: str, allowed: str
) -> None:
    line = mistake({name: given})
    assert line.startswith(f"{name}: got {given[:80]!r}"[:-1])
    assert "from environment" in line
    assert allowed in line


@pytest.mark.parametrize(
    ("name", "given", "section", "attribute", "expected"),
    [
        ("SHADOWSVC_CASSANDRA__CONSISTENCY", "quorum", "cassandra", "consistency", "QUORUM"),
        ("SHADOWSVC_CASSANDRA__REPLICATION", "dc1:3,dc2:2", "cassandra", "replication", None),
        ("SHADOWSVC_CASSANDRA__REPLICATION", "3", "cassandra", "replication", None),
        ("SHADOWSVC_CASSANDRA__TLS", "yes", "cassandra", "tls", True),
        ("SHADOWSVC_MQTT__TOPIC_PREFIX", "acme/eu/things", "mqtt", "topic_prefix", None),
        ("SHADOWSVC_MQTT__CLIENT_ID", "a" * 128, "mqtt", "client_id", None),
        ("SHADOWSVC_LOG__LEVEL", "debug", "log", "level", "DEBUG"),
        ("SHADOWSVC_LOG__FORMAT", "JSON", "log", "format", "json"),
        ("SHADOWSVC_HTTP__PORT", "0", "http", "port", 0),
        ("SHADOWSVC_CASSANDRA__LINGER_SECONDS", "0", "cassandra", "linger_seconds", 0.0),
    ],
)  # fmt: skip
def test_a_good_value_is_taken(
    name: str, given: str, section: str, attribute: str, expected: object
) -> None:
    settings = load({name: given})
    assert getattr(getattr(settings, section), attribute) == (
        given if expected is None else expected
    )


def test_all_mistakes_are_told_at_once_each_in_one_line() -> None:
    lines = mistakes(
        {
            "SHADOWSVC_MQTT__URL": "http://x",
            "SHADOWSVC_MQTT__RECEIVE_MAXIMUM": "x",
            "SHADOWSVC_HTTP__PORT": "-1",
            "SHADOWSVC_CASSANDRA__CONTACT_POINTS": "a:1,b:2",
            "SHADOWSVC_CASSANDRA__RETRY_MIN_SECONDS": "9",
            "SHADOWSVC_CASSANDRA__USERNAME": "me",
            "SHADOWSVC_NONSENSE": "1",
        }
    )
    assert sorted(line.partition(":")[0] for line in lines) == [
        "SHADOWSVC_CASSANDRA__CONTACT_POINTS",
        "SHADOWSVC_CASSANDRA__RETRY_MIN_SECONDS",
        "SHADOWSVC_CASSANDRA__USERNAME",
        "SHADOWSVC_HTTP__PORT",
        "SHADOWSVC_MQTT__RECEIVE_MAXIMUM",
        "SHADOWSVC_MQTT__URL",
        "SHADOWSVC_NONSENSE",
    ]


def test_a_long_or_unprintable_value_stays_one_short_line() -> None:
    line = mistake({"SHADOWSVC_LOG__LEVEL": "a\n\x1b[2J" + "b" * 10_000})
    assert line.isprintable()
    assert len(line) < 250


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SHADOWSVC_MQTT_URL", "SHADOWSVC_MQTT__URL"),
        ("SHADOWSVC_MQTT__CLIENTID", "SHADOWSVC_MQTT__CLIENT_ID"),
        ("shadowsvc_mqtt__client_id", "SHADOWSVC_MQTT__CLIENT_ID"),
        ("SHADOWSVC_CASSANDRA__CONTACT_POINT", "SHADOWSVC_CASSANDRA__CONTACT_POINTS"),
        ("SHADOWSVC_MQTT__PASWORD_FILE", "SHADOWSVC_MQTT__PASSWORD_FILE"),
        ("SHADOWSVC_SECRET_DIR", "SHADOWSVC_SECRETS_DIR"),
    ],
)
def test_an_unknown_variable_is_a_mistake_with_a_proposal(name: str, meant: str) -> None:
    assert mistake({name: SECRET}) == f"{name}: no such setting; did you mean {meant}?"


def test_an_unknown_variable_like_nothing_points_to_the_list() -> None:
    assert "check-config" in mistake({"SHADOWSVC_QQQQQQQQQQQQ": "1"})


def test_only_secrets_have_file_variables() -> None:
    assert "no such setting" in mistake({"SHADOWSVC_MQTT__URL_FILE": "/x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHADOWSVC_BACKING", "processes"),
        ("SHADOWSVC_BACKING_MQTT_URL", "mqtt://x"),
        ("SHADOWSVC_PYTHON", "python3.13"),
        ("SHADOWSVC_SERVICE_HOST", "10.96.0.1"),
        ("SHADOWSVC_SERVICE_PORT", "8080"),
        ("SHADOWSVC_SERVICE_PORT_HTTP", "8080"),
        ("SHADOWSVC_PORT", "tcp://10.96.0.1:8080"),
        ("SHADOWSVC_PORT_8080_TCP", "tcp://10.96.0.1:8080"),
        ("SHADOWSVC_PORT_8080_TCP_ADDR", "10.96.0.1"),
        ("SHADOWSVC_METRICS_SERVICE_HOST", "10.96.0.1"),
        ("SHADOWSVC_METRICS_PORT", "tcp://10.96.0.1:8080"),
        ("OTHER_MQTT__URL", "x"),
    ],
)
def test_variables_of_our_tools_and_of_kubernetes_services_are_no_mistakes(
    name: str, value: str
) -> None:
    assert load({name: value}) == Settings()


def test_a_forgotten_underscore_is_not_taken_for_a_kubernetes_variable() -> None:
    assert "did you mean SHADOWSVC_HTTP__PORT?" in mistake({"SHADOWSVC_HTTP_PORT": "8080"})


def test_a_secret_comes_from_a_file_without_its_line_break(tmp_path: Path) -> None:
    file = write(tmp_path / "password", f"{SECRET}\r\n")
    settings = load({"SHADOWSVC_MQTT__PASSWORD_FILE": str(file)})
    assert settings.mqtt.password is not None
    assert settings.mqtt.password.get_secret_value() == SECRET


def test_secrets_come_from_a_directory_whatever_the_case_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "shadowsvc_cassandra__password", SECRET)
    write(tmp_path / "SHADOWSVC_CASSANDRA__USERNAME", "me")
    write(tmp_path / "something-else", "ignored")
    (tmp_path / "..data").mkdir()  # as Kubernetes mounts them
    loaded = load_with_origins({"SHADOWSVC_SECRETS_DIR": str(tmp_path)})
    cassandra = loaded.settings.cassandra
    assert cassandra.username == "me"
    assert cassandra.password is not None
    assert cassandra.password.get_secret_value() == SECRET
    assert loaded.origins["SHADOWSVC_CASSANDRA__PASSWORD"].startswith("file ")


def test_a_file_in_the_secrets_directory_that_is_named_like_no_secret_is_a_mistake(
    tmp_path: Path,
) -> None:
    write(tmp_path / "SHADOWSVC_MQTT__PASSWROD", SECRET)
    assert "SHADOWSVC_MQTT__PASSWORD" in mistake({"SHADOWSVC_SECRETS_DIR": str(tmp_path)})


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"x" * 65_537, None])
def test_a_secret_file_that_holds_no_secret_is_a_mistake(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    line = mistake({"SHADOWSVC_MQTT__PASSWORD_FILE": str(file)})
    assert line.startswith("SHADOWSVC_MQTT__PASSWORD_FILE: got '")
    assert "allowed: path of a readable text file" in line


def test_a_secrets_directory_that_is_none_is_a_mistake(tmp_path: Path) -> None:
    line = mistake({"SHADOWSVC_SECRETS_DIR": str(tmp_path / "nowhere")})
    assert line.startswith("SHADOWSVC_SECRETS_DIR: got '")


def test_environment_beats_secret_files_they_beat_the_file_it_beats_defaults(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "secrets"
    directory.mkdir()
    write(directory / "SHADOWSVC_MQTT__USERNAME", "from directory")
    write(directory / "SHADOWSVC_CASSANDRA__USERNAME", "from directory")
    config = write(
        tmp_path / "settings.toml",
        """
        [mqtt]
        username = "from file"
        keep_alive_seconds = 7
        receive_maximum = 8
        [cassandra]
        contact_points = ["a", "b"]
        username = "from file"
        password = "from file"
        """,
    )
    environ = {
        "SHADOWSVC_SECRETS_DIR": str(directory),
        "SHADOWSVC_MQTT__USERNAME_FILE": str(write(tmp_path / "name", "from variable's file")),
        "SHADOWSVC_MQTT__RECEIVE_MAXIMUM": "9",
    }
    settings, origins = load_with_origins(environ, config)
    assert settings.mqtt.username == "from variable's file"
    assert settings.cassandra.username == "from directory"
    assert settings.cassandra.contact_points == ("a", "b")
    assert settings.mqtt.keep_alive_seconds == 7
    assert settings.mqtt.receive_maximum == 9
    assert settings.mqtt.topic_prefix == "things"
    assert origins["SHADOWSVC_MQTT__RECEIVE_MAXIMUM"] == "environment"
    assert origins["SHADOWSVC_MQTT__KEEP_ALIVE_SECONDS"] == str(config)
    assert load({**environ, "SHADOWSVC_MQTT__USERNAME": "x"}, config).mqtt.username == "x"


def test_the_settings_file_is_found_by_its_variable_and_an_argument_beats_it(
    tmp_path: Path,
) -> None:
    first = write(tmp_path / "a.toml", "http.port = 1111")
    second = write(tmp_path / "b.toml", "http.port = 2222")
    environ = {"SHADOWSVC_CONFIG_FILE": str(first)}
    assert load(environ).http.port == 1111
    assert load(environ, second).http.port == 2222


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[mqt]\nurl = 'x'", "did you mean [mqtt]?"),
        ("[qqqq]", "allowed: [mqtt], [cassandra]"),
        ("mqtt = 'hunter2-Zx9'", "not a section"),
        ("[mqtt]\nulr = 'hunter2-Zx9'", "did you mean SHADOWSVC_MQTT__URL?"),
        ("[mqtt]\npassword = 'hunter2-Zx9", "it is not TOML"),
        ("[mqtt]\nreceive_maximum = 'many'", "allowed: a whole number from 1 to 65535"),
        ("[mqtt]\npassword = ['hunter2-Zx9']", "got ****"),
        ("[cassandra]\ncontact_points = ['a', 5]", "separated by commas"),
    ],
)
def test_a_mistake_in_the_settings_file_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would be cut short in the message
    file = write(Path("settings.toml"), text)
    line = mistake({}, file)
    assert expected in line
    assert "settings.toml" in line


@pytest.mark.parametrize("content", [b"\xff", None])
def test_a_settings_file_that_cannot_be_read_is_one_mistake(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "settings.toml"
    if content is not None:
        file.write_bytes(content)
    assert "allowed: path of a readable TOML file" in mistake({}, file)


@pytest.mark.parametrize("name", ["CA_FILE", "CERTIFICATE_FILE", "KEY_FILE"])
@pytest.mark.parametrize("section", ["MQTT", "CASSANDRA"])
def test_tls_files_must_be_readable(tmp_path: Path, section: str, name: str) -> None:
    switch = {
        "MQTT": {"SHADOWSVC_MQTT__URL": "mqtts://x"},
        "CASSANDRA": {"SHADOWSVC_CASSANDRA__TLS": "true"},
    }[section]
    variable = f"SHADOWSVC_{section}__{name}"
    (first, *rest) = mistakes({**switch, variable: str(tmp_path / "nowhere.pem")})
    assert first.startswith(f"{variable}: got '")
    assert "no such file" in first
    assert all("is missing beside it" in line for line in rest)
    (first, *rest) = mistakes({**switch, variable: str(tmp_path)})
    assert "is a directory" in first


@pytest.mark.parametrize(
    ("given", "missing"),
    [("CERTIFICATE_FILE", "KEY_FILE"), ("KEY_FILE", "CERTIFICATE_FILE")],
)
def test_certificate_and_key_come_together(tmp_path: Path, given: str, missing: str) -> None:
    file = str(write(tmp_path / "x.pem", "x"))
    environ = {"SHADOWSVC_MQTT__URL": "mqtts://x", f"SHADOWSVC_MQTT__{given}": file}
    assert f"SHADOWSVC_MQTT__{missing} is missing" in mistake(environ)
    load({**environ, f"SHADOWSVC_MQTT__{missing}": file})


@pytest.mark.parametrize(
    ("variable", "switch"),
    [
        ("SHADOWSVC_MQTT__CA_FILE", "SHADOWSVC_MQTT__URL"),
        ("SHADOWSVC_CASSANDRA__CA_FILE", "SHADOWSVC_CASSANDRA__TLS"),
    ],
)
def test_tls_files_without_tls_are_a_mistake_since_nothing_would_be_encrypted(
    tmp_path: Path, variable: str, switch: str
) -> None:
    assert switch in mistake({variable: str(write(tmp_path / "ca.pem", "x"))})


@pytest.mark.parametrize(
    ("environ", "other"),
    [
        ({"SHADOWSVC_MQTT__RECONNECT_MIN_SECONDS": "31"}, "SHADOWSVC_MQTT__RECONNECT_MAX_SECONDS"),
        ({"SHADOWSVC_MQTT__RECONNECT_MAX_SECONDS": "0.1"}, "SHADOWSVC_MQTT__RECONNECT_MIN_SECONDS"),
        ({"SHADOWSVC_CASSANDRA__RETRY_MIN_SECONDS": "6"}, "SHADOWSVC_CASSANDRA__RETRY_MAX_SECONDS"),
        ({"SHADOWSVC_CASSANDRA__MIN_CONCURRENCY": "33"}, "SHADOWSVC_CASSANDRA__CONCURRENCY"),
        (
            {"SHADOWSVC_MQTT__MAXIMUM_PACKET_SIZE_BYTES": "65535"},
            "SHADOWSVC_SHADOW__MAX_PAYLOAD_BYTES",
        ),
        ({"SHADOWSVC_SHADOW__MAX_PAYLOAD_BYTES": "2000000"}, "MAXIMUM_PACKET_SIZE_BYTES"),
        ({"SHADOWSVC_CASSANDRA__USERNAME": "me"}, "SHADOWSVC_CASSANDRA__PASSWORD"),
        ({"SHADOWSVC_CANARY__TIMEOUT_SECONDS": "9"}, "SHADOWSVC_CANARY__INTERVAL_SECONDS"),
        ({"SHADOWSVC_CANARY__INTERVAL_SECONDS": "0.2"}, "SHADOWSVC_CANARY__TIMEOUT_SECONDS"),
        ({"SHADOWSVC_CASSANDRA__PASSWORD": SECRET}, "SHADOWSVC_CASSANDRA__USERNAME"),
    ],
)
def test_a_broken_rule_between_two_settings_is_one_mistake_that_names_both(
    environ: dict[str, str], other: str
) -> None:
    line = mistake(environ)
    assert next(iter(environ)) in line
    assert other in line


def test_a_rule_between_settings_keeps_quiet_when_one_of_them_is_wrong_in_itself() -> None:
    line = mistake(
        {
            "SHADOWSVC_MQTT__RECONNECT_MIN_SECONDS": "60",
            "SHADOWSVC_MQTT__RECONNECT_MAX_SECONDS": "long",
        }
    )
    assert line.startswith("SHADOWSVC_MQTT__RECONNECT_MAX_SECONDS: got 'long'")


def test_run_needs_a_data_centre_and_no_client_id() -> None:
    lines = require_for_run(load({}))
    assert [line.partition(":")[0] for line in lines] == ["SHADOWSVC_CASSANDRA__LOCAL_DC"]
    assert require_for_run(load({"SHADOWSVC_CASSANDRA__LOCAL_DC": "dc1"})) == []


@pytest.mark.parametrize(
    ("given", "variable", "words"),
    [
        ({"SLOTS__RENEW_SECONDS": "30"}, "SLOTS__RENEW_SECONDS", "not below"),
        ({"SLOTS__ORPHAN_AFTER_SECONDS": "30"}, "SLOTS__ORPHAN_AFTER_SECONDS", "not above"),
        (
            {"MQTT__SESSION_EXPIRY_SECONDS": "300"},
            "SLOTS__ORPHAN_AFTER_SECONDS",
            "SHADOWSVC_MQTT__SESSION_EXPIRY_SECONDS",
        ),
        ({"MQTT__SHARE_GROUP": "g" * 126}, "MQTT__SHARE_GROUP", "longer than a client id's 128"),
        ({"SLOTS__MARKER_TOPIC": "things/m"}, "SLOTS__MARKER_TOPIC", "where devices publish"),
        ({"SLOTS__MARKER_TOPIC": "things"}, "SLOTS__MARKER_TOPIC", "where devices publish"),
    ],
)
def test_rules_of_slots_hold_unless_the_client_id_is_given(
    given: dict[str, str], variable: str, words: str
) -> None:
    environ = {f"SHADOWSVC_{name}": value for name, value in given.items()}
    line = mistake(environ)
    assert line.startswith(f"SHADOWSVC_{variable}: ")
    assert words in line
    assert load({**environ, "SHADOWSVC_MQTT__CLIENT_ID": "mine"}).mqtt.client_id == "mine"


@pytest.mark.parametrize("topic", ["a/+", "a/#", "$a", "a/", "a\x00"])
def test_a_marker_topic_is_one_that_names_can_be_appended_to(topic: str) -> None:
    line = mistake({"SHADOWSVC_SLOTS__MARKER_TOPIC": topic})
    assert line.startswith("SHADOWSVC_SLOTS__MARKER_TOPIC: ")


def test_a_renewal_that_may_not_fail_once_is_advised_against() -> None:
    [line] = advice(load({"SHADOWSVC_SLOTS__RENEW_SECONDS": "20"}))
    assert line.startswith("SHADOWSVC_SLOTS__RENEW_SECONDS: ")


def test_what_run_needs_is_told_together_with_the_other_mistakes_and_never_twice() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"SHADOWSVC_MQTT__CLIENT_ID": "\x01"}, needs=require_for_run)
    assert [line.partition(":")[0] for line in caught.value.mistakes] == [
        "SHADOWSVC_MQTT__CLIENT_ID",
        "SHADOWSVC_CASSANDRA__LOCAL_DC",
    ]


def test_described_settings_load_to_the_same_settings_but_for_secrets() -> None:
    environ = {
        "SHADOWSVC_MQTT__CLIENT_ID": "a",
        "SHADOWSVC_CASSANDRA__CONTACT_POINTS": "a,b",
        "SHADOWSVC_CASSANDRA__LINGER_SECONDS": "0.25",
        "SHADOWSVC_CASSANDRA__MIGRATE_ON_START": "1",
    }
    settings = load(environ)
    assert load({row.variable: row.value for row in describe(settings)}) == settings


def test_secrets_are_hidden_wherever_settings_are_shown() -> None:
    settings, origins = load_with_origins({"SHADOWSVC_MQTT__PASSWORD": SECRET})
    rows = {row.variable: row for row in describe(settings, origins)}
    assert rows["SHADOWSVC_MQTT__PASSWORD"][1:] == ("****", "environment")
    assert rows["SHADOWSVC_CASSANDRA__PASSWORD"][1:] == ("", "default")
    for shown in (repr(settings), str(settings), settings.model_dump_json(), repr(rows)):
        assert SECRET not in shown


def test_memory_held_is_the_receive_maximum_full_of_the_largest_messages() -> None:
    assert worst_case_held_bytes(load({})) == 1000 * 65_536
    small = {"SHADOWSVC_SHADOW__MAX_PAYLOAD_BYTES": "1000"}
    assert worst_case_held_bytes(load(small)) == 1000 * 65_536  # dead letters are still 64 KiB
    large = {"SHADOWSVC_SHADOW__MAX_PAYLOAD_BYTES": "100000"}
    assert worst_case_held_bytes(load(large)) == 1000 * 100_000
    assert "SHADOWSVC_LIMITS__MAX_HELD_BYTES" in advice(load(large))[0]
    assert config_rules.DEAD_LETTER_PAYLOAD_BYTES == deadletter.MAX_PAYLOAD_BYTES


def test_memory_held_by_an_adoption_is_that_of_200_messages_and_none_without_slots() -> None:
    settings = load({})
    assert adopted_receive_maximum(settings) == 200
    assert worst_case_held_bytes(settings, 200) == 200 * 65_536
    assert adopted_receive_maximum(load({"SHADOWSVC_MQTT__RECEIVE_MAXIMUM": "9"})) == 9
    assert adopted_receive_maximum(load({"SHADOWSVC_MQTT__CLIENT_ID": "one"})) == 0


def test_a_packet_limit_without_room_for_topic_and_properties_gets_advice() -> None:
    (line,) = advice(load({"SHADOWSVC_MQTT__MAXIMUM_PACKET_SIZE_BYTES": str(65_536 + 65_999)}))
    assert line.startswith("SHADOWSVC_MQTT__MAXIMUM_PACKET_SIZE_BYTES: ")


def test_the_documented_table_is_the_one_that_the_tree_gives() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "configuration-table", "--check"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
