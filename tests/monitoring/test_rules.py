"""The alert and recording rules: accepted by promtool, tested there, and every one documented."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.monitoring.deployed import (
    MONITORING,
    ROOT,
    RULE_TESTS,
    RULES,
    Rule,
    rules,
)
from tests.monitoring.promql import asked

if TYPE_CHECKING:
    from pathlib import Path

ALERTS = [rule for rule in rules() if rule.is_alert]
SEVERITIES = {"critical", "warning"}
FIRING = re.compile(r'^ALERTS\{alertname="(\w+)", alertstate="firing"\}$')


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    assert program, "promtool is absent: `setup_prometheus` in scripts/lib/setup.sh installs it"
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=50, check=False
    )


def of_alert(rule: Rule) -> str:
    return rule.name


def test_promtool_accepts_the_rules() -> None:
    checked = promtool("check", "rules", "--lint-fatal", *RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_the_rules_do_what_their_promtool_tests_say(path: Path) -> None:
    tested = promtool("test", "rules", path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@cache
def expectations() -> dict[str, list[list[dict[str, Any]]]]:
    """Return by alert the samples that its promtool tests want, one list for each moment."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for path in RULE_TESTS:
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for step in test["promql_expr_test"]:
                if name := FIRING.match(step["expr"]):
                    found.setdefault(name[1], []).append(step["exp_samples"])
    return found


@pytest.mark.parametrize("rule", ALERTS, ids=of_alert)
def test_promtool_sees_every_alert_fire_and_not_fire(rule: Rule) -> None:
    wanted = expectations()[rule.name]
    assert any(not samples for samples in wanted)
    firing = [sample["labels"] for samples in wanted for sample in samples]
    assert firing
    for labels in firing:
        assert f'alertname="{rule.name}"' in labels
        assert f'severity="{rule.labels["severity"]}"' in labels


@pytest.mark.parametrize("rule", ALERTS, ids=of_alert)
def test_every_alert_says_how_bad_it_is_what_it_means_and_where_its_page_is(rule: Rule) -> None:
    assert rule.labels["severity"] in SEVERITIES
    assert set(rule.annotations) == {"summary", "description", "runbook_url"}
    page, _, anchor = rule.annotations["runbook_url"].partition("#")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(rf"`{rule.name}`", text), f"{page} does not name {rule.name}"
    if anchor:
        headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
        made = {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in headings}
        assert anchor in made


@pytest.mark.parametrize("rule", ALERTS, ids=of_alert)
def test_an_alert_speaks_only_of_labels_that_it_has(rule: Rule) -> None:
    fired = [
        set(re.findall(r"(\w+)=", sample["labels"]))
        for samples in expectations()[rule.name]
        for sample in samples
    ]
    for text in rule.annotations.values():
        for label in re.findall(r"\$labels\.(\w+)", text):
            assert all(label in labels for labels in fired), label


def test_names_of_rules_are_given_once() -> None:
    names = [rule.name for rule in ALERTS]
    assert len(names) == len(set(names))


def test_a_recording_rule_is_named_by_level_metric_and_operation() -> None:
    for rule in rules():
        if not rule.is_alert:
            assert re.fullmatch(r"\w+:\w+:\w+", rule.name), rule.name


def test_the_headline_figures_are_recorded() -> None:
    names = {rule.name for rule in rules()}
    assert names >= {
        "headline:connections:sum",
        "headline:publishes:rate1m",
        "headline:publish_to_durable_seconds:p50_5m",
        "headline:publish_to_durable_seconds:p99_5m",
        "headline:cost_per_device_month:ratio",
    }


def test_every_recorded_figure_is_used() -> None:
    everywhere = "".join(
        path.read_text(encoding="utf-8")
        for path in (*RULES, *(MONITORING / "grafana" / "dashboards").glob("*.json"))
    )
    for rule in rules():
        if not rule.is_alert:
            made = len(re.findall(rf"record: \"?{rule.name}\b", everywhere))
            assert everywhere.count(rule.name) > made, rule.name


