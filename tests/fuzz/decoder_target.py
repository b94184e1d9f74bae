"""The decoder under any bytes: an update or a rejection with a known reason, and nothing else.

Lives here: documents, topics and properties to begin with, and what must hold of every answer:

- what leaves is an `Update` or `Rejected` with a reason that a document can have; the reason's text
  is short and holds no control character;
- the same message gives the same answer, whatever the decoder took in before;
- an accepted update holds exactly the leaves of the document, each number with its value, as
  Python's own JSON reads them with decimal numbers;
- names, sizes, depths, paths and times are within the limits;
- read back through the view, on top of an older shadow, the document is that of a JSON merge, where
  `{}` and deletes of nothing change nothing.

Rules: what must come of a document is computed here, by other means than the decoder's. Must not
come in: processes, progress.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Self

from shadowsvc.errors import Rejected
from shadowsvc.shadow.document import REASONS, Decoder, Limits
from shadowsvc.shadow.pointer import split
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.shadow.update import Update
from tests.fuzz.mutation import mutate
from tests.fuzz.target import Finding
from tests.property.cassandra_model import Partition

if TYPE_CHECKING:
    import random

__all__ = ["DecoderCase", "DecoderTarget"]

NOW_US = 1_700_000_000_000_000
_MAX_TIME_US = 2**62
_MAX_DETAIL_CHARS = 400
_MAX_MODEL_LEAVES = 40
_WEIGHT_SLACK_BYTES = 8192
_OVERHEAD_BYTES = 64
_PYTHON_DEPTH = 6000
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAME = re.compile(r"[A-Za-z0-9_.:@=-]{1,128}\Z")
# Of the pipeline, never of a document.
_REASONS = frozenset(REASONS) - {"refused_by_store", "internal_error"}

PRESETS: tuple[dict[str, Any], ...] = (
    {},
    {
        "max_payload_bytes": 400,
        "max_depth": 4,
        "max_leaves": 6,
        "max_path_bytes": 40,
        "max_user_properties": 2,
        "max_user_properties_bytes": 30,
    },
    {"unit": "seconds", "on_future": "server_time", "on_ancient": "server_time"},
    {"unit": "milliseconds", "max_path_bytes": 1},
    {"unit": "microseconds", "max_depth": 1},
)

_NUMBERS = (
    "0", "-0", "-0.0", "1", "-1", "1.5", "0.1", "1e2", "1E-7", "9007199254740993",
    "9007199254740993.0", "9223372036854775807", "9223372036854775808", "-9223372036854775808",
    "-9223372036854775809", "18446744073709551615", "18446744073709551616",
    "100000000000000000000", "123456789012345678901234567890", "1e308", "1e309", "-1e400", "1e-400",
    "0.30000000000000004", "0.1000000000000000055511151231257827", "3.14159265358979323846",
    "1.7976931348623157e308", "5e-324", "2.5e-324", "00", "01", "1.", ".5", "+1", "1e", "0x10",
)  # fmt: skip
_STRINGS = (
    '""', '"x"', '"on"', '"é"', '"😀"', '"\\ud83d\\ude00"', '"\\ud800"', '"\\u0000"', '"\\n"',
    '"a\\/b"', '"~1"', '"\\u001b[2J"', '"' + "y" * 300 + '"', '"12345678901234567890"',
)  # fmt: skip
_OTHERS = ("true", "false", "null", "NaN", "Infinity", "-Infinity", "nul", "[]", "{}")
_KEYS = (
    "a", "b", "temperature", "", "/", "~", "~0", "~1", "a/b", "a~b", "é", "😀", " ", "\\u0000",
    "\\u0061", "\\n", "key with spaces", "k" * 45, "timestamp", "0", "a0", "a-",
)  # fmt: skip
_STAMPS = (
    "1700000000", "1700000000000", "1700000000000000", "1699999999.5", "1700000299", "1700000301",
    "1699000000", "1600000000", "0", "-1", "1e9", "1.7e12", "99999999999", "100000000000",
    "99999999999999", "100000000000000", "4611686018427387904", "1e400", "null", '"1700000000"',
    "true", "[]", "170000000000000000000000",
)  # fmt: skip
_VERSIONS = ("0", "1", "999", "1000000", "-1", "1.0", "null", "true", '"1"', "1e3", "1" * 21)
_PIECES = (
    *_NUMBERS, *_STRINGS, *_OTHERS, *_STAMPS, *_VERSIONS, "{", "}", "[", "]", ",", ":", '"', "\\",
    "\\u0000", "\\ud800", '"state"', '"reported"', '"desired"', '"timestamp":', '"version":',
    ',"a":null', ',"a":1', '{"a":{"a":{"a":{"a":{"a":1}}}}}', "[" * 20, "[" * 1100, '{"a":' * 30,
    " ", "\t", "\n", "\ufeff", "e999", "0" * 17, "9" * 5000,
)  # fmt: skip
_NO_TEXT = (b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x00")
TOKENS = (*(piece.encode() for piece in _PIECES), *_NO_TEXT)
_TOPICS = (
    "things/d/shadow/update", "things/device-1/shadow/update", "things/d/shadow/name/s/update",
    "things/d/shadow/name/shadow/update", "things/" + "d" * 128 + "/shadow/update",
    "things/" + "d" * 129 + "/shadow/update", "things//shadow/update", "things/é/shadow/update",
    "things/a b/shadow/update", "things/d/shadow", "other/d/shadow/update", "things/d/shadow/get",
    "things/d/shadow/name//update", "things/shadow/update", "/shadow/update",
    "things/d/\x1b/update",
    "things/d/shadow/name/a/update/update", "things/d/shadow/update/x", "things/d+/shadow/update",
)  # fmt: skip
_PROPERTY_VALUES = (
    "1700000000", "1700000000000", "1700000000000000", "1600000000", "nan", "inf", "1e309", "-1",
    "1_0", "", "x", "٣", "1700000000.5", "0", "7", "1" * 21, "1e9",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderCase:
    """One message and the limits that it meets."""

    data: bytes
    topic: str = _TOPICS[0]
    properties: tuple[tuple[str, str], ...] = ()
    preset: int = 0

    def with_data(self, data: bytes) -> Self:
        return replace(self, data=data)

    def as_json(self) -> dict[str, Any]:
        return {
            "data": self.data.hex(),
            "topic": self.topic,
            "properties": self.properties,
            "preset": self.preset,
        }


class DecoderTarget:
    """See the module's docstring."""

    name = "decoder"

    def __init__(self) -> None:
        # Python's JSON stops where its recursion does; ours at 1024 levels.
        sys.setrecursionlimit(max(sys.getrecursionlimit(), _PYTHON_DEPTH))
        self._topics = TopicParser("things")
        self._veterans = [self._decoder(preset) for preset in range(len(PRESETS))]
        self._now_us = NOW_US

    def make(self, draw: random.Random) -> DecoderCase:
        data = _document(draw).encode()
        if draw.random() < 0.45:
            data = mutate(data, draw, tokens=TOKENS, other=lambda: _document(draw).encode())
        topic = _TOPICS[0] if draw.random() < 0.88 else draw.choice(_TOPICS)
        if draw.random() < 0.04:
            spoiled = mutate(topic.encode(), draw, tokens=(b"/", b"name", b"$"), other=lambda: b"x")
            topic = spoiled.decode(errors="replace")
        properties: list[tuple[str, str]] = []
        while draw.random() < 0.25:
            name = draw.choice(("timestamp", "seq", "x"))
            properties.append((name, draw.choice(_PROPERTY_VALUES)))
        if draw.random() < 0.01:
            properties *= draw.choice((10, 100, 1000))
        preset = 0 if draw.random() < 0.5 else draw.randrange(len(PRESETS))
        return DecoderCase(data, topic, tuple(properties), preset)

    def from_json(self, members: dict[str, Any]) -> DecoderCase:
        return DecoderCase(
            bytes.fromhex(members["data"]),
            members["topic"],
            tuple((name, value) for name, value in members["properties"]),
            members["preset"],
        )

    def check(self, case: DecoderCase) -> str:
        # Later than all before: a receive time is given out once.
        self._now_us += 1000
        veteran = self._veterans[case.preset]
        answers = [
            _answer(decoder, case, self._now_us)
            for decoder in (veteran, self._decoder(case.preset))
        ]
        answer, again = answers
        if repr(answer) != repr(again):
            raise Finding("not deterministic", f"{answer!r} and {again!r}"[:400])
        if isinstance(answer, Rejected):
            _check_rejection(answer)
            return answer.reason
        _check_limits(answer, case, veteran.limits, self._now_us)
        _check_leaves(answer, case.data)
        return "accepted"

    def _decoder(self, preset: int) -> Decoder:
        return Decoder(self._topics, Limits(**PRESETS[preset]))


