"""What the canary promises: the watch with a clock of its own, and all of it with a broker."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import mqtt5
import pytest
import structlog.testing

from shadowsvc.canary import Canary, Judgement, Watch, shadow_name
from shadowsvc.errors import StoreUnavailable
from shadowsvc.metrics import Metrics
from shadowsvc.settings import Settings
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from tests.memory_broker import MemoryBroker, serve
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NOTHING: dict[str, tuple[str, int]] = {}


def rows(watch: Watch, *sequences: int) -> dict[str, tuple[str, int]]:
    return {watch.path(sequence): (str(sequence), 1) for sequence in sequences}


@pytest.fixture
def watch() -> Watch:
    return Watch(interval_seconds=5, timeout_seconds=30)


# -------------------------------------------------------------------- the watch


def test_an_update_that_is_found_tells_how_long_it_took(watch: Watch) -> None:
    watch.published(7, 100.0)
    assert watch.look(NOTHING, 100.5) == ([], 0, 0)
    assert watch.look(rows(watch, 7), 101.25) == ([1.25], 0, 0)
    assert watch.waiting == 0
    assert watch.doubt_since is None
    assert watch.look(rows(watch, 7), 102.0) == ([], 0, 0)


def test_an_older_value_in_the_same_leaf_is_not_the_update(watch: Watch) -> None:
    watch.published(7, 100.0)
    assert watch.path(7) == watch.path(7 + watch.leaves)
    assert watch.look({watch.path(7): (str(7 - watch.leaves), 1)}, 101.0) == ([], 0, 0)
    assert watch.waiting == 1


def test_no_update_takes_the_leaf_of_another_within_the_time_limit(watch: Watch) -> None:
    under_way = range(1000, 1000 + 30 // 5 + 2)
    assert len({watch.path(sequence) for sequence in under_way}) == len(under_way)


def test_without_a_single_one_deliveries_have_stopped_after_the_time_limit(watch: Watch) -> None:
    for number in range(12):
        now = 100.0 + 5 * number
        assert watch.lost(now) is (now >= 130)
        assert watch.late(now) is (now >= 105)
        judgement = watch.look(NOTHING, now)
        assert judgement.lost == (1 if now >= 130 else 0)
        watch.published(number, now)


def test_one_that_is_found_ends_the_doubt(watch: Watch) -> None:
    for number in range(12):
        watch.published(number, 100.0 + 5 * number)
        watch.look(NOTHING, 100.0 + 5 * number)
    assert watch.lost(155.0)
    assert len(watch.look(rows(watch, 11), 156.0).seconds) == 1
    assert not watch.lost(156.0)
    assert not watch.late(156.0)


def test_one_that_another_process_holds_is_lost_and_the_rest_is_fine(watch: Watch) -> None:
    watch.published(0, 100.0)
    lost = 0
    for number in range(1, 20):
        now = 100.0 + 5 * number
        watch.published(number, now)
        judgement = watch.look(rows(watch, number), now + 0.1)
        lost += judgement.lost
        assert len(judgement.seconds) == 1
        assert not watch.late(now + 0.1)
        assert not watch.lost(now + 0.1)
    assert lost == 1


def test_what_was_published_after_one_that_was_found_is_doubted_from_then_on(watch: Watch) -> None:
    watch.published(1, 100.0)
    watch.published(2, 105.0)
    watch.look(rows(watch, 1), 106.0)
    assert watch.doubt_since == 105.0
    watch.published(3, 110.0)
    assert watch.doubt_since == 105.0
    assert not watch.lost(134.9)
    assert watch.lost(135.0)


def test_what_is_under_way_when_something_else_is_wrong_is_excused(watch: Watch) -> None:
    watch.published(1, 100.0)
    watch.published(2, 105.0)
    assert watch.excuse() == Judgement([], 0, 2)
    assert watch.excuse() == Judgement([], 0, 0)
    assert not watch.lost(1000.0)
    assert watch.look(NOTHING, 1000.0) == ([], 0, 0)


def test_every_update_ends_as_exactly_one_of_found_lost_excused_or_waiting() -> None:
    pick = random.Random(4)
    watch = Watch(1.0, 5.0)
    now, published, ended = 0.0, 0, 0
    for number in range(2000):
        now += pick.uniform(0.1, 2)
        if pick.random() < 0.8:
            watch.published(number, now)
            published += 1
        seen = rows(watch, *(each for each in range(number - 8, number + 1) if pick.random() < 0.2))
        judgement = watch.excuse() if pick.random() < 0.05 else watch.look(seen, now)
        ended += len(judgement.seconds) + judgement.lost + judgement.excused
        assert published == ended + watch.waiting
        assert watch.waiting <= watch.leaves * 2


# -------------------------------------------------------------------- names and documents


@pytest.mark.parametrize("name", ["a", "shadowsvc-0", "A.b:c@d=e_f-1", "x" * 128])
def test_a_client_id_that_can_be_a_shadow_is_one(name: str) -> None:
    assert shadow_name(name) == name


def test_other_client_ids_get_a_name_each() -> None:
    ids = ["a b", "a/b", "a b ", "größe", "x" * 129, "x" * 200, "+", "#"]
    names = [shadow_name(client_id) for client_id in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        assert TopicParser("t").parse(f"t/d/shadow/name/{name}/update") == ("d", name)


@pytest.mark.parametrize("unit", ["auto", "seconds", "milliseconds", "microseconds"])
def test_an_update_is_what_a_device_would_send_in_the_configured_unit(unit: str) -> None:
    settings = Settings.model_validate({"shadow": {"timestamp_unit": unit}})
    canary = made(settings, Shadow(), Metrics())
    canary._last_us = last = 2_000_000_000_123_456  # a clock that was ahead
    decoder = Decoder(TopicParser("things"), Limits(unit=unit))  # type: ignore[arg-type]
    times = []
    for sequence in (41, 42):
        topic, payload = canary.update(sequence)
        update = decoder.decode(topic, payload, [], last)
        times.append(update.time_us)
        assert (update.device, update.shadow) == ("shadowsvc-canary", "client")
        leaf = ("reported", canary.watch.path(sequence), str(sequence).encode())
        assert [(section, path, bytes(value)) for section, path, value in update.writes] == [leaf]
    assert times == [last + 1, last + 2]


# -------------------------------------------------------------------- with a broker


class Shadow:
    """What Cassandra would hold of the canary."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, int]] = {}
        self.error: StoreUnavailable | None = None
        self.reads = 0

    async def read_reported(self, device: str, shadow: str) -> dict[str, tuple[str, int]]:
        assert (device, shadow) == ("shadowsvc-canary", "client")
        self.reads += 1
        if self.error is not None:
            raise self.error
        return dict(self.rows)

    def write(self, payload: bytes) -> None:
        document = json.loads(payload)
        ((leaf, value),) = document["state"]["reported"].items()
        self.rows[f"/{leaf}"] = (json.dumps(value), document["timestamp"])


