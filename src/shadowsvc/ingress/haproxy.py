"""HAProxy's program: a configuration is checked by it, and it is started where that is asked for.

Lives here: the two ways to run it. Rules: a check has a time limit and leaves nothing behind; a
process that we start has a session of its own, so that it outlives us if we die without a word, and
the next of us finds it by its socket; it is ended softly. Must not come in: when to do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Final

import structlog

from shadowsvc.errors import HaproxyFailed, Refused
from shadowsvc.settings import variable

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Process", "check"]

_CHECK_SECONDS: Final = 30.0
_KILL_SECONDS: Final = 5.0
_MAX_SHOWN: Final = 2000

_log = structlog.get_logger(__name__)


async def check(program: str, file: Path) -> None:
    """Let HAProxy read a configuration.

    Raises:
        Refused: it found a mistake; the message has its words.
        HaproxyFailed: the program can't be run, or takes too long.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "-c",
            "-f",
            str(file),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise _not_run(program, error) from error
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError as error:
        raise HaproxyFailed(f"{program} -c did not end in {_CHECK_SECONDS:g} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        lines = said.decode(errors="replace").replace(f"{file}", file.name).splitlines()
        words = "\n".join(line for line in lines if line and not line.startswith("[NOTICE]"))
        raise Refused("haproxy", words[:_MAX_SHOWN] or f"exit code {process.returncode}")


class Process:
    """HAProxy as our child: a master and its workers."""

    def __init__(self, program: str, configuration: Path, master: Path) -> None:
        """Make it; nothing is started."""
        self._argv = (program, "-W", "-db", "-S", f"{master},mode,660", "-f", str(configuration))
        self._process: asyncio.subprocess.Process | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """Of the master, while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    async def start(self) -> None:
        """Start it. Raises `HaproxyFailed`."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                start_new_session=True,
            )
        except OSError as error:
            raise _not_run(self._argv[0], error) from error
        _log.info("haproxy started", pid=self._process.pid)

    async def stop(self, limit_seconds: float) -> None:
        """End it: softly, then after `limit_seconds` with its connections."""
        process = self._process
        if process is None:
            return
        for number, seconds in (
            (signal.SIGUSR1, limit_seconds),
            (signal.SIGTERM, _KILL_SECONDS),
            (signal.SIGKILL, _KILL_SECONDS),
        ):
            if process.returncode is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), seconds)
        _log.info("haproxy ended", code=process.returncode)


def _not_run(program: str, error: OSError) -> HaproxyFailed:
    name = variable("ingress", "haproxy")
    return HaproxyFailed(f"{name}: {program}: {(error.strerror or str(error)).lower()}")