def _answer(decoder: Decoder, case: DecoderCase, now_us: int) -> Update | Rejected:
    try:
        answer = decoder.decode(case.topic, case.data, case.properties, now_us)
    except Rejected as rejected:
        return rejected
    if answer.__class__ is not Update:
        raise Finding("no update", repr(answer)[:200])
    return answer


# ------------------------------------------------------------------ what must hold


def _check_rejection(rejected: Rejected) -> None:
    if rejected.reason not in _REASONS:
        raise Finding("an unknown reason", rejected.reason)
    if not rejected.detail or len(rejected.detail) > _MAX_DETAIL_CHARS:
        raise Finding("a detail of no use", f"{len(rejected.detail)} characters")
    if _CONTROLS.search(rejected.detail):
        raise Finding("a detail with control characters", ascii(rejected.detail))


def _check_limits(update: Update, case: DecoderCase, limits: Limits, now_us: int) -> None:
    if _NAME.match(update.device) is None or (update.shadow and not _NAME.match(update.shadow)):
        raise Finding("a bad name", ascii((update.device, update.shadow)))
    if len(case.data) > limits.max_payload_bytes:
        raise Finding("a payload above the limit")
    size = sum(len(text.encode()) for pair in case.properties for text in pair)
    if size > limits.max_user_properties_bytes or len(case.properties) > limits.max_user_properties:
        raise Finding("user properties above the limit")
    count = len(update.writes) + len(update.deletes)
    if count > limits.max_leaves:
        raise Finding("leaves above the limit", str(count))
    weight = count * _OVERHEAD_BYTES
    for section, path, value in ((*delete, b"") for delete in update.deletes):
        weight += len(path)
        _check_path(section, path, value, limits)
    for section, path, value in update.writes:
        weight += len(path) + len(value)
        if not path:
            raise Finding("a leaf without a path")
        _check_path(section, path, value, limits)
    if weight > update.size_bytes + _WEIGHT_SLACK_BYTES:
        raise Finding("an update heavier than it says", f"{weight}, {update.size_bytes}")
    _check_time(update.time_us, limits, now_us)


