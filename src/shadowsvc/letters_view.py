"""How dead letters look: tables, plain lines, JSON, progress.

Lives here: layout and words. Rules: nothing of a message steers a terminal or breaks a line, so
every text goes through `printable` (control characters, escapes, bidirectional marks) or through
JSON in ASCII; on a terminal a table that is printed as it comes, elsewhere one line a letter with
tabs between; progress goes to standard error and only to a terminal. Must not come in: reading,
judging, arguments.
"""

from __future__ import annotations

import base64
import json
import sys
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from shadowsvc.replay import DONE, Outcome
from shadowsvc.tree import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shadowsvc.replay import Summary, Verdict
    from shadowsvc.store.deadletter import DeadLetter
    from shadowsvc.store.letters import Entry

__all__ = [
    "Counts",
    "Listing",
    "Reporter",
    "counts_lines",
    "progress",
    "restore_terminal",
    "show",
    "show_counts",
    "summary_json",
    "summary_lines",
]

_MS = 1_000
_LATEST_MS = 253_402_300_799_999  # the end of the year 9999, where `datetime` ends
_CHUNK_ROWS = 50
_WIDE_COLUMNS = 130
_CLOCK_WIDTH, _REASON_WIDTH, _DEVICE_WIDTH, _ID_WIDTH = 19, 17, 24, 36
_WORDS = {
    Outcome.REPLAYED: "replayed",
    Outcome.EMPTY: "changed nothing: there is nothing to write",
    Outcome.REJECTED: "still rejected",
    Outcome.TIME: "skipped: the time is impossible, --restamp writes them with the time now",
    Outcome.TRUNCATED: "skipped: the row holds a part of the message only",
    Outcome.DAMAGED: "skipped: the row is not what the service wrote",
    Outcome.GONE: "gone meanwhile: expired or deleted",
    Outcome.GIVEN_UP: "given up: written or not",
}


class Listing:
    """Letters as they come; a context manager that prints what is left at the end."""

    def __init__(self, *, as_json: bool) -> None:
        """Choose the form by standard output."""
        self._as_json = as_json
        self._console = Console(highlight=False) if sys.stdout.isatty() else None
        self._rows: list[tuple[str, ...]] = []
        self._headed = False

    def add(self, entry: Entry) -> None:
        """Take one letter."""
        if self._as_json:
            typer.echo(json.dumps(_entry(entry)))
            return
        device = "-" if entry.device is None else printable(entry.device)
        reason, detail = printable(entry.reason), printable(entry.detail)
        row = (_clock(entry.received_ms), reason, device, str(entry.id), detail)
        if self._console is None:
            typer.echo("\t".join((_clock(entry.received_ms, exact=True), *row[1:])))
            return
        self._rows.append(row)
        if len(self._rows) >= _CHUNK_ROWS:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._console is None or not self._rows:
            return
        wide = self._console.width >= _WIDE_COLUMNS
        with self._console.capture() as drawn:
            table = self._table(wide=wide)
            for row in self._rows:
                table.add_row(*map(Text, row[: len(table.columns)]))
                if not wide:
                    # What does not fit beside them stands below.
                    self._console.print(table)
                    self._console.print(Text(f"  {row[3]}\n  {row[4]}", style="dim"))
                    table = self._table(wide=wide)
            if wide:
                self._console.print(table)
        # Not by the console: a progress bar takes `sys.stdout` to print above itself.
        sys.stdout.write(drawn.get())
        sys.stdout.flush()
        self._rows.clear()

    def _table(self, *, wide: bool) -> Table:
        # Fixed widths, since later rows are not known yet.
        columns = [
            Column("Received (UTC)", width=_CLOCK_WIDTH, no_wrap=True),
            Column("Reason", width=_REASON_WIDTH, overflow="fold"),
            Column("Device", width=_DEVICE_WIDTH if wide else None, overflow="fold"),
            Column("ID", width=_ID_WIDTH, no_wrap=True),
            Column("Detail", overflow="fold"),
        ]
        shown = columns if wide else columns[:3]
        headed, self._headed = self._headed, True
        return Table(*shown, box=None, show_header=not headed, pad_edge=False)


