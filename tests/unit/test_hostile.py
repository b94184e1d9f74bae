"""What devices send never becomes CQL, a line of the log, or a label of a metric."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mqtt5
import pytest
import structlog

import shadowsvc
from shadowsvc import logs
from shadowsvc.decoding import decoder_limits
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Exposition, Metrics
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.settings import Settings
from shadowsvc.shadow.document import REASONS, Decoder
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from tests.faulty_store import FaultyStore
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(shadowsvc.__file__).parent
STORE = SOURCE / "store"

# ---------------------------------------------------------------- CQL

VERB = re.compile(
    r"\b(SELECT .*\bFROM|INSERT INTO|UPDATE .*\bSET|DELETE FROM|DELETE .* FROM|TRUNCATE"
    r"|(CREATE|ALTER|DROP) (TABLE|KEYSPACE)|BEGIN (UNLOGGED )?BATCH|USING TIMESTAMP|WHERE \w+ =)",
    re.DOTALL,
)
# A keyspace has a form of its own (`setting_forms.keyspace`); constants are not values.
CONSTANT = re.compile(r"_?[A-Z][A-Z_]*")
HARMLESS = {
    "self.settings.keyspace",
    "self._settings.keyspace",
    "settings.keyspace",
    "settings.cassandra.keyspace",
    "self._keyspace",
    "keyspace",
    # Statements made of constants, as often as a batch has devices and leaves.
    "'; '.join(rows)",
}
# It makes the schema, knows nothing of devices, and has words for people about ALTER KEYSPACE.
NO_DEVICES = {"migrate.py"}


def cql_in(path: Path) -> Iterator[tuple[int, str]]:  # noqa: C901 - a table of kinds
    """Yield every expression that is put into the text of a statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and _is_cql(node):
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    yield node.lineno, ast.unparse(part.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "format":
                for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                    yield node.lineno, ast.unparse(argument)
        elif isinstance(node, ast.BinOp) and _is_cql(node):
            if isinstance(node.op, ast.Mod):
                yield node.lineno, ast.unparse(node.right)
            elif isinstance(node.op, ast.Add):
                for side in (node.left, node.right):
                    if not isinstance(side, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                        yield node.lineno, ast.unparse(side)


def _is_cql(node: ast.AST) -> bool:
    text = " ".join(
        child.value
        for child in ast.walk(node)
        if isinstance(child, ast.Constant) and isinstance(child.value, str)
    )
    return VERB.search(text) is not None


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(STORE.glob("*.py")) if path.name not in NO_DEVICES],
    ids=lambda path: path.name,
)
def test_no_value_is_ever_part_of_a_statement(path: Path) -> None:
    found = [
        f"{path.name}:{line}: {expression}"
        for line, expression in cql_in(path)
        if expression not in HARMLESS and CONSTANT.fullmatch(expression) is None
    ]
    assert found == []


def test_statements_are_written_in_the_store_alone() -> None:
    outside = [path for path in SOURCE.rglob("*.py") if STORE not in path.parents]
    assert len(outside) > 20
    for path in outside:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                assert id(node) in documentation or not VERB.search(text), (path.name, text)


