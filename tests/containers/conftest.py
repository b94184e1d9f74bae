"""What tests of images and of compose need: an engine, and the image, built once a run.

They take the engine that DOCKER_HOST names, or the one at Docker's usual socket. Without one they
are skipped, and `scripts/test --all` counts the group as left out; in CI (variable CI) that fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import pytest

from backing import choice

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CONTEXT = (
    "Dockerfile", ".dockerignore", "requirements.txt", "requirements-build.txt",
    "pyproject.toml", "README.md", "LICENSE", "src", "deploy/image",
)  # fmt: skip
_ENGINE_SECONDS = 600
"""A build may say nothing for minutes while it installs packages."""


class Built:
    """The image, and a secret that lay beside its sources in several files."""

    def __init__(self, name: str, secret: str, image: Any) -> None:
        self.name = name
        self.secret = secret
        self.image = image
        """As the docker package has it; `attrs` is what `docker inspect` shows."""


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    problem = choice.engine_problem()
    if problem is not None:
        if os.environ.get("CI"):
            pytest.fail(f"no container engine: {problem}")
        pytest.skip(f"no container engine: {problem}")
    with contextlib.closing(docker.from_env(timeout=_ENGINE_SECONDS)) as client:
        yield client


@pytest.fixture(scope="session")
def built(engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The image, made of a copy of the sources in which secrets lie about."""
    folder = tmp_path_factory.mktemp("context") / "shadowsvc"
    folder.mkdir()
    for name in CONTEXT:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    secret = f"secret-{uuid.uuid4().hex}"
    for place in (
        ".env", "password", ".git/config", "tests/password", "deploy/tls.key",
        "src/.env", "src/shadowsvc/.env", "src/shadowsvc/tls.key", "src/shadowsvc/mqtt/ca.pem",
        "src/shadowsvc/__pycache__/stale.pyc",
    ):  # fmt: skip
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secret)
    name = f"shadowsvc-test:{uuid.uuid4().hex[:12]}"
    try:
        image, _ = engine.images.build(
            path=str(folder), tag=name, rm=True, forcerm=True, buildargs={"REVISION": "abc123"}
        )
    except docker.errors.BuildError as error:
        lines = "".join(str(line.get("stream", line)) for line in error.build_log)
        pytest.fail(f"the image can't be built: {error}\n{lines[-4000:]}")
    yield Built(name, secret, image)
    with contextlib.suppress(docker.errors.APIError):  # its layers are the next build's cache
        engine.images.remove(name, noprune=True)
