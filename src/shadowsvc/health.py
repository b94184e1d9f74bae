"""Health: what the probes answer, and why.

Lives here: the states an operator can meet, each with one sentence. Rules: `/livez` says no only
when a restart would help (the loop is dead, then it can't answer at all, or the pipeline is
wedged), never for a dependency; `/readyz` names every reason that it has; `/startupz` says yes as
soon as the supervisors run, since waiting for a dependency is no reason to be killed. The names
in `REASONS` are quoted by docs/architecture.md, alerts and runbooks. Must not come in: HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowsvc.pipeline import Pipeline

__all__ = ["MAX_CLOCK_OFFSET_SECONDS", "REASONS", "Health"]

MAX_CLOCK_OFFSET_SECONDS: Final = 30.0
"""Clocks further apart than this make times of devices impossible to judge."""

REASONS: Final = {
    "starting": "the service is being built",
    "cassandra_unavailable": "Cassandra can't be reached or does not confirm writes",
    "schema_behind": "the keyspace is older than this release: run `shadowsvc migrate`",
    "not_subscribed": "the shared subscription is not joined",
    "clock_skew": "this machine's clock and Cassandra's are more than 30 s apart",
    "draining": "the service is stopping",
    "wedged": "the pipeline can't go on by itself; a restart is needed",
}
"""Every reason not to be ready."""


class Health:
    """The state that probes ask for; written by `app`, read on the same loop."""

    def __init__(self, now: Callable[[], float]) -> None:
        """Make it in the state `starting`; `now` is the loop's clock, in seconds."""
        self._now = now
        self.pipeline: Pipeline | None = None
        self.store_connected = False
        self.store_error: str | None = None
        self.schema_error: str | None = None
        self.clock_offset_seconds = 0.0
        self.broker_error: str | None = None

    def live(self) -> tuple[bool, str]:
        """Whether a restart would not help, and why it would."""
        if self.pipeline is not None:
            wedged = self.pipeline.wedged(self._now())
            if wedged is not None:
                return False, wedged
        return True, "ok"

    @property
    def started(self) -> bool:
        """Whether the supervisors run."""
        return self.pipeline is not None

    @property
    def ready(self) -> bool:
        """Whether there is no reason not to be."""
        return not self.reasons()

    def reasons(self) -> list[dict[str, str]]:
        """Every reason not to be ready: its name, its meaning, and details where there are any."""
        pipeline = self.pipeline
        if pipeline is None:
            return [_reason("starting")]
        reasons = []
        if self.schema_error is not None:
            reasons.append(_reason("schema_behind", self.schema_error))
        elif not self.store_connected or self.store_error is not None:
            reasons.append(_reason("cassandra_unavailable", self.store_error))
        elif pipeline.failing is not None:
            reasons.append(_reason("cassandra_unavailable", pipeline.failing))
        if not pipeline.subscribed:
            reasons.append(_reason("not_subscribed", self.broker_error))
        if abs(self.clock_offset_seconds) > MAX_CLOCK_OFFSET_SECONDS:
            reasons.append(_reason("clock_skew", f"{self.clock_offset_seconds:.1f} s"))
        if pipeline.draining:
            reasons.append(_reason("draining"))
        live, why = self.live()
        if not live:
            reasons.append(_reason("wedged", why))
        return reasons


def _reason(name: str, detail: str | None = None) -> dict[str, str]:
    reason = {"reason": name, "meaning": REASONS[name]}
    if detail:
        reason["detail"] = detail
    return reason
