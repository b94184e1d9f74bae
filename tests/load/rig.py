"""What the tests of the lean driver share: options, a run, a wait.

Lives here: a run inside the test's event loop. Rules: every wait has a limit; client ids and topics
are the test's own, so that tests may share a broker. Must not come in: assertions of a test.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

from load.backoff import Backoff
from load.endpoints import Endpoint
from load.lean import Lean
from load.options import Options
from load.shapes import Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from load.report import Progress, Report

__all__ = ["QUICK", "options_for", "run", "until"]

QUICK = Backoff("quick", least_seconds=0.05, most_seconds=0.4)
_LIMIT_SECONDS = 40.0


def options_for(name: str, *targets: str, shape: str, **given: Any) -> Options:
    """Options of a small run whose devices and topics are called after `name`."""
    made = Options(
        targets=tuple(map(Endpoint.parse, targets)),
        shape=Shape.parse(shape),
        client_id=f"{name}-{{number}}",
        topic=f"{name}/{{client_id}}/shadow/update",
        connect_rate=500,
        backoff=QUICK,
        watch=1,
        alone=True,
    )
    return dataclasses.replace(made, **given)


async def run(
    options: Options,
    beside: Callable[[Lean], Any] | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Run to the end; `beside` is a coroutine function that goes on meanwhile."""
    lean = Lean(options, on_progress)
    async with asyncio.timeout(_LIMIT_SECONDS), asyncio.TaskGroup() as group:
        running = group.create_task(lean.run())
        if beside is not None:
            group.create_task(beside(lean))
    return running.result()


async def until(what: str, met: Callable[[], bool], limit_seconds: float = 20.0) -> None:
    """Wait until something is so; raises AssertionError after the limit."""
    try:
        async with asyncio.timeout(limit_seconds):
            while not met():  # noqa: ASYNC110 - what is waited for knows no event
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {limit_seconds:g} s: {what}") from None
