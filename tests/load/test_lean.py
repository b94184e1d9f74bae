"""The lean driver on a real mosquitto: what it counts is what happened."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import socket
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest

import backing
from load.connection import Connection
from load.device import Device
from load.endpoints import Endpoint
from load.errors import BadOption
from load.journal import read
from load.lean import Lean
from load.replay import line
from load.websocket import WebSocketClient
from tests.certificates import LOCAL, Authority
from tests.load.rig import options_for, run, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from load.report import Phase, Progress, Report

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def mosquitto() -> Iterator[backing.Mosquitto]:
    with backing.Mosquitto(websockets=True) as broker:
        yield broker


def phase(report: Report, name: str) -> Phase:
    return next(one for one in report.phases if one.name == name)


def url_of(broker: backing.Mosquitto, kind: str) -> str:
    return broker.url if kind == "tcp" else broker.websockets_url


@pytest.mark.parametrize("kind", ["tcp", "websocket"])
async def test_every_publish_is_acknowledged_and_heard(
    mosquitto: backing.Mosquitto, unique: str, kind: str, tmp_path: Path
) -> None:
    shape = "ramp:1:40:100,plateau:1.5:200,drain:0.5"
    options = options_for(
        unique,
        url_of(mosquitto, kind),
        shape=shape,
        watch=40,
        alone=False,
        journal=tmp_path / "journal",
    )
    # The subscriber is there before the first device: without one a publish would be lost.
    report = await run(dataclasses.replace(options, connect_rate=100))
    whole = report.whole
    assert report.connections == whole.connected == whole.connect.count == 40
    assert report.published == report.acknowledged + whole.unrouted
    assert whole.unrouted <= 20, "none after the subscription, which the first devices may precede"
    assert report.acknowledged == whole.puback.count > 200
    assert report.unheard == report.unanswered == whole.refused == whole.skipped == 0
    assert whole.heard == whole.to_subscriber.count == report.published - whole.unrouted
    assert not whole.failed
    assert not whole.lost
    entries = list(read(tmp_path / "journal")[1])
    assert len({(one.number, one.sequence) for one in entries}) == report.acknowledged
    times = [one.time_us for one in sorted(entries, key=lambda one: one.time_us)]
    assert len(set(times)) == len(times)


async def test_a_publish_that_nobody_took_is_missing(
    mosquitto: backing.Mosquitto, unique: str
) -> None:
    options = options_for(
        unique, mosquitto.url, shape="ramp:0.1:5,plateau:1:50", watch=0, alone=False
    )
    report = await run(options)
    assert report.published == report.missing == report.whole.unrouted > 20
    alone = await run(dataclasses.replace(options, alone=True))
    assert alone.published == alone.acknowledged > 20
    assert alone.missing == 0


async def test_a_storm_drops_half_and_all_come_back(
    mosquitto: backing.Mosquitto, unique: str
) -> None:
    report = await run(
        options_for(
            unique, mosquitto.url, shape="ramp:0.5:60,plateau:0.5,storm:3:0.5:100,drain:0.5"
        )
    )
    storm = phase(report, "storm")
    assert storm.dropped == 30
    assert storm.connected == 30
    assert storm.acknowledged > 0
    assert not report.whole.lost, "what the rig dropped itself was not lost"
    assert report.missing == 0


async def test_the_end_is_in_good_order(unique: str) -> None:
    with backing.Mosquitto(extra_config=("log_type all",)) as broker:
        await run(
            options_for(unique, broker.url, shape="ramp:0.3:20,plateau:0.3,drain:0.3", watch=0)
        )
        broker.stop()
        log = broker.log_path.read_text()
    assert len(re.findall(rf"Received DISCONNECT from {unique}-\d+", log)) == 20
    assert f"{unique}-1 disconnected" in log
    assert not re.findall(rf"{unique}-\d+ closed its connection", log)


async def test_quiet_devices_are_kept_alive(unique: str) -> None:
    with backing.Mosquitto(extra_config=("log_type all",)) as broker:
        report = await run(
            options_for(unique, broker.url, shape="ramp:0.2:20,plateau:4", keep_alive_seconds=1)
        )
        broker.stop()
        log = broker.log_path.read_text()
    assert not report.whole.lost
    assert len(set(re.findall(rf"Received PINGREQ from ({unique}-\d+)\n", log))) == 20
    assert "exceeded timeout" not in log


async def test_a_broker_that_fell_silent_is_given_up_and_tried_again(unique: str) -> None:
    with backing.Mosquitto() as broker:
        options = options_for(
            unique, broker.url, shape="ramp:0.2:20,plateau:60", keep_alive_seconds=1, watch=0
        )

        async def beside(lean: Lean) -> None:
            await until("all are up", lambda: lean.progress().connected == 20)
            broker.pause()
            await until("all are given up", lambda: lean.progress().lost == 20)
            broker.resume()
            await until("all are back", lambda: lean.progress().connected == 20)
            lean.stop()

        report = await run(options, beside)
    assert report.whole.lost == {"silent": 20}
    assert report.interrupted


async def test_a_killed_broker_costs_no_publish(unique: str, tmp_path: Path) -> None:
    with backing.Mosquitto(websockets=True) as broker:
        shape = "ramp:0.3:30,plateau:60:150"
        options = options_for(
            unique, broker.websockets_url, shape=shape, watch=0, journal=tmp_path / "journal"
        )

        async def beside(lean: Lean) -> None:
            await until("it publishes", lambda: lean.progress().acknowledged > 50)
            broker.kill()
            await until("all are lost", lambda: lean.progress().lost == 30)
            broker.start()
            await until("all are back", lambda: lean.progress().connected == 30)
            before = lean.progress().acknowledged
            await until("it publishes again", lambda: lean.progress().acknowledged > before + 50)
            lean.stop()

        report = await run(options, beside)
    assert report.whole.lost.total() == 30
    assert report.whole.failed, "connects failed while the broker was away"
    assert report.whole.connected == 60
    assert report.missing == report.unanswered == 0
    entries = list(read(tmp_path / "journal")[1])
    assert len(entries) == report.published == report.acknowledged
    for number in range(30):
        mine = [one.sequence for one in entries if one.number == number]
        assert sorted(mine) == list(range(len(mine))), "none is left out, none is there twice"


@pytest.mark.parametrize("expiry", [0, 300])
async def test_what_has_no_answer_is_published_again_on_the_next_connection(
    mosquitto: backing.Mosquitto, unique: str, expiry: int
) -> None:
    direction = backing.Direction.TO_CLIENT
    async with backing.FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        options = options_for(
            unique,
            f"mqtt://127.0.0.1:{proxy.port}",
            shape="ramp:0.2:5,plateau:60:50",
            watch=0,
            clean_start=not expiry,
            session_expiry_seconds=expiry,
        )

        async def beside(lean: Lean) -> None:
            await until("it publishes", lambda: lean.progress().acknowledged > 10)
            proxy.hold(direction)
            await until("answers are held back", lambda: lean.progress().in_flight >= 10)
            proxy.reset()
            proxy.heal()
            await until("all are back", lambda: lean.progress().connected == 5)
            await until("all is answered", lambda: lean.progress().in_flight < 5)
            lean.stop()

        report = await run(options, beside)
    assert proxy.counts.reset == 5
    assert report.whole.sent_again >= 10
    assert report.missing == 0
    assert report.whole.skipped == 0 or report.published > 0


async def test_devices_connect_from_the_sources_and_to_the_targets_in_turn(unique: str) -> None:
    pattern = rf"New client connected from (127\.\d+\.\d+\.\d+):\d+ as {unique}-\d+ "
    with backing.Mosquitto() as one, backing.Mosquitto() as other:
        report = await run(
            options_for(
                unique,
                one.url,
                other.url,
                shape="ramp:0.4:24,plateau:0.4",
                sources=("127.0.5.1", "127.0.5.2", "127.0.5.3"),
                watch=0,
            )
        )
        one.stop()
        other.stop()
        logs = [broker.log_path.read_text() for broker in (one, other)]
    assert report.whole.connected == 24
    for log in logs:
        found = re.findall(pattern, log)
        assert sorted(found) == sorted(["127.0.5.1", "127.0.5.2", "127.0.5.3"] * 4)


async def test_connects_slow_down_while_nobody_answers(unique: str) -> None:
    free = backing.free_port()
    rates: list[float] = []
    report = await run(
        options_for(unique, f"mqtt://127.0.0.1:{free}", shape="ramp:0.1:50,plateau:4", watch=0),
        on_progress=lambda now: rates.append(now.connect_rate),
    )
    assert set(report.whole.failed) == {"ECONNREFUSED"}
    assert report.whole.failed["ECONNREFUSED"] >= 50
    assert min(rates) < 500


async def test_a_server_that_never_answers_times_out(unique: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        report = await run(
            options_for(
                unique,
                f"ws://127.0.0.1:{server.getsockname()[1]}/mqtt",
                shape="ramp:0.1:5,plateau:2",
                connect_timeout_seconds=0.5,
                watch=0,
            )
        )
    assert set(report.whole.failed) == {"timeout"}
    assert report.whole.failed["timeout"] >= 5
    assert report.whole.connected == 0


async def test_a_refusal_is_counted_by_its_reason(unique: str) -> None:
    with backing.Mosquitto(users={"me": "right"}) as broker:
        options = options_for(unique, broker.url, shape="ramp:0.1:3,plateau:1", watch=0)
        wrong = await run(dataclasses.replace(options, username="me", password=b"wrong"))
        right = await run(dataclasses.replace(options, username="me", password=b"right"))
    assert set(wrong.whole.failed) == {"connack not authorized"}
    assert wrong.whole.connected == 0
    assert right.whole.connected == 3
    assert "right" not in orjson.dumps(right.as_json()).decode()


async def test_tls_checks_the_certificate(unique: str, tmp_path: Path) -> None:
    authority, other = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    certificate, key = authority.issue("server", LOCAL)
    with backing.Mosquitto(tls=backing.ListenerTls(certificate, key)) as broker:
        options = options_for(unique, broker.url, shape="ramp:0.1:3,plateau:1.5:20", watch=0)
        good = await run(dataclasses.replace(options, tls_ca=authority.ca))
        bad = await run(dataclasses.replace(options, tls_ca=other.ca))
        named = await run(dataclasses.replace(options, tls_ca=authority.ca, tls_name="elsewhere"))
    assert good.whole.connected == 3
    assert good.acknowledged > 10
    for report in (bad, named):
        assert report.whole.connected == 0
        assert set(report.whole.failed) == {"SSLCertVerificationError"}


async def test_a_recording_is_published_as_it_was_recorded(
    mosquitto: backing.Mosquitto, unique: str, tmp_path: Path
) -> None:
    path = tmp_path / "recording"
    messages = [line(at / 50, f"t/{at % 3}", b'{"state":{"reported":{"n":1}}}') for at in range(30)]
    path.write_bytes(b"".join(messages))
    options = options_for(
        unique,
        mosquitto.url,
        shape="ramp:0.2:6,plateau:2:1",
        replay=path,
        as_recorded=True,
        watch=6,
    )
    report = await run(options)
    assert report.published == 60, "two devices for each recorded one"
    assert report.whole.heard == 60
    assert report.missing == 0


async def test_the_rig_says_when_it_is_the_bottleneck(
    mosquitto: backing.Mosquitto, unique: str
) -> None:
    options = options_for(unique, mosquitto.url, shape="ramp:0.2:5,plateau:2:50", watch=0)

    async def beside(_: Lean) -> None:
        for _turn in range(6):
            await asyncio.sleep(0.25)
            time.sleep(0.2)  # noqa: ASYNC251 - the loop is to be late

    report = await run(options, beside)
    assert phase(report, "plateau").lateness.most_seconds > 0.1
    assert any("timers were" in text for text in report.bottlenecks)
    assert report.as_json()["rig_is_the_bottleneck"] == report.bottlenecks


async def test_a_late_timer_shows_as_latency(mosquitto: backing.Mosquitto, unique: str) -> None:
    options = options_for(unique, mosquitto.url, shape="ramp:0.2:5,plateau:1.5:100", watch=0)

    async def beside(_: Lean) -> None:
        await asyncio.sleep(0.7)
        time.sleep(0.5)  # noqa: ASYNC251 - the loop is to be late

    report = await run(options, beside)
    slow = sum(count for upper, count in report.whole.puback.buckets() if upper > 0.1)
    assert slow >= 30, "all that was due in that half of a second was published late"


async def test_a_device_with_nothing_free_is_skipped_and_counted(
    mosquitto: backing.Mosquitto, unique: str
) -> None:
    async with backing.FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        options = options_for(
            unique,
            f"mqtt://127.0.0.1:{proxy.port}",
            shape="ramp:0.2:3,plateau:60:100",
            max_in_flight=2,
            watch=0,
        )

        async def beside(lean: Lean) -> None:
            await until("it publishes", lambda: lean.progress().acknowledged > 10)
            proxy.hold(backing.Direction.TO_CLIENT)
            await until("there is no room", lambda: lean.progress().skipped > 20)
            assert lean.progress().in_flight == 6
            proxy.heal()
            await until("there is room again", lambda: lean.progress().in_flight < 6)
            lean.stop()

        report = await run(options, beside)
    assert report.whole.skipped > 20
    assert report.missing == 0


async def test_a_run_can_be_steered(mosquitto: backing.Mosquitto, unique: str) -> None:
    options = options_for(unique, mosquitto.url, shape="plateau:60", max_connections=30, watch=0)

    async def beside(lean: Lean) -> None:
        lean.steer(connections=30, connect_rate=400)
        await until("all are up", lambda: lean.progress().connected == 30)
        lean.begin_phase("loud")
        lean.steer(publish_rate=200)
        await until("it publishes", lambda: lean.progress().acknowledged > 50)
        lean.begin_phase("shrunk")
        lean.steer(connections=10)
        await until("they leave", lambda: lean.progress().connected == 10)
        lean.steer(connections=12)
        await until("two return", lambda: lean.progress().connected == 12)
        assert lean.drop(0.5) == 6
        lean.stop()

    report = await run(options, beside)
    assert [one.name for one in report.phases] == ["plateau", "loud", "shrunk", "end"]
    assert phase(report, "loud").acknowledged > 0
    assert phase(report, "shrunk").connected == 2
    assert report.missing == 0


@pytest.mark.parametrize(
    "wanted",
    [
        {"connections": -5},
        {"publish_rate": -1.0},
        {"publish_rate": float("nan")},
        {"publish_rate": float("inf")},
        {"connect_rate": float("nan")},
    ],
)
async def test_what_no_run_can_hold_is_refused_and_the_run_goes_on(
    mosquitto: backing.Mosquitto, unique: str, wanted: dict[str, Any]
) -> None:
    options = options_for(unique, mosquitto.url, shape="ramp:0.2:3,plateau:60:50", watch=0)

    async def beside(lean: Lean) -> None:
        await until("it publishes", lambda: lean.progress().acknowledged > 5)
        with pytest.raises(BadOption):
            lean.steer(**wanted)
        before = lean.progress().acknowledged
        await until("it goes on", lambda: lean.progress().acknowledged > before + 10)
        lean.stop()

    report = await run(options, beside)
    assert report.missing == 0


async def test_a_run_that_cannot_go_on_ends_with_what_was_in_the_way(
    mosquitto: backing.Mosquitto, unique: str
) -> None:
    told: list[int] = []

    def nobody_reads(now: Progress) -> None:
        told.append(now.connected)
        raise BrokenPipeError("nobody reads")

    options = options_for(unique, mosquitto.url, shape="ramp:0.2:3,plateau:600", watch=0)
    with pytest.raises(BrokenPipeError, match="nobody reads"):
        await asyncio.wait_for(Lean(options, nobody_reads).run(), 30)
    assert len(told) == 1


def test_more_connections_than_descriptors_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1000, 2000))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: raised.append(limits))
    options_for("x", "mqtt://x", shape="ramp:1:1500").raise_descriptor_limit()
    assert raised == [(1564, 2000)]
    with pytest.raises(BadOption, match=r"5000 connections need 5064 .*--first-number"):
        options_for("x", "mqtt://x", shape="ramp:1:5000").raise_descriptor_limit()


def test_options_that_make_no_sense_are_all_named() -> None:
    options = options_for(
        "x", shape="ramp:1:1", connect_rate=0, qos=2, client_id="all-the-same", topic="{x}"
    )
    with pytest.raises(BadOption) as caught:
        options.check()
    for name in ("target", "--connect-rate 0", "--qos 2", "--client-id 'all-the", "--topic '{x}'"):
        assert name in str(caught.value)


def test_a_device_at_rest_is_small(unique: str) -> None:
    import tracemalloc

    class Nobody:
        def came(self, *_: object) -> None: ...

        acknowledged = heard = went = subscribed = came

    endpoint = Endpoint.parse("ws://127.0.0.1:8080/mqtt")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        fleet = []
        for number in range(1000):
            websocket = WebSocketClient(endpoint.authority, "/mqtt")
            device = Device(f"{unique}-{number:07d}", websocket=websocket)
            fleet.append(Connection(Nobody(), number, device))
        each = (tracemalloc.get_traced_memory()[0] - before) / len(fleet)
    finally:
        tracemalloc.stop()
    assert each < 900, f"{each:.0f} bytes of Python a device, without its socket"
