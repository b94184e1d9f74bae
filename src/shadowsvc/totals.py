"""Figures of several pipelines as one.

Lives here: what is read, not counted, of ledgers and pipelines, added up for whoever shows it. The
service has one pipeline for its own session and one for what it adopts. Must not come in: changing
anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowsvc.ledger import Ledger

__all__ = ["Flights", "Ledgers"]


class Ledgers:
    """Several ledgers, read as one."""

    def __init__(self, *ledgers: Ledger) -> None:
        """Make it of one or more."""
        self._ledgers = ledgers

    def _total(self, read: Callable[[Ledger], int]) -> int:
        return sum(map(read, self._ledgers))

    @property
    def held(self) -> int:
        """As `Ledger.held`, of all."""
        return self._total(lambda one: one.held)

    @property
    def held_bytes(self) -> int:
        """As `Ledger.held_bytes`, of all."""
        return self._total(lambda one: one.held_bytes)

    @property
    def acknowledged(self) -> int:
        """As `Ledger.acknowledged`, of all."""
        return self._total(lambda one: one.acknowledged)

    @property
    def stale(self) -> int:
        """As `Ledger.stale`, of all."""
        return self._total(lambda one: one.stale)

    @property
    def abandoned(self) -> int:
        """As `Ledger.abandoned`, of all."""
        return self._total(lambda one: one.abandoned)

    @property
    def done_without_ack(self) -> int:
        """As `Ledger.done_without_ack`, of all."""
        return self._total(lambda one: one.done_without_ack)

    @property
    def unacknowledged(self) -> int:
        """As `Ledger.unacknowledged`, of all."""
        return self._total(lambda one: one.unacknowledged)

    @property
    def oldest(self) -> float | None:
        """Receive time of the oldest delivery of all that waits for its ack."""
        return min((one.oldest for one in self._ledgers if one.oldest is not None), default=None)


class _Flight(Protocol):
    @property
    def in_flight(self) -> int: ...

    @property
    def concurrency(self) -> int: ...


class Flights:
    """Several pipelines' requests to Cassandra, read as one's."""

    def __init__(self, *pipelines: _Flight) -> None:
        """Make it of one or more."""
        self._pipelines = pipelines

    @property
    def in_flight(self) -> int:
        """Requests at the driver."""
        return sum(pipeline.in_flight for pipeline in self._pipelines)

    @property
    def concurrency(self) -> int:
        """How many requests may be at the driver."""
        return sum(pipeline.concurrency for pipeline in self._pipelines)
