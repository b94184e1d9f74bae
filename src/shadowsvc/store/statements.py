"""The statements that write shadows: their texts, and which of them a mutation needs. Pure.

Lives here: what both ways to Cassandra (`store.direct`, `store.cassandra`) have alike. Rules:
nothing of a device is ever part of a statement's text; every statement names its own time (`USING
TIMESTAMP ?`), so a repetition writes the same cells again; each takes its values in one order: the
time, the value if it sets a leaf, `updated_at` if it is in `HEARD`, then texts. Must not come in:
how a value is bound or sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowsvc.shadow.pointer import below

if TYPE_CHECKING:
    from shadowsvc.shadow.update import Mutations

__all__ = ["HEARD", "STATEMENTS", "statements_of"]

_WRITE = "UPDATE {keyspace}.shadow USING TIMESTAMP ? SET value = ? "
_WRITE_HEARD = "UPDATE {keyspace}.shadow USING TIMESTAMP ? SET value = ?, updated_at = ? "
_USUAL = "WHERE device = ? AND shadow = '' AND section = 'reported' AND path = ?"
_ANY = "WHERE device = ? AND shadow = ? AND section = ? AND path = ?"
_SECTION = "WHERE device = ? AND shadow = ? AND section = ?"

# ruff: noqa: S608
# Tables are named with their keyspace: the server warns of prepared statements that are not.
STATEMENTS: Final = {
    "write_usual": _WRITE + _USUAL,
    "write_usual_heard": _WRITE_HEARD + _USUAL,
    "write": _WRITE + _ANY,
    "write_heard": _WRITE_HEARD + _ANY,
    "heard": "UPDATE {keyspace}.shadow USING TIMESTAMP ? SET updated_at = ? WHERE device = ?",
    "delete_leaf": "DELETE FROM {keyspace}.shadow USING TIMESTAMP ? " + _ANY,
    "delete_below": "DELETE FROM {keyspace}.shadow USING TIMESTAMP ? "
    + _SECTION
    + " AND path >= ? AND path < ?",
    "delete_section": "DELETE FROM {keyspace}.shadow USING TIMESTAMP ? " + _SECTION,
}
"""Texts by name; `{keyspace}` is to be filled in."""

HEARD: Final = frozenset({"write_usual_heard", "write_heard", "heard"})
"""Those that set `updated_at`, to their own time."""


def statements_of(
    mutations: Mutations,
) -> list[tuple[str, int, bytes | None, tuple[str, ...]]]:
    """Return (name, time in µs, value if there is one, texts) of every statement of one device."""
    device = mutations.device
    heard_us = mutations.heard_us
    found: list[tuple[str, int, bytes | None, tuple[str, ...]]] = []
    for time_us, value, shadow, section, path in mutations.writes:
        # The static column goes with the first leaf of the latest time.
        heard = time_us == heard_us
        if heard:
            heard_us = -1
        if not shadow and section == "reported":
            name = "write_usual_heard" if heard else "write_usual"
            found.append((name, time_us, value, (device, path)))
        else:
            name = "write_heard" if heard else "write"
            found.append((name, time_us, value, (device, shadow, section, path)))
    for time_us, shadow, section, path in mutations.deletes:
        if not path:
            found.append(("delete_section", time_us, None, (device, shadow, section)))
            continue
        found.append(("delete_leaf", time_us, None, (device, shadow, section, path)))
        found.append(("delete_below", time_us, None, (device, shadow, section, *below(path))))
    if heard_us > 0:
        found.append(("heard", heard_us, None, (device,)))
    return found
