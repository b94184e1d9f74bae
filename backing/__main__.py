"""`python -m backing`: a broker and a Cassandra to use by hand, until Ctrl-C or SIGTERM.

Prints the settings that make shadowsvc use them.
"""

import argparse
import signal
import sys
import threading

from backing.choice import Kind, broker, choose, database, describe
from backing.errors import BackingError
from backing.jars import cassandra_jars, java


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m backing", description=__doc__)
    parser.add_argument(
        "--prepare", action="store_true", help="fetch Cassandra if it is needed, start nothing"
    )
    parser.add_argument(
        "--kind", action="store_true", help="only say which kind of servers a run would take"
    )
    arguments = parser.parse_args()
    try:
        if arguments.kind:
            sys.stdout.write(f"{choose()}\n")
            return 0
        return _prepare() if arguments.prepare else _serve()
    except BackingError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _prepare() -> int:
    sys.stderr.write(f"{describe()}\n")
    if choose() is Kind.PROCESSES:
        java()
        cassandra_jars()
    return 0


def _serve() -> int:
    sys.stderr.write(f"{describe()}\n")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    kind = choose()
    with broker(kind) as the_broker, database(kind) as the_database:
        lines = [
            f"export SHADOWSVC_MQTT__URL={the_broker.url}",
            f"export SHADOWSVC_CASSANDRA__CONTACT_POINTS={','.join(the_database.contact_points)}",
            f"export SHADOWSVC_CASSANDRA__PORT={the_database.port}",
            f"export SHADOWSVC_CASSANDRA__LOCAL_DC={the_database.dc}",
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        sys.stderr.write("running until Ctrl-C\n")
        ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
