"""What a lean run shall do.

Lives here: `Options` and the check that they make sense. Rules: a figure is the whole of this
process; whoever runs several divides before. Must not come in: the command line, which stands in
`command`.
"""

from __future__ import annotations

import math
import resource
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from load.backoff import BACKOFFS, Backoff
from load.errors import BadOption
from load.families import NAMES, Mix, Source
from load.replay import Replay

if TYPE_CHECKING:
    from pathlib import Path

    from load.endpoints import Endpoint
    from load.shapes import Shape

__all__ = ["Options"]

_SPARE_DESCRIPTORS: Final = 64
_MAX_KEEP_ALIVE_SECONDS: Final = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One process's part of a load."""

    targets: tuple[Endpoint, ...]
    """In turn; at least one."""
    shape: Shape
    """How many connections and publishes, when."""
    max_connections: int = 0
    """Devices that are made at the start; 0: as many as the shape needs."""
    connect_rate: float = 200.0
    """Connects a second at most, above 0; it decays when they fail, see `backoff.ConnectRate`."""
    connect_rate_decay: float = 0.5
    """Factor after a second with failures, above 0; 1: no decay."""
    connect_timeout_seconds: float = 30.0
    """Until CONNACK."""
    max_connecting: int = 500
    """At once."""
    backoff: Backoff = BACKOFFS["full-jitter"]
    """A device's wait before it connects again."""
    sources: tuple[str, ...] = ()
    """Source addresses, in turn; none: the kernel's choice."""
    tls_ca: Path | None = None
    """PEM file that a TLS target's certificate is checked against; None: the system's."""
    tls_name: str | None = None
    """Name that the certificate must have; None: the target's host."""
    client_id: str = "load-{number:07d}"
    first_number: int = 0
    """Number of the first device: processes that share a load have ranges of their own."""
    topic: str = "things/{client_id}/shadow/update"
    username: str | None = None
    password: bytes | None = field(default=None, repr=False)
    keep_alive_seconds: int = 60
    """0: none."""
    clean_start: bool = True
    session_expiry_seconds: int = 0
    families: tuple[str, ...] = NAMES[:4]
    """See `families.Family`."""
    seed: int = 1
    trail: bool = False
    """Whether each document writes a leaf that no other writes."""
    replay: Path | None = None
    """A recording in place of the families."""
    as_recorded: bool = False
    """Publish when the recording says so, not at the shape's rate."""
    alone: bool = False
    """No service is there: a publish that the broker took without a subscriber is a success."""
    qos: int = 1
    """0 or 1. Nothing acknowledges QoS 0."""
    max_in_flight: int = 8
    """Publishes of one device without an answer."""
    watch: int = 0
    """Devices whose updates a subscriber of the rig's reads, for publish-to-subscriber latency."""
    drain_seconds: float = 10.0
    """Wait for answers at the end."""
    journal: Path | None = None
    """File that gets every acknowledged publish, for `check`."""

    def check(self) -> None:
        """Raise BadOption with one line for each option that makes no sense."""
        share = "0 < DECAY <= 1"
        checks = [
            (bool(self.targets), "at least one target"),
            (
                all(
                    stage.connections >= 0 and 0 <= stage.publish_rate < math.inf
                    for stage in self.shape.stages
                ),
                "--connections, --publish-rate: 0 or more",
            ),
            (0 < self.connect_rate < math.inf, f"--connect-rate {self.connect_rate:g}: above 0"),
            (0 < self.connect_rate_decay <= 1, f"--connect-rate-decay: {share}"),
            (self.connect_timeout_seconds > 0, "--connect-timeout: above 0"),
            (self.max_connecting >= 1, "--max-connecting: 1 or more"),
            (self.max_in_flight >= 1, "--max-in-flight: 1 or more"),
            (self.first_number >= 0, "--first-number: 0 or more"),
            (self.qos in (0, 1), f"--qos {self.qos}: 0 or 1"),
            (self.watch >= 0, "--watch: 0 or more"),
            (
                0 <= self.keep_alive_seconds <= _MAX_KEEP_ALIVE_SECONDS,
                f"--keep-alive {self.keep_alive_seconds}: 0 to {_MAX_KEEP_ALIVE_SECONDS}",
            ),
            (_fills(self.client_id, number=1), f"--client-id {self.client_id!r}: needs {{number}}"),
            (
                "{client_id}" in self.topic and _fills(self.topic, client_id="x"),
                f"--topic {self.topic!r}: needs {{client_id}}",
            ),
            (not self.as_recorded or self.replay is not None, "--as-recorded needs --replay"),
        ]
        mistakes = [text for good, text in checks if not good]
        if mistakes:
            raise BadOption("; ".join(mistakes))

    @property
    def connections(self) -> int:
        """Devices that this run needs."""
        return max(self.max_connections, self.shape.most_connections)

    def source(self) -> Source:
        """Return where documents come from; raises BadOption."""
        if self.replay is not None:
            return Replay.load(self.replay, trail=self.trail)
        return Mix(self.families, seed=self.seed, trail=self.trail)

    def tls(self) -> ssl.SSLContext | None:
        """Return what checks the targets' certificates; None: no target has one.

        Raises:
            BadOption: the authorities can't be read.
        """
        if not any(target.tls for target in self.targets):
            return None
        try:
            return ssl.create_default_context(cafile=self.tls_ca)
        except OSError as error:  # SSLError is one
            raise BadOption(f"--tls-ca {self.tls_ca}: {error}") from None

    def raise_descriptor_limit(self) -> None:
        """Lift this process's limit of descriptors as far as it needs and may.

        Raises:
            BadOption: the connections do not fit below the limit that the process has.
        """
        needed = self.connections + _SPARE_DESCRIPTORS
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= needed:
            return
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise BadOption(
                f"{self.connections} connections need {needed} descriptors and this process may "
                f"have {hard}: run several processes with --first-number, or raise `ulimit -n`"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _fills(template: str, **values: object) -> bool:
    try:
        return template.format(**values) != template
    except (KeyError, ValueError, IndexError):
        return False
