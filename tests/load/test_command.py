"""The rig's commands as a person and a parent process use them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest

import backing
import load.record
from load.arguments import password_of
from load.command import main
from load.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)

_LIMIT_SECONDS = 40.0


@pytest.fixture(scope="module")
def mosquitto() -> Iterator[backing.Mosquitto]:
    with backing.Mosquitto(websockets=True) as broker:
        yield broker


class Command:
    """`python -m load` in a process of its own; ended with the test."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "load", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        )
        self._watchdog = threading.Timer(_LIMIT_SECONDS, self._process.kill)

    def __enter__(self) -> Self:
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.communicate()

    def say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def hear(self, **wanted: Any) -> dict[str, Any]:
        """Return the next JSON line that has all of these."""
        assert self._process.stdout is not None
        for text in self._process.stdout:
            said: dict[str, Any] = json.loads(text)
            if all(said.get(name) == value for name, value in wanted.items()):
                return said
        raise AssertionError(f"ended without {wanted}: {self._process.communicate()[1]}")

    def hear_no_more(self) -> None:
        """Close the pipe of its standard output, as `head` does when it ends."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.stdout = None

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        out, err = self._process.communicate(timeout=_LIMIT_SECONDS)
        return self._process.returncode, out, err


def names(unique: str) -> list[str]:
    return [f"--client-id={unique}-{{number}}", f"--topic={unique}/{{client_id}}/shadow/update"]


def test_a_parent_steers_a_run_and_gets_its_report(
    mosquitto: backing.Mosquitto, unique: str, tmp_path: Path
) -> None:
    to_file = tmp_path / "report.json"
    options = ["--control", "--connections=12", "--shape=plateau:600", "--alone"]
    options += ["--progress=json", f"--json={to_file}", *names(unique)]
    with Command("lean", mosquitto.websockets_url, *options) as lean:
        assert lean.hear(event="progress")["connected"] == 0
        lean.say("connections 12")
        lean.hear(connected=12)
        lean.say("phase loud")
        lean.say("nonsense")
        lean.say("publish-rate 100")
        assert lean.hear(phase="loud", wanted=12)["cpu_share"] < 50
        lean.hear(phase="loud", missing=0)
        lean.say("stop")
        report = lean.hear(event="report")
        code, _, complaints = lean.end()
    assert code == 0
    assert complaints == "not understood: nonsense \n"
    assert report["published"] == report["acknowledged"] > 0
    assert [one["name"] for one in report["phases"]] == ["plateau", "loud", "end"]
    assert report["interrupted"]
    written = json.loads(to_file.read_text())
    assert {**written, "event": "report"} == report


def test_ctrl_c_ends_a_run_and_still_reports(mosquitto: backing.Mosquitto, unique: str) -> None:
    options = ["--seconds=0", "--connections=5", "--publish-rate=50", "--alone"]
    with Command("lean", mosquitto.url, *options, "--progress=json", *names(unique)) as lean:
        lean.hear(connected=5)
        lean.interrupt()
        report = lean.hear(event="report")
        assert lean.end()[0] == 0
    assert report["interrupted"]
    assert report["missing"] == 0
    assert report["whole"]["connected"] == 5


def test_a_second_ctrl_c_waits_for_no_answer(unique: str) -> None:
    with backing.Mosquitto() as broker:
        options = ["--seconds=0", "--connections=5", "--publish-rate=50", "--drain=600", "--alone"]
        with Command("lean", broker.url, *options, "--progress=json", *names(unique)) as lean:
            lean.hear(connected=5)
            broker.pause()
            lean.interrupt()
            lean.hear(phase="end")
            lean.interrupt()
            report = lean.hear(event="report")
            code = lean.end()[0]
            broker.resume()
    assert report["interrupted"]
    assert code == (1 if report["unanswered"] else 0)


def test_in_a_pipe_there_are_plain_lines_a_summary_and_a_page(
    mosquitto: backing.Mosquitto, unique: str, tmp_path: Path
) -> None:
    to_file = tmp_path / "report.html"
    options = ["--seconds=2", "--connections=5", "--publish-rate=50", *names(unique)]
    options.append(f"--html={to_file}")
    with Command("lean", mosquitto.url, *options) as lean:
        code, out, err = lean.end()
    assert code == 1, "nobody was subscribed"
    assert "\x1b" not in out + err
    assert "5 of 5 up" in err
    assert "MISSING" in out
    assert "taken without a subscriber" in out
    assert "PUBACK p50/p99" in out
    shown = to_file.read_text()
    assert shown.count("<svg") == shown.count("</svg>") >= 5
    assert "MISSING" in shown
    assert f"--html={to_file}" in shown


def test_strict_fails_when_the_rig_is_the_bottleneck(
    mosquitto: backing.Mosquitto, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("load.report.MAX_LATENESS_SECONDS", 0.0)
    arguments = ["lean", mosquitto.url, "--seconds=1.5", "--connections=2", "--progress=none"]
    assert main([*arguments, *names(unique), "--strict"]) == 3
    assert main([*arguments, *names(unique)]) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["lean", "http://there"], "target 'http://there': mqtt://HOST:PORT"),
        (["lean", "mqtt://there", "--shape=up"], "stage 'up'"),
        (["lean", "mqtt://there", "--families=toaster"], "family 'toaster'"),
        (["lean", "mqtt://there", "--as-recorded"], "--as-recorded needs --replay"),
        (["lean", "mqtt://there", "--connect-rate=0"], "--connect-rate 0: above 0"),
        (["lean", "mqtt://there", "--connect-rate=inf"], "--connect-rate inf: above 0"),
        (["lean", "mqtt://there", "--connections=-1"], "--connections, --publish-rate: 0 or more"),
        (["lean", "mqtt://there", "--publish-rate=nan"], "--connections, --publish-rate: 0 or"),
        (["lean", "mqtts://there", "--tls-ca=/absent"], "--tls-ca /absent"),
        (["lean", "mqtt://there", "--password-file=/absent"], "--password-file /absent"),
        (["lean", "mqtt://there", "--journal=/absent/x"], "--journal /absent/x"),
        (["check", "/absent"], "/absent is no journal"),
        (["check", "--username=me", "x"], "--username needs --password-file"),
        (["record", "mqtt://127.0.0.1:1", "/dev/null"], "mqtt://127.0.0.1:1"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert complaint in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["observe", "127.0.0.1:1", f"--port={port}"]) == 2
    assert f"--port {port}: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_report_that_cannot_be_written_is_told_all_the_same(
    mosquitto: backing.Mosquitto, unique: str, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    arguments = ["lean", mosquitto.url, "--seconds=0.5", "--connections=2", "--progress=none"]
    assert main([*arguments, *names(unique), f"{option}=/absent/report"]) == 2
    out, err = capsys.readouterr()
    assert f"{option} /absent/report: " in err
    assert "PUBACK p50/p99" in out


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\nnot this\n"])
def test_a_password_is_the_first_line_however_it_ends(tmp_path: Path, end: bytes) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"secret" + end)
    assert password_of(file) == b"secret"


@pytest.mark.parametrize("command", ["lean", "observe", "check", "record"])
def test_help_names_every_option_and_gives_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 100 for line in out.splitlines())
    if command == "lean":
        for part in ("examples:", "--shape", "skipped", "publish-rate N", "exit code"):
            assert part in out


def test_what_is_recorded_can_be_played(
    mosquitto: backing.Mosquitto, unique: str, tmp_path: Path
) -> None:
    path = tmp_path / "recording"
    with Command("record", mosquitto.websockets_url, str(path), f"--filter={unique}/#") as record:
        options = ["--connections=3", "--publish-rate=30", "--seconds=600", "--progress=json"]
        # Without a subscriber a publish is refused: so it shows when the recorder is there.
        with Command("lean", mosquitto.url, *options, *names(unique)) as lean:
            for _ in range(30):
                if lean.hear(event="progress")["acknowledged"] > 30:
                    break
            lean.say("ignored without --control")
            lean.interrupt()
            report = lean.hear(event="report")
        record.interrupt()
        code, out, _ = record.end()
    assert code == 0
    replay = Replay.load(path)
    assert replay.devices == 3
    assert f"{report['acknowledged']:,} messages" in out


def test_a_broker_that_never_answers_ends_the_recording(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.record, "_CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert main(["record", f"mqtt://127.0.0.1:{port}", "/dev/null"]) == 2
    assert "no answer" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_the_run_without_a_complaint(
    mosquitto: backing.Mosquitto, unique: str
) -> None:
    options = ["--connections=2", "--seconds=600", "--progress=json"]
    with Command("lean", mosquitto.url, *options, *names(unique)) as lean:
        lean.hear(event="progress")
        lean.hear_no_more()
        code, _, err = lean.end()
    assert (code, err) == (1, "")


def test_the_observer_says_where_it_listens_and_what_it_saw(mosquitto: backing.Mosquitto) -> None:
    arguments = [f"127.0.0.1:{mosquitto.port}", "--progress=json", "--control"]
    with Command("observe", *arguments) as observer:
        port = observer.hear(event="listening")["port"]
        with Command("record", f"mqtt://127.0.0.1:{port}", "/dev/null", "--seconds=1.5") as record:
            assert record.end()[0] == 0
        observer.say("phase second")
        assert observer.hear(event="progress", phase="second")["durable"] == 0
        observer.interrupt()
        report = observer.hear(event="report")
        assert observer.end()[0] == 0
    assert [one["name"] for one in report["phases"]] == ["observing", "second"]
    assert report["phases"][0]["connected"] == 1
