"""When a device that lost its connection tries again, and how many a second may try at all.

Lives here: `Backoff`, a device's own wait after each failure, and `ConnectRate`, the pace of a
rig's (or of an ingress's) connects, which decays when connects fail. Both are pure: the caller
gives time and chance, so the same policies run in the rig and in the simulation of a storm.

Rules: a wait is drawn evenly between two bounds that depend on the number of failures in a row
alone. Full jitter draws from nothing up to a ceiling that doubles: a fleet that lost its
connections together comes back spread over the whole time. Its ceiling is that of the service's own
waits (`shadowsvc.backoff`). Must not come in: clocks, tasks, devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from load.errors import BadOption
from shadowsvc.backoff import ceiling_seconds

if TYPE_CHECKING:
    from random import Random

__all__ = ["BACKOFFS", "Backoff", "ConnectRate"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a device waits before it connects again.

    `wait_seconds` draws from `bounds`: between `floor_share` of the ceiling and the ceiling, which
    begins with `least_seconds` and doubles up to `most_seconds` if `doubles`.
    """

    name: str
    least_seconds: float = 1.0
    """Ceiling after the first failure, 0 or more."""
    most_seconds: float = 60.0
    doubles: bool = True
    floor_share: float = 0.0
    """0: full jitter; 1: none."""

    def bounds(self, failures: int) -> tuple[float, float]:
        """Return the range of the wait after `failures` failures in a row (1 or more), seconds.

        The loss of a connection that stood counts as the first failure.
        """
        if self.doubles:
            ceiling = ceiling_seconds(failures, self.least_seconds, self.most_seconds)
        else:
            ceiling = min(self.least_seconds, self.most_seconds)
        return ceiling * self.floor_share, ceiling

    def wait_seconds(self, failures: int, random: Random) -> float:
        """Draw a wait, seconds."""
        low, high = self.bounds(failures)
        return low + (high - low) * random.random()


BACKOFFS: Final = {
    policy.name: policy
    for policy in (
        Backoff("none", least_seconds=0.0, most_seconds=0.0, doubles=False, floor_share=1.0),
        Backoff("fixed", least_seconds=5.0, doubles=False, floor_share=1.0),
        Backoff("fixed-jitter", least_seconds=10.0, doubles=False),
        Backoff("exponential", floor_share=1.0),
        Backoff("equal-jitter", floor_share=0.5),
        Backoff("full-jitter"),
    )
}
"""By name. `none`: at once; `fixed`: 5 s; `fixed-jitter`: 0 to 10 s; `exponential`: 1 s, doubled up
to 60 s, no jitter; `equal-jitter`: the upper half of that; `full-jitter`: all of it."""


class ConnectRate:
    """How many connects may begin: a bucket of tokens whose rate decays with failures.

    The rate begins at `most_per_second`. When of the connects that ended within a second or more
    at least `failure_share` failed, it is multiplied by `decay`, down to `least_per_second`; each
    second without that adds a tenth of `most_per_second` again. So a storm that a broker refuses
    is slowed down before it grows, and the fleet comes back as fast as it is taken.

    Args:
        most_per_second: above 0.
        least_per_second: a fiftieth of the most when None.
        decay: 0 to 1, 1: never slower.
        failure_share: 0 to 1.

    Raises:
        BadOption: figures out of range.
    """

    __slots__ = (
        "_at",
        "_decay",
        "_failed",
        "_failure_share",
        "_judged_at",
        "_least",
        "_most",
        "_succeeded",
        "_tokens",
        "decays",
        "per_second",
    )

    def __init__(
        self,
        most_per_second: float,
        *,
        least_per_second: float | None = None,
        decay: float = 0.5,
        failure_share: float = 0.1,
    ) -> None:
        least = most_per_second / 50 if least_per_second is None else least_per_second
        if not 0 < least <= most_per_second < math.inf:
            raise BadOption(f"connect rate {most_per_second:g}/s, at least {least:g}/s: above 0")
        if not 0 < decay <= 1:
            raise BadOption(f"decay of the connect rate {decay:g}: above 0, at most 1")
        self._most = most_per_second
        self._least = least
        self._decay = decay
        self._failure_share = failure_share
        self.per_second = most_per_second
        """The rate of now."""
        self.decays = 0
        """How often it was reduced."""
        self._tokens = 0.0
        self._at: float | None = None
        self._judged_at = 0.0
        self._failed = self._succeeded = 0

    def limit(self, most_per_second: float) -> None:
        """Set another `most_per_second`; a decayed rate stays so.

        Raises:
            BadOption: it is not above 0.
        """
        if not 0 < most_per_second < math.inf:
            raise BadOption(f"connect rate {most_per_second:g}/s: above 0")
        if most_per_second != self._most:
            self.per_second = max(
                self._least, min(most_per_second, self.per_second * most_per_second / self._most)
            )
            self._least = min(self._least, most_per_second)
            self._most = most_per_second

    def failed(self) -> None:
        """Note a connect that failed."""
        self._failed += 1

    def succeeded(self) -> None:
        """Note a connect that succeeded."""
        self._succeeded += 1

    def take(self, now: float, wanted: int) -> int:
        """Return how many of `wanted` connects may begin at `now` (seconds of any clock).

        What is not taken is not saved beyond a tenth of a second's worth: no burst after a pause.
        """
        if self._at is None:
            self._at = self._judged_at = now
        elapsed = now - self._at
        self._at = now
        self._judge(now)
        room = max(1.0, self.per_second * 0.1)
        self._tokens = min(self._tokens + elapsed * self.per_second, room)
        taken = min(wanted, int(self._tokens))
        self._tokens -= taken
        return taken

    def _judge(self, now: float) -> None:
        elapsed = now - self._judged_at
        if elapsed < 1.0:
            return
        ended = self._failed + self._succeeded
        if ended and self._failed >= self._failure_share * ended:
            if self._decay < 1 and self.per_second > self._least:
                self.decays += 1
                self.per_second = max(self._least, self.per_second * self._decay)
        else:
            self.per_second = min(self._most, self.per_second + 0.1 * self._most * elapsed)
        self._failed = self._succeeded = 0
        self._judged_at = now
