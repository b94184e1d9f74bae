"""The benchmark's load generator, for tests: where Go is, and the program as its sources are now.

Must not come in: assertions of a test.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from bench.services import PROGRAMS, REPOSITORY

__all__ = ["SOURCE", "build", "go"]

SOURCE = REPOSITORY / "bench" / "loadgen"
_BUILD_SECONDS = 300


def go() -> str:
    """Return where Go is; skip the test if there is none."""
    found = shutil.which("go", path="/usr/local/go/bin:/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip("there is no Go: scripts/headline installs it")
    return found


def build() -> None:
    """Build the load generator, as the scripts do."""
    program = PROGRAMS / "loadgen"
    program.parent.mkdir(parents=True, exist_ok=True)
    argv = [go(), "-C", SOURCE, "build", "-trimpath", "-o", program, "."]
    subprocess.run(argv, check=True, timeout=_BUILD_SECONDS)
