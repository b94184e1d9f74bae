"""The check reads everything back from a real Cassandra, and names what is missing."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from load.check import compare
from load.command import main
from load.journal import Journal, read
from load.observer import Observer
from load.replay import line
from tests.load.rig import options_for, run, until
from tests.service import ServiceProcess, variables

if TYPE_CHECKING:
    from pathlib import Path

    import backing
    from load.lean import Lean

pytestmark = pytest.mark.timeout(150)


async def test_what_is_not_in_cassandra_is_named_by_device_and_sequence(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    journals = [tmp_path / "journal-0", tmp_path / "journal-1"]
    async with Observer(broker.host, broker.port) as observer:
        settings = variables(
            broker,
            cassandra,
            migrated,
            unique,
            MQTT__URL=f"mqtt://127.0.0.1:{observer.port}",
        )
        service = ServiceProcess(settings, tmp_path / "service.log")
        try:
            await asyncio.to_thread(service.start)
            await asyncio.to_thread(service.wait_ready, 60)
            observer.begin_phase("load")
            shape = "ramp:0.3:8,plateau:1.5:100"
            options = options_for(unique, broker.url, shape=shape, watch=4, alone=False)
            first = await run(dataclasses.replace(options, trail=True, journal=journals[0], seed=5))
            second = await run(dataclasses.replace(options, journal=journals[1], first_number=100))
            both = first.acknowledged + second.acknowledged
            await until("all is durable", lambda: observer.durable == both)
        finally:
            await asyncio.to_thread(service.terminate)
    assert first.missing == second.missing == 0
    assert observer.seen.total("acknowledged") == both > 200
    with cassandra.session() as session:
        session.set_keyspace(migrated)
        verdict = compare(session, journals, wait_seconds=30)
        assert verdict.good, verdict.as_json()
        assert verdict.acknowledged == both
        assert verdict.devices == 16

        _lose(session, f"{unique}-3", "/trail/2")
        _lose(session, f"{unique}-103", "/seq")
        verdict = compare(session, journals)
    last = max(one.sequence for one in read(journals[1])[1] if one.number == 103)
    assert verdict.missing == {f"{unique}-3": [2], f"{unique}-103": [last]}

    where = f"--cassandra={cassandra.contact_points[0]}:{cassandra.port}"
    to_file = tmp_path / "verdict.json"
    arguments = [where, f"--keyspace={migrated}", "--wait=0", f"--json={to_file}"]
    assert main(["check", *map(str, journals), *arguments]) == 1
    told = capsys.readouterr().out
    assert f"{both:,} acknowledged publishes of 16 devices: 2 missing, 0 rows wrong" in told
    assert f"  {unique}-3: 2\n" in told
    assert orjson.loads(to_file.read_bytes())["missing_updates"] == 2


def test_what_a_recording_has_beside_documents_is_not_looked_for(tmp_path: Path) -> None:
    recording, journal = tmp_path / "recording", tmp_path / "journal"
    payloads = [b'{"state":[1]}', b'{"state":null}', b"noise", b'{"state":{"reported":{"a":1}}}']
    recording.write_bytes(b"".join(line(0, "t", payload) for payload in payloads))
    options = options_for("x", "mqtt://there", shape="plateau:1", replay=recording, journal=journal)
    with Journal(options) as written:
        for sequence in range(4):
            written.acknowledged(0, sequence, 10**15 + sequence)

    class Empty:
        """A Cassandra without a row."""

        def prepare(self, statement: str) -> str:
            return statement

    with pytest.MonkeyPatch.context() as patch:
        asked: list[str] = []
        patch.setattr(
            "scripts.lib.readback.execute_concurrent_with_args",
            lambda _, __, names, **___: [asked.append(*one) or (True, []) for one in names],
        )
        verdict = compare(Empty(), [journal])
    assert asked == ["x-0"]
    assert verdict.acknowledged == 4
    assert verdict.missing == {"x-0": [3]}


def _lose(session: Any, device: str, path: str) -> None:
    session.execute(
        "DELETE FROM shadow WHERE device = %s AND shadow = '' AND section = 'reported' "
        "AND path = %s",
        (device, path),
    )


async def test_a_device_with_an_unanswered_publish_is_counted_apart(
    broker: backing.Broker, cassandra: backing.Database, migrated: str, unique: str, tmp_path: Path
) -> None:
    options = options_for(
        unique,
        broker.url,
        shape="ramp:0.2:3,plateau:60:50",
        journal=tmp_path / "journal",
        drain_seconds=0.1,
    )

    async def beside(lean: Lean) -> None:
        await until("it publishes", lambda: lean.progress().acknowledged > 10)
        # As if the broker's answers to one device had been lost for good.
        connection = lean._fleet.devices[1]
        assert connection.transport is not None
        connection.transport.pause_reading()
        await until("one waits", lambda: bool(connection.open) and len(connection.open) == 8)
        lean.stop()

    report = await run(options, beside)
    assert report.unanswered == report.missing == 8
    with cassandra.session() as session:
        session.set_keyspace(migrated)
        verdict = compare(session, [tmp_path / "journal"])
    assert (verdict.unanswered, verdict.not_compared) == (8, 1)
    assert set(verdict.missing) == {f"{unique}-0", f"{unique}-2"}, "no service wrote anything"