class _Count(NamedTuple):
    letters: int
    first_ms: int
    last_ms: int


class Counts:
    """How many letters of which reason, and when."""

    def __init__(self) -> None:
        """Begin at none."""
        self.by_reason: dict[str, _Count] = {}

    def add(self, entry: Entry) -> None:
        """Count one."""
        at = entry.received_ms
        known = self.by_reason.get(entry.reason, _Count(0, at, at))
        self.by_reason[entry.reason] = _Count(
            known.letters + 1, min(known.first_ms, at), max(known.last_ms, at)
        )

    @property
    def total(self) -> int:
        """All of them."""
        return sum(count.letters for count in self.by_reason.values())

    def rows(self) -> list[tuple[str, _Count]]:
        """The most frequent reason first."""
        return sorted(self.by_reason.items(), key=lambda row: (-row[1].letters, row[0]))


def counts_lines(counts: Counts) -> list[str]:
    """Return the counts as plain lines, the total last."""
    lines = [
        f"{count.letters}\t{printable(reason)}\t{_clock(count.first_ms)}\t{_clock(count.last_ms)}"
        for reason, count in counts.rows()
    ]
    return [*lines, f"{counts.total}\tall"]


def show_counts(counts: Counts, *, as_json: bool) -> None:
    """Print the counts to standard output."""
    if as_json:
        reasons = {
            reason: {
                "letters": count.letters,
                "first": _iso(count.first_ms),
                "last": _iso(count.last_ms),
            }
            for reason, count in counts.rows()
        }
        typer.echo(json.dumps({"letters": counts.total, "reasons": reasons}))
    elif not sys.stdout.isatty():
        for line in counts_lines(counts):
            typer.echo(line)
    else:
        titles = ("Reason", "First (UTC)", "Last (UTC)")
        table = Table(Column("Letters", justify="right"), *titles, box=None, pad_edge=False)
        for reason, count in counts.rows():
            times = _clock(count.first_ms), _clock(count.last_ms)
            table.add_row(str(count.letters), Text(printable(reason)), *times)
        table.add_row(str(counts.total), Text("all", style="bold"))
        Console(highlight=False).print(table)


def show(letter: DeadLetter, *, as_json: bool) -> None:
    """Print everything of a row to standard output."""
    cut = len(letter.payload) < letter.payload_bytes
    try:
        text = letter.payload.decode()
    except UnicodeDecodeError:
        text = None
    if as_json:
        payload: dict[str, Any] = {
            "payload": text,
            "payload_base64": base64.b64encode(letter.payload).decode(),
        }
        typer.echo(json.dumps(_whole(letter) | {"payload_truncated": cut} | payload, indent=2))
        return
    values = _whole(letter)
    size = f"{letter.payload_bytes} bytes"
    values["payload_bytes"] = f"{size}, of which {len(letter.payload)} are kept" if cut else size
    width = max(map(len, values)) + 2
    for name, value in values.items():
        typer.echo(f"{name:<{width}}{'-' if value is None else printable(str(value))}")
    if text is None:
        typer.echo("payload, bytes that are not UTF-8 as \\x..:")
        text = letter.payload.decode(errors="backslashreplace")
    else:
        typer.echo("payload:")
    typer.echo(printable(text))
    if cut:
        typer.echo("(the rest was not kept)")


class Reporter:
    """Tells of letters that a replay did not finish, or of all."""

    def __init__(self, *, everything: bool, as_json: bool) -> None:
        """`everything`: also those that are done."""
        self._everything = everything or as_json
        self._as_json = as_json

    def __call__(self, entry: Entry, verdict: Verdict) -> None:
        """Print one line, unless there is nothing to do about it."""
        if self._as_json:
            letter = {"id": str(entry.id), "received_at": _iso(entry.received_ms)}
            made = {
                "device": entry.device,
                "reason": entry.reason,
                "outcome": verdict.outcome,
                "reason_now": verdict.reason or None,
                "detail": verdict.detail or None,
                "time_us": verdict.time_us,
            }
            typer.echo(json.dumps(letter | made))
        elif self._everything or verdict.outcome not in DONE:
            device = "-" if entry.device is None else entry.device
            cells = (
                str(entry.id),
                device,
                verdict.outcome.value,
                verdict.reason or "-",
                verdict.detail or ("-" if verdict.time_us is None else _exact(verdict.time_us)),
            )
            typer.echo("\t".join(map(printable, cells)))


