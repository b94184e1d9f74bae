"""A small ramp for real: WebSocket through HAProxy to two brokers, one of which is killed."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

import pytest

from load.journal import read
from tests.ingress.stage import (
    LISTEN,
    Stage,
    broker_of,
    folder_for,
    mosquittos,
    settings_of,
)
from tests.load.rig import options_for, run, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from load.lean import Lean

pytestmark = pytest.mark.timeout(90)

DEVICES = 60


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Shared with HAProxy."""
    made = folder_for(tmp_path)
    yield made
    shutil.rmtree(made)


async def test_a_fleet_outlives_one_of_its_brokers(
    folder: Path, tmp_path: Path, unique: str
) -> None:
    with contextlib.ExitStack() as stack:
        dying, staying = (
            stack.enter_context(broker) for broker in mosquittos(("127.0.0.41", "127.0.0.42"))
        )
        settings = settings_of(folder)
        async with Stage(settings) as stage:
            await stage.have(broker_of("dying", dying), broker_of("staying", staying))

            async def all_up(lean: Lean) -> None:
                await until("all are up", lambda: lean.progress().connected == DEVICES, 30)

            async def beside(lean: Lean) -> None:
                await all_up(lean)
                connections = await stage.connections()
                assert connections["dying"] > DEVICES // 4
                lean.begin_phase("killed")
                dying.kill()
                await until("some are lost", lambda: lean.progress().lost > DEVICES // 4)
                await all_up(lean)
                lean.begin_phase("after")
                before = lean.progress().acknowledged
                await until("they publish", lambda: lean.progress().acknowledged > before + 100)
                lean.stop()

            report = await run(
                options_for(
                    unique,
                    f"ws://{LISTEN}:{settings.listen_websocket}/mqtt",
                    shape=f"ramp:2:{DEVICES},plateau:600:200",
                    journal=tmp_path / "journal",
                    watch=0,
                ),
                beside,
            )
    killed = next(one for one in report.phases if one.name == "killed")
    assert killed.lost.total() == killed.connected >= DEVICES // 4
    assert report.connections == DEVICES
    assert report.missing == report.unanswered == 0
    entries = list(read(tmp_path / "journal")[1])
    assert len({(one.number, one.sequence) for one in entries}) == report.published == len(entries)
