"""Who adopts what, when, and under which lease: with slots in memory and a clock that leaps."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import structlog.testing

from shadowsvc.adoption import OUTCOMES, Adopter, Orphans, Terms
from shadowsvc.errors import ConnectionLost
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Metrics
from shadowsvc.mqtt.adoption import End
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from tests.faulty_store import FaultyStore
from tests.line import nothing_lost
from tests.memory_slots import LOST, MemoryTable, Rows, in_leaps

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from shadowsvc.mqtt.adoption import Emptier

TERMS = Terms(lease_seconds=30, renew_seconds=10, orphan_after_seconds=300)
DUE_SECONDS = 400
"""By then an orphan was adopted: 300 s, a quarter more by the draw, and the time between looks."""


def least(low: float, _high: float) -> float:
    return low


def most(_low: float, high: float) -> float:
    return high


# -------------------------------------------------------------------- which slots are orphans


def look_every_10_s(orphans: Orphans, free: set[str], start: float, end: float) -> None:
    for step in range(int((end - start) // 10) + 1):
        orphans.look(free, start + 10 * step)


def test_a_slot_is_an_orphan_when_it_was_seen_free_for_long_enough() -> None:
    orphans = Orphans(TERMS, least)
    look_every_10_s(orphans, {"g-1"}, 0, 290)
    assert orphans.due(290) is None
    assert orphans.count(290) == 0
    orphans.look({"g-1"}, 300)
    assert orphans.due(300) == "g-1"
    assert orphans.count(300) == 1


def test_a_slot_that_was_taken_meanwhile_begins_anew() -> None:
    orphans = Orphans(TERMS, least)
    look_every_10_s(orphans, {"g-1"}, 0, 200)
    orphans.look(set(), 210)
    look_every_10_s(orphans, {"g-1"}, 220, 510)
    assert orphans.due(510) is None
    orphans.look({"g-1"}, 520)
    assert orphans.due(520) == "g-1"


def test_time_for_which_nobody_looked_does_not_count() -> None:
    orphans = Orphans(TERMS, least)
    look_every_10_s(orphans, {"g-1"}, 0, 200)
    orphans.look({"g-1"}, 1000)  # the process was stopped
    assert orphans.due(1000) is None
    assert orphans.count(1000) == 0


def test_processes_wait_by_their_own_draw_and_not_much_longer() -> None:
    orphans = Orphans(TERMS, most)
    look_every_10_s(orphans, {"g-1"}, 0, 370)
    assert orphans.due(370) is None
    orphans.look({"g-1"}, 380)
    assert orphans.due(380) == "g-1"
    draws = {Orphans(TERMS) for _ in range(50)}
    for one in draws:
        look_every_10_s(one, {"g-1"}, 0, 340)
    assert 0 < sum(one.due(340) is not None for one in draws) < 50


def test_the_one_that_is_due_for_the_longest_comes_first() -> None:
    orphans = Orphans(TERMS, least)
    orphans.look({"g-2"}, 0)
    look_every_10_s(orphans, {"g-1", "g-2", "g-3"}, 10, 400)
    assert orphans.due(400) == "g-2"
    orphans.forget("g-2")
    assert orphans.due(400) in {"g-1", "g-3"}


def test_waits_after_a_failure_double_up_to_a_limit_and_are_forgotten() -> None:
    orphans = Orphans(TERMS, most)
    orphans.look({"g-1"}, 0)
    assert [orphans.postpone("g-1", 0) for _ in range(8)] == [10, 20, 40, 80, 160, 320, 600, 600]
    assert orphans.due(599) is None
    orphans.forget("g-1")
    assert orphans.postpone("g-1", 0) == 10


# -------------------------------------------------------------------- adoptions


class Attempt:
    """An adoption that ends when it is told to; stands for `mqtt.adoption.Adoption`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = False
        self.left = False
        self.end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    async def run(self) -> End:
        self.started = True
        try:
            return await asyncio.shield(self.end)
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # leaving takes a moment
            self.left = True
            raise