def _check_path(section: str, path: str, value: bytes, limits: Limits) -> None:
    if section not in {"reported", "desired"}:
        raise Finding("an unknown section", section)
    if "\0" in path:
        raise Finding("a path with NUL", ascii(path))
    if len(path.encode()) > limits.max_path_bytes:
        raise Finding("a path above the limit", str(len(path)))
    depth = len(split(path))
    if value[:1] in (b"[", b"{"):
        depth += _array_depth(json.loads(value))
    if depth > limits.max_depth:
        raise Finding("a depth above the limit", f"{depth} at {path[:80]}")


def _array_depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_array_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_array_depth, value), default=0)
    return 0


def _check_time(time_us: int, limits: Limits, now_us: int) -> None:
    if not 0 < time_us < _MAX_TIME_US:
        raise Finding("a time that is none", str(time_us))
    if not now_us - limits.max_age_us <= time_us <= now_us + limits.max_ahead_us:
        raise Finding("a time beyond the limits", str(time_us - now_us))


def _check_leaves(update: Update, payload: bytes) -> None:
    document = _exact(payload)
    sections = document["state"]
    if sections is None:
        sections = {"reported": None, "desired": None}
    wanted: dict[tuple[str, tuple[str, ...]], Any] = {}
    for section, content in sections.items():
        if content is None:
            wanted[section, ()] = None
        else:
            _flatten(content, section, (), wanted)
    got: dict[tuple[str, tuple[str, ...]], Any] = {}
    for section, path, value in update.writes:
        got[section, tuple(split(path))] = _plain(_exact(value))
    for section, path in update.deletes:
        got[section, tuple(split(path))] = None
    if got != wanted:
        where = next(key for key in {**got, **wanted} if got.get(key, 0) != wanted.get(key, 0))
        raise Finding("a leaf that is not the document's", ascii((where, got.get(where))))
    if len(got) != len(update.writes) + len(update.deletes):
        raise Finding("a leaf given twice")
    if len(got) <= _MAX_MODEL_LEAVES:
        _check_round_trip(update, sections)


def _check_round_trip(update: Update, sections: dict[str, Any]) -> None:
    """Write it on top of an older shadow, and see a JSON merge of both."""
    before_us = update.time_us - 1
    older = {"a": {"a": 1, "b": {"a": "old"}}, "b": 2, "temperature": {"x": [1]}, "": {"": 3}}
    partition = Partition()
    for section in ("reported", "desired"):
        for keys, value in _leaves_of(older):
            path = "".join("/" + key for key in keys)  # none of these keys needs escaping
            text = json.dumps(value).encode()
            partition.set_value(before_us, update.shadow, section, path, text)
    partition.write_update(update)
    seen = partition.document(update.shadow)
    if "errors" in seen:
        raise Finding("the view can't read it", ascii(seen["errors"])[:300])
    for section in ("reported", "desired"):
        wanted = _plain(older)
        if section in sections:
            patch = sections[section]
            wanted = {} if patch is None else _merged(wanted, patch)
        if _plain(seen["state"].get(section, {})) != _pruned(wanted):
            raise Finding("read back it is another document", section)


