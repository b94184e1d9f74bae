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
    "schema_behind": "the keyspace is absent or older than this release: run `shadowsvc migrate`; "
    "or it is not this release's, as the detail says then",
    "not_subscribed": "the shared subscription is not joined",
    "no_slot": "no slot, and so no client id, is to be had",
    "isolated": "no write succeeded for too long: the broker was left until one does",
    "clock_skew": "this machine's clock and Cassandra's are more than 30 s apart",
    "draining": "the service is stopping",
    "paused": "the service has left the broker for a while, as it was told",
    "canary_lost": "updates of the canary are published and do not become durable",
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
        self.broker_error: Callable[[], str | None] = lambda: None
        """What ended the last connection to the broker, or kept it from being made."""
        self.broker_credentials: Callable[[], str | None] = lambda: None
        """Why changed certificates or passwords are not in use."""
        self.store_credentials: Callable[[], str | None] = lambda: None
        """Likewise, for Cassandra."""
        self.slot_wait: Callable[[], str | None] = lambda: None
        """Why there is no slot to connect by, while one is waited for."""
        self.isolation: Callable[[], str | None] = lambda: None
        """For how long the service is isolated, while it is."""
        self.adopted: Pipeline | None = None
        """The pipeline of adoptions, if there is one: it too may be wedged."""
        self.pause: Callable[[], str | None] = lambda: None
        """How far a pause is, while there is one."""
        self.canary_lost: str | None = None
        """For how long no update of the canary became durable, when that is too long."""

    def live(self) -> tuple[bool, str]:
        """Whether a restart would not help, and why it would."""
        for pipeline in (self.pipeline, self.adopted):
            wedged = None if pipeline is None else pipeline.wedged(self._now())
            if wedged is not None:
                return False, wedged
        return True, "ok"

    @property
    def started(self) -> bool:
        """Whether the supervisors run."""
        return self.pipeline is not None

    @property
    def can_write(self) -> bool:
        """Whether nothing is known against writing to Cassandra."""
        pipeline = self.pipeline
        known = (self.store_error, self.schema_error, pipeline and pipeline.failing)
        return self.store_connected and pipeline is not None and not any(known)

    @property
    def away(self) -> bool:
        """Whether the service keeps away from the broker on purpose."""
        return self.pause() is not None or self.isolation() is not None

    @property
    def ready(self) -> bool:
        """Whether there is no reason not to be."""
        return not self.reasons()

    @property
    def by_reason(self) -> dict[str, bool]:
        """Of every reason not to be ready, whether it holds."""
        now = {reason["reason"] for reason in self.reasons()}
        return {name: name in now for name in REASONS}

    def ready_but_for(self, name: str) -> bool:
        """Whether there is no reason not to be, or this one alone."""
        return all(reason["reason"] == name for reason in self.reasons())

    def reasons(self) -> list[dict[str, str]]:  # noqa: C901 - a list
        """Every reason not to be ready: its name, its meaning, and details where there are any."""
        pipeline = self.pipeline
        if pipeline is None:
            return [_reason("starting")]
        reasons = []
        error = self.store_error or pipeline.failing
        if self.schema_error is not None:
            reasons.append(_reason("schema_behind", self.schema_error))
        elif error is not None or not self.store_connected:
            reasons.append(_reason("cassandra_unavailable", _both(error, self.store_credentials())))
        paused = self.pause()
        if not pipeline.subscribed and paused is None:
            reasons.append(
                _reason("not_subscribed", _both(self.broker_error(), self.broker_credentials()))
            )
        if (why_none := self.slot_wait()) is not None:
            reasons.append(_reason("no_slot", why_none))
        if (apart := self.isolation()) is not None:
            reasons.append(_reason("isolated", apart))
        if abs(self.clock_offset_seconds) > MAX_CLOCK_OFFSET_SECONDS:
            reasons.append(_reason("clock_skew", f"{self.clock_offset_seconds:.1f} s"))
        if paused is not None:
            reasons.append(_reason("paused", paused))
        elif pipeline.draining:
            reasons.append(_reason("draining"))
        if self.canary_lost is not None:
            reasons.append(_reason("canary_lost", self.canary_lost))
        live, why = self.live()
        if not live:
            reasons.append(_reason("wedged", why))
        return reasons


def _both(error: str | None, credentials: str | None) -> str | None:
    if credentials is None or credentials == error:
        return error
    return f"{error or 'not connected'}; credentials: {credentials}"


def _reason(name: str, detail: str | None = None) -> dict[str, str]:
    reason = {"reason": name, "meaning": REASONS[name]}
    if detail:
        reason["detail"] = detail
    return reason
