"""JSON Pointers: the escaping of RFC 6901 and the order that range deletes depend on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowsvc.shadow.pointer import (
    ancestors,
    below,
    escape,
    join,
    split,
    unescape,
)
from tests.pointers import is_ancestor

KEYS = st.text(st.sampled_from("ab/~01-. é😀\x00"), max_size=4)
POINTERS = st.lists(KEYS, min_size=1, max_size=4).map(join)


@pytest.mark.parametrize(
    ("pointer", "keys"),
    [
        ("", []),
        ("/foo", ["foo"]),
        ("/foo/0", ["foo", "0"]),
        ("/", [""]),
        ("//", ["", ""]),
        ("/a~1b", ["a/b"]),
        ("/m~0n", ["m~n"]),
        ("/~01", ["~1"]),
        ("/~10", ["/0"]),
        ("/ ", [" "]),
    ],
)
def test_the_examples_of_the_standard_hold_both_ways(pointer: str, keys: list[str]) -> None:
    assert split(pointer) == keys
    assert join(keys) == pointer


@pytest.mark.parametrize("pointer", ["a", "a/b", "/~", "/~2", "/a~", "/~/0", "/~~0"])
def test_what_is_no_pointer_is_refused(pointer: str) -> None:
    with pytest.raises(ValueError, match="not a JSON Pointer"):
        split(pointer)


@given(st.lists(st.text(max_size=6), max_size=6))
def test_any_keys_survive(keys: list[str]) -> None:
    assert split(join(keys)) == keys


@given(st.text())
def test_a_token_never_holds_a_slash(key: str) -> None:
    assert "/" not in escape(key)
    assert unescape(escape(key)) == key


@given(POINTERS, POINTERS)
def test_the_bounds_hold_exactly_what_lies_below(a: str, b: str) -> None:
    first, end = below(a)
    assert (first.encode() <= b.encode() < end.encode()) == is_ancestor(a, b)


@given(st.lists(KEYS, min_size=1, max_size=5))
def test_ancestors_come_nearest_first_without_the_whole(keys: list[str]) -> None:
    expected = [join(keys[:length]) for length in range(len(keys) - 1, 0, -1)]
    assert list(ancestors(join(keys))) == expected
    assert all(is_ancestor(above, join(keys)) for above in expected)
