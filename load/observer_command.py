"""`observe`: the observer as a person or a parent process sees it.

Lives here: its event loop, progress and summary. Rules: as in `command`; the first line of JSON
says where services connect. Must not come in: how a proxy sees packets.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final

import uvloop

from load.console import milliseconds, obey, on_signals, save, write
from load.endpoints import Endpoint
from load.observer import Observer

if TYPE_CHECKING:
    import argparse

__all__ = ["observe"]

_SECONDS: Final = {"json": 1.0, "auto": 5.0}


def observe(given: argparse.Namespace) -> int:
    """Run until Ctrl-C, `stop` or the time is over; return the exit code. Raises BadOption."""
    broker = Endpoint.parse(f"mqtt://{given.broker}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(_run(given, broker))
    if given.json is not None:
        save("--json", given.json, report)
    if given.progress == "json":
        write({"event": "report", **report})
        return 0
    for one in report["phases"]:
        took = one["to_durable"]
        sys.stdout.write(
            f"{one['name']}: {one['durable']:,} durable in {one['seconds']:.1f} s, "
            f"p50 {milliseconds(took.get('p50_seconds'))}, "
            f"p99 {milliseconds(took.get('p99_seconds'))}; "
            f"rig: CPU {one['cpu_share']:.0%}\n"
        )
    for text in report["rig_is_the_bottleneck"]:
        sys.stdout.write(f"THE RIG WAS THE BOTTLENECK: {text}\n")
    return 0


async def _run(given: argparse.Namespace, broker: Endpoint) -> dict[str, Any]:
    over = asyncio.Event()
    on_signals(over.set)
    async with Observer(broker.host, broker.port, listen_port=given.port) as observer:
        observer.begin_phase("observing")
        _say(given.progress, {"event": "listening", "host": "127.0.0.1", "port": observer.port})
        tasks = [asyncio.create_task(_tell(observer, given.progress))]
        if given.control:
            tasks.append(asyncio.create_task(obey(lambda *line: _do(observer, over, *line))))
        try:
            async with asyncio.timeout(given.seconds or None):
                await over.wait()
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return observer.as_json()


def _do(observer: Observer, over: asyncio.Event, command: str, argument: str) -> None:
    match command:
        case "phase":
            observer.begin_phase(argument)
        case "stop":
            over.set()
        case _:
            raise ValueError(command)


async def _tell(observer: Observer, progress: str) -> None:
    while progress in _SECONDS:
        await asyncio.sleep(_SECONDS[progress])
        _say(progress, {"event": "progress", **observer.progress()})


def _say(progress: str, event: dict[str, Any]) -> None:
    if progress == "json":
        write(event)
    elif event["event"] == "listening":
        sys.stderr.write(f"services connect to mqtt://{event['host']}:{event['port']}\n")
    elif progress == "auto":
        sys.stderr.write(
            f"{event['seconds']:6.0f} s  {event['durable']:,} durable, {event['held']:,} held, "
            f"{event['delivered_per_second']:,.0f}/s, "
            f"p99 {milliseconds(event['to_durable_p99_seconds'])}\n"
        )
