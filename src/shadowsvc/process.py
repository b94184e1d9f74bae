"""One process of ours: its event loop, the signals that end it, its exit code.

Lives here: what `shadowsvc run` and `shadowsvc ingress` begin and end alike. Rules: the first
SIGTERM or SIGINT asks for the end, the second one is the end; what was logged gets out. Must not
come in: what the process does, and what an orderly end is.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, NoReturn

import structlog
import uvloop

from shadowsvc import logs
from shadowsvc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["run", "stop_on_signals"]

_log = structlog.get_logger(__name__)

_BAD_CONFIGURATION = 2
_FLUSH_SECONDS = 0.5


def run(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main` in a loop of its own; return exit code 2 after a `ConfigError`.

    `main` gets an event that is set by the first signal, and has to return then: the process ends
    there, with 0.
    """
    try:
        uvloop.run(_until_signal(main))
    except ConfigError as error:
        _log.error("bad configuration", mistakes=error.mistakes)
        return _BAD_CONFIGURATION
    finally:
        logs.shutdown()


def stop_on_signals(
    stop: asyncio.Event,
    *,
    asked: Callable[[str], None] = lambda _name: None,
    at_once: Callable[[str], None],
) -> None:
    """Let SIGTERM and SIGINT set `stop`, and the next one end the process.

    Both are called with the signal's name: `asked` before the first, `at_once` before the second
    does its work.
    """

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            at_once(number.name)
            os._exit(128 + number)
        asked(number.name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


async def _until_signal(main: Callable[[asyncio.Event], Awaitable[None]]) -> NoReturn:
    def at_once(name: str) -> None:
        _log.warning("stopping at once", signal=name)
        logs.shutdown(timeout_seconds=_FLUSH_SECONDS)

    stop = asyncio.Event()
    stop_on_signals(stop, asked=lambda name: _log.info("stopping", signal=name), at_once=at_once)
    await main(stop)
    # A connect of the driver can't be cancelled and a thread not ended: the loop would wait.
    logs.shutdown()
    os._exit(0)
