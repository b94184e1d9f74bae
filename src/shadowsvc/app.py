"""The composition root of `shadowsvc run`: build, supervise, stop.

Lives here: which object gets which, the tasks that watch over dependencies, and the way down.
Rules: the process stays up whatever a dependency does; the broker is joined only once Cassandra is
usable, so that a service that can't write takes no share of the traffic; the first SIGTERM or
SIGINT (`process`) drains within `SHADOWSVC_LIMITS__DRAIN_TIMEOUT_SECONDS` and exits 0. Must not
come in: decisions about single updates.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import random
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog
from pydantic import SecretStr

from shadowsvc import __version__, http, logs, pause_page, process
from shadowsvc.adoption import Adopter, Terms
from shadowsvc.backoff import wait_seconds
from shadowsvc.config import adopted_receive_maximum
from shadowsvc.decoding import decoder_limits, max_age_us
from shadowsvc.errors import SchemaBehind, SchemaConflict, ShadowsvcError, StoreError
from shadowsvc.health import MAX_CLOCK_OFFSET_SECONDS, Health
from shadowsvc.isolation import REASON as ISOLATED
from shadowsvc.isolation import IsolationWatch
from shadowsvc.ledger import Ledger
from shadowsvc.login_pace import LoginPace
from shadowsvc.logins import StoreLogin
from shadowsvc.metrics import Exposition, Metrics
from shadowsvc.mqtt.adoption import Adoption, Patience, publish_marker
from shadowsvc.mqtt.connection import Connection, Endpoint
from shadowsvc.mqtt.session import SessionOptions
from shadowsvc.owners import owner_name
from shadowsvc.pause import Pause
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.rotation import Rotation
from shadowsvc.shadow.document import Decoder
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.slots import SlotKeeper
from shadowsvc.store import driver
from shadowsvc.store.batch import Batcher
from shadowsvc.store.cassandra import CassandraStore
from shadowsvc.store.slots import SlotTable
from shadowsvc.store.topology import Topology
from shadowsvc.totals import Flights, Ledgers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shadowsvc.config import Mqtt, Settings
    from shadowsvc.credentials import Credentials
    from shadowsvc.mqtt.adoption import Emptier
    from shadowsvc.rotation import Side
    from shadowsvc.store.thresholds import BatchLimits
    from shadowsvc.store.topology import Snapshot

__all__ = ["Service", "run", "tame_garbage_collector"]

_log = structlog.get_logger(__name__)

_START_RETRY_MIN_SECONDS = 0.5
_START_RETRY_MAX_SECONDS = 5.0
_CHECK_SECONDS = 60.0
_CHECK_SECONDS_IN_DOUBT = 2.0
_LAG_SECONDS = 0.5
_CLOSE_SECONDS = 1.0
_FREE_SLOT_SECONDS = 2.0
_ADOPTED_WRITERS = 4


def run(settings: Settings) -> int:
    """Run the service until a signal; return the exit code."""
    return process.run(functools.partial(_main, settings))


async def _main(settings: Settings, stop: asyncio.Event) -> None:
    service = Service(settings)
    await service.start()
    tame_garbage_collector()
    try:
        await service.supervise(stop)
    finally:
        await service.stop()


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
        self.decoder = Decoder(topics, decoder_limits(settings))
        self.topology = Topology()
        self.rotation = Rotation(settings, self.metrics)
        self.store = CassandraStore(
            settings.cassandra,
            dead_letter_ttl_seconds=settings.dead_letters.ttl_seconds,
            credentials=self.rotation.current("cassandra"),
        )
        self.batcher = Batcher(None, *self.store.limits)
        self.store.on_limits = self._limits_changed
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
            _endpoint(settings, self.rotation), _session_options(settings, topics), self.pipeline
        )
        self.pipeline.leave = self.connection.reconnect
        limits = settings.limits
        self.store_login = StoreLogin(
            self.store,
            LoginPace(limits.login_retry_min_seconds, limits.login_retry_max_seconds),
            self.metrics,
            in_doubt=lambda: bool(self.health.store_error or self.pipeline.failing),
        )
        self.store.direct.pace = LoginPace(
            limits.login_retry_min_seconds, limits.login_retry_max_seconds
        )
        driver.pace_logins(limits.login_retry_min_seconds, limits.login_retry_max_seconds)
        self.connection.subscribed_again = self._subscribed_again
        self.pause = Pause(
            self.pipeline,
            self.connection,
            self.metrics,
            drain_timeout_seconds=settings.limits.drain_timeout_seconds,
            others_left=lambda: self.adopter is None or self.adopter.adopting is None,
        )
        self.health.pause = self.pause.describe
        self.health.broker_error = lambda: self.connection.last_error
        self.health.broker_credentials = functools.partial(self.rotation.fault, "broker")
        self.health.store_credentials = lambda: (
            self.rotation.fault("cassandra") or self.store_login.error
        )
        self.slot_table = SlotTable(settings)
        self.slot_keeper: SlotKeeper | None = None
        if not settings.mqtt.client_id:
            keeper = self.slot_keeper = SlotKeeper(
                self.slot_table,
                settings.slots,
                settings.mqtt.share_group,
                takes=self.metrics.slot_takes,
                losses=self.metrics.slot_losses,
            )
            keeper.lost = functools.partial(self.connection.reconnect, "slot_lost")
            self.connection.identify = self._identify
            self.metrics.slot = keeper
            self.health.slot_wait = lambda: keeper.waiting
        self.isolation = IsolationWatch(
            settings.limits.isolate_after_seconds,
            self.pipeline,
            self.metrics,
            probe=self.store.write_probe,
            leave=self._isolate,
            come_back=functools.partial(self.connection.come_back, ISOLATED),
        )
        self.health.isolation = lambda: self.isolation.detail
        self.adopter = None if self.slot_keeper is None else self._make_adopter(self.slot_keeper)
        adopted = [] if self.adopter is None else [self.adopter.pipeline]
        self.health.adopted = adopted[0] if adopted else None
        self.exposition = Exposition(
            self.metrics,
            Ledgers(self.ledger, *(pipeline.ledger for pipeline in adopted)),
            Flights(self.pipeline, *adopted),
            now=time.monotonic,
            is_ready=lambda: self.health.ready,
            without_device_time=lambda: self.decoder.without_device_time,
            log_lines_dropped=logs.dropped_lines,
            not_ready=lambda: self.health.by_reason,
            pause_left_seconds=lambda: self.pause.status.left_seconds,
            direct_connections=lambda: self.store.direct.connections,
            batch_limits=lambda: self.store.limits,
            batches=lambda: self.store.batches,
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
                **pause_page.routes(self.pause, self.settings.mqtt.session_expiry_seconds),
            },
        )
        _log.info(
            "starting",
            version=__version__,
            http_port=self._http.port,
            broker=self.settings.mqtt.url,
            client_id=self.settings.mqtt.client_id or None,
            cassandra=",".join(self.settings.cassandra.contact_points),
            keyspace=self.settings.cassandra.keyspace,
        )
        self.health.pipeline = self.pipeline
        self.rotation.start(self._credentials_changed)
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
        await self.pause.close()
        limit = self.settings.limits.drain_timeout_seconds
        leaving = [] if self.adopter is None else [self.adopter.stop(limit)]
        drained, *_ = await asyncio.gather(self.pipeline.drain(limit), *leaving)
        self.rotation.stop()
        await self.connection.finish()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pipeline.close()
        if self.adopter is not None:
            await self.adopter.pipeline.close()
        await self._free_slot()
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
        self.topology.start(
            self.settings.cassandra,
            on_change=functools.partial(self._topology_changed, asyncio.get_running_loop()),
        )
        self.health.store_connected = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self.connection.run(), name="mqtt connection")
            group.create_task(self._watch_store(), name="store watch")
            group.create_task(self.store_login.run(), name="store login")
            if self.settings.canary.enabled:
                group.create_task(self._sing(), name="canary")
            group.create_task(self.isolation.run(), name="isolation")
            if self.slot_keeper is not None:
                group.create_task(self.slot_keeper.run(), name="slot")
            if self.adopter is not None:
                group.create_task(self.adopter.run(), name="adopter")

    def _make_adopter(self, keeper: SlotKeeper) -> Adopter:
        """Make what empties orphaned slots, with a small pipeline of its own."""
        settings = self.settings
        mqtt, slots = settings.mqtt, settings.slots
        ledger = Ledger(self.ledger.observe)
        pipeline = Pipeline(
            _options(settings)._replace(
                min_concurrency=min(settings.cassandra.min_concurrency, _ADOPTED_WRITERS),
                concurrency=min(settings.cassandra.concurrency, _ADOPTED_WRITERS),
                receive_maximum=adopted_receive_maximum(settings),
            ),
            self.decoder,
            Batcher(None, *self.store.limits),
            self.store,
            ledger,
            self.metrics,
            self._send_adopted,
        )
        patience = Patience(
            quiet_seconds=slots.adopt_quiet_seconds,
            stalled_seconds=3 * mqtt.connect_timeout_seconds,
            restless_seconds=30 * slots.adopt_quiet_seconds,
        )

        def attempt(name: str, emptier: Emptier) -> Adoption:
            options = self.connection.options  # with the login that counts now
            return Adoption(
                self.connection.endpoint,
                dataclasses.replace(options, client_id=name),
                options.filters,
                f"{slots.marker_topic}/{name}",
                emptier,
                functools.partial(publish_marker, self._mqtt_with_login()),
                patience,
            )

        return Adopter(
            self.slot_table,
            pipeline,
            attempt,
            self.metrics,
            terms=Terms(slots.lease_seconds, slots.renew_seconds, slots.orphan_after_seconds),
            owner=f"{owner_name()} (adopting)",
            own_slot=lambda: keeper.client_id,
            may_adopt=lambda: self.pipeline.subscribed and self.health.can_write,
            must_leave=lambda: self.health.away,
            former=keeper.former,
        )

    async def _identify(self) -> str:
        """Return the client id to connect by: that of the slot whose lease was just renewed."""
        assert self.slot_keeper is not None  # noqa: S101 - for the type checker
        client_id = await self.slot_keeper.acquire()
        self.pipeline.identify(client_id)
        return client_id

    async def _isolate(self) -> None:
        """Leave the broker, and the slot to whoever can write."""
        if self.slot_keeper is not None:
            await self.slot_keeper.lapse()
        await self.connection.leave(ISOLATED)

    async def _free_slot(self) -> None:
        """Give the slot back, if Cassandra is there for it; else the lease ends by itself."""
        try:
            async with asyncio.timeout(_FREE_SLOT_SECONDS):
                if self.slot_keeper is not None:
                    await self.slot_keeper.release()
                await self.slot_table.close()
        except (TimeoutError, StoreError) as error:
            _log.warning("slot not freed, its lease will end by itself", error=str(error))

    async def _sing(self) -> None:
        # Imported here: few need aiomqtt in the service.
        from shadowsvc.canary import Canary  # noqa: PLC0415

        def report(lost: str | None) -> None:
            self.health.canary_lost = lost

        await Canary(
            self.settings,
            self.store,
            self.metrics,
            mqtt=self._mqtt_with_login,
            client_id=lambda: self.pipeline.options.client_id,
            able=lambda: self.health.ready_but_for("canary_lost"),
            report=report,
            subscribe_again=self.connection.subscribe_again,
        ).run()

    def _mqtt_with_login(self) -> Mqtt:
        """Return the settings of the broker with the login that counts now."""
        options = self.connection.options
        password = None if options.password is None else SecretStr(options.password.decode())
        login = {"username": options.username, "password": password}
        return self.settings.mqtt.model_copy(update=login)

    def _subscribed_again(self) -> None:
        self.metrics.resubscriptions += 1

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
                await self.store_login.pause(
                    error, wait_seconds(tries, _START_RETRY_MIN_SECONDS, _START_RETRY_MAX_SECONDS)
                )
            else:
                self._note_store(None)
                if tries:
                    _log.info("usable", dependency=what)
                return

    def _credentials_changed(self, side: Side, credentials: Credentials) -> None:
        """Take what files hold now into use; called on the loop."""
        if side == "broker":
            secret = credentials.password
            self.connection.renew_login(
                credentials.username,
                None if secret is None else secret.get_secret_value().encode(),
            )
        else:
            driver.renew(self.settings.cassandra, credentials)
            self.store_login.change(credentials)

    async def _migrate(self) -> None:
        # Imported here: the data plane does not need it.
        from shadowsvc.store.migrate import migrate  # noqa: PLC0415

        await asyncio.to_thread(
            migrate, self.settings, lambda text: _log.info("migration", step=text)
        )

    async def _connect_store(self) -> None:
        await self.store.connect()
        gc_grace = await self.store.gc_grace_seconds()
        self.decoder.limits.max_age_us = max_age_us(gc_grace)

    def _topology_changed(self, loop: asyncio.AbstractEventLoop, snapshot: Snapshot) -> None:
        """Follow the ring; called from the topology's thread (one attribute is swapped)."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(self.store.follow, snapshot)
        self.batcher.group = None if snapshot.single else snapshot.group
        if self.adopter is not None:
            self.adopter.pipeline.batcher.group = self.batcher.group

    def _limits_changed(self, limits: BatchLimits) -> None:
        """Plan batches as the nodes allow them by now."""
        self.batcher.limit(*limits)
        if self.adopter is not None:
            self.adopter.pipeline.batcher.limit(*limits)

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
            if now < next_check and not in_doubt and self.decoder.clock_trusted:
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
        offset = await self.store.clock_offset_seconds()
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

    def _send_adopted(self, data: bytes) -> None:
        if self.adopter is not None:
            self.adopter.send(data)

    # ---------------------------------------------------------------- pages

    def _livez(self, _request: http.Request) -> http.Response:
        live, why = self.health.live()
        return http.Response.text(200 if live else 503, why)

    def _startupz(self, _request: http.Request) -> http.Response:
        started = self.health.started
        return http.Response.text(200 if started else 503, "ok" if started else "starting")

    def _readyz(self, _request: http.Request) -> http.Response:
        reasons = self.health.reasons()
        fields = {"ready": not reasons, "reasons": reasons}
        return http.Response.json(503 if reasons else 200, fields, indent=True)

    def _metrics_page(self, request: http.Request) -> http.Response:
        content_type, body = self.exposition.render(request.accept)
        return http.Response(200, content_type, body)


