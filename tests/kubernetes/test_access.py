"""Who may do what at the broker, by the access lists of deploy/k8s.

mosquitto's is tried on a real mosquitto, with the configuration of the manifests; VerneMQ's, whose
image was not to be had, is compared with it line by line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import aiomqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from backing.ports import free_port
from backing.process import ServerProcess, find_program
from tests.kubernetes.manifests import K8S, overlay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

COMPONENT = K8S / "components" / "mosquitto"
RIGHT = "right"
PREFIX = overlay("dev").config_maps["shadowsvc", "shadowsvc"]["SHADOWSVC_MQTT__TOPIC_PREFIX"]
SHARE = f"$share/shadowsvc/{PREFIX}/+/shadow/update"
DEVICE_PORTS = (11883, 18083)
_SBIN = ("/usr/local/sbin", "/usr/sbin")


class Broker(NamedTuple):
    """Where the listeners of the manifests are here."""

    ports: dict[int, int]

    @contextlib.asynccontextmanager
    async def client(
        self, name: str, port: int, *, client_id: str | None = None, password: str = RIGHT
    ) -> AsyncIterator[aiomqtt.Client]:
        async with aiomqtt.Client(
            "127.0.0.1",
            self.ports[port],
            username=name,
            password=password,
            identifier=client_id or name,
            protocol=aiomqtt.ProtocolVersion.V5,
            transport="websockets" if port > 18000 else "tcp",
            websocket_path="/mqtt" if port > 18000 else None,
        ) as client:
            yield client

    def service(self) -> contextlib.AbstractAsyncContextManager[aiomqtt.Client]:
        return self.client("shadowsvc", 1883, client_id="shadowsvc-0")


@contextlib.contextmanager
def running(folder: Path, change: Callable[[str], str] = str) -> Iterator[Broker]:
    """A mosquitto with the files of the component, on ports and in folders of this machine."""
    folder.chmod(0o755)
    text = (COMPONENT / "mosquitto.conf").read_text()
    ports = {int(port): free_port(("127.0.0.1",)) for port in re.findall(r"listener (\d+)", text)}
    text = re.sub(
        r"^listener (\d+)$",
        lambda found: f"listener {ports[int(found[1])]} 127.0.0.1",
        text,
        flags=re.MULTILINE,
    )
    for given in ("config", "users", "data"):
        (folder / given).mkdir()
        text = text.replace(f"/mosquitto/{given}/", f"{folder}/{given}/")
    if os.geteuid() == 0:
        text += "\nuser root\n"
    (folder / "users" / "logins.acl").write_text(change((COMPONENT / "logins.acl").read_text()))
    hashing = find_program("mosquitto_passwd", package="mosquitto", folders=_SBIN)
    logins = folder / "users" / "logins"
    logins.write_text("shadowsvc:right\nd1:right\nd2:right\n")
    # As the manifest's first container does it.
    subprocess.run([hashing, "-U", str(logins)], check=True, capture_output=True, timeout=20)
    assert "right" not in logins.read_text()
    config = folder / "config" / "mosquitto.conf"
    config.write_text(change(text))
    program = find_program("mosquitto", package="mosquitto", folders=_SBIN)
    process = ServerProcess(
        "mosquitto", [program, "-c", str(config)], log_path=folder / "log", cwd=folder
    )

    def accepts() -> bool:
        for port in ports.values():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                continue
            return False
        return True

    process.start()
    try:
        process.wait_ready(accepts, 15)
        yield Broker(ports)
    finally:
        process.stop(10)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The broker of the manifests."""
    with running(tmp_path_factory.mktemp("mosquitto")) as broker:
        yield broker


