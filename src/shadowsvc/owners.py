"""Owners: how a process is named in the table of slots, and what such a name tells another process.

Lives here: this process's own name, and whether a name is that of an earlier life of it. Rule: a
name is for people and a hint, never a proof: nothing is taken from anybody because of it. Must not
come in: slots, leases.
"""

from __future__ import annotations

import os
import socket

__all__ = ["is_former_life", "owner_name"]


def owner_name() -> str:
    """Return how this process is named to people: its host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_former_life(owner: str) -> bool:
    """Whether an owner is an earlier life of this process, to judge by its name.

    It is one on this host, with our process id, as that of a container that was restarted, or with
    one that no process has. What follows the name, behind a space, says what the owner does.
    """
    host, _, pid = owner.partition(" ")[0].rpartition(":")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # not ours to signal: it lives; no process id at all
        pass
    return False
