"""A store that hangs, fails and refuses on demand, as no real Cassandra does at a chosen statement.

Lives here: `FaultyStore`, which records what was asked for and what became durable. Rules: every
fault is a public attribute, off by default. Must not come in: how anybody should react to a fault.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from shadowsvc.errors import StoreError, StoreRefused, StoreUnavailable
from shadowsvc.shadow.update import Mutations, Update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shadowsvc.store.deadletter import DeadLetter

AWAY = StoreUnavailable("server_write_timeout", "no answer")
OVERLOADED = StoreUnavailable("server_overloaded", "too much", overload=True)
DOUBTFUL = StoreUnavailable("server_write_failure", "a replica failed", doubtful=True)
REFUSED = StoreRefused("server_invalid_query", "I do not like it")

Write = tuple[str, int, str, str, str, bytes]
"""Device, time, shadow, section, path, value."""


def writes_of(mutation: Mutations | Update) -> list[Write]:
    if isinstance(mutation, Update):
        return [
            (mutation.device, mutation.time_us, mutation.shadow, section, path, bytes(value))
            for section, path, value in mutation.writes
        ]
    return [
        (mutation.device, time_us, shadow, section, path, bytes(value))
        for time_us, value, shadow, section, path in mutation.writes
    ]


class FaultyStore:
    """Records what was asked for and what became durable; answers as it is told to."""

    def __init__(self) -> None:
        self.asked: list[list[Write]] = []
        self.durable: list[Write] = []
        self.letters: list[DeadLetter] = []
        self.probes = 0
        self.parts = 0
        self.slow_parts = 0
        """How many parts are written and told of before the last."""
        self.in_flight = 0
        self.most_in_flight = 0
        self.open = asyncio.Event()
        """Cleared: requests hang."""
        self.open.set()
        self.seconds = 0.0
        """How long every answer takes."""
        self.error: Exception | None = None
        """Every request fails with it."""
        self.errors_left = 10**9
        self.refused_devices: set[str] = set()
        self.away: Callable[[str], bool] = lambda _device: False
        """Requests with a device of which it says so fail with `AWAY`, after `away_seconds`."""
        self.away_seconds = 0.0
        self.at_away = 0
        self.most_at_away = 0
        self.doubted_devices: set[str] = set()
        """Requests with one of them fail with `DOUBTFUL`."""
        self.probe_error: StoreError | None = None
        self.letter_error: StoreError | None = None

    async def write(self, mutations: Iterable[Mutations | Update]) -> None:
        asked = [write for mutation in mutations for write in writes_of(mutation)]
        self.asked.append(asked)
        await self._answer()
        if any(self.away(write[0]) for write in asked):
            await self._time_out()
        if any(write[0] in self.refused_devices for write in asked):
            raise REFUSED
        if any(write[0] in self.doubted_devices for write in asked):
            raise DOUBTFUL
        self.durable += asked

    async def write_in_parts(
        self, mutations: Mutations, on_part: Callable[[], None] | None = None
    ) -> None:
        self.parts += 1
        for _ in range(self.slow_parts):
            await asyncio.sleep(0.001)
            if on_part is not None:
                on_part()
        await self.write([mutations])

    async def write_dead_letter(self, letter: DeadLetter) -> None:
        await self._answer()
        if self.letter_error is not None:
            raise self.letter_error
        self.letters.append(letter)

    async def write_probe(self) -> None:
        self.probes += 1
        await self._answer()
        if self.probe_error is not None:
            raise self.probe_error

    async def _time_out(self) -> None:
        self.in_flight += 1
        self.at_away += 1
        self.most_at_away = max(self.most_at_away, self.at_away)
        try:
            await asyncio.sleep(self.away_seconds)
        finally:
            self.at_away -= 1
            self.in_flight -= 1
        raise AWAY

    async def _answer(self) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.seconds)
            await self.open.wait()
        finally:
            self.in_flight -= 1
        if self.error is not None and self.errors_left:
            self.errors_left -= 1
            raise self.error
