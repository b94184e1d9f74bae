"""The commands.

Lives here: arguments, exit codes, and what a person reads. Rules: 0 is success, 1 a failure, 2 bad
configuration or usage (one line for each mistake, on standard error), 130 Ctrl-C; answers go to
standard output, all else to standard error; colours only on a terminal and without `NO_COLOR`; no
secret is printed; what a command needs is imported when it runs, so that `probe` stays quick. Must
not come in: work of any other room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from enum import StrEnum
from pathlib import Path  # noqa: TC003 - typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from shadowsvc.errors import ConfigError, ShadowsvcError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowsvc.config import Loaded, Needs, Settings

__all__ = ["app", "main"]

Command = TypeVar("Command", bound="Callable[..., None]")

_FAILURE = 1
_BAD_CONFIGURATION = 2
_INTERRUPTED = 130

_on_terminal = sys.stdout.isatty()

app = typer.Typer(
    name="shadowsvc",
    no_args_is_help=True,
    add_completion=False,
    # Pretty tracebacks show local variables, and with them secrets.
    pretty_exceptions_enable=False,
    # Boxes on a terminal, plain text in a pipe.
    rich_markup_mode="rich" if _on_terminal else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help(doc: str | None, title: str, *lines: str) -> str:
    """Return a command's help: its docstring, one line a paragraph, and lines kept as they are."""
    paragraphs = [" ".join(part.split()) for part in (doc or "").split("\n\n")]
    kept = "\n".join(["\b", title, *(f"  {line}" for line in lines)])  # "\b": click's mark
    return "\n\n".join([*paragraphs, kept])


def _command(*examples: str, name: str | None = None) -> Callable[[Command], Command]:
    def register(command: Command) -> Command:
        text = _help(command.__doc__, "Examples:", *examples)
        short = text.partition("\n")[0]
        return app.command(name, help=text, short_help=short)(command)

    return register


class Probe(StrEnum):
    """What can be asked of the running service."""

    LIVE = "live"
    READY = "ready"


def _version(value: bool) -> None:  # noqa: FBT001 - typer calls it so
    if value:
        import shadowsvc  # noqa: PLC0415 - on demand

        typer.echo(f"shadowsvc {shadowsvc.__version__}")
        raise typer.Exit


