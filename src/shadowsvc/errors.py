"""The one tree of errors.

Lives here: every exception that crosses a room's border. Rules: the class says what to do about it,
so that nobody looks at texts; a message names the setting to change where there is one. Drivers'
own exceptions are mapped once, at the border of `mqtt` and `store`, and nowhere else. Must not
come in: handling of errors, and anything that imports a driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ConfigError",
    "ConnectionLost",
    "CredentialsUnusable",
    "HaproxyFailed",
    "KubernetesUnavailable",
    "MqttError",
    "MqttRefused",
    "PauseFailed",
    "ProtocolViolation",
    "Refused",
    "Rejected",
    "SchemaBehind",
    "SchemaConflict",
    "ShadowsvcError",
    "StoreError",
    "StoreRefused",
    "StoreUnavailable",
]


class ShadowsvcError(Exception):
    """Root of everything that shadowsvc raises on purpose."""


class ConfigError(ShadowsvcError):
    """The configuration has mistakes; `mistakes` holds one line for each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        """Keep the lines as they are to be printed."""
        self.mistakes = list(mistakes)
        super().__init__("\n".join(self.mistakes))


class CredentialsUnusable(ShadowsvcError):
    """Files with certificates or passwords can't be used as they are; never quotes a secret."""


class KubernetesUnavailable(ShadowsvcError):
    """The Kubernetes API did not do what was asked; `reason` is a bounded metric label."""

    def __init__(self, reason: str, message: str) -> None:
        """Make the error."""
        self.reason = reason
        super().__init__(message)


class Refused(ShadowsvcError):
    """A configuration of HAProxy can't be used; `by`, a label, is `template` or `haproxy`."""

    def __init__(self, by: str, message: str) -> None:
        """Make the error."""
        self.by = by
        super().__init__(message)


class HaproxyFailed(ShadowsvcError):
    """HAProxy is not there, or did not do what it was told."""


class Rejected(ShadowsvcError):
    """A message can never become an update: it goes to the dead letters.

    `reason` is one of `shadowsvc.shadow.document.REASONS` (bounded: it is a metric label);
    `detail` is for people and may quote limits, never a payload; `time_us` is the time that the
    message claimed, in microseconds since 1970, where that was understood.
    """

    def __init__(self, reason: str, detail: str, time_us: int | None = None) -> None:
        """Make the rejection."""
        self.reason = reason
        self.time_us = time_us
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class StoreError(ShadowsvcError):
    """Cassandra did not do what was asked; `kind` is a bounded metric label."""

    overload = False
    doubtful = False

    def __init__(self, kind: str, message: str) -> None:
        """Make the error."""
        self.kind = kind
        super().__init__(message)


class StoreUnavailable(StoreError):
    """An outage of any kind, schema, grants and login included: retry for ever.

    `overload` tells that Cassandra or the driver has too much to do; `doubtful` that it may be
    the request's own doing, which no answer tells.
    """

    def __init__(
        self, kind: str, message: str, *, overload: bool = False, doubtful: bool = False
    ) -> None:
        """Make the error."""
        self.overload = overload
        self.doubtful = doubtful
        super().__init__(kind, message)


class StoreRefused(StoreError):
    """The request itself was refused and may never succeed: find the culprit."""


class SchemaBehind(StoreError):
    """The keyspace is absent or older than this release needs: run `shadowsvc migrate`."""

    def __init__(self, message: str) -> None:
        """Make the error."""
        super().__init__("schema_behind", message)


class SchemaConflict(StoreError):
    """What was applied to the keyspace is not what this release ships (checksum, gap)."""

    def __init__(self, message: str) -> None:
        """Make the error."""
        super().__init__("schema_conflict", message)


class MqttError(ShadowsvcError):
    """The connection to the broker ended or never came up; `reason` is a bounded metric label."""

    def __init__(self, reason: str, message: str) -> None:
        """Make the error."""
        self.reason = reason
        super().__init__(message)


class ConnectionLost(MqttError):
    """The network, the broker or a keep-alive ended the connection."""


class MqttRefused(MqttError):
    """The broker answered CONNECT or SUBSCRIBE with a refusal (MQTT 5 §3.2.2.2, §3.9.3)."""


class PauseFailed(ShadowsvcError):
    """A service that was asked to pause, or to come back, did not do so or did not answer."""


class ProtocolViolation(MqttError):
    """The broker sent what MQTT 5 forbids; `code` is the DISCONNECT reason code to answer with."""

    def __init__(self, code: int, message: str) -> None:
        """Make the error; `code` as in MQTT 5 §3.14.2.1."""
        self.code = code
        super().__init__("protocol_error", message)
