"""The table of slots and its keepers on a real Cassandra.

TTLs are scaled: a lease of two seconds. Whatever waits for one to end has a limit of its own.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from backing import Direction, FaultProxy
from shadowsvc.config import Settings
from shadowsvc.errors import SchemaBehind, StoreUnavailable
from shadowsvc.slots import SlotKeeper, SlotState
from shadowsvc.store.slots import Slot, SlotTable
from tests.proxied import away

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import backing

pytestmark = pytest.mark.timeout(120)

LIMIT_SECONDS = 30.0


def settings_of(
    cassandra: backing.Database, keyspace: str, group: str, *, port: int = 0, **slots: object
) -> Settings:
    points = ("127.0.0.1",) if port else cassandra.contact_points
    return Settings.model_validate(
        {
            "mqtt": {"share_group": group},
            "cassandra": {
                "contact_points": points,
                "port": port or cassandra.port,
                "local_dc": cassandra.dc,
                "keyspace": keyspace,
                "request_timeout_seconds": 2,
                "connect_timeout_seconds": 2,
            },
            "slots": {"lease_seconds": 2, "renew_seconds": 0.5, **slots},
        }
    )


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[SlotTable]:
    table = SlotTable(settings)
    try:
        yield table
    finally:
        await table.close()


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not await condition():
        assert time.monotonic() < deadline, f"not within {LIMIT_SECONDS:g} s: {what}"
        await asyncio.sleep(0.1)


@pytest.fixture
def settings(cassandra: backing.Database, migrated: str, unique: str) -> Settings:
    return settings_of(cassandra, migrated, unique, lease_seconds=60)


async def test_a_slot_has_one_owner_at_a_time(settings: Settings, unique: str) -> None:
    mine, yours = uuid.uuid4(), uuid.uuid4()
    name = f"{unique}-0"
    async with opened(settings) as table:
        assert await table.list() == []
        assert await table.create(0, "me", mine)
        assert not await table.create(0, "you", yours), "it exists"
        assert not await table.take(name, "you", yours), "it is taken"
        [slot] = await table.list()
        assert slot[:4] == (name, 0, "me", mine)
        assert slot.since is not None
        assert slot.since.tzinfo is not None
        assert await table.renew(name, mine)
        assert not await table.renew(name, yours)
        assert not await table.release(name, yours)
        assert not await table.delete(name, yours)
        assert await table.list() == [slot], "a renewal keeps owner and time"
        assert await table.release(name, mine)
        assert await table.list() == [Slot(name, 0, None, None, None)]
        assert not await table.renew(name, mine), "freed is freed"
        assert await table.take(name, "you", yours)
        assert (await table.list())[0].owner == "you"
        assert await table.delete(name, yours)
        assert await table.list() == []


async def test_a_slot_that_is_gone_is_not_made_by_taking_or_renewing_it(
    settings: Settings, unique: str
) -> None:
    token = uuid.uuid4()
    name = f"{unique}-0"
    async with opened(settings) as table:
        assert not await table.take(name, "me", token)
        assert not await table.renew(name, token)
        assert not await table.release(name, token)
        assert not await table.delete(name, token)
        assert await table.list() == []
        assert await table.create(0, "me", token)
        assert await table.delete(name, token)
        assert not await table.take(name, "me", uuid.uuid4())
        assert await table.create(0, "me", token), "a number can be used again"


async def test_groups_and_broker_clusters_have_slots_of_their_own(
    cassandra: backing.Database, migrated: str, unique: str
) -> None:
    async with AsyncExitStack() as stack:
        for group, broker in ((unique, "a"), (unique, "b"), (f"{unique}x", "a")):
            table = await stack.enter_async_context(
                opened(settings_of(cassandra, migrated, group, broker=broker))
            )
            assert await table.list() == []
            assert await table.create(0, "me", uuid.uuid4())
            assert [slot.name for slot in await table.list()] == [f"{group}-0"]


async def test_the_name_of_another_group_is_refused(settings: Settings) -> None:
    async with opened(settings) as table:
        with pytest.raises(ValueError, match="no slot of the group"):
            await table.take("another-0", "me", uuid.uuid4())


async def test_a_lease_ends_by_itself_and_the_slot_stays(
    cassandra: backing.Database, migrated: str, unique: str
) -> None:
    name = f"{unique}-0"
    token = uuid.uuid4()
    async with opened(settings_of(cassandra, migrated, unique)) as table:
        assert await table.create(0, "me", token)

        async def free() -> bool:
            return await table.list() == [Slot(name, 0, None, None, None)]

        await until(free, "the lease has ended")
        assert not await table.renew(name, token), "what has ended is not renewed"
        assert await table.take(name, "you", uuid.uuid4())
        await until(free, "that of a slot taken ends too")


async def test_a_renewal_starts_the_lease_anew(
    cassandra: backing.Database, migrated: str, unique: str, cql: Any
) -> None:
    name = f"{unique}-0"
    token = uuid.uuid4()

    def rest() -> int:
        row = cql.execute(
            f"SELECT TTL(owner), TTL(lease), TTL(since), TTL(created_at) FROM {migrated}.slot "  # noqa: S608
            "WHERE share_group = %s AND broker = 'default' AND number = 0",
            (unique,),
        ).one()
        assert row[0] == row[1] == row[2]
        assert row[3] is None
        return int(row[0])

    async with opened(settings_of(cassandra, migrated, unique, lease_seconds=100)) as table:
        assert await table.create(0, "me", token)

        async def aged() -> bool:
            return await asyncio.to_thread(rest) < 99

        await until(aged, "the lease has aged")
        before = await asyncio.to_thread(rest)
        assert await table.renew(name, token)
        assert await asyncio.to_thread(rest) > before


async def test_of_those_who_make_or_take_a_slot_at_once_one_has_it(settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        tables = [await stack.enter_async_context(opened(settings)) for _ in range(4)]
        await asyncio.gather(*(table.list() for table in tables))
        tokens = [uuid.uuid4() for _ in tables]
        made = await asyncio.gather(
            *(
                table.create(0, str(number), token)
                for number, (table, token) in enumerate(zip(tables, tokens, strict=True))
            )
        )
        assert made.count(True) == 1
        [slot] = await tables[0].list()
        assert slot.token == tokens[made.index(True)]
        assert await tables[0].release(slot.name, slot.token)
        taken = await asyncio.gather(
            *(
                table.take(slot.name, "me", token)
                for table, token in zip(tables, tokens, strict=True)
            )
        )
        assert taken.count(True) == 1
        assert (await tables[0].list())[0].token == tokens[taken.index(True)]


async def test_a_keyspace_without_the_table_says_what_to_do(
    cassandra: backing.Database, unique: str
) -> None:
    async with opened(settings_of(cassandra, "no_such_keyspace", unique)) as table:
        with pytest.raises(SchemaBehind, match="shadowsvc migrate"):
            await table.list()


# ---------------------------------------------------------------- keepers


@asynccontextmanager
async def kept(settings: Settings, number: int) -> AsyncIterator[list[SlotKeeper]]:
    """Give keepers that renew, each with a connection of its own to Cassandra."""
    async with AsyncExitStack() as stack:
        keepers = []
        for index in range(number):
            table = await stack.enter_async_context(opened(settings))
            keepers.append(
                SlotKeeper(
                    table, settings.slots, settings.mqtt.share_group, owner=f"keeper {index}"
                )
            )
        tasks = [asyncio.create_task(keeper.run()) for keeper in keepers]
        try:
            yield keepers
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("number", [2, 8])
async def test_keepers_that_start_at_once_never_share_a_slot(
    cassandra: backing.Database, migrated: str, unique: str, number: int
) -> None:
    settings = settings_of(cassandra, migrated, unique, lease_seconds=20, renew_seconds=1)
    async with kept(settings, number) as keepers, asyncio.timeout(60):
        names = await asyncio.gather(*(keeper.acquire() for keeper in keepers))
        assert len(set(names)) == number
        async with opened(settings) as table:
            owners = {slot.name: slot.owner for slot in await table.list()}
        assert owners == {name: f"keeper {index}" for index, name in enumerate(names)}
        # Once more, now that there are free ones to fight for.
        for keeper in keepers:
            await keeper.release()
        names = await asyncio.gather(*(keeper.acquire() for keeper in keepers))
        assert len(set(names)) == number
        assert sum(keeper.takes["free"] for keeper in keepers) > 0


async def test_more_keepers_than_slots_wait_until_one_is_free(
    cassandra: backing.Database, migrated: str, unique: str
) -> None:
    settings = settings_of(
        cassandra, migrated, unique, lease_seconds=20, renew_seconds=0.5, max_slots=3
    )
    async with kept(settings, 5) as keepers, asyncio.timeout(60):
        waiting = {asyncio.create_task(keeper.acquire()): keeper for keeper in keepers}
        while len(waiting) > 2:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del waiting[task]

        async def told() -> bool:
            return all(keeper.waiting for keeper in waiting.values())

        await until(told, "those who wait say why")
        for keeper in waiting.values():
            assert keeper.state is SlotState.FULL
            assert "SHADOWSVC_SLOTS__MAX_SLOTS" in str(keeper.waiting)
            assert keeper.client_id is None
        holders = [keeper for keeper in keepers if keeper.client_id is not None]
        assert len({keeper.client_id for keeper in holders}) == 3
        freed = holders[0].client_id
        await holders[0].release()
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert {task.result() for task in done} == {freed}
        for task in waiting:
            task.cancel()


async def test_a_keeper_keeps_its_slot_beyond_the_lease(
    cassandra: backing.Database, migrated: str, unique: str
) -> None:
    settings = settings_of(cassandra, migrated, unique, lease_seconds=3, renew_seconds=0.5)
    async with kept(settings, 1) as [keeper], opened(settings) as table:
        name = await keeper.acquire()
        first = (await table.list())[0]
        began = time.monotonic()
        while time.monotonic() - began < 5:
            [slot] = await table.list()
            assert slot == first, "it was ours all the time"
            await asyncio.sleep(0.2)
        assert await keeper.acquire() == name
        assert keeper.takes.total() == 1


async def test_an_owner_that_was_too_late_takes_its_free_slot_again_or_else_another(
    cassandra: backing.Database, migrated: str, unique: str
) -> None:
    settings = settings_of(cassandra, migrated, unique)
    async with AsyncExitStack() as stack:
        tables = [await stack.enter_async_context(opened(settings)) for _ in range(2)]
        # Nobody renews: the process was paused.
        late, other = (
            SlotKeeper(table, settings.slots, unique, owner=owner)
            for table, owner in zip(tables, ("late", "other"), strict=True)
        )
        name = await late.acquire()

        async def lapsed() -> bool:
            return (await tables[0].list())[0].token is None

        await until(lapsed, "the lease has ended")
        assert late.state is SlotState.LAPSED
        assert await late.acquire() == name
        assert late.takes["again"] == late.losses["lapsed"] == 1
        await until(lapsed, "it has ended again")
        assert await other.acquire() == name, "the free one, not a new one"
        assert await late.acquire() != name
        assert late.losses["taken"] == 1


# ---------------------------------------------------------------- transactions without an answer


class Faulty:
    """A table behind a proxy that loses what one transaction is answered, or the transaction."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.asked = 0
        self._heal_at = 0
        proxy.tap = self._tap

    def hold_until_asked_again(self, direction: Direction) -> None:
        """Let one direction wait until the client asks for the second time."""
        self.asked, self._heal_at = 0, 2
        self.proxy.hold(direction)

    def _tap(self, direction: Direction, _data: bytes) -> None:
        if direction is Direction.TO_SERVER and self._heal_at:
            self.asked += 1
            if self.asked == self._heal_at:
                self._heal_at = 0
                self.proxy.hold(on=False)


