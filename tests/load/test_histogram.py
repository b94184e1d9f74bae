"""Histograms: close to the truth, never below it, and the same whole however it was divided."""

from __future__ import annotations

import json
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load.histogram import Histogram

durations = st.lists(st.floats(0, 60_000), min_size=1, max_size=60)


def of(values: list[float]) -> Histogram:
    made = Histogram()
    for value in values:
        made.record(value)
    return made


@given(durations, st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_not_below_the_truth_and_at_most_a_32nd_above(
    values: list[float], share: float
) -> None:
    truth = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    found = of(values).quantile(share)
    assert truth - 1e-6 <= found <= truth * (1 + 1 / 32) + 1.001e-6


@given(durations)
def test_least_most_sum_and_count_are_exact(values: list[float]) -> None:
    found = of(values)
    assert (found.count, found.least_seconds, found.most_seconds) == (
        len(values),
        min(values),
        max(values),
    )
    assert found.total_seconds == pytest.approx(sum(values))
    assert found.mean_seconds == pytest.approx(sum(values) / len(values))


@given(durations, st.integers(0, 60))
def test_parts_merge_into_what_the_whole_would_be(values: list[float], at: int) -> None:
    whole, merged = of(values), Histogram.merged([of(values[:at]), of(values[at:])])
    assert merged.buckets() == whole.buckets()
    assert merged.count == whole.count
    assert merged.total_seconds == pytest.approx(whole.total_seconds)
    assert merged.quantile(0.9) == whole.quantile(0.9)


@given(durations)
def test_a_report_gives_the_histogram_back(values: list[float]) -> None:
    whole = of(values)
    back = Histogram.from_json(json.loads(json.dumps(whole.as_json())))
    assert back.as_json() == whole.as_json()


def test_an_empty_one_has_no_quantiles_and_merges_with_others() -> None:
    empty = Histogram.from_json(json.loads(json.dumps(Histogram().as_json())))
    assert math.isnan(empty.quantile(0.5))
    assert math.isnan(empty.mean_seconds)
    empty.merge(of([0.25]))
    assert empty.quantile(0.5) == 0.25


def test_what_is_out_of_range_counts_at_the_end_of_the_range() -> None:
    found = of([-1.0, 1e9])
    assert found.count == 2
    assert found.least_seconds == 0.0
    assert [count for _, count in found.buckets()] == [1, 1]
    assert found.buckets()[-1][0] == pytest.approx(2**36 * 1e-6)


def test_buckets_ascend_and_leave_no_gap() -> None:
    random = Random(1)
    found = of([10 ** random.uniform(-7, 4.8) for _ in range(20_000)])
    uppers = [upper for upper, _ in found.buckets()]
    assert uppers == sorted(set(uppers))
    assert sum(count for _, count in found.buckets()) == 20_000
