"""Alerts, runbooks, dashboards and exported metrics agree on their names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from shadowsvc.health import REASONS
from tests.monitoring.deployed import (
    CASSANDRA,
    DOCS,
    PAGES,
    ROOT,
    TARGET_LABELS,
    VERNEMQ,
    asking,
    labels_of,
    rules,
    service_metrics,
)
from tests.monitoring.promql import asked

if TYPE_CHECKING:
    from pathlib import Path

    from tests.monitoring.promql import Selector

HAPROXY = re.compile(r"haproxy_(?:process|frontend|backend|server)_\w+")
HAPROXY_LABELS = {"proxy", "server", "state", "code", "desc", "version"}
"""Names of the exporter are asked of a running HAProxy by `test_on_prometheus`."""
RUNBOOKS = sorted(PAGES.glob("*.md"))
ALERT = re.compile(r"`((?:Shadowsvc|Broker|Ingress|Fleet|Cassandra)[A-Z]\w+)`")
FOREIGN = re.compile(
    r"`((?:queue_message|netsplit|cluster_bytes|mqtt_publish|mqtt_connect|socket|org_apache)_\w+)"
)

EXPRESSIONS = [
    *((rule.name, rule.expression) for rule in rules()),
    *((one.who, one.expression) for one in asking()),
]


def labels_known(metric: str) -> set[str] | None:
    return HAPROXY_LABELS if HAPROXY.fullmatch(metric) else labels_of(metric)


def test_metrics_and_labels_that_are_asked_for_exist() -> None:
    wrong = []
    for who, expression in EXPRESSIONS:
        read = asked(expression)
        everywhere = set(TARGET_LABELS)
        for selector in read.selectors:
            known = labels_known(selector.metric)
            if known is None:
                wrong.append(f"{who}: nobody exports {selector.metric}")
                continue
            chosen_by = {label for label, _, _ in selector.matchers}
            if missing := chosen_by - known - TARGET_LABELS:
                wrong.append(f"{who}: {selector.metric} has no {missing}")
            everywhere |= known
        if missing := read.labels - everywhere:
            wrong.append(f"{who}: none has {set(missing)}")
    assert not wrong, "\n".join(wrong)


def values(selector: Selector) -> list[tuple[str, str]]:
    """Return the values that a selector names, label by label."""
    return [
        (label, value)
        for label, operator, given in selector.matchers
        if label not in TARGET_LABELS and "$" not in given
        for value in (given.split("|") if operator in {"=~", "!~"} else [given])
    ]


def test_values_of_labels_that_are_asked_for_exist() -> None:
    documented = set(re.findall(r"`(\w+)`", (DOCS / "metrics.md").read_text(encoding="utf-8")))
    wrong = []
    for who, expression in EXPRESSIONS:
        for selector in asked(expression).selectors:
            if selector.metric not in service_metrics():
                continue
            known = set(REASONS) if selector.metric == "shadowsvc_not_ready" else documented
            for label, value in values(selector):
                if value not in known:
                    wrong.append(f"{who}: {selector.metric} with {label}={value}")
    assert not wrong, "\n".join(wrong)


def test_every_reason_not_to_be_ready_has_an_alert_with_its_page() -> None:
    for reason in REASONS:
        page = f"docs/runbooks/{reason.replace('_', '-')}.md"
        assert any(rule.is_alert and rule.page == page for rule in rules()), reason


def test_every_metric_of_the_service_is_on_a_dashboard_or_in_an_alert() -> None:
    used = {name for _, expression in EXPRESSIONS for name in asked(expression).metrics}
    for name in service_metrics():
        if name.startswith("shadowsvc_"):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert used & {name, f"{base}_bucket"}, f"{name} is looked at nowhere"


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda page: page.stem)
def test_every_alert_that_a_page_names_exists_and_leads_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    pages = {rule.name: rule.page for rule in rules() if rule.is_alert}
    for name in ALERT.findall(text):
        assert name in pages, name
    head = re.search(r"^Alerts?: (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    named = set() if head is None else set(ALERT.findall(head[1]))
    here = f"docs/runbooks/{page.name}"
    if page.name != "README.md":
        assert named == {name for name, leads in pages.items() if leads == here}


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda page: page.stem)
def test_labels_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, braces in re.findall(r"\b(shadowsvc_\w+)\{([^}]*)\}", text):
        known = service_metrics()[name] | TARGET_LABELS
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces):
            assert label in known, f"{name} has no {label}"


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda page: page.stem)
def test_metrics_of_other_programs_that_a_page_names_are_known(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in FOREIGN.findall(text):
        assert name in VERNEMQ or name in CASSANDRA, name


def test_what_vouches_for_a_part_exists() -> None:
    text = (DOCS / "verified.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|backing|scripts|deploy)/[\w./-]+)", text)
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists(), path


def test_metrics_that_were_never_seen_on_a_running_server_are_listed_as_such() -> None:
    text = (DOCS / "verified.md").read_text(encoding="utf-8")
    used = {name for _, expression in EXPRESSIONS for name in asked(expression).metrics}
    for name in used & (set(VERNEMQ) | set(CASSANDRA)):
        assert f"`{name}`" in text, name
    listed = set(re.findall(r"^- `(\w+)`$", text, re.MULTILINE))
    assert listed <= used
