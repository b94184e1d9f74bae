"""Keeps the last known state of every MQTT device in Cassandra; acknowledges what is durable.

Lives here: the version alone. Must not come in: imports that make `shadowsvc probe` slow.
"""

from typing import TYPE_CHECKING

__all__ = ["__version__"]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        # On demand: reading the package's metadata takes longer than all that `probe` does.
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import metadata  # noqa: PLC0415 - see above

        try:
            return metadata.version("shadowsvc")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # run from a source tree that is not installed
