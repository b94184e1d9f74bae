"""What people read of a plan: text, a table for documents, JSON.

Rules: a least is never printed as if it were a count or a sum; what is missing or assumed stands
where the sum would stand. Must not come in: sizing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from load.capacity.constants import Constants
    from load.capacity.managed import ManagedCost
    from load.capacity.plan import KindPlan, Limit, Plan

__all__ = ["SCALING", "constants_text", "plan_json", "plan_markdown", "plan_text"]

SCALING: Final = Path(__file__).parents[2] / "docs" / "scaling.md"
"""The document that has the tables."""

_HEAD = (
    "| devices | updates/s | cells | listening | brokers | ingress | Cassandra | a month "
    "| a device a year | managed, a device a year |"
)
_NAMES = {
    "listener": "listening processes",
    "broker": "broker nodes",
    "ingress": "ingress nodes",
    "cassandra": "Cassandra nodes",
}


def plan_text(plan: Plan, managed: ManagedCost | None) -> str:
    """Return a plan as lines for a terminal, ending without a line break."""
    fleet, prices = plan.fleet, plan.prices
    lines = [
        f"{fleet.devices:,} devices, {fleet.connections:,} connected, "
        f"{fleet.updates_per_second:,.0f} updates/s of {fleet.leaves} leaves and "
        f"{fleet.payload_bytes} bytes" + (f", in {fleet.cells} cells" if fleet.cells > 1 else ""),
        "",
    ]
    for kind in plan.kinds:
        each = " a cell" if fleet.cells > 1 else ""
        lines.append(
            f"{_NAMES[kind.kind]}{each}: {_count(kind)}  (one of them spare; {kind.machine.name}"
            + (f", {kind.machine.share} on one" if kind.machine.share > 1 else "")
            + ")"
        )
        lines += [f"  {_limit(limit, kind)}" for limit in kind.limits]
    lines.append("")
    lines += _cost_lines(plan)
    if managed is not None and prices.managed is not None:
        lines += ["", *_managed_lines(plan, managed)]
    lines += [f"mind: {warning}" for warning in plan.warnings]
    lines.append(
        f"not in it: {prices.more_what}"
        if not prices.more_per_month
        else f"in it: {prices.more_per_month:,.0f} {prices.currency} a month for {prices.more_what}"
    )
    lines += ["", *_standing(plan)]
    return "\n".join(lines)


def plan_markdown(plans: Iterable[tuple[Plan, ManagedCost | None]]) -> str:
    """Return plans side by side, a row each, as a table for a document."""
    rows = [
        _HEAD,
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for plan, managed in plans:
        fleet = plan.fleet
        counts = " | ".join(_cell(kind, fleet.cells) for kind in plan.kinds)
        each = plan.cost_per_device_year
        least = plan.least_cost_per_month * 12 / fleet.devices
        rows.append(
            f"| {fleet.devices:,} | {fleet.updates_per_second:,.0f} | {fleet.cells} | {counts} "
            f"| {'' if plan.complete else '≥ '}{plan.least_cost_per_month:,.0f} "
            f"| {f'≥ {least:.3f}' if each is None else f'{each:.3f}'} "
            f"| {'' if managed is None else _range(managed)} |"
        )
    return "\n".join(rows)


def plan_json(plan: Plan, managed: ManagedCost | None) -> dict[str, Any]:
    """Return a plan as JSON has it; sums are null as long as a figure is missing."""
    fleet = plan.fleet
    return {
        "devices": fleet.devices,
        "connections": fleet.connections,
        "updates_per_second": fleet.updates_per_second,
        "leaves": fleet.leaves,
        "payload_bytes": fleet.payload_bytes,
        "cells": fleet.cells,
        "claim": plan.claim,
        "complete": plan.complete,
        "assumed": list(plan.assumed),
        "missing": [{"name": item.name, "measured_by": item.command} for item in plan.missing],
        "kinds": {
            kind.kind: {
                "nodes_a_cell": kind.nodes if kind.complete else None,
                "least_nodes_a_cell": kind.nodes,
                "machine": kind.machine.name,
                "machines_a_cell": kind.machines if kind.complete else None,
                "limits": [
                    {
                        "what": limit.what,
                        "nodes": limit.nodes,
                        "detail": limit.detail,
                        "missing": [item.name for item in limit.missing],
                    }
                    for limit in kind.limits
                ],
            }
            for kind in plan.kinds
        },
        "currency": plan.prices.currency,
        "cost_per_month": plan.cost_per_month,
        "least_cost_per_month": plan.least_cost_per_month,
        "cost_per_device_year": plan.cost_per_device_year,
        "managed_per_device_year": None
        if managed is None
        else {
            "least": managed.least_per_device_year,
            "most": managed.most_per_device_year,
        },
        "warnings": list(plan.warnings),
    }


def constants_text(constants: Constants) -> str:
    """Return every figure with its source, the unmeasured ones last."""
    known = [item for item in constants.all if item.value is not None]
    unknown = [item for item in constants.all if item.value is None]
    lines = []
    for item in known:
        lines.append(f"{item.name} = {item.value:,.10g} {item.unit} ({item.kind}, {item.date})")
        lines += [
            f"    {text}" for text in (item.source, item.command, item.machine, item.note) if text
        ]
    for item in unknown:
        lines.append(f"{item.name}: NOT MEASURED YET ({item.unit})")
        lines += [f"    {text}" for text in (item.command, item.note) if text]
    return "\n".join(lines)


def _count(kind: KindPlan) -> str:
    return f"{kind.nodes:,}" if kind.complete else f"at least {kind.nodes:,}"


def _cell(kind: KindPlan, cells: int) -> str:
    number = f"{kind.nodes:,}" if cells == 1 else f"{cells} x {kind.nodes:,}"
    return number if kind.complete else f"≥ {number}"


def _limit(limit: Limit, kind: KindPlan) -> str:
    if limit.nodes is None:
        names = ", ".join(f"{item.name} ({item.command})" for item in limit.missing)
        return f"{limit.what:24} NOT MEASURED YET: {names}"
    mark = "  <- decides" if limit is kind.deciding else ""
    return f"{limit.what:24} {limit.nodes:8.2f}  {limit.detail}{mark}"


def _cost_lines(plan: Plan) -> list[str]:
    prices, each = plan.prices, plan.cost_per_device_year
    source = prices.machines_source
    origin = f"  prices: {source.what}, {source.date}; {source.source}"
    least = f"{plan.least_cost_per_month:,.0f} {prices.currency}"
    if each is None:
        return [
            f"cost: no sum. At least {least} a month: figures are missing",
            origin,
        ]
    return [
        f"cost: {least} a month, {each:.4f} {prices.currency} a device and year",
        origin,
    ]


def _managed_lines(plan: Plan, managed: ManagedCost) -> list[str]:
    prices = plan.prices
    if prices.managed is None:  # the caller looked
        return []
    source = prices.managed.source
    month = f"{managed.least:,.0f} to {managed.most:,.0f} {prices.currency} a month"
    messages = f"messages {managed.messages_least:,.0f} to {managed.messages_most:,.0f}"
    operations = f"operations on shadows {managed.shadow_operations:,.0f}"
    return [
        f"{prices.managed.name}: {month}, {_range(managed)} {prices.currency} a device and year",
        f"  connection minutes {managed.connectivity:,.0f}, {operations}, {messages}",
        f"  {prices.managed.region}; {source.date}; {source.source}",
    ]


def _range(managed: ManagedCost) -> str:
    least, most = (
        f"{managed.least_per_device_year:.3f}",
        f"{managed.most_per_device_year:.3f}",
    )
    return least if least == most else f"{least} to {most}"


def _standing(plan: Plan) -> list[str]:
    if plan.missing:
        return [
            "THIS IS NO CLAIM: not measured yet",
            *(f"  {item.name}: {item.command}" for item in plan.missing),
        ]
    if plan.assumed:
        return [f"THIS IS NO CLAIM: assumed, not measured: {', '.join(plan.assumed)}"]
    return ["Every figure in it was measured, or is a rule: `scripts/capacity constants`."]
