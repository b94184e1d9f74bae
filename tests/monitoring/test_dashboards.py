"""The dashboards: as their code makes them, asked in valid expressions, and provisioned."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.monitoring.deployed import (
    DASHBOARDS,
    MONITORING,
    ROOT,
    TARGET_LABELS,
    asking,
    dashboard,
    labels_of,
)
from tests.monitoring.promql import asked
from tests.monitoring.test_rules import promtool

if TYPE_CHECKING:
    from pathlib import Path

WRITE = ROOT / "scripts" / "lib" / "dashboards" / "write.py"
LINE = 24


def test_the_dashboards_are_those_that_their_code_makes() -> None:
    checked = subprocess.run(
        [sys.executable, WRITE, "--check"], capture_output=True, text=True, timeout=50, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_there_is_one_for_the_service_and_one_for_the_fleet() -> None:
    assert {dashboard(path)["uid"] for path in DASHBOARDS} == {
        "shadowsvc-service",
        "shadowsvc-fleet",
    }


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows_in_a_unit_and_overlaps_no_other(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    numbers = []
    for panel in dashboard(path)["panels"]:
        numbers.append(panel["id"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= LINE
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith((".", "?")), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
    assert len(numbers) == len(set(numbers))


def test_promtool_accepts_every_expression(tmp_path: Path) -> None:
    found = [
        one.expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
        for one in asking()
    ]
    queries = [
        variable["query"]
        for path in DASHBOARDS
        for variable in dashboard(path)["templating"]["list"]
        if variable["type"] == "query"
    ]
    # label_values(expression, label) is Grafana's; what is inside is Prometheus's.
    found += [re.sub(r"^label_values\((.*), \w+\)$", r"\1", query) for query in queries]
    assert len(found) > 100
    assert not [expression for expression in found if "$" in expression]
    rules = [{"record": f"a:expression:{at}", "expr": text} for at, text in enumerate(found)]
    plain = tmp_path / "rules.yml"
    plain.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    checked = promtool("check", "rules", plain)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_legend_uses_labels_that_its_series_have() -> None:
    for one in asking():
        read = asked(one.expression)
        known = set(TARGET_LABELS) | read.labels
        if not read.labels:
            known |= {label for name in read.metrics for label in labels_of(name) or ()}
        elif re.match(r"(sum|count|max|min) by|histogram_quantile", one.expression):
            known = set(read.labels)
        for label in re.findall(r"\{\{\s*(\w+)\s*\}\}", one.legend):
            assert label in known, f"{one.who}: {label}"


def test_grafana_finds_its_data_source_and_the_dashboards_where_compose_mounts_them() -> None:
    provisioning = MONITORING / "grafana" / "provisioning"
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    mounts = dict(
        one.rsplit(":", 1)[0].rsplit(":", 1) for one in compose["services"]["grafana"]["volumes"]
    )
    assert mounts["./deploy/monitoring/grafana/provisioning"] == "/etc/grafana/provisioning"
    for path in (provisioning / "datasources").iterdir():
        (source,) = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
        assert source["uid"] == "prometheus"
        assert source["url"] == "http://prometheus:9090"
        assert "prometheus" in compose["services"]
    for path in (provisioning / "dashboards").iterdir():
        (provider,) = yaml.safe_load(path.read_text(encoding="utf-8"))["providers"]
        assert provider["options"]["path"] == mounts["./deploy/monitoring/grafana/dashboards"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_takes_the_provisioned_data_source_first(path: Path) -> None:
    (source,) = (
        variable
        for variable in dashboard(path)["templating"]["list"]
        if variable["type"] == "datasource"
    )
    assert source["current"]["value"] == "prometheus"
    assert source["query"] == "prometheus"
