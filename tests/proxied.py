"""A `backing.FaultProxy` for tests that block: it runs on an event loop in a thread of its own.

Lives here: `Proxied`; `LoopThread`, on which other servers run as well; and `away`, the fault that
most tests need. Rules: every call is made on that loop and waited for. Must not come in: other
faults.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, Self, TypeVar

from backing import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from backing import Tap, Watch

__all__ = ["LoopThread", "Proxied", "away"]

Result = TypeVar("Result")

_CALL_SECONDS = 10.0


def away(proxy: FaultProxy) -> None:
    """As a server that is down: connections are reset, new ones are refused."""
    proxy.refuse()
    proxy.reset()


class LoopThread:
    """An event loop in a thread of its own.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name)

    def start(self) -> None:
        """Start it."""
        self._thread.start()

    def wait(self, call: Coroutine[Any, Any, Result]) -> Result:
        """Return what `call` returns on the loop."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(_CALL_SECONDS)

    def do(self, call: Callable[[], Result]) -> Result:
        """Return what `call` says, made on the loop."""

        async def on_loop() -> Result:
            return call()

        return self.wait(on_loop())

    def close(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_SECONDS)
        self._loop.close()


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
        self._loop = LoopThread("fault proxy")

    def do(self, call: Callable[[FaultProxy], Result]) -> Result:
        """Return what `call` says, made on the proxy's loop."""
        return self._loop.do(lambda: call(self.proxy))

    def __enter__(self) -> Self:
        """Listen."""
        self._loop.start()
        self._loop.wait(self.proxy.start())
        return self

    def __exit__(self, *_: object) -> None:
        """Reset what is open and end the thread."""
        self._loop.wait(self.proxy.close())
        self._loop.close()