async def test_without_the_mount_point_a_device_would_take_from_the_share(tmp_path: Path) -> None:
    """Why it is there: the same lists without it, and a device swallows what others publish."""

    def change(text: str) -> str:
        return text.replace("mount_point devices/\n", "").replace("devices/things", "things")

    topic = "$share/shadowsvc/things/+/shadow/update"
    with running(tmp_path, change) as broker:
        async with (
            broker.service() as service,
            broker.client("d2", 11883) as thief,
            broker.client("d1", 11883) as device,
        ):
            await service.subscribe(topic, qos=1)
            await thief.subscribe(topic, qos=1)
            for number in range(20):
                await device.publish("things/d1/shadow/update", b"%d" % number, qos=1)
            await thief.unsubscribe(topic)
            await device.publish("things/d1/shadow/update", b"end", qos=1)
            assert len(await collect(service, b"end")) < 20


async def collect(client: aiomqtt.Client, last: bytes) -> list[tuple[str, bytes]]:
    """Return what comes until a payload `last` does."""
    found = []
    async with asyncio.timeout(20):
        async for message in client.messages:
            assert isinstance(message.payload, bytes)
            found.append((str(message.topic), message.payload))
            if message.payload == last:
                break
    return found


@pytest.mark.parametrize("port", DEVICE_PORTS)
async def test_a_device_writes_only_below_its_own_things(broker: Broker, port: int) -> None:
    async with broker.service() as service, broker.client("d1", port) as device:
        await service.subscribe(SHARE, qos=1)
        await service.subscribe("shadowsvc/marker/+", qos=1)
        for topic in (
            "things/d2/shadow/update",
            "devices/things/d2/shadow/update",
            "shadowsvc/marker/shadowsvc-0",
            "$share/shadowsvc/things/d2/shadow/update",
        ):
            with contextlib.suppress(aiomqtt.MqttError):
                await device.publish(topic, b"forbidden", qos=1)
        await device.publish("things/d1/shadow/update", b"own", qos=1)
        assert await collect(service, b"own") == [(f"{PREFIX}/d1/shadow/update", b"own")]


@pytest.mark.parametrize("port", DEVICE_PORTS)
@pytest.mark.parametrize(
    "topic",
    [
        "$share/shadowsvc/things/+/shadow/update",
        SHARE,
        "$share/another/things/+/shadow/update",
        "things/+/shadow/update",
        "shadowsvc/marker/+",
        "#",
    ],
)
async def test_a_device_takes_nothing_of_the_share(broker: Broker, port: int, topic: str) -> None:
    async with (
        broker.service() as service,
        broker.client("d2", port) as thief,
        broker.client("d1", port) as device,
    ):
        await service.subscribe(SHARE, qos=1)
        with contextlib.suppress(aiomqtt.MqttError):
            await thief.subscribe(topic, qos=1)
        await thief.subscribe("things/d2/#", qos=1)
        sent = [b"%d" % number for number in range(20)]
        for payload in sent:
            await device.publish("things/d1/shadow/update", payload, qos=1)
        assert [payload for _, payload in await collect(service, sent[-1])] == sent
        await thief.publish("things/d2/end", b"end", qos=1)
        # Its own message, and no other's; mosquitto 2.0.11 leaves the mount point in front of it.
        taken = {
            (topic.removeprefix("devices/"), data) for topic, data in await collect(thief, b"end")
        }
        assert taken == {("things/d2/end", b"end")}


async def test_the_service_joins_the_share_and_uses_marker_and_canary(broker: Broker) -> None:
    async with broker.service() as service:
        await service.subscribe(f"$share/shadowsvc/{PREFIX}/+/shadow/name/+/update", qos=1)
        await service.subscribe("shadowsvc/marker/shadowsvc-3", qos=1)
        topic = f"{PREFIX}/shadowsvc-canary/shadow/name/shadowsvc-0/update"
        await service.publish(topic, b"canary", qos=1)
        await service.publish("shadowsvc/marker/shadowsvc-3", b"marker", qos=1)
        found = await collect(service, b"marker")
    assert found == [(topic, b"canary"), ("shadowsvc/marker/shadowsvc-3", b"marker")]


