"""`shadowsvc dead-letters` on letters that a real service wrote to a real Cassandra."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import unicodedata
import uuid
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from cassandra.concurrent import execute_concurrent_with_args

from shadowsvc.store.deadletter import SHARDS
from shadowsvc.store.migrate import migrations
from tests.keyspaces import cells, make_schema, migrated_keyspace
from tests.oracle import Oracle
from tests.proxied import Proxied
from tests.service import COMMAND, ServiceProcess, environment, run_command, variables
from tests.serving import serving, wait_nothing_held

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import backing
    from tests.serving import Serve

pytestmark = pytest.mark.timeout(240)

HOUR_MS = 3_600_000
FEW_LEAVES = {"SHADOWSVC_SHADOW__MAX_LEAVES": "3"}
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class Letters:
    """The commands, and what the tables hold."""

    def __init__(self, settings: Mapping[str, str], session: Any, keyspace: str) -> None:
        self.settings = dict(settings)
        self.session = session
        self.keyspace = keyspace

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        given = {f"SHADOWSVC_{name}": value for name, value in more.items()}
        done = run_command(self.settings | given, "dead-letters", *arguments, limit_seconds=120)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def listed(self, *arguments: str) -> list[dict[str, Any]]:
        done = self.run("list", "--json", "--limit", "0", *arguments)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def replayed(self, *arguments: str, code: int = 0, **more: str) -> dict[str, Any]:
        """Replay and return what came of each letter by id, and of all under `summary`."""
        done = self.run("replay", "--json", *arguments, **more)
        assert done.returncode == code, done.stdout + done.stderr
        *lines, last = map(json.loads, done.stdout.splitlines())
        told: dict[str, Any] = {line["id"]: line for line in lines} | last
        return told

    def rows(self, device: str) -> list[tuple[Any, ...]]:
        """Return all cells of a device with their write times."""
        return cells(self.session, self.keyspace, device)

    def count(self) -> int:
        table = f"{self.keyspace}.dead_letter"
        count: int = self.session.execute(f"SELECT count(*) FROM {table}", timeout=60).one()[0]  # noqa: S608
        return count


class Running(NamedTuple):
    """A service that takes three leaves an update, and its commands."""

    service: ServiceProcess
    oracle: Oracle
    letters: Letters

    def settle(self) -> None:
        """Wait until all that was published is acknowledged."""
        self.oracle.wait_taken()
        wait_nothing_held(self.service)

    def letter(self, topic: str, payload: bytes, properties: Any = ()) -> Any:
        """Publish what becomes a dead letter; return its row, the ID as text."""
        known = {one.id for one in self._rows()}
        self.oracle.raw(topic, payload, properties=properties)
        self.settle()
        (new,) = [one for one in self._rows() if one.id not in known]
        return new._replace(id=str(new.id))

    def _rows(self) -> list[Any]:
        # Without device_time, which may lie beyond what a Python datetime holds.
        return list(
            self.letters.session.execute(
                "SELECT id, reason, device, topic, detail, received_at "  # noqa: S608
                f"FROM {self.letters.keyspace}.dead_letter"
            )
        )


def many(count: int, **more: Any) -> bytes:
    leaves = {f"k{number}": number for number in range(count)}
    return json.dumps({"state": {"reported": leaves}} | more).encode()


@pytest.fixture(scope="module")
def running(
    broker: backing.Broker,
    cassandra: backing.Database,
    cql: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """With a keyspace that has no other letters."""
    name = f"t{uuid.uuid4().hex[:12]}"
    log = tmp_path_factory.mktemp("dead-letters") / "service.log"
    with migrated_keyspace(cassandra) as keyspace:
        settings = variables(broker, cassandra, keyspace, name)
        with (
            ServiceProcess(settings | FEW_LEAVES, log) as service,
            Oracle(broker, cql, keyspace, name) as oracle,
        ):
            service.wait_ready()
            yield Running(service, oracle, Letters(settings, cql, keyspace))


# ---------------------------------------------------------------- looking


def test_a_letter_is_listed_and_shown_whole(running: Running, unique: str) -> None:
    payload = b'{"no":"\x1b]0;owned\x07\xff"'
    properties = [("a", "1"), ("a", "\u202e2")]  # brokers take no control characters here
    letter = running.letter(running.oracle.topic(unique), payload, properties)
    letters = running.letters
    (listed,) = letters.listed("--device", unique)
    assert listed == {
        "id": letter.id,
        "received_at": listed["received_at"],
        "reason": "not_utf8",
        "device": unique,
        "topic": letter.topic,
        "detail": letter.detail,
        "payload_bytes": len(payload),
    }

    line = letters.run("list", "--device", unique, "--since", "1h").stdout
    assert line.split("\t")[:4] == [listed["received_at"], "not_utf8", unique, listed["id"]]
    shown = letters.run("show", listed["id"]).stdout
    for text in (line, shown):
        found = {char for char in text if unicodedata.category(char) in STEERING}
        assert found <= {"\n", "\t"}
    assert r"\u001b]0;owned\u0007\xff" in shown
    assert running.oracle.topic(unique) in shown

    raw = subprocess.run(
        [*COMMAND, "dead-letters", "show", listed["id"], "--raw"],
        env=environment(letters.settings),
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    assert raw.stdout == payload
    whole = json.loads(letters.run("show", listed["id"], "--json").stdout)
    assert whole["user_properties"] == [list(pair) for pair in properties]
    assert whole["payload_truncated"] is False
    assert whole["payload"] is None


def test_an_id_that_is_nowhere_ends_with_1(running: Running) -> None:
    done = running.letters.run("show", str(uuid.uuid4()))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no dead letter" in done.stderr
    assert running.letters.run("replay", str(uuid.uuid4())).returncode == 1


def test_filters_choose_and_the_summary_counts(running: Running, unique: str) -> None:
    topic = running.oracle.topic(unique)
    for payload in (b"{", b"[", many(4)):
        running.letter(topic, payload)
    letters = running.letters
    by_device = letters.listed("--device", unique)
    assert [one["reason"] for one in by_device] == ["too_many_leaves", "not_json", "not_json"]
    times = [one["received_at"] for one in by_device]
    assert times == sorted(times, reverse=True)
    assert len(letters.listed("--device", unique, "--reason", "not_json")) == 2
    assert len(letters.listed("--device", unique, "--since", times[1])) == 2
    assert len(letters.listed("--device", unique, "--until", times[1])) == 1
    two = letters.run("list", "--device", unique, "--limit", "2")
    assert len(two.stdout.splitlines()) == 2
    assert "--limit 0" in two.stderr
    counted = json.loads(letters.run("list", "--summary", "--json", "--device", unique).stdout)
    assert counted["letters"] == 3
    assert counted["reasons"]["not_json"]["letters"] == 2


# ---------------------------------------------------------------- replay


def test_a_replay_writes_once_and_for_all_with_the_original_time(
    running: Running, unique: str
) -> None:
    stamp = time.time_ns() // 1000 - 60_000_000
    listed = running.letter(running.oracle.topic(unique), many(5, timestamp=stamp))
    letters = running.letters
    before = letters.count()

    dry = letters.replayed(listed.id, "--dry-run")
    assert dry[listed.id]["outcome"] == "replayed"
    assert letters.rows(unique) == []

    told = letters.replayed("--device", unique)
    assert told[listed.id]["time_us"] == stamp
    rows = letters.rows(unique)
    assert [row[2] for row in rows] == [f"/k{number}" for number in range(5)]
    assert {row[4] for row in rows} == {stamp}
    assert {row[5] for row in rows} == {stamp}

    assert letters.replayed("--device", unique)["summary"]["outcomes"]["replayed"] == 1
    assert letters.rows(unique) == rows
    assert letters.count() == before


def test_without_a_device_time_the_time_of_receipt_is_written(
    running: Running, unique: str
) -> None:
    listed = running.letter(running.oracle.topic(unique), many(4))
    running.letters.replayed(listed.id)
    rows = running.letters.rows(unique)
    running.letters.replayed(listed.id)
    assert running.letters.rows(unique) == rows
    received_us = (listed.received_at - datetime(1970, 1, 1)) // timedelta(microseconds=1)  # noqa: DTZ001 - cassandra-driver's times are naive, in UTC
    assert {one[4] for one in rows} == {received_us}


def test_what_a_device_sent_since_is_not_undone(running: Running, unique: str) -> None:
    stamp = time.time_ns() // 1000 - 60_000_000
    listed = running.letter(running.oracle.topic(unique), many(4, timestamp=stamp))
    running.oracle.update(unique, {"reported": {"k0": "newer", "k1": None}})
    running.settle()
    heard = running.letters.rows(unique)[0][5]
    running.letters.replayed(listed.id)
    rows = running.letters.rows(unique)
    assert [(row[2], row[3]) for row in rows] == [("/k0", '"newer"'), ("/k2", "2"), ("/k3", "3")]
    assert {row[5] for row in rows} == {heard}


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        (int(time.time()) + 86_400, "time_in_future"),
        (2**62 - 2, "time_in_future"),
        (1_500_000_000, "time_too_old"),
    ],
    ids=["ahead", "far ahead", "old"],
)
def test_an_impossible_time_needs_restamp(
    running: Running, unique: str, stamp: int, reason: str
) -> None:
    listed = running.letter(running.oracle.topic(unique), many(1, timestamp=stamp))
    assert listed.reason == reason
    letters = running.letters
    assert letters.run("show", listed.id).returncode == 0
    told = letters.replayed(listed.id, code=1)
    assert told[listed.id]["outcome"] == "needs_restamp"
    assert letters.rows(unique) == []
    text = letters.run("replay", listed.id).stdout
    assert "--restamp" in text

    before_us = time.time_ns() // 1000
    letters.replayed(listed.id, "--restamp", "--purge")
    ((_, _, path, _, written_us, _),) = letters.rows(unique)
    assert path == "/k0"
    assert before_us <= written_us <= time.time_ns() // 1000
    assert letters.listed("--device", unique) == []


def test_what_is_still_no_update_stays_and_no_second_letter_is_made(
    running: Running, unique: str
) -> None:
    topic = running.oracle.topic(unique)
    bad = running.letter(topic, b"{")
    large = running.letter(topic, b'{"a":"' + b"x" * 70_000 + b'"}')
    leaves = running.letter(topic, many(4))
    letters = running.letters
    before, figures = letters.count(), running.service.metrics()
    told = letters.replayed("--device", unique, "--purge", code=1, SHADOW__MAX_LEAVES="3")
    assert told[bad.id]["reason_now"] == "not_json"
    assert told[large.id]["outcome"] == "truncated"
    assert told[leaves.id]["reason_now"] == "too_many_leaves"
    assert told["summary"]["deleted"] == 0
    assert letters.count() == before
    assert running.service.metrics().since(figures, "dead_letters_total") == 0

    told = letters.replayed("--device", unique, "--purge", code=1)
    assert told["summary"]["deleted"] == 1
    assert {one["id"] for one in letters.listed("--device", unique)} == {bad.id, large.id}


def test_what_cassandra_refused_is_replayed_once_the_cause_is_mended(
    serve_own: Serve, own_migrated: str, unique: str
) -> None:
    """One request for all leaves is above that server's `max_mutation_size`; parts are not."""
    payload = {"state": {"reported": {"p" * 1000: {f"k{number}": 1 for number in range(300)}}}}
    with serve_own(CASSANDRA__BATCH_MAX_BYTES=1_000_000) as (service, oracle):
        oracle.raw(oracle.topic(unique), json.dumps(payload).encode())
        oracle.wait_taken()
        service.wait_until(
            lambda: service.metrics().total("dead_letters_total", reason="refused_by_store") == 1,
            "it is refused",
        )
        letters = Letters(service.settings, oracle.session, own_migrated)
        (listed,) = letters.listed("--device", unique)
        told = letters.replayed(listed["id"], code=1)
        assert told[listed["id"]]["reason_now"] == "refused_by_store"
        assert len(letters.listed("--device", unique)) == 1
        letters.replayed(listed["id"], CASSANDRA__BATCH_MAX_BYTES="5120")
        assert len(letters.rows(unique)) == 300