class Bench:
    """An adopter, the slots that it sees, and what it did."""

    def __init__(self, rows: Rows, name: str, former: dict[str, uuid.UUID] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.rows = rows
        self.table = MemoryTable(rows)
        self.attempts: list[Attempt] = []
        self.metrics = Metrics()
        self.may = True
        self.must_leave = False
        self.pipeline = Pipeline(
            Options("", 10, concurrency=1),
            Decoder(TopicParser("things"), Limits()),
            Batcher(None),
            FaultyStore(),
            Ledger(),
            self.metrics,
            lambda data: self.adopter.send(data),  # noqa: PLW0108 - made below
        )
        self.adopter = Adopter(
            self.table,
            self.pipeline,
            self._make,  # type: ignore[arg-type]
            self.metrics,
            terms=TERMS,
            owner=f"{name} (adopting)",
            own_slot=lambda: "g-0",
            may_adopt=lambda: self.may,
            must_leave=lambda: self.must_leave,
            former=former,
            now=self.loop.time,
        )
        self.task = asyncio.create_task(self.adopter.run())

    def _make(self, name: str, _emptier: Emptier) -> Attempt:
        self.attempts.append(Attempt(name))
        return self.attempts[-1]

    async def attempt(self, count: int = 1, *, seconds: float = DUE_SECONDS) -> Attempt:
        """Wait until the given attempt runs."""
        await until(
            lambda: len(self.attempts) >= count and self.attempts[count - 1].started, seconds
        )
        return self.attempts[count - 1]

    async def outcome(self, outcome: str, count: int = 1, *, seconds: float = 60) -> None:
        assert outcome in OUTCOMES
        await until(lambda: self.metrics.adoptions[outcome] >= count, seconds)

    def owner(self, name: str) -> str | None:
        (slot,) = [slot for slot in self.rows.slots() if slot.name == name]
        return slot.owner

    @property
    def names(self) -> list[str]:
        return [slot.name for slot in self.rows.slots()]


async def until(condition: Callable[[], object], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of all kinds
            await asyncio.sleep(0.1)


def rows_of(count: int) -> Rows:
    """Return slots that nobody has."""
    rows = Rows(asyncio.get_running_loop().time, int(TERMS.lease_seconds))
    for number in range(count):
        token = uuid.uuid4()
        assert rows.create(number, "gone", token)
        assert rows.release(f"g-{number}", token)
    return rows


@asynccontextmanager
async def adopter(
    count: int = 2,
    *,
    rows: Rows | None = None,
    name: str = "me",
    former: dict[str, uuid.UUID] | None = None,
) -> AsyncIterator[Bench]:
    """Run one that has the slot 0 itself, among `count` that are free."""
    with nothing_lost():
        made = Bench(rows or rows_of(count), name, former)
        try:
            yield made
        finally:
            await made.adopter.stop(10)
            await made.pipeline.close()
            assert not made.task.done(), "it ended by itself"
            made.task.cancel()
            await asyncio.gather(made.task, return_exceptions=True)


@pytest.mark.parametrize("end", [End.EMPTIED, End.ABSENT])
@in_leaps
async def test_an_orphan_is_leased_emptied_and_deleted(end: End) -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        assert made.loop.time() >= TERMS.orphan_after_seconds
        assert attempt.name == "g-1"
        assert made.owner("g-1") == "me (adopting)"
        assert made.metrics.adopting
        assert made.pipeline.options.client_id == "g-1"
        attempt.end.set_result(end)
        await made.outcome(end.value)
        assert made.names == ["g-0"]
        assert not made.metrics.adopting
        await until(lambda: made.metrics.orphaned_slots == 0, 30)


@in_leaps
async def test_what_its_own_earlier_life_held_is_adopted_as_soon_as_the_lease_has_ended() -> None:
    rows, token = rows_of(3), uuid.uuid4()
    assert rows.take("g-2", "me, killed", token)
    async with adopter(rows=rows, former={"g-2": token}) as made:
        attempt = await made.attempt(seconds=TERMS.lease_seconds + 2 * TERMS.renew_seconds)
        assert attempt.name == "g-2"
        assert made.loop.time() >= TERMS.lease_seconds - 1
        attempt.end.set_result(End.EMPTIED)
        await made.outcome("emptied")
        assert (await made.attempt(2)).name == "g-1", "that had another owner, and waits as ever"
        assert made.loop.time() >= TERMS.orphan_after_seconds


@in_leaps
async def test_what_fails_of_an_earlier_life_is_tried_again_with_the_usual_waits() -> None:
    rows, token = rows_of(2), uuid.uuid4()
    assert rows.take("g-1", "me, killed", token)
    async with adopter(rows=rows, former={"g-1": token}) as made:
        for count in range(1, 4):
            attempt = await made.attempt(count, seconds=100)
            attempt.end.set_exception(ConnectionLost("network", "gone"))
            await made.outcome("broker", count)
        assert made.loop.time() < TERMS.orphan_after_seconds


@in_leaps
async def test_a_slot_of_an_earlier_life_that_lives_or_is_anothers_by_now_waits_as_ever() -> None:
    rows, twin, former = rows_of(3), uuid.uuid4(), {}
    for name in ("g-1", "g-2"):
        former[name] = uuid.uuid4()
        assert rows.take(name, "me, as it seemed", former[name])
    async with adopter(rows=rows, former=former) as made:
        for _ in range(100):  # the first was no earlier life: it lives, and renews
            await asyncio.sleep(10)
            assert rows.renew("g-1", former["g-1"])
            if rows.token("g-2") is None:
                assert rows.take("g-2", "another", twin)
            elif rows.token("g-2") == twin:
                assert rows.renew("g-2", twin)
        assert made.attempts == []
        assert set(former) == {"g-1"}
        freed = made.loop.time()
        assert rows.release("g-2", twin)
        attempt = await made.attempt(seconds=100)
        assert attempt.name == "g-1", "its owner ended after all"
        attempt.end.set_result(End.EMPTIED)
        assert (await made.attempt(2)).name == "g-2"
        assert made.loop.time() - freed >= TERMS.orphan_after_seconds


@in_leaps
async def test_the_lease_is_renewed_for_as_long_as_it_takes() -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        for _ in range(1000):
            await asyncio.sleep(1)
            assert made.owner("g-1") == "me (adopting)"
        attempt.end.set_result(End.EMPTIED)
        await made.outcome("emptied")
        assert made.table.asked.count("renew") >= 99


@in_leaps
async def test_slots_in_use_and_the_own_one_are_left_alone() -> None:
    async with adopter() as made:
        token = uuid.uuid4()
        assert made.rows.take("g-1", "another", token)
        for _ in range(200):
            await asyncio.sleep(10)
            assert made.rows.renew("g-1", token)
        assert "take" not in made.table.asked
        assert made.metrics.orphaned_slots == 0


@in_leaps
async def test_a_slot_that_is_used_again_and_again_is_no_orphan() -> None:
    async with adopter() as made:
        for _ in range(20):
            token = uuid.uuid4()
            assert made.rows.take("g-1", "another", token)
            await asyncio.sleep(20)
            assert made.rows.release("g-1", token)
            await asyncio.sleep(200)
        assert "take" not in made.table.asked


@in_leaps
async def test_one_at_a_time() -> None:
    async with adopter(4) as made:
        for count in (1, 2, 3):
            attempt = await made.attempt(count)
            await asyncio.sleep(300)
            assert len(made.attempts) == count
            assert made.metrics.orphaned_slots == 4 - count
            attempt.end.set_result(End.EMPTIED)
            await made.outcome("emptied", count)
        assert {attempt.name for attempt in made.attempts} == {"g-1", "g-2", "g-3"}
        assert made.names == ["g-0"]


@in_leaps
async def test_a_process_that_has_not_joined_the_share_adopts_nothing() -> None:
    async with adopter() as made:
        made.may = False
        await asyncio.sleep(2000)
        assert made.metrics.orphaned_slots == 1
        assert "take" not in made.table.asked
        made.may = True
        await made.attempt(seconds=30)


@in_leaps
async def test_of_many_processes_one_adopts_each_slot() -> None:
    rows = rows_of(3)
    async with adopter(rows=rows, name="a") as one, adopter(rows=rows, name="b") as other:
        await one.attempt()
        await other.attempt()
        await asyncio.sleep(1000)
        assert {attempt.name for made in (one, other) for attempt in made.attempts} == {
            "g-1",
            "g-2",
        }
        for made in (one, other):
            made.attempts[0].end.set_result(End.EMPTIED)
            await made.outcome("emptied")
        await asyncio.sleep(1000)
        assert len(one.attempts) == len(other.attempts) == 1


@in_leaps
async def test_a_slot_that_another_took_first_is_not_fought_for() -> None:
    async with adopter() as made:
        await asyncio.sleep(200)
        made.table.seconds = 5
        await until(lambda: "take" in made.table.asked, DUE_SECONDS)
        assert made.rows.take("g-1", "another", uuid.uuid4())  # while the request is on its way
        await made.outcome("taken")
        assert made.attempts == []
        assert made.owner("g-1") == "another"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ConnectionLost("session_taken_over", "gone"), "broker"),
        (ConnectionLost("stalled_unsubscribe", "nothing"), "timeout"),
        (ConnectionLost("restless", "on and on"), "timeout"),
    ],
)
@in_leaps
async def test_after_a_failure_the_lease_is_given_back_and_it_is_tried_later(
    error: ConnectionLost, outcome: str
) -> None:
    async with adopter() as made:
        for count in (1, 2, 3):
            (await made.attempt(count)).end.set_exception(error)
            await made.outcome(outcome, count)
            assert made.owner("g-1") is None
        # Not after another 300 s: the process knows that nobody else had it.
        (await made.attempt(4, seconds=100)).end.set_result(End.EMPTIED)
        await made.outcome("emptied")


