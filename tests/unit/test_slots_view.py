"""What people see of slots."""

from __future__ import annotations

import io
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from shadowsvc.slots_view import as_json, as_lines, as_table
from shadowsvc.store.slots import Slot

NOW = datetime(2026, 11, 23, 6, 0, tzinfo=UTC)


def held(ago: timedelta, owner: str = "pod-a:7", number: int = 0) -> Slot:
    return Slot(f"g-{number}", number, owner, uuid.uuid4(), NOW - ago)


FREE = Slot("g-1", 1, None, None, None)


@pytest.mark.parametrize(
    ("ago", "shown"),
    [
        (timedelta(seconds=0), "0s"),
        (timedelta(seconds=59), "59s"),
        (timedelta(minutes=1), "1m 0s"),
        (timedelta(hours=2, minutes=5, seconds=9), "2h 5m"),
        (timedelta(days=3, seconds=5), "3d 0h"),
        (timedelta(seconds=-5), "0s"),
    ],
)
def test_an_age_has_its_two_largest_units_and_is_never_negative(ago: timedelta, shown: str) -> None:
    assert as_lines([held(ago)], NOW)[1].split("\t")[3] == shown


def test_lines_have_a_head_and_a_dash_for_nothing() -> None:
    assert as_lines([held(timedelta(seconds=5)), FREE], NOW) == [
        "SLOT\tSTATE\tOWNER\tFOR",
        "g-0\theld\tpod-a:7\t5s",
        "g-1\tfree\t-\t-",
    ]


def test_json_says_it_all_but_the_token() -> None:
    made = as_json([held(timedelta(seconds=5)), FREE], NOW, group="g", broker="b", max_slots=4)
    assert made == {
        "share_group": "g",
        "broker": "b",
        "max_slots": 4,
        "slots": [
            {
                "name": "g-0",
                "state": "held",
                "owner": "pod-a:7",
                "since": "2026-11-23T05:59:55+00:00",
                "age_seconds": 5,
            },
            {"name": "g-1", "state": "free", "owner": None, "since": None, "age_seconds": None},
        ],
    }


def test_an_owner_steers_no_terminal_and_no_column() -> None:
    evil = held(timedelta(seconds=5), owner="\x1b[31mred\tcell\n")
    [_, line] = as_lines([evil], NOW)
    assert line.count("\t") == 3
    assert line.isprintable() or line.replace("\t", "").isprintable()
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(as_table([evil, FREE], NOW))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "g-1" in shown
