"""How many nodes a fleet needs: every limit of every kind of node.

Lives here: the limits. Pure. Rules:

- **Each limit says how many nodes it alone would need**; the largest decides. A limit that needs an
  unmeasured figure has no number and names the figure.
- **More load never needs fewer nodes.** So a limit that depends on another kind (ports of an
  ingress node towards a broker) takes that kind's nodes as full, not as many as there happen to be.

Must not come in: figures (they are in the two files), what a plan looks like.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from load.capacity.plan import KindPlan, Limit, Plan, Rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from load.capacity.constants import Constant, Constants
    from load.capacity.plan import Fleet
    from load.capacity.prices import Prices

__all__ = ["plan"]

_US: Final = 1e6
_SECONDS_PER_DAY: Final = 86_400.0


def plan(fleet: Fleet, constants: Constants, prices: Prices, rules: Rules | None = None) -> Plan:
    """Return what `fleet` needs."""
    rules = rules or Rules()
    sizing = _Sizing(fleet.cell, constants, prices, rules)
    kinds = (sizing.listeners(), sizing.brokers(), sizing.ingress(), sizing.cassandra())
    warnings = []
    slots = constants["service.slots"]
    if kinds[0].nodes > slots:
        warnings.append(
            f"{kinds[0].nodes} listening processes a cell are more than {slots:g} slots of one "
            "share group: take more cells"
        )
    if kinds[3].nodes > rules.replicas:
        warnings.append(
            f"{kinds[3].nodes} Cassandra nodes a cell have several replica sets: batches are "
            "emptier than those that were measured, and an update costs more than here"
        )
    warnings += sizing.of
    return Plan(fleet, rules, prices, kinds, tuple(warnings), constants.assumed_used)


class _Asked:
    """The figures of one limit; what is missing counts as nothing, and is remembered."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self.missing: list[Constant] = []
        self.of: set[str] = set()
        """What was measured in another's place, of all that was ever asked for."""

    def __getitem__(self, name: str) -> float:
        constant = self._constants.get(name)
        if constant.of and not constant.assumed:
            self.of.add(f"{name} is that of {constant.of}")
        if constant.value is None:
            self.missing.append(constant)
            return math.nan
        return self._constants[name]