@in_leaps
async def test_a_lease_that_is_refused_ends_the_adoption_at_the_next_renewal() -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        made.rows.delete("g-1", made.rows.token("g-1") or uuid.uuid4())
        assert made.rows.create(1, "the owner", uuid.uuid4())
        await made.outcome("lease_lost", seconds=TERMS.renew_seconds + 1)
        assert attempt.left
        assert made.owner("g-1") == "the owner"
        assert "release" not in made.table.asked
        assert "delete" not in made.table.asked


@pytest.mark.parametrize("hangs", [False, True])
@in_leaps
async def test_a_lease_that_cannot_be_renewed_ends_the_adoption_while_it_still_holds(
    hangs: bool,  # noqa: FBT001
) -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        await asyncio.sleep(5)
        if hangs:
            made.table.seconds = 10_000
        else:
            made.table.away = True
        while not attempt.left:
            assert made.owner("g-1") == "me (adopting)"
            await asyncio.sleep(0.1)
        await made.outcome("lease_lost")
        assert "release" not in made.table.asked
        made.table.away, made.table.seconds = False, 0


@in_leaps
async def test_a_renewal_that_fails_once_or_twice_ends_nothing() -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        for _ in range(20):
            faults = made.table.faulty
            made.table.away = True
            await until(lambda faults=faults: made.table.faulty >= faults + 2, 30)
            made.table.away = False
            await asyncio.sleep(15)
        assert not attempt.left
        attempt.end.set_result(End.EMPTIED)
        await made.outcome("emptied")


