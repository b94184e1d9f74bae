"""mosquitto as a local process, with a configuration that we write.

Its limits on messages in flight and queued are lifted, as the production broker's are, so that a
test that loses a message has found something. Persistence is off unless asked for: without it a
restart forgets sessions and queues. Everything it writes lies in one folder.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from backing.errors import BackingError
from backing.ports import free_port
from backing.process import ServerProcess, find_program

_CONNECT_LIMIT_SECONDS = 1.0
# Debian puts servers where the PATH of an ordinary user does not look.
_SBIN = ("/usr/local/sbin", "/usr/sbin")


@dataclass(frozen=True, slots=True)
class ListenerTls:
    """Certificates of the MQTT listener, PEM files.

    `ca` is what client certificates are checked against; a client must present one when
    `require_client_certificate` is set.
    """

    certificate: Path
    key: Path
    ca: Path | None = None
    require_client_certificate: bool = False


def broker_settings(
    persistence_folder: str | None, *, autosave_interval: int, autosave_on_changes: bool
) -> list[str]:
    """Return the lines of mosquitto.conf(5) that do not concern listeners and users.

    Args:
        persistence_folder: where to keep sessions and queues; in memory alone when None.
        autosave_interval: as `Mosquitto` has it.
        autosave_on_changes: as `Mosquitto` has it.
    """
    lines = [
        "log_dest stdout",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        "max_inflight_messages 0",
        "max_queued_messages 0",
        "set_tcp_nodelay true",
    ]
    if persistence_folder is None:
        return [*lines, "persistence false"]
    return [
        *lines,
        "persistence true",
        f"persistence_location {persistence_folder}/",
        f"autosave_interval {autosave_interval}",
        f"autosave_on_changes {'true' if autosave_on_changes else 'false'}",
    ]


class Mosquitto:
    """A broker on the loopback; keeps its port and its folder over restarts.

    Args:
        folder: where configuration, log and stored sessions lie; a temporary one, removed by
            `close`, when None.
        host: address to listen on.
        port: MQTT port; a free one when None.
        websockets: whether to listen for MQTT over WebSocket too, on `websockets_port`.
        users: user names and passwords; anybody may connect when None.
        tls: serve TLS on the MQTT port.
        persistent: keep sessions and queues in a file over `stop` and `start`.
        autosave_interval: seconds between two saves of that file (the broker's clock is a second),
            or changes between two saves with `autosave_on_changes`. What came after the last save
            is lost by `kill`.
        autosave_on_changes: count changes instead of seconds.
        extra_config: further lines of mosquitto.conf(5).
    """

    steerable = True

    def __init__(
        self,
        *,
        folder: Path | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        websockets: bool = False,
        users: Mapping[str, str] | None = None,
        tls: ListenerTls | None = None,
        persistent: bool = False,
        autosave_interval: int = 1,
        autosave_on_changes: bool = False,
        extra_config: Sequence[str] = (),
    ) -> None:
        self._program = find_program("mosquitto", package="mosquitto", folders=_SBIN)
        self._own_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="shadowsvc-mosquitto-"))
        self.host = host
        self.port = free_port((host,)) if port is None else port
        self.websockets_port = free_port((host,)) if websockets else None
        self._users = users
        self._tls = tls
        self._persistent = persistent
        self._autosave_interval = autosave_interval
        self._autosave_on_changes = autosave_on_changes
        self._extra_config = tuple(extra_config)
        config = self.folder / "mosquitto.conf"
        self._process = ServerProcess(
            "mosquitto",
            [self._program, "-c", str(config)],
            log_path=self.folder / "mosquitto.log",
            cwd=self.folder,
        )
        self._config_path = config

    @property
    def url(self) -> str:
        """Address for clients, `mqtt://host:port` or `mqtts://host:port`."""
        return f"{'mqtt' if self._tls is None else 'mqtts'}://{self.host}:{self.port}"

    @property
    def websockets_url(self) -> str:
        """Address for clients over WebSocket.

        Raises:
            BackingError: made without `websockets`.
        """
        if self.websockets_port is None:
            raise BackingError("this mosquitto has no WebSocket listener: pass websockets=True")
        return f"ws://{self.host}:{self.websockets_port}/mqtt"

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process.running

    @property
    def log_path(self) -> Path:
        """Log of all starts."""
        return self._process.log_path

    def start(self, limit_seconds: float = 10.0) -> None:
        """Write the configuration, start, and wait until it accepts connections on its ports.

        Raises:
            BackingError: it runs already or did not come up within `limit_seconds`.
        """
        self._write_config()
        self._process.start()
        try:
            self.wait_ready(limit_seconds)
        except BaseException:
            self._process.kill()
            raise

    def wait_ready(self, limit_seconds: float = 10.0) -> None:
        """Wait until the port accepts a connection, and `websockets_port` if there is one.

        Raises:
            BackingError: not within `limit_seconds`, or the process ended.
        """
        self._process.wait_ready(self._accepts, limit_seconds)

    def save(self, limit_seconds: float = 10.0) -> None:
        """Write sessions and queues to the file now.

        Raises:
            BackingError: not `persistent`, not running, or not done within `limit_seconds`.
        """
        if not self._persistent:
            raise BackingError("this mosquitto keeps nothing: pass persistent=True")
        before = self._saved_state()
        self._process.signal(signal.SIGUSR1)  # mosquitto(8)
        self._process.wait_ready(lambda: self._saved_state() != before, limit_seconds)

    def stop(self, limit_seconds: float = 10.0) -> None:
        """End with SIGTERM: clients get a DISCONNECT, sessions are saved if `persistent`."""
        self._process.stop(limit_seconds)

    def kill(self) -> None:
        """End with SIGKILL: nothing is saved, clients see their connection closed.

        Even with `autosave_on_changes=True` and interval 1 the broker answers a PUBLISH some
        milliseconds before it saves. A test that counts on what the broker has calls `save` first.
        """
        self._process.kill()

    def restart(self) -> None:
        """`stop`, then `start` on the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze: connections stay open and silent."""
        self._process.pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self._process.resume()

    def cpu_seconds(self) -> float:
        """CPU time used since the last start."""
        return self._process.cpu_seconds()

    def close(self) -> None:
        """`stop`, and remove the folder if it is a temporary one."""
        self.stop()
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        if not self.running:
            try:
                self.start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _saved_state(self) -> tuple[int, int]:
        try:
            status = (self.folder / "mosquitto.db").stat()
        except FileNotFoundError:
            return (0, 0)
        return (status.st_ino, status.st_mtime_ns)

    def _accepts(self) -> bool:
        # The listeners are opened one after another.
        ports = (self.port, *([] if self.websockets_port is None else [self.websockets_port]))
        try:
            for port in ports:
                with socket.create_connection((self.host, port), _CONNECT_LIMIT_SECONDS):
                    pass
        except OSError:
            return False
        return True

    def _write_config(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            *broker_settings(
                str(self.folder) if self._persistent else None,
                autosave_interval=self._autosave_interval,
                autosave_on_changes=self._autosave_on_changes,
            ),
            *self._user_lines(),
            f"listener {self.port} {self.host}",
            *self._tls_lines(),
        ]
        if self.websockets_port is not None:
            lines += [f"listener {self.websockets_port} {self.host}", "protocol websockets"]
        self._config_path.write_text("\n".join([*lines, *self._extra_config]) + "\n")

    def _user_lines(self) -> list[str]:
        # Started by root it would become the user mosquitto, who cannot write into our folder; and
        # the change of user would undo "die with the parent".
        lines = ["user root"] if os.geteuid() == 0 else []
        if self._users is None:
            return [*lines, "allow_anonymous true"]
        path = self.folder / "passwords"
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        program = find_program("mosquitto_passwd", package="mosquitto", folders=_SBIN)
        for user, password in self._users.items():
            done = subprocess.run(
                [program, "-b", str(path), user, password],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise BackingError(f"mosquitto_passwd refuses user {user!r}: {done.stderr.strip()}")
        return [*lines, "allow_anonymous false", f"password_file {path}"]

    def _tls_lines(self) -> list[str]:
        if self._tls is None:
            return []
        lines = [f"certfile {self._tls.certificate}", f"keyfile {self._tls.key}"]
        if self._tls.ca is not None:
            lines.append(f"cafile {self._tls.ca}")
        if self._tls.require_client_certificate:
            lines.append("require_certificate true")
        return lines
