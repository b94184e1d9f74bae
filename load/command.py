"""The rig's command line: options, help that teaches, progress, the summary, exit codes.

Lives here: `python -m load lean`, `observe`, `check` and `record` as a person or a parent process
sees them. Rules: progress and complaints go to standard error; standard output has the summary, or
with `--progress json` one JSON object a line and nothing else; colours are for terminals; the first
Ctrl-C ends a run and still shows the summary, the second does not wait for answers. Must not come
in: what devices do.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from load.arguments import add_lean_options
from load.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_LEAN: Final = """\
Thousands of MQTT 5 devices in one process: they connect, publish shadow updates, come back after
they lost their connection, and leave. One process takes about 15,000 connections below a
descriptor limit of 20,000; run several with ranges of their own (--first-number) for more.
"""
_LEAN_MORE: Final = """\
examples:
  500 devices over WebSocket, 200 updates a second for half a minute:
    scripts/load lean ws://127.0.0.1:8080/mqtt --connections 500 --publish-rate 200 --seconds 30

  grow to 10,000 in two minutes, stay, lose half of them, see them come back, leave:
    scripts/load lean ws://127.0.0.1:8080/mqtt --connect-rate 500 \\
      --shape ramp:120:10000,plateau:60:500,storm:60:0.5,drain:20

  two brokers, eight source addresses, latency to a subscriber, report to a file:
    scripts/load lean mqtt://127.0.0.2:1883 mqtt://127.0.0.3:1883 --sources 127.0.1.1-127.0.1.8 \\
      --connections 2000 --publish-rate 100 --seconds 60 --watch 100 --json report.json

what the figures mean:
  A publish is due at an even pace, whatever happens to the ones before. Latency counts from when it
  was due, so a rig, a broker or a service that stalls shows in the latency of all that it delayed.
  "skipped" were due when no device that was up had room for one more. "missing" were published with
  QoS 1 and have no PUBACK with success: refused, taken without a subscriber, or unanswered.
  Every figure stands beside the rig's own CPU and the lateness of its timers; above 90 %% of a
  core, or 50 ms (p99), the report says that the rig was the bottleneck: use more processes.

commands on standard input with --control, one a line:
  connections N | publish-rate N | connect-rate N | drop SHARE | phase NAME | stop

exit code: 0; 1 if anything is missing; 2 for options that make no sense; 3 if the rig was the
bottleneck and --strict was given.
"""
_OBSERVE: Final = """\
A proxy between service and broker that sees every delivery and every PUBACK. The service sends
PUBACK when an update is durable, so the time from a document's timestamp to its PUBACK is
publish-to-durable. Start it, then the service with SHADOWSVC_MQTT__URL=mqtt://127.0.0.1:PORT.
"""
_CHECK: Final = """\
Makes every document of the journals anew, reads every device back from Cassandra, and reports what
is missing, by device and sequence number. Without --trail an update is missed only if no later one
wrote over all of its leaves; with it none escapes.
"""
_RECORD: Final = """\
Subscribes and writes what comes into a file that `lean --replay` plays, until Ctrl-C or --seconds.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except LoadError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        # Else the interpreter complains of what is left to be written when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/load", description="The load rig.", formatter_class=_Formatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    lean = commands.add_parser(
        "lean",
        help="devices by the thousand",
        description=_LEAN,
        epilog=_LEAN_MORE,
        formatter_class=_Formatter,
    )
    add_lean_options(lean)
    lean.set_defaults(command=_lean)

    observe = commands.add_parser(
        "observe",
        help="publish-to-durable, as a proxy before the broker",
        description=_OBSERVE,
        formatter_class=_Formatter,
    )
    observe.add_argument("broker", metavar="HOST:PORT", help="of the broker, plain MQTT")
    observe.add_argument("--port", type=int, help="to listen on, 127.0.0.1; a free one")
    observe.add_argument("--seconds", type=float, default=0.0, help="0: until Ctrl-C")
    observe.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    observe.add_argument(
        "--progress", choices=("auto", "json", "none"), default="auto", help="see `lean`"
    )
    observe.add_argument(
        "--control", action="store_true", help="obey `phase NAME` and `stop` on standard input"
    )
    observe.set_defaults(command=_observe)

    check = commands.add_parser(
        "check",
        help="is everything that was acknowledged in Cassandra?",
        description=_CHECK,
        formatter_class=_Formatter,
    )
    check.add_argument("journals", nargs="+", type=Path, metavar="JOURNAL", help="of `lean`")
    check.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="until all is there; %(default)g",
    )
    check.add_argument(
        "--cassandra", default="127.0.0.1:9042", metavar="HOST:PORT", help="%(default)s"
    )
    check.add_argument("--keyspace", default="shadowsvc", help="%(default)s")
    check.add_argument("--username", help="with a password in --password-file")
    check.add_argument("--password-file", type=Path, metavar="FILE")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the verdict here")
    check.set_defaults(command=_check)

    record = commands.add_parser(
        "record",
        help="a recording for `lean --replay`",
        description=_RECORD,
        formatter_class=_Formatter,
    )
    record.add_argument("target", metavar="TARGET", help="as `lean` has it")
    record.add_argument("file", type=Path, metavar="FILE", help="to write")
    record.add_argument("--filter", default="things/+/shadow/update", help="%(default)s")
    record.add_argument("--seconds", type=float, default=0.0, help="0: until Ctrl-C")
    record.set_defaults(command=_record)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def _lean(options: argparse.Namespace) -> int:
    from load.lean_command import lean  # noqa: PLC0415 - `--help` needs no event loop

    return lean(options)


def _observe(options: argparse.Namespace) -> int:
    from load.observer_command import observe  # noqa: PLC0415 - likewise

    return observe(options)


def _check(options: argparse.Namespace) -> int:
    from load.check import check  # noqa: PLC0415 - likewise

    return check(options)


def _record(options: argparse.Namespace) -> int:
    from load.record import record  # noqa: PLC0415 - likewise

    return record(options)