@in_leaps
async def test_a_table_that_is_away_stops_nothing_for_good() -> None:
    async with adopter() as made:
        made.table.away = True
        await asyncio.sleep(2000)
        assert made.table.faulty
        made.table.away = False
        await made.attempt()
        assert made.loop.time() >= 2000 + TERMS.orphan_after_seconds


@in_leaps
async def test_a_take_that_is_lost_is_tried_later() -> None:
    async with adopter() as made:
        await asyncio.sleep(TERMS.orphan_after_seconds - 20)
        while "take" not in made.table.asked:
            made.table.faults.extend([None, LOST] if not made.table.faults else [])
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        made.table.faults.clear()
        await made.attempt(seconds=200)


@in_leaps
async def test_what_is_told_of_an_adoption_is_of_that_one() -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        made.adopter._taker.messages = 7
        attempt.end.set_exception(ConnectionLost("network", "gone"))
        with structlog.testing.capture_logs() as events:
            await made.outcome("broker")
            while not made.metrics.adoptions["store"]:
                made.table.faults.extend([None, LOST] if not made.table.faults else [])
                await asyncio.sleep(0.1)
            made.table.faults.clear()
        ended = [event for event in events if event["event"] == "adoption ended"]
        assert [(event["outcome"], event["messages"]) for event in ended[:2]] == [
            ("broker", 7),
            ("store", 0),
        ]


