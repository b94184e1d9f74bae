"""The load rig's errors, below the project's one tree.

Rules: a message says which option to change. Must not come in: handling.
"""

from shadowsvc.errors import ShadowsvcError

__all__ = ["BadOption", "BrokenConnection", "LoadError"]


class LoadError(ShadowsvcError):
    """The rig cannot do what it was asked for."""


class BadOption(LoadError):
    """An option or a file makes no sense."""


class BrokenConnection(LoadError):
    """The other side broke a rule of MQTT 5 or WebSocket, or ended the connection."""
