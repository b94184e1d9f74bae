"""How often Cassandra is asked to let somebody in.

Lives here: which errors are refused logins, and the wait after each. Rules: pure; whoever logs in
has one pace for one account, whatever the node, since servers lock accounts. Must not come in:
waiting, and how to log in.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from shadowsvc.backoff import login_wait_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LOGIN_KINDS", "LoginPace"]

LOGIN_KINDS: Final = frozenset({"server_bad_credentials", "authentication"})
"""Kinds of `StoreError` that mean a refused login."""


class LoginPace:
    """How long to wait after a refused login: from `minimum` to `maximum` seconds, doubling."""

    def __init__(
        self,
        minimum: float,
        maximum: float,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._draw = draw
        self._refusals = 0

    def refused(self) -> float:
        """Count a refusal; return how long to wait, in seconds."""
        self._refusals += 1
        return login_wait_seconds(self._refusals, self._minimum, self._maximum, self._draw)

    def accepted(self) -> None:
        """Forget what was refused."""
        self._refusals = 0
