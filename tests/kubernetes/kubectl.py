"""`kubectl`, with the cluster that KUBECONFIG names and no other.

Lives here: one command run to its end, and what to do where there is no API. Rules: every command
has a limit; without KUBECONFIG nothing is asked, since kubectl's own default may be anybody's
cluster. Must not come in: what is applied, and what has to come of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Done", "attempt", "kubectl", "render", "require_api"]

Done = subprocess.CompletedProcess[str]


def require_api() -> None:
    """Fail where there is no API to ask."""
    if not os.environ.get("KUBECONFIG"):
        pytest.fail("KUBECONFIG is not set: these tests need a Kubernetes API")
    if not shutil.which("kubectl"):
        pytest.fail("there is no kubectl: these tests need it")


def attempt(*arguments: str, given: str | None = None, limit_seconds: float = 60) -> Done:
    """Run a command to its end, however it ends."""
    return subprocess.run(
        ["kubectl", *arguments],
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        text=True,
        timeout=limit_seconds,
        check=False,
    )


def kubectl(*arguments: str, given: str | None = None, limit_seconds: float = 60) -> str:
    """Run a command that has to succeed; returns what it prints."""
    done = attempt(*arguments, given=given, limit_seconds=limit_seconds)
    shown = " ".join(arguments)
    assert done.returncode == 0, f"kubectl {shown}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the objects of a kustomization."""
    return list(yaml.safe_load_all(kubectl("kustomize", str(folder))))
