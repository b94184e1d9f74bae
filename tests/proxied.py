"""A `backing.FaultProxy` for tests that block: it runs on an event loop in a thread of its own.

Rules: every call is made on that loop and waited for. Must not come in: faults themselves.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Self, TypeVar

from backing import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from backing import Tap, Watch

__all__ = ["Proxied"]

Result = TypeVar("Result")

_CALL_SECONDS = 10.0


class Proxied:
    """A proxy before one server; a context manager.

    Args:
        host: the server's address.
        port: the server's port.
        tap: as of `FaultProxy`; called on the proxy's thread.
        watch: likewise.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tap: Tap | None = None,
        watch: Callable[[], Watch] | None = None,
    ) -> None:
        self.proxy = FaultProxy(host, port, tap=tap, watch=watch)
        self.port = self.proxy.port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy")

    def do(self, call: Callable[[FaultProxy], Result]) -> Result:
        """Return what `call` says, made on the proxy's loop."""

        async def on_loop() -> Result:
            return call(self.proxy)

        future = asyncio.run_coroutine_threadsafe(on_loop(), self._loop)
        return future.result(_CALL_SECONDS)

    def __enter__(self) -> Self:
        """Listen."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.proxy.start(), self._loop).result(_CALL_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        """Reset what is open and end the thread."""
        asyncio.run_coroutine_threadsafe(self.proxy.close(), self._loop).result(_CALL_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_SECONDS)
        self._loop.close()
