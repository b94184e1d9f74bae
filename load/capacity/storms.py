"""`scripts/capacity storm`: which storms are compared, their table and their plot.

Lives here: scenarios, options, table, JSON, plot. Rules: a row is printed when its storm is over;
what the plot shows is in the table. Must not come in: how a storm goes (`load.storm`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from load.backoff import BACKOFFS
from load.capacity.report import SCALING
from load.errors import BadOption
from load.stage.paper import into_document
from load.storm import Decorrelated, Jittered, Outcome, Storm, simulate

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from load.storm import Policy

__all__ = ["Scenario", "add_options", "run", "scenarios"]

_SHOWN_MINUTES: Final = 20
_HEAD: Final = (
    "| in front | policy | ceiling s | half back s | 99 % s | all s | attempts a device "
    "| in vain | peak attempts/s a node |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table."""

    front: str
    storm: Storm
    policy: Policy
    ceiling_seconds: float
    """Of the waits."""


def _policies(ceiling_seconds: float) -> Iterator[tuple[Policy, float]]:
    yield Jittered(BACKOFFS["none"]), 0.0
    fixed = BACKOFFS["fixed"]
    yield Jittered(fixed), fixed.least_seconds
    for name in ("exponential", "equal-jitter", "full-jitter"):
        policy = dataclasses.replace(BACKOFFS[name], most_seconds=ceiling_seconds)
        yield Jittered(policy), ceiling_seconds
    yield Decorrelated(most_seconds=ceiling_seconds), ceiling_seconds
    yield _spread(ceiling_seconds), ceiling_seconds


def _spread(ceiling_seconds: float) -> Policy:
    """Full jitter that draws its first wait, too, from all the time there is."""
    full = BACKOFFS["full-jitter"]
    wide = dataclasses.replace(full, least_seconds=ceiling_seconds, most_seconds=ceiling_seconds)
    return Jittered(wide, "full jitter, wide from the first")


