"""A device of Locust's side of the rig, in plain threads, at real brokers."""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import threading
import time
from collections import Counter
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from backing import ListenerTls, Mosquitto
from load.backoff import Backoff
from load.device import Connected, Device, Message
from load.endpoints import Endpoint
from load.errors import BrokenConnection
from load.families import Mix, sequence_of
from load.locust.life import CONNECT, LOST, PUBACK, SUBSCRIBE, SUBSCRIBER, Life, Open
from load.locust.pace import Schedule
from load.locust.wire import Address, Wire
from load.websocket import WebSocketClient
from tests.certificates import LOCAL, Authority
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(60)

LIMIT_SECONDS = 20.0


class Stop(Exception):
    """Ends a life, as Locust ends a user."""


class World:
    """What a life needs, without Locust; keeps what it is told."""

    def __init__(self, url: str, *, interval_seconds: float = 0.05) -> None:
        self.endpoint = Endpoint.parse(url)
        self.backoff = Backoff("quick", least_seconds=0.05, most_seconds=0.2)
        self.connect_seconds = 5.0
        self.max_in_flight = 8
        self.qos = 1
        self.random = Random(1)
        self.plan = Schedule(interval_seconds, math.inf)
        self.waits: list[float] = []
        self.made: list[Open] = []
        self.answers: dict[int, int] = {}
        self.lost: list[int] = []
        self.counts: Counter[str] = Counter()
        self.measured: list[tuple[str, float | None, str]] = []
        self.stopped = False

    def clock(self) -> float:
        if self.stopped:
            raise Stop
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        time.sleep(seconds)

    def turn(self) -> None:
        self.counts["turns"] += 1

    def address(self, life: Life, attempt: int) -> Address:
        del life, attempt
        return Address(self.endpoint, socket.AF_INET, (self.endpoint.host, self.endpoint.port))

    def connected(self, life: Life, wire: Wire) -> None:
        del life
        assert wire.descriptor >= 0
        self.counts["connected"] += 1

    def disconnected(self, life: Life, *, stood: bool) -> None:
        del life
        self.counts["ended" if stood else "failed"] += 1

    def schedule(self) -> Schedule:
        return self.plan._replace(until=time.monotonic() + 0.05)

    def document(self, number: int, sequence: int, now_us: int) -> bytes:
        return Mix().document(number, sequence, now_us)

    def next_sequence(self, number: int) -> int:
        del number
        return len(self.made)

    def published(self, life: Life, made: Open, *, late_seconds: float) -> None:
        del life
        assert late_seconds >= 0
        self.made.append(made)

    def skipped(self) -> None:
        self.counts["skipped"] += 1

    def answered(self, life: Life, made: Open, reason: int) -> None:
        del life
        self.answers[made.sequence] = reason

    def unanswered(self, life: Life, made: Open) -> None:
        del life
        self.lost.append(made.sequence)

    def dropped(self, life: Life) -> None:
        del life
        self.counts["dropped"] += 1

    def record(
        self,
        life: Life,
        what: str,
        seconds: float | None,
        size_bytes: int = 0,
        error: Exception | None = None,
    ) -> None:
        del life, size_bytes
        self.measured.append((what, seconds, str(error or "")))

    def times(self, what: str) -> int:
        return sum(name == what and not error for name, _, error in self.measured)

    def errors(self, what: str) -> list[str]:
        return [error for name, _, error in self.measured if name == what and error]


def life_of(world: World, name: str, *, listens: bool = True, **given: Any) -> Life:
    websocket = WebSocketClient("") if world.endpoint.path is not None else None
    device = Device(name, websocket=websocket, **given)
    topic = f"things/{name}/shadow/update"
    return Life(3, device, topic, world, transport="WS" if websocket else "TCP", listens=listens)


@contextlib.contextmanager
def living(world: World, life: Life) -> Iterator[None]:
    """Let it live in a thread; then stop it as Locust does, and let it leave."""

    def live() -> None:
        with contextlib.suppress(Stop):
            life.live()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        world.stopped = True
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()
        world.stopped = False
        life.leave()


