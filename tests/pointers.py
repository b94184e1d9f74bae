"""What JSON Pointers mean, by their keys alone: for tests of what is told from their text."""

from __future__ import annotations

from shadowsvc.shadow.pointer import split

__all__ = ["is_ancestor"]


def is_ancestor(a: str, b: str) -> bool:
    """Tell whether `a` points to an object that `b` lies in; nothing is its own ancestor."""
    above, keys = split(a), split(b)
    return len(above) < len(keys) and keys[: len(above)] == above