def scenarios(
    base: Storm,
    *,
    capacity: float,
    limit: float,
    places: int,
    long_places: int,
    ceiling: float,
) -> Iterator[Scenario]:
    """Yield what the table compares: policies, limits in front, lengths of the line, ceilings.

    Args:
        base: devices, nodes, time-out, seed.
        capacity: connects a second that a node takes when nothing limits them.
        limit: connects a second that HAProxy lets through to a node.
        places: of HAProxy's line in the kernel.
        long_places: of one that is longer than the devices' patience.
        ceiling: of the waits, seconds.
    """
    bare = dataclasses.replace(base, connects_per_second=capacity, places=math.inf)
    limited = dataclasses.replace(base, connects_per_second=limit, places=float(places))
    longer = dataclasses.replace(limited, places=float(long_places))
    for front, storm in (("none", bare), (f"limit, line of {places:,}", limited)):
        for policy, most in _policies(ceiling):
            yield Scenario(front, storm, policy, most)
    full = dataclasses.replace(BACKOFFS["full-jitter"], most_seconds=ceiling)
    yield Scenario(f"limit, line of {long_places:,}", longer, Jittered(full), ceiling)
    yield Scenario(f"limit, line of {long_places:,}", longer, _spread(ceiling), ceiling)
    for most in (60.0, 1200.0):
        if most != ceiling:
            other = Jittered(dataclasses.replace(full, most_seconds=most))
            for front, storm in (
                ("none", bare),
                (f"limit, line of {places:,}", limited),
            ):
                yield Scenario(front, storm, other, most)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `scripts/capacity storm`."""
    parser.add_argument("--devices", type=int, default=5_000_000)
    parser.add_argument("--nodes", type=int, default=20, help="brokers, and ingress nodes")
    parser.add_argument(
        "--capacity",
        type=float,
        default=1250.0,
        help="connects/s that a broker node takes; assumed until scripts/scale has measured it",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=1000.0,
        help="connects/s that HAProxy lets through to a node "
        "(SHADOWSVC_INGRESS__MAX_CONNECTION_RATE)",
    )
    parser.add_argument(
        "--places",
        type=int,
        default=4096,
        help="of HAProxy's line (net.core.somaxconn)",
    )
    parser.add_argument(
        "--long-places", type=int, default=65_535, help="of a line that is too long"
    )
    parser.add_argument("--ceiling-seconds", type=float, default=300.0, help="of the waits")
    parser.add_argument("--timeout-seconds", type=float, default=10.0, help="of an attempt")
    parser.add_argument(
        "--notice-seconds",
        type=float,
        default=0.0,
        help="within which the loss is noticed",
    )
    parser.add_argument("--horizon-seconds", type=float, default=3600.0, help="the end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw the plot there (.svg or .png)")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="bring table and plot into docs/scaling.md, too",
    )


def run(options: argparse.Namespace) -> int:
    """Simulate, print the table row by row, and write what was asked for."""
    base = Storm(
        devices=options.devices,
        nodes=options.nodes,
        timeout_seconds=options.timeout_seconds,
        notice_seconds=options.notice_seconds,
        horizon_seconds=options.horizon_seconds,
        seed=options.seed,
    )
    for name in ("capacity", "limit", "places", "long_places", "ceiling_seconds"):
        if not getattr(options, name) > 0:
            raise BadOption(f"--{name.replace('_', '-')}: has to be above 0")
    print(
        f"{base.devices:,} devices lose their connections; {base.nodes} nodes, each takes "
        f"{options.capacity:,.0f} connects/s (assumed), {options.limit:,.0f} with a limit; "
        f"attempts end after {base.timeout_seconds:g} s, waits are {options.ceiling_seconds:g} s "
        f"at most; seed {base.seed}\n"
    )
    print(_HEAD)
    found: list[tuple[Scenario, Outcome]] = []
    for scenario in scenarios(
        base,
        capacity=options.capacity,
        limit=options.limit,
        places=options.places,
        long_places=options.long_places,
        ceiling=options.ceiling_seconds,
    ):
        outcome = simulate(scenario.storm, scenario.policy)
        found.append((scenario, outcome))
        print(_row(scenario, outcome), flush=True)
    if options.json:
        options.json.write_text(json.dumps([_figures(*each) for each in found], indent=2) + "\n")
    if options.plot:
        _draw(options.plot, found, options.ceiling_seconds)
    if options.docs:
        _draw(SCALING.with_name("storm.svg"), found, options.ceiling_seconds)
        into_document(SCALING, "storm", "\n".join([_HEAD, *(_row(*each) for each in found)]))
    return 0


def _row(scenario: Scenario, outcome: Outcome) -> str:
    seconds = [outcome.seconds_until(share) for share in (0.5, 0.99, 1.0)]
    shown = " | ".join("never" if each is None else f"{each:,.0f}" for each in seconds)
    return (
        f"| {scenario.front} | {outcome.policy} | {scenario.ceiling_seconds:,.0f} | {shown} "
        f"| {outcome.attempts_per_device:.1f} | {outcome.wasted_share:.0%} "
        f"| {outcome.peak_per_node:,.0f} |"
    )


def _figures(scenario: Scenario, outcome: Outcome) -> dict[str, Any]:
    storm = scenario.storm
    return {
        "front": scenario.front,
        "policy": outcome.policy,
        "ceiling_seconds": scenario.ceiling_seconds,
        "devices": storm.devices,
        "nodes": storm.nodes,
        "connects_per_second_a_node": storm.connects_per_second,
        "places": None if storm.places == math.inf else int(storm.places),
        "timeout_seconds": storm.timeout_seconds,
        "seed": storm.seed,
        "connected_share_at_the_end": outcome.connected,
        "seconds_until": {
            str(share): outcome.seconds_until(share) for share in (0.5, 0.9, 0.99, 1.0)
        },
        "attempts_per_device": outcome.attempts_per_device,
        "wasted_share": outcome.wasted_share,
        "peak_attempts_per_second_a_node": outcome.peak_per_node,
    }


def _draw(path: Path, found: list[tuple[Scenario, Outcome]], ceiling_seconds: float) -> None:
    """Draw the share that is connected over time, without and with a limit in front."""
    import matplotlib as mpl  # noqa: PLC0415  # only for who wants a plot

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "storm"  # the same figures make the same file
    from matplotlib import pyplot as plt  # noqa: PLC0415

    fronts = [
        found[0][0].front,
        next(s.front for s, _ in found if s.front != found[0][0].front),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    styles = [
        "#7f7f7f",
        "#a6761d",
        "#d95f02",
        "#7570b3",
        "#1b9e77",
        "#1f78b4",
        "#000000",
    ]
    for axis, front in zip(axes, fronts, strict=True):
        chosen = [
            outcome
            for scenario, outcome in found
            if scenario.front == front and scenario.ceiling_seconds in _plotted(ceiling_seconds)
        ]
        for outcome, colour in zip(chosen, styles, strict=True):
            minutes = np.arange(1, len(outcome.connected_each_second) + 1) / 60
            axis.plot(
                minutes,
                outcome.connected_each_second * 100,
                color=colour,
                label=outcome.policy,
                linewidth=1.6,
            )
        axis.set_title(
            "nothing in front of the brokers" if front == "none" else f"HAProxy: {front}",
            fontsize=10,
        )
        axis.set_xlabel("minutes since all connections were lost")
        axis.grid(visible=True, alpha=0.3)
        axis.set_xlim(0, _SHOWN_MINUTES)
    axes[0].set_ylabel("devices connected, %")
    axes[1].legend(fontsize=8, loc="center right")
    figure.savefig(path, metadata=None if path.suffix != ".svg" else {"Date": None})
    plt.close(figure)


def _plotted(ceiling_seconds: float) -> tuple[float, ...]:
    return (0.0, BACKOFFS["fixed"].least_seconds, ceiling_seconds)
