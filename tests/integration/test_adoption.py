"""The marker protocol on a real mosquitto: what was left behind is fetched, the session ended."""

from __future__ import annotations

import asyncio
import functools
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiomqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from backing import ListenerTls, Mosquitto
from shadowsvc.adoption import _Taker
from shadowsvc.errors import MqttError
from shadowsvc.mqtt.adopted import Step
from shadowsvc.mqtt.adoption import Adoption, End, Patience, publish_marker
from shadowsvc.mqtt.publisher import Publisher
from shadowsvc.mqtt.session import SessionOptions
from shadowsvc.mqtt.transport import Endpoint
from shadowsvc.settings import Mqtt
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from tests.certificates import LOCAL, Authority
from tests.line import Line, line
from tests.member import Member, session_present
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import mqtt5

pytestmark = pytest.mark.timeout(120)

PATIENCE = Patience(quiet_seconds=0.5, stalled_seconds=10, restless_seconds=20)
PAYLOAD = b'{"state": {"reported": {"n": 1}}}'


@pytest.fixture(scope="module")
def broker() -> Iterator[Mosquitto]:
    with Mosquitto() as broker:
        yield broker


class Orphan:
    """A slot's session at a broker, and what adopts it."""

    def __init__(self, broker: Mosquitto, name: str, **mqtt: Any) -> None:
        self.broker = broker
        self.name = name
        self.share = f"$share/{name}/{name}/+/shadow/update"
        self.topics: list[str] = []
        """Of what the adopted session delivered."""
        self.duplicates = 0
        self.mqtt = Mqtt(url=broker.url, share_group=name, connect_timeout_seconds=5, **mqtt)
        self.adoption: Adoption

    def attempt(self, line: Line, patience: Patience = PATIENCE, **endpoint: Any) -> Adoption:
        """Make one whose messages go to the pipeline of `line`."""
        taker = _Taker(line.pipeline, line.metrics)
        publish = taker.publish

        def seen(topic: str, packet: mqtt5.PublishPacket) -> None:
            self.topics.append(topic)
            self.duplicates += packet.duplicate
            publish(topic, packet)

        taker.publish = seen  # type: ignore[method-assign]
        self.adoption = Adoption(
            Endpoint(self.broker.host, self.broker.port, connect_timeout_seconds=5, **endpoint),
            SessionOptions(f"{self.name}-1", (self.share,), session_expiry_seconds=600),
            [self.share],
            f"shadowsvc/marker/{self.name}-1",
            taker,
            functools.partial(publish_marker, self.mqtt),
            patience,
        )
        line.pipeline._send = self.adoption.send
        return self.adoption

    async def publish(self, start: int, end: int) -> None:
        async with Publisher(self.mqtt, client_id=f"{self.name}-publisher") as publisher:
            answers = [
                await publisher.send(f"{self.name}/d{number}/shadow/update", PAYLOAD)
                for number in range(start, end)
            ]
            await asyncio.gather(*answers)

    async def leave_behind(self, count: int, in_flight: int) -> None:
        """Have the orphan take `in_flight` messages and vanish; `count` in all wait for it."""

        def take() -> None:
            with Member(self.broker, f"{self.name}-1", receive_maximum=in_flight) as member:
                member.subscribe(self.share)
                joined.set()
                member.take(in_flight)

        joined = asyncio.Event()
        loop = asyncio.get_running_loop()
        joined.set = functools.partial(loop.call_soon_threadsafe, joined.set)  # type: ignore[method-assign]
        taking = asyncio.create_task(asyncio.to_thread(take))
        await joined.wait()
        await self.publish(0, in_flight)
        await taking
        await self.publish(in_flight, count)

    def devices(self, count: int) -> list[str]:
        return sorted(f"d{number}" for number in range(count))


@asynccontextmanager
async def adopting(*, topic: str) -> AsyncIterator[Line]:
    async with line(
        client_id="orphan", receive_maximum=200, marker_prefix="shadowsvc/marker/"
    ) as made:
        made.pipeline.decoder = Decoder(TopicParser(topic), Limits())
        yield made


def durable(line: Line) -> list[str]:
    return sorted({write[0] for write in line.store.durable})


async def test_of_5000_messages_50_in_flight_all_come_before_the_marker(
    broker: Mosquitto, unique: str
) -> None:
    orphan = Orphan(broker, unique)
    await orphan.leave_behind(5000, in_flight=50)
    async with adopting(topic=unique) as made:
        attempt = orphan.attempt(made)
        assert await attempt.run() is End.EMPTIED
        assert len(orphan.topics) == 5001
        assert orphan.topics[-1] == f"shadowsvc/marker/{unique}-1"
        assert orphan.topics.count(orphan.topics[-1]) == 1
        assert orphan.duplicates == 50
        assert durable(made) == orphan.devices(5000)
        assert made.ledger.acknowledged == 5001
    assert not await asyncio.to_thread(session_present, broker, f"{unique}-1")


