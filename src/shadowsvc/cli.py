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
import functools
import json
import os
import sys
import time
from enum import StrEnum
from pathlib import Path  # noqa: TC003 - typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from shadowsvc import letters_cli
from shadowsvc.commands import FAILURE, INTERRUPTED, USAGE, help_text, register, tool_settings
from shadowsvc.errors import ConfigError, ShadowsvcError

if TYPE_CHECKING:
    from shadowsvc.config import Loaded, Needs
    from shadowsvc.store.slots import Slot

__all__ = ["app", "main"]

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


_command = functools.partial(register, app)


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
    help=help_text(
        _globals.__doc__,
        "First steps:",
        "export SHADOWSVC_MQTT__URL=mqtt://broker:1883",
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

    Any number may run: without SHADOWSVC_MQTT__CLIENT_ID each leases a client id of its own, see
    `shadowsvc slots`.

    Needs SHADOWSVC_CASSANDRA__LOCAL_DC; uses all settings.
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
    settings = tool_settings(context)
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
    settings = tool_settings(context)
    from shadowsvc.store.reader import read_shadow  # noqa: PLC0415 - on demand
    from shadowsvc.tree import printable, render  # noqa: PLC0415 - on demand

    found = read_shadow(settings, device, shadow)
    if found is None:
        _complain(f"shadowsvc: nothing is known of a device {printable(device)}")
        raise typer.Exit(FAILURE)
    if as_json:
        from shadowsvc.shadow.view import document  # noqa: PLC0415 - on demand

        made = document(found.rows, version_us=found.version_us, updated_at_ms=found.updated_at_ms)
        # ASCII: nothing that a device sent may steer a terminal.
        typer.echo(json.dumps(made, indent=2))
    else:
        from rich.console import Console  # noqa: PLC0415 - on demand

        render(found, time.time(), Console())
    raise typer.Exit(0 if found.rows else FAILURE)


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

    Needs what `run` needs: SHADOWSVC_CASSANDRA__LOCAL_DC.
    """
    from shadowsvc.config import (  # noqa: PLC0415 - on demand
        adopted_receive_maximum,
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
    if adopted := adopted_receive_maximum(settings):
        more = worst_case_held_bytes(settings, adopted)
        held += f" An adoption holds {more / 1024**2:.1f} MiB more ({adopted} messages)."
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
    from shadowsvc.credentials import complaints  # noqa: PLC0415 - on demand

    for line in (*advice(settings), *complaints(settings)):
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
    raise typer.Exit(0 if answer.ok else FAILURE)


@_command(
    "shadowsvc slots",
    "shadowsvc slots --json | jq '.slots[] | select(.state == \"free\")'",
)
def slots(
    context: typer.Context,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the slots of the group: client ids that processes lease, who has them, for how long.

    A slot that stays free is an orphan after SHADOWSVC_SLOTS__ORPHAN_AFTER_SECONDS: a process
    fetches what the broker holds for it and deletes it.

    Needs SHADOWSVC_CASSANDRA__CONTACT_POINTS, and SHADOWSVC_CASSANDRA__LOCAL_DC in a cluster of
    several data centres; SHADOWSVC_MQTT__SHARE_GROUP and SHADOWSVC_SLOTS__BROKER as the services
    have them.
    """
    import asyncio  # noqa: PLC0415 - on demand
    from datetime import UTC, datetime  # noqa: PLC0415 - on demand

    settings = tool_settings(context)
    from shadowsvc import slots_view as view  # noqa: PLC0415 - on demand
    from shadowsvc.store.slots import SlotTable  # noqa: PLC0415 - on demand

    table = SlotTable(settings)

    async def ask() -> list[Slot]:
        try:
            return await table.list()
        finally:
            await table.close()

    found, now = asyncio.run(ask()), datetime.now(UTC)
    group, broker = settings.mqtt.share_group, settings.slots.broker
    if as_json:
        limit = settings.slots.max_slots
        made = view.as_json(found, now, group=group, broker=broker, max_slots=limit)
        typer.echo(json.dumps(made, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - on demand

        Console().print(view.as_table(found, now))
    else:
        for line in view.as_lines(found, now):
            typer.echo(line)
    if not found:
        _complain(f"shadowsvc: no slots of the group {group!r} at the broker {broker!r}")


app.add_typer(letters_cli.app)


@_command(
    "shadowsvc pause --seconds 120",
    "shadowsvc pause --seconds 120 --url http://10.0.0.7:8080",
    "shadowsvc pause --resume",
)
def pause(
    context: typer.Context,
    *,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=1, max=3600, help="How long to stay away from the broker."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Come back now, before the time is over.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Ask the service there, http://HOST:PORT."),
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait until it has left.")
    ] = 60.0,
) -> None:
    """Let the running service leave the broker in good order, and come back after a while.

    Before a node of the broker is restarted: what is in flight to a connected session is lost then,
    what waits for an absent one is not. The service finishes and acknowledges what it holds,
    disconnects keeping its session, and connects again when the time is over. Asking again makes
    the pause longer. Ends with 0 when it has left.

    Needs SHADOWSVC_HTTP__PORT (and SHADOWSVC_HTTP__HOST) as the service has them, or --url.
    """
    if (seconds is None) is not resume:
        raise typer.BadParameter("give either --seconds or --resume")
    from shadowsvc import pause_command as asking  # noqa: PLC0415 - on demand

    where = url or asking.url_of(config_file=context.obj)
    if seconds is None:
        asking.resume(where, wait, typer.echo)
    else:
        asking.pause(where, seconds, wait, typer.echo)


@_command(
    "shadowsvc ingress",
    "SHADOWSVC_INGRESS__KUBECONFIG=~/.kube/config shadowsvc ingress --print",
    "SHADOWSVC_INGRESS__START_HAPROXY=true shadowsvc ingress",
)
def ingress(
    context: typer.Context,
    *,
    only_print: Annotated[
        bool,
        typer.Option("--print", help="Print HAProxy's configuration as it would be now, and end."),
    ] = False,
) -> None:
    """Keep HAProxy in step with the brokers' pods, until SIGTERM or Ctrl-C.

    Watches the EndpointSlices of SHADOWSVC_INGRESS__SERVICE and writes HAProxy's configuration to
    SHADOWSVC_INGRESS__DIRECTORY. Pods that come and go change servers of the running HAProxy; what
    else changes is a reload, which closes no connection. A configuration that `haproxy -c` refuses
    is not used, and without any broker the last good one stays.

    HAProxy is started by somebody else, with `haproxy -W -db -S DIRECTORY/master.sock -f
    DIRECTORY/haproxy.cfg`, or by this command if SHADOWSVC_INGRESS__START_HAPROXY is true. Probes
    and metrics are at SHADOWSVC_HTTP__PORT, HAProxy's own at
    SHADOWSVC_INGRESS__LISTEN_STATISTICS.

    Needs get, list and watch of endpointslices, as the pod's service account or by
    SHADOWSVC_INGRESS__KUBECONFIG; and the extra `ingress` of the package.
    """
    settings = _load(context).settings
    try:
        from shadowsvc.ingress import command as work  # noqa: PLC0415 - on demand
    except ModuleNotFoundError as error:
        raise ConfigError(
            [f"shadowsvc ingress: {error.name} is missing: pip install 'shadowsvc[ingress]'"]
        ) from error
    if only_print:
        typer.echo(work.render_once(settings), nl=False)
        return
    from shadowsvc import logs  # noqa: PLC0415 - on demand

    logs.configure(settings.log.level, settings.log.format)
    raise typer.Exit(work.run(settings))


def main() -> NoReturn:
    """Run the command line and end the process."""
    code = 0
    try:
        app(prog_name="shadowsvc")
    except ConfigError as error:
        for line in error.mistakes:
            _complain(line)
        code = USAGE
    except ShadowsvcError as error:
        _complain(f"shadowsvc: {error}")
        code = FAILURE
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _load(context: typer.Context, needs: Needs | None = None) -> Loaded:
    from shadowsvc.config import load_with_origins  # noqa: PLC0415 - on demand

    return load_with_origins(config_file=context.obj, needs=needs)


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):
        typer.secho(line, err=True, fg=None if os.environ.get("NO_COLOR") else "red")
