"""Devices as Locust's users: one over WebSocket, one over TCP.

Lives here: the user classes, which are thin. Rules: a user is one device and one greenlet, from its
spawn to its end; being told to end it says DISCONNECT. Which of the classes a run has follows from
the targets' URLs. Own classes derive from these two. Must not come in: MQTT, measuring.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

from locust import User, constant, task
from locust.exception import StopUser

from load.errors import LoadError
from load.locust.rig import WEBSOCKET
from load.locust.run import Run

if TYPE_CHECKING:
    from load.locust.life import Life

__all__ = ["DeviceUser", "TcpDevice", "WebSocketDevice"]

_log = logging.getLogger("load")


class DeviceUser(User):
    """A device that stays connected and publishes its state."""

    abstract = True
    wait_time = constant(0)
    transport: ClassVar[str]
    """Locust's request type."""
    _life: Life | None = None

    @task
    def live(self) -> None:
        """Be a device until the user is stopped."""
        run = Run.current()
        if run.leaving:
            raise StopUser
        if self._life is None:
            try:
                self._life = run.rig.life(self.transport)
            except LoadError as error:
                _log.error("%s", error)
                raise StopUser from None
        self._life.live()

    def on_stop(self) -> None:
        """Leave as a device does that is switched off."""
        life, self._life = self._life, None
        if life is not None:
            life.leave()
            Run.current().rig.give_back(life)

    def stop(self, force: bool = False) -> bool:  # noqa: FBT001, FBT002 - Locust's signature
        """End: at once in any case, since a device never is between two tasks."""
        del force
        return bool(super().stop(force=True))


class WebSocketDevice(DeviceUser):
    """MQTT 5 over WebSocket, for targets `ws://` and `wss://`."""

    transport = WEBSOCKET


class TcpDevice(DeviceUser):
    """MQTT 5 over TCP, for targets `mqtt://` and `mqtts://`."""

    transport = "TCP"