async def test_what_is_published_during_an_adoption_goes_to_the_members_that_live(
    broker: Mosquitto, unique: str
) -> None:
    """mosquitto gives absent members their share: the orphan has to give it up first."""
    orphan = Orphan(broker, unique)
    await orphan.leave_behind(60, in_flight=20)
    with Member(broker, f"{unique}-0") as member:
        await asyncio.to_thread(member.subscribe, orphan.share)
        await orphan.publish(60, 100)
        await asyncio.sleep(0)
        async with adopting(topic=unique) as made:
            attempt = orphan.attempt(made)
            task = asyncio.create_task(attempt.run())
            await until(lambda: attempt.step in {Step.PUBLISH, Step.MARKED}, 20)
            fetched = len(orphan.topics)
            await orphan.publish(100, 150)
            assert await task is End.EMPTIED
            late = {f"{unique}/d{number}/shadow/update" for number in range(100, 150)}
            assert not late & set(orphan.topics)
            assert fetched <= 101
            await asyncio.to_thread(member.take, 50 + (101 - len(orphan.topics)))
            assert {one.topic for one in member.messages} | set(orphan.topics) >= late
            # Of what came before, some went to the orphan, although it was absent.
            assert 60 < len(orphan.topics) < 101


async def test_an_attempt_that_is_cancelled_in_the_middle_costs_nothing(
    broker: Mosquitto, unique: str
) -> None:
    orphan = Orphan(broker, unique)
    await orphan.leave_behind(1000, in_flight=50)
    async with adopting(topic=unique) as made:
        for tries in range(1, 4):
            orphan.topics.clear()
            attempt = orphan.attempt(made)
            task = asyncio.create_task(attempt.run())
            await until(lambda: len(orphan.topics) >= 100, 20)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled(), f"attempt {tries} was too quick"
            await until(lambda: not made.ledger.held, 20)
        attempt = orphan.attempt(made)
        assert await attempt.run() is End.EMPTIED
        assert durable(made) == orphan.devices(1000)
    assert not await asyncio.to_thread(session_present, broker, f"{unique}-1")


async def test_a_session_that_is_gone_is_absent(broker: Mosquitto, unique: str) -> None:
    orphan = Orphan(broker, unique)
    async with adopting(topic=unique) as made:
        attempt = orphan.attempt(made)
        assert await attempt.run() is End.ABSENT
    assert not await asyncio.to_thread(session_present, broker, f"{unique}-1")


async def test_a_broker_that_falls_silent_is_left(unique: str) -> None:
    with Mosquitto() as broker:
        orphan = Orphan(broker, unique)
        await orphan.leave_behind(100, in_flight=50)
        async with adopting(topic=unique) as made:
            patience = Patience(quiet_seconds=60, stalled_seconds=1, restless_seconds=60)
            attempt = orphan.attempt(made, patience)
            made.store.open.clear()  # so that it is not over before the broker stands still
            task = asyncio.create_task(attempt.run())
            await until(lambda: len(orphan.topics) >= 100, 20)
            broker.pause()
            try:
                with pytest.raises(MqttError) as caught:
                    await task
            finally:
                broker.resume()
            assert caught.value.reason.startswith("stalled_")
            made.store.open.set()
            await until(lambda: not made.ledger.held, 20)
            attempt = orphan.attempt(made)
            assert await attempt.run() is End.EMPTIED
            assert durable(made) == orphan.devices(100)


async def test_it_works_over_tls_with_a_client_certificate(
    tmp_path_factory: pytest.TempPathFactory, unique: str
) -> None:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    certificate, key = authority.issue("broker", LOCAL)
    own_certificate, own_key = authority.issue("service", "DNS:service")
    tls = ListenerTls(certificate, key, ca=authority.ca, require_client_certificate=True)
    with Mosquitto(tls=tls) as broker:
        files = {
            "ca_file": authority.ca,
            "certificate_file": own_certificate,
            "key_file": own_key,
        }
        orphan = Orphan(broker, unique, **files)

        def context() -> ssl.SSLContext:
            made = ssl.create_default_context(cafile=authority.ca)
            made.load_cert_chain(own_certificate, own_key)
            return made

        async def leave_behind() -> None:
            with_share = aiomqtt.Client(
                broker.host,
                broker.port,
                identifier=f"{unique}-1",
                protocol=aiomqtt.ProtocolVersion.V5,
                clean_start=False,
                properties=expiring(600),
                tls_context=context(),
            )
            async with with_share as member:
                await member.subscribe(orphan.share, qos=1)
            await orphan.publish(0, 500)

        await leave_behind()
        async with adopting(topic=unique) as made:
            attempt = orphan.attempt(made, tls=context)
            assert await attempt.run() is End.EMPTIED
            assert durable(made) == orphan.devices(500)
            again = orphan.attempt(made, tls=context)
            assert await again.run() is End.ABSENT


def expiring(seconds: int) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = seconds
    return properties
