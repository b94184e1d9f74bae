"""What can be set beside Locust's own options: command line, environment, page.

Lives here: the arguments, and `Plan`, what they say once they were checked. Rules: they have the
names and meanings of the lean driver's (`load.options`) where it has the same; each can come from
the variable that `--help` names, so that a container needs no command line; a master hands its own
to the workers, so they are given once. Must not come in: Locust, gevent.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from load.arguments import DEFAULTS, password_of
from load.backoff import BACKOFFS
from load.endpoints import Endpoint, parse_sources
from load.errors import BadOption
from load.options import Options
from load.shapes import Shape

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

__all__ = ["Plan", "add_arguments", "shape_of", "targets_of"]

_NO_SHAPE: Final = Shape(())


@dataclass(frozen=True, slots=True)
class Plan:
    """A run, as every process of it sees it. What the shape says is the whole rig's."""

    options: Options
    """What one device does; `connect_rate` and `watch` are a process's."""
    shape: Shape | None
    """None: Locust's own users and spawn rate."""
    interval_seconds: float
    """Between two publishes of a device where no shape says it, above 0; infinite: none."""
    devices_per_worker: int
    """Numbers that each process has for its devices, 1 or more."""
    passwords: Mapping[str, bytes]
    """By client id."""

    @classmethod
    def of(cls, host: str | None, given: Mapping[str, Any]) -> Self:
        """Return what these values, by the arguments' names, mean.

        Args:
            host: URLs joined by commas, as `--host` has them.
            given: as argparse, or Locust's page, hands them over.

        Raises:
            BadOption: one makes no sense; the message names it.
        """
        names = tuple(one.strip() for one in _text(given, "families").split(",") if one.strip())
        backoff = _text(given, "backoff")
        if backoff not in BACKOFFS:
            raise BadOption(f"--backoff {backoff!r}: one of {', '.join(BACKOFFS)}")
        options = Options(
            targets=targets_of(host),
            shape=shape_of(_text(given, "shape")) or _NO_SHAPE,
            connect_rate=float(given["connect_rate"]),
            connect_rate_decay=float(given["connect_rate_decay"]),
            connect_timeout_seconds=float(given["connect_timeout"]),
            max_connecting=int(given["max_connecting"]),
            backoff=dataclasses.replace(
                BACKOFFS[backoff], most_seconds=float(given["backoff_max"])
            ),
            sources=parse_sources(_text(given, "sources")),
            tls_ca=_path(given, "tls_ca"),
            tls_name=_text(given, "tls_name") or None,
            client_id=_text(given, "client_id"),
            first_number=int(given["first_number"]),
            topic=_text(given, "topic"),
            username=_text(given, "username") or None,
            password=password_of(_path(given, "password_file")),
            keep_alive_seconds=int(given["keep_alive"]),
            clean_start=not int(given["session_expiry"]),
            session_expiry_seconds=int(given["session_expiry"]),
            families=names,
            seed=int(given["seed"]),
            trail=bool(given["trail"]),
            replay=_path(given, "replay"),
            qos=int(given["qos"]),
            max_in_flight=int(given["max_in_flight"]),
            watch=int(given["watch"]),
            journal=_path(given, "journal"),
        )
        options.check()
        interval = float(given["interval"])
        per_worker = int(given["devices_per_worker"])
        if not interval >= 0 or per_worker < 1:
            raise BadOption("--interval: 0 or more; --devices-per-worker: 1 or more")
        return cls(
            options=options,
            shape=shape_of(_text(given, "shape")),
            interval_seconds=interval or math.inf,
            devices_per_worker=per_worker,
            passwords=_passwords(_path(given, "passwords")),
        )


def targets_of(host: str | None) -> tuple[Endpoint, ...]:
    """Read `--host`: URLs joined by commas.

    Raises:
        BadOption: none, or one that is not understood.
    """
    urls = [one.strip() for one in (host or "").split(",") if one.strip()]
    if not urls:
        raise BadOption("no target: --host ws://HOST:PORT/mqtt (or wss, mqtt, mqtts)")
    return tuple(Endpoint.parse(url) for url in urls)


