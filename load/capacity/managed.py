"""What a managed shadow service would ask for the same fleet: a least and a most.

Lives here: connection minutes, messages and operations on shadows, each at its published price.
Pure. Rules: where a published price could not be read the least counts nothing for it and the most
the dearest that is known; what the model leaves out of both systems (network, people) is left out
here, too. Must not come in: prices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from load.capacity.plan import Fleet
    from load.capacity.prices import Prices

__all__ = ["ManagedCost", "managed_cost"]

_MILLION: Final = 1e6
_SECONDS_PER_HOUR: Final = 3600.0
_MINUTES_PER_HOUR: Final = 60.0
_MONTHS: Final = 12


@dataclass(frozen=True, slots=True)
class ManagedCost:
    """Of one month, in the currency of `prices.toml`."""

    connectivity: float
    shadow_operations: float
    messages_least: float
    messages_most: float
    devices: int

    @property
    def least(self) -> float:
        """All that is published, with nothing for what could not be read."""
        return self.connectivity + self.shadow_operations + self.messages_least

    @property
    def most(self) -> float:
        """The same with every message at the price of the first ones."""
        return self.connectivity + self.shadow_operations + self.messages_most

    @property
    def least_per_device_year(self) -> float:
        """`least`, of one device in a year."""
        return self.least * _MONTHS / self.devices

    @property
    def most_per_device_year(self) -> float:
        """`most`, of one device in a year."""
        return self.most * _MONTHS / self.devices


def managed_cost(fleet: Fleet, prices: Prices) -> ManagedCost | None:
    """Return what a month costs there; None if the file of prices names no such service.

    Devices are taken as connected, and updates as coming, as at the busiest time all the month;
    the plan beside it is sized for that time, too. Free quotas of a first year are not counted.
    """
    managed = prices.managed
    if managed is None:
        return None
    hours = prices.hours_per_month
    minutes = fleet.connections * hours * _MINUTES_PER_HOUR
    updates = fleet.updates_per_second * hours * _SECONDS_PER_HOUR
    messages = updates * math.ceil(fleet.payload_bytes / managed.message_bytes)
    record_bytes = fleet.payload_bytes / fleet.leaves * fleet.shadow_leaves
    operations = updates * math.ceil(record_bytes / managed.shadow_operation_bytes)
    first = min(messages, managed.messages_at_that_price)
    beyond = messages - first
    known = managed.per_million_messages_beyond
    least_beyond = 0.0 if known is None else known
    most_beyond = managed.per_million_messages if known is None else known
    first_cost = first / _MILLION * managed.per_million_messages
    return ManagedCost(
        connectivity=minutes / _MILLION * managed.per_million_connection_minutes,
        shadow_operations=operations / _MILLION * managed.per_million_shadow_operations,
        messages_least=first_cost + beyond / _MILLION * least_beyond,
        messages_most=first_cost + beyond / _MILLION * most_beyond,
        devices=fleet.devices,
    )
