"""What Locust loads: the users, the shape, the options, and who listens to a run.

Lives here: names alone. An own file with other users begins with the same imports. Must not come
in: anything that does something.
"""

from __future__ import annotations

from locust import events

from load.locust.arguments import add_arguments
from load.locust.run import Run
from load.locust.shape import StagedShape
from load.locust.users import TcpDevice, WebSocketDevice

__all__ = ["StagedShape", "TcpDevice", "WebSocketDevice"]

events.init_command_line_parser.add_listener(add_arguments)
Run.attach(events)
