"""What a person or a script sees of a simulation: `shadowsvc simulate`.

Lives here: the event loop, signals, progress and the summary's lines. Rules: progress goes to
standard error, one line that changes on a terminal and a line now and then elsewhere; the summary
goes to standard output; the first Ctrl-C ends the run and still shows the summary, the second does
not wait for answers. Must not come in: what is published.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from typing import TYPE_CHECKING, Any, Final

import orjson
import uvloop
from rich.console import Console
from rich.live import Live
from rich.text import Text

from shadowsvc.simulate.runner import Options, Progress, Simulation, Summary

if TYPE_CHECKING:
    from shadowsvc.settings import Mqtt

__all__ = ["as_json", "lines", "simulate"]

_LIVE_SECONDS: Final = 0.25
_PLAIN_SECONDS: Final = 2.0


def simulate(settings: Mqtt, options: Options, *, json: bool = False) -> int:
    """Run a simulation in the foreground and print its summary.

    Args:
        settings: of the broker.
        options: what to simulate.
        json: print the summary as one JSON object.

    Returns:
        Exit code: 0, or 1 when a message was refused, found no subscriber or has no answer.

    Raises:
        ConfigError: options that make no sense.
        MqttError: no connection at the start.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        summary = runner.run(_simulate(settings, options))
    out = Console(highlight=False, soft_wrap=True)
    if json:
        out.print(orjson.dumps(as_json(summary)).decode(), markup=False)
    else:
        for line in lines(summary):
            out.print(line, markup=False)
    return 0 if summary.complete else 1


async def _simulate(settings: Mqtt, options: Options) -> Summary:
    simulation = Simulation(settings, options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, simulation.stop)
    showing = asyncio.create_task(_show(simulation))
    try:
        return await simulation.run()
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _show(simulation: Simulation) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    last = simulation.progress()
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(_LIVE_SECONDS)
                now = simulation.progress()
                live.update(Text(_line(now, last)), refresh=True)
                last = now if now.seconds - last.seconds >= 1 else last
    while True:
        await asyncio.sleep(_PLAIN_SECONDS)
        now = simulation.progress()
        console.print(_line(now, last), markup=False)
        last = now


def _line(now: Progress, last: Progress) -> str:
    if not now.seconds:
        return "connecting"
    rate = (now.sent - last.sent) / ((now.seconds - last.seconds) or 1)
    return (
        f"{now.seconds:6.1f} s  {now.sent:,} sent  {rate:,.0f}/s  "
        f"{now.acknowledged:,} acknowledged  {now.in_flight:,} in flight  "
        f"{now.connected} connections"
    )


def lines(summary: Summary) -> list[str]:
    """Return the summary for people."""
    size_bytes = summary.payload_bytes / max(1, summary.published)
    text = [
        f"{summary.published:,} messages of {size_bytes:.0f} bytes in {summary.seconds:.1f} s",
        f"{summary.rate:,.0f}/s; {summary.devices:,} devices, {summary.connections} connections",
        f"{summary.acknowledged:,} acknowledged by the broker ({summary.bad:,} bad on purpose)",
    ]
    if summary.ack_p50_seconds is not None and summary.ack_p99_seconds is not None:
        p50, p99 = summary.ack_p50_seconds * 1000, summary.ack_p99_seconds * 1000
        text.append(f"broker's answer after {p50:.1f} ms (median), {p99:.1f} ms (p99)")
    if summary.unrouted:
        text.append(
            f"{summary.unrouted:,} LOST: nobody is subscribed; is `shadowsvc run` up, with the "
            "same SHADOWSVC_MQTT__TOPIC_PREFIX?"
        )
    if summary.refused:
        text.append(f"{summary.refused:,} refused by the broker")
    if summary.unknown:
        text.append(f"{summary.unknown:,} without an answer: the broker may have them or not")
    if summary.reconnects:
        text.append(f"{summary.reconnects:,} reconnects, {summary.sent_again:,} sent again")
    if summary.interrupted:
        text.append("stopped before its time")
    return text


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the summary for programs."""
    return {**dataclasses.asdict(summary), "rate": summary.rate, "complete": summary.complete}
