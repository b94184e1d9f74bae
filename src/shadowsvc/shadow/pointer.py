"""JSON Pointer (RFC 6901), the form of the column `path`.

Lives here: building pointers, taking them apart, and what lies above and below one, as text. Rules:
a path of the table is never `""` (that would be the section itself) and always begins with `/`;
nothing here looks at values. What is above and below is told from the escaped text, which is sound
because escaping never yields a `/`. Must not come in: documents, rows, times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ancestors", "below", "escape", "join", "split", "unescape"]


def escape(key: str) -> str:
    """Return `key` as a reference token: `~` as `~0`, `/` as `~1` (RFC 6901 §3)."""
    if "~" in key:
        key = key.replace("~", "~0")
    if "/" in key:
        key = key.replace("/", "~1")
    return key


def unescape(token: str) -> str:
    """Return the key that `token` stands for; `ValueError` for a `~` without 0 or 1 after it."""
    if "~" not in token:
        return token
    head, *rest = token.split("~")
    keys = [head]
    for part in rest:
        if part[:1] not in {"0", "1"}:
            raise ValueError(f"not a JSON Pointer: '~' must be followed by 0 or 1 in {token!r}")
        keys.append(("~" if part[0] == "0" else "/") + part[1:])
    return "".join(keys)


def join(keys: Iterable[str]) -> str:
    """Return the pointer to the value below `keys`; no keys at all give `""`, the whole."""
    return "".join("/" + escape(key) for key in keys)


def split(pointer: str) -> list[str]:
    """Return the keys of `pointer`, outermost first; `""` gives none.

    Raises `ValueError` when it is not a JSON Pointer (RFC 6901 §3).
    """
    if not pointer:
        return []
    if not pointer.startswith("/"):
        raise ValueError(f"not a JSON Pointer: {pointer!r} does not begin with '/'")
    return [unescape(token) for token in pointer[1:].split("/")]


def ancestors(pointer: str) -> Iterator[str]:
    """Yield the pointers above `pointer`, nearest first, without `""`."""
    end = pointer.rfind("/")
    while end > 0:
        yield pointer[:end]
        end = pointer.rfind("/", 0, end)


def below(pointer: str) -> tuple[str, str]:
    """Return the bounds `(first, end)` that hold exactly what lies below `pointer`.

    A path is below it if and only if `first <= path < end`, in the order of Cassandra's `text`
    (UTF-8 bytes, the same as the order of code points): `0` is the character after `/`.
    """
    return pointer + "/", pointer + "0"
