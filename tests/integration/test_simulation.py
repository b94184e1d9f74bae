"""What a simulation counts, against a real mosquitto."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiomqtt
import orjson
import pytest

from backing import Mosquitto
from shadowsvc.errors import ConnectionLost
from shadowsvc.settings import Mqtt
from shadowsvc.simulate import Expected, Message, Options, Shape, Simulation
from shadowsvc.simulate.command import simulate
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

OPTIONS = Options(devices=20, rate=1000, seconds=1, connections=4, drain_seconds=15)


@pytest.fixture
def own_broker() -> Iterator[Mosquitto]:
    """A broker with persistent sessions that a test may kill."""
    with Mosquitto(persistent=True, autosave_on_changes=True) as broker:
        yield broker


def settings(broker: Mosquitto) -> Mqtt:
    return Mqtt(url=broker.url, reconnect_min_seconds=0.05, reconnect_max_seconds=0.2)


class Everything(Expected):
    """Notes the payloads of acknowledged messages."""

    def __init__(self) -> None:
        super().__init__()
        self.acknowledged: list[bytes] = []

    def apply(self, message: Message) -> None:
        self.acknowledged.append(message.payload)
        super().apply(message)


@asynccontextmanager
async def listener(broker: Mosquitto) -> AsyncIterator[list[bytes]]:
    """An independent client that notes every payload."""
    got: list[bytes] = []

    async def listen(client: aiomqtt.Client) -> None:
        async for message in client.messages:
            got.append(bytes(message.payload))  # noqa: PERF401 - others look at it meanwhile

    options: Any = {"protocol": aiomqtt.ProtocolVersion.V5}
    async with aiomqtt.Client(broker.host, broker.port, **options) as client:
        await client.subscribe("things/+/shadow/#", qos=1)
        task = asyncio.create_task(listen(client))
        yield got
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_is_acknowledged_is_what_a_subscriber_gets(own_broker: Mosquitto) -> None:
    async with listener(own_broker) as got:
        everything = Everything()
        options = Options(devices=20, rate=1000, seconds=1, shape=Shape(bad_share=0.1))
        simulation = Simulation(settings(own_broker), options, everything)
        summary = await simulation.run()
        await until(lambda: len(got) >= summary.acknowledged)
    assert summary.complete
    assert not summary.interrupted
    assert 1000 <= summary.published == summary.acknowledged <= 1000 + 8 * 60
    assert sorted(got) == sorted(everything.acknowledged)
    assert summary.bad > 50
    assert summary.payload_bytes == sum(map(len, got))


async def test_without_a_subscriber_nothing_counts_as_acknowledged(own_broker: Mosquitto) -> None:
    everything = Everything()
    summary = await Simulation(settings(own_broker), OPTIONS, everything).run()
    assert summary.acknowledged == 0
    assert summary.unrouted == summary.published > 900
    assert not summary.complete
    assert everything.acknowledged == []


async def test_qos_0_is_never_acknowledged(own_broker: Mosquitto) -> None:
    async with listener(own_broker):
        options = Options(devices=5, rate=500, seconds=0.5, qos=0)
        summary = await Simulation(settings(own_broker), options).run()
    assert summary.acknowledged == 0
    assert summary.published > 200
    assert summary.unknown == 0


async def test_when_the_broker_dies_every_message_is_sent_again_until_it_is_answered(
    own_broker: Mosquitto,
) -> None:
    simulation = Simulation(settings(own_broker), OPTIONS)
    running = asyncio.create_task(simulation.run())
    await asyncio.sleep(0.4)
    own_broker.pause()  # so that there are publishes without an answer
    await asyncio.sleep(0.2)
    await asyncio.to_thread(own_broker.kill)
    await asyncio.to_thread(own_broker.start)
    summary = await running
    assert summary.reconnects >= 4
    assert summary.sent_again > 0
    assert summary.unknown == 0
    # Nobody is subscribed: each different message has its answer, and this is it.
    assert summary.unrouted == summary.published > 900


async def test_what_has_no_answer_in_time_is_in_doubt(own_broker: Mosquitto) -> None:
    expected = Expected()
    options = Options(devices=4, rate=200, seconds=0.3, drain_seconds=0.2)
    brief = settings(own_broker).model_copy(update={"connect_timeout_seconds": 0.5})
    simulation = Simulation(brief, options, expected)
    summary = await simulation.run(on_started=own_broker.pause)
    assert summary.unknown == summary.published > 0
    assert len(expected.uncertain) == 4


async def test_stop_ends_a_run_without_end_with_its_summary(own_broker: Mosquitto) -> None:
    async with listener(own_broker):
        options = Options(devices=5, rate=0, seconds=0, max_in_flight=10)
        simulation = Simulation(settings(own_broker), options)
        running = asyncio.create_task(simulation.run())
        await asyncio.sleep(0.3)
        progress = simulation.progress()
        simulation.stop()
        summary = await running
    assert progress.connected == 5
    assert progress.in_flight <= 50
    assert summary.interrupted
    assert summary.acknowledged == summary.published > 0


async def test_no_broker_at_the_start_is_an_error(own_broker: Mosquitto) -> None:
    own_broker.stop()
    with pytest.raises(ConnectionLost, match="SHADOWSVC_MQTT__URL"):
        await Simulation(settings(own_broker), OPTIONS).run()


def test_the_command_prints_one_json_object_and_fails_when_messages_are_lost(
    own_broker: Mosquitto, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(devices=2, rate=100, seconds=0.2)
    assert simulate(settings(own_broker), options, json=True) == 1
    result = orjson.loads(capsys.readouterr().out)
    assert result["unrouted"] == result["published"] > 0
    assert result["complete"] is False
