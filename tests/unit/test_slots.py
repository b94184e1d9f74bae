"""The lease of a slot: the machine by itself, and keepers on slots in memory with every fault."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import uuid
from typing import TYPE_CHECKING, Self

import pytest

from shadowsvc.owners import owner_name
from shadowsvc.settings import Slots
from shadowsvc.slots import Create, Lease, SlotKeeper, SlotState, Take
from shadowsvc.store.slots import Slot
from tests.memory_slots import LOST, UNANSWERED, MemoryTable, Rows, in_leaps, run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

TTL = 30
TOKEN = uuid.UUID(int=1)


def slot(number: int, *, free: bool = True) -> Slot:
    return Slot(f"g-{number}", number, None if free else "o", None if free else TOKEN, None)


# ---------------------------------------------------------------- the machine


class TestLease:
    def test_a_lease_is_trusted_for_its_ttl_less_the_second_that_cassandra_may_cut(self) -> None:
        lease = Lease(TTL, 8)
        assert lease.state(0) is SlotState.NONE
        assert lease.age(0) is None
        lease.granted("g-0", TOKEN, asked=100)
        assert lease.state(100) is lease.state(128.9) is SlotState.HELD
        assert lease.state(129) is lease.state(10_000) is SlotState.LAPSED
        assert lease.age(129) == 29
        lease.renewed(asked=120)
        assert lease.state(148.9) is SlotState.HELD
        assert lease.state(149) is SlotState.LAPSED

    def test_a_renewal_that_was_asked_for_earlier_does_not_make_it_older(self) -> None:
        lease = Lease(TTL, 8)
        lease.granted("g-0", TOKEN, asked=100)
        lease.renewed(asked=90)
        assert lease.age(100) == 0

    def test_a_refusal_ends_the_trust_at_any_age(self) -> None:
        lease = Lease(TTL, 8)
        lease.granted("g-0", TOKEN, asked=0)
        lease.refused()
        assert lease.state(1) is SlotState.LAPSED
        lease.granted("g-0", TOKEN, asked=1)
        assert lease.state(1) is SlotState.HELD

    def test_a_lease_given_up_is_never_trusted_as_held(self) -> None:
        lease = Lease(TTL, 8)
        lease.granted("g-0", TOKEN, asked=0)
        lease.give_up()
        assert lease.state(1) is SlotState.GIVEN_UP
        lease.want()
        assert lease.state(1) is SlotState.HELD, "what has not lapsed may be renewed"
        lease.released()
        assert lease.state(1) is SlotState.RELEASED
        assert lease.name is None

    def test_a_free_slot_is_taken_before_one_is_made(self) -> None:
        lease = Lease(TTL, 8)
        slots = [slot(0, free=False), slot(1), slot(2), slot(3, free=False)]
        chosen = {lease.choose(slots, 0, random.Random(seed)) for seed in range(50)}
        assert chosen == {Take("g-1"), Take("g-2")}

    def test_the_slot_that_we_had_comes_first(self) -> None:
        lease = Lease(TTL, 8)
        lease.granted("g-2", TOKEN, asked=0)
        lease.lost()
        slots = [slot(0), slot(1), slot(2), slot(3)]
        assert {lease.choose(slots, 0, random.Random(seed)) for seed in range(20)} == {Take("g-2")}

    def test_the_next_slot_is_made_and_gaps_are_filled(self) -> None:
        lease = Lease(TTL, 8)
        draw = random.Random(0)
        assert lease.choose([], 0, draw) == Create(0)
        taken = [slot(number, free=False) for number in (0, 1, 3)]
        assert lease.choose(taken, 0, draw) == Create(2)

    def test_after_collisions_the_choice_is_wider_and_never_beyond_the_limit(self) -> None:
        lease = Lease(TTL, 4)
        taken = [slot(1, free=False)]
        for collisions, numbers in ((0, {0}), (1, {0, 2}), (2, {0, 2, 3}), (40, {0, 2, 3})):
            made = {lease.choose(taken, collisions, random.Random(seed)) for seed in range(50)}
            assert made == {Create(number) for number in numbers}

    def test_when_all_are_taken_there_is_nothing_to_choose(self) -> None:
        lease = Lease(TTL, 2)
        assert lease.choose([slot(0, free=False), slot(1, free=False)], 0, random.Random(0)) is None
        assert lease.state(0) is SlotState.FULL
        assert lease.choose([slot(0, free=False), slot(1)], 0, random.Random(0)) == Take("g-1")

    def test_a_limit_that_was_lowered_leaves_free_slots_to_be_taken(self) -> None:
        assert Lease(TTL, 1).choose([slot(0, free=False), slot(5)], 0, random.Random(0)) == (
            Take("g-5")
        )


# ---------------------------------------------------------------- keepers


class World:
    """Slots in memory and processes that want one, on a loop whose clock jumps."""

    def __init__(self, **settings: object) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = Slots.model_validate({"lease_seconds": TTL, **settings})
        self.rows = Rows(self.loop.time, self.settings.lease_seconds)
        self._tasks: list[asyncio.Task[None]] = []

    def process(self, seed: int = 0, *, renews: bool = True) -> tuple[SlotKeeper, MemoryTable]:
        table = MemoryTable(self.rows)
        keeper = SlotKeeper(
            table,
            self.settings,
            "g",
            owner=f"process {seed}",
            now=self.loop.time,
            draw=random.Random(seed),
        )
        if renews:
            self._tasks.append(asyncio.create_task(keeper.run()))
        return keeper, table

    def holds(self, keeper: SlotKeeper) -> bool:
        """Whether the rows say so too."""
        name = keeper.client_id
        return name is not None and self.rows.token(name) == keeper._lease.token

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for task in self._tasks:
            assert task.cancelled(), task.exception()


@contextlib.contextmanager
def child() -> Iterator[int]:
    """A process that lives until the context is left; its id."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def world(**settings: object) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], Any]:
    """Make a test of a coroutine that gets a world."""

    def decorate(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def main() -> None:
            async with World(**settings) as made:
                await test(made)

        def wrapped() -> None:
            run(main())

        wrapped.__name__ = test.__name__
        return wrapped

    return decorate


@world()
async def test_a_slot_is_kept_for_as_long_as_it_is_renewed(made: World) -> None:
    keeper, _ = made.process()
    name = await keeper.acquire()
    assert name == "g-0"
    for _ in range(600):
        await asyncio.sleep(1)
        assert made.holds(keeper)
        assert keeper.state is SlotState.HELD
        assert (keeper.lease_age or 0) <= 11
    assert keeper.takes == {"created": 1}
    assert not keeper.losses


@world()
async def test_a_refused_renewal_is_no_lease_even_while_cassandra_falls_silent(made: World) -> None:
    keeper, table = made.process(1, renews=False)
    await keeper.acquire()
    # By a clock of Cassandra's that jumped, say.
    [slot] = made.rows.slots()
    assert slot.token is not None
    assert made.rows.release("g-0", slot.token)
    assert made.rows.take("g-0", "another", TOKEN)
    table.faults += [None, *[LOST] * 8]
    assert await keeper.acquire() == "g-1"
    assert table.faulty == 8


@world()
async def test_a_held_slot_is_never_taken_but_one_of_an_earlier_life_is_noted_at_the_start(
    made: World,
) -> None:
    host, _, own_pid = owner_name().rpartition(":")
    with child() as living:
        others = [f"{host}:{living}", f"{host}x:{own_pid}", f"{host}:{10**30}", host, "", "x:-1"]
        for number, owner in enumerate(others):
            assert made.rows.create(number, owner, uuid.uuid4())
        keeper, _ = made.process()
        assert await keeper.acquire() == f"g-{len(others)}"
        assert keeper.former == {}
    tokens = {f"g-{number}": uuid.uuid4() for number in (7, 8)}
    assert made.rows.create(7, f"{host}:{living}", tokens["g-7"])
    assert made.rows.create(8, f"{owner_name()} (adopting)", tokens["g-8"])
    later, _ = made.process()
    assert await later.acquire() == "g-9"
    assert later.former == {"g-0": made.rows.token("g-0"), **tokens}
    assert made.rows.create(10, owner_name(), uuid.uuid4())
    await later.acquire()
    assert len(later.former) == 3, "what comes later is no earlier life"


@world()
async def test_every_connect_renews(made: World) -> None:
    keeper, table = made.process(renews=False)
    await keeper.acquire()
    table.asked.clear()
    assert await keeper.acquire() == "g-0"
    assert table.asked == ["renew"]


@world(max_slots=40)
async def test_many_that_start_at_once_all_get_slots_of_their_own(made: World) -> None:
    processes = [made.process(seed) for seed in range(40)]
    for _, table in processes:
        table.seconds = 0.01
    names = await asyncio.gather(*(keeper.acquire() for keeper, _ in processes))
    assert len(set(names)) == 40
    assert all(made.holds(keeper) for keeper, _ in processes)
    # The choice widens, so nobody asks more than a few times.
    assert max(len(table.asked) for _, table in processes) < 60


@world()
async def test_cassandra_away_a_lease_suffices_to_connect_until_it_may_have_ended(
    made: World,
) -> None:
    keeper, table = made.process()
    await keeper.acquire()
    table.away = True
    while keeper.state is SlotState.HELD:
        assert await keeper.acquire() == "g-0"
        assert made.holds(keeper), "no moment at which another could have it"
        await asyncio.sleep(0.25)
    assert keeper.state is SlotState.LAPSED
    acquiring = asyncio.create_task(keeper.acquire())
    await asyncio.sleep(300)
    assert not acquiring.done(), "without a lease nobody connects"
    assert keeper.waiting is not None
    assert "lost" in keeper.waiting
    table.away = False
    assert await acquiring == "g-0"
    assert made.holds(keeper)
    assert keeper.waiting is None
    assert keeper.takes == {"created": 1, "again": 1}
    assert keeper.losses == {"lapsed": 1}


@world()
async def test_a_lapsed_lease_is_taken_again_in_the_background_without_losing_the_connection(
    made: World,
) -> None:
    keeper, table = made.process()
    lost: list[bool] = []
    keeper.lost = lambda: lost.append(True)
    await keeper.acquire()
    table.away = True
    await asyncio.sleep(100)
    assert keeper.state is SlotState.LAPSED
    assert made.rows.token("g-0") is None
    table.away = False
    await asyncio.sleep(10)
    assert keeper.state is SlotState.HELD
    assert made.holds(keeper)
    assert not lost


@world()
async def test_who_finds_its_slot_taken_leaves_it_and_takes_another(made: World) -> None:
    keeper, table = made.process(1)
    lost: list[bool] = []
    keeper.lost = lambda: lost.append(True)
    await keeper.acquire()
    table.away = True  # a process that is paused asks for nothing
    await asyncio.sleep(TTL + 1)
    other, _ = made.process(2)
    assert await other.acquire() == "g-0"
    table.away = False
    await asyncio.sleep(10)
    assert lost == [True]
    assert keeper.state is SlotState.NONE
    assert keeper.client_id is None
    assert await keeper.acquire() == "g-1"
    assert made.holds(keeper)
    assert made.holds(other)
    assert keeper.losses == {"taken": 1}


@world()
async def test_who_finds_its_slot_deleted_takes_another_or_makes_it_anew(made: World) -> None:
    keeper, table = made.process()
    await keeper.acquire()
    table.away = True
    await asyncio.sleep(TTL + 1)
    assert made.rows.take("g-0", "adopter", TOKEN)
    assert made.rows.delete("g-0", TOKEN)
    table.away = False
    assert await keeper.acquire() == "g-0"
    assert keeper.takes == {"created": 2}
    assert made.holds(keeper)


@world(max_slots=2)
async def test_one_process_too_many_waits_and_names_the_setting(made: World) -> None:
    first, _ = made.process(1)
    second, _ = made.process(2)
    third, _ = made.process(3)
    await asyncio.gather(first.acquire(), second.acquire())
    acquiring = asyncio.create_task(third.acquire())
    await asyncio.sleep(600)
    assert third.state is SlotState.FULL
    assert third.waiting is not None
    assert "all 2 slots" in third.waiting
    assert "SHADOWSVC_SLOTS__MAX_SLOTS" in third.waiting
    freed = first.client_id
    await first.release()
    assert first.state is SlotState.RELEASED
    assert await acquiring == freed
    assert third.state is SlotState.HELD


@world()
async def test_given_up_it_lapses_and_is_wanted_again_by_acquire(made: World) -> None:
    keeper, _ = made.process(1)
    await keeper.acquire()
    await keeper.lapse()
    await keeper.lapse()
    assert keeper.state is SlotState.GIVEN_UP
    assert keeper.losses == {"isolated": 1}
    await asyncio.sleep(TTL)
    assert made.rows.token("g-0") is None, "nobody renewed"
    assert await keeper.acquire() == "g-0"
    assert made.holds(keeper)
    await keeper.lapse()
    await asyncio.sleep(TTL)
    other, _ = made.process(2)
    assert await other.acquire() == "g-0"
    assert await keeper.acquire() == "g-1"


@world()
async def test_a_slot_is_free_at_once_when_it_was_released(made: World) -> None:
    keeper, _ = made.process(1)
    await keeper.acquire()
    await keeper.release()
    assert made.rows.token("g-0") is None
    assert keeper.losses == {"released": 1}
    await keeper.release()
    assert keeper.losses == {"released": 1}, "once"


@world()
async def test_a_slot_that_was_given_up_is_counted_once_and_freed_all_the_same(made: World) -> None:
    for seconds in (1, TTL + 1):
        keeper, _ = made.process()
        assert await keeper.acquire() == "g-0"
        await keeper.lapse()
        await asyncio.sleep(seconds)
        await keeper.release()
        assert keeper.losses == {"isolated": 1}
        assert made.rows.token("g-0") is None


@world()
async def test_a_stop_in_the_middle_of_a_take_frees_what_may_have_been_taken(made: World) -> None:
    keeper, table = made.process(1, renews=False)
    table.faults += [None, UNANSWERED, *[LOST] * 50]
    acquiring = asyncio.create_task(keeper.acquire())
    await asyncio.sleep(5)
    assert made.rows.token("g-0") is not None, "the slot was made, and the answer lost"
    acquiring.cancel()
    await asyncio.gather(acquiring, return_exceptions=True)
    table.faults.clear()
    await keeper.release()
    assert made.rows.token("g-0") is None


@pytest.mark.parametrize("fault", [LOST, UNANSWERED])
@pytest.mark.parametrize("at", range(4))
@in_leaps
async def test_whichever_request_or_answer_is_lost_one_slot_is_held_and_none_wasted(
    fault: str, at: int
) -> None:
    async with World() as made:
        keeper, table = made.process()
        table.faults += [*[None] * at, fault]
        for _ in range(4):  # list, create, renew, renew
            await keeper.acquire()
        assert table.faulty == 1
        assert made.holds(keeper)
        assert [one.number for one in made.rows.slots()] == [0]
        assert keeper.takes == {"created": 1}


@pytest.mark.parametrize("fault", [LOST, UNANSWERED])
@pytest.mark.parametrize("at", range(3))
@in_leaps
async def test_whatever_is_lost_while_a_lapsed_slot_is_taken_again_it_stays_one(
    fault: str, at: int
) -> None:
    async with World() as made:
        keeper, table = made.process(renews=False)
        await keeper.acquire()
        await asyncio.sleep(TTL + 1)
        table.faults += [*[None] * at, fault]  # renew, take
        assert await keeper.acquire() == "g-0"
        assert await keeper.acquire() == "g-0"
        assert table.faulty == 1
        assert made.holds(keeper)
        assert len(made.rows.slots()) == 1
        assert keeper.losses == ({"lapsed": 1} if keeper.takes["again"] else {"taken": 1})


@pytest.mark.parametrize("seed", range(25))
def test_in_any_order_of_faults_and_pauses_nobody_connects_by_anothers_client_id(
    seed: int,
) -> None:
    """The promise of leases: at the moment of CONNECT the rows say that the slot is ours.

    Processes connect, lose their connection, isolate, stop and are paused as a seed draws it;
    requests and answers get lost. A paused process has its requests answered late.
    """
    draw = random.Random(seed)
    connects = 0

    async def life(made: World, number: int) -> None:
        nonlocal connects
        keeper, table = made.process(number)
        while made.loop.time() < 1500:
            match draw.randrange(8):
                case 0:
                    table.away = True
                    await asyncio.sleep(draw.uniform(0, 2 * TTL))
                    table.away = False
                case 1:
                    table.faults += [draw.choice([LOST, UNANSWERED, None]) for _ in range(4)]
                case 2:
                    table.seconds = draw.choice([0, 0.2, 3])
                case 3:
                    await keeper.lapse()
                    await asyncio.sleep(draw.uniform(0, 2 * TTL))
                case 4:
                    with contextlib.suppress(Exception):
                        await keeper.release()
                case _:
                    asked = made.loop.time()
                    name = await keeper.acquire()
                    # The request that confirmed it, not its answer, is when the lease began.
                    assert name == keeper.client_id
                    assert made.rows.token(name) == keeper._lease.token, (number, name, asked)
                    connects += 1
            await asyncio.sleep(draw.uniform(0, 5))
        table.away = False
        table.faults.clear()
        table.seconds = 0
        await keeper.acquire()

    async def main() -> None:
        async with World(max_slots=6) as made:
            await asyncio.gather(*(life(made, number) for number in range(5)))
            assert len(made.rows.slots()) <= 6
            await asyncio.sleep(TTL)

    run(main())
    assert connects > 50


def test_owners_are_told_apart_by_host_and_process() -> None:
    host, _, process = owner_name().rpartition(":")
    assert host
    assert process.isdecimal()
