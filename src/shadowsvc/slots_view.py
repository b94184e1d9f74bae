"""What people see of slots: a table on a terminal, lines in a pipe, JSON.

Lives here: rows, ages and words. Rules: an owner is text that somebody wrote, so it is cleaned
before it meets a terminal; times are shown as ages. Must not come in: reading them
(`shadowsvc.store.slots`), what a slot is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shadowsvc.tree import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from rich.table import Table

    from shadowsvc.store.slots import Slot

__all__ = ["as_json", "as_lines", "as_table", "state_of"]

_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
_COLUMNS = ("SLOT", "STATE", "OWNER", "FOR")


def state_of(slot: Slot) -> str:
    """Return `held` or `free`."""
    return "free" if slot.token is None else "held"


def as_json(
    slots: Sequence[Slot], now: datetime, *, group: str, broker: str, max_slots: int
) -> dict[str, Any]:
    """Return everything, for `--json`; `age_seconds` is how long the owner has it."""
    return {
        "share_group": group,
        "broker": broker,
        "max_slots": max_slots,
        "slots": [
            {
                "name": slot.name,
                "state": state_of(slot),
                "owner": slot.owner,
                "since": None if slot.since is None else slot.since.isoformat(),
                "age_seconds": _age_seconds(slot, now),
            }
            for slot in slots
        ],
    }


def as_lines(slots: Sequence[Slot], now: datetime) -> list[str]:
    """Return lines with a tab between the cells, a head first, `-` for nothing."""
    return ["\t".join(_COLUMNS), *("\t".join(cells) for cells in _rows(slots, now))]


def as_table(slots: Sequence[Slot], now: datetime) -> Table:
    """Return the same for a terminal."""
    from rich.table import Table  # noqa: PLC0415 - on demand
    from rich.text import Text  # noqa: PLC0415 - on demand

    table = Table(*(column.capitalize() for column in _COLUMNS), box=None)
    for cells in _rows(slots, now):
        style = "bold" if cells[1] == "held" else "dim"
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def _rows(slots: Sequence[Slot], now: datetime) -> list[tuple[str, str, str, str]]:
    rows = []
    for slot in slots:
        age = _age_seconds(slot, now)
        owner = "-" if not slot.owner else printable(slot.owner)
        rows.append((slot.name, state_of(slot), owner, "-" if age is None else _short(age)))
    return rows


def _age_seconds(slot: Slot, now: datetime) -> int | None:
    if slot.token is None or slot.since is None:
        return None
    return max(0, int((now - slot.since).total_seconds()))  # the owner's clock may be ahead


def _short(seconds: int) -> str:
    """Return an age in its two largest units."""
    parts: list[str] = []
    for unit, size in _UNITS:
        count, seconds = divmod(seconds, size)
        if count or parts or unit == "s":
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
