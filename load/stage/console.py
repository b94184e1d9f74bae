"""What a person sees while a run goes on, and how it is interrupted.

Rules: progress goes to standard error with the time, results to standard output; SIGTERM is treated
as Ctrl-C is. Must not come in: figures.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["command_line", "interruptible", "say", "tell", "written"]


def say(text: str) -> None:
    """Say how far it is."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def tell(text: str) -> None:
    """Tell a result."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def written(path: Path) -> None:
    """Tell where a result lies."""
    tell(f"written: {path}")


def command_line(program: str) -> str:
    """Return the command that started this."""
    return " ".join([program, *sys.argv[1:]])


def interruptible() -> None:
    """Let SIGTERM raise KeyboardInterrupt, as SIGINT does."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
