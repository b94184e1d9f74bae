"""Topic names: which device and which shadow a message is for.

Lives here: the parser of topic names and the two subscription filters that match them. Rules: a
name that parses is safe as a Cassandra key and in a log line. Must not come in: documents.

`{prefix}/{device}/shadow/update` addresses the unnamed shadow (`""`),
`{prefix}/{device}/shadow/name/{shadow}/update` a named one, as in AWS IoT Device Shadow.
"""

from __future__ import annotations

import re

from shadowsvc.errors import Rejected

__all__ = ["MAX_NAME_CHARS", "TopicParser"]

MAX_NAME_CHARS = 128
"""Longest device or shadow name, in characters (AWS IoT: 128 for things, 64 for shadows)."""

# Without "+": a topic name holds no wildcard (MQTT 5 §4.7.1). Without "$": names that begin with
# it are the service's own.
_NAME = re.compile(r"[A-Za-z0-9_.:@=-]{1,128}")
_UNNAMED_TAIL = "/shadow/update"
_UNNAMED_TAIL_CHARS = len(_UNNAMED_TAIL)
_NAMED = "/shadow/name"


class TopicParser:
    """Parse topic names below one prefix."""

    def __init__(self, prefix: str) -> None:
        """Take the `prefix` without a slash at its end, for example `things`."""
        self._head = prefix + "/"
        self._head_chars = len(self._head)
        self._usual = re.compile(
            f"{re.escape(self._head)}({_NAME.pattern}){_UNNAMED_TAIL}"
        ).fullmatch

    def filters(self) -> tuple[str, str]:
        """Topic filters that match every update topic once (they don't overlap)."""
        return (
            f"{self._head}+{_UNNAMED_TAIL}",
            f"{self._head}+/shadow/name/+/update",
        )

    def parse(self, topic: str) -> tuple[str, str]:
        """Return device and shadow name (`""` is the unnamed shadow).

        Raises `Rejected` with reason `topic` or `device_name`.
        """
        usual = self._usual(topic)
        if usual is not None:
            return usual[1], ""
        shadow = ""
        if topic.endswith(_UNNAMED_TAIL):
            device = topic[self._head_chars : -_UNNAMED_TAIL_CHARS]
        else:
            device, between, tail = topic[self._head_chars :].partition("/shadow/name/")
            shadow, update, rest = tail.partition("/update")
            if not between or not update or rest:
                raise Rejected("topic", "the topic names no shadow update")
            if _NAME.fullmatch(shadow) is None:
                raise Rejected("topic", _name_rule("shadow"))
        if not topic.startswith(self._head):
            raise Rejected("topic", "the topic is not below the configured prefix")
        if _NAME.fullmatch(device) is None:
            # A shadow may be called "shadow": its topic ends as that of the unnamed one does.
            owner = device.removesuffix(_NAMED)
            if _NAME.fullmatch(owner) is not None:
                return owner, "shadow"
            raise Rejected("device_name", _name_rule("device"))
        return device, shadow


def _name_rule(what: str) -> str:
    return f"a {what} name has 1 to {MAX_NAME_CHARS} characters of A-Z a-z 0-9 _ . : @ = -"