def shape_of(text: str) -> Shape | None:
    """Read `--shape`; None if there is none. Raises BadOption."""
    return Shape.parse(text) if text else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all of them, in groups, to a parser of configargparse, as Locust's is."""
    group = parser.add_argument_group(
        "load", "How devices come, go, and come back. --host names the targets, joined by commas."
    )
    _add(
        group,
        "--shape",
        "",
        "TEXT",
        "stages, joined by commas, in place of --users and "
        "--spawn-rate: ramp:SECONDS:CONNECTIONS[:RATE], plateau:SECONDS[:RATE], "
        "storm:SECONDS:SHARE[:RATE], drain:SECONDS",
    )
    _add(
        group,
        "--interval",
        10.0,
        "SECONDS",
        "between two updates of a device; 0: none. A shape that says rates has its own",
    )
    _add(
        group,
        "--connect-rate",
        DEFAULTS["connect_rate"],
        "RATE",
        "connects a second of each process at most",
    )
    _add(
        group,
        "--connect-rate-decay",
        DEFAULTS["connect_rate_decay"],
        "FACTOR",
        "of the connect rate after each second in which a tenth of the connects failed; 1: none",
    )
    _add(
        group,
        "--connect-timeout",
        DEFAULTS["connect_timeout_seconds"],
        "SECONDS",
        "for each step of connecting",
    )
    _add(
        group,
        "--max-connecting",
        DEFAULTS["max_connecting"],
        "N",
        "devices of a process that connect at the same time",
    )
    _add(
        group,
        "--backoff",
        DEFAULTS["backoff"].name,
        "NAME",
        "a device's wait before it connects again: " + ", ".join(BACKOFFS),
    )
    _add(
        group,
        "--backoff-max",
        DEFAULTS["backoff"].most_seconds,
        "SECONDS",
        "longest wait of a device",
    )
    _add(
        group,
        "--sources",
        "",
        "ADDRESSES",
        "local addresses to connect from, in turn: 127.0.0.2-127.0.0.9,10.0.0.1",
    )
    _add(
        group,
        "--tls-ca",
        "",
        "FILE",
        "PEM file of who signs the targets' certificates; the system's without it",
    )
    _add(group, "--tls-name", "", "NAME", "name in the certificates; the target's without it")

    group = parser.add_argument_group("devices", "Who they are and what they publish.")
    _add(group, "--client-id", DEFAULTS["client_id"], "TEMPLATE", "of a device")
    _add(group, "--topic", DEFAULTS["topic"], "TEMPLATE", "where it publishes")
    _add(group, "--first-number", DEFAULTS["first_number"], "N", "number of the first device")
    _add(
        group,
        "--devices-per-worker",
        20_000,
        "N",
        "numbers of each process: worker 3 begins with FIRST + 3 times N",
    )
    _add(
        group,
        "--families",
        ",".join(DEFAULTS["families"]),
        "NAMES",
        "of devices, in turn; also leaves:COUNT[:BYTES]",
    )
    _add(group, "--seed", DEFAULTS["seed"], "N", "of all chance in what is published")
    _add(
        group,
        "--trail",
        False,
        "",
        "each update also writes a leaf that no other writes, so that "
        "a check finds every single one",
    )
    _add(group, "--replay", "", "FILE", "a recording in place of the families")
    _add(group, "--qos", DEFAULTS["qos"], "0|1", "of updates; 0 is never acknowledged")
    _add(
        group,
        "--max-in-flight",
        DEFAULTS["max_in_flight"],
        "N",
        "updates of a device without an answer",
    )
    _add(
        group, "--keep-alive", DEFAULTS["keep_alive_seconds"], "SECONDS", "of a connection; 0: none"
    )
    _add(
        group,
        "--session-expiry",
        0,
        "SECONDS",
        "above 0: sessions outlive their connections so long, and are resumed",
    )
    _add(group, "--username", "", "TEMPLATE", "login of a device; may hold {client_id}")
    _add(group, "--password-file", "", "FILE", "whose first line is the password of all devices")
    _add(group, "--passwords", "", "FILE", "lines CLIENT-ID:PASSWORD, a device's own")

    group = parser.add_argument_group("measuring", "Beside what Locust measures.")
    _add(
        group,
        "--watch",
        10,
        "N",
        "devices of each process and transport that subscribe to their own updates: "
        "they measure subscribe and publish to subscriber",
    )
    _add(
        group,
        "--journal",
        "",
        "FILE",
        "every acknowledged update, for `scripts/load check`; a worker adds its number to the name",
    )
    _add(
        group,
        "--observe",
        "",
        "HOST:PORT",
        "the service's broker (plain MQTT): measures publish to durable, by a proxy before it that "
        "the service has to connect to",
    )
    _add(group, "--observe-port", 18_830, "PORT", "of that proxy, on 127.0.0.1; 0: any")


def _add(group: Any, name: str, default: Any, metavar: str, text: str) -> None:
    variable = "LOAD_" + name.removeprefix("--").upper().replace("-", "_")
    fields: dict[str, Any] = {"default": default, "help": text, "env_var": variable}
    if isinstance(default, bool):
        fields["action"] = "store_true"
    else:
        fields |= {"type": type(default), "metavar": metavar}
    action = group.add_argument(name, **fields)
    # What Locust's parser sets on the arguments that it shows on its page, and not on a group's.
    action.include_in_web_ui = True
    action.is_secret = action.is_required = action.is_multiple = False


def _text(given: Mapping[str, Any], name: str) -> str:
    return str(given[name] or "").strip()


def _path(given: Mapping[str, Any], name: str) -> Path | None:
    text = _text(given, name)
    return Path(text) if text else None


def _passwords(path: Path | None) -> dict[str, bytes]:
    if path is None:
        return {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadOption(f"--passwords {path}: {error.strerror}") from None
    found = (line.partition(b":") for line in lines if line.strip())
    return {name.decode(errors="replace"): password for name, _, password in found}
