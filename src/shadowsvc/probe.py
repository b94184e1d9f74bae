"""Ask the running service how it is, for `shadowsvc probe`.

Lives here: the request and where to send it. Rules: standard library only and no settings tree,
since a probe starts every few seconds beside the service it shares a CPU with; one time limit for
all of it. Must not come in: what the answers mean (the service decides by the status).
"""

from __future__ import annotations

import os
import socket
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from shadowsvc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEFAULT_HOST", "DEFAULT_PORT", "PATHS", "Answer", "ask", "url_of"]

PATHS = {"live": "/livez", "ready": "/readyz"}
DEFAULT_HOST = "0.0.0.0"  # noqa: S104 - as in `shadowsvc.settings.Http`; a test compares them
DEFAULT_PORT = 8080

_HOST_VARIABLE = "SHADOWSVC_HTTP__HOST"
_PORT_VARIABLE = "SHADOWSVC_HTTP__PORT"
_FILE_VARIABLE = "SHADOWSVC_CONFIG_FILE"
_TIMEOUT_SECONDS = 2.0
_MAX_ANSWER_BYTES = 65_536
_OK = 200
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - to be told apart


class Answer(NamedTuple):
    """What came back."""

    ok: bool
    text: str
    """The body, or why there is none."""


def url_of(
    what: str, environ: Mapping[str, str] | None = None, config_file: Path | None = None
) -> str:
    """Return where a probe (`live` or `ready`) of the service on this machine goes.

    Raises `ConfigError`.
    """
    environ = os.environ if environ is None else environ
    file = config_file or (Path(environ[_FILE_VARIABLE]) if environ.get(_FILE_VARIABLE) else None)
    branch: dict[str, object] = {}
    if file is not None:
        try:
            branch = tomllib.loads(file.read_text(encoding="utf-8")).get("http", {})
        except (OSError, ValueError):
            raise ConfigError(
                [f"{_FILE_VARIABLE} or --config: {str(file)!r} is no readable TOML file"]
            ) from None
    host = environ.get(_HOST_VARIABLE) or str(branch.get("host", DEFAULT_HOST))
    port = environ.get(_PORT_VARIABLE) or str(branch.get("port", DEFAULT_PORT))
    if not port.isdecimal() or not 1 <= int(port) <= 65_535:  # noqa: PLR2004 - TCP's own
        raise ConfigError(
            [f"{_PORT_VARIABLE}: got {port!r}; a probe needs a number from 1 to 65535, or --url"]
        )
    host = _ANY.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{PATHS[what]}"


def ask(url: str, timeout_seconds: float = _TIMEOUT_SECONDS) -> Answer:
    """Send one GET; whatever goes wrong is an answer that is not ok."""
    deadline = time.monotonic() + timeout_seconds
    try:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            return Answer(ok=False, text=f"{url!r} is not written as http://HOST:PORT/PATH")
        raw = _exchange(parts.hostname, parts.port or 80, parts.path or "/", parts.netloc, deadline)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return Answer(ok=False, text=f"no answer from {url}: {reason.lower() or 'time limit'}")
    head, _, body = raw.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].split(b" ")
    if len(status) < 2 or not status[0].startswith(b"HTTP/") or not status[1].isdigit():  # noqa: PLR2004 - HTTP/1.1 200
        return Answer(ok=False, text=f"what answered at {url} does not speak HTTP")
    text = body.decode(errors="replace").strip()
    return Answer(ok=int(status[1]) == _OK, text=text or f"status {status[1].decode()}")


def _exchange(host: str, port: int, path: str, authority: str, deadline: float) -> bytes:
    def left() -> float:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return seconds

    with socket.create_connection((host, port), timeout=left()) as connection:
        # HTTP/1.0: the answer ends with the connection and is never chunked.
        connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {authority}\r\n\r\n".encode())
        received = bytearray()
        while len(received) < _MAX_ANSWER_BYTES:
            connection.settimeout(left())
            data = connection.recv(_MAX_ANSWER_BYTES)
            if not data:
                break
            received += data
    return bytes(received)
