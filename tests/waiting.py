"""How tests wait for what nobody tells them: they ask again and again, within a limit.

Must not come in: what is waited for, and the waits for a process, which may end meanwhile
(`tests.service`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["until", "wait_until"]


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait until `condition` is true; TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of all kinds
            await asyncio.sleep(0.001)


def wait_until(condition: Callable[[], bool], what: str, limit_seconds: float = 10) -> None:
    """Wait until `condition` is true, for tests that block; else fail with `what`."""
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_seconds:g} s: {what}"
        time.sleep(0.01)
