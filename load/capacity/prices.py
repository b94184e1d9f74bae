"""Machines and prices of the capacity model, and where each was read.

Lives here: reading `prices.toml`. Rules: money has the file's one currency; a price without source
and date is refused. Must not come in: how many machines there are.
"""

from __future__ import annotations

import datetime as dt
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from load.capacity.plan import KINDS
from load.errors import BadOption

__all__ = ["PRICES_FILE", "Machine", "Managed", "Prices", "Source", "read_prices"]

PRICES_FILE: Final = Path(__file__).with_name("prices.toml")


@dataclass(frozen=True, slots=True)
class Source:
    """Where and when something was read."""

    what: str
    source: str
    date: dt.date


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as it is rented; `share` of a kind's processes (or pods) live on one."""

    name: str
    cores: int
    memory_bytes: int
    price_per_hour: float
    share: int
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Managed:
    """What a managed shadow service asks; see `prices.toml`."""

    name: str
    region: str
    per_million_connection_minutes: float
    per_million_messages: float
    messages_at_that_price: float
    per_million_shadow_operations: float
    message_bytes: int
    shadow_operation_bytes: int
    source: Source
    per_million_messages_beyond: float | None = None


@dataclass(frozen=True, slots=True)
class Prices:
    """All of the file."""

    currency: str
    hours_per_month: float
    machines: dict[str, Machine]
    machines_source: Source
    more_per_month: float
    more_what: str
    managed: Managed | None


def read_prices(path: Path = PRICES_FILE) -> Prices:
    """Read machines and prices.

    Raises:
        BadOption: the file cannot be read, lacks something, or a price has no source and date.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadOption(f"--prices {path}: {error}") from error
    try:
        return _prices(tables)
    except KeyError as error:
        raise BadOption(f"--prices {path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise BadOption(f"--prices {path}: {error}") from error


def _prices(tables: dict[str, Any]) -> Prices:
    machines = {kind: Machine(**tables["machines"][kind]) for kind in KINDS}
    for kind, machine in machines.items():
        if min(machine.cores, machine.memory_bytes, machine.share) < 1:
            raise ValueError(f"machines.{kind}: cores, memory_bytes and share are 1 or more")
        if machine.price_per_hour < 0 or machine.disk_bytes < 0:
            raise ValueError(f"machines.{kind}: nothing in it is below 0")
    if not tables["hours_per_month"] > 0:
        raise ValueError("hours_per_month has to be above 0")
    managed = None
    if "managed" in tables:
        managed = Managed(**tables["managed"], source=_source(tables, "managed_source"))
    return Prices(
        currency=tables["currency"],
        hours_per_month=float(tables["hours_per_month"]),
        machines=machines,
        machines_source=_source(tables, "machines_source"),
        more_per_month=float(tables["more"]["per_month"]),
        more_what=tables["more"]["what"],
        managed=managed,
    )


def _source(tables: dict[str, Any], name: str) -> Source:
    source = Source(**tables[name])
    if not source.source or not isinstance(source.date, dt.date):
        raise ValueError(f"{name}: a price needs the source and the date when it was read")
    return source
