"""The rules between settings.

Lives here: what one setting asks of another, and of the files that settings name; what a command
needs besides; what is allowed but hardly wanted. Rules: a broken rule says which settings it
speaks of, so that it keeps quiet when one of them is wrong in itself. Must not come in: where
values come from (`shadowsvc.config`), rules of one setting alone (`shadowsvc.settings`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shadowsvc.settings import MAX_CLIENT_ID, variable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shadowsvc.settings import Cassandra, Mqtt, Settings

__all__ = [
    "DEAD_LETTER_PAYLOAD_BYTES",
    "Broken",
    "adopted_receive_maximum",
    "advice",
    "broken_rules",
    "require_for_run",
    "worst_case_held_bytes",
]

DEAD_LETTER_PAYLOAD_BYTES = 65_536
"""What a dead letter keeps of a payload."""

_ADOPTED_RECEIVE_MAXIMUM = 200
_MIN_CANARIES = 2
_MAX_CANARIES = 100
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
        (
            "limits",
            "login_retry",
            settings.limits.login_retry_min_seconds,
            settings.limits.login_retry_max_seconds,
        ),
    ):
        if low > high:
            other = variable(section, f"{name}_max_seconds")
            problem = f"it is above {other}, which is {high:g}"
            yield Broken(variable(section, f"{name}_min_seconds"), problem, (other,))
    if (
        cassandra.min_concurrency > cassandra.concurrency
        and "min_concurrency" in cassandra.model_fields_set
    ):
        other = variable("cassandra", "concurrency")
        problem = f"it is above {other}, which is {cassandra.concurrency}"
        yield Broken(variable("cassandra", "min_concurrency"), problem, (other,))
    if not mqtt.client_id:
        yield from _slots(settings)
    payload = settings.shadow.max_payload_bytes
    for limited, limit in (
        (variable("mqtt", "maximum_packet_size_bytes"), mqtt.maximum_packet_size_bytes),
        (variable("limits", "max_held_bytes"), settings.limits.max_held_bytes),
    ):
        if limit < payload:
            other = variable("shadow", "max_payload_bytes")
            yield Broken(limited, f"it is below {other}, which is {payload}", (other,))
    yield from _pair("cassandra", cassandra, "username", "password")
    yield from _ingress(settings)
    canary = settings.canary
    times = canary.timeout_seconds / canary.interval_seconds
    if not _MIN_CANARIES <= times <= _MAX_CANARIES:
        other = variable("canary", "interval_seconds")
        yield Broken(
            variable("canary", "timeout_seconds"),
            f"it is not {_MIN_CANARIES} to {_MAX_CANARIES} times {other}, which is "
            f"{canary.interval_seconds:g}",
            (other,),
        )


def _slots(settings: Settings) -> Iterator[Broken]:
    slots, group = settings.slots, variable("mqtt", "share_group")
    lease, orphan = variable("slots", "lease_seconds"), variable("slots", "orphan_after_seconds")
    if slots.renew_seconds >= slots.lease_seconds:
        problem = f"it is not below {lease}, which is {slots.lease_seconds}"
        yield Broken(variable("slots", "renew_seconds"), problem, (lease,))
    if slots.orphan_after_seconds <= slots.lease_seconds:
        problem = f"it is not above {lease}, which is {slots.lease_seconds}"
        yield Broken(orphan, problem, (lease,))
    if slots.orphan_after_seconds >= settings.mqtt.session_expiry_seconds:
        other = variable("mqtt", "session_expiry_seconds")
        problem = (
            f"it is not below {other}, which is {settings.mqtt.session_expiry_seconds}: the broker "
            "would drop what waits for an orphan before it is fetched"
        )
        yield Broken(orphan, problem, (other,))
    if f"{slots.marker_topic}/".startswith(f"{settings.mqtt.topic_prefix}/"):
        other = variable("mqtt", "topic_prefix")
        problem = f"it lies below {other}, where devices publish"
        yield Broken(variable("slots", "marker_topic"), problem, (other,))
    longest = f"{settings.mqtt.share_group}-{slots.max_slots - 1}"
    if len(longest) > MAX_CLIENT_ID:
        problem = f"with a number behind it is longer than a client id's {MAX_CLIENT_ID} characters"
        yield Broken(group, problem, (variable("slots", "max_slots"),))


def _ingress(settings: Settings) -> Iterator[Broken]:
    ingress = settings.ingress
    taken: dict[int, str] = {}
    for name in (
        "listen_mqtt",
        "listen_mqtts",
        "listen_websocket",
        "listen_websocket_tls",
        "listen_statistics",
    ):
        port, own = getattr(ingress, name), variable("ingress", name)
        if port in taken:
            yield Broken(own, f"{taken[port]} is the same port", (taken[port],))
        elif port:
            taken[port] = own
    if ingress.source_ports and not ingress.source_addresses:
        other = variable("ingress", "source_addresses")
        problem = f"it does nothing without {other}, which is empty"
        yield Broken(variable("ingress", "source_ports"), problem, (other,))


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
    if not settings.cassandra.local_dc:
        missing.append(
            f"{variable('cassandra', 'local_dc')}: not given; `run` needs it; allowed: the name of "
            "a data centre as `nodetool status` shows it"
        )
    return missing


def adopted_receive_maximum(settings: Settings) -> int:
    """Return how many messages of an adopted session are held at a time.

    0 with a client id of our own: who leases no slot adopts none.
    """
    if settings.mqtt.client_id:
        return 0
    return min(settings.mqtt.receive_maximum, _ADOPTED_RECEIVE_MAXIMUM)


def worst_case_held_bytes(settings: Settings, messages: int | None = None) -> int:
    """Return the payload bytes of so many of the largest messages; None: of the Receive Maximum.

    A message becomes an update of at most `shadow.max_payload_bytes` or a dead letter, which
    keeps at most 64 KiB.
    """
    largest = max(settings.shadow.max_payload_bytes, DEAD_LETTER_PAYLOAD_BYTES)
    return (settings.mqtt.receive_maximum if messages is None else messages) * largest


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
    slots = settings.slots
    if not settings.mqtt.client_id and slots.renew_seconds > slots.lease_seconds / 2:
        lines.append(
            f"{variable('slots', 'renew_seconds')}: with {slots.renew_seconds:g} of "
            f"{slots.lease_seconds} s one renewal that fails costs the slot; better: a third of "
            f"{variable('slots', 'lease_seconds')}"
        )
    if settings.cassandra.consistency in {"ONE", "LOCAL_ONE"}:
        lines.append(
            f"{variable('cassandra', 'consistency')}: with {settings.cassandra.consistency} an "
            "acknowledged update is lost with the one node that has it; better: LOCAL_QUORUM"
        )
    return lines
