"""The reader's rule, and the document that it makes, over every shape of rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowsvc.shadow.pointer import join
from shadowsvc.shadow.view import RawRow, document, leaves, visible
from tests.pointers import is_ancestor

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

SECTIONS = st.sampled_from(["reported", "desired"])
# Few keys, so that rows meet; "-", "." and "0" are the neighbours of "/" in the order of the table.
KEYS = st.sampled_from(["", "a", "a-", "a.", "a0", "a/", "~", "~1", "/", "b"])
PATHS = st.lists(KEYS, min_size=1, max_size=4).map(join)
TIMES = st.integers(0, 3)
VALUES = st.sampled_from(["1", '"x"', "true", "[1, null]", "[]", '{"a": 1}'])
ROWS = st.lists(
    st.builds(RawRow, SECTIONS, PATHS, VALUES, TIMES),
    unique_by=lambda row: (row.section, row.path),
    max_size=12,
)

SCALARS = (
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
ARRAYS = st.lists(SCALARS | st.none() | st.dictionaries(st.text(max_size=2), SCALARS), max_size=3)
OBJECTS = st.recursive(
    st.dictionaries(st.text(max_size=3) | KEYS, SCALARS | ARRAYS, min_size=1, max_size=4),
    lambda inner: st.dictionaries(
        st.text(max_size=3) | KEYS, SCALARS | ARRAYS | inner, min_size=1, max_size=3
    ),
    max_leaves=12,
)


def by_definition(rows: list[RawRow]) -> list[RawRow]:
    """Say the rule as it is written, comparing every row with every row."""

    def hidden(row: RawRow) -> bool:
        return any(
            row.section == other.section
            and (
                (is_ancestor(other.path, row.path) and other.time_us >= row.time_us)
                or (is_ancestor(row.path, other.path) and other.time_us > row.time_us)
            )
            for other in rows
        )

    return sorted(row for row in rows if not hidden(row))


def flatten(node: dict[str, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, (*keys, key))
        else:
            yield join((*keys, key)), json.dumps(value)


def read(rows: list[RawRow]) -> dict[str, Any]:
    return document(rows, version_us=5_000_001, updated_at_ms=5_000)


@given(ROWS)
def test_the_rule_is_the_one_that_is_written_down(rows: list[RawRow]) -> None:
    assert visible(rows) == by_definition(rows)


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_never_shows(rows: list[RawRow], rng: random.Random) -> None:
    shuffled = rows.copy()
    rng.shuffle(shuffled)
    assert visible(shuffled) == visible(rows)
    assert json.dumps(read(shuffled)) == json.dumps(read(rows))


@given(ROWS)
def test_no_visible_row_is_above_another(rows: list[RawRow]) -> None:
    seen = visible(rows)
    assert not [
        (a, b) for a in seen for b in seen if a.section == b.section and is_ancestor(a.path, b.path)
    ]


@given(ROWS)
def test_the_latest_row_of_a_section_is_always_seen_unless_one_above_is_as_late(
    rows: list[RawRow],
) -> None:
    for row in rows:
        mine = [other for other in rows if other.section == row.section]
        if row.time_us == max(other.time_us for other in mine) and not any(
            is_ancestor(other.path, row.path) and other.time_us == row.time_us for other in mine
        ):
            assert row in visible(rows)


@given(ROWS)
def test_every_visible_row_is_in_the_document_once_with_its_time(rows: list[RawRow]) -> None:
    made = read(rows)
    seen = visible(rows)
    for leaf in leaves(rows):
        state: Any = made["state"][leaf.section]
        metadata: Any = made["metadata"][leaf.section]
        for key in leaf.keys:
            state = state[key]
            metadata = metadata[key]
        assert state == leaf.value
        assert metadata == {"timestamp": leaf.time_us // 1_000_000}
    counted = sum(len(list(flatten_metadata(metadata))) for metadata in made["metadata"].values())
    assert counted == len(seen)


def flatten_metadata(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(node.get("timestamp"), int):
        yield node
    else:
        for value in node.values():
            yield from flatten_metadata(value)


@given(OBJECTS, OBJECTS)
def test_a_document_written_at_one_time_is_read_back_as_it_was(
    reported: dict[str, Any], desired: dict[str, Any]
) -> None:
    rows = [RawRow("reported", path, value, 7_000_000) for path, value in flatten(reported)]
    rows += [RawRow("desired", path, value, 7_000_000) for path, value in flatten(desired)]
    made = read(rows)
    assert made["state"] == {"reported": reported, "desired": desired}
    assert "errors" not in made
    # No key twice: what an encoder writes, a strict decoder reads.
    text = json.dumps(made)
    assert json.loads(text, object_pairs_hook=once) == made


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("key", ["", "/", "~", "a/b", "a~b", "~0", "~1", "//", " ", "é", "😀"])
def test_any_key_survives(key: str) -> None:
    row = RawRow("reported", join([key, key]), "1", 1)
    assert read([row])["state"] == {"reported": {key: {key: 1}}}


def test_an_array_is_a_leaf() -> None:
    row = RawRow("reported", "/a", '[{"b": null}, [1]]', 3_000_000)
    made = read([row])
    assert made["state"] == {"reported": {"a": [{"b": None}, [1]]}}
    assert made["metadata"] == {"reported": {"a": {"timestamp": 3}}}


def test_a_hidden_row_still_hides() -> None:
    # /a is hidden by /a/b/c, and hides /a/b although it is not seen itself.
    rows = [
        RawRow("reported", "/a", "1", 2),
        RawRow("reported", "/a/b", "2", 1),
        RawRow("reported", "/a/b/c", "3", 3),
        RawRow("reported", "/a/d", "4", 2),
    ]
    assert [row.path for row in visible(rows)] == ["/a/b/c"]


def test_sections_do_not_hide_each_other() -> None:
    rows = [RawRow("reported", "/a", "1", 2), RawRow("desired", "/a/b", "2", 1)]
    assert len(visible(rows)) == 2


def test_version_and_time_are_those_of_the_static_column() -> None:
    made = document([], version_us=1_700_000_000_123_456, updated_at_ms=1_700_000_000_123)
    assert made == {
        "state": {},
        "metadata": {},
        "version": 1_700_000_000_123_456,
        "timestamp": 1_700_000_000,
    }


@pytest.mark.parametrize(
    "value",
    [
        "", "{", "nul", "NaN", "[Infinity]", "1e999", "01", '"\\ud800"', '"\t"', "[" * 200_000,
        "1 2", "9" * 5000,
    ],
    ids=lambda value: value[:8],
)  # fmt: skip
def test_a_value_that_is_not_json_is_marked_and_its_neighbours_are_shown(value: str) -> None:
    made = read([RawRow("reported", "/a", value, 1), RawRow("reported", "/b", "2", 1)])
    assert made["state"] == {"reported": {"a": None, "b": 2}}
    assert made["metadata"]["reported"]["a"].keys() == {"timestamp", "error"}
    assert [error["path"] for error in made["errors"]] == ["/a"]
    json.dumps(made, ensure_ascii=False).encode()


@pytest.mark.parametrize("path", ["", "a", "/a~", "/a~2/b", "a/b"])
def test_a_path_that_is_no_pointer_is_listed_and_its_neighbours_are_shown(path: str) -> None:
    made = read([RawRow("reported", path, "1", 9), RawRow("reported", "/b", "2", 1)])
    assert made["state"] == {"reported": {"b": 2}}
    assert [error["path"] for error in made["errors"]] == [path]


@given(
    st.lists(
        st.builds(RawRow, st.text(max_size=2), st.text("/~01ab", max_size=6), st.text(), TIMES),
        unique_by=lambda row: (row.section, row.path),
        max_size=8,
    )
)
def test_no_rows_at_all_make_it_fail(rows: list[RawRow]) -> None:
    made = read(rows)
    assert set(made) <= {"state", "metadata", "version", "timestamp", "errors"}
    json.dumps(made)
