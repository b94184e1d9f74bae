"""Join the updates of one device so that nobody can tell that they were joined.

Lives here: the in-memory last-write-wins rule, the same as Cassandra's, so that writing the
result leaves the very rows that writing every update by itself would have left. Rules: of two
writes to a path the later time wins; at one time a delete wins over a value and else the larger
value bytes (Cassandra `Cells.resolveRegular`, unsigned byte order); a delete also covers the
range below its path, which stays for Cassandra to apply. The order of the arguments never shows
in the result. Must not come in: batches, acks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowsvc.shadow.update import Mutations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shadowsvc.shadow.update import Update

__all__ = ["merge"]


def merge(updates: Sequence[Update]) -> Mutations:
    """Merge one or more updates of the same device."""
    first = updates[0]
    if len(updates) == 1:
        time_us = first.time_us
        shadow = first.shadow
        return Mutations(
            first.device,
            time_us,
            [(time_us, value, shadow, section, path) for section, path, value in first.writes],
            [(time_us, shadow, section, path) for section, path in first.deletes]
            if first.deletes
            else (),
            0,
        )
    return _merge_several(updates)


def _merge_several(updates: Sequence[Update]) -> Mutations:
    values: dict[tuple[str, str, str], tuple[int, bytes]] = {}
    deleted: dict[tuple[str, str, str], int] = {}
    heard_us = 0
    leaves = 0
    for update in updates:
        time_us = update.time_us
        shadow = update.shadow
        heard_us = max(heard_us, time_us)
        leaves += len(update.writes)
        for section, path, value in update.writes:
            key = (shadow, section, path)
            known = values.get(key)
            # A tuple compares by time first and then by the value's bytes: Cassandra's rule.
            if known is None or (time_us, value) > known:
                values[key] = (time_us, value)
        for section, path in update.deletes:
            key = (shadow, section, path)
            if time_us > deleted.get(key, -1):
                deleted[key] = time_us
    # A value that its own path's delete covers needs no write. Ranges are left to Cassandra.
    writes = [
        (time_us, value, *key)
        for key, (time_us, value) in values.items()
        if time_us > deleted.get(key, -1)
    ]
    return Mutations(
        updates[0].device,
        heard_us,
        writes,
        [(time_us, *key) for key, time_us in deleted.items()],
        leaves - len(writes),
    )
