"""What the devices see: thousands of connections, many to one broker, storms, addresses."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from backing import Mosquitto
from shadowsvc.ingress.model import Broker
from shadowsvc.ingress.supervise import read_template
from tests.ingress.devices import Device, Fleet
from tests.ingress.stage import LISTEN, Stage, broker_of, mosquittos, settings_of, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)

V2_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"  # of the PROXY protocol, version 2
FILES_FOR_EACH = 3  # the device's, and HAProxy's two


async def keep_connections(folder: Path, count: int, hosts: tuple[str, ...]) -> None:
    """Brokers are added and removed, then HAProxy is reloaded: every connection stays."""
    template = folder / "own.j2"
    template.write_text(read_template(None))
    settings = settings_of(folder, template_file=template, max_connections=count + 500)
    with contextlib.ExitStack() as stack:
        a, b, c = (stack.enter_context(broker) for broker in mosquittos(hosts))
        fleet = Fleet()
        async with Stage(settings) as stage:
            try:
                await stage.have(broker_of("a", a), broker_of("b", b))
                await fleet.grow(count, LISTEN, settings.listen_websocket)
                assert (await stage.connections()) == {"a": count // 2, "b": count // 2}

                await stage.have(broker_of("a", a), broker_of("b", b), broker_of("c", c))
                assert await fleet.alive() == count
                await stage.have(broker_of("b", b), broker_of("c", c))
                await until("a is leaving", lambda: stage.metrics.servers_leaving == 1)
                assert await fleet.alive() == count
                assert stage.metrics.changes == {"added": 2, "closed": 2, "deleted": 1}
                assert stage.metrics.reloads == {}

                template.write_text(template.read_text().replace("retries 3", "retries 2"))
                await until("it is reloaded", lambda: stage.metrics.reloads["done"] == 1)
                assert await fleet.alive() == count
                assert fleet.lost == 0
                await fleet.grow(20, LISTEN, settings.listen_websocket)
                assert "a" not in {
                    pod for pod, number in (await stage.connections()).items() if number
                }
            finally:
                fleet.close()


async def test_connections_stay_while_brokers_come_and_go(folder: Path) -> None:
    await keep_connections(folder, 200, ("127.0.0.31", "127.0.0.32", "127.0.0.33"))


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_5000_connections_stay_while_brokers_come_and_go(
    folder: Path, many_files: int
) -> None:
    assert many_files > 5000 * FILES_FOR_EACH, "ulimit -Hn is too low for this test"
    await keep_connections(folder, 5000, ("127.0.0.34", "127.0.0.35", "127.0.0.36"))


@pytest.fixture
def many_files() -> Iterator[int]:
    """As many files as the hard limit allows; the children have the limit, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("sources", "listeners", "room"),
    [(1, 1, 40), (3, 1, 120), (1, 2, 80), (3, 2, 240)],
)
async def test_sources_and_listeners_multiply_the_connections_to_one_broker(
    folder: Path, sources: int, listeners: int, room: int
) -> None:
    # 40 ports stand for the 64,000 of an address. The check of each server takes a port for a
    # moment, so there is none here.
    extra = ["listener 11999 127.0.0.41", "allow_anonymous true"] if listeners == 2 else []
    settings = settings_of(
        folder,
        listen_websocket=0,
        source_addresses=tuple(f"127.0.0.{51 + number}" for number in range(sources)),
        source_ports="20000-20039",
        mqtt_ports=("mqtt-0", "mqtt-1"),
        websocket_ports=(),
        health_check="off",
        connect_timeout_seconds=1,
    )
    fleet = Fleet()
    with Mosquitto(host="127.0.0.41", extra_config=extra) as mosquitto:
        ports = {"mqtt-0": mosquitto.port}
        if listeners == 2:
            ports["mqtt-1"] = 11999
        async with Stage(settings) as stage:
            try:
                await stage.have(Broker("only", mosquitto.host, ports))
                await fleet.grow(room, LISTEN, settings.listen_mqtt, websocket=False)
                assert await fleet.alive() == room
                assert (await stage.connections()) == {"only": room}
                # The next one finds no port.
                with pytest.raises((OSError, TimeoutError)):
                    await Device.connect(LISTEN, settings.listen_mqtt, name="more", limit_seconds=8)
                assert await fleet.alive() == room
            finally:
                fleet.close()


# ------------------------------------------------------------------------------- PROXY protocol


