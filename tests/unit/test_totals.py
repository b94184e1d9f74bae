"""Figures of several pipelines add up."""

from __future__ import annotations

from types import SimpleNamespace

from shadowsvc.ledger import Ledger
from shadowsvc.totals import Flights, Ledgers

SUMS = ("held", "held_bytes", "acknowledged", "stale", "abandoned", "done_without_ack")


def test_what_ledgers_count_adds_up() -> None:
    own, adopted = Ledger(), Ledger()
    both = Ledgers(own, adopted)
    assert both.oldest is None
    own.begin_epoch()
    early = own.receive(1, 10, 5.0)
    own.receive(0, 20, 6.0)
    late = adopted.receive(1, 100, 7.0)
    assert both.oldest == 5.0
    assert (both.held, both.held_bytes, both.unacknowledged) == (3, 130, 2)
    own.complete([early])
    own.take_acks()
    assert both.oldest == 7.0
    adopted.begin_epoch()
    adopted.complete([late])
    assert (both.acknowledged, both.stale, both.held, both.unacknowledged) == (1, 1, 1, 0)
    for name in SUMS:
        assert getattr(both, name) == getattr(own, name) + getattr(adopted, name)


def test_requests_to_cassandra_add_up() -> None:
    flights = Flights(
        SimpleNamespace(in_flight=3, concurrency=32), SimpleNamespace(in_flight=2, concurrency=4)
    )
    assert (flights.in_flight, flights.concurrency) == (5, 36)
