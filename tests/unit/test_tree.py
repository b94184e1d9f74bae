"""The tree on a terminal: what it shows, and that no device can steer the terminal."""

from __future__ import annotations

import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shadowsvc.shadow.pointer import join
from shadowsvc.shadow.view import RawRow, ShadowRows
from shadowsvc.tree import age, printable, render

NOW = 1_700_000_000.0


def draw(shadow: ShadowRows, *, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        width=60,
        force_terminal=terminal,
        color_system="truecolor" if terminal else None,
        legacy_windows=False,
    )
    render(shadow, NOW, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shadow_of(*rows: RawRow, name: str = "", shadows: tuple[str, ...] = ()) -> ShadowRows:
    heard_ms = int(NOW * 1000) - 3_000
    return ShadowRows("lamp-1", name, rows, heard_ms, heard_ms * 1000 + 7, shadows)


def ago(seconds: float) -> int:
    return int((NOW - seconds) * 1_000_000)


def test_leaves_have_values_and_ages_under_their_sections() -> None:
    text = draw(
        shadow_of(
            RawRow("desired", "/on", "true", ago(120)),
            RawRow("reported", "/light/level", "80", ago(3)),
            RawRow("reported", "/light/hue", '"warm"', ago(7200)),
            RawRow("reported", "/tags", '["a", 1]', ago(90_000)),
        )
    )
    assert text.splitlines() == [
        "lamp-1",
        "last heard from 2023-11-14 22:13:17 UTC (3 s ago)",
        "version 1699999997000007",
        "├── reported",
        "│   ├── light",
        '│   │   ├── hue: "warm"  2 h ago',
        "│   │   └── level: 80  3 s ago",
        '│   └── tags: ["a", 1]  1 d ago',
        "└── desired",
        "    └── on: true  2 min ago",
    ]


def test_hidden_rows_are_not_shown() -> None:
    text = draw(
        shadow_of(
            RawRow("reported", "/light", '"off"', ago(60)),
            RawRow("reported", "/light/level", "80", ago(3)),
        )
    )
    assert "off" not in text
    assert "level: 80" in text


def test_a_named_shadow_shows_its_name() -> None:
    assert draw(shadow_of(RawRow("reported", "/a", "1", ago(1)), name="fw")).startswith(
        "lamp-1 / fw\n"
    )


def test_without_rows_it_names_the_shadows_that_there_are() -> None:
    text = " ".join(draw(shadow_of(name="x", shadows=("fw", ""))).split())
    assert text.endswith('the shadows that have a state are: "fw", the unnamed one')
    assert "all of it was deleted" in draw(shadow_of())


def test_what_cannot_be_shown_says_why() -> None:
    text = draw(shadow_of(RawRow("reported", "/a", "{", ago(1)), RawRow("reported", "b", "1", 0)))
    assert "a: the value cannot be shown" in text
    assert "b: not a JSON Pointer" in text


def test_markup_of_a_device_is_text() -> None:
    text = draw(
        shadow_of(RawRow("reported", "/[red]k", '"[bold]v[/bold] :smile:"', ago(1))), terminal=True
    )
    assert "[red]k" in text
    assert "[bold]v[/bold] " in text
    assert ":smile:" in text


@pytest.mark.parametrize(
    "evil",
    ["\x1b[2J", "\x1b]0;title\x07", "\r", "\b", "\x9b31m", "\x7f", "\u202e", "\u2028", "\u200b"],
)
def test_control_characters_are_shown_and_not_sent(evil: str) -> None:
    shadow = ShadowRows(
        f"d{evil}",
        f"s{evil}",
        (
            RawRow(f"x{evil}", join([f"k{evil}", f"l{evil}"]), json.dumps(f"v{evil}"), ago(1)),
            RawRow("reported", f"p{evil}", "1", ago(1)),
            RawRow("reported", join([f"q{evil}"]), f"{evil}{{", ago(1)),
        ),
        0,
        0,
    )
    text = draw(shadow)
    assert not set(evil) & set(text) - set("[2J]0;title31m")
    assert "\\u" in text or "\\r" in text or "\\b" in text


@given(st.text())
def test_nothing_printable_steers_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    if all(unicodedata.category(char)[0] in "LNP" for char in text):
        assert shown == text


def test_keys_that_do_not_read_as_keys_are_quoted() -> None:
    text = draw(
        shadow_of(
            *(RawRow("reported", join([key]), "1", ago(1)) for key in ["", " a", "b: c", "d e"])
        )
    )
    assert all(line in text for line in ['"": 1', '" a": 1', '"b: c": 1', " d e: 1"])


def test_a_long_value_is_cut_and_wrapped_inside_the_tree() -> None:
    text = draw(shadow_of(RawRow("reported", "/a", json.dumps("x" * 5000), ago(1))))
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("x") == 199
    assert " ".join(text.split()).endswith("… (5002 characters) 1 s ago")


@pytest.mark.parametrize("heard_ms", [-1, 0, 2**62, -(2**62)])
def test_any_time_can_be_shown(heard_ms: int) -> None:
    shadow = ShadowRows("d", "", (RawRow("reported", "/a", "1", -(2**62)),), heard_ms, 0)
    assert "last heard from" in draw(shadow)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "now"),
        (0.9, "now"),
        (-0.9, "now"),
        (3.99, "3 s ago"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (3600, "1 h ago"),
        (172_800, "2 d ago"),
        (-125, "in 2 min"),
    ],
)
def test_ages_are_in_their_largest_unit(seconds: float, words: str) -> None:
    assert age(seconds) == words