class _Sizing:
    """The limits of one cell."""

    def __init__(self, fleet: Fleet, constants: Constants, prices: Prices, rules: Rules) -> None:
        self._fleet = fleet
        self._constants = _Asked(constants)
        self._prices = prices
        self._rules = rules

    @property
    def of(self) -> list[str]:
        """What was measured of a program in another's place, as people read it."""
        return sorted(self._constants.of)

    def listeners(self) -> KindPlan:
        fleet, constants, rules = self._fleet, self._constants, self._rules
        machine = self._prices.machines["listener"]

        def cpu() -> tuple[float, str]:
            each = constants["service.cpu_us_per_update"] + self._more_than_measured("service")
            cores = fleet.updates_per_second * each / _US
            return (
                cores / (rules.pod_cores * rules.cpu_share),
                f"{each:.1f} µs an update: {cores:.2f} processors",
            )

        def measured() -> tuple[float, str]:
            most = constants["service.updates_per_second_per_process"]
            self._more_than_measured("service")  # a rate of larger updates was not measured
            return fleet.updates_per_second / (most * rules.cpu_share), f"{most:,.0f}/s seen of one"

        def memory() -> tuple[float, str]:
            each = constants["service.memory_bytes"]
            room = machine.memory_bytes * rules.memory_share / machine.share
            return each / room, f"{each / 1e6:.0f} MB a process"

        return KindPlan(
            "listener",
            machine,
            (
                self._limit("CPU", cpu),
                self._limit("updates/s of one process", measured),
                self._limit("memory", memory),
            ),
        )

    def brokers(self) -> KindPlan:
        fleet, constants, rules = self._fleet, self._constants, self._rules
        machine = self._prices.machines["broker"]

        def cpu() -> tuple[float, str]:
            messages = fleet.updates_per_second * constants["broker.cpu_us_per_publish"]
            idle = fleet.connections * constants["broker.cpu_us_per_connection_second"]
            cores = (messages + idle) / _US
            return cores / (machine.cores * rules.cpu_share), f"{cores:.1f} processors"

        def storm() -> tuple[float, str]:
            each = machine.cores * rules.cpu_share * _US / constants["broker.cpu_us_per_connect"]
            return self._storm(each)

        limits = [
            self._limit(what, self._connections_limit(most))
            for what, most in self._broker_connections()
        ]
        return KindPlan(
            "broker",
            machine,
            (*limits, self._limit("CPU", cpu), self._limit("storm, CPU", storm)),
        )

    def ingress(self) -> KindPlan:
        fleet, constants, rules = self._fleet, self._constants, self._rules
        machine = self._prices.machines["ingress"]

        def descriptors() -> float:
            each = constants["ingress.descriptors_per_connection"]
            return rules.descriptors * rules.limit_share / each

        def of_a_process() -> float:
            return constants["ingress.connections_per_process"]

        def memory() -> float:
            each = constants["ingress.memory_bytes_per_connection"]
            return machine.memory_bytes * rules.memory_share / each

        def cpu() -> tuple[float, str]:
            messages = fleet.updates_per_second * constants["ingress.cpu_us_per_publish"]
            idle = fleet.connections * constants["ingress.cpu_us_per_connection_second"]
            cores = (messages + idle) / _US
            return cores / (machine.cores * rules.cpu_share), f"{cores:.1f} processors"

        def ports() -> tuple[float, str]:
            pair = (
                constants["broker.listeners"]
                * rules.source_addresses
                * constants["ingress.ports_per_address"]
                * rules.limit_share
            )
            a_broker = min(most() for _, most in self._broker_connections())
            full = min(a_broker, fleet.connections)
            return full / pair, f"{pair:,.0f} connections to a broker of {full:,.0f}"

        def rate() -> tuple[float, str]:
            return self._storm(constants["ingress.connects_per_second"])

        def storm() -> tuple[float, str]:
            each = machine.cores * rules.cpu_share * _US / constants["ingress.cpu_us_per_connect"]
            return self._storm(each)

        return KindPlan(
            "ingress",
            machine,
            (
                self._limit("descriptors", self._connections_limit(descriptors)),
                self._limit("connections of HAProxy", self._connections_limit(of_a_process)),
                self._limit("memory", self._connections_limit(memory)),
                self._limit("ports", ports),
                self._limit("CPU", cpu),
                self._limit("storm, limit of rate", rate),
                self._limit("storm, CPU", storm),
            ),
        )

    def cassandra(self) -> KindPlan:
        fleet, constants, rules = self._fleet, self._constants, self._rules
        machine = self._prices.machines["cassandra"]

        def cpu() -> tuple[float, str]:
            each = constants["cassandra.cpu_us_per_update"] + self._more_than_measured("cassandra")
            cores = fleet.updates_per_second * each * rules.replicas / _US
            return (
                cores / (machine.cores * rules.cpu_share),
                f"{each:.1f} µs an update, {rules.replicas} replicas: {cores:.1f} processors",
            )

        def storage() -> tuple[float, str]:
            each = constants["cassandra.disk_bytes_per_leaf"] + self._longer_leaves()
            live = fleet.devices * fleet.shadow_leaves * each * (1 + rules.obsolete_share)
            letters = (
                fleet.updates_per_second
                * fleet.bad_share
                * fleet.retention_days
                * _SECONDS_PER_DAY
                * (rules.dead_letter_bytes + fleet.payload_bytes)
            )
            total = (live + letters) * rules.replicas
            return (
                total / (machine.disk_bytes * rules.disk_share),
                f"{total / 1e9:,.0f} GB in {rules.replicas} replicas",
            )

        return KindPlan(
            "cassandra",
            machine,
            (self._limit("CPU", cpu), self._limit("storage", storage)),
        )

    def _broker_connections(self) -> tuple[tuple[str, Callable[[], float]], ...]:
        """What bounds the connections of one broker, each as the number it allows."""
        constants, rules = self._constants, self._rules
        machine = self._prices.machines["broker"]
        return (
            (
                "processes of Erlang",
                lambda: (
                    constants["broker.processes"]
                    * rules.limit_share
                    / constants["broker.processes_per_connection"]
                ),
            ),
            (
                "listeners",
                lambda: (
                    constants["broker.listeners"] * constants["broker.connections_per_listener"]
                ),
            ),
            (
                "descriptors",
                lambda: (
                    rules.descriptors
                    * rules.limit_share
                    / constants["broker.descriptors_per_connection"]
                ),
            ),
            (
                "memory",
                lambda: (
                    machine.memory_bytes
                    * rules.memory_share
                    / constants["broker.memory_bytes_per_connection"]
                ),
            ),
        )

    def _storm(self, connects_per_second: float) -> tuple[float, str]:
        seconds = self._rules.recovery_seconds
        return (
            self._fleet.connections / (connects_per_second * seconds),
            f"{connects_per_second:,.0f} connects/s a node, all back in {seconds:,.0f} s",
        )

    def _connections_limit(self, most: Callable[[], float]) -> Callable[[], tuple[float, str]]:
        def limit() -> tuple[float, str]:
            each = most()
            return self._fleet.connections / each, f"{each:,.0f} connections a node"

        return limit

    def _more_than_measured(self, part: str) -> float:
        """CPU µs of what an update has beyond the measured one: leaves, and bytes of payload."""
        constants, more = self._constants, 0.0
        leaves = self._fleet.leaves - constants["service.leaves_per_update"]
        payload = self._fleet.payload_bytes - constants["service.payload_bytes_per_update"]
        if leaves > 0:
            more += leaves * constants[f"{part}.cpu_us_per_leaf"]
        if payload > 0:
            more += payload * constants[f"{part}.cpu_us_per_payload_byte"]
        return more

    def _longer_leaves(self) -> float:
        """Bytes of a leaf beyond those of the measured one; as if they did not compress."""
        constants = self._constants
        measured = (
            constants["service.payload_bytes_per_update"] / constants["service.leaves_per_update"]
        )
        return max(0.0, self._fleet.payload_bytes / self._fleet.leaves - measured)

    def _limit(self, what: str, need: Callable[[], tuple[float, str]]) -> Limit:
        self._constants.missing.clear()
        nodes, detail = need()
        if missing := tuple(self._constants.missing):
            return Limit(what, None, missing=missing)
        return Limit(what, nodes, detail)
