"""The local broker keeps its port, and its sessions when it is told to."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import pytest

from backing import BackingError, Mosquitto

CONNACK, PUBLISH, PUBACK, SUBACK = 0x20, 0x32, 0x40, 0x90
SESSION_EXPIRY = b"\x05\x11\x00\x00\x0e\x10"  # 3600 s


def text(value: str) -> bytes:
    return len(value).to_bytes(2, "big") + value.encode()


class Client:
    """The few packets that these tests need; a client that connects once and keeps its session."""

    def __init__(self, broker: Mosquitto, name: str, *login: str) -> None:
        self._socket = socket.create_connection((broker.host, broker.port), 5)
        self._stream = self._socket.makefile("rb")
        flags = b"\xc0" if login else b"\x00"
        body = text("MQTT") + b"\x05" + flags + b"\x00\x3c" + SESSION_EXPIRY
        self._send(0x10, body + b"".join(map(text, (name, *login))))
        self.reason = self.read(CONNACK)[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def subscribe(self, topic: str) -> None:
        self._send(0x82, b"\x00\x01\x00" + text(topic) + b"\x01")
        assert self.read(SUBACK)[-1] == 1

    def publish(self, topic: str, payload: bytes) -> None:
        self._send(PUBLISH, text(topic) + b"\x00\x01\x00" + payload)
        self.read(PUBACK)

    def read(self, kind: int) -> bytes:
        header = self._stream.read(2)
        assert header[:1] == bytes([kind])
        return self._stream.read(header[1])

    def _send(self, kind: int, body: bytes) -> None:
        self._socket.sendall(bytes([kind, len(body)]) + body)


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_persistent_broker_keeps_the_queue_of_a_session(end: str) -> None:
    with Mosquitto(persistent=True) as broker:
        with Client(broker, "member") as client:
            client.subscribe("$share/group/things/+")
        with Client(broker, "publisher") as client:
            client.publish("things/a", b"queued")
        url, pid = broker.url, broker.pid
        if end == "kill":
            broker.save()
            broker.kill()
        else:
            broker.stop()
        broker.start()
        assert broker.url == url
        assert broker.pid != pid
        with Client(broker, "member") as client:
            assert client.read(PUBLISH).endswith(b"queued")


def test_pause_leaves_the_port_open_and_silent() -> None:
    with Mosquitto() as broker:
        broker.pause()
        with socket.create_connection((broker.host, broker.port), 5) as connection:
            connection.sendall(bytes.fromhex("100d00044d5154540502000500 0000"))
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            broker.resume()
            connection.settimeout(10)
            assert connection.recv(1) == b"\x20"


def test_users_need_their_password() -> None:
    with Mosquitto(users={"device": "right"}) as broker:
        for login, reason in {("device", "right"): 0, ("device", "wrong"): 135, (): 135}.items():
            with Client(broker, "device", *login) as client:
                assert client.reason == reason


def test_a_failed_start_quotes_the_log() -> None:
    broker = Mosquitto(extra_config=["no_such_setting 1"])
    with pytest.raises(BackingError, match="no_such_setting"):
        broker.start()
    broker.close()


def test_a_temporary_folder_goes_and_a_given_one_stays(tmp_path: Path) -> None:
    with Mosquitto() as broker:
        folder = broker.folder
        assert broker.log_path.exists()
    assert not folder.exists()
    with Mosquitto(folder=tmp_path / "kept") as broker:
        assert broker.running
    assert not broker.running
    assert (tmp_path / "kept" / "mosquitto.log").exists()


def test_a_server_dies_with_its_parent_even_by_sigkill() -> None:
    script = (
        "from backing import Mosquitto; m = Mosquitto(); m.start(); "
        "print(m.pid, m.folder, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid_text, folder = parent.stdout.readline().split()
        os.kill(int(pid_text), 0)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid_text}/stat").exists():
        state = Path(f"/proc/{pid_text}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # dead; whoever inherited it has not collected it yet
            break
        assert time.monotonic() < deadline, "the broker outlived its parent"
        time.sleep(0.05)
    for path in Path(folder).iterdir():
        path.unlink()
    Path(folder).rmdir()