def _globals(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Settings file in TOML; else what SHADOWSVC_CONFIG_FILE names.",
        ),
    ] = None,
    *,
    version: Annotated[  # noqa: ARG001 - its callback does it
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Keep the last known state of every MQTT device in Cassandra.

    Every setting is a variable SHADOWSVC_SECTION__NAME, or a line in a settings file. Passwords may
    stand in files: SHADOWSVC_MQTT__PASSWORD_FILE=/run/secrets/mqtt. `shadowsvc check-config` shows
    all settings and what is wrong with them.

    Exit codes: 0 success, 1 failure, 2 bad configuration or usage, 130 Ctrl-C.
    """
    context.obj = config


app.callback(
    help=_help(
        _globals.__doc__,
        "First steps:",
        "export SHADOWSVC_MQTT__URL=mqtt://broker:1883",
        "export SHADOWSVC_MQTT__CLIENT_ID=shadowsvc-0",
        "export SHADOWSVC_CASSANDRA__CONTACT_POINTS=cassandra",
        "export SHADOWSVC_CASSANDRA__LOCAL_DC=datacenter1",
        "shadowsvc check-config",
        "shadowsvc migrate",
        "shadowsvc run",
    )
)(_globals)


@_command(
    "shadowsvc run",
    "shadowsvc --config /etc/shadowsvc.toml run",
    "SHADOWSVC_LOG__LEVEL=DEBUG SHADOWSVC_LOG__FORMAT=console shadowsvc run",
)
def run(context: typer.Context) -> None:
    """Take updates from the broker and write them, until SIGTERM or Ctrl-C.

    SIGTERM finishes what is in flight and ends with 0; a second one ends at once. What was not
    acknowledged stays with the broker.

    Needs SHADOWSVC_MQTT__CLIENT_ID and SHADOWSVC_CASSANDRA__LOCAL_DC; uses all settings.
    """
    from shadowsvc.config import require_for_run  # noqa: PLC0415 - on demand

    settings = _load(context, needs=require_for_run).settings
    from shadowsvc import app as service  # noqa: PLC0415 - on demand
    from shadowsvc import logs  # noqa: PLC0415 - on demand

    logs.configure(settings.log.level, settings.log.format)

    raise typer.Exit(service.run(settings))


@_command(
    "shadowsvc migrate",
    "SHADOWSVC_CASSANDRA__REPLICATION=dc1:3,dc2:3 shadowsvc migrate",
)
def migrate(context: typer.Context) -> None:
    """Create the keyspace if it is absent and bring its tables up to this release.

    May run at any time, any number of times, and from several places at once.

    Needs SHADOWSVC_CASSANDRA__CONTACT_POINTS, and SHADOWSVC_CASSANDRA__LOCAL_DC in a cluster of
    several data centres; SHADOWSVC_CASSANDRA__REPLICATION counts when the keyspace is created.
    """
    settings = _load(context).settings
    _tool_logs(settings)
    from shadowsvc.store import migrate as schema  # noqa: PLC0415 - on demand

    report = schema.migrate(settings, lambda line: typer.echo(line, err=True))
    done = ", ".join(report.applied) or "nothing to apply"
    typer.echo(f"keyspace {report.keyspace} is at version {report.version}: {done}")


@_command(
    "shadowsvc get lamp-7",
    "shadowsvc get lamp-7 --shadow firmware",
    "shadowsvc get lamp-7 --json | jq .state.reported",
)
def get(
    context: typer.Context,
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")],
    shadow: Annotated[
        str, typer.Option("--shadow", metavar="NAME", help="A named shadow, not the unnamed one.")
    ] = "",
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="The whole document as JSON, with metadata.")
    ] = False,
) -> None:
    """Show the shadow of one device, with the age of each leaf.

    Ends with 1 if there is nothing to show.

    Needs SHADOWSVC_CASSANDRA__CONTACT_POINTS, and SHADOWSVC_CASSANDRA__LOCAL_DC in a cluster of
    several data centres.
    """
    settings = _load(context).settings
    _tool_logs(settings)
    from shadowsvc.store.reader import read_shadow  # noqa: PLC0415 - on demand
    from shadowsvc.tree import printable, render  # noqa: PLC0415 - on demand

    found = read_shadow(settings, device, shadow)
    if found is None:
        _complain(f"shadowsvc: nothing is known of a device {printable(device)}")
        raise typer.Exit(_FAILURE)
    if as_json:
        from shadowsvc.shadow.view import document  # noqa: PLC0415 - on demand

        made = document(found.rows, version_us=found.version_us, updated_at_ms=found.updated_at_ms)
        # ASCII: nothing that a device sent may steer a terminal.
        typer.echo(json.dumps(made, indent=2))
    else:
        from rich.console import Console  # noqa: PLC0415 - on demand

        render(found, time.time(), Console())
    raise typer.Exit(0 if found.rows else _FAILURE)


@_command(
    "shadowsvc check-config",
    "shadowsvc --config /etc/shadowsvc.toml check-config",
    "shadowsvc check-config | grep CASSANDRA",
    name="check-config",
)
def check_config(context: typer.Context) -> None:
    """Check the settings as `run` does, and show the effective ones, secrets hidden.

    On a terminal a table that tells where each value came from; in a pipe lines of NAME=value.
    Ends with 2 and one line for each mistake if there are any. Connects to nothing.

    Needs what `run` needs: SHADOWSVC_MQTT__CLIENT_ID and SHADOWSVC_CASSANDRA__LOCAL_DC.
    """
    from shadowsvc.config import (  # noqa: PLC0415 - on demand
        advice,
        describe,
        require_for_run,
        worst_case_held_bytes,
    )

    settings, origins = _load(context, needs=require_for_run)
    rows = describe(settings, origins)
    held = (
        f"Held in memory at most: {worst_case_held_bytes(settings) / 1024**2:.1f} MiB of QoS 1 "
        f"payloads ({settings.mqtt.receive_maximum} messages; an update has at most "
        f"{settings.shadow.max_payload_bytes} bytes, a dead letter 65536), "
        f"{settings.limits.max_held_bytes / 1024**2:.1f} MiB in all."
    )
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - on demand
        from rich.table import Column, Table  # noqa: PLC0415 - on demand
        from rich.text import Text  # noqa: PLC0415 - on demand

        folded = (Column(title, overflow="fold") for title in ("Value", "From"))
        table = Table(Column("Variable", no_wrap=True), *folded, box=None)
        for row in rows:
            style = "dim" if row.origin == "default" else "bold"
            table.add_row(*(Text(cell, style=style) for cell in row))
        console = Console()
        console.print(table)
        console.print(Text(held))
    else:
        for row in rows:
            typer.echo(f"{row.variable}={row.value}")
        typer.echo(f"# {held}")
    for line in advice(settings):
        typer.echo(f"advice: {line}", err=True)


@_command(
    "shadowsvc simulate",
    "shadowsvc simulate --devices 20000 --rate 9779 --seconds 60",
    "shadowsvc simulate --families lamp,meter --bad-share 0.01 --seed 7 --json",
)
def simulate(
    context: typer.Context,
    *,
    devices: Annotated[int, typer.Option(min=1, help="How many devices.")] = 100,
    rate: Annotated[
        float, typer.Option(min=0, help="Messages a second of all together; 0: what goes.")
    ] = 100.0,
    seconds: Annotated[float, typer.Option(min=0, help="How long; 0: until Ctrl-C.")] = 10.0,
    connections: Annotated[
        int | None, typer.Option(min=1, help="MQTT connections that the devices share.")
    ] = None,
    families: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Kinds of devices, and so of payloads."),
    ] = None,
    repeat_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of messages that are sent twice.")
    ] = 0.01,
    late_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of messages that later ones overtake.")
    ] = 0.01,
    bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of messages that become dead letters.")
    ] = 0.0,
    qos: Annotated[int, typer.Option(min=0, max=1, help="Quality of service.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed makes the same messages.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as JSON.")] = False,
) -> None:
    """Publish what devices would, over MQTT, and tell how many the broker acknowledged.

    Ends with 1 if a message was refused, got no answer or had no subscriber.

    Needs SHADOWSVC_MQTT__URL, and SHADOWSVC_MQTT__TOPIC_PREFIX as the service has it. Cassandra is
    not asked.
    """
    settings = _load(context).settings
    from shadowsvc import logs  # noqa: PLC0415 - on demand
    from shadowsvc.simulate import Options, Shape  # noqa: PLC0415 - on demand
    from shadowsvc.simulate.command import simulate as publish  # noqa: PLC0415 - on demand

    shape = Shape(repeat_share=repeat_share, late_share=late_share, bad_share=bad_share)
    if families is not None:
        names = tuple(name.strip() for name in families.split(",") if name.strip())
        shape = dataclasses.replace(shape, families=names)
    options = Options(
        devices=devices,
        rate=rate,
        seconds=seconds,
        connections=connections,
        seed=seed,
        qos=qos,
        shape=shape,
    )
    logs.configure(settings.log.level, settings.log.format)
    raise typer.Exit(publish(settings.mqtt, options, json=as_json))


@_command(
    "shadowsvc probe live",
    "shadowsvc probe ready --url http://10.0.0.7:8080/readyz",
)
def probe(
    context: typer.Context,
    what: Annotated[
        Probe, typer.Argument(help="live: the process works; ready: it takes and writes updates.")
    ],
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="Ask this address instead.")
    ] = None,
) -> None:
    """Ask the service on this machine whether it is live or ready.

    Ends with 0 if it is, else with 1 and the reasons, after 2 s at most.

    Needs SHADOWSVC_HTTP__PORT (and SHADOWSVC_HTTP__HOST) as the service has them.
    """
    from shadowsvc import probe as probing  # noqa: PLC0415 - on demand

    answer = probing.ask(url or probing.url_of(what.value, config_file=context.obj))
    typer.echo(what.value if answer.ok else answer.text)
    raise typer.Exit(0 if answer.ok else _FAILURE)


def main() -> NoReturn:
    """Run the command line and end the process."""
    code = 0
    try:
        app(prog_name="shadowsvc")
    except ConfigError as error:
        for line in error.mistakes:
            _complain(line)
        code = _BAD_CONFIGURATION
    except ShadowsvcError as error:
        _complain(f"shadowsvc: {error}")
        code = _FAILURE
    except KeyboardInterrupt:
        code = _INTERRUPTED
    sys.exit(code)


def _load(context: typer.Context, needs: Needs | None = None) -> Loaded:
    from shadowsvc.config import load_with_origins  # noqa: PLC0415 - on demand

    return load_with_origins(config_file=context.obj, needs=needs)


def _tool_logs(settings: Settings) -> None:
    """Show what drivers log only on demand: a command tells its one error itself."""
    if settings.log.level == "DEBUG":
        from shadowsvc import logs  # noqa: PLC0415 - on demand

        logs.configure(settings.log.level, settings.log.format)


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):
        typer.secho(line, err=True, fg=None if os.environ.get("NO_COLOR") else "red")
