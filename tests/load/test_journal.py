"""What a run notes of its publishes, and which sequence numbers were seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load.endpoints import Endpoint
from load.errors import BadOption
from load.journal import Entry, Journal, read
from load.options import Options
from load.sequences import Sequences
from load.shapes import Shape

if TYPE_CHECKING:
    from pathlib import Path


def options(path: Path) -> Options:
    return Options(
        targets=(Endpoint.parse("mqtt://there"),),
        shape=Shape.steady(1, 1, 1),
        families=("lamp", "meter"),
        seed=9,
        trail=True,
        client_id="d-{number}",
        journal=path,
    )


def test_a_journal_gives_back_what_was_noted_and_what_made_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    given_options = options(path)
    with Journal(given_options) as journal:
        for sequence in range(10_000):
            journal.acknowledged(4_000_000_000, sequence, 10**15 + sequence)
        journal.unanswered(1, 2, 10**15)
    header, entries = read(path)
    found = list(entries)
    assert len(found) == 10_001
    assert found[7] == Entry(4_000_000_000, 7, 10**15 + 7, acknowledged=True)
    assert found[-1] == Entry(1, 2, 10**15, acknowledged=False)
    assert header.device(7) == "d-7"
    made, again = given_options.source(), header.source()
    assert made.document(3, 4, 10**15) == again.document(3, 4, 10**15)


def test_a_record_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(options(path)) as journal:
        journal.acknowledged(1, 2, 3)
        journal.acknowledged(1, 3, 4)
    path.write_bytes(path.read_bytes()[:-5])
    assert [one.sequence for one in read(path)[1]] == [2]


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b"no json\n", b"5\n", b'{"form": 1, "families": []}\n']
)
def test_another_file_is_no_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(BadOption, match="other is no journal"):
        read(path)


def test_a_journal_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(options(path)).close()
    path.write_bytes(path.read_bytes().replace(b'"form":1', b'"form":2,"other":true'))
    with pytest.raises(BadOption, match="form 2; this release reads form 1"):
        read(path)


def test_a_journal_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"--journal .*absent/journal"):
        Journal(options(tmp_path / "absent" / "journal"))


@given(st.lists(st.integers(0, 30)), st.lists(st.integers(0, 30)))
def test_sequences_are_a_set_of_numbers(mine: list[int], others: list[int]) -> None:
    seen, other = Sequences(), Sequences()
    for number in others:
        other.add(number)
    known: set[int] = set()
    for number in mine:
        assert seen.add(number) is (number not in known)
        known.add(number)
    assert list(seen) == sorted(known)
    assert len(seen) == len(known)
    assert [number in seen for number in range(31)] == [number in known for number in range(31)]
    assert seen.without(other) == sorted(known - set(others))


def test_sequences_in_order_take_no_space() -> None:
    seen = Sequences()
    for number in range(10_000):
        seen.add(number ^ 1)  # each pair turned around
    assert len(seen) == 10_000
    assert not seen._above
