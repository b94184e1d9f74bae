"""The commands `shadowsvc dead-letters list|show|replay|purge`.

Lives here: arguments, questions, exit codes. Rules: those of `shadowsvc.cli`; letters are chosen by
the same filters everywhere; nothing is deleted before a count was shown and somebody agreed. Must
not come in: how rows are read (`shadowsvc.store.letters`), what a letter is good for
(`shadowsvc.replay`), what anything looks like (`shadowsvc.letters_view`).
"""

from __future__ import annotations

import functools
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shadowsvc.commands import FAILURE, INTERRUPTED, USAGE, register, tool_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shadowsvc.config import Settings
    from shadowsvc.store.letters import Entry, LetterTable, Selection, Span

__all__ = ["app"]

_SECOND_MS = 1_000
_UNITS_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*([smhdw])")
# Clocks of other pods may be ahead of this one.
_AHEAD_MS = 3_600_000
_TEXT_EVERY = 100

_HELP = """Look at messages that could not become an update, send them again, delete them.

Every command takes the same filters. Times are durations before now (90s, 15m, 2h, 7d) or ISO times
(2026-11-23T06:00, in UTC unless they say otherwise). Without --since the search goes back as far as
dead letters live, SHADOWSVC_DEAD_LETTERS__TTL_SECONDS."""

app = typer.Typer(
    name="dead-letters",
    help=_HELP,
    short_help="Look at, send again and delete messages that could not become an update.",
    no_args_is_help=True,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
_command = functools.partial(register, app)

Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID", help="IDs as `list` shows them.", show_default=False),
]
Reasons = Annotated[
    list[str] | None,
    typer.Option("--reason", metavar="REASON", help="Of this reason; may be given several times."),
]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", metavar="NAME", help="Of this device; may be given several times."),
]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Received at or after this.")
]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Received before this.")]
Json = Annotated[bool, typer.Option("--json", help="JSON, one object a line.")]


@_command(
    "shadowsvc dead-letters list --since 2h",
    "shadowsvc dead-letters list --reason not_json --device lamp-7",
    "shadowsvc dead-letters list --summary",
    "shadowsvc dead-letters list --limit 0 --json | jq -r .device | sort | uniq -c",
    name="list",
)
def list_(
    context: typer.Context,
    *,
    reason: Reasons = None,
    device: Devices = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 100,
    summary: Annotated[bool, typer.Option("--summary", help="Count all by reason.")] = False,
    as_json: Json = False,
) -> None:
    """List dead letters, the newest first.

    On a terminal a table; in a pipe lines with tabs between: time, reason, device, ID, detail. What
    a message holds is shown so that it can't steer a terminal.

    Needs SHADOWSVC_CASSANDRA__CONTACT_POINTS, and SHADOWSVC_CASSANDRA__LOCAL_DC in a cluster of
    several data centres.
    """
    settings = tool_settings(context)
    selection = _selection(settings, (), reason, device, since, until)
    from shadowsvc import letters_view as view  # noqa: PLC0415 - on demand
    from shadowsvc.store import letters  # noqa: PLC0415 - on demand

    with letters.opened(settings) as (table, _):
        if summary:
            view.show_counts(_count(table, selection)[0], as_json=as_json)
            return
        shown = 0
        with view.progress("reading") as (on_hour, _), view.Listing(as_json=as_json) as listing:
            for entry in table.scan(selection, on_hour):
                if limit and shown == limit:
                    _tell(f"there are more than these {limit}; --limit 0 shows all")
                    break
                listing.add(entry)
                shown += 1
    if not shown:
        _tell("no dead letters")


@_command(
    "shadowsvc dead-letters show 6f1c5e0e-8a4b-4f0e-9d8b-2f4f6a1b7c3d",
    "shadowsvc dead-letters show 6f1c5e0e-8a4b-4f0e-9d8b-2f4f6a1b7c3d --raw > payload",
)
def show(
    context: typer.Context,
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="The ID as `list` shows it.")],
    *,
    since: Since = None,
    until: Until = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The payload alone, its bytes as they came.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON, the payload as text and in base64.")
    ] = False,
) -> None:
    """Show everything that is kept of one dead letter.

    The ID does not say when the letter came: --since makes a search in a large table quicker. Ends
    with 1 if there is no such letter.

    Needs SHADOWSVC_CASSANDRA__CONTACT_POINTS, and SHADOWSVC_CASSANDRA__LOCAL_DC in a cluster of
    several data centres.
    """
    settings = tool_settings(context)
    selection = _selection(settings, [letter_id], None, None, since, until)
    if raw and sys.stdout.isatty():
        _tell("--raw writes whatever a device sent: redirect it to a file or a pipe")
        raise typer.Exit(USAGE)
    from shadowsvc import letters_view as view  # noqa: PLC0415 - on demand
    from shadowsvc.store import letters  # noqa: PLC0415 - on demand

    with letters.opened(settings) as (table, _):
        with view.progress("searching") as (on_hour, _):
            entry = next(table.scan(selection, on_hour), None)
        found = None if entry is None else table.read([entry])[0]
    if found is None:
        _tell(f"there is no dead letter {selection.ids[0]} in this time")
        raise typer.Exit(FAILURE)
    if raw:
        sys.stdout.buffer.write(found.payload)
    else:
        view.show(found, as_json=as_json)


