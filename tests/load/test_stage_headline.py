"""The headline for real, small: everything is published, carried, durable and read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from load.stage import headline, headline_report
from load.stage.plan import plan
from load.stage.site import lift_descriptors
from tests.load import loadgen

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
CONNECTIONS = 60
SECONDS = 5


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The load generator is there."""
    loadgen.build()


def test_everything_that_was_published_is_durable_and_read_back(tmp_path: Path) -> None:
    options = headline._options(
        [
            f"--connections={CONNECTIONS}",
            f"--minutes={SECONDS / 60}",
            "--rates=200,400",
            "--fleet-rate=50",
            "--warm-up=0",
            "--heap=512M",
            f"--json={tmp_path / 'h.json'}",
            f"--plot={tmp_path / 'h.png'}",
            f"--page={tmp_path / 'h.html'}",
        ]
    )
    made = plan(CONNECTIONS, lift_descriptors(), spare_brokers=0)
    observed = headline.run(made, options)
    headline_report.write(options, observed)
    told = json.loads((tmp_path / "h.json").read_text())
    assert told["failed"] is None
    assert told["connected"] == CONNECTIONS
    assert headline_report.whole(observed)
    assert told["missing"] == told["missing_of_persistent_connections"] == 0
    assert [step["rate"] for step in told["steps"]] == [200, 400]
    by_fleet, by_loadgen = told["by_persistent_connections"], told["by_load_generator"]
    assert by_fleet > 0
    assert by_loadgen > 0
    assert told["durable"] >= by_fleet + by_loadgen
    for step in told["steps"]:
        assert 0 < step["to_subscriber"]["mean_ms"] <= step["to_durable"]["max_ms"]
        assert step["to_subscriber"]["mean_ms"] <= step["to_durable"]["mean_ms"]
        parts = sum(step["cpu_share"].values())
        assert parts >= step["busy_share"] - 0.01
    assert (tmp_path / "h.html").exists()
