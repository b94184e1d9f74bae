"""A lean run as a person or a parent process sees it.

Lives here: the event loop, signals, commands on standard input, progress and the summary. Rules: as
in `command`. Must not come in: options, what devices do, words (`lean_view`).
"""

from __future__ import annotations

import asyncio
import math
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import uvloop
from rich.console import Console
from rich.table import Table
from rich.text import Text

from load.arguments import options_of
from load.console import obey, on_signals, save, write
from load.lean import Lean
from load.lean_page import page
from load.lean_view import line, summary, table

if TYPE_CHECKING:
    import argparse

    from load.options import Options
    from load.report import Progress, Report

__all__ = ["lean"]

_PLAIN_SECONDS: Final = 5.0
_WIDE: Final = 160


def lean(given: argparse.Namespace) -> int:
    """Run in the foreground; return the exit code. Raises BadOption."""
    options = options_of(given)
    showing = _Showing(given.progress)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(_run(options, showing, control=given.control))
    showing.end()
    figures = report.as_json()
    try:
        if given.json is not None:
            save("--json", given.json, figures)
        if given.html is not None:
            save("--html", given.html, page(report, shlex.join(["scripts/load", *sys.argv[1:]])))
    finally:  # a file that can't be written does not cost the run
        if given.progress == "json":
            write({"event": "report", **figures})
        else:
            _tell(report)
    if report.missing:
        return 1
    return 3 if given.strict and report.bottlenecks else 0


async def _run(options: Options, showing: _Showing, *, control: bool) -> Report:
    run = Lean(options, showing.progress)
    on_signals(run.stop)
    commands = asyncio.create_task(obey(lambda *said: _do(run, *said))) if control else None
    try:
        return await run.run()
    finally:
        if commands is not None:
            commands.cancel()
            await asyncio.gather(commands, return_exceptions=True)


def _do(run: Lean, command: str, argument: str) -> None:
    match command:
        case "connections":
            run.steer(connections=int(argument))
        case "publish-rate":
            run.steer(publish_rate=float(argument))
        case "connect-rate":
            run.steer(connect_rate=float(argument))
        case "drop":
            run.drop(min(1.0, max(0.0, float(argument))))
        case "phase":
            run.begin_phase(argument)
        case "stop":
            run.stop()
        case _:
            raise ValueError(command)


class _Showing:
    """Progress, as `--progress` says."""

    def __init__(self, kind: str) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._kind = "plain" if kind == "auto" and not self._console.is_terminal else kind
        self._last = -math.inf

    def progress(self, now: Progress) -> None:
        text = Text.assemble(*line(now))
        match self._kind:
            case "json":
                write({"event": "progress", **asdict(now)})
            case "auto":
                text.truncate(self._console.width - 1, overflow="ellipsis")
                self._clear()
                self._console.print(text, end="")
            case "plain" if now.seconds - self._last >= _PLAIN_SECONDS:
                self._console.print(text)
                self._last = now.seconds

    def end(self) -> None:
        self._clear()

    def _clear(self) -> None:
        """Take back the one line that changes."""
        if self._kind == "auto":
            self._console.file.write("\r\x1b[2K")
            self._console.file.flush()


def _tell(report: Report) -> None:
    out = Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = _WIDE
    columns, rows = table(report)
    if out.width < _WIDE:  # phases side by side instead of one below the other
        turned = list(zip(columns, *rows, strict=True))
        columns, rows = turned[0], turned[1:]
    shown = Table(box=None, pad_edge=False)
    for name in columns:
        shown.add_column(name, justify="left" if name == columns[0] else "right")
    for row in rows:
        shown.add_row(*map(Text, row))
    out.print(shown)
    for text, colour in summary(report):
        out.print(Text(text, colour))
