"""A pause over HTTP: what an operator may ask, and how it is answered.

Lives here: the paths, the bounds of what is asked, and the answers as JSON. Rules: an answer is the
state as it is now, since leaving takes its time: whoever has to know asks again. There is no
login: the port must not be reachable from outside (docs/operations.md). Must not come in: what a
pause does (`shadowsvc.pause`).

    POST /pause?seconds=N     pause, or make a pause longer: 202
    GET /pause                how far it is: 200
    DELETE /pause             end it: 202
    POST /resume              the same, for tools without DELETE
"""

from __future__ import annotations

import functools
import math
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from shadowsvc.http import Request, Response
from shadowsvc.pause import MAX_SECONDS

if TYPE_CHECKING:
    from shadowsvc.http import Route
    from shadowsvc.pause import Pause

__all__ = ["routes"]

_MIN_SECONDS = 1.0


def routes(pause: Pause, session_expiry_seconds: float) -> dict[str, Route]:
    """Return what answers; a pause has to end before the broker forgets the session."""
    longest = min(MAX_SECONDS, session_expiry_seconds / 2)

    def begin(request: Request) -> Response:
        seconds = _seconds(request.query)
        if seconds is None or not _MIN_SECONDS <= seconds <= longest:
            return _error(
                HTTPStatus.BAD_REQUEST,
                f"give ?seconds=N, from {_MIN_SECONDS:g} to {longest:g}: at most an hour, and half "
                "of SHADOWSVC_MQTT__SESSION_EXPIRY_SECONDS",
            )
        if not pause.begin(seconds):
            return _error(HTTPStatus.CONFLICT, "the service is stopping")
        return _state(pause, HTTPStatus.ACCEPTED)

    def end(_request: Request) -> Response:
        pause.end()
        return _state(pause, HTTPStatus.ACCEPTED)

    show = functools.partial(_state, pause, HTTPStatus.OK)
    return {
        "/pause": {"GET": lambda _request: show(), "POST": begin, "DELETE": end},
        "/resume": {"POST": end},
    }


def _seconds(query: str) -> float | None:
    values = [value for name, value in parse_qsl(query) if name == "seconds"]
    try:
        seconds = float(values[0]) if len(values) == 1 else math.nan
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def _state(pause: Pause, status: HTTPStatus) -> Response:
    state, left_seconds, drained = pause.status
    fields = {
        "state": state.value,
        "left_seconds": round(left_seconds, 1),
        "drained": drained,
    }
    return Response.json(status, fields)


def _error(status: HTTPStatus, text: str) -> Response:
    return Response.json(status, {"error": text})
