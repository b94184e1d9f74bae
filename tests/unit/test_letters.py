"""Dead letters at the command line: what chooses them, and that none steers a terminal."""

from __future__ import annotations

import io
import json
import re
import sys
import time
import unicodedata
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shadowsvc import cli
from shadowsvc import letters_view as view
from shadowsvc.letters_cli import _selection, _time_ms
from shadowsvc.replay import Outcome, Summary, Verdict
from shadowsvc.settings import Settings
from shadowsvc.store.letters import HOUR_MS, Entry, Selection
from tests.unit.test_deadletter import RECEIVED_MS, letter

if TYPE_CHECKING:
    from collections.abc import Callable

NOW_MS = RECEIVED_MS
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
HOSTILE = "\x1b]0;owned\x07\x9b2J\r\n\u202e\u2028\x00\t"
LETTER_ID = uuid.UUID(int=5)


def entry(**changes: Any) -> Entry:
    values: dict[str, Any] = {
        "bucket_ms": NOW_MS - NOW_MS % HOUR_MS,
        "shard": 0,
        "received_ms": NOW_MS,
        "id": LETTER_ID,
        "device": "lamp-7",
        "topic": "things/lamp-7/shadow/update",
        "reason": "not_json",
        "detail": "unexpected end",
        "payload_bytes": 3,
        "written_us": 0,
    }
    return Entry(**values | changes)


def harmless(text: str) -> bool:
    """Whether nothing is left but lines, columns and what rich itself makes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return {char for char in text if unicodedata.category(char) in STEERING} <= {"\n", "\t"}


class Terminal(io.StringIO):
    """Standard output that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(
    monkeypatch: pytest.MonkeyPatch, draw: Callable[[], None], *, terminal: bool, columns: int = 160
) -> str:
    stream = Terminal() if terminal else io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm-256color")
        draw()
    return stream.getvalue()


# ---------------------------------------------------------------- times and filters


@pytest.mark.parametrize(
    ("text", "wanted_ms"),
    [
        ("90s", NOW_MS - 90_000),
        ("15m", NOW_MS - 900_000),
        ("2h", NOW_MS - 7_200_000),
        ("1.5h", NOW_MS - 5_400_000),
        ("7d", NOW_MS - 604_800_000),
        ("1w", NOW_MS - 604_800_000),
        ("2023-11-14T22:15:23.456Z", NOW_MS),
        ("2023-11-14 22:15:23.456", NOW_MS),
        ("2023-11-15T00:15:23.456+02:00", NOW_MS),
    ],
)
def test_a_time_is_a_duration_before_now_or_iso(text: str, wanted_ms: int) -> None:
    assert _time_ms("--since", text, NOW_MS) == wanted_ms


@pytest.mark.parametrize("text", ["", "2", "2y", "-2h", "h", "yesterday", "9999-99-99", "1e3s"])
def test_another_text_is_no_time(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="ISO"):
        _time_ms("--since", text, NOW_MS)


def test_without_since_the_search_goes_as_far_as_letters_live() -> None:
    now_ms = time.time() * 1000
    chosen = _selection(Settings(), (), None, None, None, None)
    assert abs(now_ms - chosen.since_ms - 2_592_000_000) < 60_000
    assert chosen.until_ms > now_ms
    assert chosen.by_time_alone


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "--since", "yesterday"),
        ("list", "--since", "1h", "--until", "2h"),
        ("list", "--reason", "typo"),
        ("show",),
        ("show", "not-an-id"),
        ("replay", "not-an-id"),
        ("purge", "--until", "x", "--yes"),
        ("fly",),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_asked(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shadowsvc", "dead-letters", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "Usage: shadowsvc dead-letters" in capsys.readouterr().err


def test_purge_in_a_pipe_needs_yes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shadowsvc", "dead-letters", "purge"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--yes" in capsys.readouterr().err


def test_raw_bytes_are_not_written_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shadowsvc", "dead-letters", "show", str(LETTER_ID), "--raw"])
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "redirect" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["list", "show", "replay", "purge"])
def test_the_help_shows_examples_and_settings(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shadowsvc", "dead-letters", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"\n  Examples:\n    shadowsvc dead-letters {name}" in out
    assert "SHADOWSVC_CASSANDRA__CONTACT_POINTS" in out


@given(
    since=st.integers(0, 10**8), length=st.integers(1, 10**8), at=st.integers(-(10**8), 2 * 10**8)
)
def test_the_hours_hold_every_moment_of_the_time_newest_first(
    since: int, length: int, at: int
) -> None:
    chosen = Selection(since, since + length)
    hours = list(chosen.hours)
    assert hours == sorted(hours, reverse=True)
    assert len(set(hours)) == len(hours) <= length // HOUR_MS + 2
    if since <= at < since + length:
        assert at - at % HOUR_MS in hours


def test_an_id_is_searched_where_the_service_puts_it() -> None:
    for _ in range(50):
        row = letter()
        assert Selection(0, 1, ids=(row.id,)).shards == [row.shard]


def test_filters_of_one_kind_are_alternatives_and_of_several_are_all_needed() -> None:
    chosen = Selection(0, 1, reasons={"a", "b"}, devices={"x"})
    taken = [chosen.takes(entry(reason=reason, device="x")) for reason in "abc"]
    assert taken == [True, True, False]
    assert not chosen.takes(entry(reason="a", device="y"))
    assert not chosen.by_time_alone


# ---------------------------------------------------------------- what is shown


def hostile_entry() -> Entry:
    return entry(device=HOSTILE, topic=HOSTILE, reason=HOSTILE, detail=HOSTILE)


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_no_letter_in_a_list_steers_a_terminal(
    monkeypatch: pytest.MonkeyPatch, *, terminal: bool, as_json: bool, columns: int
) -> None:
    def draw() -> None:
        with view.Listing(as_json=as_json) as listing:
            for _ in range(60):
                listing.add(hostile_entry())
        counts = view.Counts()
        counts.add(hostile_entry())
        view.show_counts(counts, as_json=as_json)

    text = drawn(monkeypatch, draw, terminal=terminal, columns=columns)
    assert harmless(text)
    assert "owned" in text
    assert text.count(str(LETTER_ID)) == 60
    if as_json:
        assert json.loads(text.splitlines()[0])["detail"] == HOSTILE
    elif not terminal:
        assert len(text.splitlines()) == 60 + 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.binary(max_size=60) | st.just(HOSTILE.encode()), text=st.text(max_size=40))
