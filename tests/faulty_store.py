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
    from collections.abc import Iterable

    from shadowsvc.store.deadletter import DeadLetter

AWAY = StoreUnavailable("server_write_timeout", "no answer")
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
        self.in_flight = 0
        self.most_in_flight = 0
        self.open = asyncio.Event()
        """Cleared: requests hang."""
        self.open.set()
        self.error: Exception | None = None
        """Every request fails with it."""
        self.errors_left = 10**9
        self.refused_devices: set[str] = set()
        self.probe_error: StoreError | None = None
        self.letter_error: StoreError | None = None

    async def write(self, mutations: Iterable[Mutations | Update]) -> None:
        asked = [write for mutation in mutations for write in writes_of(mutation)]
        self.asked.append(asked)
        await self._answer()
        if any(write[0] in self.refused_devices for write in asked):
            raise REFUSED
        self.durable += asked

    async def write_in_parts(self, mutations: Mutations) -> None:
        self.parts += 1
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

    async def _answer(self) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            await self.open.wait()
        finally:
            self.in_flight -= 1
        if self.error is not None and self.errors_left:
            self.errors_left -= 1
            raise self.error