class Recorder:
    """A server that keeps the first bytes of each connection."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> int:
        self._server = await asyncio.start_server(self._take, host, 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                while len(head) < 1000 and (data := await reader.read(1000)):
                    head += data
        self.heads.append(head)
        writer.close()


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_the_proxy_protocol_tells_the_devices_address(folder: Path, version: str) -> None:
    recorder = Recorder()
    port = await recorder.start("127.0.0.42")
    settings = settings_of(folder, proxy_protocol=version, listen_websocket=0)
    async with Stage(settings) as stage:
        await stage.have(Broker("recorder", "127.0.0.42", {"mqtt": port}))
        loop = asyncio.get_running_loop()

        def call() -> int:
            # The device comes from an address of its own.
            with socket.create_connection(
                (LISTEN, settings.listen_mqtt), 5, source_address=("127.0.0.77", 0)
            ) as device:
                device.sendall(b"hello")
                return int(device.getsockname()[1])

        source_port = await loop.run_in_executor(None, call)
        await until("it is recorded", lambda: any(b"hello" in head for head in recorder.heads))
    head = next(head for head in recorder.heads if b"hello" in head)
    if version == "v1":
        line = f"PROXY TCP4 127.0.0.77 {LISTEN} {source_port} {settings.listen_mqtt}\r\n"
        assert head == line.encode() + b"hello"
    else:
        assert head.startswith(V2_SIGNATURE + b"\x21\x11")  # version 2, PROXY; TCP over IPv4
        where = struct.unpack("!4s4sHH", head[16:28])
        assert where == (
            socket.inet_aton("127.0.0.77"),
            socket.inet_aton(LISTEN),
            source_port,
            settings.listen_mqtt,
        )
        assert head.endswith(b"hello")
    # Checks send the header, too, or the broker would complain about each.
    await recorder.stop()


async def test_without_it_nothing_is_put_in_front(folder: Path) -> None:
    recorder = Recorder()
    port = await recorder.start("127.0.0.43")
    settings = settings_of(folder, listen_websocket=0)
    async with Stage(settings) as stage:
        await stage.have(Broker("recorder", "127.0.0.43", {"mqtt": port}))
        _, writer = await asyncio.open_connection(LISTEN, settings.listen_mqtt)
        writer.write(b"hello")
        await writer.drain()
        writer.close()
        await until("it is recorded", lambda: b"hello" in recorder.heads)
    await recorder.stop()


# ------------------------------------------------------------------------------- storms


async def test_a_storm_of_connections_becomes_a_line(folder: Path, pods: list[Mosquitto]) -> None:
    settings = settings_of(folder, max_connection_rate=20, listen_websocket=0)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        fleet = Fleet()
        # All at once, and nobody is refused: who comes too fast waits.
        storm = asyncio.create_task(
            fleet.grow(100, LISTEN, settings.listen_mqtt, websocket=False, at_once=100)
        )
        begun, most = time.monotonic(), 0
        while not storm.done():
            reached = (await stage.connections())["a"]
            # What the broker has had to take, by the limit, with a second's worth on either side.
            allowed = 20 * (time.monotonic() - begun + 2)
            assert reached <= allowed
            most = max(most, reached)
            await asyncio.sleep(0.1)
        await storm
        assert most > 0
        assert await fleet.alive() == 100
        fleet.close()


async def test_one_source_that_connects_too_fast_is_refused_and_another_is_not(
    folder: Path, pods: list[Mosquitto]
) -> None:
    settings = settings_of(folder, max_connection_rate_per_source=10, listen_websocket=0)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        done = await asyncio.gather(
            *(
                Device.connect(LISTEN, settings.listen_mqtt, name=f"storm-{number}")
                for number in range(40)
            ),
            return_exceptions=True,
        )
        devices = [each for each in done if isinstance(each, Device)]
        refused = [each for each in done if isinstance(each, OSError)]
        assert devices
        assert refused
        assert len(devices) + len(refused) == 40

        def other() -> bytes:
            with socket.create_connection(
                (LISTEN, settings.listen_mqtt), 5, source_address=("127.0.0.78", 0)
            ) as device:
                device.sendall(bytes.fromhex("100d00044d51545405020005000000"))
                return device.recv(1)

        assert await asyncio.get_running_loop().run_in_executor(None, other) == b" "  # CONNACK
        for device in devices:
            device.close()


async def test_statistics_and_metrics_are_served(folder: Path, pods: list[Mosquitto]) -> None:
    settings = settings_of(folder)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        for path, wanted in (
            ("/metrics", b'haproxy_server_status{proxy="mqtt",server="a.mqtt"'),
            ("/stats", b"Statistics Report"),
            ("/health", b"ok"),
        ):
            reader, writer = await asyncio.open_connection(LISTEN, settings.listen_statistics)
            writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            async with asyncio.timeout(10):
                body = await reader.read()
            writer.close()
            assert wanted in body