def test_no_payload_and_no_text_steers_the_terminal_that_shows_it(
    monkeypatch: pytest.MonkeyPatch, payload: bytes, text: str
) -> None:
    row = letter(payload=payload, topic=text, detail=text, user_properties=[(text, text)])
    assert harmless(drawn(monkeypatch, lambda: view.show(row, as_json=False), terminal=False))
    made = drawn(monkeypatch, lambda: view.show(row, as_json=True), terminal=False)
    assert harmless(made)
    assert json.loads(made)["topic"] == row.topic


def test_show_says_that_a_payload_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    row = letter(payload=b"x" * 70_000)
    text = drawn(monkeypatch, lambda: view.show(row, as_json=False), terminal=False)
    assert "70000 bytes, of which 65536 are kept" in text
    made = drawn(monkeypatch, lambda: view.show(row, as_json=True), terminal=False)
    assert json.loads(made)["payload_truncated"] is True


def test_a_table_has_its_head_once_and_whole_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> None:
        with view.Listing(as_json=False) as listing:
            for _ in range(120):
                listing.add(entry())

    for columns in (60, 80, 120, 200):
        text = drawn(monkeypatch, draw, terminal=True, columns=columns)
        assert text.count("Received (UTC)") == 1
        assert text.count(str(LETTER_ID)) == 120
        assert text.count("2023-11-14 22:15:23") == 120


def test_times_beyond_the_calendar_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    row = letter(device_us=2**62)
    text = drawn(monkeypatch, lambda: view.show(row, as_json=False), terminal=False)
    assert "4611686018427387 ms since 1970" in text


def test_counts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = view.Counts()
    for number in range(5):
        counts.add(entry(reason="topic" if number else "not_json", received_ms=NOW_MS + number))
    made = drawn(monkeypatch, lambda: view.show_counts(counts, as_json=True), terminal=False)
    assert json.loads(made) == {
        "letters": 5,
        "reasons": {
            "topic": {
                "letters": 4,
                "first": "2023-11-14T22:15:23.457Z",
                "last": "2023-11-14T22:15:23.460Z",
            },
            "not_json": {
                "letters": 1,
                "first": "2023-11-14T22:15:23.456Z",
                "last": "2023-11-14T22:15:23.456Z",
            },
        },
    }
    assert view.counts_lines(counts)[-1] == "5\tall"


def test_the_summary_tells_what_to_do() -> None:
    summary = Summary()
    summary.outcomes[Outcome.REPLAYED] = 1200
    summary.outcomes[Outcome.TIME] = 2
    summary.kept[Outcome.TIME, "time_too_old"] = 2
    summary.outcomes[Outcome.GIVEN_UP] = 3
    summary.interrupted = True
    lines = view.summary_lines(summary, dry_run=False)
    assert lines[0] == "1,205 letters"
    assert "  1,200 replayed" in lines
    assert any("--restamp" in line and "2 time_too_old" in line for line in lines)
    assert any(line.startswith("  3 given up") for line in lines)
    assert "stopped early" in lines[-1]
    assert (
        json.loads(view.summary_json(summary, dry_run=False))["summary"]["outcomes"]["given_up"]
        == 3
    )
    assert view.summary_lines(Summary(), dry_run=False) == ["no dead letters"]


def test_a_report_names_what_is_not_done_and_steers_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw() -> None:
        told = view.Reporter(everything=False, as_json=False)
        told(entry(), Verdict(Outcome.REPLAYED, time_us=1))
        told(hostile_entry(), Verdict(Outcome.REJECTED, HOSTILE, HOSTILE))

    (line,) = drawn(monkeypatch, draw, terminal=False).splitlines()
    assert harmless(line)
    assert line.split("\t")[2] == "rejected"


def test_progress_is_for_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    with view.progress("reading") as (on_hour, tell):
        on_hour(1, 2)
        tell("x")
    assert capsys.readouterr() == ("", "")


def test_progress_never_takes_what_goes_to_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    error = Terminal()
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", error)
        monkeypatch.setenv("TERM", "xterm-256color")
        with view.progress("reading") as (on_hour, tell):
            on_hour(1, 2)
            tell("7 letters")
            typer.echo("answer")
        monkeypatch.undo()
    assert (tmp_path / "out").read_text() == "answer\n"
    assert "hours" in error.getvalue()


def test_a_table_is_whole_beside_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()

    def draw() -> None:
        with view.progress("reading") as (on_hour, _), view.Listing(as_json=False) as listing:
            for number in range(120):
                on_hour(number, 120)
                listing.add(entry())

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("COLUMNS", "160")
        patch.setenv("TERM", "xterm-256color")
        draw()
    # "\x1b[2K" erases a line: what stood there before is not seen.
    lines = [line.split("\x1b[2K")[-1] for line in terminal.getvalue().split("\n")]
    seen = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in lines]
    rows = [line for line in seen if str(LETTER_ID) in line]
    assert len(rows) == 120
    assert {row.strip() for row in rows} == {rows[0].strip()}
    assert rows[0].startswith("2023-11-14 22:15:23")