# ------------------------------------------------------------------ JSON by other means


def _exact(text: bytes) -> Any:
    return json.loads(text.decode(), parse_float=_number, parse_int=_number)


def _number(text: str) -> Decimal | tuple[str, str]:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent that no Decimal has: equal to nothing else
        return ("number", text)


def _plain(value: Any) -> Any:
    """Return it in a form in which `==` means the same value: true is not 1, 1.0 is 1."""
    if isinstance(value, bool) or value is None:
        return ("is", value)
    if isinstance(value, int | float):
        return Decimal(repr(value))
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return value


def _flatten(
    node: dict[str, Any],
    section: str,
    keys: tuple[str, ...],
    found: dict[tuple[str, tuple[str, ...]], Any],
) -> None:
    for key, value in node.items():
        if isinstance(value, dict):
            _flatten(value, section, (*keys, key), found)
        else:
            found[section, (*keys, key)] = None if value is None else _plain(value)


def _leaves_of(
    node: dict[str, Any], keys: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in node.items():
        if isinstance(value, dict):
            found += _leaves_of(value, (*keys, key))
        else:
            found.append(((*keys, key), value))
    return found


def _has_leaves(node: dict[str, Any]) -> bool:
    return any(
        _has_leaves(value) if isinstance(value, dict) else value is not None
        for value in node.values()
    )


def _merged(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7396, but what sets nothing takes nothing but what it names."""
    made = dict(base)
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        elif not isinstance(value, dict):
            made[key] = _plain(value)
        else:
            below = made.get(key)
            if isinstance(below, dict):
                made[key] = _merged(below, value)
            elif _has_leaves(value):
                made[key] = _merged({}, value)
    return made


def _pruned(node: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in node.items():
        kept = _pruned(value) if isinstance(value, dict) else value
        if kept != {}:
            made[key] = kept
    return made


# ------------------------------------------------------------------ documents to begin with


def _document(draw: random.Random) -> str:
    members = []
    if draw.random() < 0.97:
        members.append(f'"state":{_space(draw)}{_state(draw)}')
    if draw.random() < 0.6:
        stamp = "1700000000000" if draw.random() < 0.6 else draw.choice(_STAMPS)
        members.append(f'"timestamp":{stamp}')
    if draw.random() < 0.25:
        members.append(f'"version":{draw.choice(_VERSIONS)}')
    if draw.random() < 0.2:
        members.append(f'"clientToken":{_value(draw, 3)}')
    if draw.random() < 0.2:
        draw.shuffle(members)
    return "{" + ",".join(members) + "}"


def _state(draw: random.Random) -> str:
    if draw.random() < 0.02:
        return draw.choice(("null", "[]", "1", '"x"', "{}"))
    sections = []
    for section in ("reported", "desired"):
        if draw.random() < (0.85 if section == "reported" else 0.25):
            content = "null" if draw.random() < 0.04 else _object(draw, 0)
            sections.append(f'"{section}":{content}')
    return "{" + ",".join(sections) + "}"


def _object(draw: random.Random, depth: int) -> str:
    count = draw.choice((0, 1, 1, 2, 2, 3, 4, 8 if depth == 0 else 2))
    members = []
    for _ in range(count):
        key = draw.choice(_KEYS[:4]) if draw.random() < 0.6 else draw.choice(_KEYS)
        members.append(f'"{key}":{_space(draw)}{_value(draw, depth + 1)}')
    return "{" + f",{_space(draw)}".join(members) + "}"


def _value(draw: random.Random, depth: int) -> str:
    chance = draw.random()
    if chance < 0.35:
        usual = draw.random() < 0.6
        return str(draw.randrange(1000)) if usual else draw.choice(_NUMBERS[:30])
    if chance < 0.55:
        return draw.choice(_STRINGS)
    if chance < 0.65:
        return draw.choice(("true", "false", "null", "null"))
    if chance < 0.75 and depth < 6:
        return "[" + ",".join(_value(draw, depth + 1) for _ in range(draw.randrange(3))) + "]"
    if depth < 5 or draw.random() < 0.5:
        return _object(draw, depth) if depth < 20 else "1"
    return "1"


def _space(draw: random.Random) -> str:
    return draw.choice(("", "", "", " ", "\n\t"))