@pytest.fixture(scope="module")
def mosquitto() -> Iterator[Mosquitto]:
    with Mosquitto(websockets=True) as broker:
        yield broker


@pytest.mark.parametrize("transport", ["ws", "mqtt"])
def test_a_device_publishes_and_measures_until_it_is_told_to_leave(
    mosquitto: Mosquitto, unique: str, transport: str
) -> None:
    world = World(mosquitto.websockets_url if transport == "ws" else mosquitto.url)
    with living(world, life_of(world, unique)):
        wait_until(
            lambda: min(len(world.answers), world.times(SUBSCRIBER)) >= 20,
            "20 arrived",
            LIMIT_SECONDS,
        )
    assert set(world.answers) == {one.sequence for one in world.made}, "it waits for the last acks"
    assert set(world.answers.values()) == {0}
    assert world.lost == []
    assert (world.times(CONNECT), world.times(SUBSCRIBE)) == (1, 1)
    assert world.times(PUBACK) == len(world.answers)
    assert [one for one in world.measured if one[2]] == []
    assert world.counts["connected"] == world.counts["ended"] == 1
    times = [one.time_us for one in world.made]
    assert times == sorted(set(times)), "a later document has a later time"


def test_a_lost_connection_is_counted_once_and_waited_for_with_full_jitter(unique: str) -> None:
    with Mosquitto(websockets=True) as broker:
        world = World(broker.websockets_url)
        with living(world, life_of(world, unique)):
            wait_until(lambda: len(world.answers) >= 3, "it publishes", LIMIT_SECONDS)
            broker.kill()
            wait_until(
                lambda: len(world.errors(CONNECT)) >= 2, "it was refused twice", LIMIT_SECONDS
            )
            broker.start()
            before = len(world.made)
            wait_until(lambda: len(world.answers) > before + 3, "it publishes again", LIMIT_SECONDS)
    assert len(world.errors(LOST)) == 1
    assert world.counts["connected"] == 2
    assert len(world.waits) == 1 + len(world.errors(CONNECT))
    assert all(0 <= wait <= world.backoff.most_seconds for wait in world.waits)
    assert len(set(world.waits)) == len(world.waits), "no two waits are the same"
    sequences = [one.sequence for one in world.made]
    assert sequences == sorted(set(sequences)), "the sequence goes on over connections"


def test_what_has_no_puback_when_the_connection_breaks_has_failed(unique: str) -> None:
    with Mosquitto() as broker:
        world = World(broker.url)
        with living(world, life_of(world, unique, listens=False)):
            wait_until(lambda: len(world.answers) >= 2, "it publishes", LIMIT_SECONDS)
            broker.pause()
            held = len(world.made) + 3
            wait_until(lambda: len(world.made) >= held, "some have no answer", LIMIT_SECONDS)
            broker.kill()
            wait_until(lambda: bool(world.errors(LOST)), "the connection is lost", LIMIT_SECONDS)
    assert len(world.lost) >= 2
    assert set(world.lost) == {one.sequence for one in world.made} - set(world.answers)
    assert world.errors(PUBACK) == ["connection lost before PUBACK"] * len(world.lost)
    assert len(world.errors(LOST)) == 1


def test_no_more_are_on_their_way_than_allowed(unique: str) -> None:
    with Mosquitto() as broker:
        world = World(broker.url, interval_seconds=0.01)
        with living(world, life_of(world, unique, listens=False)):
            wait_until(lambda: len(world.answers) >= 2, "it publishes", LIMIT_SECONDS)
            broker.pause()
            wait_until(lambda: world.counts["skipped"] >= 5, "it holds back", LIMIT_SECONDS)
            assert len(world.made) - len(world.answers) <= world.max_in_flight
            broker.resume()
            before = len(world.made)
            wait_until(lambda: len(world.answers) > before, "it goes on", LIMIT_SECONDS)
    assert world.lost == []


