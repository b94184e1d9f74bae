"""Locust with the rig's users, as a person runs it: real processes, a real broker."""

from __future__ import annotations

import contextlib
import json
import signal
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from backing import Mosquitto, free_port
from tests.load.locust_process import LIMIT_SECONDS, Locust
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

STATISTICS = {"connect", "subscribe", "publish to PUBACK", "publish to subscriber"}


@pytest.fixture(scope="module")
def mosquitto() -> Iterator[Mosquitto]:
    with Mosquitto(websockets=True) as broker:
        yield broker


@contextlib.contextmanager
def subscriber(host: str, port: int, topic: str) -> Iterator[set[tuple[str, int]]]:
    """Yield what arrives: device and sequence number."""
    seen: set[tuple[str, int]] = set()

    def heard(_: Any, __: Any, message: paho.MQTTMessage) -> None:
        sequence = json.loads(message.payload)["state"]["reported"]["seq"]
        seen.add((message.topic.split("/")[1], sequence))

    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    client.on_message = heard
    client.connect(host, port)
    client.loop_start()
    granted: list[Any] = []
    client.on_subscribe = lambda *arguments: granted.append(arguments)
    client.subscribe(topic, 1)
    wait_until(lambda: bool(granted), "it is subscribed", 20)
    yield seen
    client.disconnect()
    client.loop_stop()


def test_a_device_may_have_any_descriptor(mosquitto: Mosquitto, tmp_path: Path) -> None:
    # A select() would end at 1023.
    arguments = ("--host", mosquitto.url, "-u", "1100", "-r", "550", "--connect-rate", "1000")
    with Locust(tmp_path, *arguments, "--interval", "5", "--watch", "3") as locust:
        wait_until(lambda: " 1100 connected" in locust.log(), "all have connected", 120)
        locust.finish()
    figures = locust.figures()["the rig"]
    assert figures["highest_descriptor"] > 1023
    assert figures["event_loop"] == "epoll"
    assert figures["connects"] == 1100
    assert locust.statistics("connect")["num_failures"] == 0
    acknowledged = locust.acknowledged()
    heard = locust.statistics("publish to subscriber")["num_requests"]
    assert heard == sum(map(len, acknowledged.values())), "the three that listen were heard"
    assert len(acknowledged) == 3, "nobody is subscribed to the others"


