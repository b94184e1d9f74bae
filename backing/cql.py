"""Our own connections to a Cassandra, wherever it runs: is it there, and a session for a test.

They go through cassandra-driver, which is not the client that shadowsvc writes with, so that what
a test reads back has been read by somebody else.
"""

import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator, Sequence

from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, Session
from cassandra.policies import WhiteListRoundRobinPolicy

_CONNECT_LIMIT_SECONDS = 5.0
_REQUEST_LIMIT_SECONDS = 20.0


@contextlib.contextmanager
def connect(
    contact_points: Sequence[str],
    port: int,
    *,
    user: tuple[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> Iterator[Session]:
    """Connect to the given nodes and no others; the session is closed at the end.

    Args:
        contact_points: addresses of the nodes.
        port: their CQL port.
        user: name and password.
        ssl_context: TLS.

    Raises:
        Exception: what cassandra-driver raises, `NoHostAvailable` above all.
    """
    profile = ExecutionProfile(
        load_balancing_policy=WhiteListRoundRobinPolicy(list(contact_points)),
        request_timeout=_REQUEST_LIMIT_SECONDS,
    )
    cluster = Cluster(
        list(contact_points),
        port=port,
        auth_provider=None if user is None else PlainTextAuthProvider(*user),
        ssl_context=ssl_context,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
        connect_timeout=_CONNECT_LIMIT_SECONDS,
        control_connection_timeout=_CONNECT_LIMIT_SECONDS,
    )
    try:
        yield cluster.connect()
    finally:
        cluster.shutdown()


def accepts(host: str, port: int) -> bool:
    """Return whether a TCP connection can be made: a cheap question to ask before `answers`."""
    try:
        with socket.create_connection((host, port), _CONNECT_LIMIT_SECONDS):
            return True
    except OSError:
        return False


def answers(
    contact_points: Sequence[str],
    port: int,
    *,
    user: tuple[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> bool:
    """Return whether a driver can connect to one of the given nodes and query it."""
    driver_log = logging.getLogger("cassandra")
    level = driver_log.level
    # A node that is not up yet is what we wait for, not a warning.
    driver_log.setLevel(logging.CRITICAL)
    try:
        with connect(contact_points, port, user=user, ssl_context=ssl_context) as session:
            session.execute("SELECT release_version FROM system.local")
    except Exception:  # noqa: BLE001 - the driver raises many kinds before a node is up
        return False
    finally:
        driver_log.setLevel(level)
    return True