# ---------------------------------------------------------------- purge


def test_purge_shows_counts_and_deletes_what_was_chosen(running: Running, unique: str) -> None:
    topic = running.oracle.topic(unique)
    kept = running.letter(topic, many(4))
    for payload in (b"{", b"["):
        running.letter(topic, payload)
    letters = running.letters
    before = letters.count()
    refused = letters.run("purge", "--device", unique)
    assert refused.returncode == 2
    assert letters.count() == before
    done = letters.run("purge", "--device", unique, "--reason", "not_json", "--yes")
    assert done.returncode == 0
    assert done.stdout == "2 dead letters deleted\n"
    assert "2\tnot_json" in done.stderr
    assert [one["id"] for one in letters.listed("--device", unique)] == [kept.id]
    assert letters.count() == before - 2


# ---------------------------------------------------------------- many


class Hand(NamedTuple):
    """Letters written by hand into a keyspace of their own."""

    letters: Letters
    now_ms: int


LETTERS = 10_000
PAYLOAD_BYTES = 10_000


@pytest.fixture(scope="module")
def keyspace_by_hand(cassandra: backing.Database) -> Iterator[str]:
    """A keyspace for letters that no service wrote."""
    with migrated_keyspace(cassandra) as name:
        yield name


@pytest.fixture(scope="module")
def flood(
    broker: backing.Broker, cassandra: backing.Database, keyspace_by_hand: str, cql: Any
) -> Hand:
    """Ten thousand letters of three hours with 100 MB of payloads: a cause that was mended."""
    from shadowsvc.store.deadletter import DeadLetter

    keyspace = keyspace_by_hand
    settings = variables(broker, cassandra, keyspace, "things")
    now_ms = int(time.time() * 1000)
    insert = cql.prepare(
        f"INSERT INTO {keyspace}.dead_letter (bucket, shard, received_at, id, device, topic, "  # noqa: S608
        "reason, detail, payload, payload_bytes, payload_sha256) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    )

    def rows() -> Iterator[tuple[Any, ...]]:
        for number in range(LETTERS):
            one = DeadLetter.of(
                topic=f"things/d{number % 50}/shadow/update",
                payload=many(2).ljust(PAYLOAD_BYTES),
                device=f"d{number % 50}",
                reason="too_many_leaves",
                detail="",
                received_ms=now_ms - number * 1000,
                client_id="",
                qos=1,
                retain=False,
                duplicate=False,
                user_properties=(),
            )
            yield (
                one.bucket_ms, one.shard, one.received_ms, one.id, one.device, one.topic,
                one.reason, one.detail, one.payload, one.payload_bytes, one.payload_sha256,
            )  # fmt: skip

    execute_concurrent_with_args(cql, insert, rows(), concurrency=32)
    return Hand(Letters(settings, cql, keyspace), now_ms)


def memory_of(letters: Letters, *arguments: str) -> tuple[str, int]:
    """Run a command; return its output and the most memory that it had, in KiB."""
    code = (
        "import resource, sys\n"
        "from shadowsvc.cli import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "dead-letters", *arguments],
        env=environment(letters.settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout, int(done.stderr.split()[-1])


@pytest.mark.slow
def test_ten_thousand_letters_are_read_without_holding_them(flood: Hand) -> None:
    letters = flood.letters
    _, few = memory_of(letters, "list", "--limit", "100", "--json")
    text, all_of_them = memory_of(letters, "list", "--limit", "0", "--json")
    ids = [json.loads(line)["id"] for line in text.splitlines()]
    assert len(set(ids)) == len(ids) == LETTERS
    assert all_of_them - few < 20_000
    times = [json.loads(line)["received_at"] for line in text.splitlines()]
    assert times == sorted(times, reverse=True)


def test_ten_thousand_letters_are_replayed_without_holding_them(flood: Hand) -> None:
    letters = flood.letters
    _, few = memory_of(letters, "replay", "--limit", "100")
    text, all_of_them = memory_of(letters, "replay")
    assert f"{LETTERS:,} replayed" in text
    # The payloads alone are 100 MB.
    assert all_of_them - few < 40_000
    newest = {f"d{number}": (flood.now_ms - number * 1000) * 1000 for number in range(50)}
    for device, stamp in newest.items():
        assert {row[4] for row in letters.rows(device)} == {stamp}


def start(letters: Letters, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "dead-letters", *arguments],
        env=environment(letters.settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    """Return the lines that are left, and standard error, of a process that ends by itself."""
    assert process.stdout is not None
    assert process.stderr is not None
    # Not `communicate`, which would lose what was read ahead.
    lines = [json.loads(line) for line in process.stdout]
    error = process.stderr.read()
    process.wait(60)
    process.stdout.close()
    process.stderr.close()
    return lines, error


def test_ctrl_c_ends_a_replay_with_what_it_did_so_far(flood: Hand) -> None:
    process = start(flood.letters, "replay", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    (*lines, last), err = ended(process)
    assert process.returncode == 130, err
    assert err == ""
    summary = last["summary"]
    assert summary["interrupted"] is True
    assert 0 < summary["letters"] < LETTERS
    assert summary["outcomes"]["replayed"] == len(lines) + 1  # one was read before


def test_an_outage_ends_a_replay_with_what_was_done_and_it_may_be_repeated(
    flood: Hand, cassandra: backing.Database
) -> None:
    with Proxied(cassandra.contact_points[0], cassandra.port) as proxied:
        away = Letters(flood.letters.settings, flood.letters.session, flood.letters.keyspace)
        away.settings |= {
            "SHADOWSVC_CASSANDRA__CONTACT_POINTS": "127.0.0.1",
            "SHADOWSVC_CASSANDRA__PORT": str(proxied.port),
            "SHADOWSVC_CASSANDRA__REQUEST_TIMEOUT_SECONDS": "1",
        }
        process = start(away, "replay", "--json")
        assert process.stdout is not None
        process.stdout.readline()
        assert proxied.do(lambda proxy: proxy.connections) > 0
        proxied.do(lambda proxy: proxy.refuse())
        assert proxied.do(lambda proxy: proxy.reset()) > 0
        (*_, last), err = ended(process)
    assert process.returncode == 1, err
    (line,) = err.splitlines()
    assert "repeating all of it is safe" in line
    summary = last["summary"]
    assert summary["error"]
    assert 0 < summary["letters"] < LETTERS


@pytest.mark.slow
def test_purge_of_a_time_deletes_it_whole_even_rows_of_a_clock_that_is_ahead(
    flood: Hand,
) -> None:
    """The last of this file to use these letters: they are gone afterwards."""
    letters = flood.letters
    ahead_us = time.time_ns() // 1000 + 60_000_000
    at_ms = flood.now_ms - 5_000
    for reason in ("not_json", "topic"):
        letters.session.execute(
            f"INSERT INTO {letters.keyspace}.dead_letter (bucket, shard, received_at, id, reason) "  # noqa: S608
            "VALUES (%s, 0, %s, %s, %s) USING TIMESTAMP %s",
            (at_ms - at_ms % HOUR_MS, at_ms, uuid.UUID(int=8 * SHARDS), reason, ahead_us),
        )
        done = letters.run("purge", "--reason", reason, "--yes")
        assert done.stdout == "1 dead letters deleted\n"
        assert letters.listed("--reason", reason) == []
        ahead_us += 60_000_000
    cut = (flood.now_ms - 5_000_000) / 1000
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(cut))
    older = len(letters.listed("--until", until))
    assert 0 < older < LETTERS
    done = letters.run("purge", "--until", until, "--yes")
    assert done.stdout == f"{older} dead letters deleted\n"
    assert letters.count() == LETTERS - older
    assert letters.run("purge", "--yes").returncode == 0
    assert letters.count() == 0
    assert letters.listed() == []


# ---------------------------------------------------------------- the service itself


def test_a_dead_letter_that_cassandra_does_not_take_holds_its_ack(
    broker: backing.Broker,
    cassandra: backing.Database,
    keyspace: str,
    cql: Any,
    unique: str,
    tmp_path: Path,
) -> None:
    """The table is dropped under the service, and made again."""
    make_schema(cassandra, keyspace)
    table = next(one for one in migrations() if "dead_letter" in one.name).statements
    log = tmp_path / "service.log"
    with serving(broker, cassandra, keyspace, unique, log, session=cql) as (service, oracle):
        cql.execute(f"DROP TABLE {keyspace}.dead_letter", timeout=60)
        before = service.metrics()
        oracle.raw(oracle.topic(unique), b"{")
        oracle.update(unique, {"reported": {"a": 1}})
        oracle.wait_right()  # the neighbour is written, and waits for its turn to be acknowledged
        service.wait_until(
            lambda: service.metrics().since(before, "write_retries_total") >= 3, "it is retried"
        )
        now = service.metrics()
        assert now.since(before, "updates_durable_total") == 1
        assert now.since(before, "messages_acknowledged_total") == 0
        assert now.total("unacknowledged_deliveries") == 2
        service.wait_until(lambda: "cassandra_unavailable" in service.ready_reasons(), "it says so")
        assert service.live()

        for statement in table:
            text = statement.replace("EXISTS dead_letter", f"EXISTS {keyspace}.dead_letter")
            cql.execute(text, timeout=60)
        service.wait_until(
            lambda: service.metrics().since(before, "messages_acknowledged_total") == 2,
            "both are acknowledged",
        )
        (letter,) = oracle.dead_letters(unique)
        assert letter.payload == b"{"
