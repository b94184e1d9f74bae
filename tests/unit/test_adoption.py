"""One adoption over real loopback sockets, against the broker in memory: all of it, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import mqtt5
import pytest

import shadowsvc.mqtt.transport as transport_module
from shadowsvc.adoption import _Taker
from shadowsvc.errors import ConnectionLost, MqttError
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Metrics
from shadowsvc.mqtt.adopted import Marker, Step
from shadowsvc.mqtt.adoption import Adoption, End, Patience
from shadowsvc.mqtt.session import SessionOptions
from shadowsvc.mqtt.transport import Endpoint
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from tests.faulty_store import AWAY, FaultyStore
from tests.line import line, nothing_lost
from tests.memory_broker import Link, MemoryBroker, Server, serve
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

SHARE = "$share/g/things/+/shadow/update"
ORPHAN = "g-1"
MARKER_TOPIC = "shadowsvc/marker/g-1"
PATIENCE = Patience(quiet_seconds=0.1, stalled_seconds=0.5, restless_seconds=0.6)


class Orphan:
    """An orphan at a broker, and what adopts it."""

    def __init__(self, server: Server, *, receive_maximum: int, patience: Patience) -> None:
        self.server = server
        self.broker: MemoryBroker = server.broker
        self.store = FaultyStore()
        self.ledger = Ledger()
        self.metrics = Metrics()
        self.sent: list[str] = []
        self.markers: list[Marker] = []
        self.publish_marker: Callable[[Marker], None] = self.route_marker
        self.pipeline = Pipeline(
            Options(
                ORPHAN,
                receive_maximum,
                concurrency=2,
                retry_min_seconds=0.001,
                retry_max_seconds=0.01,
                marker_prefix="shadowsvc/marker/",
            ),
            Decoder(TopicParser("things"), Limits()),
            Batcher(None),
            self.store,
            self.ledger,
            self.metrics,
            lambda data: self.adoption.send(data),  # noqa: PLW0108 - made below
        )
        self.taker = _Taker(self.pipeline, self.metrics)
        self.endpoint = Endpoint("127.0.0.1", server.port, connect_timeout_seconds=0.5)
        self.patience = patience
        self.adoption = self.attempt()

    def attempt(self) -> Adoption:
        self.adoption = Adoption(
            self.endpoint,
            SessionOptions(ORPHAN, (SHARE,), keep_alive_seconds=1, session_expiry_seconds=300),
            [SHARE],
            MARKER_TOPIC,
            self.taker,
            self._publish,
            self.patience,
        )
        return self.adoption

    async def _publish(self, marker: Marker) -> None:
        await asyncio.sleep(0)
        self.markers.append(marker)
        self.publish_marker(marker)

    def route_marker(self, marker: Marker) -> None:
        self.broker.publish(marker.topic, marker.payload)

    def member(self, client_id: str = ORPHAN, *, receive_maximum: int = 100) -> Link:
        """Connect a member of the share that acknowledges nothing."""
        link = Link(self.broker, lambda _: None, lambda: None)
        link.receive(
            mqtt5.ConnectPacket(
                client_id, session_expiry_interval=300, receive_max=receive_maximum
            ).write()
        )
        topic_filter = mqtt5.TopicFilter(SHARE, max_qos=mqtt5.QoS.AT_LEAST_ONCE)
        link.receive(mqtt5.SubscribePacket(1, [topic_filter]).write())
        return link

    def leave_behind(self, count: int, *, in_flight: int = 5) -> None:
        """Have a member take `in_flight` messages and vanish; `count` in all wait for it."""
        member = self.member(receive_maximum=in_flight)
        self.publish(count)
        member.closed()

    def publish(self, count: int = 1) -> None:
        for _ in range(count):
            device = f"d{len(self.sent)}"
            self.sent.append(device)
            payload = b'{"state": {"reported": {"n": 1}}}'
            self.broker.publish(f"things/{device}/shadow/update", payload)

    @property
    def durable(self) -> list[str]:
        return sorted({write[0] for write in self.store.durable})

    @property
    def waiting(self) -> int:
        """Messages that the broker still holds for the orphan."""
        session = self.broker.sessions[ORPHAN]
        return len(session.queue) + len(session.in_flight)

    async def assert_kept(self) -> None:
        """See that nothing of the session was thrown away."""
        session = self.broker.sessions[ORPHAN]
        await until(lambda: session.link is None)
        assert self.broker.sessions[ORPHAN] is session
        assert session.expiry_seconds == 300
        acked = sum(message.topic.startswith("things/") for message in self.broker.acked)
        markers = sum(
            message.topic == MARKER_TOPIC
            for message in (*session.queue, *session.in_flight.values())
        )
        assert acked + self.waiting - markers == len(self.sent)
        assert acked <= len(self.durable)


@asynccontextmanager
async def orphan(
    *, receive_maximum: int = 20, patience: Patience = PATIENCE, broker: MemoryBroker | None = None
) -> AsyncIterator[Orphan]:
    with nothing_lost():
        async with serve(broker) as server:
            made = Orphan(server, receive_maximum=receive_maximum, patience=patience)
            try:
                yield made
            finally:
                await made.pipeline.close()


async def fails(attempt: Coroutine[Any, Any, End], *reasons: str) -> None:
    with pytest.raises(MqttError) as caught:
        async with asyncio.timeout(10):
            await attempt
    assert caught.value.reason in reasons


async def test_all_that_waits_is_written_and_acknowledged_before_the_session_ends() -> None:
    async with orphan() as made:
        made.leave_behind(500, in_flight=50)
        assert await made.adoption.run() is End.EMPTIED
        assert made.durable == sorted(made.sent)
        assert [message.payload for message in made.broker.acked][-1] == made.markers[0].payload
        assert len(made.broker.acked) == 501
        assert ORPHAN not in made.broker.sessions
        assert made.metrics.messages[3] == 50, "what was in flight came again"
        assert made.store.letters == []
        assert (made.metrics.markers, made.metrics.rejected) == (1, {})


async def test_an_end_that_is_lost_on_its_way_leaves_an_empty_session_without_the_share() -> None:
    """The connection is lost under DISCONNECT, which looks as if the broker had answered it."""
    async with orphan() as made:
        made.leave_behind(100)
        made.broker.dies_on = {mqtt5.DisconnectPacket}
        assert await made.adoption.run() is End.EMPTIED
        assert made.durable == sorted(made.sent)
        assert made.broker.links[-1].farewell is None
        assert made.waiting == 0
        assert made.broker.sessions[ORPHAN].filters == {MARKER_TOPIC}
        made.broker.publish("things/later/shadow/update", b"{}")
        assert (made.waiting, made.broker.unrouted) == (0, 1)
        # Whoever gets this client id next finds nothing in the way.
        made.broker.dies_on = set()
        assert await made.attempt().run() is End.EMPTIED
        assert made.broker.sessions == {}


async def test_the_adopted_session_never_joins_the_share() -> None:
    async with orphan() as made:
        made.leave_behind(10)
        await made.adoption.run()
        patterns = [
            one.pattern
            for packet in made.broker.links[-1].packets
            if isinstance(packet, mqtt5.SubscribePacket)
            for one in packet.topic_filters
        ]
        assert patterns == [MARKER_TOPIC]


async def test_new_messages_go_to_the_other_members_once_the_share_is_given_up() -> None:
    async with orphan(patience=PATIENCE._replace(stalled_seconds=5)) as made:
        made.leave_behind(10)
        made.publish_marker = lambda _: None
        task = asyncio.create_task(made.adoption.run())
        await until(lambda: made.markers)
        before = made.broker.links[-1].count(mqtt5.PubAckPacket)
        made.member("g-2")
        made.publish(20)
        made.route_marker(made.markers[0])
        assert await task is End.EMPTIED
        assert made.broker.links[-2].count(mqtt5.PubAckPacket) == 11 >= before
        assert len(made.broker.sessions["g-2"].in_flight) == 20


async def test_a_session_that_is_gone_is_absent_and_none_is_left_behind() -> None:
    async with orphan() as made:
        assert await made.adoption.run() is End.ABSENT
        assert made.broker.sessions == {}
        assert made.markers == []


async def test_a_marker_of_an_earlier_attempt_is_acknowledged_and_means_nothing() -> None:
    async with orphan() as made:
        made.leave_behind(3)
        made.publish_marker = lambda _: None
        await fails(made.adoption.run(), "stalled_publish")
        made.route_marker(made.markers[0])
        made.publish_marker = made.route_marker
        assert await made.attempt().run() is End.EMPTIED
        assert made.metrics.markers == 2
        assert made.store.letters == []
        assert [message.payload for message in made.broker.acked[-2:]] == [
            marker.payload for marker in made.markers
        ]


@pytest.mark.parametrize(
    ("silent_on", "reason"),
    [
        (mqtt5.ConnectPacket, "no_answer"),
        (mqtt5.SubscribePacket, "no_answer"),
        (mqtt5.UnsubscribePacket, "stalled_unsubscribe"),
    ],
)
async def test_a_broker_that_does_not_answer_is_left_with_the_session_kept(
    silent_on: type, reason: str
) -> None:
    async with orphan() as made:
        made.leave_behind(30)
        made.broker.silent_on = {silent_on}
        await fails(made.adoption.run(), reason)
        await made.assert_kept()
        made.broker.silent_on = set()
        assert await made.attempt().run() is End.EMPTIED
        assert made.durable == sorted(made.sent)


async def test_a_refused_connect_costs_nothing() -> None:
    async with orphan() as made:
        made.leave_behind(30)
        made.broker.refusal = mqtt5.ConnAckReasonCode.SERVER_UNAVAILABLE
        await fails(made.adoption.run(), "connack_server_unavailable")
        await made.assert_kept()


async def test_a_broker_that_is_away_costs_nothing() -> None:
    async with orphan() as made:
        made.leave_behind(30)
        await made.server.stop()
        await fails(made.adoption.run(), "connect")
        await made.assert_kept()


async def test_a_refused_unsubscribe_costs_nothing() -> None:
    async with orphan() as made:
        made.leave_behind(30)
        made.broker.unsuback = mqtt5.UnsubAckReasonCode.NOT_AUTHORIZED
        await fails(made.adoption.run(), "unsuback_not_authorized")
        await made.assert_kept()


async def test_a_subscription_that_was_granted_and_not_made_brings_no_marker() -> None:
    async with orphan() as made:
        made.leave_behind(30)
        made.broker.subscribes_nothing = True
        await fails(made.adoption.run(), "stalled_publish")
        assert made.markers
        await made.assert_kept()


async def test_a_marker_that_cannot_be_published_costs_nothing() -> None:
    def refuse(_: Marker) -> None:
        raise ConnectionLost("publish_timeout", "no answer")

    async with orphan() as made:
        made.leave_behind(30)
        made.publish_marker = refuse
        await fails(made.adoption.run(), "publish_timeout")
        await made.assert_kept()


@asynccontextmanager
async def standing_at(step: Step) -> AsyncIterator[tuple[Orphan, asyncio.Task[End]]]:
    """Begin to adopt 30 messages; the attempt stands still in this step."""
    async with orphan(patience=PATIENCE._replace(quiet_seconds=2, stalled_seconds=5)) as made:
        made.leave_behind(30)
        made.broker.silent_on = {
            Step.SUBSCRIBE: {mqtt5.SubscribePacket},
            Step.UNSUBSCRIBE: {mqtt5.UnsubscribePacket},
        }.get(step, set())
        if step is Step.PUBLISH:
            made.publish_marker = lambda _: None
        made.endpoint = Endpoint("127.0.0.1", made.server.port, connect_timeout_seconds=5)
        task = asyncio.create_task(made.attempt().run())
        await until(lambda: made.adoption.step is step)
        yield made, task


@pytest.mark.parametrize("step", [Step.SUBSCRIBE, Step.UNSUBSCRIBE, Step.PUBLISH, Step.MARKED])
async def test_a_connection_lost_in_any_step_costs_nothing(step: Step) -> None:
    async with standing_at(step) as (made, task):
        made.broker.links[-1].drop()
        await fails(asyncio.wait_for(task, 5), "closed_by_broker", "network")
        await made.assert_kept()


@pytest.mark.parametrize("step", [Step.SUBSCRIBE, Step.UNSUBSCRIBE, Step.PUBLISH, Step.MARKED])
async def test_a_cancelled_attempt_leaves_with_the_session_kept(step: Step) -> None:
    async with standing_at(step) as (made, task):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        link = made.broker.links[-1]
        assert link.farewell == 0
        assert isinstance(link.packets[-1], mqtt5.DisconnectPacket)
        assert link.packets[-1].session_expiry_interval is None
        await made.assert_kept()


async def test_an_attempt_that_is_cancelled_while_it_leaves_is_over_all_the_same() -> None:
    async with orphan(patience=PATIENCE._replace(quiet_seconds=2)) as made:
        made.leave_behind(30)
        task = asyncio.create_task(made.attempt().run())
        await until(lambda: made.adoption.step is Step.MARKED)
        epoch, acknowledged = made.ledger.epoch, made.ledger.acknowledged
        wire = made.adoption._wire
        assert wire is not None
        task.cancel()
        async with asyncio.timeout(5):
            while not wire.ended.done():  # noqa: ASYNC110 - no turn of the loop may be missed
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert made.ledger.epoch == epoch + 1, "what is completed now is acknowledged to nobody"
        await made.assert_kept()
        assert made.ledger.acknowledged == acknowledged


async def test_while_the_store_is_away_the_session_is_not_ended() -> None:
    async with orphan() as made:
        made.leave_behind(30)
        made.store.error = AWAY
        await fails(made.adoption.run(), "stalled_publish")
        assert made.metrics.write_retries, "the store did fail"
        await made.assert_kept()
        assert made.waiting == 31
        made.store.error = None
        await until(lambda: not made.ledger.held)
        assert await made.attempt().run() is End.EMPTIED
        assert made.durable == sorted(made.sent)


async def test_the_session_is_not_ended_while_the_last_write_is_under_way() -> None:
    async with orphan(patience=PATIENCE._replace(stalled_seconds=5)) as made:
        made.leave_behind(1)
        made.store.open.clear()
        task = asyncio.create_task(made.adoption.run())
        await until(lambda: made.adoption.step is Step.MARKED)
        await asyncio.sleep(3 * PATIENCE.quiet_seconds)
        assert not task.done()
        assert made.broker.acked == []
        made.store.open.set()
        assert await task is End.EMPTIED
        assert len(made.broker.acked) == 2


async def test_what_a_stopping_service_leaves_to_the_broker_is_not_thrown_away() -> None:
    async with orphan(receive_maximum=100) as made:
        made.leave_behind(30)
        made.pipeline.draining = True
        await fails(made.adoption.run(), "stalled_marked")
        assert made.metrics.discarded_draining == 31
        made.pipeline.draining = False
        await made.assert_kept()
        assert await made.attempt().run() is End.EMPTIED
        assert made.durable == sorted(made.sent)


async def test_a_message_after_the_marker_is_fetched_too() -> None:
    async with orphan(patience=PATIENCE._replace(quiet_seconds=0.3)) as made:
        made.leave_behind(3)
        task = asyncio.create_task(made.adoption.run())
        await until(lambda: made.adoption.step is Step.MARKED)
        made.broker.sessions[ORPHAN].filters.add(SHARE)  # of a node that did not know yet
        made.publish(2)
        assert await task is End.EMPTIED
        assert made.durable == sorted(made.sent)


async def test_a_session_that_goes_on_getting_messages_is_kept() -> None:
    async with orphan() as made:
        made.leave_behind(3)
        task = asyncio.create_task(made.adoption.run())
        await until(lambda: made.adoption.step is Step.MARKED)
        made.broker.sessions[ORPHAN].filters.add(SHARE)
        while not task.done():
            made.publish()
            await asyncio.sleep(0.02)
        await fails(asyncio.wait_for(task, 5), "restless")
        assert made.broker.sessions[ORPHAN].expiry_seconds == 300


async def test_an_owner_that_comes_back_gets_what_is_left() -> None:
    async with orphan() as made:
        made.leave_behind(30)
        made.store.open.clear()
        task = asyncio.create_task(made.adoption.run())
        await until(lambda: made.ledger.held >= 20)
        owner = made.member()
        await fails(asyncio.wait_for(task, 5), "session_taken_over")
        assert made.broker.sessions[ORPHAN].link is owner
        assert made.waiting >= 30


async def test_an_end_that_the_broker_does_not_confirm_is_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport_module, "_FAREWELL_SECONDS", 0.2)
    async with orphan() as made:
        made.leave_behind(3)
        made.broker.silent_on = {mqtt5.DisconnectPacket}
        await fails(made.adoption.run(), "end_unconfirmed")
        made.broker.silent_on = set()
        made.broker.links[-1].drop()
        assert await made.attempt().run() is End.EMPTIED


async def test_bad_documents_of_an_orphan_are_dead_letters() -> None:
    async with orphan() as made:
        made.leave_behind(3)
        for number in range(3):
            made.broker.publish("things/d/shadow/update", b"bad %d" % number)
        assert await made.adoption.run() is End.EMPTIED
        assert [letter.client_id for letter in made.store.letters] == [ORPHAN] * 3


async def test_a_marker_that_comes_to_the_slots_next_owner_is_acknowledged_and_nothing_else() -> (
    None
):
    async with line(marker_prefix="shadowsvc/marker/") as made:
        made.pipeline.begin_chunk()
        for packet_id, topic in enumerate((MARKER_TOPIC, "shadowsvc/markers"), start=1):
            packet = mqtt5.PublishPacket(
                topic, b"late", qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=packet_id
            )
            made.pipeline.publish(topic, packet)
        made.pipeline.end_chunk()
        await made.settle()
        assert made.acks == [1, 2]
        assert made.metrics.markers == 1
        assert [letter.topic for letter in made.store.letters] == ["shadowsvc/markers"]


async def test_an_orphan_may_be_adopted_again_and_again_until_it_works() -> None:
    broker = MemoryBroker()
    async with orphan(broker=broker, receive_maximum=7) as made:
        made.leave_behind(200)
        tries = 0
        while ORPHAN in broker.sessions:
            tries += 1
            assert tries < 60
            before = len(broker.acked)
            task = asyncio.create_task(made.attempt().run())
            await until(
                lambda before=before, task=task: len(broker.acked) >= before + 10 or task.done()
            )
            if tries < 10:
                broker.links[-1].drop()
            with contextlib.suppress(MqttError):
                await task
            await until(lambda: not made.ledger.held)
        assert tries >= 10
        assert made.durable == sorted(made.sent)
        assert made.ledger.received == (
            made.ledger.acknowledged + made.ledger.stale + made.ledger.abandoned
        )
