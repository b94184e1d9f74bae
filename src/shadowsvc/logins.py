"""Cassandra's session, made anew when credentials change or when it is lost for good.

Lives here: when the session is made anew, and how often a login is tried. Rules: a session that
works is replaced only by one that works; a refused login is tried again after a long wait, since
servers lock accounts, but at once when other credentials come; whoever waits says why. Must not
come in: how a session is made (`shadowsvc.store.cassandra`), where credentials come from
(`shadowsvc.rotation`).

A session is lost for good when the driver closes its pools: it does so after one refused login or
handshake, even if that was a passing fault of the server (measured: acsylla 1.2 with Cassandra 5.0
said `lib_no_hosts_available` for ever, while a new session worked). So a session without hosts for
`LOST_SECONDS` is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from shadowsvc.errors import StoreError
from shadowsvc.login_pace import LOGIN_KINDS, LoginPace

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowsvc.credentials import Credentials
    from shadowsvc.metrics import Metrics

__all__ = ["LOST_SECONDS", "StoreLogin"]

_log = structlog.get_logger(__name__)

LOST_SECONDS: Final = 15.0
"""The driver connects again within 2 s of a node's return; then this is no outage that passes."""

_NO_HOSTS: Final = "lib_no_hosts_available"
_CHECK_SECONDS: Final = 3.0


class Store(Protocol):
    """What is needed of `shadowsvc.store.cassandra.CassandraStore`; calls raise `StoreError`."""

    async def renew(self, credentials: Credentials | None = None) -> None:
        """Replace the session, if a new one works."""

    async def check_schema(self) -> None:
        """Ask Cassandra something."""


class StoreLogin:
    """Keeps the store's session one that can log in. Belongs to the running loop."""

    def __init__(
        self,
        store: Store,
        pace: LoginPace,
        metrics: Metrics,
        *,
        in_doubt: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it; `in_doubt` says cheaply whether anything may be wrong with the store."""
        self.error: str | None = None
        """Why the session could not be made anew."""
        self._store = store
        self._pace = pace
        self._metrics = metrics
        self._in_doubt = in_doubt
        self._now = now
        self._changed = asyncio.Event()
        self._credentials: Credentials | None = None
        self._lost_since: float | None = None

    def change(self, credentials: Credentials) -> None:
        """Use other credentials from now on, as soon as a session works with them."""
        self._credentials = credentials
        self._pace.accepted()
        self._changed.set()

    async def pause(self, error: Exception, seconds: float) -> None:
        """Wait before the next attempt to connect: `seconds`, or longer after a refused login.

        Other credentials end the wait; they are handed to the store.
        """
        if isinstance(error, StoreError) and error.kind in LOGIN_KINDS:
            seconds = self._pace.refused()
        await self._wait(seconds)
        if self._changed.is_set():
            self._changed.clear()
            # Nothing is connected yet: this is for the next attempt.
            with contextlib.suppress(StoreError):
                await self._store.renew(self._credentials)

    async def run(self) -> None:
        """Watch, and make the session anew when it has to be; for ever."""
        retry_seconds: float | None = None
        while True:
            await self._wait(_CHECK_SECONDS if retry_seconds is None else retry_seconds)
            if self._changed.is_set():
                self._changed.clear()
                retry_seconds = await self._renew("changed")
            elif retry_seconds is not None:
                retry_seconds = await self._renew("retried")
            elif await self._is_lost():
                retry_seconds = await self._renew("lost")

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _is_lost(self) -> bool:
        """Whether there were no hosts at all for `LOST_SECONDS`."""
        kind = None
        if self._in_doubt():
            try:
                await self._store.check_schema()
            except StoreError as error:
                kind = error.kind
        if kind != _NO_HOSTS:
            self._lost_since = None
            return False
        if self._lost_since is None:
            self._lost_since = self._now()
        return self._now() - self._lost_since >= LOST_SECONDS

    async def _renew(self, why: str) -> float | None:
        """Make the session anew; return None, or when to try again, in seconds."""
        try:
            await self._store.renew(self._credentials)
        except StoreError as error:
            self.error = str(error)
            self._metrics.store_renewals["failed"] += 1
            _log.warning(
                "no new session with Cassandra; the old one stays",
                why=why,
                kind=error.kind,
                error=str(error),
                limit_by=error.kind,
            )
            return self._pace.refused()
        self.error = None
        self._lost_since = None
        self._pace.accepted()
        self._metrics.store_renewals[why] += 1
        _log.info("new session with Cassandra", why=why)
        return None
