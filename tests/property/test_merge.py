"""Order does not matter: any interleaving, repetition or split ends in the same shadow."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.shadow.update import Update
from tests.property.cassandra_model import Partition, Row

if TYPE_CHECKING:
    import random

thorough = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])

T0 = 1_700_000_000_000_000
# Few of everything, so that updates meet; "-" and "0" are the neighbours of "/" in byte order.
PATHS = st.sampled_from(["/a", "/a/b", "/a/b/c", "/a-", "/a0", "/a/", "/a~1b", "/é", "/b"])
SECTIONS = st.sampled_from(["reported", "desired"])
SHADOWS = st.sampled_from(["", "", "s"])
# "é" is larger than "z" as unsigned bytes and smaller as signed ones; a prefix is the smaller.
VALUES = st.sampled_from([b"1", b"10", b"2", b'"z"', '"é"'.encode(), b"true", b"[null]", b"-1"])
TIMES = st.integers(0, 3).map(lambda tick: T0 + tick)
UPDATES = st.builds(
    Update.of,
    st.just("d"),
    SHADOWS,
    TIMES,
    st.lists(st.tuples(SECTIONS, PATHS, VALUES), max_size=4),
    st.lists(st.tuples(SECTIONS, PATHS | st.just("")), max_size=2),
    st.just(100),
)
HISTORIES = st.lists(UPDATES, min_size=1, max_size=8)


def one_by_one(updates: list[Update]) -> Partition:
    partition = Partition()
    for update in updates:
        partition.write_update(update)
    return partition


def seen(partition: Partition) -> tuple[list[Row], tuple[int, int] | None, list[dict[str, Any]]]:
    return (
        partition.rows(),
        partition.updated_at(),
        [partition.document(shadow) for shadow in ("", "s")],
    )


def split(updates: list[Update], rng: random.Random) -> list[list[Update]]:
    """Cut a history into batches at random."""
    batches: list[list[Update]] = [[]]
    for update in updates:
        if batches[-1] and rng.random() < 0.4:
            batches.append([])
        batches[-1].append(update)
    return batches


@thorough
@given(HISTORIES)
def test_joining_updates_never_shows(updates: list[Update]) -> None:
    partition = Partition()
    partition.write_mutations(merge(updates))
    assert seen(partition) == seen(one_by_one(updates))


@thorough
@given(HISTORIES, st.randoms(use_true_random=False))
def test_any_order_repetition_and_split_ends_in_the_same_shadow(
    updates: list[Update], rng: random.Random
) -> None:
    repeated = updates + rng.choices(updates, k=rng.randrange(4))
    rng.shuffle(repeated)
    batches = split(repeated, rng)
    # A batch whose outcome is unknown is written again.
    batches += rng.choices(batches, k=rng.randrange(3))
    rng.shuffle(batches)
    partition = Partition()
    for batch in batches:
        partition.write_mutations(merge(batch))
    assert seen(partition) == seen(one_by_one(updates))


@thorough
@given(HISTORIES, st.randoms(use_true_random=False))
def test_a_merge_does_not_depend_on_the_order_of_its_arguments(
    updates: list[Update], rng: random.Random
) -> None:
    merged = merge([*updates, updates[0]])
    shuffled = updates + rng.choices(updates, k=2)
    rng.shuffle(shuffled)
    again = merge(shuffled)
    assert sorted(again.writes) == sorted(merged.writes)
    assert sorted(again.deletes) == sorted(merged.deletes)
    assert again.heard_us == merged.heard_us


@thorough
@given(HISTORIES)
def test_a_merge_of_several_writes_each_path_once_and_counts_the_rest(
    updates: list[Update],
) -> None:
    updates = [*updates, *updates]
    merged = merge(updates)
    paths = [write[2:] for write in merged.writes]
    assert len(set(paths)) == len(paths)
    assert len({delete[1:] for delete in merged.deletes}) == len(merged.deletes)
    leaves = sum(len(update.writes) for update in updates)
    assert merged.merged_away == leaves - len(merged.writes)


@thorough
@given(UPDATES)
def test_one_update_is_written_as_it_is(update: Update) -> None:
    merged = merge([update])
    assert merged.device == "d"
    assert merged.heard_us == update.time_us
    assert list(merged.writes) == [
        (update.time_us, value, update.shadow, section, path)
        for section, path, value in update.writes
    ]
    assert list(merged.deletes) == [
        (update.time_us, update.shadow, section, path) for section, path in update.deletes
    ]
    assert merged.merged_away == 0


@thorough
@given(HISTORIES)
def test_a_merge_leaves_its_updates_as_they_were(updates: list[Update]) -> None:
    before = copy.deepcopy([(update.writes, update.deletes) for update in updates])
    merge(updates)
    assert [(update.writes, update.deletes) for update in updates] == before


def update(
    time_us: int,
    writes: dict[str, bytes] | None = None,
    deletes: tuple[str, ...] = (),
    section: str = "reported",
) -> Update:
    return Update.of(
        "d",
        "",
        time_us,
        [(section, path, value) for path, value in (writes or {}).items()],
        [(section, path) for path in deletes],
        1,
    )


@pytest.mark.parametrize(
    ("updates", "rows"),
    [
        ([update(1, {"/a": b"1"}), update(2, {"/a": b"2"})], {"/a": ("2", 2)}),
        ([update(1, {"/a": b"9"}), update(1, {"/a": b"10"})], {"/a": ("9", 1)}),
        ([update(1, {"/a": b"1"}), update(1, {"/a": b"10"})], {"/a": ("10", 1)}),
        ([update(1, {"/a": b'"z"'}), update(1, {"/a": '"é"'.encode()})], {"/a": ('"é"', 1)}),
        ([update(1, {"/a": b"1"}), update(1, deletes=("/a",))], {}),
        ([update(2, {"/a": b"1"}), update(1, deletes=("/a",))], {"/a": ("1", 2)}),
        ([update(1, {"/a/b": b"1"}), update(1, deletes=("/a",))], {}),
        ([update(2, {"/a/b": b"1"}), update(1, deletes=("/a",))], {"/a/b": ("1", 2)}),
        (
            [update(1, {"/a": b"1", "/a-": b"1", "/a0": b"1"}), update(2, deletes=("/a",))],
            {"/a-": ("1", 1), "/a0": ("1", 1)},
        ),
        ([update(1, {"/a": b"1"}), update(1, deletes=("",))], {}),
        ([update(2, {"/a": b"1"}), update(1, deletes=("",))], {"/a": ("1", 2)}),
        (
            [update(1, {"/a": b"1"}), update(2, deletes=("",), section="desired")],
            {"/a": ("1", 1)},
        ),
        ([update(3, deletes=("/a",)), update(1, deletes=("/a",)), update(2, {"/a": b"1"})], {}),
        # Deleting what lies below leaves the row above, and the other way round it does not.
        ([update(1, {"/a": b"1"}), update(2, deletes=("/a/b",))], {"/a": ("1", 1)}),
    ],
)
def test_ties_and_deletes_are_decided_as_cassandra_decides_them(
    updates: list[Update], rows: dict[str, tuple[str, int]]
) -> None:
    for order in (updates, updates[::-1]):
        partition = Partition()
        partition.write_mutations(merge(order))
        assert {row.path: row[3:] for row in partition.rows()} == rows
        assert one_by_one(order).rows() == partition.rows()


def test_the_last_time_of_all_is_heard_even_when_its_leaves_were_merged_away() -> None:
    merged = merge([update(5, {"/a": b"1"}), update(5, deletes=("/a",)), update(3, {"/b": b"1"})])
    assert merged.heard_us == 5
    assert [write[-1] for write in merged.writes] == ["/b"]
    assert merged.merged_away == 1


def test_shadows_of_a_device_are_merged_side_by_side() -> None:
    named = Update.of("d", "s", 2, [("reported", "/a", b"2")], [], 1)
    merged = merge([update(1, {"/a": b"1"}), named, update(3, deletes=("",))])
    assert set(merged.writes) == {(1, b"1", "", "reported", "/a"), (2, b"2", "s", "reported", "/a")}
    assert merged.deletes == [(3, "", "reported", "")]


# ---------------------------------------------------------------- whole documents

KEYS = st.sampled_from(["a", "b", "a/", "~"])
SCALARS = st.integers(0, 3) | st.sampled_from(["x", True, 1.5]) | st.just([{"a": None}])
SETTING = st.recursive(
    st.dictionaries(KEYS, SCALARS, min_size=1, max_size=3),
    lambda inner: st.dictionaries(KEYS, SCALARS | inner, min_size=1, max_size=3),
    max_leaves=6,
)
# A device that keeps to one shape: `n` is always an object, `a` and `b` never are.
INNER = st.dictionaries(st.sampled_from(["a", "b"]), SCALARS | st.none(), min_size=1)
SHAPED = st.fixed_dictionaries(
    {}, optional={"a": SCALARS | st.none(), "b": SCALARS | st.none(), "n": INNER | st.none()}
)


def patched(target: Any, patch: Any) -> Any:
    """JSON Merge Patch (RFC 7396 §2)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = patched(result.get(key), value)
    return result


