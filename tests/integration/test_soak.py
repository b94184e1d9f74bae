"""A soak that takes seconds: it measures, reads everything back, and tells what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import backing

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_soak_samples_a_real_service_and_reads_everything_back(
    broker: backing.Broker, cassandra: backing.Database, keyspace: str, tmp_path: Path
) -> None:
    written = tmp_path / "soak.json"
    arguments = ["--minutes", "0.3", "--rate", "200", "--devices", "50", "--every", "0.5"]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "lib" / "soak.py"),
            *arguments,
            "--keyspace",
            keyspace,
            "--json",
            str(written),
        ],
        env=os.environ
        | {
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "SHADOWSVC_BACKING": "addresses",
            "SHADOWSVC_BACKING_MQTT_URL": broker.url,
            "SHADOWSVC_BACKING_CASSANDRA": f"{cassandra.contact_points[0]}:{cassandra.port}",
        },
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert written.exists(), done.stdout + done.stderr
    report = json.loads(written.read_text())
    assert report["missing_or_wrong"] == 0
    assert report["published"] > 1000
    assert {"memory", "open files", "ack p50", "ack p99", "CPU"} <= set(report["series"])
    assert len(report["samples"]) > 10
    assert "missing or wrong: 0" in done.stdout
    # In so short a time memory may well seem to grow; the verdict says so by its code.
    assert done.returncode == (0 if report["ok"] else 1)