def test_the_price_list_names_jobs_that_are_scraped() -> None:
    jobs = {
        one["job_name"]
        for path in (ROOT / "deploy" / "compose").glob("*.yml")
        for one in yaml.safe_load(re.sub(r"!\w+", "", path.read_text())).get("scrape_configs", ())
    }
    # Compose has no operator and no `shadowsvc ingress`.
    jobs |= {one["metadata"]["name"] for one in pod_monitors()}
    prices = [rule for rule in rules() if rule.name == "cost:instance_month:price"]
    assert prices
    for rule in prices:
        assert rule.labels["job"] in jobs
    for rule in ALERTS:
        for selector in asked(rule.expression).selectors:
            for label, operator, value in selector.matchers:
                if label == "job" and operator == "=":
                    assert value in jobs, f"{rule.name}: {value}"


# ------------------------------------------------------------------ the operator's objects


def pod_monitors() -> list[dict[str, Any]]:
    text = (MONITORING / "operator" / "podmonitors.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load_all(text))


def test_a_pod_monitor_calls_its_job_as_the_rules_do() -> None:
    for one in pod_monitors():
        for endpoint in one["spec"]["podMetricsEndpoints"]:
            (relabeling,) = endpoint["relabelings"]
            assert relabeling == {"targetLabel": "job", "replacement": one["metadata"]["name"]}


def test_the_operators_objects_are_those_that_the_rules_make() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "lib" / "operator_objects.py", "--check"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr


def test_a_pod_monitor_finds_pods_of_the_manifests_and_their_port() -> None:
    templates = [
        one["spec"]["template"]
        for path in (ROOT / "deploy" / "k8s").rglob("*.yaml")
        for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        if one and "template" in (one.get("spec") or {})
    ]
    for monitor in pod_monitors():
        if monitor["metadata"]["name"] == "cassandra":  # made by cass-operator
            continue
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        ports = {
            port["name"]
            for template in templates
            if wanted <= template["metadata"]["labels"].items()
            for kind in ("containers", "initContainers")
            for container in template["spec"].get(kind, ())
            for port in container.get("ports", ())
        }
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert endpoint["port"] in ports, monitor["metadata"]["name"]


def test_the_operator_gets_the_same_rules(tmp_path: Path) -> None:
    text = (MONITORING / "operator" / "prometheusrule.yaml").read_text(encoding="utf-8")
    groups = yaml.safe_load(text)["spec"]["groups"]
    wanted = [
        group
        for path in RULES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    ]
    assert groups == wanted
    plain = tmp_path / "rules.yml"
    plain.write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
    checked = promtool("check", "rules", plain)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_an_address_of_the_runbooks_precedes_every_page() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "scripts" / "lib" / "operator_objects.py", "--stdout",
         "--runbooks", "https://git.example/shadowsvc/"],
        capture_output=True, text=True, timeout=30, check=True,
    ).stdout  # fmt: skip
    pages = re.findall(r"runbook_url: (\S+)", printed)
    assert len(pages) == len(ALERTS)
    assert all(page.startswith("https://git.example/shadowsvc/docs/runbooks/") for page in pages)


def test_every_file_of_rules_and_dashboards_is_in_the_configmaps() -> None:
    text = (MONITORING / "kustomization.yaml").read_text(encoding="utf-8")
    maps = {one["name"]: one["files"] for one in yaml.safe_load(text)["configMapGenerator"]}
    assert maps["prometheus-rules"] == [f"rules/{path.name}" for path in RULES]
    boards = sorted((MONITORING / "grafana" / "dashboards").iterdir())
    assert maps["grafana-dashboards"] == [f"grafana/dashboards/{path.name}" for path in boards]
    for name in ("grafana-datasources", "grafana-providers"):
        assert all((MONITORING / file).exists() for file in maps[name])
