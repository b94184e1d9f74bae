"""Publish-to-subscriber latency on brokers that know nothing of each other.

Lives here: one subscriber of every broker of a stage, connected to it directly, in a process of its
own: `python -m load.stage.ear HOST:PORT …`. It takes every update with QoS 0 and compares the time
at its end with the clock, the same machine's. Commands come on standard input, one a line: a word
begins a phase of that name; the end of input, SIGINT or SIGTERM ends it. It prints one JSON object
when all subscriptions are granted, or one was not, and one at the end: a histogram for each phase,
brokers that were lost, its own CPU and lateness.

Rules: it decides nothing and never connects again: a broker that was killed stays away. Must not
come in: publishing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import uvloop

from load.console import obey, on_signals, write
from load.device import Connected, Device, Message, Subscribed
from load.families import sent_at_us
from load.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Sequence

_TICK_SECONDS = 0.05
_FILTER = "things/+/shadow/update"


class Ears:
    """What all subscribers hear, by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, Histogram] = {}
        self.lateness = Histogram()
        self.listening = 0
        """Brokers that granted the subscription."""
        self.lost = 0
        self.unknown = 0
        """Messages without a time."""
        self.begin("start")

    def begin(self, phase: str) -> None:
        """Count for this phase from now on."""
        self._now = self.phases.setdefault(phase, Histogram())

    def heard(self, message: Message) -> None:
        """Take one message."""
        sent = sent_at_us(message.payload)
        if sent is None:
            self.unknown += 1
        else:
            self._now.record(time.time() - sent / 1e6)

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "phases": {name: phase.as_json() for name, phase in self.phases.items()},
            "lateness": self.lateness.as_json(),
            "cpu_seconds": time.process_time(),
            "lost": self.lost,
            "unknown": self.unknown,
        }


class _Ear(asyncio.Protocol):
    """One subscriber."""

    def __init__(self, ears: Ears, number: int) -> None:
        self._ears = ears
        self._device = Device(f"ear-{number}", keep_alive_seconds=0)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # a stream's is one
        self._transport.write(self._device.connect())

    def data_received(self, data: bytes) -> None:
        for event in self._device.receive(data):
            match event:
                case Message():
                    self._ears.heard(event)
                case Connected() if self._transport is not None:
                    self._transport.write(self._device.subscribe(_FILTER, 0))
                case Subscribed() if event.granted:
                    self._ears.listening += 1

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._ears.lost += 1


async def _listen(ears: Ears, addresses: Sequence[str]) -> None:
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    on_signals(done.set)
    for number, address in enumerate(addresses):
        host, _, port = address.rpartition(":")
        await loop.create_connection(lambda number=number: _Ear(ears, number), host, int(port))  # type: ignore[misc]
    while ears.listening < len(addresses) and not (ears.lost or done.is_set()):  # noqa: ASYNC110
        await asyncio.sleep(_TICK_SECONDS)
    write({"listening": ears.listening})
    obeying = asyncio.create_task(_obey(ears, done), name="commands")
    due = loop.time() + _TICK_SECONDS
    while not done.is_set():
        await asyncio.sleep(due - loop.time())
        now = loop.time()
        ears.lateness.record(now - due)
        due = now + _TICK_SECONDS
    obeying.cancel()


async def _obey(ears: Ears, done: asyncio.Event) -> None:
    await obey(lambda *line: ears.begin(" ".join(line).strip()))
    done.set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Listen until told to end; print what was heard."""
    addresses = sys.argv[1:] if arguments is None else arguments
    ears = Ears()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_listen(ears, addresses))
    write(ears.as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
