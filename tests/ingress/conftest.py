"""What the tests of the ingress share: brokers on addresses of their own, a folder for HAProxy."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.ingress.stage import folder_for, mosquittos

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from backing import Mosquitto


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Shared with HAProxy."""
    made = folder_for(tmp_path)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="session")
def pods() -> Iterator[list[Mosquitto]]:
    """Three brokers that stay; a test that stops one makes its own."""
    with contextlib.ExitStack() as stack:
        hosts = ("127.0.0.21", "127.0.0.22", "127.0.0.23")
        yield [stack.enter_context(broker) for broker in mosquittos(hosts)]
