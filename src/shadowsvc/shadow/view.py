"""Read a shadow: from the raw rows of the table to the document that people see.

Lives here: the rule that decides which rows count, and the document made of those that do. Rules:
no row that Cassandra returns makes it fail, whoever wrote it; the order of the rows never shows.
Must not come in: how rows are fetched (`shadowsvc.store.reader`), how they are drawn
(`shadowsvc.tree`).

How to read the table
---------------------
A write never reads first, so both of these rows may exist, and were true at different times:

    /light        "off"       written at 10
    /light/level  80          written at 20

Whoever reads the table, in CQL or otherwise, has to decide between a row and a row below it
(`/light` is above `/light/level`, and not above `/lights`). Ask for all rows of one shadow with
their times,

    SELECT section, path, value, WRITETIME(value) FROM shadow WHERE device = ? AND shadow = ?

and then, inside each section:

1. A row is hidden if a row above it has a time that is equal or later.
2. A row is hidden if a row below it has a later time.
3. A hidden row still hides others: judge every row by all rows, not by those left over.
4. What is not hidden is the state; of it, no row is above another.

In the example `/light` is hidden and the state is `{"light": {"level": 80}}`. A leaf whose row is
gone was deleted; a delete also took every older row below it. Arrays are leaves, as a whole.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from shadowsvc.shadow.pointer import ancestors, split

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Leaf", "RawRow", "ShadowRows", "document", "leaves", "visible"]

_US = 1_000_000
_MS = 1_000


class RawRow(NamedTuple):
    """A row of one shadow as the table has it; `time_us` is `WRITETIME(value)`."""

    section: str
    path: str
    value: str
    """JSON text"""
    time_us: int


class ShadowRows(NamedTuple):
    """What the table has of one shadow of a device that was heard of."""

    device: str
    shadow: str
    """`""` is the unnamed one"""
    rows: tuple[RawRow, ...]
    """all of them, hidden ones too; none if everything was deleted, or never was"""
    updated_at_ms: int
    """last heard from, whichever shadow it was about: milliseconds since 1970, UTC"""
    version_us: int
    """the version: the time of the newest update of the device, in microseconds"""
    shadows: tuple[str, ...] = ()
    """names of the shadows that have rows; asked for only when this one has none"""


class Leaf(NamedTuple):
    """A row that counts, understood: its keys and its value, or what is wrong with it."""

    section: str
    path: str
    keys: tuple[str, ...]
    """none if `error` tells that the path is no JSON Pointer"""
    value: Any
    """decoded JSON; None if `error` is not ''"""
    time_us: int
    error: str
    """why the row cannot be shown, '' as a rule"""


def visible(rows: Iterable[RawRow]) -> list[RawRow]:
    """Return the rows of one shadow that count, sorted by section and path.

    The rule stands in the module's docstring. There is at most one row of a section and path, as
    in the table. A row whose path is `""` neither hides nor is hidden: the service writes none.
    """
    rows = sorted(rows)
    times = {(row.section, row.path): row.time_us for row in rows}
    hidden: set[tuple[str, str]] = set()
    for section, path, _, time_us in rows:
        for above in ancestors(path):
            other = times.get((section, above))
            if other is None:
                continue
            # Of the two exactly one is hidden, and either keeps its say about the others.
            hidden.add((section, path) if other >= time_us else (section, above))
    return [row for row in rows if (row.section, row.path) not in hidden]


def leaves(rows: Iterable[RawRow]) -> list[Leaf]:
    """Return the rows that count, decoded; what cannot be decoded says so in `error`."""
    return [_leaf(row) for row in visible(rows)]


def document(rows: Iterable[RawRow], *, version_us: int, updated_at_ms: int) -> dict[str, Any]:
    """Return the shadow in the form of AWS IoT's document, ready for a JSON encoder.

    `state` and `metadata` have one object for each section that has leaves; in `metadata` each leaf
    is `{"timestamp": seconds}`. `version` is in microseconds; `timestamp` is when the device was
    last heard from, in seconds (AWS: when the answer was made; here the same rows always give the
    same document). All times since 1970, UTC.

    A row whose value is not JSON becomes null in `state`, with `"error"` beside its timestamp; a
    leaf that a device sent is never null. Such rows, and those whose path is no JSON Pointer and so
    has no place in the document, are listed in `errors`, which is there only then.
    """
    state: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    errors: list[dict[str, str]] = []
    for leaf in leaves(rows):
        if leaf.error:
            errors.append({"section": leaf.section, "path": leaf.path, "error": leaf.error})
            if not leaf.keys:
                continue
        about: dict[str, Any] = {"timestamp": leaf.time_us // _US}
        if leaf.error:
            about["error"] = leaf.error
        _put(state.setdefault(leaf.section, {}), leaf.keys, leaf.value)
        _put(metadata.setdefault(leaf.section, {}), leaf.keys, about)
    made: dict[str, Any] = {
        "state": state,
        "metadata": metadata,
        "version": version_us,
        "timestamp": updated_at_ms // _MS,
    }
    if errors:
        made["errors"] = errors
    return made


def _leaf(row: RawRow) -> Leaf:
    keys: tuple[str, ...] = ()
    value = None
    error = ""
    try:
        keys = tuple(split(row.path))
        if not keys:
            error = "not a leaf: the path is empty"
        else:
            value = _decode(row.value)
    except (ValueError, RecursionError) as problem:
        error = str(problem) if not keys else f"the value cannot be shown: {_why(problem)}"
    return Leaf(row.section, row.path, keys, value, row.time_us, error)


def _decode(text: str) -> Any:
    """Decode JSON strictly; `ValueError` also for what no JSON encoder would give back."""
    value = json.loads(text, parse_float=_finite, parse_constant=_no_constant)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _why(problem: Exception) -> str:
    return "it nests too deep" if isinstance(problem, RecursionError) else str(problem)


def _put(node: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    # No visible row is above another, so every node on the way is a dict of our own.
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    node[keys[-1]] = value
