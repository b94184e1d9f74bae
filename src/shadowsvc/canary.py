"""The canary: updates of a reserved device that the service publishes itself and reads back.

Lives here: when deliveries count as stopped (`Watch`, pure), and the tasks that publish and read
(`Canary`). A broker may grant a subscription that it did not make (docs/guarantees.md); then all
that the service sees of itself is fine, and nothing comes. The canary goes the way of any other
update, through whatever process the broker gives it to, and is looked for in Cassandra.

Rules:
1. Each process has a named shadow of the device, its client id, so that none hides another's
   updates; each update has a leaf of its own until its time limit is over, so that every one is
   found by itself.
2. It is judged only while nothing else is wrong: an outage, a pause or a lost connection have
   reasons of their own. Then nothing is published, and what is under way is excused.
3. Deliveries have stopped when updates that the broker took have not become durable for the time
   limit, and none that was published after them has. A single one that is late, held by another
   process, is counted and no more.
4. Nothing that happens here ends the service.

Must not come in: subscriptions, and how an update is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import re
import time
import uuid
from typing import TYPE_CHECKING, NamedTuple, Protocol

import orjson
import structlog

from shadowsvc.errors import MqttError, MqttRefused, StoreError
from shadowsvc.mqtt.publisher import NO_MATCHING_SUBSCRIBERS, Publisher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from shadowsvc.metrics import Metrics
    from shadowsvc.settings import Mqtt, Settings

__all__ = ["Canary", "Judgement", "Reads", "Watch", "shadow_name"]

_log = structlog.get_logger(__name__)

_POLL_MIN_SECONDS = 0.005
_POLL_MAX_SECONDS = 1.0
_PUBLISH_SECONDS = 5.0
_CONNECT_AGAIN_SECONDS = (1.0, 10.0)
_INTERVAL_JITTER = 0.1
_UNIT_US = {"seconds": 1_000_000, "milliseconds": 1_000}
_NO_NAME = re.compile(r"[^A-Za-z0-9_.:@=-]")
_MAX_NAME_CHARS = 128  # as `shadowsvc.shadow.topic` has it
_HASH_CHARS = 8


class Reads(Protocol):
    """What the canary needs from Cassandra."""

    async def read_reported(self, device: str, shadow: str) -> Mapping[str, tuple[str, int]]:
        """Return value (JSON) and write time (µs) by path; raises `StoreError`."""


class Judgement(NamedTuple):
    """What became of updates since the last look."""

    seconds: list[float]
    """From publish to durable, of those that were found."""
    lost: int
    excused: int


class Watch:
    """Judges. Pure: times are monotonic seconds, handed in."""

    def __init__(self, interval_seconds: float, timeout_seconds: float) -> None:
        """Make it; the time limit is that of one update and of all."""
        self.timeout_seconds = timeout_seconds
        self.late_seconds = min(interval_seconds, timeout_seconds / 2)
        self.leaves = math.ceil(timeout_seconds / interval_seconds) + 2
        """How many leaves the updates take turns in."""
        self.doubt_since: float | None = None
        """When the first update was published of which, and after which, none was found."""
        self._waiting: dict[int, float] = {}

    @property
    def waiting(self) -> int:
        """Updates published, not found, and within their time limit."""
        return len(self._waiting)

    def path(self, sequence: int) -> str:
        """Return the leaf of an update."""
        return f"/{sequence % self.leaves}"

    def published(self, sequence: int, at: float) -> None:
        """Note that the broker took an update that was sent at `at`."""
        self._waiting[sequence] = at
        if self.doubt_since is None:
            self.doubt_since = at

    def look(self, values: Mapping[str, tuple[str, int]], now: float) -> Judgement:
        """Take what Cassandra holds now, while nothing else is wrong."""
        found: list[float] = []
        for sequence, at in list(self._waiting.items()):
            value = values.get(self.path(sequence))
            if value is not None and value[0] == str(sequence):
                found.append(at)
                del self._waiting[sequence]
        if found:
            self.doubt_since = min(
                (at for at in self._waiting.values() if at > max(found)), default=None
            )
        over = [key for key, at in self._waiting.items() if now - at >= self.timeout_seconds]
        for sequence in over:
            del self._waiting[sequence]
        return Judgement([now - at for at in found], len(over), 0)

    def excuse(self) -> Judgement:
        """Forget what is under way: something else is wrong."""
        excused = len(self._waiting)
        self._waiting.clear()
        self.doubt_since = None
        return Judgement([], 0, excused)

    def late(self, now: float) -> bool:
        """Whether it takes longer than usual until an update is found."""
        return self.doubt_since is not None and now - self.doubt_since >= self.late_seconds

    def lost(self, now: float) -> bool:
        """Whether deliveries have stopped."""
        return self.doubt_since is not None and now - self.doubt_since >= self.timeout_seconds


class Canary:
    """Publishes and reads back, for as long as `run` runs. Belongs to the running loop."""

    def __init__(
        self,
        settings: Settings,
        store: Reads,
        metrics: Metrics,
        *,
        mqtt: Callable[[], Mqtt],
        client_id: Callable[[], str],
        able: Callable[[], bool],
        report: Callable[[str | None], None],
        subscribe_again: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        Args:
            settings: all of them.
            store: connected before `run`.
            metrics: where it counts.
            mqtt: where the broker is, with the login that counts now.
            client_id: that of the process's session, at present.
            able: whether nothing else is wrong with the service.
            report: told at every look since when deliveries have stopped, or None.
            subscribe_again: sends SUBSCRIBE once more.
            now: the clock, monotonic seconds.
        """
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._mqtt = mqtt
        self._client_id = client_id
        self._able = able
        self._report = report
        self._subscribe_again = subscribe_again
        self._now = now
        canary = settings.canary
        self.watch = Watch(canary.interval_seconds, canary.timeout_seconds)
        self._unit_us = _UNIT_US.get(settings.shadow.timestamp_unit, 1)
        self._sequence = time.time_ns() // 1000
        self._last_us = 0
        self._subscribed_at = -math.inf
        self._was_lost = False
        self._published = asyncio.Event()

    async def run(self) -> None:
        """Publish and read until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._for_ever(self._publish_all), name="canary publisher")
            group.create_task(self._for_ever(self._look_all), name="canary reader")

    async def _for_ever(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception:  # noqa: BLE001 - rule 4
                _log.exception("the canary failed", limit_by="canary")
                await asyncio.sleep(_CONNECT_AGAIN_SECONDS[1])

    # ---------------------------------------------------------------- publishing

    async def _publish_all(self) -> None:
        """Connect and publish until the connection ends; each connection has the present login."""
        mqtt, limits = self._mqtt(), self._settings.limits
        name = f"{mqtt.share_group}-canary-{uuid.uuid4().hex[:12]}"
        publisher = Publisher(mqtt, client_id=name, max_in_flight=1, reconnect=False)
        try:
            async with publisher:
                while True:
                    if self._able():
                        await self._publish(publisher)
                    spread = random.uniform(1 - _INTERVAL_JITTER, 1 + _INTERVAL_JITTER)  # noqa: S311
                    await asyncio.sleep(self._settings.canary.interval_seconds * spread)
        except MqttError as error:
            self._not_published(error)
            waits = _CONNECT_AGAIN_SECONDS
            if isinstance(error, MqttRefused):  # a login that is tried too often gets locked
                waits = (limits.login_retry_min_seconds, limits.login_retry_max_seconds)
            await asyncio.sleep(random.uniform(*waits))  # noqa: S311

    async def _publish(self, publisher: Publisher) -> None:
        if not self._last_us:
            await self._learn_time()
        self._sequence += 1
        sequence, sent = self._sequence, self._now()
        topic, payload = self.update(sequence)
        try:
            code = await publisher.publish(topic, payload, limit_seconds=_PUBLISH_SECONDS)
        except MqttRefused as error:
            self._not_published(error)
            return
        self._metrics.canary.published += 1
        self.watch.published(sequence, sent)
        self._published.set()
        if code == NO_MATCHING_SUBSCRIBERS:
            self._doubt("the broker says that nobody gets it")

    def update(self, sequence: int) -> tuple[str, bytes]:
        """Return topic and payload of an update; its time is later than all before."""
        self._last_us = max(time.time_ns() // 1000, self._last_us + 1)
        leaf = self.watch.path(sequence)[1:]
        document: dict[str, object] = {"state": {"reported": {leaf: sequence}}}
        # In the unit that devices have; the version fills the digits that it leaves free.
        stamp, digits = divmod(self._last_us, self._unit_us)
        document["timestamp"] = stamp
        if self._unit_us > 1:
            document["version"] = digits
        topic = f"{self._settings.mqtt.topic_prefix}/{self._settings.canary.device}"
        return f"{topic}/shadow/name/{self.shadow}/update", orjson.dumps(document)

    @property
    def shadow(self) -> str:
        """Name of this process's shadow."""
        return shadow_name(self._client_id())

    async def _learn_time(self) -> None:
        """Find the time of the last update before this process, which a clock may have left."""
        with contextlib.suppress(StoreError):
            await self._read()

    def _not_published(self, error: MqttError) -> None:
        self._metrics.canary.unpublished[error.reason] += 1
        what = f"{self._settings.mqtt.topic_prefix}/{self._settings.canary.device}/#"
        _log.warning(
            "the canary is not published",
            reason=error.reason,
            error=str(error),
            advice=f"allow SHADOWSVC_MQTT__USERNAME to publish to {what}, or set "
            "SHADOWSVC_CANARY__ENABLED to false"
            if isinstance(error, MqttRefused)
            else None,
            limit_by=f"canary {error.reason}",
        )

    # ---------------------------------------------------------------- reading back

    async def _look_all(self) -> None:
        pause = _POLL_MIN_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._published.wait()
            if self._published.is_set():
                self._published.clear()
                pause = _POLL_MIN_SECONDS
            await self._look()
            pause = min(2 * pause, _POLL_MAX_SECONDS) if self.watch.waiting else _POLL_MAX_SECONDS

    async def _look(self) -> None:
        watch = self.watch
        judgement = None
        if self._able():
            with contextlib.suppress(StoreError):
                values = await self._read() if watch.waiting else {}
                judgement = watch.look(values, self._now())
        if judgement is None:
            judgement = watch.excuse()
        metrics = self._metrics
        for seconds in judgement.seconds:
            metrics.canary.seconds.observe(seconds)
        metrics.canary.durable += len(judgement.seconds)
        metrics.canary.lost += judgement.lost
        metrics.canary.excused += judgement.excused
        now = self._now()
        if watch.late(now):
            self._doubt("it does not become durable")
        self._tell(now)

    async def _read(self) -> Mapping[str, tuple[str, int]]:
        values = await self._store.read_reported(self._settings.canary.device, self.shadow)
        self._last_us = max(self._last_us, *(time_us for _, time_us in values.values()), 0)
        return values

    def _doubt(self, why: str) -> None:
        """Subscribe again, once an interval."""
        now = self._now()
        if now - self._subscribed_at >= self.watch.late_seconds and self._subscribe_again():
            self._subscribed_at = now
            _log.warning("subscribing again: the canary is late", why=why, limit_by="canary late")

    def _tell(self, now: float) -> None:
        since = self.watch.doubt_since
        lost = since is not None and self.watch.lost(now)
        if lost != self._was_lost:
            self._was_lost = lost
            if lost:
                _log.error("the canary is lost: published updates do not become durable")
            else:
                _log.info("the canary is no longer lost")
        self._report(f"none for {now - since:.0f} s" if lost and since is not None else None)


def shadow_name(client_id: str) -> str:
    """Return the shadow name of a client id: itself, or as much of it as a name may hold."""
    name = _NO_NAME.sub("-", client_id)[:_MAX_NAME_CHARS]
    if name == client_id:
        return name
    digest = hashlib.sha256(client_id.encode()).hexdigest()[:_HASH_CHARS]
    return f"{name[: _MAX_NAME_CHARS - _HASH_CHARS - 1]}-{digest}"
