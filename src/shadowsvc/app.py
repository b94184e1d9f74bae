"""The composition root of `shadowsvc run`: build, supervise, stop.

Lives here: which object gets which, the tasks that watch over dependencies, signals, and the way
down. Rules: the process stays up whatever a dependency does; the broker is joined only once
Cassandra is usable, so that a service that can't write takes no share of the traffic; the first
SIGTERM or SIGINT drains within `SHADOWSVC_LIMITS__DRAIN_TIMEOUT_SECONDS` and exits 0, the second
ends at once. Must not come in: decisions about single updates.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import random
import signal
import ssl
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import orjson
import structlog
import uvloop

from shadowsvc import __version__, http, logs
from shadowsvc.errors import ConfigError, SchemaBehind, SchemaConflict, ShadowsvcError, StoreError
from shadowsvc.health import MAX_CLOCK_OFFSET_SECONDS, Health
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Exposition, Metrics
from shadowsvc.mqtt.connection import Connection, Endpoint
from shadowsvc.mqtt.session import SessionOptions
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from shadowsvc.store.cassandra import CassandraStore
from shadowsvc.store.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shadowsvc.config import Settings
    from shadowsvc.store.topology import Snapshot

__all__ = ["Service", "run", "tame_garbage_collector"]

_log = structlog.get_logger(__name__)

_CHECK_SECONDS = 60.0
_CHECK_SECONDS_IN_DOUBT = 2.0
_LAG_SECONDS = 0.5
_CLOSE_SECONDS = 1.0
_GC_GRACE_MARGIN = 0.1
_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"


def run(settings: Settings) -> int:
    """Run the service until a signal; return the exit code."""
    try:
        return uvloop.run(_main(settings))
    except ConfigError as error:
        _log.error("bad configuration", mistakes=error.mistakes)
        return 2
    finally:
        logs.shutdown()


async def _main(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            _log.warning("stopping at once", signal=number.name)
            logs.shutdown(timeout_seconds=0.5)
            os._exit(128 + number)
        _log.info("stopping", signal=number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    service = Service(settings)
    await service.start()
    tame_garbage_collector()
    try:
        await service.supervise(stop)
    finally:
        await service.stop()
    return 0


def tame_garbage_collector() -> None:
    """Keep the cycle collector off the hot path.

    An update makes a dozen objects and no cycle; reference counts free them. The default
    thresholds would look through a thousand held deliveries again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


