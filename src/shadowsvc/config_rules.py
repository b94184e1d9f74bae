"""The rules between settings.

Lives here: what one setting asks of another, and of the files that settings name; what a command
needs besides; what is allowed but hardly wanted. Rules: a broken rule says which settings it
speaks of, so that it keeps quiet when one of them is wrong in itself. Must not come in: where
values come from (`shadowsvc.config`), rules of one setting alone (`shadowsvc.settings`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shadowsvc.settings import variable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shadowsvc.settings import Cassandra, Mqtt, Settings

__all__ = [
    "DEAD_LETTER_PAYLOAD_BYTES",
    "Broken",
    "advice",
    "broken_rules",
    "require_for_run",
    "worst_case_held_bytes",
]

DEAD_LETTER_PAYLOAD_BYTES = 65_536
"""What a dead letter keeps of a payload."""

_PACKET_OVERHEAD_BYTES = 66_000  # the longest topic (65,535 bytes), the header and some properties


class Broken(NamedTuple):
    """A broken rule."""

    variable: str
    """The variable to change."""
    problem: str
    others: tuple[str, ...] = ()
    """Other variables that the rule speaks of."""


def broken_rules(settings: Settings) -> Iterator[Broken]:
    """Yield every rule between settings that is broken. Opens the files that settings name."""
    mqtt, cassandra = settings.mqtt, settings.cassandra
    url, tls = variable("mqtt", "url"), variable("cassandra", "tls")
    yield from _files("mqtt", mqtt)
    yield from _files("cassandra", cassandra)
    if not mqtt.tls:
        yield from _useless_files("mqtt", mqtt, f"{url} starts with mqtt://", url)
    if not cassandra.tls:
        yield from _useless_files("cassandra", cassandra, f"{tls} is false", tls)
    for section, name, low, high in (
        ("mqtt", "reconnect", mqtt.reconnect_min_seconds, mqtt.reconnect_max_seconds),
        ("cassandra", "retry", cassandra.retry_min_seconds, cassandra.retry_max_seconds),
    ):
        if low > high:
            other = variable(section, f"{name}_max_seconds")
            problem = f"it is above {other}, which is {high:g}"
            yield Broken(variable(section, f"{name}_min_seconds"), problem, (other,))
    payload = settings.shadow.max_payload_bytes
    for limited, limit in (
        (variable("mqtt", "maximum_packet_size_bytes"), mqtt.maximum_packet_size_bytes),
        (variable("limits", "max_held_bytes"), settings.limits.max_held_bytes),
    ):
        if limit < payload:
            other = variable("shadow", "max_payload_bytes")
            yield Broken(limited, f"it is below {other}, which is {payload}", (other,))
    yield from _pair("cassandra", cassandra, "username", "password")


def _files(section: str, branch: Mqtt | Cassandra) -> Iterator[Broken]:
    for name in ("ca_file", "certificate_file", "key_file"):
        file: Path | None = getattr(branch, name)
        if file is not None:
            try:
                with file.open("rb") as stream:
                    stream.read(1)
            except OSError as error:
                yield Broken(variable(section, name), reason(error))
    yield from _pair(section, branch, "certificate_file", "key_file")


def _useless_files(
    section: str, branch: Mqtt | Cassandra, because: str, switch: str
) -> Iterator[Broken]:
    for name in ("ca_file", "certificate_file", "key_file"):
        if getattr(branch, name) is not None:
            problem = f"it does nothing without TLS, and {because}"
            yield Broken(variable(section, name), problem, (switch,))


def _pair(section: str, branch: Mqtt | Cassandra, first: str, second: str) -> Iterator[Broken]:
    for name, other in ((first, second), (second, first)):
        if getattr(branch, name) is not None and getattr(branch, other) is None:
            missing = variable(section, other)
            yield Broken(variable(section, name), f"{missing} is missing beside it", (missing,))


def reason(error: OSError) -> str:
    """Return the system's words for an error, without the path."""
    return (error.strerror or "it cannot be read").lower()


def require_for_run(settings: Settings) -> list[str]:
    """Return one line for each setting that `shadowsvc run` needs besides and that is missing."""
    missing = []
    if not settings.mqtt.client_id:
        missing.append(
            f"{variable('mqtt', 'client_id')}: not given; `run` needs it; allowed: a name that "
            "stays the same after a restart and differs for each process"
        )
    if not settings.cassandra.local_dc:
        missing.append(
            f"{variable('cassandra', 'local_dc')}: not given; `run` needs it; allowed: the name of "
            "a data centre as `nodetool status` shows it"
        )
    return missing


def worst_case_held_bytes(settings: Settings) -> int:
    """Return the payload bytes that QoS 1 alone can hold: Receive Maximum full of the largest.

    A message becomes an update of at most `shadow.max_payload_bytes` or a dead letter, which
    keeps at most 64 KiB.
    """
    largest = max(settings.shadow.max_payload_bytes, DEAD_LETTER_PAYLOAD_BYTES)
    return settings.mqtt.receive_maximum * largest


def advice(settings: Settings) -> list[str]:
    """Return one line for each setting that is allowed but hardly wanted."""
    lines = []
    packet = settings.mqtt.maximum_packet_size_bytes
    wanted = settings.shadow.max_payload_bytes + _PACKET_OVERHEAD_BYTES
    if packet < wanted:
        lines.append(
            f"{variable('mqtt', 'maximum_packet_size_bytes')}: {packet} leaves no room for the "
            "longest topic and the properties beside the largest payload; the broker discards what "
            f"is larger without a word; better: {wanted} or more"
        )
    worst = worst_case_held_bytes(settings)
    if worst > settings.limits.max_held_bytes:
        lines.append(
            f"{variable('limits', 'max_held_bytes')}: {settings.limits.max_held_bytes} is less "
            f"than the {worst} bytes that {settings.mqtt.receive_maximum} messages of the largest "
            f"size make; raise it, or lower {variable('mqtt', 'receive_maximum')}"
        )
    if settings.cassandra.consistency in {"ONE", "LOCAL_ONE"}:
        lines.append(
            f"{variable('cassandra', 'consistency')}: with {settings.cassandra.consistency} an "
            "acknowledged update is lost with the one node that has it; better: LOCAL_QUORUM"
        )
    return lines
