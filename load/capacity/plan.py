"""What is to be carried, and what comes out: fleets, rules, limits, plans.

Lives here: the data of the capacity model, and what follows from counts alone: spare nodes,
machines, sums. Pure. Rules:

- **N+1.** What is needed carries the whole load; one more is there, so that any one may be gone.
  Brokers and Cassandra are at least three, of everything else there are at least two.
- **A kind whose limits are not all known has a least, not a count**, and a plan with such a kind
  has no sum.
- Time is in seconds, CPU in µs, sizes in bytes, money in the currency of `prices.toml`.

Must not come in: limits and figures (`model`), what a plan looks like (`report`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from load.errors import BadOption

if TYPE_CHECKING:
    from load.capacity.constants import Constant
    from load.capacity.prices import Machine, Prices

__all__ = ["KINDS", "Fleet", "KindPlan", "Limit", "Plan", "Rules"]

KINDS: Final = ("listener", "broker", "ingress", "cassandra")
_LEAST: Final = {"listener": 2, "broker": 3, "ingress": 2, "cassandra": 3}
_MONTHS: Final = 12


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is to be carried.

    Raises:
        BadOption: a figure that makes no sense.
    """

    devices: int
    """That have a shadow."""
    updates_per_second: float
    """Of all devices together, at the busiest time that is to be carried."""
    connected_share: float = 1.0
    """Of the devices, at the busiest time."""
    leaves: int = 4
    """Of an update."""
    leaves_per_device: int = 0
    """Of a whole shadow; 0: those of an update."""
    payload_bytes: int = 110
    """Of an update."""
    bad_share: float = 0.0
    """Of the messages, that become dead letters."""
    retention_days: float = 30.0
    """Of dead letters. A shadow stays until somebody deletes it."""
    cells: int = 1
    """Systems side by side, each with its own brokers, ingress, listeners and Cassandra."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("devices", self.devices, 1),
            ("cells", self.cells, 1),
            ("leaves", self.leaves, 1),
            ("payload-bytes", self.payload_bytes, 1),
            ("updates-per-second", self.updates_per_second, 0),
            ("leaves-per-device", self.leaves_per_device, 0),
            ("retention-days", self.retention_days, 0),
        ):
            if not value >= least or not math.isfinite(value):
                raise BadOption(f"--{name} {value:g}: has to be {least} or more")
        for name, share in (
            ("connected-share", self.connected_share),
            ("bad-share", self.bad_share),
        ):
            if not 0 <= share <= 1:
                raise BadOption(f"--{name} {share:g}: has to be from 0 to 1")

    @property
    def connections(self) -> int:
        """Connected devices at the busiest time."""
        return math.ceil(self.devices * self.connected_share)

    @property
    def shadow_leaves(self) -> int:
        """Leaves of a whole shadow, never fewer than an update has."""
        return max(self.leaves_per_device, self.leaves)

    @property
    def cell(self) -> Fleet:
        """What one cell carries; devices are rounded up."""
        return dataclasses.replace(
            self,
            devices=math.ceil(self.devices / self.cells),
            updates_per_second=self.updates_per_second / self.cells,
            cells=1,
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """How full a node may be, and what is chosen rather than measured."""

    cpu_share: float = 0.6
    """Of a node's processors in use at the busiest time, with the spare node gone."""
    memory_share: float = 0.7
    """Of a node's memory for connections."""
    disk_share: float = 0.5
    """Of a disk that may be full: compaction, streaming and snapshots need the rest."""
    obsolete_share: float = 0.1
    """Overwritten leaves that compaction has not removed yet, beside the live ones."""
    limit_share: float = 0.8
    """Of a count that a program or the kernel bounds: ports, processes, descriptors."""
    replicas: int = 3
    """Of a row in Cassandra."""
    source_addresses: int = 1
    """Of an ingress node towards the brokers."""
    descriptors: int = 1_048_576
    """That a process of a broker or of HAProxy may have open (LimitNOFILE)."""
    recovery_seconds: float = 900.0
    """In which all devices have to be connected again after all were lost."""
    pod_cores: float = 1.0
    """That one listening process can use: one thread decodes, plans and acknowledges."""
    dead_letter_bytes: int = 1000
    """Of a dead letter's row without its payload."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One thing that nodes run out of."""

    what: str
    nodes: float | None
    """How many nodes it needs, before rounding; None if a figure is missing."""
    detail: str = ""
    missing: tuple[Constant, ...] = ()


@dataclass(frozen=True, slots=True)
class KindPlan:
    """How many nodes of a kind one cell has."""

    kind: str
    machine: Machine
    limits: tuple[Limit, ...]
    spare: int = 1

    @property
    def missing(self) -> tuple[Constant, ...]:
        """Figures without which the number is only a least."""
        return tuple({item.name: item for limit in self.limits for item in limit.missing}.values())

    @property
    def complete(self) -> bool:
        """Whether every limit has a number."""
        return not self.missing

    @property
    def needed(self) -> int:
        """Nodes that carry the load, without the spare one."""
        known = [limit.nodes for limit in self.limits if limit.nodes is not None]
        return max(1, math.ceil(max(known, default=0.0) - 1e-9))

    @property
    def nodes(self) -> int:
        """Nodes with the spare one; a least as long as something is missing."""
        return max(_LEAST[self.kind], self.needed + self.spare)

    @property
    def deciding(self) -> Limit | None:
        """The limit that needs most; None if none is known."""
        known = [limit for limit in self.limits if limit.nodes is not None]
        return max(known, key=lambda limit: limit.nodes or 0.0, default=None)

    @property
    def machines(self) -> int:
        """Machines to rent for them."""
        return math.ceil(self.nodes / self.machine.share)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fleet needs; counts in `kinds` are those of one cell."""

    fleet: Fleet
    rules: Rules
    prices: Prices
    kinds: tuple[KindPlan, ...]
    warnings: tuple[str, ...] = ()
    assumed: tuple[str, ...] = field(default=())

    @property
    def missing(self) -> tuple[Constant, ...]:
        """Every figure that nobody has measured yet and that this fleet needs."""
        return tuple({item.name: item for kind in self.kinds for item in kind.missing}.values())

    @property
    def complete(self) -> bool:
        """Whether the sums are sums, and not only the least that they can be."""
        return not self.missing

    @property
    def claim(self) -> bool:
        """Whether it rests on measured figures and facts alone."""
        return self.complete and not self.assumed

    @property
    def least_cost_per_month(self) -> float:
        """All machines that are known to be needed, and what `[more]` adds."""
        machines = sum(kind.machines * kind.machine.price_per_hour for kind in self.kinds)
        return (
            machines * self.prices.hours_per_month * self.fleet.cells + self.prices.more_per_month
        )

    @property
    def cost_per_month(self) -> float | None:
        """The cost of a month, or None as long as a figure is missing."""
        return self.least_cost_per_month if self.complete else None

    @property
    def cost_per_device_year(self) -> float | None:
        """The cost of a device in a year, or None as long as a figure is missing."""
        month = self.cost_per_month
        return None if month is None else month * _MONTHS / self.fleet.devices

    def kind(self, name: str) -> KindPlan:
        """Return the plan of one kind."""
        return next(kind for kind in self.kinds if kind.kind == name)
