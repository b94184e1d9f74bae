"""HAProxy kept in step with what the API, the template and the certificates say.

Lives here: one loop, the only place that decides. Each round is the same, whatever woke it:

1. render; what is refused leaves everything as it was;
2. if the text is new: `haproxy -c`, then in place of the old file in one step;
3. ask HAProxy which frame it has; if it is not there, start it, or wait for whoever does;
4. another frame than the file's: reload, and wait for a worker that has it;
5. bring servers in step through the runtime API; if HAProxy refuses, reload;
6. put changed certificates in place.

Rules: no round relies on what an earlier one believed; a round that fails is repeated after a
jittered wait; a server that is gone is closed first and deleted when its last connection has
ended. Must not come in: how to talk to HAProxy or to Kubernetes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Final

import structlog

from shadowsvc.backoff import wait_seconds
from shadowsvc.config_rules import reason
from shadowsvc.errors import HaproxyFailed, Refused, ShadowsvcError
from shadowsvc.ingress import certificates, haproxy
from shadowsvc.ingress.certificates import Certificates
from shadowsvc.ingress.render import Rendered, render
from shadowsvc.ingress.runtime import CommandRefused, Master, NobodyThere, Runtime
from shadowsvc.settings import variable

if TYPE_CHECKING:
    from pathlib import Path
    from typing import NoReturn

    from shadowsvc.ingress.metrics import IngressMetrics
    from shadowsvc.ingress.model import Broker
    from shadowsvc.settings import Ingress

__all__ = ["REASONS", "Files", "Supervisor", "read_template"]

REASONS: Final = {
    "no_configuration": "no configuration has been made yet",
    "haproxy_unavailable": "HAProxy does not answer, or does not have the configuration",
}
"""Every reason not to be ready."""

_POLL_SECONDS: Final = 2.0
_SETTLE_SECONDS: Final = 0.1
_RELOAD_SECONDS: Final = 15.0
_START_SECONDS: Final = 10.0
_RETRY_MIN_SECONDS: Final = 0.2
_RETRY_MAX_SECONDS: Final = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Files:
    """Where everything lies in the directory that is shared with HAProxy."""

    directory: Path

    @property
    def configuration(self) -> Path:
        """What HAProxy reads."""
        return self.directory / "haproxy.cfg"

    @property
    def candidate(self) -> Path:
        """What is being checked."""
        return self.directory / "haproxy.cfg.new"

    @property
    def certificates(self) -> Path:
        """What HAProxy's listeners read."""
        return self.directory / "certs"

    @property
    def runtime(self) -> Path:
        """The worker's socket; the template has the same name."""
        return self.directory / "runtime.sock"

    @property
    def master(self) -> Path:
        """The master's socket."""
        return self.directory / "master.sock"


def read_template(file: Path | None) -> str:
    """Return the template: our own, or what is in `file`.

    Blocks. Raises `Refused` if it can't be read.
    """
    if file is None:
        return resources.files("shadowsvc.ingress").joinpath("haproxy.cfg.j2").read_text("utf-8")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        name = variable("ingress", "template_file")
        words = reason(error) if isinstance(error, OSError) else "no utf-8"
        raise Refused("template", f"{name}: {file}: {words}") from error