@pytest.fixture
async def faulty(cassandra: backing.Database) -> AsyncIterator[Faulty]:
    async with FaultProxy(cassandra.contact_points[0], cassandra.port) as proxy:
        yield Faulty(proxy)


CALLS: dict[str, Any] = {
    "create": lambda table, _, token: table.create(0, "me", token),
    "take": lambda table, name, token: table.take(name, "me", token),
    "renew": lambda table, name, token: table.renew(name, token),
    "release": lambda table, name, token: table.release(name, token),
    "delete": lambda table, name, token: table.delete(name, token),
}


async def prepared(direct: SlotTable, call: str, name: str, token: uuid.UUID) -> None:
    """Bring the slot into the state in which the call would be applied."""
    if call == "create":
        return
    first = uuid.uuid4() if call == "take" else token
    assert await direct.create(0, "me", first)
    if call == "take":
        assert await direct.release(name, first)


@pytest.mark.parametrize("call", CALLS)
async def test_a_transaction_whose_answer_came_too_late_was_applied(
    cassandra: backing.Database, migrated: str, unique: str, faulty: Faulty, call: str
) -> None:
    name, token = f"{unique}-0", uuid.uuid4()
    settings = settings_of(cassandra, migrated, unique, lease_seconds=60)
    behind = settings_of(cassandra, migrated, unique, port=faulty.proxy.port, lease_seconds=60)
    async with opened(settings) as direct, opened(behind) as table:
        await prepared(direct, call, name, token)
        await table.list()  # connected and prepared
        faulty.hold_until_asked_again(Direction.TO_CLIENT)
        assert await CALLS[call](table, name, token) is True
        assert faulty.asked == 2, "the answer was waited for in vain, then asked for"
        tokens = [slot.token for slot in await direct.list()]
        expected = {"release": [None], "delete": []}.get(call, [token])
        assert tokens == expected


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", list(Direction))
async def test_a_transaction_that_broke_with_its_connection_is_told_as_it_was(
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    faulty: Faulty,
    call: str,
    way: Direction,
) -> None:
    name, token = f"{unique}-0", uuid.uuid4()
    settings = settings_of(cassandra, migrated, unique, lease_seconds=60)
    behind = settings_of(cassandra, migrated, unique, port=faulty.proxy.port, lease_seconds=60)
    async with opened(settings) as direct, opened(behind) as table:
        await prepared(direct, call, name, token)
        before = [slot.token for slot in await direct.list()]
        await table.list()
        faulty.proxy.cut_after(0, way)
        done = await CALLS[call](table, name, token)
        assert faulty.proxy.counts.cut == 1
        after = [slot.token for slot in await direct.list()]
        applied = {"release": [None], "delete": []}.get(call, [token])
        assert after == (applied if done else before)
        if way is Direction.TO_CLIENT:
            assert done, "the request had arrived"


async def test_cassandra_away_is_told_and_the_table_comes_back_by_itself(
    cassandra: backing.Database, migrated: str, unique: str, faulty: Faulty
) -> None:
    name, token = f"{unique}-0", uuid.uuid4()
    behind = settings_of(cassandra, migrated, unique, port=faulty.proxy.port, lease_seconds=60)
    async with opened(behind) as table:
        assert await table.create(0, "me", token)
        for fault in ("half open", "refused"):
            if fault == "half open":
                faulty.proxy.half_open()
            else:
                away(faulty.proxy)
            with pytest.raises(StoreUnavailable):
                await table.renew(name, token)
            with pytest.raises(StoreUnavailable):
                await table.list()
            faulty.proxy.heal()
            assert await table.renew(name, token)
        assert faulty.proxy.counts.silenced > 0
        assert faulty.proxy.counts.refused > 0
