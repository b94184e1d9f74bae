"""What a node's thresholds make of the size of batches."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shadowsvc.store.thresholds import DEFAULT, MOST, BatchLimits, limits_of

PARTITIONS = "unlogged_batch_across_partitions_warn_threshold"
WARN = "batch_size_warn_threshold"
FAIL = "batch_size_fail_threshold"


def rows(**told: str | None) -> list[list[bytes | None]]:
    return [[name.encode(), None if text is None else text.encode()] for name, text in told.items()]


@pytest.mark.parametrize(
    ("told", "limits"),
    [
        ({}, DEFAULT),
        ({PARTITIONS: "10", WARN: "5KiB", FAIL: "50KiB"}, DEFAULT),
        ({PARTITIONS: "24", WARN: "16KiB", FAIL: "50KiB"}, BatchLimits(24, 16 * 1024)),
        ({PARTITIONS: "24"}, BatchLimits(24, DEFAULT.size_bytes)),
        ({WARN: "16384B"}, BatchLimits(DEFAULT.partitions, 16 * 1024)),
        # 4.0 has KiB in the name.
        ({PARTITIONS: "20", WARN + "_in_kb": "8", FAIL + "_in_kb": "50"}, BatchLimits(20, 8192)),
        # Fewer than by default, where somebody wants to be warned early.
        ({PARTITIONS: "3", WARN: "1KiB"}, BatchLimits(3, 1024)),
        # A warning that comes after the refusal is none.
        ({WARN: "1MiB", FAIL: "20KiB"}, BatchLimits(DEFAULT.partitions, 20 * 1024)),
        ({PARTITIONS: "1000", WARN: "1GiB", FAIL: "1GiB"}, MOST),
        ({PARTITIONS: "0", WARN: "0KiB"}, BatchLimits(1, 512)),
        ({PARTITIONS: "many", WARN: "16", FAIL: None}, DEFAULT),
    ],
)
def test_a_batch_is_as_large_as_the_node_allows_and_is_of_use(
    told: dict[str, str | None], limits: BatchLimits
) -> None:
    assert limits_of(rows(**told)) == limits


@given(st.lists(st.tuples(st.none() | st.binary(), st.none() | st.binary()).map(list)))
@example([[WARN.encode(), b"99999999999999999999KiB"], [PARTITIONS.encode(), b"-1"]])
def test_whatever_a_node_says_the_limits_are_usable(told: list[list[bytes | None]]) -> None:
    partitions, size_bytes = limits_of(told)
    assert 1 <= partitions <= MOST.partitions
    assert 512 <= size_bytes <= MOST.size_bytes


def test_the_smaller_of_two_nodes_counts_in_each_dimension() -> None:
    assert BatchLimits(10, 9000).within(BatchLimits(20, 600)) == (10, 600)
