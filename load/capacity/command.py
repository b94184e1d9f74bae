"""`scripts/capacity`: plans, the list of figures, the storm, and the measurement of storage.

Lives here: options, and which of the parts is run. Rules: the exit code is 0 when there is a sum, 1
when a figure that it needs has not been measured, 2 for options that make no sense. Must not come
in: figures, sizing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from load.capacity import measured, storage, storms
from load.capacity.constants import CONSTANTS_FILE, read_constants
from load.capacity.managed import managed_cost
from load.capacity.model import plan
from load.capacity.plan import Fleet, Plan, Rules
from load.capacity.prices import PRICES_FILE, read_prices
from load.capacity.report import (
    SCALING,
    constants_text,
    plan_json,
    plan_markdown,
    plan_text,
)
from load.errors import BadOption, LoadError
from load.stage.paper import into_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from load.capacity.managed import ManagedCost

__all__ = ["main"]

_COMMANDS: Final = ("plan", "constants", "take", "storm", "measure-storage")
_STEPS: Final = (
    # devices, updates/s, cells: the rate of the headline run grows with the devices
    (100_000, 195.58, 1),
    (1_000_000, 1_955.8, 1),
    (5_000_000, 9_779.0, 1),
    (20_000_000, 39_116.0, 4),
    (100_000_000, 195_580.0, 20),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not given or (given[0] not in _COMMANDS and given[0] not in {"-h", "--help"}):
        given.insert(0, "plan")
    options = parser.parse_args(given)
    try:
        return _run(options)
    except LoadError as error:
        print(f"capacity: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.command == "storm":
        return storms.run(options)
    if options.command == "measure-storage":
        return storage.run(options)
    if options.command == "take":
        return measured.run(options)
    constants = read_constants(options.constants)
    if options.command == "constants":
        print(constants_text(constants))
        return 0
    constants = constants.assuming(_assumed(options.assume))
    prices = read_prices(options.prices)
    rules = _rules(options)
    if options.steps:
        plans = [
            plan(_fleet(options, devices, rate, cells), constants, prices, rules)
            for devices, rate, cells in _STEPS
        ]
    else:
        plans = [plan(_fleet(options), constants, prices, rules)]
    pairs = [(each, managed_cost(each.fleet, prices)) for each in plans]
    _print(options.format, pairs)
    if options.docs:
        if not options.steps:
            raise BadOption("--docs: it needs --steps, whose table docs/scaling.md has")
        if any(each.assumed for each in plans):
            raise BadOption("--docs: assumed figures do not come into a document")
        into_document(SCALING, "steps", plan_markdown(pairs))
    return 0 if all(each.complete for each in plans) else 1


def _print(form: str, pairs: list[tuple[Plan, ManagedCost | None]]) -> None:
    if form == "json":
        found = [plan_json(each, managed) for each, managed in pairs]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    elif form == "markdown":
        print(plan_markdown(pairs))
    else:
        print("\n\n".join(plan_text(each, managed) for each, managed in pairs))


def _fleet(
    options: argparse.Namespace,
    devices: int | None = None,
    rate: float | None = None,
    cells: int | None = None,
) -> Fleet:
    return Fleet(
        devices=devices or options.devices,
        updates_per_second=options.updates_per_second if rate is None else rate,
        connected_share=options.connected_share,
        leaves=options.leaves,
        leaves_per_device=options.leaves_per_device,
        payload_bytes=options.payload_bytes,
        bad_share=options.bad_share,
        retention_days=options.retention_days,
        cells=cells or options.cells,
    )


def _rules(options: argparse.Namespace) -> Rules:
    usual = Rules()
    known = dataclasses.asdict(usual)
    changed: dict[str, Any] = {}
    for text in options.rule:
        name, value = _pair("--rule", text)
        if name not in known:
            raise BadOption(f"--rule {name}: there is {', '.join(known)}")
        if not value > 0:
            raise BadOption(f"--rule {text}: has to be above 0")
        changed[name] = round(value) if isinstance(known[name], int) else value
    return dataclasses.replace(usual, **changed)


def _assumed(texts: Sequence[str]) -> dict[str, float]:
    return dict(_pair("--assume", text) for text in texts)


def _pair(option: str, text: str) -> tuple[str, float]:
    name, sign, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise BadOption(f"{option} {text}: has to be NAME=NUMBER") from (error if sign else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/capacity",
        description="How many nodes a fleet needs, and what it costs.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser(
        "plan",
        help="nodes and cost (what runs without a command)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    planning.add_argument("--devices", type=int, default=5_000_000, help="that have a shadow")
    planning.add_argument("--connected-share", type=float, default=1.0, help="0 to 1")
    planning.add_argument("--updates-per-second", type=float, default=9779.0, help="of all devices")
    planning.add_argument("--leaves", type=int, default=4, help="of an update")
    planning.add_argument(
        "--leaves-per-device",
        type=int,
        default=0,
        help="of a shadow; 0: those of an update",
    )
    planning.add_argument("--payload-bytes", type=int, default=110, help="of an update")
    planning.add_argument("--bad-share", type=float, default=0.0, help="that become dead letters")
    planning.add_argument("--retention-days", type=float, default=30.0, help="of dead letters")
    planning.add_argument("--cells", type=int, default=1, help="systems side by side")
    planning.add_argument("--steps", action="store_true", help="a plan for 0.1 to 100 million")
    planning.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="another rule of sizing: " + ", ".join(f.name for f in dataclasses.fields(Rules)),
    )
    planning.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="take a figure as if it were measured; the result is no claim",
    )
    planning.add_argument(
        "--docs",
        action="store_true",
        help="with --steps: bring the table into docs/scaling.md, too",
    )
    planning.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    listing = commands.add_parser("constants", help="every figure, its source, and what is missing")
    for each in (planning, listing):
        each.add_argument("--constants", type=Path, default=CONSTANTS_FILE)
    planning.add_argument("--prices", type=Path, default=PRICES_FILE)
    measured.add_options(
        commands.add_parser(
            "take",
            help="take the figures of a run of scripts/scale or scripts/growth",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    storms.add_options(
        commands.add_parser(
            "storm",
            help="simulate that all devices come back at once",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    storage.add_options(
        commands.add_parser(
            "measure-storage",
            help="bytes of a leaf on Cassandra's disk",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    return parser