@_command(
    "shadowsvc dead-letters replay --reason too_many_leaves --since 1d --dry-run",
    "shadowsvc dead-letters replay --reason too_many_leaves --since 1d",
    "shadowsvc dead-letters replay --device lamp-7 --reason time_in_future --restamp --purge",
    "shadowsvc dead-letters replay 6f1c5e0e-8a4b-4f0e-9d8b-2f4f6a1b7c3d",
)
def replay(
    context: typer.Context,
    ids: Ids = None,
    *,
    reason: Reasons = None,
    device: Devices = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=0, help="The newest so many; 0: all.")] = 0,
    restamp: Annotated[
        bool,
        typer.Option("--restamp", help="Write letters with an impossible time as of now."),
    ] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete the rows of what was replayed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; tell what would happen.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send dead letters through the service's way of an update once more.

    With the present limits and the original times: the device's, or that of the receipt. So it is
    safe to repeat, and what a device sent since is not undone. No second dead letter is made: what
    is still no update is listed with its reason of today, and its row stays. Rows of what was
    replayed stay too, until they expire, unless --purge is given.

    A time too far ahead or too old needs --restamp; those letters are then written as of now and
    overwrite what the device said since. Repeated, they are written again: use --purge with it.

    Ends with 0 if all that was chosen is done, else with 1; Ctrl-C finishes what is under way.

    Needs the SHADOWSVC_SHADOW__ settings and SHADOWSVC_MQTT__TOPIC_PREFIX as the service has them,
    SHADOWSVC_CASSANDRA__CONTACT_POINTS, and SHADOWSVC_CASSANDRA__LOCAL_DC in a cluster of several
    data centres.
    """
    settings = tool_settings(context)
    selection = _selection(settings, ids, reason, device, since, until)
    from shadowsvc import logs  # noqa: PLC0415 - on demand

    # What the data plane and its driver log is for the service: here the summary tells the error.
    logs.configure("DEBUG" if settings.log.level == "DEBUG" else "CRITICAL", settings.log.format)
    import asyncio  # noqa: PLC0415 - on demand
    from itertools import islice  # noqa: PLC0415 - on demand

    import uvloop  # noqa: PLC0415 - on demand

    from shadowsvc import letters_view as view  # noqa: PLC0415 - on demand
    from shadowsvc import replay as replaying  # noqa: PLC0415 - on demand
    from shadowsvc.store import letters  # noqa: PLC0415 - on demand

    reporter = view.Reporter(everything=dry_run, as_json=as_json)
    with letters.opened(settings) as (table, local_dc), view.progress("replaying") as shown:
        on_hour, tell = shown
        stopping = asyncio.Event()
        entries = table.scan(selection, on_hour, stopping.is_set)
        watched: list[replaying.Summary] = []

        def report(entry: Entry, verdict: replaying.Verdict) -> None:
            reporter(entry, verdict)
            tell(f"{watched[0].letters:,} letters")

        cassandra = settings.cassandra.model_copy(update={"local_dc": local_dc})
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            done = runner.run(
                replaying.perform(
                    settings.model_copy(update={"cassandra": cassandra}),
                    table,
                    islice(entries, limit or None),
                    options=replaying.Options(dry_run=dry_run, purge=purge),
                    restamp=restamp,
                    report=report,
                    watch=watched.append,
                    stopping=stopping,
                    leave=view.restore_terminal,
                )
            )
    if as_json:
        typer.echo(view.summary_json(done, dry_run=dry_run))
    else:
        for line in view.summary_lines(done, dry_run=dry_run):
            typer.echo(line)
    missing = len(set(selection.ids)) - done.letters
    if missing > 0 and not done.interrupted and done.error is None:
        _tell(f"{missing} of the IDs are no dead letters in this time")
    if done.error is not None:
        _tell(f"{done.error}; what is told above is done, and repeating all of it is safe")
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if done.complete and missing <= 0 else FAILURE)


@_command(
    "shadowsvc dead-letters purge --device lamp-7 --reason not_json",
    "shadowsvc dead-letters purge --until 7d --yes",
)
def purge(
    context: typer.Context,
    ids: Ids = None,
    *,
    reason: Reasons = None,
    device: Devices = None,
    since: Since = None,
    until: Until = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
) -> None:
    """Delete dead letters, after showing how many of which reason.

    Without filters: all up to now. Letters expire by themselves; deleting is for what should not be
    kept, or is in the way. Without --yes a terminal is asked, anything else is refused. A letter
    that is deleted can't be replayed.

    Ends with 1 if the answer is no.

    Needs SHADOWSVC_CASSANDRA__CONTACT_POINTS, and SHADOWSVC_CASSANDRA__LOCAL_DC in a cluster of
    several data centres.
    """
    settings = tool_settings(context)
    # Nothing that came after the count may go.
    selection = _selection(settings, ids, reason, device, since, until, ahead_ms=0)
    if not yes and not sys.stdin.isatty():
        _tell("purge deletes: give --yes, or run it on a terminal")
        raise typer.Exit(USAGE)
    from shadowsvc import letters_view as view  # noqa: PLC0415 - on demand
    from shadowsvc.store import letters  # noqa: PLC0415 - on demand

    with letters.opened(settings) as (table, _):
        counts, spans = _count(table, selection)
        for line in view.counts_lines(counts):
            _tell(line)
        if not counts.total:
            return
        if not yes and not typer.confirm(f"Delete {counts.total} dead letters?", err=True):
            raise typer.Exit(FAILURE)
        gone = 0
        try:
            with view.progress("deleting") as (on_hour, tell):
                for count in _delete(table, selection, spans, counts.total, on_hour):
                    gone += count
                    tell(f"{gone:,} of {counts.total:,}")
        finally:
            # An outage or Ctrl-C may have come between.
            typer.echo(f"{gone} dead letters deleted")


def _count(table: LetterTable, selection: Selection) -> tuple[Any, list[Span]]:
    """Return the counts, and the parts of partitions that hold letters: eight an hour at most."""
    from shadowsvc import letters_view as view  # noqa: PLC0415 - on demand
    from shadowsvc.store.letters import Span  # noqa: PLC0415 - on demand

    counts = view.Counts()
    spans: dict[tuple[int, int], int] = {}
    with view.progress("counting") as (on_hour, tell):
        for number, entry in enumerate(table.scan(selection, on_hour)):
            counts.add(entry)
            part = entry.bucket_ms, entry.shard
            spans[part] = max(spans.get(part, 0), entry.written_us)
            if number % _TEXT_EVERY == 0:
                tell(f"{number + 1:,} letters")
    return counts, [Span(*part, written_us) for part, written_us in spans.items()]


def _delete(
    table: LetterTable,
    selection: Selection,
    spans: list[Span],
    total: int,
    on_hour: Callable[[int, int], None],
) -> Iterator[int]:
    """Delete, and yield how many rows went with each step."""
    if selection.by_time_alone:
        table.delete_spans(spans, selection)
        yield total
        return
    from itertools import islice  # noqa: PLC0415 - on demand

    entries = table.scan(selection, on_hour)
    while part := list(islice(entries, _TEXT_EVERY)):
        table.delete(part)
        yield len(part)


def _selection(
    settings: Settings,
    ids: list[str] | tuple[()] | None,
    reasons: list[str] | None,
    devices: list[str] | None,
    since: str | None,
    until: str | None,
    ahead_ms: int = _AHEAD_MS,
) -> Selection:
    from shadowsvc.shadow.document import REASONS  # noqa: PLC0415 - on demand
    from shadowsvc.store.letters import Selection  # noqa: PLC0415 - on demand

    now_ms = int(time.time() * _SECOND_MS)
    for reason in reasons or ():
        if reason not in REASONS:
            known = ", ".join(REASONS)
            raise typer.BadParameter(f"{reason!r} is none of {known}", param_hint="--reason")
    oldest_ms = now_ms - settings.dead_letters.ttl_seconds * _SECOND_MS
    since_ms = oldest_ms if since is None else _time_ms("--since", since, now_ms)
    until_ms = now_ms + ahead_ms if until is None else _time_ms("--until", until, now_ms)
    if since_ms >= until_ms:
        raise typer.BadParameter("it is not before --until", param_hint="--since")
    return Selection(
        since_ms=max(0, since_ms),
        until_ms=until_ms,
        reasons=frozenset(reasons or ()),
        devices=frozenset(devices or ()),
        ids=tuple(map(_id, ids or ())),
    )


def _time_ms(option: str, text: str, now_ms: int) -> int:
    """Return milliseconds since 1970 of a duration before now or an ISO time."""
    duration = _DURATION.fullmatch(text.strip())
    if duration is not None:
        return now_ms - int(float(duration[1]) * _UNITS_SECONDS[duration[2]] * _SECOND_MS)
    try:
        moment = datetime.fromisoformat(text.strip())
        moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return int(moment.timestamp() * _SECOND_MS)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is neither a duration (90s, 15m, 2h, 7d) nor an ISO time",
            param_hint=option,
        ) from None


def _id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no ID as `list` shows them", param_hint="ID"
        ) from None


def _tell(line: str) -> None:
    typer.echo(line, err=True)
