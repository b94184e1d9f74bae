"""A wall clock and a name look-up that a test bends, in a process of its own (`shim.c`).

Nothing of the machine is changed: the library is compiled by the machine's C compiler, preloaded
into one process, and reads a small mapped file that the test writes. Steady clocks stay as they
are. Must not come in: what a service makes of it.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Self

__all__ = ["NAME", "Shim"]

NAME = "broker.test"
"""A name that the shim looks up; every name that ends in `.test` is 127.0.0.1."""

_SOURCE = Path(__file__).with_name("shim.c")
_LAYOUT = struct.Struct("=qiiq")
_COMPILE_SECONDS = 60


class Shim:
    """Bends one or more processes started with `environment`; a context manager.

    Args:
        folder: for the library and the file.
    """

    def __init__(self, folder: Path) -> None:
        self._library = folder / "shim.so"
        self._path = folder / "shim.state"

    @staticmethod
    def compiler() -> str | None:
        """Return the machine's C compiler; None without one."""
        return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

    def __enter__(self) -> Self:
        """Compile; nothing is bent yet."""
        compiler = self.compiler()
        assert compiler is not None, "a C compiler is missing: apt-get install gcc libc6-dev"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O2", "-o", self._library, _SOURCE, "-ldl"],
            check=True,
            timeout=_COMPILE_SECONDS,
        )
        self._path.write_bytes(bytes(_LAYOUT.size))
        with self._path.open("r+b") as file:
            self._state = mmap.mmap(file.fileno(), _LAYOUT.size)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the file to whoever still reads it."""
        self._state.close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the process to be bent."""
        return {"LD_PRELOAD": str(self._library), "FAULTS_SHIM": str(self._path)}

    def step_clock(self, ahead_seconds: float) -> None:
        """Set the wall clock so far ahead of the machine's (behind: negative)."""
        self._state[0:8] = struct.pack("=q", int(ahead_seconds * 1e9))

    def names(self, *, gone: bool = False, seconds: float = 0) -> None:
        """Let every look-up take so long, and find nothing if `gone`."""
        self._state[8:16] = struct.pack("=ii", gone, int(seconds * 1000))

    @property
    def look_ups(self) -> int:
        """How often a name was looked up."""
        return int(struct.unpack("=q", self._state[16:24])[0])
