"""Draw a shadow on a terminal: a tree with the age of each leaf.

Lives here: layout and words for people. Rules: nothing that a device sent may steer the terminal,
so every control character is shown as an escape and nothing is markup; the time now comes from the
caller. Must not come in: the rule of what counts (`shadowsvc.shadow.view`), and I/O other than the
console's.
"""

from __future__ import annotations

import json
import unicodedata
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

from shadowsvc.shadow.update import SECTIONS
from shadowsvc.shadow.view import leaves

if TYPE_CHECKING:
    from rich.console import Console

    from shadowsvc.shadow.view import Leaf, ShadowRows

__all__ = ["age", "printable", "render"]

_US = 1_000_000
_MS = 1_000
_MAX_VALUE_CHARS = 200
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
_LATEST_SECONDS = 253_402_300_799  # the end of the year 9999, where `datetime` ends

# C0 and C1 steer a terminal (Cc); Cf, Zl and Zp reorder, join or break what it shows.
_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def render(shadow: ShadowRows, now: float, console: Console) -> None:
    """Print `shadow` to `console`; `now` in seconds since 1970, UTC."""
    console.print(_tree(shadow, now))


def age(seconds: float) -> str:
    """Return how long ago something was, in its largest unit: "3 s ago", "in 2 min", "now"."""
    size = abs(seconds)
    for unit, name in _UNITS:
        if size >= unit:
            count = f"{int(size // unit)} {name}"
            return f"{count} ago" if seconds > 0 else f"in {count}"
    return "now"


def printable(text: str) -> str:
    """Return `text` with everything that steers a terminal as a JSON escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        json.dumps(char)[1:-1].replace("\x7f", "\\u007f")
        if unicodedata.category(char) in _STEERING
        else char
        for char in text
    )


def _tree(shadow: ShadowRows, now: float) -> Tree:
    title = Text(printable(shadow.device), style="bold")
    if shadow.shadow:
        title.append(f" / {printable(shadow.shadow)}")
    heard = shadow.updated_at_ms / _MS
    title.append("\nlast heard from ", style="dim").append(_clock(heard))
    title.append(f" ({age(now - heard)})", style="cyan")
    title.append("\nversion ", style="dim").append(str(shadow.version_us))
    tree = Tree(title, guide_style="dim")
    found = leaves(shadow.rows)
    sections = sorted({leaf.section for leaf in found}, key=_place)
    for section in sections:
        branch = tree.add(Text(printable(section), style="bold"))
        _grow(branch, [leaf for leaf in found if leaf.section == section], now)
    if not found:
        tree.add(Text(_nothing(shadow), style="yellow"))
    return tree


def _grow(root: Tree, found: list[Leaf], now: float) -> None:
    branches: dict[tuple[str, ...], Tree] = {(): root}
    for leaf in found:
        if not leaf.keys:
            root.add(_line(leaf.path, leaf, now))
            continue
        parent = root
        for length in range(1, len(leaf.keys)):
            above = leaf.keys[:length]
            branch = branches.get(above)
            if branch is None:
                branch = branches[above] = parent.add(Text(_key(above[-1])))
            parent = branch
        parent.add(_line(leaf.keys[-1], leaf, now))


def _line(key: str, leaf: Leaf, now: float) -> Text:
    line = Text(_key(key)).append(": ")
    if leaf.error:
        line.append(printable(leaf.error), style="red")
    else:
        line.append(_value(leaf), style="green")
    return line.append(f"  {age(now - leaf.time_us / _US)}", style="cyan")


def _value(leaf: Leaf) -> str:
    text = printable(json.dumps(leaf.value, ensure_ascii=False))
    if len(text) > _MAX_VALUE_CHARS:
        return f"{text[:_MAX_VALUE_CHARS]}… ({len(text)} characters)"
    return text


def _key(key: str) -> str:
    """Return a key as it is, or quoted if it would not read as one."""
    text = printable(key)
    plain = text == key and key and key == key.strip() and not any(c in '":' for c in key)
    return text if plain else printable(json.dumps(key, ensure_ascii=False))


def _nothing(shadow: ShadowRows) -> str:
    others = [name for name in shadow.shadows if name != shadow.shadow]
    if not others:
        return "nothing here: all of it was deleted"
    names = ", ".join(f'"{printable(name)}"' if name else "the unnamed one" for name in others)
    return f"nothing here; the shadows that have a state are: {names}"


def _place(section: str) -> tuple[int, str]:
    return (SECTIONS.index(section) if section in SECTIONS else len(SECTIONS), section)


def _clock(seconds: float) -> str:
    if not 0 <= seconds <= _LATEST_SECONDS:
        return f"{seconds:.0f} s since 1970"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
