"""A small ramp through a real HAProxy over WebSocket, and a broker that is killed in the middle.

The oracle: what a broker acknowledged arrives at a subscriber, but for what a killed broker may
lose. mosquitto acknowledges before it has handed on, so of each device that was connected to the
killed one the last acknowledged updates may be missing, and nothing before, after or elsewhere.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import aiomqtt
import pytest

from tests.ingress.stage import LISTEN, Stage, broker_of, folder_for, mosquittos, settings_of, until
from tests.load.locust_process import Locust

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from backing import Mosquitto

pytestmark = pytest.mark.timeout(240)

DEVICES = 60
LIMIT_SECONDS = 90.0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    import shutil

    made = folder_for(tmp_path)
    yield made
    shutil.rmtree(made)


class Heard:
    """What one broker delivered, in its order."""

    def __init__(self) -> None:
        self.sequences: dict[str, list[int]] = {}
        self.ready = asyncio.Event()

    async def listen(self, broker: Mosquitto) -> None:
        """Listen until the broker is gone."""
        try:
            async with aiomqtt.Client(
                broker.host, broker.port, protocol=aiomqtt.ProtocolVersion.V5
            ) as client:
                await client.subscribe("things/+/shadow/update", qos=1)
                self.ready.set()
                async for message in client.messages:
                    device = message.topic.value.split("/")[1]
                    assert isinstance(message.payload, bytes)
                    sequence = json.loads(message.payload)["state"]["reported"]["seq"]
                    self.sequences.setdefault(device, []).append(sequence)
        except aiomqtt.MqttError:
            pass

    @property
    def count(self) -> int:
        return sum(map(len, self.sequences.values()))


def lost_by_a_kill(
    acknowledged: dict[str, set[int]], killed: Heard, survivor: Heard
) -> dict[str, list[int]]:
    """Return what is missing; fails if the killed broker can't have been it."""
    missing: dict[str, list[int]] = {}
    for device, sequences in acknowledged.items():
        first, then = killed.sequences.get(device, []), survivor.sequences.get(device, [])
        lost = sorted(sequences - {*first, *then})
        if not lost:
            continue
        missing[device] = lost
        assert first, f"{device} was never at the killed broker, and {lost} are missing"
        assert max(first) < lost[0], f"{device}: {lost} missing, and {max(first)} came after"
        assert not then or lost[-1] < min(then), f"{device}: {lost} missing after its move"
    return missing


async def test_devices_come_back_when_a_broker_is_killed_and_nothing_else_is_lost(
    folder: Path, tmp_path: Path
) -> None:
    settings = settings_of(folder)
    a, b = mosquittos(("127.0.0.61", "127.0.0.62"))
    survivor, killed = Heard(), Heard()
    with a, b:
        async with Stage(settings) as stage, asyncio.TaskGroup() as group:
            await stage.have(broker_of("a", a), broker_of("b", b))
            listening = [
                group.create_task(survivor.listen(a)),
                group.create_task(killed.listen(b)),
            ]
            await asyncio.wait_for(survivor.ready.wait(), 20)
            await asyncio.wait_for(killed.ready.wait(), 20)
            arguments = (
                *("--host", f"ws://{LISTEN}:{settings.listen_websocket}/mqtt"),
                *("-u", str(DEVICES), "-r", "30", "--interval", "0.25"),
                *("--backoff-max", "4", "--sources", "127.0.0.71-127.0.0.74"),
            )
            with Locust(tmp_path, *arguments) as locust:
                await until(
                    "both brokers have devices that publish",
                    lambda: (
                        len({*survivor.sequences, *killed.sequences}) == DEVICES
                        and len(killed.sequences) >= DEVICES // 3
                    ),
                    LIMIT_SECONDS,
                )
                moved = set(killed.sequences)
                b.kill()
                await until(
                    "all publish through the survivor",
                    lambda: set(survivor.sequences) >= moved,
                    LIMIT_SECONDS,
                )
                before = survivor.count
                await until(
                    "they go on", lambda: survivor.count > before + 2 * DEVICES, LIMIT_SECONDS
                )
                assert (await stage.connections())["a"] >= DEVICES
                locust.interrupt()
                await asyncio.to_thread(locust.wait)
                acknowledged = locust.acknowledged()

                def settled() -> bool:
                    wanted = {
                        device: sequences - set(killed.sequences.get(device, []))
                        for device, sequences in acknowledged.items()
                    }
                    heard = survivor.sequences
                    return all(
                        max(rest) <= max(heard.get(device, [-1]))
                        for device, rest in wanted.items()
                        if rest
                    )

                await until("the last updates arrive", settled)
            for task in listening:
                task.cancel()

    assert set(acknowledged) == {*survivor.sequences, *killed.sequences}
    assert len(acknowledged) == DEVICES
    lost_by_a_kill(acknowledged, killed, survivor)

    # The fault happened, and the statistics say so.
    lost = locust.statistics("connection lost")["num_failures"]
    assert lost >= len(moved) > 0
    figures = locust.figures()["the rig"]
    connect = locust.statistics("connect", "WS")
    assert figures["connects"] == DEVICES + lost
    assert connect["num_requests"] == figures["connects"] + figures["connects_failed"]
    assert connect["num_failures"] == figures["connects_failed"]
    puback = locust.statistics("publish to PUBACK", "WS")
    answered = puback["num_requests"] - puback["num_failures"]
    assert answered == sum(map(len, acknowledged.values()))
    assert puback["num_failures"] == figures["unanswered"]
    assert locust.statistics("subscribe")["num_failures"] == 0
    assert locust.statistics("publish to subscriber")["num_requests"] > 0
    assert locust.heading().startswith("The rig was ")
    page = locust.report_path.read_text()
    assert "connection lost" in page
    assert "publish to subscriber" in page


def test_the_oracle_sees_a_loss_that_no_kill_explains() -> None:
    killed, survivor = Heard(), Heard()
    killed.sequences = {"a": [0, 1, 2]}
    survivor.sequences = {"a": [5, 6], "b": [0, 2]}
    assert lost_by_a_kill({"a": set(range(7))}, killed, survivor) == {"a": [3, 4]}
    for acknowledged in ({"a": {0, 1, 2, 3, 6, 7}}, {"b": {0, 1, 2}}):
        with pytest.raises(AssertionError, match="missing"):
            lost_by_a_kill(acknowledged, killed, survivor)
    killed.sequences = {"a": [0, 2]}
    with pytest.raises(AssertionError, match="came after"):
        lost_by_a_kill({"a": {0, 1, 2}}, killed, survivor)