class Surroundings:
    """The rest of the service, as the canary sees it."""

    def __init__(self) -> None:
        self.able = True
        self.lost: str | None = None
        self.subscribed_again = 0

    def report(self, lost: str | None) -> None:
        self.lost = lost

    def subscribe_again(self) -> bool:
        self.subscribed_again += 1
        return True


def made(
    settings: Settings, shadow: Shadow, metrics: Metrics, around: Surroundings | None = None
) -> Canary:
    around = around or Surroundings()
    return Canary(
        settings,
        shadow,
        metrics,
        mqtt=lambda: settings.mqtt,
        client_id=lambda: "client",
        able=lambda: around.able,
        report=around.report,
        subscribe_again=around.subscribe_again,
    )


class Bench:
    """A broker, a shadow that its messages are written to or not, and a running canary."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.shadow = Shadow()
        self.metrics = Metrics()
        self.around = Surroundings()
        self.delivers = True
        self.published: list[bytes] = []

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, **_: Any) -> None:
        assert topic == "things/shadowsvc-canary/shadow/name/client/update"
        assert qos == 1
        self.published.append(payload)
        if self.delivers:
            self.shadow.write(payload)


@asynccontextmanager
async def running(
    broker: MemoryBroker | None = None, interval: float = 0.1, limit: float = 0.5
) -> AsyncIterator[Bench]:
    broker = broker or MemoryBroker()
    broker.takes_publishes = True
    bench = Bench(broker)
    broker.publish = bench.publish  # type: ignore[method-assign]
    async with serve(broker) as server:
        settings = Settings.model_validate(
            {
                "mqtt": {"url": f"mqtt://127.0.0.1:{server.port}", "reconnect_max_seconds": 0.2},
                "canary": {"interval_seconds": interval, "timeout_seconds": limit},
            }
        )
        canary = made(settings, bench.shadow, bench.metrics, bench.around)
        task = asyncio.create_task(canary.run())
        try:
            yield bench
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_updates_are_published_and_found() -> None:
    async with running() as bench:
        await until(lambda: bench.metrics.canary.durable >= 5)
        metrics = bench.metrics
        assert metrics.canary.published >= 5
        assert metrics.canary.lost == metrics.canary.excused == 0
        assert sum(metrics.canary.seconds.counts) == metrics.canary.durable
        assert bench.around.lost is None
        assert bench.around.subscribed_again == 0
        values = [json.loads(payload)["state"]["reported"].popitem() for payload in bench.published]
        sequences = [value for _, value in values]
        assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))


async def test_when_deliveries_stop_it_subscribes_again_and_then_says_so_until_they_go_on() -> None:
    async with running() as bench:
        await until(lambda: bench.metrics.canary.durable)
        bench.delivers = False
        with structlog.testing.capture_logs() as events:
            await until(lambda: bench.around.subscribed_again)
            assert bench.around.lost is None
            await until(lambda: bench.around.lost)
            await until(lambda: bench.metrics.canary.lost >= 2)
            bench.delivers = True
            await until(lambda: bench.around.lost is None)
        names = [event["event"] for event in events if event["event"].startswith("the canary is ")]
        assert names[-2:] == [
            "the canary is lost: published updates do not become durable",
            "the canary is no longer lost",
        ]


async def test_while_something_else_is_wrong_nothing_is_published_and_nothing_lost() -> None:
    async with running() as bench:
        await until(lambda: bench.metrics.canary.durable)
        bench.delivers = False
        count = len(bench.published)
        await until(lambda: len(bench.published) > count)
        bench.around.able = False
        await until(lambda: bench.metrics.canary.excused)
        await asyncio.sleep(0.3)
        count = len(bench.published)
        await asyncio.sleep(0.7)
        assert len(bench.published) == count
        assert bench.around.lost is None
        assert bench.metrics.canary.lost == 0
        bench.around.able = bench.delivers = True
        durable = bench.metrics.canary.durable
        await until(lambda: bench.metrics.canary.durable > durable)


async def test_a_shadow_that_cannot_be_read_is_an_outage_and_no_loss() -> None:
    async with running() as bench:
        await until(lambda: bench.metrics.canary.durable)
        bench.shadow.error = StoreUnavailable("unavailable", "no quorum")
        await until(lambda: bench.metrics.canary.excused >= 8)
        assert bench.around.lost is None
        assert bench.metrics.canary.lost == 0
        bench.shadow.error = None
        durable = bench.metrics.canary.durable
        await until(lambda: bench.metrics.canary.durable > durable)


async def test_a_publish_that_nobody_gets_makes_it_subscribe_again_at_once() -> None:
    broker = MemoryBroker()
    broker.puback = mqtt5.PubAckReasonCode.NO_MATCHING_SUBSCRIBERS
    async with running(broker, interval=5, limit=30) as bench:
        await until(lambda: bench.around.subscribed_again)
        assert bench.metrics.canary.published == 1


async def test_a_broker_that_refuses_the_publish_is_told_of_and_disturbs_nothing() -> None:
    broker = MemoryBroker()
    broker.puback = mqtt5.PubAckReasonCode.NOT_AUTHORIZED
    with structlog.testing.capture_logs() as events:
        async with running(broker) as bench:
            await until(lambda: bench.metrics.canary.unpublished["publish_refused"] >= 8)
            assert bench.around.lost is None
            assert bench.around.subscribed_again == 0
            assert bench.metrics.canary.published == bench.metrics.canary.lost == 0
            assert bench.shadow.reads < 15  # with nothing to find there is nothing to read
    told = [event for event in events if event["event"] == "the canary is not published"]
    assert all(event["limit_by"] == "canary publish_refused" for event in told)
    assert "SHADOWSVC_CANARY__ENABLED" in told[0]["advice"]


async def test_a_connection_that_is_lost_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shadowsvc.canary._CONNECT_AGAIN_SECONDS", (0.05, 0.1))
    async with running() as bench:
        await until(lambda: bench.metrics.canary.durable)
        bench.broker.links[-1].drop()
        before = bench.metrics.canary.durable
        await until(lambda: bench.metrics.canary.durable > before + 2)
        assert len(bench.broker.links) >= 2


async def test_a_defect_in_it_is_logged_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shadowsvc.canary._CONNECT_AGAIN_SECONDS", (0.05, 0.1))
    with structlog.testing.capture_logs() as events:
        async with running() as bench:
            await until(lambda: bench.metrics.canary.durable)
            bench.shadow.rows["/broken"] = ("1",)  # type: ignore[assignment]
            await until(lambda: any(event["event"] == "the canary failed" for event in events))
            del bench.shadow.rows["/broken"]
            before = bench.metrics.canary.durable
            await until(lambda: bench.metrics.canary.durable > before)


async def test_a_clock_that_was_ahead_does_not_hide_the_updates() -> None:
    async with running() as bench:
        bench.shadow.rows["/old"] = ("1", 9_000_000_000_000_000)
        await until(lambda: bench.metrics.canary.durable >= 2)
        assert json.loads(bench.published[-1])["timestamp"] > 9_000_000_000_000_000
