"""What a person or a script meets at the command line: output, exit codes, and no secret."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import pytest

from shadowsvc import cli, logs, probe
from shadowsvc.config import Settings, load
from shadowsvc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-Zx9"  # noqa: S105 - what must never be shown
GIVEN = {"SHADOWSVC_MQTT__CLIENT_ID": "a", "SHADOWSVC_CASSANDRA__LOCAL_DC": "dc1"}
COMMANDS = ["run", "migrate", "get", "check-config", "simulate", "probe", "pause"]
COMMAND = [sys.executable, "-m", "shadowsvc"]


def environ(given: dict[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHADOWSVC_")}
    kept.pop("NO_COLOR", None)
    kept.pop("FORCE_COLOR", None)
    return {**kept, "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm-256color", **(given or {})}


class Done(NamedTuple):
    """What came of a command."""

    returncode: int
    stdout: str
    stderr: str


class Shadowsvc(Protocol):
    """Runs a command."""

    def __call__(self, *arguments: str, given: dict[str, str] | None = None) -> Done: ...


@pytest.fixture
def shadowsvc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Shadowsvc]:
    """Run commands in this process, since starting one for each takes too long."""

    def run(*arguments: str, given: dict[str, str] | None = None) -> Done:
        with monkeypatch.context() as patch:
            for name in set(os.environ) - set(environ()):
                patch.delenv(name)
            for name, value in environ(given).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["shadowsvc", *arguments])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert isinstance(ended.value.code, int)
        return checked(Done(ended.value.code, *capsys.readouterr()))

    yield run
    logs.shutdown()


def from_outside(*arguments: str, given: dict[str, str] | None = None) -> Done:
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=environ(given),
        timeout=30,
        check=False,
    )
    return checked(Done(done.returncode, done.stdout, done.stderr))


def checked(done: Done) -> Done:
    assert SECRET not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr  # a pipe gets plain text
    return done


def on_terminal(*arguments: str, given: dict[str, str] | None = None) -> tuple[int, str]:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environ({"COLUMNS": "160", **(given or {})}),
    )
    os.close(follower)
    text = bytearray()
    try:
        with contextlib.suppress(OSError):  # how Linux tells the end of a terminal
            while select.select([leader], [], [], 30)[0] and (data := os.read(leader, 65_536)):
                text += data
        code = process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    return code, text.decode()


class Service(BaseHTTPRequestHandler):
    """Live, and not ready."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        ok = self.path == "/livez"
        body = b"{}" if ok else b'{"ready":false,"reasons":["schema behind"]}'
        self.send_response(200 if ok else 503)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def service_port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_help_lists_every_command_of_the_contract(shadowsvc: Shadowsvc) -> None:
    done = shadowsvc("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_shows_examples_and_the_settings_that_it_needs(
    shadowsvc: Shadowsvc,
    name: str,
) -> None:
    done = shadowsvc(name, "--help")
    assert done.returncode == 0
    assert f"\n  Examples:\n    shadowsvc {name}" in done.stdout
    assert "SHADOWSVC_" in done.stdout


def test_help_on_a_terminal_has_colours_and_keeps_the_examples() -> None:
    code, text = on_terminal("get", "--help")
    assert code == 0
    assert "\x1b[" in text
    assert "shadowsvc get lamp-7" in text


