"""Ask a running service to pause, or to come back, for `shadowsvc pause`.

Lives here: the requests, and the waiting until it has left. Rules: standard library only; every
request and every wait has a limit; what the service answers is shown to people as words, never
trusted to be well-formed. Must not come in: what the answers mean to the service
(`shadowsvc.pause_page`).
"""

from __future__ import annotations

import http.client
import json
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shadowsvc import probe
from shadowsvc.errors import PauseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["pause", "resume", "url_of"]

_REQUEST_SECONDS = 5.0
_POLL_SECONDS = 0.2
_MAX_ANSWER_BYTES = 65_536
_MAX_SHOWN = 300


def url_of(environ: Mapping[str, str] | None = None, config_file: Path | None = None) -> str:
    """Return where the service on this machine listens. Raises `ConfigError`."""
    return probe.url_of("live", environ, config_file).removesuffix(probe.PATHS["live"])


def pause(url: str, seconds: float, limit_seconds: float, tell: Callable[[str], None]) -> None:
    """Let the service at `url` (`http://HOST:PORT`) leave for `seconds`; wait until it has left.

    Leaving takes as long as a stop does at most (`SHADOWSVC_LIMITS__DRAIN_TIMEOUT_SECONDS` of the
    service). Raises `PauseFailed`.
    """
    state = _ask(url, "POST", f"/pause?seconds={seconds:g}")
    state = _wait(url, state, "away", limit_seconds)
    kept = (
        "all that it held is durable and acknowledged"
        if state.get("drained") is True
        else "what it could not write waits in the broker"
    )
    tell(f"left the broker, {kept}; it comes back in {state.get('left_seconds')} s")


def resume(url: str, limit_seconds: float, tell: Callable[[str], None]) -> None:
    """Let the service at `url` come back now. Raises `PauseFailed`."""
    _wait(url, _ask(url, "POST", "/resume"), "off", limit_seconds)
    tell("no pause; `shadowsvc probe ready` tells when it has joined the share again")


def _wait(url: str, state: dict[str, Any], wanted: str, limit_seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + limit_seconds
    while state.get("state") != wanted:
        if state.get("state") == "off":
            raise PauseFailed(f"{url} has come back already: somebody ended the pause")
        if time.monotonic() >= deadline:
            raise PauseFailed(
                f"{url} is still {str(state.get('state'))[:_MAX_SHOWN]!r} after "
                f"{limit_seconds:g} s, not {wanted!r}"
            )
        time.sleep(_POLL_SECONDS)
        state = _ask(url, "GET", "/pause")
    return state


def _ask(url: str, method: str, target: str) -> dict[str, Any]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or port == 0 or parts.path not in {"", "/"}:
        raise PauseFailed(f"{url!r} is not written as http://HOST:PORT")
    connection = http.client.HTTPConnection(parts.hostname, port or 80, timeout=_REQUEST_SECONDS)
    try:
        connection.request(method, target)
        answer = connection.getresponse()
        body = answer.read(_MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise PauseFailed(f"no answer from {url}: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()
    try:
        fields = json.loads(body)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise PauseFailed(f"what answered at {url} is no shadowsvc (status {answer.status})")
    if answer.status >= HTTPStatus.BAD_REQUEST:
        raise PauseFailed(f"{url} refused: {str(fields.get('error'))[:_MAX_SHOWN]}")
    return fields
