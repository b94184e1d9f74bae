"""`python -m load.locust`: Locust with this rig's users. `scripts/locust` sets up what it needs.

Lives here: the text that `--help` shows, and the few things to be done before Locust starts. Rules:
gevent comes first, before anything that makes a socket or a lock; all options go to Locust as they
are. Must not come in: options, users.
"""

# ruff: noqa: E402 - gevent has to come first

from gevent import monkey

monkey.patch_all()

import contextlib
import resource
import sys
from pathlib import Path

from configargparse import ArgumentParser

from load.locust.arguments import add_arguments

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_HELP = """\
Devices by the thousand: MQTT 5 over WebSocket and TCP, as users of Locust.

A user is a device. It connects to the target, publishes its state to things/CLIENT-ID/shadow/update
every --interval seconds, answers pings, and comes back with backoff when its connection is lost.
Locust shows for each of these how often, how long and why not:

  connect                 from TCP's first packet to CONNACK
  subscribe               SUBSCRIBE to SUBACK, of --watch N devices a process
  publish to PUBACK       from when it was due to the broker's PUBACK
  publish to subscriber   from when it was due to its arrival at a subscriber, of the same devices
  connection lost         a connection that ended although nobody wanted it

examples:
  scripts/locust --host ws://127.0.0.1:8000/mqtt
      the page at http://127.0.0.1:8089, where users and rate are chosen
  scripts/locust --host ws://127.0.0.1:8000/mqtt --headless -u 1000 -r 100 -t 2m
      1000 devices, 100 more a second, for two minutes; the report is out/load/locust.html
  scripts/locust --host ws://127.0.0.1:8000/mqtt --headless --processes 2 \\
      --shape ramp:60:5000:500,plateau:120,storm:60:0.5,drain:30
      up to 5000 devices and 500 updates/s in a minute, two minutes so, then half of all lose their
      connection at once; two processes on this machine
  scripts/locust --master --host wss://devices.example:443/mqtt --tls-ca ca.pem
  scripts/locust --worker --master-host MASTER
      the same on several machines; only the master is told what to do

Ctrl-C ends a run, with its report. The last lines say whether the rig itself was the bottleneck:
its CPU above 90 % of a core, or its timers more than 50 ms late. A process does some thousand
devices; `scripts/load lean` does more with less, and has no page.

Locust's own options, such as -u, -r, -t, --headless, --html, --csv: scripts/locust --locust-help
"""


def main() -> None:
    """Run Locust; ends the process."""
    if "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        parser = ArgumentParser(prog="scripts/locust", add_help=False, usage=_usage())
        add_arguments(parser)
        sys.stdout.write(_HELP + "\n" + parser.format_help().split("\n", 2)[2].lstrip())
        return
    if "--locust-help" in sys.argv[1:]:
        sys.argv[1:] = ["--help"]
    sys.argv[0] = "locust"
    sys.argv[1:1] = ["-f", str(_LOCUSTFILE)]
    # One descriptor a device; the children of --processes inherit it.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    from locust.main import main as locust_main  # noqa: PLC0415 - it reads the command line at once

    locust_main()


def _usage() -> str:
    return "scripts/locust --host URL[,URL...] [option...]"


if __name__ == "__main__":
    main()
