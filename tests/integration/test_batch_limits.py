"""Batches are as large as a real Cassandra says that it allows, and it has nothing to warn of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from shadowsvc.store.thresholds import MOST, QUESTION, limits_of
from tests.serving import settle

if TYPE_CHECKING:
    from tests.service import ServiceProcess
    from tests.serving import Serve, Served

pytestmark = pytest.mark.timeout(120)

WARNINGS = ("Cassandra warns", "cassandra driver")


def wait_limits(service: ServiceProcess, partitions: int, size_bytes: int) -> None:
    def allowed() -> bool:
        figures = service.metrics()
        return (figures.total("batch_max_partitions"), figures.total("batch_max_bytes")) == (
            partitions,
            size_bytes,
        )

    service.wait_until(allowed, f"batches may have {partitions} devices and {size_bytes} bytes")


def load(served: Served, unique: str) -> None:
    """Publish updates of many devices, so that full batches meet a writer that is busy."""
    service, oracle = served
    for number in range(600):
        state = {"on": True, "level": number, "text": "x" * 50, "deep": {"er": [number]}}
        oracle.update(f"{unique}-{number}", {"reported": state})
    oracle.wait_taken()
    settle(service, oracle)


def warnings(service: ServiceProcess) -> list[dict[str, Any]]:
    return [
        event
        for name in WARNINGS
        for event in service.events(name)
        if event["level"] in {"warning", "error"}
    ]


def test_a_cassandra_with_raised_thresholds_gets_larger_batches_and_does_not_warn(
    serve_own: Serve, unique: str
) -> None:
    with serve_own(CASSANDRA__CONCURRENCY=1, CASSANDRA__LINGER_SECONDS=0.1) as served:
        service, _ = served
        wait_limits(service, MOST.partitions, 16 * 1024)
        load(served, unique)
        figures = service.metrics()
        assert figures.total("batch_partitions_bucket", le="+Inf") > figures.total(
            "batch_partitions_bucket", le="24.0"
        )
        assert warnings(service) == []
        assert figures.total("batches_split_total") == 0


def test_a_cassandra_as_it_comes_gets_batches_that_it_does_not_warn_of(
    serve: Serve, cql: Any, unique: str
) -> None:
    told = [[name.encode(), value.encode()] for name, value in cql.execute(QUESTION)]
    assert len(told) >= 3, "it tells its thresholds"
    with serve(CASSANDRA__CONCURRENCY=1, CASSANDRA__LINGER_SECONDS=0.1) as served:
        service, _ = served
        wait_limits(service, *limits_of(told))
        load(served, unique)
        assert service.metrics().total("batch_partitions_count") > 0
        assert warnings(service) == []


def test_what_the_settings_say_counts_whatever_the_cassandra_allows(
    serve_own: Serve, unique: str
) -> None:
    with serve_own(
        CASSANDRA__BATCH_MAX_PARTITIONS=7,
        CASSANDRA__CONCURRENCY=1,
        CASSANDRA__LINGER_SECONDS=0.1,
    ) as served:
        service, _ = served
        wait_limits(service, 7, 16 * 1024)
        load(served, unique)
        figures = service.metrics()
        assert figures.total("batch_partitions_bucket", le="8.0") == figures.total(
            "batch_partitions_count"
        )
