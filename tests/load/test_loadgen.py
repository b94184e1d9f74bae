"""The load generator's own tests, which are in Go: what its tap counts, whatever a broker does."""

from __future__ import annotations

import subprocess

import pytest

from tests.load import loadgen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_load_generator_passes_its_own_tests() -> None:
    done = subprocess.run(
        [loadgen.go(), "-C", loadgen.SOURCE, "test", "-v", "."],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--- PASS: TestAnAcknowledgementCountsThoughTheBrokerDoesNotReadIt" in done.stdout
