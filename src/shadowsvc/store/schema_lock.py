"""The right to change the schema: one process at a time.

Lives here: a row of the table `schema_lock`, taken, renewed and freed by light-weight transactions.
Rules: the row carries a TTL and is renewed by a thread while the owner lives, so that a crash frees
it; the owner's random token decides whose it is; a transaction that timed out is unknown, so it is
asked again, and the answer tells whether the token is ours. Must not come in: what the lock is for.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from shadowsvc.errors import StoreError, StoreUnavailable
from shadowsvc.store import driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shadowsvc.settings import Cassandra

__all__ = ["SchemaLock", "holder"]

_SERVICE = "shadowsvc"
_TTL_SECONDS = 60
# Cassandra counts whole seconds by its nodes' clocks; an owner gives up well before them.
_TRUSTED_SHARE = 0.75
_RENEWAL_SECONDS = 15.0
_POLL_SECONDS = 1.0
_PROGRESS_SECONDS = 10.0

# An UPDATE leaves no row marker, so that the row is gone as soon as its cells are.
_TAKE_LOCK = (
    "UPDATE schema_lock USING TTL %s SET owner = %s, holder = %s WHERE service = %s IF owner = null"
)
_RENEW_LOCK = (
    "UPDATE schema_lock USING TTL %s SET owner = %s, holder = %s WHERE service = %s IF owner = %s"
)
_FREE_LOCK = "UPDATE schema_lock SET owner = null, holder = null WHERE service = %s IF owner = %s"
_SELECT_HOLDER = "SELECT holder FROM schema_lock WHERE service = %s"


class SchemaLock:
    """The right to change the schema, kept alive by a thread; for one `held` only."""

    def __init__(self, session: Any, settings: Cassandra, progress: Callable[[str], None]) -> None:
        self._session = session
        self._settings = settings
        self._progress = progress
        self._owner = secrets.token_hex(16)
        self._good_until = 0.0
        self._stop = threading.Event()

    @contextmanager
    def held(self, wait_seconds: float) -> Iterator[None]:
        """Take it, renew it, free it; `StoreUnavailable` if it is not free in time."""
        self._take(wait_seconds)
        thread = threading.Thread(target=self._renew, name="schema-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._free()

    def check(self) -> None:
        """Raise `StoreUnavailable` if it may be somebody else's by now."""
        if time.monotonic() >= self._good_until:
            raise StoreUnavailable(
                "schema_lock",
                "lost the lock on the schema, since Cassandra did not answer for "
                f"{_TTL_SECONDS} s: run `shadowsvc migrate` again",
            )

    def _take(self, wait_seconds: float) -> None:
        deadline = time.monotonic() + wait_seconds
        told = float("-inf")
        while True:
            began = time.monotonic()
            if self._take_once():
                self._good_until = began + _TTL_SECONDS * _TRUSTED_SHARE
                return
            now = time.monotonic()
            if now >= deadline:
                raise StoreUnavailable(
                    "schema_lock",
                    f"{self._other()} still changes the schema after {wait_seconds:.0f} s; its "
                    f"lock expires {_TTL_SECONDS} s after its death",
                )
            if now - told >= _PROGRESS_SECONDS:
                self._progress(f"waiting for {self._other()}, who changes the schema")
                told = now
            # Not all at once again.
            time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311

    def _take_once(self) -> bool:
        # The second asks whether the first of an earlier round, which timed out, was applied.
        return (
            self._transaction(_TAKE_LOCK, _TTL_SECONDS, self._owner, holder(), _SERVICE)
            or self._renew_once()
        )

    def _renew_once(self) -> bool:
        return self._transaction(
            _RENEW_LOCK, _TTL_SECONDS, self._owner, holder(), _SERVICE, self._owner
        )

    def _renew(self) -> None:
        while not self._stop.wait(_RENEWAL_SECONDS):
            began = time.monotonic()
            with suppress(StoreError):  # `check` tells when it has lasted too long
                if self._renew_once():
                    self._good_until = began + _TTL_SECONDS * _TRUSTED_SHARE

    def _free(self) -> None:
        freed = False
        with suppress(StoreError):
            freed = self._transaction(_FREE_LOCK, _SERVICE, self._owner)
        if not freed:
            self._progress(f"the lock was not given back; it expires in {_TTL_SECONDS} s")

    def _transaction(self, statement: str, *values: object) -> bool:
        """Tell whether it was applied; False also when that is unknown."""
        try:
            with driver.errors(self._settings):
                row = self._session.execute(statement, values, timeout=_RENEWAL_SECONDS).one()
        except StoreUnavailable as error:
            if error.kind == "unauthorized":
                raise
            return False
        return bool(row[0])

    def _other(self) -> str:
        try:
            row = self._session.execute(_SELECT_HOLDER, (_SERVICE,)).one()
        except Exception:  # noqa: BLE001 - it is but for a message
            row = None
        return str(row[0]) if row and row[0] else "another process"


def holder() -> str:
    """Return how this process is named to others: its host and id."""
    return f"{socket.gethostname()}, process {os.getpid()}"