class Service:
    """Everything of one process."""

    def __init__(self, settings: Settings) -> None:
        """Make it; nothing happens before `start`."""
        self.settings = settings
        self.metrics = Metrics()
        self.health = Health(time.monotonic)
        to_ack = self.metrics.receive_to_ack.observe
        self.ledger = Ledger(lambda received, count: to_ack(time.monotonic() - received, count))
        topics = TopicParser(settings.mqtt.topic_prefix)
        self.decoder = Decoder(topics, _limits(settings))
        self.topology = Topology()
        self.batcher = Batcher(
            None,
            max_partitions=settings.cassandra.batch_max_partitions,
            max_bytes=settings.cassandra.batch_max_bytes,
        )
        self.store = CassandraStore(
            settings.cassandra, dead_letter_ttl_seconds=settings.dead_letters.ttl_seconds
        )
        self.pipeline = Pipeline(
            _options(settings),
            self.decoder,
            self.batcher,
            self.store,
            self.ledger,
            self.metrics,
            self._send,
        )
        self.connection = Connection(
            _endpoint(settings), _session_options(settings, topics), self.pipeline
        )
        self.pipeline.leave = self.connection.reconnect
        self.exposition = Exposition(
            self.metrics,
            self.ledger,
            self.pipeline,
            now=time.monotonic,
            is_ready=lambda: self.health.ready,
            without_device_time=lambda: self.decoder.without_device_time,
            log_lines_dropped=logs.dropped_lines,
        )
        self._http: http.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the HTTP port, then let the supervisors run. Raises `ConfigError`."""
        self._http = await http.serve(
            self.settings.http.host,
            self.settings.http.port,
            {
                "/livez": self._livez,
                "/readyz": self._readyz,
                "/startupz": self._startupz,
                "/metrics": self._metrics_page,
            },
        )
        _log.info(
            "starting",
            version=__version__,
            http_port=self._http.port,
            broker=self.settings.mqtt.url,
            client_id=self.settings.mqtt.client_id,
            cassandra=",".join(self.settings.cassandra.contact_points),
            keyspace=self.settings.cassandra.keyspace,
        )
        self.health.pipeline = self.pipeline
        for name, supervisor in (
            ("dependencies", self._serve()),
            ("loop lag", self._watch_lag()),
        ):
            self._tasks.append(asyncio.create_task(supervisor, name=name))

    async def supervise(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set; raise what a supervisor died of."""
        waiter = asyncio.create_task(stop.wait(), name="stop")
        try:
            done, _ = await asyncio.wait(
                [waiter, *self._tasks], return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if task is not waiter:
                    task.result()
        finally:
            waiter.cancel()

    async def stop(self) -> None:
        """Drain, leave the broker with the session kept, close everything."""
        started = time.monotonic()
        drained = await self.pipeline.drain(self.settings.limits.drain_timeout_seconds)
        await self.connection.finish()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pipeline.close()
        # Neither may hold up the exit: what they still do ends with the process.
        with contextlib.suppress(TimeoutError, StoreError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await asyncio.gather(
                    asyncio.to_thread(self.topology.stop, _CLOSE_SECONDS), self.store.close()
                )
        if self._http is not None:
            await self._http.close()
        _log.info(
            "stopped",
            drained=drained,
            left_to_the_broker=self.ledger.held,
            acknowledged=self.ledger.acknowledged,
            durable=self.metrics.updates_durable,
            seconds=round(time.monotonic() - started, 3),
        )

    # ---------------------------------------------------------------- supervisors

    async def _serve(self) -> None:
        """Cassandra first, then the broker; then watch both for ever."""
        if self.settings.cassandra.migrate_on_start:
            await self._until_it_works("migration", self._migrate)
        await self._until_it_works("cassandra", self._connect_store)
        await self._until_it_works("clock", self._check_clock)
        self.topology.start(self.settings.cassandra, on_change=self._topology_changed)
        self.health.store_connected = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self.connection.run(), name="mqtt connection")
            group.create_task(self._watch_store(), name="store watch")

    async def _until_it_works(self, what: str, attempt: Callable[[], Awaitable[None]]) -> None:
        tries = 0
        while True:
            try:
                await attempt()
            except ShadowsvcError as error:
                self._note_store(error)
                _log.warning(
                    "not usable yet", dependency=what, error=str(error), limit_by=f"{what} {error}"
                )
                tries += 1
                ceiling = min(5.0, 0.25 * 2 ** min(tries, 8))
                await asyncio.sleep(random.uniform(0.1, ceiling))  # noqa: S311
            else:
                self._note_store(None)
                if tries:
                    _log.info("usable", dependency=what)
                return

    async def _migrate(self) -> None:
        # Imported here: the data plane does not need it.
        from shadowsvc.store.migrate import migrate  # noqa: PLC0415

        await asyncio.to_thread(
            migrate, self.settings, lambda text: _log.info("migration", step=text)
        )

    async def _connect_store(self) -> None:
        await self.store.connect()
        gc_grace = await self.store.gc_grace_seconds()
        self.decoder.limits.max_age_us = int(gc_grace * (1 - _GC_GRACE_MARGIN)) * 1_000_000

    def _topology_changed(self, snapshot: Snapshot) -> None:
        """Follow the ring; called from the topology's thread (one attribute is swapped)."""
        self.batcher.group = None if snapshot.single else snapshot.group

    async def _watch_store(self) -> None:
        """Check schema and clock now and then; restore a lowered Receive Maximum."""
        next_check = 0.0
        while True:
            await asyncio.sleep(_CHECK_SECONDS_IN_DOUBT)
            if (
                self.pipeline.subscribed
                and self.ledger.last_copies == 0
                and self.pipeline.announced < self.settings.mqtt.receive_maximum
            ):
                self.connection.reconnect("receive_maximum")
            now = time.monotonic()
            in_doubt = self.health.store_error or self.health.schema_error or self.pipeline.failing
            if now < next_check and not in_doubt:
                continue
            next_check = now + _CHECK_SECONDS * random.uniform(0.8, 1.2)  # noqa: S311
            try:
                await self.store.check_schema()
                await self._check_clock()
            except StoreError as error:
                self._note_store(error)
            else:
                self._note_store(None)

    async def _check_clock(self) -> None:
        before = time.time()
        server_us = await self.store.server_time_us()
        offset = (before + time.time()) / 2 - server_us / 1e6
        self.health.clock_offset_seconds = self.metrics.clock_offset_seconds = offset
        trusted = abs(offset) <= MAX_CLOCK_OFFSET_SECONDS
        if trusted != self.decoder.clock_trusted:
            _log.warning(
                "clock trusted again" if trusted else "clock in doubt: device times are not judged",
                offset_seconds=round(offset, 3),
            )
        self.decoder.clock_trusted = trusted

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self.metrics.loop_lag_seconds = max(0.0, loop.time() - due)

    def _note_store(self, error: ShadowsvcError | None) -> None:
        if isinstance(error, SchemaBehind | SchemaConflict):
            self.health.schema_error, self.health.store_error = str(error), None
        else:
            self.health.schema_error = None
            self.health.store_error = None if error is None else str(error)

    def _send(self, data: bytes) -> None:
        self.connection.send(data)

    # ---------------------------------------------------------------- pages

    def _livez(self, _request: http.Request) -> http.Response:
        live, why = self.health.live()
        return http.Response(200 if live else 503, _TEXT, f"{why}\n".encode())

    def _startupz(self, _request: http.Request) -> http.Response:
        started = self.health.started
        return http.Response(200 if started else 503, _TEXT, b"ok\n" if started else b"starting\n")

    def _readyz(self, _request: http.Request) -> http.Response:
        self.health.broker_error = self.connection.last_error
        reasons = self.health.reasons()
        body = orjson.dumps(
            {"ready": not reasons, "reasons": reasons},
            option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE,
        )
        return http.Response(503 if reasons else 200, _JSON, body)

    def _metrics_page(self, request: http.Request) -> http.Response:
        content_type, body = self.exposition.render(request.accept)
        return http.Response(200, content_type, body)


def _limits(settings: Settings) -> Limits:
    shadow = settings.shadow
    return Limits(
        max_payload_bytes=shadow.max_payload_bytes,
        max_depth=shadow.max_depth,
        max_leaves=shadow.max_leaves,
        max_path_bytes=shadow.max_path_bytes,
        unit=shadow.timestamp_unit,
        max_ahead_us=int(shadow.max_ahead_seconds * 1_000_000),
        on_future=shadow.on_future,
        on_ancient=shadow.on_ancient,
    )


def _options(settings: Settings) -> Options:
    cassandra = settings.cassandra
    return Options(
        client_id=settings.mqtt.client_id,
        receive_maximum=settings.mqtt.receive_maximum,
        max_held_bytes=settings.limits.max_held_bytes,
        max_request_bytes=cassandra.batch_max_bytes,
        linger_seconds=cassandra.linger_seconds,
        concurrency=cassandra.concurrency,
        request_timeout_seconds=cassandra.request_timeout_seconds,
        retry_min_seconds=cassandra.retry_min_seconds,
        retry_max_seconds=cassandra.retry_max_seconds,
        max_dead_letters_per_minute=settings.dead_letters.max_per_device_per_minute,
    )


def _endpoint(settings: Settings) -> Endpoint:
    mqtt = settings.mqtt
    url = urlsplit(mqtt.url)
    return Endpoint(
        host=url.hostname or "",
        port=url.port or (8883 if url.scheme == "mqtts" else 1883),
        tls=functools.partial(_tls_context, settings) if url.scheme == "mqtts" else None,
        connect_timeout_seconds=mqtt.connect_timeout_seconds,
        reconnect_min_seconds=mqtt.reconnect_min_seconds,
        reconnect_max_seconds=mqtt.reconnect_max_seconds,
    )


def _tls_context(settings: Settings) -> ssl.SSLContext:
    mqtt = settings.mqtt
    context = ssl.create_default_context(cafile=mqtt.ca_file)
    if mqtt.certificate_file is not None:
        context.load_cert_chain(mqtt.certificate_file, mqtt.key_file)
    return context


def _session_options(settings: Settings, topics: TopicParser) -> SessionOptions:
    mqtt = settings.mqtt
    return SessionOptions(
        client_id=mqtt.client_id,
        filters=tuple(f"$share/{mqtt.share_group}/{pattern}" for pattern in topics.filters()),
        keep_alive_seconds=mqtt.keep_alive_seconds,
        session_expiry_seconds=mqtt.session_expiry_seconds,
        maximum_packet_size_bytes=mqtt.maximum_packet_size_bytes,
        topic_alias_maximum=mqtt.topic_alias_maximum,
        username=mqtt.username,
        password=None if mqtt.password is None else mqtt.password.get_secret_value().encode(),
    )
