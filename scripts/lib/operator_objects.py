"""Objects of the Prometheus operator and the list of alerts, made from the rules.

Lives here: one PrometheusRule from deploy/monitoring/rules, a PodMonitor for each kind of pod that
is scraped, and the table in docs/monitoring.md. Rules: the rules have one source; the job of a pod
is its kind, as in deploy/compose/prometheus.yml, since rules and prices ask for it. Must not come
in: expressions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
OBJECTS = MONITORING / "operator"
DOCUMENT = MONITORING.parents[1] / "docs" / "monitoring.md"
BEGIN = "<!-- Written by scripts/monitoring, up to the next comment. -->\n"
END = "<!-- The end of what scripts/monitoring writes. -->\n"
NAMESPACE = "shadowsvc"
HEAD = "# Written by scripts/monitoring from deploy/monitoring/rules; change those instead.\n"
JOB = "app.kubernetes.io/name"


class Kind(NamedTuple):
    """One kind of pods to scrape."""

    job: str
    namespace: str
    labels: dict[str, str]
    port: str


KINDS = (
    Kind("shadowsvc", NAMESPACE, {JOB: "shadowsvc"}, "http"),
    Kind("vernemq", NAMESPACE, {JOB: "vernemq"}, "http"),
    Kind("haproxy", "shadowsvc-ingress", {JOB: "haproxy"}, "statistics"),
    Kind("ingress", "shadowsvc-ingress", {JOB: "haproxy"}, "http"),
    # Pods that cass-operator made; their name label is "cassandra" too.
    Kind("cassandra", NAMESPACE, {"app.kubernetes.io/managed-by": "cass-operator"}, "metrics"),
)


def _groups() -> list[dict[str, Any]]:
    return [
        group
        for path in sorted((MONITORING / "rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    ]


def document() -> str:
    """Return docs/monitoring.md with the alerts as the rules have them."""
    rows = ["| Alert | Severity | After | Meaning |\n|---|---|---|---|\n"]
    for rule in (rule for group in _groups() for rule in group["rules"] if "alert" in rule):
        notes = rule["annotations"]
        page = notes["runbook_url"].removeprefix("docs/")
        rows.append(
            f"| [`{rule['alert']}`]({page}) | {rule['labels']['severity']} | {rule.get('for', '')} "
            f"| {notes['description']} |\n"
        )
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{''.join(rows)}{END}{after}"


def rule_object(runbooks: str) -> dict[str, Any]:
    """Return the PrometheusRule with the groups of all files; `runbooks` precedes each page."""
    groups = _groups()
    if runbooks:
        for rule in (rule for group in groups for rule in group["rules"]):
            if "annotations" in rule:
                page = rule["annotations"]["runbook_url"]
                rule["annotations"]["runbook_url"] = f"{runbooks.rstrip('/')}/{page}"
    return _object("PrometheusRule", "shadowsvc", {"groups": groups})


def pod_monitors() -> list[dict[str, Any]]:
    """Return a PodMonitor for each kind."""
    return [
        _object(
            "PodMonitor",
            kind.job,
            {
                "namespaceSelector": {"matchNames": [kind.namespace]},
                "selector": {"matchLabels": kind.labels},
                "podMetricsEndpoints": [
                    {
                        "port": kind.port,
                        "path": "/metrics",
                        "interval": "15s",
                        # Else it would be named after this object's namespace.
                        "relabelings": [{"targetLabel": "job", "replacement": kind.job}],
                    }
                ],
            },
        )
        for kind in KINDS
    ]


def _object(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {JOB: "shadowsvc", "app.kubernetes.io/component": "monitoring"},
        },
        "spec": spec,
    }


def _text(*objects: dict[str, Any]) -> str:
    return HEAD + "---\n".join(
        yaml.safe_dump(one, sort_keys=False, allow_unicode=True, width=100) for one in objects
    )


def main() -> int:
    """Write, print or check; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/monitoring")
    parser.add_argument("--check", action="store_true", help="only tell if the files are old")
    parser.add_argument("--stdout", action="store_true", help="print and write nothing")
    parser.add_argument("--runbooks", default="", metavar="URL", help="precedes every runbook_url")
    options = parser.parse_args()
    objects = (_text(rule_object(options.runbooks)), _text(*pod_monitors()))
    if options.stdout:
        sys.stdout.write("---\n".join(objects))
        return 0
    files = (OBJECTS / "prometheusrule.yaml", OBJECTS / "podmonitors.yaml", DOCUMENT)
    wanted = dict(zip(files, (*objects, document()), strict=True))
    old = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if options.check:
        names = ", ".join(str(path.relative_to(MONITORING.parents[1])) for path in old)
        if old:
            sys.stderr.write(f"{names}: not what the rules make; run scripts/monitoring\n")
        return int(bool(old))
    OBJECTS.mkdir(exist_ok=True)
    for path in old:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
