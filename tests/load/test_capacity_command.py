"""`scripts/capacity`: what it prints, and that it never claims what was not measured."""

from __future__ import annotations

import json
import re
from random import Random
from typing import TYPE_CHECKING

import pytest

from load.capacity.command import main
from load.capacity.constants import CONSTANTS_FILE, read_constants
from load.capacity.storage import disk_bytes, updates
from load.errors import LoadError

if TYPE_CHECKING:
    from pathlib import Path

TRIED = {
    "service.cpu_us_per_leaf": 3,
    "service.cpu_us_per_payload_byte": 0.02,
    "cassandra.cpu_us_per_leaf": 8,
    "cassandra.cpu_us_per_payload_byte": 0.05,
    "cassandra.disk_bytes_per_leaf": 40,
    "broker.memory_bytes_per_connection": 20000,
    "broker.cpu_us_per_publish": 30,
    "broker.cpu_us_per_connection_second": 4,
    "broker.cpu_us_per_connect": 300,
    "ingress.cpu_us_per_connect": 100,
    "ingress.memory_bytes_per_connection": 16000,
    "ingress.cpu_us_per_connection_second": 1,
    "ingress.cpu_us_per_publish": 20,
}


def assuming(*without: str) -> list[str]:
    return [
        word
        for name, value in TRIED.items()
        if name not in without
        for word in ("--assume", f"{name}={value}")
    ]


ASSUME = assuming()


@pytest.fixture
def unmeasured(tmp_path: Path) -> list[str]:
    """A file of figures in which bytes per connection of a broker have no value."""
    text = CONSTANTS_FILE.read_text()
    head, name, rest = text.partition("[broker.memory_bytes_per_connection]\n")
    first, sign, more = rest.partition("\n[")
    first = re.sub(r"^value = .*\n", "", first, flags=re.MULTILINE)
    file = tmp_path / "constants.toml"
    file.write_text(head + name + first + sign + more)
    return ["--constants", str(file)]


def test_what_is_not_measured_is_said_and_no_sum_is_printed(
    unmeasured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*unmeasured, *assuming("broker.memory_bytes_per_connection")])

    shown = capsys.readouterr().out
    assert code == 1
    assert "broker nodes: at least" in shown
    assert "NOT MEASURED YET: broker.memory_bytes_per_connection (scripts/scale" in shown
    assert "cost: no sum" in shown
    assert "THIS IS NO CLAIM: not measured yet" in shown
    assert "USD a device and year" not in shown.split("AWS", maxsplit=1)[0]


def test_json_has_no_sum_either(unmeasured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", *unmeasured, "--format", "json"])

    found = json.loads(capsys.readouterr().out)
    assert code == 1
    assert found["cost_per_month"] is None
    assert found["cost_per_device_year"] is None
    assert found["kinds"]["broker"]["nodes_a_cell"] is None
    assert found["kinds"]["broker"]["least_nodes_a_cell"] >= 3
    missing = {item["name"]: item["measured_by"] for item in found["missing"]}
    assert missing["broker.memory_bytes_per_connection"].startswith("scripts/scale")


def test_assumed_figures_make_a_sum_that_is_no_claim(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", *ASSUME])

    shown = capsys.readouterr().out
    assert code == 0
    assert "USD a device and year" in shown
    assert "THIS IS NO CLAIM: assumed, not measured: " in shown
    assert "broker.memory_bytes_per_connection" in shown


def test_the_steps_are_a_table_with_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--steps", "--format", "markdown", *ASSUME])

    rows = capsys.readouterr().out.strip().splitlines()
    columns = {row.count("|") for row in rows}
    assert len(columns) == 1
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "100,000",
        "1,000,000",
        "5,000,000",
        "20,000,000",
        "100,000,000",
    ]


def test_the_list_of_figures_has_each_with_where_it_comes_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["constants"]) == 0

    shown = capsys.readouterr().out
    for item in read_constants().all:
        assert item.name in shown
        assert item.command in shown
        assert item.source in shown


def test_prices_are_printed_with_date_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    main([])

    shown = capsys.readouterr().out
    assert "2026-07-20" in shown
    assert "aws.amazon.com/iot-core/pricing" in shown
    assert "not in it: network" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices 0: has to be 1 or more"),
        (["--assume", "broker.nothing=1"], "there is no such figure"),
        (["--assume", "broker.cpu_us_per_connect=0"], "has to be above 0"),
        (["--assume", "broker.cpu_us_per_connect"], "has to be NAME=NUMBER"),
        (["--rule", "nothing=1"], "--rule nothing: there is cpu_share"),
        (["--rule", "cpu_share=0"], "has to be above 0"),
        (["--prices", "/nowhere"], "--prices /nowhere"),
        (["--docs"], "--docs: it needs --steps"),
        (
            ["--steps", "--docs", "--assume", "broker.cpu_us_per_connect=1"],
            "--docs: assumed figures do not come into a document",
        ),
    ],
)
def test_options_that_make_no_sense_end_with_2_and_name_the_option(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_rule_changes_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--format", "json", *ASSUME])
    usual = json.loads(capsys.readouterr().out)
    main(["plan", "--format", "json", "--rule", "replicas=5", *ASSUME])
    changed = json.loads(capsys.readouterr().out)

    def cpu(found: dict[str, object]) -> float:
        limits = found["kinds"]["cassandra"]["limits"]  # type: ignore[index]
        return float(next(limit["nodes"] for limit in limits if limit["what"] == "CPU"))

    assert cpu(changed) == pytest.approx(cpu(usual) * 5 / 3)


class TestStorage:
    def test_only_the_files_of_the_table_are_counted(self, tmp_path: Path) -> None:
        table = tmp_path / "data" / "shadowsvc" / "shadow-1234"
        for folder in (table, table / "snapshots" / "old", table.parent / "dead_letter-1"):
            folder.mkdir(parents=True)
        (table / "nb-1-big-Data.db").write_bytes(b"x" * 700)
        (table / "nb-1-big-Index.db").write_bytes(b"x" * 50)
        (table / "snapshots" / "old" / "nb-0-big-Data.db").write_bytes(b"x" * 5000)
        (table.parent / "dead_letter-1" / "nb-1-big-Data.db").write_bytes(b"x" * 9000)

        assert disk_bytes(tmp_path) == 750

    def test_a_table_that_was_never_written_out_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "data" / "shadowsvc" / "shadow-1").mkdir(parents=True)

        with pytest.raises(LoadError, match="was Cassandra flushed"):
            disk_bytes(tmp_path)

    def test_the_leaves_that_are_written_are_those_of_the_measured_update(self) -> None:
        leaves = list(updates(Random(1)))

        assert len(leaves) == read_constants()["service.leaves_per_update"]
        assert len({path for path, _ in leaves}) == len(leaves)
        assert all(json.loads(value) is not None for _, value in leaves)