def _options(settings: Settings) -> Options:
    cassandra = settings.cassandra
    return Options(
        client_id=settings.mqtt.client_id,
        receive_maximum=settings.mqtt.receive_maximum,
        max_held_bytes=settings.limits.max_held_bytes,
        linger_seconds=cassandra.linger_seconds,
        min_concurrency=cassandra.min_concurrency,
        concurrency=cassandra.concurrency,
        request_timeout_seconds=cassandra.request_timeout_seconds,
        retry_min_seconds=cassandra.retry_min_seconds,
        retry_max_seconds=cassandra.retry_max_seconds,
        max_dead_letters_per_minute=settings.dead_letters.max_per_device_per_minute,
        marker_prefix=f"{settings.slots.marker_topic}/",
    )


def _endpoint(settings: Settings, rotation: Rotation) -> Endpoint:
    mqtt = settings.mqtt
    url = urlsplit(mqtt.url)
    return Endpoint(
        host=url.hostname or "",
        port=url.port or (8883 if url.scheme == "mqtts" else 1883),
        tls=rotation.broker_context if url.scheme == "mqtts" else None,
        connect_timeout_seconds=mqtt.connect_timeout_seconds,
        reconnect_min_seconds=mqtt.reconnect_min_seconds,
        reconnect_max_seconds=mqtt.reconnect_max_seconds,
        login_retry_min_seconds=settings.limits.login_retry_min_seconds,
        login_retry_max_seconds=settings.limits.login_retry_max_seconds,
        resubscribe_seconds=mqtt.resubscribe_seconds,
    )


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