def without_empty(node: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in node.items():
        inner = without_empty(value) if isinstance(value, dict) else value
        if inner != {}:
            kept[key] = inner
    return kept


def state_of(documents: list[Any], rng: random.Random) -> dict[str, Any]:
    """Decode, shuffle, repeat, split, merge and write documents; read the state."""
    decoder = Decoder(TopicParser("things"), Limits())
    updates = [
        decoder.decode(
            "things/d/shadow/update",
            json.dumps({"state": state, "timestamp": T0 + tick}).encode(),
            (),
            T0,
        )
        for tick, state in enumerate(documents)
    ]
    updates += rng.choices(updates, k=rng.randrange(3))
    rng.shuffle(updates)
    partition = Partition()
    for batch in split(updates, rng):
        partition.write_mutations(merge(batch))
    state = partition.document("")["state"]
    assert isinstance(state, dict)
    return state


def in_time_order(documents: list[Any]) -> dict[str, Any]:
    state: Any = {}
    for document in documents:
        state = patched(state, document)
        if not isinstance(state, dict):
            state = {}
    return without_empty(state)


@thorough
@given(
    st.lists(SETTING.map(lambda content: {"reported": content}), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_what_devices_set_is_what_is_read_whatever_becomes_an_object_or_ceases_to_be_one(
    documents: list[Any], rng: random.Random
) -> None:
    assert state_of(documents, rng) == in_time_order(documents)


@thorough
@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional={"reported": SHAPED | st.none(), "desired": SHAPED | st.none()}
        )
        | st.none(),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_deletes_are_in_the_order_of_time_too(documents: list[Any], rng: random.Random) -> None:
    assert state_of(documents, rng) == in_time_order(documents)
