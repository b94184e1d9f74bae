"""Reading everything back from Cassandra, to compare it with what must be there.

Lives here: the queries, their concurrency, and how often they are asked. Rules: raw rows with their
times, read with cassandra-driver and compared by `shadowsvc.simulate.Expected`, so that no code of
the service's write path vouches for itself. Must not come in: what is expected.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from cassandra.concurrent import execute_concurrent_with_args

from shadowsvc.simulate import Difference, Expected, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["differences", "missing_dead_letters", "missing_updates", "settle"]

_CONCURRENCY = 64
_CHUNK = 2_000


def differences(session: Any, expected: Expected, devices: Iterable[str]) -> list[Difference]:
    """Read `devices` and return how they differ from what is expected of them.

    Args:
        session: of cassandra-driver, in the keyspace; rows are tuples.
        expected: what must be there.
        devices: those to look at.
    """
    select = session.prepare(
        "SELECT shadow, section, path, value, WRITETIME(value), WRITETIME(updated_at) "
        "FROM shadow WHERE device = ?"
    )
    names = list(devices)
    found: list[Difference] = []
    for start in range(0, len(names), _CHUNK):
        chunk = names[start : start + _CHUNK]
        results = execute_concurrent_with_args(
            session, select, [(name,) for name in chunk], concurrency=_CONCURRENCY
        )
        for name, (_, result) in zip(chunk, results, strict=True):
            rows, heard_us = [], None
            for shadow, section, path, value, time_us, updated_us in result:
                heard_us = updated_us
                # A partition whose leaves are all deleted still has its static column.
                if path is not None and value is not None:
                    rows.append(Row(shadow, section, path, value, time_us))
            found += expected.compare(name, rows, heard_us)
    return found


def missing_dead_letters(session: Any, expected: Expected) -> int:
    """Return how many of the expected dead letters are not there."""
    if not expected.dead_letters:
        return 0
    found = {
        bytes(digest) for (digest,) in session.execute("SELECT payload_sha256 FROM dead_letter")
    }
    return len(expected.dead_letters - found)


def settle(
    session: Any, expected: Expected, check: Callable[[], None], limit_seconds: float
) -> tuple[list[Difference], int]:
    """Compare until nothing is missing or wrong; return what stays so, and missing dead letters.

    Args:
        session: as of `differences`.
        expected: likewise; devices of which it is uncertain are left out.
        check: called in between; raises when there is nothing to wait for any more.
        limit_seconds: from the first comparison on, which is made in any case.
    """
    devices = [name for name in expected.devices if name not in expected.uncertain]
    deadline: float | None = None
    while True:
        found = differences(session, expected, devices)
        bad = missing_dead_letters(session, expected)
        deadline = time.monotonic() + limit_seconds if deadline is None else deadline
        if not (found or bad) or time.monotonic() >= deadline:
            return found, bad
        check()
        devices = sorted({difference.device for difference in found})
        time.sleep(1)


def missing_updates(found: Iterable[Difference]) -> int:
    """Return how many updates have no effect, of which there may be several leaves each."""
    updates: defaultdict[str, set[int]] = defaultdict(set)
    for difference in found:
        if difference.kind == "missing":
            updates[difference.device].add(difference.time_us)
    return sum(map(len, updates.values()))
