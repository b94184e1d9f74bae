"""`shadowsvc ingress` as a process: its tasks, its HTTP pages; and `--print`.

Lives here: composition. Rules: SIGTERM ends a HAProxy that we started softly, within the time limit
of a stop, and leaves anybody else's alone; `/livez` is about this process only, since HAProxy goes
on without it. Must not come in: decisions about configurations.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import uvloop

from shadowsvc import http, process
from shadowsvc.ingress import certificates
from shadowsvc.ingress.api import Slices, connect
from shadowsvc.ingress.certificates import Certificates
from shadowsvc.ingress.metrics import IngressExposition, IngressMetrics
from shadowsvc.ingress.render import max_connections, render
from shadowsvc.ingress.supervise import Files, Supervisor, read_template

if TYPE_CHECKING:
    from shadowsvc.ingress.model import Broker
    from shadowsvc.settings import Ingress, Settings

__all__ = ["render_once", "run"]

_log = structlog.get_logger(__name__)


def run(settings: Settings) -> int:
    """Keep HAProxy in step until a signal; return the exit code."""
    return process.run(functools.partial(_main, settings))


def render_once(settings: Settings) -> str:
    """Return the configuration for the brokers as the API names them now.

    Nothing is written, and HAProxy's program is not needed.

    Raises:
        ConfigError: no way to the API is known.
        KubernetesUnavailable: the API does not answer.
        Refused: the template or HAProxy's check; the message has the reason.
    """
    return uvloop.run(_render_once(settings.ingress))


async def _render_once(settings: Ingress) -> str:
    client = connect(settings)
    try:
        brokers = await Slices(
            settings, client, IngressMetrics(), lambda _: None, now=time.monotonic
        ).list()
    finally:
        await client.aclose()
    return await asyncio.to_thread(_text, settings, brokers)


def _text(settings: Ingress, brokers: tuple[Broker, ...]) -> str:
    found = Certificates()
    if settings.certificate_directory is not None:
        with tempfile.TemporaryDirectory() as folder:
            found = certificates.gather(settings.certificate_directory, Path(folder))
    return render(
        settings,
        brokers,
        read_template(settings.template_file),
        connections=max_connections(settings, _max_files()),
        certificates=found.files,
        certificate_directory=Files(settings.directory).certificates,
    ).text


def _max_files() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if hard == resource.RLIM_INFINITY else hard


async def _main(settings: Settings, stop: asyncio.Event) -> None:
    metrics = IngressMetrics()
    ingress = settings.ingress
    supervisor = Supervisor(ingress, metrics, connections=max_connections(ingress, _max_files()))
    client = connect(ingress)
    slices = Slices(ingress, client, metrics, supervisor.brokers_changed, now=time.monotonic)
    pages = _Pages(supervisor, metrics)
    server = await http.serve(settings.http.host, settings.http.port, pages.routes())
    _log.info("ingress", http_port=server.port, directory=str(ingress.directory))
    tasks = [
        asyncio.create_task(slices.run(), name="endpoint slices"),
        asyncio.create_task(supervisor.run(), name="haproxy supervisor"),
    ]
    waiting = asyncio.create_task(stop.wait(), name="signals")
    try:
        done, _ = await asyncio.wait((*tasks, waiting), return_when=asyncio.FIRST_COMPLETED)
        for task in done - {waiting}:
            task.result()  # an error of ours: end with it
    finally:
        for task in (*tasks, waiting):
            task.cancel()
        await asyncio.gather(*tasks, waiting, return_exceptions=True)
        await supervisor.stop(settings.limits.drain_timeout_seconds)
        await client.aclose()
        await server.close()


class _Pages:
    """What others see."""

    def __init__(self, supervisor: Supervisor, metrics: IngressMetrics) -> None:
        self._supervisor = supervisor
        self._metrics = metrics
        self._exposition = IngressExposition(
            metrics, now=time.monotonic, is_ready=lambda: not supervisor.reasons()
        )

    def routes(self) -> dict[str, http.Route]:
        return {
            "/livez": self._ok,
            "/startupz": self._ok,
            "/readyz": self._readyz,
            "/metrics": self._metrics_page,
        }

    def _ok(self, _request: http.Request) -> http.Response:
        return http.Response.text(200, "ok")

    def _readyz(self, _request: http.Request) -> http.Response:
        reasons = self._supervisor.reasons()
        notes = {
            "api": self._metrics.api_error,
            "configuration": self._supervisor.refused,
            "brokers": "none is ready: the last good ones stay" if self._metrics.empty else None,
        }
        fields = {
            "ready": not reasons,
            "reasons": reasons,
            "notes": {name: note for name, note in notes.items() if note},
        }
        return http.Response.json(503 if reasons else 200, fields, indent=True)

    def _metrics_page(self, request: http.Request) -> http.Response:
        content_type, body = self._exposition.render(request.accept)
        return http.Response(200, content_type, body)
