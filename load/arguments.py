"""The options of `lean` on the command line, and what becomes of them.

Lives here: names, defaults and help texts, and `options_of`. Rules: a default is that of
`options.Options`; whoever starts several processes passes each its part. Must not come in: running.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Final

from load.backoff import BACKOFFS
from load.endpoints import Endpoint, parse_sources
from load.errors import BadOption
from load.families import NAMES
from load.options import Options
from load.shapes import Shape

if TYPE_CHECKING:
    import argparse

__all__ = ["DEFAULTS", "add_lean_options", "options_of", "password_of"]

DEFAULTS: Final = {
    one.name: one.default
    for one in dataclasses.fields(Options)
    if one.default is not dataclasses.MISSING
}
"""Of `options.Options`, by its names."""


def add_lean_options(parser: argparse.ArgumentParser) -> None:
    """Add what `lean` takes."""
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="mqtt://HOST:PORT, mqtts://, ws://HOST:PORT/PATH or wss://; several are taken in turn",
    )
    _add_load(parser)
    _add_connections(parser)
    _add_devices(parser)
    _add_documents(parser)
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    out.add_argument("--html", type=Path, metavar="FILE", help="write it here with plots")
    out.add_argument(
        "--progress",
        choices=("auto", "plain", "json", "none"),
        default="auto",
        help="auto: one changing line on a terminal, else a line now and then, on standard error; "
        "json: an object a second on standard output, the report last",
    )
    out.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="16 bytes for each acknowledged publish, for `check`",
    )
    out.add_argument(
        "--watch",
        type=int,
        default=DEFAULTS["watch"],
        metavar="N",
        help="subscribe to N of the devices, for publish-to-subscriber latency (%(default)s)",
    )
    out.add_argument("--control", action="store_true", help="obey commands on standard input")
    out.add_argument("--strict", action="store_true", help="fail if the rig is the bottleneck")


def _add_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("how much, how long")
    load.add_argument("--connections", type=int, default=100, metavar="N", help="%(default)s")
    load.add_argument(
        "--publish-rate",
        type=float,
        default=0.0,
        metavar="N",
        help="messages a second, of all devices together (%(default)g)",
    )
    load.add_argument(
        "--seconds", type=float, default=10.0, metavar="N", help="0: until stopped (%(default)g)"
    )
    load.add_argument(
        "--shape",
        metavar="STAGES",
        help="in place of these three: ramp:SECONDS:CONNECTIONS[:RATE], plateau:SECONDS[:RATE], "
        "storm:SECONDS:SHARE[:RATE], drain:SECONDS, joined by commas",
    )
    load.add_argument(
        "--connect-rate",
        type=float,
        default=DEFAULTS["connect_rate"],
        metavar="N",
        help="connects a second at most (%(default)g)",
    )
    load.add_argument(
        "--connect-rate-decay",
        type=float,
        default=DEFAULTS["connect_rate_decay"],
        metavar="X",
        help="factor after each second in which a tenth of the connects failed; 1: none "
        "(%(default)g)",
    )
    load.add_argument(
        "--backoff",
        choices=sorted(BACKOFFS),
        default=DEFAULTS["backoff"].name,
        help="a device's wait before it connects again (%(default)s)",
    )
    load.add_argument(
        "--backoff-max",
        type=float,
        metavar="SECONDS",
        help="the longest such wait",
    )


def _add_connections(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("connections")
    network.add_argument(
        "--sources",
        default="",
        metavar="LIST",
        help="source addresses in turn: 127.0.1.1-127.0.1.8,10.0.0.1; each has some 28,000 ports "
        "for each target",
    )
    network.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM; default: the system's")
    network.add_argument("--tls-name", metavar="NAME", help="that the certificate must have")
    network.add_argument("--username")
    network.add_argument(
        "--password-file", type=Path, metavar="FILE", help="whose first line is the password"
    )
    network.add_argument(
        "--keep-alive",
        type=int,
        default=DEFAULTS["keep_alive_seconds"],
        metavar="SECONDS",
        help="0: none (%(default)s)",
    )
    network.add_argument(
        "--session-expiry",
        type=int,
        metavar="SECONDS",
        help="keep sessions so long, and resume them (clean start 0); default: clean start",
    )
    network.add_argument(
        "--connect-timeout",
        type=float,
        default=DEFAULTS["connect_timeout_seconds"],
        metavar="SECONDS",
        help="until CONNACK (%(default)g)",
    )
    network.add_argument(
        "--max-connecting",
        type=int,
        default=DEFAULTS["max_connecting"],
        metavar="N",
        help="at once (%(default)s)",
    )


def _add_devices(parser: argparse.ArgumentParser) -> None:
    devices = parser.add_argument_group("devices")
    devices.add_argument(
        "--first-number",
        type=int,
        default=DEFAULTS["first_number"],
        metavar="N",
        help="number of the first device: processes need ranges of their own (%(default)s)",
    )
    devices.add_argument(
        "--client-id",
        default=DEFAULTS["client_id"],
        metavar="TEMPLATE",
        help="with {number} (%(default)s)",
    )
    devices.add_argument(
        "--topic",
        default=DEFAULTS["topic"],
        metavar="TEMPLATE",
        help="with {client_id} (%(default)s)",
    )
    devices.add_argument("--qos", type=int, choices=(0, 1), default=DEFAULTS["qos"])
    devices.add_argument(
        "--max-in-flight",
        type=int,
        default=DEFAULTS["max_in_flight"],
        metavar="N",
        help="publishes of one device without an answer (%(default)s)",
    )
    devices.add_argument(
        "--drain",
        type=float,
        default=DEFAULTS["drain_seconds"],
        metavar="SECONDS",
        help="wait for answers at the end (%(default)g)",
    )


def _add_documents(parser: argparse.ArgumentParser) -> None:
    documents = parser.add_argument_group("documents")
    documents.add_argument(
        "--families",
        default=",".join(DEFAULTS["families"]),
        metavar="LIST",
        help=f"of {', '.join(NAMES)}, leaves:COUNT[:BYTES] (%(default)s)",
    )
    documents.add_argument(
        "--alone",
        action="store_true",
        help="no service subscribes: a PUBACK that says so is a success too",
    )
    documents.add_argument(
        "--seed", type=int, default=DEFAULTS["seed"], metavar="N", help="%(default)s"
    )
    documents.add_argument(
        "--trail",
        action="store_true",
        help="a leaf in each document that no other writes, so that `check` finds each",
    )
    documents.add_argument(
        "--replay", type=Path, metavar="FILE", help="a recording instead; see `record`"
    )
    documents.add_argument(
        "--as-recorded",
        action="store_true",
        help="publish when the recording says so, not at --publish-rate",
    )


def options_of(given: argparse.Namespace) -> Options:
    """Return the options that the command line asks for; raises BadOption."""
    if given.shape is not None:
        shape = Shape.parse(given.shape)
    else:
        shape = Shape.steady(given.connections, given.publish_rate, given.seconds or float("inf"))
    backoff = BACKOFFS[given.backoff]
    if given.backoff_max is not None:
        backoff = dataclasses.replace(backoff, most_seconds=given.backoff_max)
    options = Options(
        targets=tuple(map(Endpoint.parse, given.targets)),
        shape=shape,
        max_connections=given.connections if given.control else 0,
        connect_rate=given.connect_rate,
        connect_rate_decay=given.connect_rate_decay,
        connect_timeout_seconds=given.connect_timeout,
        max_connecting=given.max_connecting,
        backoff=backoff,
        sources=parse_sources(given.sources),
        tls_ca=given.tls_ca,
        tls_name=given.tls_name,
        client_id=given.client_id,
        first_number=given.first_number,
        topic=given.topic,
        username=given.username,
        password=password_of(given.password_file),
        keep_alive_seconds=given.keep_alive,
        clean_start=given.session_expiry is None,
        session_expiry_seconds=given.session_expiry or 0,
        families=tuple(filter(None, given.families.split(","))),
        seed=given.seed,
        trail=given.trail,
        replay=given.replay,
        as_recorded=given.as_recorded,
        alone=given.alone,
        qos=given.qos,
        max_in_flight=given.max_in_flight,
        watch=given.watch,
        drain_seconds=given.drain,
        journal=given.journal,
    )
    options.check()
    return options


def password_of(path: Path | None) -> bytes | None:
    """Return the first line of `--password-file`; None: it is not given. Raises BadOption."""
    if path is None:
        return None
    try:
        return path.read_bytes().partition(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise BadOption(f"--password-file {path}: {error.strerror}") from None