@in_leaps
async def test_a_lease_that_ends_without_an_answer_says_so() -> None:
    async with adopter() as made:
        await made.attempt()
        made.table.seconds = 10_000
        with structlog.testing.capture_logs() as events:
            await made.outcome("lease_lost")
        made.table.seconds = 0
        (ended,) = (event for event in events if event["event"] == "adoption ended")
        assert ended["error"] == "the lease could not be renewed in time: no answer"


@in_leaps
async def test_a_slot_that_cannot_be_deleted_is_found_absent_later() -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        made.table.away = True
        attempt.end.set_result(End.EMPTIED)
        await made.outcome("emptied")
        assert made.names == ["g-0", "g-1"]
        made.table.away = False
        (await made.attempt(2, seconds=2 * DUE_SECONDS)).end.set_result(End.ABSENT)
        await made.outcome("absent")
        assert made.names == ["g-0"]


@in_leaps
async def test_a_stop_leaves_and_gives_the_lease_back() -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        await made.adopter.stop(20)
        assert attempt.left
        assert made.metrics.adoptions == {"left": 1}
        assert made.owner("g-1") is None
        await asyncio.sleep(2000)
        assert len(made.attempts) == 1


@in_leaps
async def test_a_stop_takes_no_longer_than_it_may() -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        made.table.seconds = 10_000
        async with asyncio.timeout(21):
            await made.adopter.stop(20)
        assert attempt.left
        made.table.seconds = 0


@in_leaps
async def test_a_pause_leaves_and_it_is_tried_again_after_it() -> None:
    async with adopter() as made:
        attempt = await made.attempt()
        made.must_leave, made.may = True, False
        await made.outcome("left", seconds=1)
        assert attempt.left
        assert made.owner("g-1") is None
        await asyncio.sleep(600)
        assert len(made.attempts) == 1
        made.must_leave, made.may = False, True
        await made.attempt(2)


@in_leaps
async def test_a_defect_ends_an_adoption_and_not_the_adopter() -> None:
    async with adopter() as made:
        (await made.attempt()).end.set_exception(LookupError("a defect"))
        await made.outcome("error")
        (await made.attempt(2)).end.set_result(End.EMPTIED)
        await made.outcome("emptied")


@in_leaps
async def test_no_adoption_begins_while_the_last_one_is_still_being_written() -> None:
    async with adopter() as made:
        delivery = made.pipeline.ledger.receive(1, 1, 0.0)
        await asyncio.sleep(1000)
        assert made.metrics.orphaned_slots == 1
        assert "take" not in made.table.asked
        made.pipeline.ledger.complete([delivery])
        await made.attempt(seconds=30)
