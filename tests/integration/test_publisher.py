"""What the publisher promises, against a real mosquitto."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiomqtt
import pytest

from backing import ListenerTls, Mosquitto
from shadowsvc.errors import ConnectionLost, MqttError, MqttRefused
from shadowsvc.mqtt.publisher import NO_MATCHING_SUBSCRIBERS, SUCCESS, Publisher
from shadowsvc.settings import Mqtt
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

FAST = {"reconnect_min_seconds": 0.05, "reconnect_max_seconds": 0.2, "connect_timeout_seconds": 3}


@pytest.fixture(scope="module")
def broker() -> Iterator[Mosquitto]:
    with Mosquitto() as broker:
        yield broker


@pytest.fixture
def own_broker() -> Iterator[Mosquitto]:
    """A broker that a test may stop, kill and freeze."""
    with Mosquitto() as broker:
        yield broker


def settings(broker: Mosquitto, **more: Any) -> Mqtt:
    return Mqtt(url=broker.url, **{**FAST, **more})


@asynccontextmanager
async def subscribed(broker: Mosquitto, topic: str) -> AsyncIterator[aiomqtt.Client]:
    """An independent client that gets what is published to `topic`."""
    client = aiomqtt.Client(broker.host, broker.port, protocol=aiomqtt.ProtocolVersion.V5)
    async with client:
        await client.subscribe(topic, qos=1)
        yield client


async def until_not_connected(publisher: Publisher) -> None:
    await until(lambda: not publisher.connected)


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_topic_payload_and_user_properties_arrive(broker: Mosquitto, qos: int) -> None:
    async with subscribed(broker, "there/#") as client:
        async with Publisher(settings(broker), client_id="arrive") as publisher:
            sent = [("seq", "1"), ("name", "Größe"), ("seq", "2")]
            code = await publisher.publish("there/a", b"\x00\xff", qos=qos, user_properties=sent)
        assert code == SUCCESS
        message = await anext(client.messages)
    assert message.topic.value == "there/a"
    assert message.payload == b"\x00\xff"
    properties: Any = message.properties  # paho makes the attributes at run time
    assert properties.UserProperty == sent


async def test_a_message_that_nobody_gets_is_told_apart_from_success(broker: Mosquitto) -> None:
    async with Publisher(settings(broker), client_id="nobody") as publisher:
        assert await publisher.publish("nobody/listens", b"x") == NO_MATCHING_SUBSCRIBERS


async def test_no_more_than_the_window_is_in_flight_and_all_arrive_once_in_order(
    broker: Mosquitto,
) -> None:
    async with subscribed(broker, "window") as client:
        async with Publisher(settings(broker), client_id="window", max_in_flight=5) as publisher:
            highest = 0
            answers = []
            for number in range(200):
                answers.append(await publisher.send("window", b"%d" % number))
                highest = max(highest, publisher.in_flight)
            assert await asyncio.wait_for(asyncio.gather(*answers), 5) == [SUCCESS] * 200
            assert publisher.in_flight == 0
        assert highest == 5
        seen = [int(bytes((await anext(client.messages)).payload)) for _ in range(200)]
    assert seen == list(range(200))


async def test_the_brokers_receive_maximum_is_kept() -> None:
    with Mosquitto(extra_config=["max_inflight_messages 7"]) as broker:
        async with Publisher(settings(broker), client_id="maximum") as publisher:
            highest = 0
            answers = []
            for _ in range(50):
                answers.append(await publisher.send("maximum", b"x"))
                highest = max(highest, publisher.in_flight)
            await asyncio.wait_for(asyncio.gather(*answers), 5)
            assert publisher.in_flight == 0
        assert highest == 7


async def test_a_publish_that_the_broker_refuses_fails(tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite allowed/#\n")
    rules.chmod(0o600)
    with Mosquitto(extra_config=[f"acl_file {rules}"]) as broker:
        async with Publisher(settings(broker), client_id="refused") as publisher:
            assert await publisher.publish("allowed/a", b"x") == NO_MATCHING_SUBSCRIBERS
            with pytest.raises(MqttRefused, match=r"Not authorized \(0x87\)") as caught:
                await publisher.publish("forbidden/a", b"x")
            assert caught.value.reason == "publish_refused"
            assert publisher.connected


async def test_a_refused_login_names_the_settings() -> None:
    with Mosquitto(users={"device": "right"}) as broker:
        login = settings(broker, username="device", password="right")
        async with Publisher(login, client_id="login") as publisher:
            assert await publisher.publish("login", b"x") == NO_MATCHING_SUBSCRIBERS
        bad = settings(broker, username="device", password="wrong")
        wrong = Publisher(bad, client_id="login")
        with pytest.raises(MqttRefused, match="SHADOWSVC_MQTT__PASSWORD") as caught:
            await wrong.__aenter__()
        assert caught.value.reason == "connect_refused"


async def test_a_broker_that_is_not_there_names_the_setting(own_broker: Mosquitto) -> None:
    own_broker.stop()
    with pytest.raises(ConnectionLost, match="SHADOWSVC_MQTT__URL") as caught:
        await Publisher(settings(own_broker), client_id="absent").__aenter__()
    assert caught.value.reason == "connect_failed"


async def test_a_broker_that_does_not_answer_names_the_time_limit(own_broker: Mosquitto) -> None:
    own_broker.pause()
    slow = settings(own_broker, connect_timeout_seconds=0.3)
    with pytest.raises(ConnectionLost, match="SHADOWSVC_MQTT__CONNECT_TIMEOUT_SECONDS"):
        await Publisher(slow, client_id="silent").__aenter__()


async def test_what_is_in_flight_when_the_broker_dies_fails_and_a_new_connection_is_made(
    own_broker: Mosquitto,
) -> None:
    async with Publisher(settings(own_broker), client_id="again", max_in_flight=2) as publisher:
        own_broker.pause()
        answers = [await publisher.send("again", b"x") for _ in range(2)]
        waits_for_room = asyncio.create_task(publisher.publish("again", b"later"))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(own_broker.kill)
        for answer in answers:
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(answer, 5)
        await until_not_connected(publisher)
        await asyncio.to_thread(own_broker.start)
        assert await asyncio.wait_for(waits_for_room, 5) == NO_MATCHING_SUBSCRIBERS
        assert await publisher.publish("again", b"x") == NO_MATCHING_SUBSCRIBERS
        assert publisher.reconnects == 1


async def test_without_reconnect_a_lost_connection_stays_lost(own_broker: Mosquitto) -> None:
    async with Publisher(settings(own_broker), client_id="once", reconnect=False) as publisher:
        await asyncio.to_thread(own_broker.kill)
        await until_not_connected(publisher)
        await asyncio.to_thread(own_broker.start)
        with pytest.raises(ConnectionLost, match="lost"):
            await publisher.publish("once", b"x")


async def test_a_publish_without_an_answer_ends_at_its_limit(own_broker: Mosquitto) -> None:
    async with Publisher(settings(own_broker), client_id="limit") as publisher:
        own_broker.pause()
        with pytest.raises(ConnectionLost, match="no answer") as caught:
            await publisher.publish("limit", b"x", limit_seconds=0.1)
        assert caught.value.reason == "publish_timeout"
        own_broker.resume()
        assert await publisher.publish("limit", b"x") == NO_MATCHING_SUBSCRIBERS


async def test_close_ends_the_connection_and_fails_what_waits(own_broker: Mosquitto) -> None:
    publisher = Publisher(settings(own_broker, connect_timeout_seconds=0.5), client_id="close")
    await publisher.__aenter__()
    own_broker.pause()
    answer = await publisher.send("close", b"x")
    await publisher.close()
    await publisher.close()
    with pytest.raises(ConnectionLost, match="closed"):
        await answer
    with pytest.raises(ConnectionLost, match="closed"):
        await publisher.send("close", b"x")


async def test_a_cancelled_connect_leaves_no_connection(own_broker: Mosquitto) -> None:
    own_broker.pause()
    slow = settings(own_broker, connect_timeout_seconds=1)
    task = asyncio.create_task(Publisher(slow, client_id="cancelled").__aenter__())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    own_broker.resume()
    async with subscribed(own_broker, "$SYS/broker/clients/connected"):
        pass
    await asyncio.sleep(0.1)
    log = own_broker.log_path.read_text()
    assert log.count("New client connected") - log.count("disconnected") <= 1


async def test_cancelled_senders_do_not_take_others_turns(own_broker: Mosquitto) -> None:
    async with Publisher(settings(own_broker), client_id="turns", max_in_flight=1) as publisher:
        own_broker.pause()
        await publisher.send("turns", b"first")
        tasks = [asyncio.create_task(publisher.publish("turns", b"x")) for _ in range(6)]
        await asyncio.sleep(0.05)
        for task in tasks[::2]:
            task.cancel()
        own_broker.resume()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert [isinstance(result, asyncio.CancelledError) for result in done] == [True, False] * 3


async def test_wildcards_in_a_topic_are_the_callers_mistake(broker: Mosquitto) -> None:
    async with Publisher(settings(broker), client_id="wild") as publisher:
        with pytest.raises(ValueError, match="wildcard"):
            await publisher.publish("a/#", b"x")
        assert publisher.in_flight == 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    for name in ("server", "other"):
        command = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 "
            f"-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 "
            f"-keyout {folder}/{name}.key -out {folder}/{name}.pem"
        )
        subprocess.run(command.split(), check=True, capture_output=True, timeout=20)
    return folder


async def test_tls_trusts_the_given_authority_alone(certificates: Path) -> None:
    tls = ListenerTls(
        certificate=certificates / "server.pem",
        key=certificates / "server.key",
        ca=certificates / "other.pem",
        require_client_certificate=True,
    )
    own = {
        "certificate_file": certificates / "other.pem",
        "key_file": certificates / "other.key",
    }
    with Mosquitto(tls=tls) as broker:
        trusted = settings(broker, ca_file=certificates / "server.pem", **own)
        async with Publisher(trusted, client_id="tls") as publisher:
            assert await publisher.publish("tls", b"x" * 100_000) == NO_MATCHING_SUBSCRIBERS
        with pytest.raises(ConnectionLost, match="SHADOWSVC_MQTT__CA_FILE"):
            await Publisher(
                settings(broker, ca_file=certificates / "other.pem", **own), client_id="tls"
            ).__aenter__()
    with pytest.raises(MqttError, match="SHADOWSVC_MQTT__CA_FILE") as caught:
        await Publisher(
            settings(broker, ca_file=certificates / "absent.pem"), client_id="tls"
        ).__aenter__()
    assert caught.value.reason == "bad_tls"
