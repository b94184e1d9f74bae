"""Metrics: figures as Prometheus wants them, under names and labels known beforehand."""

from __future__ import annotations

import re
from bisect import bisect_left
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Exposition, Histogram, Metrics
from shadowsvc.slots import SlotState

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
LABELS = {"qos", "dup", "reason", "kind", "state", "le", "version", "python", "compiled"}
# What a name may end in: its unit, or what is counted where there is none.
OURS = "shadowsvc_"


class Service:
    """Everything that is exported, with a clock that stands still."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.ledger = Ledger(self.metrics.receive_to_ack.observe)
        self.exposition = Exposition(
            self.metrics,
            self.ledger,
            SimpleNamespace(in_flight=3, concurrency=32),
            now=lambda: 100.0,
            is_ready=lambda: True,
            without_device_time=lambda: 7,
            log_lines_dropped=lambda: 2,
            not_ready=lambda: {"paused": True, "wedged": False},
            pause_left_seconds=lambda: 9.5,
        )

    def families(self) -> dict[str, Metric]:
        _, body = self.exposition.render(OPENMETRICS)
        return {family.name: family for family in parse_openmetrics(body.decode())}

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.families().values()
            for sample in family.samples
            if sample.name == OURS + name and sample.labels == labels
        ]
        assert len(found) == 1, name
        return found[0]


@pytest.fixture
def service() -> Service:
    return Service()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 50), unique=True, min_size=1, max_size=6).map(sorted),
    st.lists(st.tuples(st.integers(-5, 60) | st.floats(-5, 60), st.integers(1, 4)), max_size=20),
)
def test_a_bucket_counts_all_that_is_not_above_its_bound(
    bounds: list[int], seen: list[tuple[float, int]]
) -> None:
    histogram = Histogram(bounds)
    for value, count in seen:
        histogram.observe(value, count)
    expected = [sum(count for value, count in seen if value <= bound) for bound in bounds]
    assert [count for _, count in histogram.buckets()] == [
        *expected,
        sum(count for _, count in seen),
    ]
    assert [float(bound) for bound, _ in histogram.buckets()[:-1]] == bounds
    assert histogram.total == pytest.approx(sum(value * count for value, count in seen))


def test_a_histogram_of_microseconds_is_shown_in_seconds(service: Service) -> None:
    service.metrics.device_to_durable_us.observe(69_000)
    service.metrics.device_to_durable_us.observe(69_001)
    assert service.value("device_to_durable_seconds_bucket", le="0.05") == 0
    assert service.value("device_to_durable_seconds_bucket", le="0.069") == 1
    assert service.value("device_to_durable_seconds_bucket", le="0.1") == 2
    assert service.value("device_to_durable_seconds_sum") == pytest.approx(0.138001)


def test_bounds_are_canonical_numbers(service: Service) -> None:
    bounds = {
        sample.labels["le"]
        for family in service.families().values()
        for sample in family.samples
        if "le" in sample.labels
    }
    assert {"1.0", "60.0", "0.069", "+Inf"} <= bounds
    assert all(bound == "+Inf" or re.fullmatch(r"\d+\.\d+", bound) for bound in bounds)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (OPENMETRICS, "application/openmetrics-text"),
        ("text/plain", "text/plain"),
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("nonsense;;q=x", "text/plain"),
    ],
)
def test_a_scraper_gets_the_format_it_asks_for(
    service: Service, accept: str, content_type: str
) -> None:
    answered, body = service.exposition.render(accept)
    assert answered.startswith(content_type)
    parse = parse_openmetrics if "openmetrics" in content_type else parse_text
    assert [family for family in parse(body.decode()) if family.name.startswith(OURS)]


def test_names_labels_and_help_are_in_order(service: Service) -> None:
    service.metrics.rejected["topic"] += 1
    families = service.families()
    own = {name: family for name, family in families.items() if name.startswith(OURS)}
    assert len(own) > 30
    for name, family in own.items():
        assert family.documentation.endswith("."), name
        assert "milli" not in name
        for sample in family.samples:
            assert sample.labels.keys() <= LABELS, name
        if family.type == "histogram":
            assert name.endswith(("_seconds", "_partitions"))
    others = {name.split("_")[0] for name in families if name not in own}
    assert others <= {"process", "python"}


def test_a_scrape_changes_nothing(service: Service) -> None:
    service.metrics.receive_to_ack.observe(0.02, 3)
    first = service.exposition.render(OPENMETRICS)[1].decode()
    second = service.exposition.render(OPENMETRICS)[1].decode()

    def own(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(OURS)]

    assert own(first) == own(second)


def test_messages_are_told_apart_by_quality_and_repetition(service: Service) -> None:
    service.metrics.messages[:] = [1, 2, 3, 4]
    for qos, dup, count in (("0", "0", 1), ("0", "1", 2), ("1", "0", 3), ("1", "1", 4)):
        assert service.value("messages_received_total", qos=qos, dup=dup) == count


@pytest.mark.parametrize(
    ("name", "field", "label"),
    [
        ("updates_rejected_total", "rejected", "reason"),
        ("dead_letters_total", "dead_letters", "reason"),
        ("write_errors_total", "write_errors", "kind"),
        ("write_retries_total", "write_retries", "kind"),
        ("writes_limit_changes_total", "window_changes", "reason"),
        ("disconnects_total", "disconnects", "reason"),
        ("sessions_total", "sessions", "state"),
    ],
)
def test_what_is_counted_by_label_is_shown_by_label(
    service: Service, name: str, field: str, label: str
) -> None:
    getattr(service.metrics, field).update({"one": 1, "two": 2})
    assert service.value(name, **{label: "one"}) == 1
    assert service.value(name, **{label: "two"}) == 2


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("received_bytes_total", "received_bytes"),
        ("qos0_dropped_total", "qos0_dropped"),
        ("messages_discarded_draining_total", "discarded_draining"),
        ("updates_decoded_total", "decoded"),
        ("updates_empty_total", "empty"),
        ("updates_durable_total", "updates_durable"),
        ("updates_merged_total", "updates_merged"),
        ("leaves_merged_away_total", "leaves_merged_away"),
        ("dead_letters_suppressed_total", "dead_letters_suppressed"),
        ("batches_split_total", "batches_split"),
        ("retries_waiting", "retries_waiting"),
        ("replica_sets_in_doubt", "replica_sets_in_doubt"),
        ("resubscriptions_total", "resubscriptions"),
        ("pauses_total", "pauses"),
        ("loop_lag_seconds", "loop_lag_seconds"),
        ("clock_offset_seconds", "clock_offset_seconds"),
    ],
)
def test_every_counter_is_exported(service: Service, name: str, field: str) -> None:
    assert service.value(name) == 0
    setattr(service.metrics, field, 42)
    assert service.value(name) == 42


@pytest.mark.parametrize("field", ["published", "durable", "lost", "excused"])
def test_what_the_canary_counts_is_exported(service: Service, field: str) -> None:
    assert service.value(f"canary_{field}_total") == 0
    setattr(service.metrics.canary, field, 42)
    assert service.value(f"canary_{field}_total") == 42
    service.metrics.canary.unpublished["publish_refused"] += 3
    assert service.value("canary_unpublished_total", reason="publish_refused") == 3
    service.metrics.canary.seconds.observe(0.02)
    assert service.value("canary_seconds_count") == 1


def test_the_histograms_are_exported(service: Service) -> None:
    service.metrics.batch_partitions.observe(10)
    service.metrics.write_seconds.observe(0.02)
    for name in ("batch_partitions", "write_seconds"):
        assert service.value(f"{name}_count") == 1


def test_figures_read_elsewhere_are_exported(service: Service) -> None:
    assert service.value("updates_without_device_time_total") == 7
    assert service.value("log_lines_dropped_total") == 2
    assert service.value("pause_left_seconds") == 9.5
    assert service.value("writes_in_flight") == 3
    assert service.value("writes_limit") == 32
    assert service.value("ready") == 1
    assert service.value("not_ready", reason="paused") == 1
    assert service.value("not_ready", reason="wedged") == 0


def test_the_ledger_is_exported_whole(service: Service) -> None:
    ledger = service.ledger
    ledger.begin_epoch()
    assert service.value("oldest_unacknowledged_seconds") == 0
    stale, abandoned, last_copy = (ledger.receive(number, 10, 90.0) for number in (1, 2, 3))
    ledger.begin_epoch()
    ledger.keep(last_copy)
    ledger.abandon(abandoned)
    ledger.complete([stale, last_copy])
    acknowledged = ledger.receive(1, 10, 91.0)
    ledger.receive(2, 10, 92.0)
    ledger.complete([acknowledged])
    ledger.take_acks()
    assert service.value("acks_stale_total") == 1
    assert service.value("deliveries_abandoned_total") == 1
    assert service.value("deliveries_done_without_ack_total") == 1
    assert service.value("messages_acknowledged_total") == 1
    assert service.value("receive_to_ack_seconds_count") == 1
    assert service.value("deliveries_held") == 1
    assert service.value("deliveries_held_bytes") == 10
    assert service.value("unacknowledged_deliveries") == 1
    assert service.value("oldest_unacknowledged_seconds") == 8


def test_a_clock_that_steps_back_makes_no_negative_age(service: Service) -> None:
    service.ledger.begin_epoch()
    service.ledger.receive(1, 1, 101.0)
    assert service.value("oldest_unacknowledged_seconds") == 0


def test_a_value_on_a_bound_counts_below_it() -> None:
    histogram = Histogram([1, 2])
    histogram.observe(1)
    assert histogram.counts == [1, 0, 0]
    assert bisect_left([1, 2], 1) == 0


def test_the_slot_has_one_state_and_no_lease_has_no_age(service: Service) -> None:
    assert not [
        sample
        for family in service.families().values()
        for sample in family.samples
        if sample.name == f"{OURS}slot_state"
    ], "no series with a configured client id"
    slot = SimpleNamespace(state=SlotState.HELD, lease_age=7.5)
    service.metrics.slot = slot
    assert service.value("slot_lease_age_seconds") == 7.5
    for state in SlotState:
        slot.state = state
        assert [service.value("slot_state", state=one) for one in SlotState] == [
            one is state for one in SlotState
        ]
    slot.lease_age = None
    assert service.value("slot_lease_age_seconds") == 0