def summary_lines(summary: Summary, *, dry_run: bool) -> list[str]:
    """Return what a replay did, for people."""
    if not summary.letters:
        return ["no dead letters"]
    of = "letter" if summary.letters == 1 else "letters"
    lines = [f"{summary.letters:,} {of}" + (" (dry run: nothing was written)" if dry_run else "")]
    for outcome, words in _WORDS.items():
        if not (count := summary.outcomes[outcome]):
            continue
        reasons = Counter(
            {reason: count for (kept, reason), count in summary.kept.items() if kept is outcome}
        )
        reasons.pop("", None)
        told = ", ".join(
            f"{count:,} {printable(reason)}" for reason, count in reasons.most_common()
        )
        lines.append(f"  {count:,} {words}" + (f" ({told})" if told else ""))
    if summary.deleted:
        lines.append(f"  {summary.deleted:,} rows deleted")
    if summary.interrupted:
        lines.append("  stopped early; the rest was not looked at")
    return lines


def summary_json(summary: Summary, *, dry_run: bool) -> str:
    """Return what a replay did, for programs."""
    made = {
        "letters": summary.letters,
        "outcomes": {outcome.value: summary.outcomes[outcome] for outcome in Outcome},
        "deleted": summary.deleted,
        "interrupted": summary.interrupted,
        "error": None if summary.error is None else str(summary.error),
        "dry_run": dry_run,
    }
    return json.dumps({"summary": made})


def restore_terminal() -> None:
    """Undo what a progress bar does to a terminal, for a process that ends at once."""
    Console(stderr=True).show_cursor()


@contextmanager
def progress(label: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Show how many hours are read, and a text; give what tells them. Only on a terminal."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda _done, _all: None, lambda _text: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} hours"),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # Else what goes to a file would end up on the terminal.
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        task = bar.add_task(label, total=1, text="")

        def on_hour(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield on_hour, lambda text: bar.update(task, text=text)


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "id": str(entry.id),
        "received_at": _iso(entry.received_ms),
        "reason": entry.reason,
        "device": entry.device,
        "topic": entry.topic,
        "detail": entry.detail,
        "payload_bytes": entry.payload_bytes,
    }


def _whole(letter: DeadLetter) -> dict[str, Any]:
    try:
        properties = letter.user_properties and json.loads(letter.user_properties)
    except ValueError:
        properties = letter.user_properties
    return {
        "id": str(letter.id),
        "received_at": _iso(letter.received_ms),
        "reason": letter.reason,
        "detail": letter.detail,
        "device": letter.device,
        "topic": letter.topic,
        "device_time": None if letter.device_ms is None else _iso(letter.device_ms),
        "client_id": letter.client_id,
        "qos": letter.qos,
        "retain": letter.retain,
        "duplicate": letter.duplicate,
        "user_properties": properties or None,
        "bucket": _iso(letter.bucket_ms),
        "shard": letter.shard,
        "payload_bytes": letter.payload_bytes,
        "payload_sha256": letter.payload_sha256.hex(),
    }


def _moment(milliseconds: int) -> datetime | None:
    if not 0 <= milliseconds <= _LATEST_MS:
        return None
    seconds, rest = divmod(milliseconds, _MS)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)


def _clock(milliseconds: int, *, exact: bool = False) -> str:
    moment = _moment(milliseconds)
    if moment is None:
        return f"{milliseconds} ms"
    return _iso(milliseconds) if exact else moment.strftime("%Y-%m-%d %H:%M:%S")


def _iso(milliseconds: int) -> str:
    moment = _moment(milliseconds)
    if moment is None:
        return f"{milliseconds} ms since 1970"
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _exact(time_us: int) -> str:
    return f"{_iso(time_us // 1000)[:-1]}{time_us % 1000:03}Z"