def test_a_device_that_the_storm_takes_goes_without_a_word_and_comes_back(
    mosquitto: Mosquitto, unique: str
) -> None:
    world = World(mosquitto.url)
    with living(world, life_of(world, unique, listens=False)):
        wait_until(lambda: len(world.answers) >= 2, "it publishes", LIMIT_SECONDS)
        world.plan = Schedule(0.05, 0.0, stage=1, drop_share=1.0)
        wait_until(lambda: world.counts["connected"] == 2, "it is back", LIMIT_SECONDS)
        before = len(world.made)
        wait_until(lambda: len(world.answers) > before + 3, "it publishes again", LIMIT_SECONDS)
    assert world.counts["dropped"] == 1, "once as the stage begins, and not again in it"
    assert world.errors(LOST) == []
    assert len(world.waits) == 1


def test_a_refusal_is_a_failed_connect_with_its_reason(unique: str) -> None:
    with Mosquitto(users={"other": "secret"}) as broker:
        world = World(broker.url)
        with living(world, life_of(world, unique, username="other", password=b"wrong")):
            wait_until(
                lambda: len(world.errors(CONNECT)) >= 2, "it was refused twice", LIMIT_SECONDS
            )
    assert set(world.errors(CONNECT)) == {"connack not authorized"}
    assert world.counts["failed"] >= 2
    assert world.counts["connected"] == 0


# ------------------------------------------------------------------------------- the wire


def open_wire(address: Address, name: str) -> tuple[Device, Wire]:
    websocket = WebSocketClient("") if address.endpoint.path is not None else None
    device = Device(name, websocket=websocket)
    return device, Wire.open(device, address, 10)


def take(wire: Wire, wanted: type) -> Any:
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        for event in wire.receive(1):
            if isinstance(event, wanted):
                return event
    raise AssertionError(f"no {wanted.__name__}")


def test_a_certificate_is_checked_by_authority_and_name(tmp_path: Path, unique: str) -> None:
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "strange")
    certificate, key = authority.issue("server", LOCAL)
    with Mosquitto(tls=ListenerTls(certificate, key)) as broker:
        endpoint = Endpoint.parse(broker.url)

        def address(ca: Authority, name: str | None = None) -> Address:
            context = ssl.create_default_context(cafile=ca.ca)
            where = (endpoint.host, endpoint.port)
            return Address(endpoint, socket.AF_INET, where, None, context, name)

        _, wire = open_wire(address(authority), unique)
        assert take(wire, Connected)
        assert wire.receive(0.05) == [], "a wait ends without an error over TLS, too"
        wire.close()
        with pytest.raises(BrokenConnection, match="certificate not accepted"):
            open_wire(address(stranger), unique)
        with pytest.raises(BrokenConnection, match="certificate not accepted: Hostname mismatch"):
            open_wire(address(authority, "devices.example"), unique)


def test_a_connection_comes_from_its_source_address(unique: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = Endpoint.parse(f"mqtt://127.0.0.1:{server.getsockname()[1]}")
        where = (endpoint.host, endpoint.port)
        _, wire = open_wire(Address(endpoint, socket.AF_INET, where, "127.0.0.91"), unique)
        peer, (host, _) = server.accept()
        assert host == "127.0.0.91"
        peer.close()
        wire.close()
        with pytest.raises(BrokenConnection, match=r"cannot assign|--sources"):
            open_wire(Address(endpoint, socket.AF_INET, where, "192.0.2.1"), unique)


def test_a_wait_that_is_over_says_nothing_and_the_end_is_an_error(
    mosquitto: Mosquitto, unique: str
) -> None:
    endpoint = Endpoint.parse(mosquitto.url)
    address = Address(endpoint, socket.AF_INET, (endpoint.host, endpoint.port))
    device, wire = open_wire(address, unique)
    assert take(wire, Connected).session_present is False
    assert wire.receive(0) == []
    topic = f"things/{unique}/shadow/update"
    wire.send(device.subscribe(topic, 1))
    _, data = device.publish(topic, Mix().document(1, 7, 1), 1)
    wire.send(data)
    assert sequence_of(take(wire, Message).payload) == 7
    # The same client id again: the broker ends the older connection.
    _, other = open_wire(address, unique)
    with pytest.raises(BrokenConnection, match=r"closed by|reset"):
        take(wire, type(None))
    wire.close()
    assert wire.descriptor == -1
    other.close()