def test_the_version_is_shown(shadowsvc: Shadowsvc) -> None:
    done = shadowsvc("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("shadowsvc ")


@pytest.mark.parametrize(
    "arguments",
    [("fly",), ("get",), ("probe",), ("probe", "well"), ("pause",), ("simulate", "--qos", "2")],
)
def test_wrong_usage_ends_with_2(shadowsvc: Shadowsvc, arguments: tuple[str, ...]) -> None:
    done = shadowsvc(*arguments)
    assert done.returncode == 2
    assert "Usage: shadowsvc" in done.stderr


@pytest.mark.parametrize("name", ["run", "check-config"])
def test_bad_configuration_ends_with_2_and_one_line_a_mistake_on_standard_error(
    shadowsvc: Shadowsvc,
    name: str,
) -> None:
    done = shadowsvc(
        name,
        given={
            "SHADOWSVC_MQTT__URL": f"mqtt://u:{SECRET}@h",
            "SHADOWSVC_MQTT__PASWORD": SECRET,
        },
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == [
        "SHADOWSVC_MQTT__PASWORD",
        "SHADOWSVC_MQTT__URL",
        "SHADOWSVC_CASSANDRA__LOCAL_DC",
    ]


def test_commands_that_need_no_data_centre_ask_for_none(shadowsvc: Shadowsvc) -> None:
    done = shadowsvc("get", "lamp", given={"SHADOWSVC_CASSANDRA__PORT": "0"})
    assert done.returncode == 2
    assert "LOCAL_DC" not in done.stderr


def test_an_option_that_makes_no_sense_to_simulate_ends_with_2(shadowsvc: Shadowsvc) -> None:
    done = shadowsvc("simulate", "--families", "unicorn")
    assert done.returncode == 2
    assert done.stderr.startswith("--families unicorn: ")


def test_check_config_in_a_pipe_prints_lines_that_load_to_the_same_settings(
    shadowsvc: Shadowsvc,
) -> None:
    given = {**GIVEN, "SHADOWSVC_MQTT__KEEP_ALIVE_SECONDS": "7"}
    done = shadowsvc("check-config", given=given)
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert load(dict(line.split("=", 1) for line in lines)) == load(given)


def test_check_config_tells_the_memory_that_messages_can_hold(shadowsvc: Shadowsvc) -> None:
    done = shadowsvc("check-config", given={**GIVEN, "SHADOWSVC_MQTT__RECEIVE_MAXIMUM": "160"})
    assert "10.0 MiB of QoS 1 payloads (160 messages" in done.stdout


def test_check_config_tells_the_memory_of_an_adoption_to_those_who_make_one(
    shadowsvc: Shadowsvc,
) -> None:
    without = {name: text for name, text in GIVEN.items() if name != "SHADOWSVC_MQTT__CLIENT_ID"}
    done = shadowsvc("check-config", given=without)
    assert "An adoption holds 12.5 MiB more (200 messages)." in done.stdout
    given = {**GIVEN, "SHADOWSVC_MQTT__CLIENT_ID": "one"}
    assert "adoption" not in shadowsvc("check-config", given=given).stdout


def test_check_config_gives_advice_on_standard_error_and_succeeds(shadowsvc: Shadowsvc) -> None:
    done = shadowsvc("check-config", given={**GIVEN, "SHADOWSVC_CASSANDRA__CONSISTENCY": "ONE"})
    assert done.returncode == 0
    assert done.stderr.startswith("advice: SHADOWSVC_CASSANDRA__CONSISTENCY: ")


def test_check_config_on_a_terminal_is_a_table_with_origins_and_hidden_secrets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would be broken into lines
    Path("x.toml").write_text(f"[mqtt]\npassword = '{SECRET}'\n", encoding="utf-8")
    code, text = on_terminal("--config", "x.toml", "check-config", given=GIVEN)
    assert code == 0
    assert "\x1b[" in text
    assert "environment" in text
    assert "x.toml" in text
    assert "****" in text
    assert SECRET not in text
    assert "SHADOWSVC_DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE" in text  # none is cut


def test_the_settings_file_of_the_command_line_is_used(
    shadowsvc: Shadowsvc, tmp_path: Path
) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[http]\nport = 1234\n", encoding="utf-8")
    done = shadowsvc("--config", str(file), "check-config", given=GIVEN)
    assert "SHADOWSVC_HTTP__PORT=1234" in done.stdout.splitlines()


def test_no_color_is_honoured_on_a_terminal() -> None:
    code, text = on_terminal("check-config", given={"NO_COLOR": "1"})
    assert code == 2
    assert "\x1b[3" not in text
    code, text = on_terminal("check-config")
    assert code == 2
    assert "\x1b[31m" in text


def test_a_closed_pipe_ends_the_output_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, "check-config"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environ(GIVEN),
        timeout=30,
        check=False,
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 1


def test_ctrl_c_ends_with_130_and_no_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        process = subprocess.Popen(
            [*COMMAND, "probe", "live", "--url", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ(),
        )
        connection, _ = server.accept()  # it waits for an answer now
        with connection:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err.strip()) == (b"", b"")


def test_no_cassandra_is_one_line_that_names_the_setting_and_ends_with_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = from_outside("get", "lamp", given={"SHADOWSVC_CASSANDRA__PORT": str(port)})
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "SHADOWSVC_CASSANDRA__CONTACT_POINTS" in line


def test_probe_finds_the_service_by_its_settings(shadowsvc: Shadowsvc, service_port: int) -> None:
    given = {"SHADOWSVC_HTTP__PORT": str(service_port), "SHADOWSVC_HTTP__HOST": "127.0.0.1"}
    done = shadowsvc("probe", "live", given=given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "live\n", "")
    done = shadowsvc("probe", "ready", given=given)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == '{"ready":false,"reasons":["schema behind"]}\n'


def test_probe_imports_no_settings_tree_and_no_driver(service_port: int) -> None:
    code = (
        "import sys\n"
        "from shadowsvc.cli import main\n"
        f"url = 'http://127.0.0.1:{service_port}/livez'\n"
        "sys.argv = ['shadowsvc', 'probe', 'live', '--url', url]\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'pydantic_settings', 'structlog', 'acsylla', 'cassandra', 'asyncio'}\n"
        "    print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environ(),
        timeout=30,
        check=True,
    )
    assert done.stdout == "live\n[]\n"


@pytest.mark.parametrize(
    ("given", "file", "expected"),
    [
        ({}, "", "http://127.0.0.1:8080/livez"),
        ({"SHADOWSVC_HTTP__HOST": "::"}, "", "http://[::1]:8080/livez"),
        ({"SHADOWSVC_HTTP__HOST": "10.0.0.7"}, "", "http://10.0.0.7:8080/livez"),
        ({}, "[http]\nport = 99\nhost = '127.0.0.2'", "http://127.0.0.2:99/livez"),
        ({"SHADOWSVC_HTTP__PORT": "98"}, "[http]\nport = 99", "http://127.0.0.1:98/livez"),
    ],
)
def test_a_probe_goes_where_the_service_listens(
    tmp_path: Path, given: dict[str, str], file: str, expected: str
) -> None:
    (tmp_path / "x.toml").write_text(file, encoding="utf-8")
    assert probe.url_of("live", given, tmp_path / "x.toml") == expected
    variable = {"SHADOWSVC_CONFIG_FILE": str(tmp_path / "x.toml")}
    assert probe.url_of("live", {**given, **variable}) == expected


def test_the_defaults_of_a_probe_are_those_of_the_settings() -> None:
    http = Settings().http
    assert (http.host, http.port) == (probe.DEFAULT_HOST, probe.DEFAULT_PORT)


@pytest.mark.parametrize("port", ["0", "x", "70000"])
def test_a_port_that_cannot_be_asked_is_a_mistake_that_names_the_variable(port: str) -> None:
    with pytest.raises(ConfigError, match=r"^SHADOWSVC_HTTP__PORT: got "):
        probe.url_of("ready", {"SHADOWSVC_HTTP__PORT": port})


def test_a_settings_file_that_cannot_be_read_is_a_mistake_of_a_probe(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[", encoding="utf-8")
    for name in ("x.toml", "nowhere.toml"):
        with pytest.raises(ConfigError, match="SHADOWSVC_CONFIG_FILE or --config"):
            probe.url_of("ready", {}, tmp_path / name)


def test_a_service_that_does_not_answer_in_time_is_not_ready(silent_port: int) -> None:
    answer = probe.ask(f"http://127.0.0.1:{silent_port}/readyz", timeout_seconds=0.1)
    assert not answer.ok
    assert "timed out" in answer.text


@pytest.mark.parametrize("response", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 ???\r\n\r\n", b"\xff" * 99])
def test_what_does_not_speak_http_is_not_ready(response: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_once() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(response)

        thread = threading.Thread(target=answer_once)
        thread.start()
        answer = probe.ask(f"http://127.0.0.1:{server.getsockname()[1]}/readyz")
        thread.join()
    assert not answer.ok
    assert "does not speak HTTP" in answer.text


@pytest.mark.parametrize("url", ["https://x/", "127.0.0.1:80", "http://", "http://x:port/"])
def test_a_bad_url_of_a_probe_is_not_ready(url: str) -> None:
    assert not probe.ask(url).ok
