"""The reader of expressions finds names and labels, and nothing else."""

from __future__ import annotations

from tests.monitoring.promql import asked


def test_names_and_labels_are_found_wherever_they_stand() -> None:
    found = asked(
        'sum by (job, le) (rate(a_total{x="1", y!~"b_total|c"}[5m] offset 10m)) > 5 '
        "and on (instance) group_left (pod) (d:e:f - time() < 3e5) unless g offset 1h"
    )
    assert found.metrics == {"a_total", "d:e:f", "g"}
    assert found.selectors[0].matchers == (("x", "=", "1"), ("y", "!~", "b_total|c"))
    assert found.selectors[0].text == 'a_total{x="1",y!~"b_total|c"}'
    assert found.labels == {"job", "le", "instance", "pod"}


def test_strings_and_variables_of_grafana_are_no_names() -> None:
    found = asked('rate(a{x=~"$instance", y="sum(b)"}[$__rate_interval]) or vector(0)')
    assert found.metrics == {"a"}
