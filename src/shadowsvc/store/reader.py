"""Read one device's shadow for people: what `shadowsvc get` shows.

Lives here: the two queries and nothing of their meaning. Rules: at LOCAL_QUORUM, so that what was
acknowledged at LOCAL_QUORUM or above is seen; a large shadow comes in pages, which are not one
moment. Must not come in: the rule of what is hidden (`shadowsvc.shadow.view`), and the hot path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shadowsvc.shadow.view import RawRow, ShadowRows
from shadowsvc.store import driver

if TYPE_CHECKING:
    from shadowsvc.settings import Settings

__all__ = ["ShadowRows", "read_shadow"]

_US_PER_MS = 1_000

# As numbers, since a timestamp written by hand may lie beyond what a Python datetime holds.
_HEARD = "toUnixTimestamp(updated_at), WRITETIME(updated_at)"
_SELECT_ROWS = (
    f"SELECT section, path, value, WRITETIME(value), {_HEARD} FROM shadow "  # noqa: S608
    "WHERE device = %s AND shadow = %s"
)
# The static row comes even when there is no other one, unlike in the query above.
_SELECT_SHADOWS = f"SELECT shadow, {_HEARD} FROM shadow WHERE device = %s GROUP BY device, shadow"  # noqa: S608


def read_shadow(settings: Settings, device: str, shadow: str = "") -> ShadowRows | None:
    """Return the rows of a shadow (`""` is the unnamed one), or None if nothing is known.

    None means that no update of the device, by whatever shadow, was ever durable. For a device
    that is known without this shadow there are no rows, and `shadows` names those that it has.
    Blocks. Raises `StoreUnavailable`, and `SchemaBehind` if there is no such table.
    """
    cassandra = settings.cassandra
    with driver.connected(cassandra, keyspace=cassandra.keyspace) as connection:
        return select_shadow(connection.session, device, shadow)


def select_shadow(session: Any, device: str, shadow: str) -> ShadowRows | None:
    """Do as `read_shadow` does, in a cassandra-driver session that has the keyspace."""
    rows: list[RawRow] = []
    heard_ms: int | None = None
    heard_us: int | None = None
    for section, path, value, time_us, heard_ms, heard_us in session.execute(  # noqa: B007
        _SELECT_ROWS, (device, shadow)
    ):
        # A row without a value has a row marker, so somebody made it by INSERT: a deleted leaf.
        if value is not None:
            rows.append(RawRow(section, path, value, time_us))
    shadows: list[str] = []
    if not rows:
        found = list(session.execute(_SELECT_SHADOWS, (device,)))
        if not found:
            return None
        shadows = [name for name, _, _ in found if name is not None]
        _, heard_ms, heard_us = found[0]
    # Rows written by hand may lack the static column.
    version_us = heard_us if heard_us is not None else max((row.time_us for row in rows), default=0)
    updated_at_ms = heard_ms if heard_ms is not None else version_us // _US_PER_MS
    return ShadowRows(device, shadow, tuple(rows), updated_at_ms, version_us, tuple(shadows))
