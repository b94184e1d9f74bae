"""Rules, dashboards, pages and metrics as they are in the repository, read for the tests.

Lives here: what each file says, as plain values. Rules: metrics of the service come from
docs/metrics.md, which `scripts/check` compares with the code; those of other programs from the
lists here, each with where its names were read. Must not come in: assertions.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

__all__ = [
    "CASSANDRA", "DASHBOARDS", "DOCS", "MONITORING", "PAGES", "ROOT", "RULES", "RULE_TESTS",
    "TARGET_LABELS", "VERNEMQ", "Asking", "Rule", "asking",
    "labels_of", "recorded", "rules",
    "service_metrics",
]  # fmt: skip

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = DOCS / "runbooks"
MONITORING = ROOT / "deploy" / "monitoring"
RULES = sorted((MONITORING / "rules").glob("*.yml"))
RULE_TESTS = sorted((MONITORING / "tests").glob("*.yml"))
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))

TARGET_LABELS = frozenset({"job", "instance", "namespace", "pod", "container", "endpoint"})
"""What the scraper adds."""

_NODE, _MQTT = {"node"}, {"node", "mqtt_version"}
VERNEMQ: dict[str, set[str]] = {
    # vmq_metrics.erl and vmq_metrics_http.erl of vernemq/vernemq: every line has the label `node`.
    **dict.fromkeys(
        (
            "socket_open", "socket_close", "socket_error", "queue_message_in", "queue_message_out",
            "queue_message_drop", "queue_message_expired", "queue_message_unhandled",
            "queue_processes", "router_subscriptions", "netsplit_detected", "netsplit_resolved",
            "cluster_bytes_sent", "cluster_bytes_dropped", "vm_memory_total", "system_utilization",
            "system_run_queue", "system_process_count",
        ),
        _NODE,
    ),
    **dict.fromkeys(
        (
            "mqtt_publish_received", "mqtt_publish_sent", "mqtt_connect_received",
            "mqtt_publish_auth_error", "mqtt_subscribe_auth_error", "client_keepalive_expired",
        ),
        _MQTT,
    ),
}  # fmt: skip

_HOST = {"host", "cluster", "datacenter", "rack"}
_OF_CASSANDRA = {
    "client_request_latency": {"request_type", "quantile"},
    "client_request_latency_count": {"request_type"},
    "client_request_timeouts_total": {"request_type"},
    "client_request_unavailables_total": {"request_type"},
    "client_request_failures_total": {"request_type"},
    "dropped_message_dropped_total": {"message_type"},
    "thread_pools_pending_tasks": {"pool_type", "pool_name"},
    "compaction_pending_tasks": set(),
    "storage_load": set(),
    "client_connected_native_clients": set(),
}
CASSANDRA: dict[str, set[str]] = {
    # The agent of k8ssandra/management-api-for-apache-cassandra: default-metric-settings.yaml,
    # CassandraMetricNameParser, CassandraMetricRegistryListener.
    **{f"org_apache_cassandra_metrics_{name}": of | _HOST for name, of in _OF_CASSANDRA.items()},
    "jvm_memory_used": {"memory_type"} | _HOST,
}


class Rule(NamedTuple):
    """A rule of Prometheus."""

    file: str
    name: str
    is_alert: bool
    expression: str
    wait: str
    labels: dict[str, str]
    annotations: dict[str, str]

    @property
    def page(self) -> str:
        """The path of its runbook, from the root."""
        return self.annotations["runbook_url"].partition("#")[0]


class Asking(NamedTuple):
    """An expression, and who asks."""

    who: str
    expression: str
    legend: str = ""


@cache
def rules() -> tuple[Rule, ...]:
    """Return every rule."""
    return tuple(
        Rule(
            file=path.name,
            name=rule.get("alert") or rule["record"],
            is_alert="alert" in rule,
            expression=rule["expr"],
            wait=rule.get("for", "0m"),
            labels=rule.get("labels", {}),
            annotations=rule.get("annotations", {}),
        )
        for path in RULES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    )


@cache
def asking() -> tuple[Asking, ...]:
    """Return the expressions of all dashboards."""
    return tuple(
        Asking(
            f"{path.stem}: {panel['title']}, {target['refId']}",
            target["expr"],
            target["legendFormat"],
        )
        for path in DASHBOARDS
        for panel in dashboard(path)["panels"]
        for target in panel.get("targets", ())
    )


def dashboard(path: Path) -> Any:
    """Return a dashboard."""
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def recorded() -> frozenset[str]:
    """Return what recording rules make."""
    return frozenset(rule.name for rule in rules() if not rule.is_alert)


@cache
def service_metrics() -> dict[str, set[str]]:
    """Return the names that a query sees, with their labels."""
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    found: dict[str, set[str]] = {}
    for name, kind, cell in re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", text, re.MULTILINE):
        labels = set(re.findall(r"`(\w+)`", cell))
        if kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels}
            found[f"{name}_count"] = labels
        else:
            found[name] = labels
    return found


def labels_of(metric: str) -> set[str] | None:
    """Return the labels that a metric has of its own; None if nobody exports or records it."""
    if metric in recorded():
        return set().union(*(rule.labels for rule in rules() if rule.name == metric))
    if metric == "up":
        return set()
    for known in (service_metrics(), VERNEMQ, CASSANDRA):
        if metric in known:
            return set(known[metric])
    return None