class Supervisor:
    """The loop. `brokers_changed` tells it what the API says."""

    def __init__(self, settings: Ingress, metrics: IngressMetrics, *, connections: int) -> None:
        """Make it; `connections` is how many devices may be connected at once."""
        self._settings = settings
        self._metrics = metrics
        self._connections = connections
        self._files = Files(settings.directory)
        self._runtime = Runtime(self._files.runtime)
        self._master = Master(self._files.master)
        self._process = haproxy.Process(
            settings.haproxy, self._files.configuration, self._files.master
        )
        self._brokers: tuple[Broker, ...] | None = None
        self._current: Rendered | None = None
        """What the file has, if we know."""
        self._refused: tuple[str, str] | None = None
        """What was refused last, so that it is said once: by whom, and the words."""
        self._unfit: dict[str, str] = {}
        """The text that HAProxy refused last, with its words: it is not asked again."""
        self._certificates = Certificates()
        self._wake = asyncio.Event()
        self._failures = 0
        self.fault: str | None = "starting"
        """Why HAProxy does not have the configuration, while it does not."""

    @property
    def refused(self) -> str | None:
        """Why the wanted configuration can't be used, while it can't."""
        return None if self._refused is None else f"{self._refused[0]}: {self._refused[1]}"

    def reasons(self) -> list[dict[str, str]]:
        """Every reason not to be ready."""
        if self.fault is None:
            return []
        name = "haproxy_unavailable" if self._files.configuration.exists() else "no_configuration"
        detail = self.refused if name == "no_configuration" and self.refused else self.fault
        return [{"reason": name, "meaning": REASONS[name], "detail": detail}]

    def brokers_changed(self, brokers: tuple[Broker, ...]) -> None:
        """Take what the API says; none at all changes nothing."""
        metrics = self._metrics
        metrics.brokers = len(brokers)
        wanted = (*self._settings.mqtt_ports, *self._settings.websocket_ports)
        usable = tuple(
            each for each in brokers if any(each.port(name) is not None for name in wanted)
        )
        if not usable:
            if not metrics.empty:
                metrics.empty_answers += 1
                _log.warning(
                    "no broker: the last good configuration stays",
                    ready=len(brokers),
                    wanted_ports=wanted,
                )
            metrics.empty = True
            return
        metrics.empty = False
        if usable != self._brokers:
            _log.info("brokers", names=[each.name for each in usable])
            self._brokers = usable
            self._wake.set()

    async def run(self) -> NoReturn:
        """Keep HAProxy in step, for ever."""
        while True:
            self._wake.clear()
            try:
                leaving = await self._round()
            except (ShadowsvcError, OSError) as error:
                self.fault = str(error)
                self._failures += 1
                if self._failures == 1:
                    _log.warning("haproxy is not in step", error=str(error))
                seconds = wait_seconds(self._failures, _RETRY_MIN_SECONDS, _RETRY_MAX_SECONDS)
            else:
                if self._failures:
                    _log.info("haproxy is in step again")
                self.fault, self._failures = None, 0
                self._metrics.servers_leaving = leaving
                seconds = _POLL_SECONDS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), seconds)
            if self._wake.is_set():
                await asyncio.sleep(_SETTLE_SECONDS)  # changes come in groups

    async def stop(self, limit_seconds: float) -> None:
        """End the HAProxy that we started, softly; another's stays as it is."""
        await self._process.stop(limit_seconds)

    async def _round(self) -> int:
        """Do everything once; return how many servers wait for their last connection."""
        if self._settings.certificate_directory is not None:
            await self._gather(self._settings.certificate_directory)
        try:
            await self._prepare()
        except Refused as error:
            self._note_refused(error)
        running = await self._find()
        if self._current is None:
            return 0  # an earlier one's file: nothing is known that would be better
        if running != self._current.digest:
            await self._reload()
        try:
            leaving = await self._servers(self._current)
            await self._renew_certificates()
        except CommandRefused as error:
            _log.warning("the runtime api refused, reloading", error=str(error))
            await self._reload()
            leaving = 0
        self._metrics.servers = Counter(backend for backend, _ in self._current.servers)
        return leaving

    # ---------------------------------------------------------------- the file

    async def _prepare(self) -> None:
        """Make the file what it should be. Raises `Refused`."""
        if self._brokers is None:
            return
        template = await asyncio.to_thread(read_template, self._settings.template_file)
        wanted = render(
            self._settings,
            self._brokers,
            template,
            connections=self._connections,
            certificates=self._certificates.files,
            certificate_directory=self._files.certificates,
        )
        if wanted.text in self._unfit:
            raise Refused("haproxy", self._unfit[wanted.text])
        if self._current is None or wanted.text != self._current.text:
            try:
                await asyncio.to_thread(self._put, self._files.candidate, wanted.text)
                await haproxy.check(self._settings.haproxy, self._files.candidate)
            except Refused as error:
                self._unfit = {wanted.text: str(error)}
                raise
            os.replace(self._files.candidate, self._files.configuration)  # noqa: PTH105 - in one step
            self._current = wanted
        self._refused, self._unfit = None, {}
        self._metrics.refused = False

    def _put(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def _note_refused(self, error: Refused) -> None:
        self._metrics.refused = True
        if self._refused != (error.by, str(error)):
            self._refused = (error.by, str(error))
            self._metrics.refusals[error.by] += 1
            _log.error(
                "configuration refused, the last good one stays", by=error.by, why=str(error)
            )

    # ---------------------------------------------------------------- the process

    async def _find(self) -> str | None:
        """Return the digest of the frame that HAProxy has; start it if that is ours to do."""
        try:
            digest = (await self._runtime.running()).digest
        except HaproxyFailed as error:
            self._metrics.haproxy_up = False
            if not self._files.configuration.exists():
                raise HaproxyFailed("there is no configuration yet") from None
            if not self._settings.start_haproxy:
                raise
            if not self._process.running:
                if not isinstance(error, NobodyThere):
                    raise  # it is there and slow: a second one would share its listeners
                self._metrics.haproxy_starts += 1
                await self._process.start()
            digest = await self._await_start()
        self._metrics.haproxy_up = True
        return digest

    async def _await_start(self) -> str | None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return (await self._runtime.running()).digest
            except HaproxyFailed:
                if not self._process.running:
                    raise HaproxyFailed("HAProxy ended at its start; its words are above") from None
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def _reload(self) -> None:
        """Let the master start a worker with the file, and wait for it. Raises `HaproxyFailed`."""
        current = self._current
        before = await self._runtime.running()
        deadline = time.monotonic() + _RELOAD_SECONDS
        try:
            await self._master.reload()
            while True:
                with contextlib.suppress(HaproxyFailed):  # the sockets change hands
                    now = await self._runtime.running()
                    if now.pid != before.pid and (current is None or now.digest == current.digest):
                        break
                _require_time(deadline)
                await asyncio.sleep(0.05)
        except HaproxyFailed:
            self._metrics.reloads["failed"] += 1
            raise
        self._metrics.reloads["done"] += 1
        _log.info("haproxy reloaded", was=before.pid, is_now=now.pid)

    # ---------------------------------------------------------------- servers and certificates

    async def _servers(self, wanted: Rendered) -> int:
        """Bring the servers in step; return how many still have connections and no place."""
        runtime, changes = self._runtime, self._metrics.changes
        live = await runtime.servers()
        backends = {backend for backend, _ in wanted.servers}
        for key, server in wanted.servers.items():
            found = live.get(key)
            if found is None:
                await runtime.add(server)
                changes["added"] += 1
                continue
            if found.where != server.where:
                await runtime.move(server)
                changes["moved"] += 1
            if not found.takes_connections:
                await runtime.open(*key)
                changes["opened"] += 1
        leaving = 0
        for key, found in live.items():
            if key in wanted.servers or key[0] not in {"mqtt", "websocket", *backends}:
                continue
            if found.takes_connections:
                await runtime.close(*key)
                changes["closed"] += 1
            if await runtime.delete(*key):
                changes["deleted"] += 1
            else:
                leaving += 1
        return leaving

    async def _gather(self, source: Path) -> None:
        found = await asyncio.to_thread(certificates.gather, source, self._files.certificates)
        metrics = self._metrics
        if found.faults and found.faults != self._certificates.faults:
            metrics.certificates_unusable += 1
            _log.error("certificates can't be used, the old ones stay", why=found.faults)
        metrics.certificates_faulty = bool(found.faults)
        metrics.certificate_expiry = found.expiries
        self._certificates = found

    async def _renew_certificates(self) -> None:
        """Put changed certificates in place; new and vanished files have made a reload already."""
        if not self._certificates.files:
            return
        for file in await self._runtime.certificates():
            name = file.rpartition("/")[2]
            wanted = self._certificates.fingerprints.get(name)
            if wanted is None or await self._runtime.fingerprint(file) == wanted:
                continue
            path = self._files.certificates / name
            await self._runtime.replace_certificate(
                # Beside the certificates there may be words, in whatever encoding.
                file,
                await asyncio.to_thread(path.read_text, "utf-8", "replace"),
            )
            self._metrics.certificates_changed += 1
            _log.info("certificate changed", file=name)


def _require_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise HaproxyFailed(f"no new worker {_RELOAD_SECONDS:g} s after a reload")
