"""The capacity model: more load never needs less, units agree, N+1, and nothing is made up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load.capacity.constants import Constants, read_constants
from load.capacity.managed import managed_cost
from load.capacity.model import plan
from load.capacity.plan import KINDS, Fleet, Plan, Rules
from load.capacity.prices import Prices, read_prices
from load.errors import BadOption

CONSTANTS = read_constants()
PRICES = read_prices()
TRIED = {
    "service.cpu_us_per_leaf": 3.0,
    "service.cpu_us_per_payload_byte": 0.02,
    "cassandra.cpu_us_per_leaf": 8.0,
    "cassandra.cpu_us_per_payload_byte": 0.05,
    "cassandra.disk_bytes_per_leaf": 40.0,
    "broker.memory_bytes_per_connection": 20_000.0,
    "broker.cpu_us_per_publish": 30.0,
    "broker.cpu_us_per_connection_second": 4.0,
    "broker.cpu_us_per_connect": 300.0,
    "ingress.cpu_us_per_connect": 100.0,
    "ingress.memory_bytes_per_connection": 16_000.0,
    "ingress.cpu_us_per_connection_second": 1.0,
    "ingress.cpu_us_per_publish": 20.0,
}
"""Figures of the right size, so that every limit has a number."""

UNKNOWN = Constants(
    {
        item.name: dataclasses.replace(item, value=None if item.name in TRIED else item.value)
        for item in CONSTANTS.all
    }
)
"""As if nobody had measured any of these."""

fleets = st.builds(
    Fleet,
    devices=st.integers(1, 200_000_000),
    updates_per_second=st.floats(0, 1e6),
    connected_share=st.floats(0, 1),
    leaves=st.integers(1, 200),
    leaves_per_device=st.integers(0, 2000),
    payload_bytes=st.integers(1, 100_000),
    bad_share=st.floats(0, 1),
    retention_days=st.floats(0, 400),
    cells=st.integers(1, 50),
)
MORE = {
    "devices": lambda value: value * 2 + 1,
    "updates_per_second": lambda value: value * 1.7 + 1,
    "connected_share": lambda value: min(1.0, value + 0.2),
    "leaves_per_device": lambda value: value * 3 + 7,
    "bad_share": lambda value: min(1.0, value + 0.1),
    "retention_days": lambda value: value + 30,
}


def tried(**changed: float) -> Constants:
    return CONSTANTS.assuming(TRIED | changed)


def planned(fleet: Fleet, constants: Constants | None = None, **rules: Any) -> Plan:
    return plan(fleet, constants or tried(), PRICES, Rules(**rules))


def needed(found: Plan) -> dict[str, int]:
    return {kind.kind: kind.nodes for kind in found.kinds}


class TestMoreLoad:
    @given(fleet=fleets, what=st.sampled_from(sorted(MORE)))
    def test_more_of_anything_never_needs_fewer_nodes_of_any_kind(
        self, fleet: Fleet, what: str
    ) -> None:
        more = dataclasses.replace(fleet, **{what: MORE[what](getattr(fleet, what))})

        before, after = needed(planned(fleet)), needed(planned(more))

        assert all(after[kind] >= before[kind] for kind in KINDS)

    @given(fleet=fleets, more=st.integers(1, 300))
    def test_larger_updates_never_need_fewer_listening_processes(
        self, fleet: Fleet, more: int
    ) -> None:
        leaves = dataclasses.replace(fleet, leaves=fleet.leaves + more)
        payload = dataclasses.replace(fleet, payload_bytes=fleet.payload_bytes + more)

        count = planned(fleet).kind("listener").nodes

        assert planned(leaves).kind("listener").nodes >= count
        assert planned(payload).kind("listener").nodes >= count

    @given(fleet=fleets, name=st.sampled_from(sorted(TRIED)), factor=st.floats(1, 20))
    def test_a_dearer_figure_never_needs_fewer_nodes(
        self, fleet: Fleet, name: str, factor: float
    ) -> None:
        worse = TRIED[name] * factor
        ports = planned(fleet).kind("ingress").limits[3]

        before, after = planned(fleet), planned(fleet, tried(**{name: worse}))

        assert ports.what == "ports"
        for kind in KINDS:
            # A broker that holds less needs fewer ports of each ingress node: the one exception.
            if kind == "ingress" and name.startswith("broker.memory"):
                continue
            assert after.kind(kind).nodes >= before.kind(kind).nodes


class TestUnits:
    @given(fleet=fleets, factor=st.sampled_from([2.0, 4.0, 0.5]))
    def test_twice_the_rate_at_half_the_cost_needs_the_same_processors(
        self, fleet: Fleet, factor: float
    ) -> None:
        names = [name for name in TRIED if "cpu_us" in name and "connection_second" not in name]
        cost = {name: TRIED[name] / factor for name in names} | {
            name: CONSTANTS[name] / factor
            for name in ("service.cpu_us_per_update", "cassandra.cpu_us_per_update")
        }
        faster = dataclasses.replace(fleet, updates_per_second=fleet.updates_per_second * factor)

        before, after = planned(fleet), planned(faster, tried(**cost))

        for kind in ("listener", "broker", "ingress", "cassandra"):
            was, is_ = (
                next(limit for limit in found.kind(kind).limits if limit.what == "CPU").nodes
                for found in (before, after)
            )
            assert was is not None
            assert is_ == pytest.approx(was)

    def test_the_figures_of_the_known_system_are_worked_out_by_hand(self) -> None:
        fleet = Fleet(devices=5_000_000, updates_per_second=10_000)

        found = planned(
            fleet,
            tried(
                **{
                    "service.cpu_us_per_update": 40.0,
                    "service.updates_per_second_per_process": 15_000.0,
                    "cassandra.cpu_us_per_update": 60.0,
                }
            ),
            cpu_share=0.5,
            memory_share=0.5,
            disk_share=0.5,
            limit_share=0.8,
            obsolete_share=0.25,
            recovery_seconds=500.0,
        )
        limits = {
            (kind.kind, limit.what): limit.nodes for kind in found.kinds for limit in kind.limits
        }

        gib = 2**30
        assert limits["listener", "CPU"] == pytest.approx(10_000 * 40e-6 / 0.5)
        assert limits["listener", "updates/s of one process"] == pytest.approx(10 / 7.5)
        assert limits["broker", "listeners"] == pytest.approx(10)
        assert limits["broker", "processes of Erlang"] == pytest.approx(5e6 / (2**21 * 0.8 / 2))
        assert limits["broker", "memory"] == pytest.approx(5e6 * 20_000 / (32 * gib * 0.5))
        assert limits["broker", "CPU"] == pytest.approx((10_000 * 30e-6 + 5e6 * 4e-6) / (8 * 0.5))
        assert limits["broker", "storm, CPU"] == pytest.approx(10_000 / (8 * 0.5 / 300e-6))
        assert limits["ingress", "storm, CPU"] == pytest.approx(10_000 / (8 * 0.5 / 100e-6))
        assert limits["ingress", "storm, limit of rate"] == pytest.approx(10)
        assert limits["ingress", "descriptors"] == pytest.approx(5e6 * 2 / (2**20 * 0.8))
        assert limits["ingress", "ports"] == pytest.approx(500_000 / (4 * 28_232 * 0.8))
        assert limits["cassandra", "CPU"] == pytest.approx(10_000 * 60e-6 * 3 / (8 * 0.5))
        assert limits["cassandra", "storage"] == pytest.approx(
            5e6 * 4 * 40 * 1.25 * 3 / (1.875e12 * 0.5)
        )

    def test_more_source_addresses_and_ports_lift_the_limit_of_ports(self) -> None:
        fleet = Fleet(devices=1_000_000, updates_per_second=1000)

        def ports(found: Plan) -> float:
            limit = next(each for each in found.kind("ingress").limits if each.what == "ports")
            assert limit.nodes is not None
            return limit.nodes

        one = ports(planned(fleet))
        assert ports(planned(fleet, source_addresses=4)) == pytest.approx(one / 4)
        wide = tried(**{"ingress.ports_per_address": 64_512})
        assert ports(planned(fleet, wide)) == pytest.approx(one * 28_232 / 64_512)

    def test_several_replica_sets_are_warned_of(self) -> None:
        few = planned(Fleet(devices=10, updates_per_second=100))
        many = planned(Fleet(devices=10, updates_per_second=1e6))

        assert not any("replica sets" in warning for warning in few.warnings)
        assert any("replica sets" in warning for warning in many.warnings)


class TestSpares:
    @given(fleet=fleets)
    def test_with_any_one_node_gone_the_others_carry_all(self, fleet: Fleet) -> None:
        for kind in planned(fleet).kinds:
            left = kind.nodes - 1
            assert all(limit.nodes is not None for limit in kind.limits)
            assert all((limit.nodes or 0) <= left + 1e-6 for limit in kind.limits)

    @given(fleet=fleets)
    def test_brokers_and_cassandra_keep_a_majority_with_one_gone(self, fleet: Fleet) -> None:
        found = planned(fleet)

        assert found.kind("broker").nodes >= 3
        assert found.kind("cassandra").nodes >= 3
        assert found.kind("listener").nodes >= 2
        assert found.kind("ingress").nodes >= 2

    @given(fleet=fleets)
    def test_there_is_a_machine_for_every_process(self, fleet: Fleet) -> None:
        for kind in planned(fleet).kinds:
            assert kind.machines * kind.machine.share >= kind.nodes
            assert (kind.machines - 1) * kind.machine.share < kind.nodes

    def test_more_listening_processes_than_slots_are_warned_of(self) -> None:
        most = planned(Fleet(devices=10, updates_per_second=1e8))
        cells = planned(Fleet(devices=10, updates_per_second=1e8, cells=100))

        assert any("slots" in warning for warning in most.warnings)
        assert not any("slots" in warning for warning in cells.warnings)


class TestWhatIsNotKnown:
    def test_what_nobody_measured_has_no_number_and_stops_the_sum(self) -> None:
        fleet = Fleet(devices=5_000_000, updates_per_second=9779, leaves=9, payload_bytes=900)

        whole = plan(fleet, UNKNOWN.assuming(TRIED), PRICES)
        assert whole.complete
        for name in TRIED:
            rest = {key: value for key, value in TRIED.items() if key != name}
            found = plan(fleet, UNKNOWN.assuming(rest), PRICES)

            assert [item.name for item in found.missing] == [name]
            assert found.cost_per_month is None
            assert found.cost_per_device_year is None
            assert not found.claim
            assert found.least_cost_per_month <= whole.least_cost_per_month

    @given(fleet=fleets)
    def test_a_least_is_never_more_than_what_it_comes_to_be(self, fleet: Fleet) -> None:
        least, whole = plan(fleet, UNKNOWN, PRICES), planned(fleet)

        for kind in KINDS:
            assert least.kind(kind).nodes <= whole.kind(kind).nodes
        assert least.least_cost_per_month <= whole.least_cost_per_month + 1e-6

    def test_an_update_as_it_was_measured_needs_no_figure_of_larger_ones(self) -> None:
        found = planned(Fleet(devices=1000, updates_per_second=10, leaves=4, payload_bytes=110))

        assert not {name for name in found.assumed if "per_leaf" in name and "cpu" in name}
        assert not {name for name in found.assumed if "payload" in name}

    def test_assumed_figures_make_a_sum_and_no_claim(self) -> None:
        found = planned(Fleet(devices=5_000_000, updates_per_second=9779))

        assert found.complete
        assert found.cost_per_month is not None
        assert not found.claim
        assert "broker.memory_bytes_per_connection" in found.assumed

    def test_figures_that_are_all_measured_make_a_claim(self) -> None:
        measured = {
            item.name: dataclasses.replace(item, value=item.value or TRIED[item.name])
            for item in CONSTANTS.all
        }

        found = plan(Fleet(devices=1000, updates_per_second=10), Constants(measured), PRICES)

        assert found.claim

    def test_a_program_that_stands_in_for_another_is_named(self) -> None:
        name = "broker.cpu_us_per_publish"
        figures = {item.name: item for item in CONSTANTS.all}
        figures[name] = dataclasses.replace(figures[name], of="another broker")

        found = plan(Fleet(devices=1000, updates_per_second=10), Constants(figures), PRICES)

        assert f"{name} is that of another broker" in found.warnings


class TestCost:
    @given(fleet=fleets)
    def test_the_month_is_the_machines_and_a_year_of_a_device_is_its_part(
        self, fleet: Fleet
    ) -> None:
        found = planned(fleet)
        hourly = sum(kind.machines * kind.machine.price_per_hour for kind in found.kinds)

        assert found.cost_per_month == pytest.approx(hourly * 730 * fleet.cells)
        assert found.cost_per_device_year is not None
        assert found.cost_per_device_year * fleet.devices == pytest.approx(
            hourly * 730 * fleet.cells * 12
        )

    def test_what_else_a_month_costs_is_added(self) -> None:
        prices = dataclasses.replace(PRICES, more_per_month=1234.0)
        fleet = Fleet(devices=1000, updates_per_second=10)

        assert plan(fleet, tried(), prices).least_cost_per_month == pytest.approx(
            plan(fleet, tried(), PRICES).least_cost_per_month + 1234
        )

    def test_the_managed_service_is_asked_for_minutes_operations_and_messages(self) -> None:
        found = managed_cost(Fleet(devices=5_000_000, updates_per_second=9779), PRICES)

        assert found is not None
        updates = 9779 * 730 * 3600
        assert found.connectivity == pytest.approx(5e6 * 730 * 60 * 0.08e-6)
        assert found.shadow_operations == pytest.approx(updates * 1.25e-6)
        assert found.messages_least == pytest.approx(1000)
        assert found.messages_most == pytest.approx(updates * 1e-6)
        assert found.least < found.most

    @given(fleet=fleets)
    def test_the_least_is_never_more_than_the_most(self, fleet: Fleet) -> None:
        found = managed_cost(fleet, PRICES)

        assert found is not None
        assert 0 <= found.least <= found.most
        assert math.isfinite(found.most)

    def test_a_known_price_of_many_messages_leaves_one_figure(self) -> None:
        assert PRICES.managed is not None
        known = dataclasses.replace(PRICES.managed, per_million_messages_beyond=0.5)
        prices: Prices = dataclasses.replace(PRICES, managed=known)

        found = managed_cost(Fleet(devices=5_000_000, updates_per_second=9779), prices)

        assert found is not None
        assert found.least == found.most

    def test_a_large_shadow_counts_as_several_operations_and_a_large_message_as_several(
        self,
    ) -> None:
        small = managed_cost(Fleet(devices=10, updates_per_second=1), PRICES)
        large = managed_cost(
            Fleet(devices=10, updates_per_second=1, payload_bytes=5121, leaves_per_device=4),
            PRICES,
        )

        assert small is not None
        assert large is not None
        assert large.messages_most == pytest.approx(2 * small.messages_most)
        assert large.shadow_operations == pytest.approx(6 * small.shadow_operations)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"devices": 0}, "--devices 0: has to be 1 or more"),
        ({"cells": 0}, "--cells 0: has to be 1 or more"),
        ({"leaves": 0}, "--leaves 0: has to be 1 or more"),
        ({"payload_bytes": 0}, "--payload-bytes 0: has to be 1 or more"),
        ({"updates_per_second": -1.0}, "--updates-per-second -1: has to be 0 or more"),
        ({"updates_per_second": math.nan}, "--updates-per-second nan: has to be 0 or more"),
        ({"updates_per_second": math.inf}, "--updates-per-second inf: has to be 0 or more"),
        ({"connected_share": 1.1}, "--connected-share 1.1: has to be from 0 to 1"),
        ({"bad_share": -0.1}, "--bad-share -0.1: has to be from 0 to 1"),
    ],
)
def test_a_fleet_that_makes_no_sense_is_refused(changed: dict[str, Any], message: str) -> None:
    fleet = Fleet(devices=10, updates_per_second=1)

    with pytest.raises(BadOption, match=message.replace("--", "^--")):
        dataclasses.replace(fleet, **changed)
