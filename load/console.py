"""What the commands share: signals, commands on standard input, JSON by lines and as a file.

Lives here: small parts of `lean_command`, `observer_command`, `check`, `record` and `stage.ear`.
Rules: standard output gets whole lines, written out at once. Must not come in: what a command does.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import orjson

from load.errors import BadOption, LoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["milliseconds", "obey", "on_signals", "save", "write"]

_LINE_BYTES: Final = 1 << 16


def on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on SIGINT and SIGTERM, each time."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


async def obey(do: Callable[[str, str], None]) -> None:
    """Hand each line of standard input to `do`, as command and argument, until it ends.

    What `do` answers with ValueError or LoadError is complained about and left.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command, _, argument = line.decode(errors="replace").strip().partition(" ")
        try:
            do(command, argument)
        except (ValueError, LoadError):
            sys.stderr.write(f"not understood: {command} {argument}\n")


def write(event: dict[str, Any]) -> None:
    """Write one object to standard output."""
    sys.stdout.write(orjson.dumps(event).decode() + "\n")
    sys.stdout.flush()


def save(option: str, path: Path, content: dict[str, Any] | str) -> None:
    """Write text, or figures as JSON, where `option` says; raises BadOption."""
    if not isinstance(content, str):
        content = orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n"
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise BadOption(f"{option} {path}: {error.strerror}") from None


def milliseconds(seconds: float | None) -> str:
    """Return a duration for people."""
    return "-" if seconds is None or seconds != seconds else f"{seconds * 1000:,.1f} ms"  # noqa: PLR0124 - NaN