def test_workers_share_the_devices_and_ctrl_c_leaves_everything(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    arguments = ("--host", f"{mosquitto.websockets_url},{mosquitto.url}", "--processes", "2")
    with (
        subscriber(mosquitto.host, mosquitto.port, "things/+/shadow/update") as seen,
        Locust(tmp_path, *arguments, "-u", "40", "-r", "40", "--interval", "0.5") as locust,
    ):
        wait_until(lambda: len({device for device, _ in seen}) == 40, "all have published", 120)
        assert locust.finish() == 0
        acknowledged = locust.acknowledged()
        wanted = {(device, each) for device in acknowledged for each in acknowledged[device]}
        wait_until(lambda: wanted <= seen, "what was acknowledged arrives", LIMIT_SECONDS)
    assert len(list(tmp_path.glob("journal.*"))) == 2
    assert len(acknowledged) == 40, "no two devices have the same number"
    for name in STATISTICS:
        found = locust.statistics(name)
        assert found["num_requests"] > 0, name
        assert found["num_failures"] == 0, name
        assert found["methods"] == {"WS", "TCP"}, name
    assert locust.statistics("publish to PUBACK")["num_requests"] == len(wanted)
    figures = locust.figures()
    assert set(figures) == {"worker 0", "worker 1", "the master"}
    assert sum(figures[each].get("acknowledged", 0) for each in figures) == len(wanted)
    assert locust.heading().startswith("The rig was ")
    assert "bottleneck" in locust.log()


def test_a_shape_ramps_storms_and_ends_by_itself(mosquitto: Mosquitto, tmp_path: Path) -> None:
    shape = "ramp:3:20:20,plateau:3,storm:8:0.5,drain:2"
    arguments = ("--host", mosquitto.url, "--shape", shape, "--backoff-max", "1")
    with Locust(tmp_path, *arguments) as locust:
        assert locust.wait(120) == 0
    figures = locust.figures()["the rig"]
    assert 1 <= figures["dropped"] <= 20
    assert figures["connects"] == 20 + figures["dropped"], "who was dropped came back"
    assert locust.statistics("connection lost")["num_requests"] == 0, "a storm is no failure"
    assert figures["connected"] == 0
    assert figures["published"] > 20


def test_sigterm_leaves_the_report_too(mosquitto: Mosquitto, tmp_path: Path) -> None:
    arguments = ("--host", mosquitto.url, "-u", "5", "-r", "5", "--interval", "0.2")
    with (
        subscriber(mosquitto.host, mosquitto.port, "things/+/shadow/update") as seen,
        Locust(tmp_path, *arguments) as locust,
    ):
        wait_until(lambda: len({device for device, _ in seen}) == 5, "all publish", LIMIT_SECONDS)
        locust.interrupt(signal.SIGTERM)
        locust.wait()
    assert locust.figures()["the rig"]["connects"] == 5
    assert "requests_statistics" in locust.report_path.read_text(), "with Locust's own part"


def test_a_rig_that_is_overloaded_says_that_its_figures_are_its_own(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    arguments = ("--host", mosquitto.url, "-u", "200", "-r", "200", "--connect-rate", "1000")
    with Locust(tmp_path, *arguments, "--interval", "0.001", "-t", "8s") as locust:
        locust.wait(120)
    verdict = locust.figures()["the rig"]["verdict"]
    assert verdict["bad_seconds"] > 0
    assert locust.heading().startswith("The rig was the bottleneck: 1 of 1 processes")
    assert "the rig was the bottleneck for" in locust.log()


def test_the_page_starts_and_stops_a_run(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with Locust(tmp_path, "--host", mosquitto.url, "--interval", "0.2", headless=False) as locust:

        def page(path: str, **fields: str) -> bytes:
            data = urllib.parse.urlencode(fields).encode() if fields else None
            url = f"http://127.0.0.1:{locust.web_port}{path}"
            with urllib.request.urlopen(url, data, timeout=20) as answer:
                body: bytes = answer.read()
                return body

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return b"Locust" in page("/")
            return False

        wait_until(answers, "the page answers", LIMIT_SECONDS)
        assert b"devices_per_worker" in page("/"), "the rig's options are on the page"
        # What the page says counts, not what the command line said.
        started = page("/swarm", user_count="6", spawn_rate="6", host=mosquitto.url, watch="2")
        assert json.loads(started)["success"] is True

        def found() -> dict[str, int]:
            entries = json.loads(page("/stats/requests"))["stats"]
            return {one["name"]: one["num_requests"] for one in entries}

        wait_until(
            lambda: found().get("publish to PUBACK", 0) > 10, "updates are answered", LIMIT_SECONDS
        )
        assert found()["connect"] == 6
        assert found()["subscribe"] == 2
        page("/stop", now="yes")
        wait_until(
            lambda: "bottleneck" in locust.log(), "it says what it thinks of itself", LIMIT_SECONDS
        )
        locust.finish()
    assert locust.figures()["the rig"]["connected"] == 0


def test_publish_to_durable_is_measured_where_the_service_acknowledges(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    port = free_port()
    arguments = ("--host", mosquitto.url, "-u", "5", "-r", "5", "--interval", "0.2")
    observe = ("--observe", f"{mosquitto.host}:{mosquitto.port}", "--observe-port", str(port))
    with Locust(tmp_path, *arguments, *observe) as locust:
        wait_until(lambda: f":{port}" in locust.log(), "it listens", LIMIT_SECONDS)
        # Whoever acknowledges stands for the service.
        with subscriber("127.0.0.1", port, "things/+/shadow/update") as seen:
            wait_until(lambda: len(seen) > 20, "updates arrive", LIMIT_SECONDS)
            locust.finish()
    found = locust.statistics("publish to durable")
    assert found["num_requests"] > 20
    assert found["num_failures"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no target"),
        (("--host", "http://127.0.0.1"), "target 'http://127.0.0.1'"),
        (("--host", "mqtt://127.0.0.1:1", "--shape", "ramp:1"), "the stage 'ramp:1'"),
    ],
)
def test_what_makes_no_sense_ends_at_once_with_2(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    with Locust(tmp_path, *arguments) as locust:
        assert locust.wait() == 2
    assert words in locust.log()
    assert "Traceback" not in locust.log()


def test_help_teaches(tmp_path: Path) -> None:
    with Locust(tmp_path, "--help") as locust:
        assert locust.wait() == 0
    for words in ("examples:", "publish to PUBACK", "--shape", "LOAD_SHAPE", "--locust-help"):
        assert words in locust.log()
