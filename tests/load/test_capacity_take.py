"""`scripts/capacity take`: a run's figures come into the file, and nothing else changes."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest

from load.capacity.command import main
from load.capacity.constants import CONSTANTS_FILE, read_constants
from load.capacity.measured import figures

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = {
    "cpu": "A processor",
    "cores": 2,
    "python": "3.11.7",
    "mosquitto": "mosquitto 2.0.11",
}
SCALE: dict[str, Any] = {
    "command": "scripts/scale --connections 50000",
    "machine": MACHINE,
    "complete": True,
    "interrupted": False,
    "failed": None,
    "a_connection": {
        "driver": {"bytes": 9000.0, "connect_cpu_us": 900.0},
        "HAProxy": {
            "bytes": 20_000.0,
            "connect_cpu_us": 100.0,
            "rest_cpu_us_a_minute": 120.0,
            "publish_cpu_us": 30.0,
        },
        "broker": {
            "bytes": 4000.0,
            "connect_cpu_us": 200.0,
            "rest_cpu_us_a_minute": 60.0,
            "publish_cpu_us": 50.0,
        },
        "kernel: buffers of sockets": {"bytes": 1000.0},
        "kernel: objects (slab)": {"bytes": 7000.0},
    },
}
GROWTH: dict[str, Any] = {
    "command": "scripts/growth --only leaves",
    "machine": MACHINE,
    "interrupted": False,
    "failed": [],
    "results": [
        {"axis": "leaves", "value": value, "cpu_us": cpu, "cassandra_cpu_us": cpu * 2}
        for value, cpu in ((1, 25.0), (4, 30.0), (10, 48.0), (100, 200.0))
    ],
}


BENCH: dict[str, Any] = {
    "machine": MACHINE,
    "options": {
        "quick": False,
        "rounds": 2,
        "seconds": 8.0,
        "warm_up": 20.0,
        "services": ["shadowsvc", "go-single"],
    },
    "summary": {
        "shadowsvc": {
            phase: {
                "updates_per_second": {"median": rate},
                "cpu_us": {"median": cpu},
                "cassandra_cpu_us": {"median": cpu + 20},
                "broker_cpu_us": {"median": cpu + 10},
            }
            for phase, rate, cpu in (
                ("saturation", 15_000.0, 30.0),
                ("rate", 9779.0, 40.0),
            )
        }
        | {"process": {"rss_mb": {"median": 120.0}}},
        "go-single": {"saturation": {"cpu_us": {"median": 99.0}}},
    },
}


@pytest.fixture
def constants(tmp_path: Path) -> Path:
    file = tmp_path / "constants.toml"
    file.write_text(CONSTANTS_FILE.read_text())
    return file


def take(tmp_path: Path, constants: Path, document: dict[str, Any]) -> int:
    file = tmp_path / "scale.json"
    file.write_text(json.dumps(document))
    return main(["take", str(file), "--constants", str(constants)])


def test_a_connections_memory_has_the_kernels_part_for_its_sockets() -> None:
    found = figures(SCALE)

    assert found["broker.memory_bytes_per_connection"] == 4000 + 8000 / 4
    assert found["ingress.memory_bytes_per_connection"] == 20_000 + 8000 / 2


def test_cpu_a_minute_becomes_cpu_a_second() -> None:
    found = figures(SCALE)

    assert found["broker.cpu_us_per_connection_second"] == 1
    assert found["ingress.cpu_us_per_connection_second"] == 2
    assert found["ingress.cpu_us_per_publish"] == 30
    assert found["broker.cpu_us_per_connect"] == 200


def test_what_a_publish_costs_a_broker_full_of_idle_connections_is_not_taken() -> None:
    assert SCALE["a_connection"]["broker"]["publish_cpu_us"] == 50
    assert "broker.cpu_us_per_publish" not in figures(SCALE)


def test_of_a_curve_that_bends_the_steepest_part_counts() -> None:
    found = figures(GROWTH)

    assert found["service.cpu_us_per_leaf"] == 3
    assert found["cassandra.cpu_us_per_leaf"] == 6
    assert "service.cpu_us_per_payload_byte" not in found


def test_of_a_benchmark_the_dearer_phase_counts_and_the_most_that_was_carried() -> None:
    assert figures(BENCH) == {
        "service.cpu_us_per_update": 40,
        "cassandra.cpu_us_per_update": 60,
        "broker.cpu_us_per_publish": 50,
        "service.updates_per_second_per_process": 15_000,
        "service.memory_bytes": 120e6,
    }
    quick = BENCH | {"options": BENCH["options"] | {"quick": True}}
    assert figures(quick) == {}


def test_a_benchmarks_command_line_is_that_of_its_options(tmp_path: Path, constants: Path) -> None:
    assert take(tmp_path, constants, BENCH) == 0

    assert read_constants(constants).get("service.cpu_us_per_update").command == (
        "scripts/bench --rounds 2 --seconds 8 --warm-up 20 --services shadowsvc,go-single"
    )


@pytest.mark.parametrize(
    "changed",
    [{"interrupted": True}, {"failed": "a broker ended"}, {"complete": False}],
)
def test_a_run_that_did_not_end_well_changes_nothing(
    changed: dict[str, Any],
    tmp_path: Path,
    constants: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = constants.read_text()

    assert take(tmp_path, constants, SCALE | changed) == 2
    assert "did not end well" in capsys.readouterr().err
    assert constants.read_text() == before


def test_figures_come_with_command_date_and_machine_and_the_rest_stays(
    tmp_path: Path, constants: Path
) -> None:
    before = read_constants(constants)

    assert take(tmp_path, constants, SCALE) == 0

    after = read_constants(constants)
    assert [item.name for item in after.all] == [item.name for item in before.all]
    taken = after.get("broker.memory_bytes_per_connection")
    assert taken.value == 6000
    assert taken.command == SCALE["command"]
    assert taken.source == "scale.json"
    assert "A processor" in taken.machine
    assert taken.note == before.get(taken.name).note
    for item in after.all:
        if item.name not in figures(SCALE):
            assert item == before.get(item.name)
    comments = re.compile(r"^#.*$", re.MULTILINE)
    assert comments.findall(constants.read_text()) == comments.findall(CONSTANTS_FILE.read_text())


def test_taking_a_run_twice_changes_nothing_more(tmp_path: Path, constants: Path) -> None:
    take(tmp_path, constants, SCALE)
    once = constants.read_text()

    take(tmp_path, constants, SCALE)

    assert constants.read_text() == once


def test_what_a_run_did_not_measure_keeps_what_it_has(tmp_path: Path, constants: Path) -> None:
    part = json.loads(json.dumps(SCALE))
    part["a_connection"]["broker"] = {"bytes": math.nan, "publish_cpu_us": 0.0}
    before = read_constants(constants).get("broker.cpu_us_per_publish")

    assert take(tmp_path, constants, part) == 0
    assert read_constants(constants).get("broker.cpu_us_per_publish") == before


def test_a_file_that_is_no_run_is_refused(
    tmp_path: Path, constants: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take(tmp_path, constants, {"interrupted": False}) == 2
    assert main(["take", str(tmp_path / "nothing.json"), "--constants", str(constants)]) == 2
    assert "nothing.json" in capsys.readouterr().err