@pytest.mark.parametrize(
    "source",
    [
        'x = f"SELECT a FROM b WHERE c = {device}"',
        'x = "INSERT INTO b VALUES (%s)" % device',
        'x = "DELETE FROM b WHERE c = " + device',
        'x = "UPDATE b SET c = {}".format(device)',
    ],
)
def test_the_search_finds_what_it_looks_for(tmp_path: Path, source: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    assert [expression for _, expression in cql_in(path)] == ["device"]


# ---------------------------------------------------------------- the log

FORGED = '{"event":"forged"}'
NASTY = [
    f"a\n{FORGED}",
    f"a\r\n{FORGED}\r",
    f"a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029{FORGED}",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[2J",
    "\x9b31mred\x9d0;title\x9c",
    "\x00\x01\x08\x7f\x80",
    "\ud800 half a pair",
    '" , "level": "critical", "x": "',
]
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@pytest.mark.parametrize("form", ["json", "console"])
def test_nothing_that_a_device_sends_makes_a_line_or_steers_a_terminal(
    tmp_path: Path, form: str
) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        logs.configure("DEBUG", form, fd=fd)
        log = structlog.get_logger()
        count = 0
        for text in NASTY:
            log.warning("rejected", topic=text, device=text, detail=text)
            log.warning(text, **{text: [text, {text: text}]}, payload=text.encode(errors="replace"))
            log.warning("wrapped", error=ValueError(text), path=Path("a") / text.replace("\0", ""))
            logging.getLogger("driver").info("it says %s", text)
            logging.getLogger(text).error(text)
            count += 5
    finally:
        logs.shutdown()
        os.close(fd)
    written = path.read_bytes().decode()
    lines = written.split("\n")
    assert lines.pop() == ""
    assert len(lines) == count
    for line in lines:
        assert STEERING.search(line) is None, line
        if form == "json":
            event = json.loads(line)
            assert event["event"] != "forged"
            assert event["level"] in {"info", "warning", "error"}
    assert len(written.splitlines()) == count


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_cannot_be_forged_into_another_event(tmp_path: Path, form: str) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        logs.configure("DEBUG", form, fd=fd)
        for text in NASTY:
            try:
                int(text)
            except ValueError:
                structlog.get_logger().exception("failed", topic=text)
    finally:
        logs.shutdown()
        os.close(fd)
    written = path.read_bytes().decode()
    assert STEERING.search(written) is None
    if form == "json":
        events = [json.loads(line) for line in written.split("\n") if line]
        assert [event["event"] for event in events] == ["failed"] * len(NASTY)


# ---------------------------------------------------------------- metrics


def packet(topic: str, payload: bytes, number: int, properties: list[tuple[str, str]]) -> Any:
    return mqtt5.PublishPacket(
        topic,
        payload,
        qos=mqtt5.QoS.AT_LEAST_ONCE,
        packet_id=number,
        user_properties=properties,
    )


def hostile_traffic() -> Iterator[tuple[str, bytes, list[tuple[str, str]]]]:
    good = "things/d/shadow/update"
    for number in range(50):
        name = f"evil{number}"
        yield f"things/{name}/shadow/update", b'{"state":{"reported":{"%s":1}}}' % name.encode(), []
        yield f"{name}/{name}", b"{}", []
        yield f"things/{name}\n{name}/shadow/update", b"{}", []
        yield f"things/d/shadow/name/{name}/update", b'{"state":{"%s":{}}}' % name.encode(), []
        yield good, name.encode(), []
        yield good, b'{"state":{"reported":{"a":1}},"timestamp":"%s"}' % name.encode(), []
        yield good, b'{"state":{"reported":{"a":1}}}', [("timestamp", name)]
        yield good, b'{"state":{"reported":{"a":1}}}', [(name, name)] * 100
        yield good, b'{"state":{"reported":{"a":1%s}}}' % (b"0" * number), [("reason", name)]
        yield good, b'{"state":{"reported":{"a":0.%s1}}}' % (b"0" * 30), []


async def test_hostile_traffic_makes_no_new_label_values() -> None:
    settings = Settings()
    metrics, ledger, store = Metrics(), Ledger(), FaultyStore()
    decoder = Decoder(TopicParser("things"), decoder_limits(settings))
    batcher = Batcher(None, max_partitions=10, max_bytes=5120)
    pipeline = Pipeline(
        Options("client", concurrency=4, max_dead_letters_per_minute=1_000_000),
        decoder, batcher, store, ledger, metrics, lambda _: None,
    )  # fmt: skip
    exposition = Exposition(
        metrics, ledger, pipeline, now=lambda: 0.0, is_ready=lambda: True,
        without_device_time=lambda: 0, log_lines_dropped=lambda: 0,
    )  # fmt: skip
    sent = 0
    try:
        pipeline.begin_chunk()
        for sent, (topic, payload, properties) in enumerate(hostile_traffic(), 1):
            pipeline.publish(topic, packet(topic, payload, sent, properties))
        pipeline.end_chunk()
        await until(lambda: not ledger.held, 20)
    finally:
        await pipeline.close()
    _, body = exposition.render("")
    assert sent == 500
    assert metrics.rejected.total() >= 350
    assert len(metrics.rejected) >= 6
    assert set(metrics.rejected) <= set(REASONS)
    assert set(metrics.dead_letters) <= set(REASONS)
    assert b"evil" not in body
