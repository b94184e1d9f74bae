"""Free TCP ports for servers that are killed and started again on the same port.

Rule: ports lie below the kernel's range for outgoing connections. A port from inside that range can
be taken by anybody's outgoing connection while the server is down, and a client that reconnects to
it on the loopback can even meet itself: TCP allows a socket to connect to its own port, and the
client then believes that the server is back.
"""

import random
import socket
from collections.abc import Sequence
from pathlib import Path

from backing.errors import BackingError

_OUTGOING_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
_USUAL_OUTGOING_START = 32_768
_MAX_TRIES = 500
_random = random.SystemRandom()


def free_port(hosts: Sequence[str] = ("127.0.0.1",)) -> int:
    """Return a TCP port that is free on every one of `hosts`, outside the outgoing range.

    The port is not held: somebody else may take it before the caller does.

    Raises:
        BackingError: no free port was found.
    """
    highest = _outgoing_start() - 1
    for _ in range(_MAX_TRIES):
        port = _random.randint(_LOWEST, highest)
        if all(_is_free(host, port) for host in hosts):
            return port
    raise BackingError(f"no TCP port free on {', '.join(hosts)} between {_LOWEST} and {highest}")


def _outgoing_start() -> int:
    try:
        start = int(_OUTGOING_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _USUAL_OUTGOING_START
    # A machine that uses nearly every port for outgoing connections leaves nothing below.
    return start if start > _LOWEST + 1000 else _USUAL_OUTGOING_START


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
