"""Certificates, keys and passwords that change on disk, picked up while the service runs.

Lives here: looking at the files, and which credentials count. Rules:

1. Files are looked at in a thread of their own, every few seconds and by content, so that a
   symbolic link that is swapped (Kubernetes' `..data`) and a file that is written in place are seen
   alike. The loop never waits for a disk.
2. What is new counts when two looks saw the same: a file that is being written is left alone.
3. What cannot be used (unreadable, cut short, a key of another certificate, expired) changes
   nothing: the old credentials stay, and the reason is logged, counted and told by /readyz.
4. Credentials are replaced whole, on the loop: nobody sees a new key with an old certificate.

Must not come in: connections, and what is done with new credentials (`shadowsvc.app`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import structlog
from pydantic import SecretStr

from shadowsvc import config
from shadowsvc.credentials import from_contents, read_files
from shadowsvc.errors import ConfigError, CredentialsUnusable

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    from shadowsvc.credentials import Credentials
    from shadowsvc.metrics import Metrics
    from shadowsvc.settings import Cassandra, Mqtt, Settings

__all__ = ["POLL_SECONDS", "SIDES", "Rotation", "Side", "Watched"]

_log = structlog.get_logger(__name__)

Side = Literal["broker", "cassandra"]

SIDES: Final[tuple[Side, ...]] = ("broker", "cassandra")
"""Whom we show credentials; the values of a metric label."""

POLL_SECONDS: Final = 2.0
"""Between two looks. What is new is in use after two of them."""


class _Look(NamedTuple):
    """What the files of a side held at one moment, or why they could not be read."""

    contents: Mapping[str, bytes]
    secrets: Mapping[str, str]
    error: str | None = None

    def __repr__(self) -> str:
        return "_Look(****)"


class Watched:
    """The files of one side, and what they are good for; used by one thread at a time."""

    def __init__(self, section: str, branch: Mqtt | Cassandra, environ: Mapping[str, str]) -> None:
        """Look for the first time; `fault` then tells why there are no `current` credentials."""
        self.current: Credentials | None = None
        """The newest that could be used."""
        self.fault: str | None = None
        """Why the files, as two looks saw them, cannot be used; None when they are in use."""
        self._section = section
        self._branch: Any = branch
        self._environ = dict(environ)
        self._seen = self._judged = self._read()
        self._judge()

    def look(self) -> bool:
        """Look again; True when `current` or `fault` has changed."""
        before = self.current, self.fault
        look = self._read()
        settled = look == self._seen
        self._seen = look
        if settled and look != self._judged:
            self._judged = look
            self._judge()
        return (self.current, self.fault) != before

    def _read(self) -> _Look:
        try:
            contents = read_files(self._section, self._branch)
            secrets = config.read_secrets(self._environ, self._section)
        except CredentialsUnusable as error:
            return _Look({}, {}, str(error))
        except ConfigError as error:
            return _Look({}, {}, "; ".join(error.mistakes))
        return _Look(contents, secrets)

    def _judge(self) -> None:
        look = self._judged
        if look.error is not None:
            self.fault = look.error
            return
        secret = look.secrets.get("password")
        try:
            made = from_contents(
                self._section,
                self._branch,
                look.contents,
                username=look.secrets.get("username", self._branch.username),
                password=self._branch.password if secret is None else SecretStr(secret),
                replaces=self.current,
            )
        except CredentialsUnusable as error:
            self.fault = str(error)
        else:
            self.fault = None
            if made != self.current:
                self.current = made


class Rotation:
    """The credentials of both sides as they are now; belongs to the loop that starts it.

    Args:
        settings: which files there are; where secrets come from is in `environ`.
        metrics: what to count in.
        environ: by default the process's.
        poll_seconds: between two looks.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        environ: Mapping[str, str] | None = None,
        *,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Read everything once; what cannot be used is a fault and not an error."""
        environ = os.environ if environ is None else environ
        self._watched: dict[Side, Watched] = {
            "broker": Watched("mqtt", settings.mqtt, environ),
            "cassandra": Watched("cassandra", settings.cassandra, environ),
        }
        self._metrics = metrics
        self._poll_seconds = poll_seconds
        self._over = threading.Event()
        self._current = {side: watched.current for side, watched in self._watched.items()}
        self._faults = {side: watched.fault for side, watched in self._watched.items()}
        for side in SIDES:
            self._note(side)

    def current(self, side: Side) -> Credentials | None:
        """Return the credentials to use; None if there never were any."""
        return self._current[side]

    def fault(self, side: Side) -> str | None:
        """Say why the files of a side are not in use, None when they are."""
        return self._faults[side]

    def broker_context(self) -> ssl.SSLContext:
        """Return the TLS context for the broker. Raises `CredentialsUnusable`."""
        credentials = self._current["broker"]
        if credentials is None or credentials.context is None:
            raise CredentialsUnusable(self._faults["broker"] or "there are no certificates")
        return credentials.context

    def start(self, on_change: Callable[[Side, Credentials], None]) -> None:
        """Begin to look; `on_change` is called on the running loop."""
        loop = asyncio.get_running_loop()
        for side, fault in self._faults.items():
            if fault is not None:
                _log.error("credentials can't be used", of=side, error=fault)

        def watch() -> None:
            while not self._over.wait(self._poll_seconds):
                for side, watched in self._watched.items():
                    changed = False
                    try:
                        changed = watched.look()
                    except Exception:  # noqa: BLE001 - a defect must not end the watch for good
                        _log.exception("looking at credentials failed", limit_by=side)
                    found = watched.current, watched.fault, changed
                    with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                        loop.call_soon_threadsafe(self._found, side, *found, on_change)

        # A daemon: a disk that hangs must not hold up the exit.
        threading.Thread(target=watch, name="credentials", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _found(
        self,
        side: Side,
        credentials: Credentials | None,
        fault: str | None,
        changed: bool,  # noqa: FBT001 - private
        on_change: Callable[[Side, Credentials], None],
    ) -> None:
        old = self._current[side]
        self._current[side], self._faults[side] = credentials, fault
        self._note(side)
        if not changed:
            return
        if fault is not None:
            self._metrics.credentials_unusable[side] += 1
            _log.error("changed credentials can't be used; the old ones stay", of=side, error=fault)
        elif credentials is not None and credentials is not old:
            self._metrics.credentials_changed[side] += 1
            _log.info("credentials have changed", of=side)
            on_change(side, credentials)

    def _note(self, side: Side) -> None:
        """Show when what is in use ends."""
        credentials = self._current[side]
        ends = self._metrics.certificate_expiry
        for name in ("client", "ca"):
            ends.pop(f"{side}_{name}", None)
        if credentials is not None:
            for name, expiry in (
                ("client", credentials.certificate_expiry()),
                ("ca", credentials.ca_expiry(time.time())),
            ):
                if expiry is not None:
                    ends[f"{side}_{name}"] = expiry
        self._metrics.credentials_faulty[side] = int(self._faults[side] is not None)
