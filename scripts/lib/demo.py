"""The demo: devices publish, the service keeps their shadows, and everything is read back.

Lives here: the order of events, what is shown, and the verdict. It stands beside the scripts and
not in `backing`, which must not know of shadowsvc, nor in the package, which must not know of
`backing`.
Rules: everything started is ended by its process id, whatever happens; every wait has a limit; with
--json standard output has one JSON object and nothing else; the exit code is 0 only when nothing is
missing or wrong. Must not come in: how rows are compared (`readback`), how the service runs
(`service`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import orjson
import uvloop
from readback import missing_updates, settle
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from service import Figures, Service
from staging import carry_out, keyspace_mistakes, staged

import backing
from shadowsvc import tree
from shadowsvc.simulate import Difference, Expected, Options, Shape, Simulation, Summary
from shadowsvc.simulate import command as simulate_command
from shadowsvc.store.reader import select_shadow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

    from shadowsvc.config import Settings
    from shadowsvc.shadow.view import ShadowRows

_KILL_EVERY_SECONDS: Final = 4.0
_DURABLE_LIMIT_SECONDS: Final = 120.0
_SHOWN_DIFFERENCES: Final = 10
_SHADOW_EVERY_SECONDS: Final = 5.0
_REPEATED_LIMIT_SECONDS: Final = 20.0
_RECEIVED = "shadowsvc_messages_received"
_DURABLE = "shadowsvc_updates_durable"
_UNACKNOWLEDGED = "shadowsvc_unacknowledged_deliveries"
_ACK_LATENCY = "shadowsvc_receive_to_ack_seconds"
_DEVICE_LATENCY = "shadowsvc_device_to_durable_seconds"


@dataclasses.dataclass(slots=True)
class _Run:
    """What belongs to one demo."""

    options: argparse.Namespace
    console: Console
    settings: Settings
    service: Service
    session: Any
    """Of cassandra-driver, in the keyspace."""
    simulation: Simulation
    expected: Expected
    watched: str
    """The device whose shadow is shown."""


def main() -> int:
    """Run the demo; return the exit code."""
    options = _arguments()
    # Standard output belongs to the JSON object if there is to be one.
    console = Console(stderr=options.json, highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, _ended)
    tell = partial(console.print, markup=False)
    run = partial(_demo, options, console)
    return carry_out("demo", run, tell, "interrupted: everything is stopped")


def _demo(options: argparse.Namespace, console: Console, folder: Path) -> bool:
    run_name = f"demo-{os.getpid()}-{int(time.time()) % 100_000}"
    tell = partial(console.print, markup=False)
    with staged(run_name, options.keyspace, folder, tell) as (
        broker,
        database,
        settings,
        service,
        session,
    ):

        async def simulate() -> tuple[Summary, _Run]:
            # Made inside the loop that it runs on.
            expected = Expected()
            simulation = Simulation(settings.mqtt, _simulation(options, run_name), expected)
            watched = f"{run_name}-{min(2, options.devices - 1):06d}"
            run = _Run(options, console, settings, service, session, simulation, expected, watched)
            return await _simulate(run), run

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            summary, run = runner.run(simulate())
        for line in simulate_command.lines(summary):
            console.print(line, markup=False)
        good = _verdict(run, summary)
        if options.keep:
            _keep(run, broker, database)
        console.print("stopping …")
    return good


async def _simulate(run: _Run) -> Summary:
    """Publish while the figures are shown and, if wanted, the service is killed."""
    beside: list[asyncio.Task[None]] = [asyncio.create_task(_show(run))]
    if run.options.kill:
        beside.append(asyncio.create_task(_kill(run)))
    simulating = asyncio.create_task(run.simulation.run())
    every: list[asyncio.Task[Any]] = [simulating, *beside]
    try:
        await asyncio.wait(every, return_when=asyncio.FIRST_COMPLETED)
        for task in beside:
            if task.done():  # it never ends by itself: it has failed
                task.result()
        return await simulating
    except BaseException:
        run.service.give_up()
        raise
    finally:
        for each in every:
            each.cancel()
        await asyncio.gather(*every, return_exceptions=True)


async def _kill(run: _Run) -> None:
    """Kill -9 the service and start it again, over and over."""
    while True:
        await asyncio.sleep(_KILL_EVERY_SECONDS)
        # To the end even if we are cancelled: half a start would leave a process that nobody ends.
        await asyncio.shield(asyncio.to_thread(_kill_and_start, run.service))


def _kill_and_start(service: Service) -> None:
    service.kill()
    service.start()


async def _show(run: _Run) -> None:
    """Show the figures once a second, and a shadow: all the time on a terminal, else at times."""
    last: Figures | None = None
    last_time = shadow_time = time.monotonic()
    with _display(run) as display:
        while True:
            await asyncio.sleep(1)
            figures = await asyncio.to_thread(run.service.figures)
            now = time.monotonic()
            line = _line(run, figures, last, now - last_time)
            shadow = None
            if run.console.is_terminal or now - shadow_time >= _SHADOW_EVERY_SECONDS:
                shadow = await asyncio.to_thread(_shadow, run)
                shadow_time = now
            display(line, shadow)
            last, last_time = figures or last, now


@contextlib.contextmanager
def _display(run: _Run) -> Iterator[Callable[[Table, RenderableType | None], None]]:
    console = run.console
    if not console.is_terminal:

        def print_plain(line: Table, shadow: RenderableType | None) -> None:
            cells = (f"{column.header} {next(iter(column.cells))}" for column in line.columns)
            console.print("  ".join(cells), markup=False)
            if shadow is not None:
                console.print(shadow)

        yield print_plain
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def print_live(line: Table, shadow: RenderableType | None) -> None:
            live.update(Group(line, shadow or Text()), refresh=True)

        yield print_live


def _line(run: _Run, figures: Figures | None, last: Figures | None, seconds: float) -> Table:
    """Return one row of figures; rates and latencies are of the last second."""
    progress = run.simulation.progress()
    table = Table(box=None, pad_edge=False)
    cells = {"time": f"{progress.seconds:.0f} s", "published": f"{progress.acknowledged:,}"}
    if figures is None:
        cells["service"] = f"down (killed {run.service.kills} times)"
    else:
        before = last or Figures()
        durable = figures.counters[_DURABLE]
        cells |= {
            "durable": f"{durable:,.0f}",
            "durable/s": f"{(durable - before.counters[_DURABLE]) / seconds:,.0f}",
            "lag": f"{figures.gauges.get(_UNACKNOWLEDGED, 0):,.0f}",
            "receive-to-ack p50": _ms(figures.quantile(_ACK_LATENCY, 0.5, before)),
            "p99": _ms(figures.quantile(_ACK_LATENCY, 0.99, before)),
            "device-to-durable p99": _ms(figures.quantile(_DEVICE_LATENCY, 0.99, before)),
        }
        if run.service.kills:
            cells["killed"] = str(run.service.kills)
    for header in cells:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row(*cells.values())
    return table


def _shadow(run: _Run) -> RenderableType | None:
    shadow: ShadowRows | None = select_shadow(run.session, run.watched, "")
    if shadow is None:
        return None
    # As `shadowsvc get` draws it, but into a string: the display decides when it is shown.
    canvas = Console(
        file=open(os.devnull, "w"),  # noqa: SIM115, PTH123 - closed with the process
        record=True,
        width=run.console.width,
        force_terminal=run.console.is_terminal,
    )
    tree.render(shadow, time.time(), canvas)
    return Text.from_ansi(canvas.export_text(styles=run.console.is_terminal))


def _verdict(run: _Run, summary: Summary) -> bool:
    """Wait until everything is durable, compare, tell; return whether all is well."""
    console, expected = run.console, run.expected
    leaves, devices = expected.leaves(), len(expected.devices)
    console.print(f"reading back {leaves:,} leaves of {devices:,} devices …")
    started = time.monotonic()
    found, bad = _settle(run)
    took = time.monotonic() - started
    missing = missing_updates(found)
    wrong = sum(1 for difference in found if difference.kind == "wrong")
    for difference in found[:_SHOWN_DIFFERENCES]:
        console.print(_describe(difference), markup=False)
    figures = run.service.figures() or Figures()
    # What the broker acknowledged without a subscriber, or refused, was never promised.
    published = summary.acknowledged
    durable = published - missing - bad
    good = (
        not (missing or wrong or bad or expected.uncertain) and summary.complete and published > 0
    )
    if run.service.kills:
        console.print(f"the service was killed {run.service.kills} times with kill -9")
    if expected.dead_letters:
        total = len(expected.dead_letters)
        console.print(f"dead letters: {total:,} bad documents, {bad:,} of them missing")
    if expected.uncertain:
        console.print(f"{len(expected.uncertain)} devices not compared: answers are unknown")
    sign = "=" if published == durable else "≠"
    verdict = f"published {published:,} {sign} durable {durable:,}, missing {missing + bad:,}"
    style = "bold green" if good else "bold red"
    console.print(Text(f"{verdict}, wrong {wrong:,}", style=style), f"(read back in {took:.1f} s)")
    if not good:
        console.print(f"/readyz: {run.service.readiness()}{run.service.log_tail()}", markup=False)
    if run.options.json:
        result = {
            "ok": good,
            "published": published,
            "durable": durable,
            "missing": missing + bad,
            "wrong": wrong,
            "devices": devices,
            "leaves": leaves,
            "dead_letters": {"expected": len(expected.dead_letters), "missing": bad},
            "uncertain_devices": len(expected.uncertain),
            "kills": run.service.kills,
            "backing": str(backing.choose()),
            "received": figures.counters[_RECEIVED],
            "latency_seconds": {
                name: {
                    f"p{share:g}": figures.quantile(f"shadowsvc_{name}_seconds", share / 100)
                    for share in (50, 99, 99.9)
                }
                for name in ("receive_to_ack", "device_to_durable")
            },
            "simulation": simulate_command.as_json(summary),
        }
        sys.stdout.write(orjson.dumps(result).decode() + "\n")
        sys.stdout.flush()
    return good


def _settle(run: _Run) -> tuple[list[Difference], int]:
    """Wait until nothing is under way, and compare until nothing differs or the time is up."""
    deadline = time.monotonic() + _DURABLE_LIMIT_SECONDS
    before = -1
    while True:
        run.service.check()
        figures = run.service.figures()
        if figures is not None:
            received = figures.counters[_RECEIVED]
            if not figures.gauges.get(_UNACKNOWLEDGED) and received == before:
                break
            before = received
        if time.monotonic() > deadline:
            run.console.print("the service still holds unacknowledged deliveries")
            break
        time.sleep(0.3)
    # A broker that still repeats something to a service that was killed takes a moment.
    limit = min(_REPEATED_LIMIT_SECONDS, max(0.0, deadline - time.monotonic()))
    return settle(run.session, run.expected, run.service.check, limit)


def _keep(run: _Run, broker: backing.Broker, database: backing.Database) -> None:
    """Leave everything running until Ctrl-C, and tell how to play with it."""
    console, service = run.console, run.service
    file = service.log_path.parent / "environment"
    file.write_text(
        "".join(f"export {name}={shlex.quote(text)}\n" for name, text in service.variables.items())
    )
    topic = f"{run.settings.mqtt.topic_prefix}/my-lamp/shadow/update"
    document = '{"state": {"reported": {"on": true, "color": {"hue": 200}}}}'
    program = Path(sys.executable).with_name("shadowsvc")
    command = str(program) if program.exists() else f"{sys.executable} -m shadowsvc"
    login = ""
    if run.settings.mqtt.username:
        login = " -u USER -P PASSWORD"
    console.print(
        "\nEverything is left running. In another terminal:\n\n"
        f"  . {file}\n"
        f"  mosquitto_pub -V 5 -q 1 -h {broker.host} -p {broker.port}{login} -t {topic} \\\n"
        f"    -m {shlex.quote(document)}\n"
        f"  {command} get my-lamp\n"
        f"  {command} get {run.watched} --json\n"
        f"  {command} simulate --devices 100 --rate 500 --seconds 10\n"
        f"  curl -s {service.address}/readyz {service.address}/metrics\n\n"
        f"Broker {broker.host}:{broker.port}, "
        f"Cassandra {','.join(database.contact_points)} port {database.port}, "
        f"keyspace {run.settings.cassandra.keyspace}, log {service.log_path}\n"
        "Ctrl-C ends all of it.",
        markup=False,
    )
    while service.running:
        time.sleep(0.5)
    service.check()


def _simulation(options: argparse.Namespace, name: str) -> Options:
    return Options(
        devices=options.devices,
        rate=options.rate,
        seconds=options.seconds,
        seed=options.seed,
        shape=Shape(bad_share=options.bad_share),
        name_prefix=name,
        drain_seconds=20,
    )


def _describe(difference: Difference) -> str:
    leaf = "updated_at" if difference.leaf is None else " ".join(filter(None, difference.leaf))
    return f"  {difference.kind}: {difference.device} {leaf}: {difference.detail}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _ended(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description=(
            "Starts a broker, Cassandra and shadowsvc, lets simulated devices publish, shows rate, "
            "latency, lag and a shadow, then reads everything back. Exit code 0: published = "
            "durable, nothing missing, nothing wrong."
        ),
        epilog=(
            "Servers: containers if an engine answers, else local processes; or your own by "
            "SHADOWSVC_BACKING_MQTT_URL and SHADOWSVC_BACKING_CASSANDRA=host:port."
        ),
    )
    add = parser.add_argument
    add("--seconds", type=float, default=15, help="how long devices publish (15)")
    add("--devices", type=int, default=1000, help="how many (1000)")
    add("--rate", type=float, default=2000, help="updates a second, of all; 0: most (2000)")
    add("--seed", type=int, default=1, help="of all chance (1)")
    add("--bad-share", type=float, default=0.001, help="of documents that are bad (0.001)")
    add("--kill", action="store_true", help="kill -9 the service every 4 s, and start it again")
    add("--keep", action="store_true", help="leave all running until Ctrl-C, to try it by hand")
    add("--json", action="store_true", help="one JSON object on standard output, the rest beside")
    add("--keyspace", default="shadowsvc_demo", help="in Cassandra (shadowsvc_demo)")
    options = parser.parse_args()
    if options.seconds <= 0:
        parser.error("--seconds must be above 0")
    mistakes = _simulation(options, "demo").mistakes() + keyspace_mistakes(options.keyspace)
    if mistakes:
        parser.error("; ".join(mistakes))
    return options


if __name__ == "__main__":
    sys.exit(main())