@pytest.mark.parametrize("port", [1883, *DEVICE_PORTS])
async def test_nobody_gets_in_without_a_login(broker: Broker, port: int) -> None:
    for name, password in (("shadowsvc", "wrong"), ("d1", "wrong"), ("nobody", "right")):
        with pytest.raises(aiomqtt.MqttError):
            async with broker.client(name, port, password=password):
                pass


async def test_a_device_at_the_listener_of_the_service_writes_its_own_alone(broker: Broker) -> None:
    """A NetworkPolicy keeps it away. Its rights go by its login, whatever client id it claims."""
    async with broker.service() as service, broker.client("d1", 1883, client_id="d2") as device:
        await service.subscribe(SHARE, qos=1)
        for topic in (f"{PREFIX}/d2/shadow/update", "shadowsvc/marker/shadowsvc-0"):
            with contextlib.suppress(aiomqtt.MqttError):
                await device.publish(topic, b"forged", qos=1)
        await device.publish(f"{PREFIX}/d1/shadow/update", b"own", qos=1)
        assert await collect(service, b"own") == [(f"{PREFIX}/d1/shadow/update", b"own")]


async def test_what_comes_while_the_service_is_away_waits_for_it(broker: Broker) -> None:
    """A pod that is replaced is away for a moment, and mosquitto goes on giving it its share.

    With `per_listener_settings` later versions than 2.0.11 drop it; the rollout's tests run one.
    """
    name, expiry = "shadowsvc-away", Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    expiry.SessionExpiryInterval = 600

    def member() -> aiomqtt.Client:
        return aiomqtt.Client(
            "127.0.0.1",
            broker.ports[1883],
            username="shadowsvc",
            password=RIGHT,
            identifier=name,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=False,
            properties=expiry,
        )

    async with member() as service:
        await service.subscribe(f"$share/away/{PREFIX}/+/shadow/update", qos=1)
    async with broker.client("d1", 11883) as device:
        await device.publish("things/d1/shadow/update", b"waits", qos=1)
    async with member() as service:
        assert await collect(service, b"waits") == [(f"{PREFIX}/d1/shadow/update", b"waits")]
        await service.unsubscribe(f"$share/away/{PREFIX}/+/shadow/update")


async def test_a_device_cannot_show_itself_as_another(broker: Broker) -> None:
    async with broker.service() as service:
        await service.subscribe(SHARE, qos=1)
        async with broker.client("d1", 11883, client_id="d2") as device:
            with contextlib.suppress(aiomqtt.MqttError):
                await device.publish("things/d2/shadow/update", b"forged", qos=1)
            await device.publish("things/d1/shadow/update", b"own", qos=1)
        assert await collect(service, b"own") == [(f"{PREFIX}/d1/shadow/update", b"own")]


def rights(text: str) -> set[tuple[str, str, str]]:
    """Return who, access and topic of each line; `pattern` is every device."""
    found, who = set(), ""
    for line in text.splitlines():
        word, *rest = line.split() or [""]
        if word == "user":
            who = rest[0]
        elif word in {"topic", "pattern"}:
            access, topic = rest
            name = who if word == "topic" else "device"
            both = ("read", "write") if access == "readwrite" else (access,)
            found |= {(name, each, topic) for each in both}
    return found


def test_vernemq_grants_what_mosquitto_grants() -> None:
    ours = rights((COMPONENT / "logins.acl").read_text())
    mosquitto = {(who, access, topic.removeprefix("devices/")) for who, access, topic in ours}
    vernemq = rights((K8S / "components" / "vernemq" / "vmq.acl").read_text())
    shares = {each for each in vernemq if each[2].startswith("$share/")}
    assert shares == {
        ("shadowsvc", "read", "$share/shadowsvc/things/+/shadow/update"),
        ("shadowsvc", "read", "$share/shadowsvc/things/+/shadow/name/+/update"),
    }
    assert vernemq - shares == mosquitto
    assert {each for each in vernemq if each[0] == "device"} == {
        ("device", "write", "things/%u/#"),
        ("device", "read", "things/%u/#"),
    }
