"""A real service that breaks a promise is found: what a harness never caught it may not be able to.

Each service is the real one with a few lines changed as it starts, by a `sitecustomize` module of
its own. Nothing fails from outside but where a kill shows the damage.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import shadowsvc

if TYPE_CHECKING:
    from tests.faults.conftest import MakeStage

pytestmark = pytest.mark.timeout(120)

HEAD = """
import asyncio, contextlib
from shadowsvc.ledger import Ledger
from shadowsvc.store.cassandra import CassandraStore
write, take_acks = CassandraStore.write, Ledger.take_acks
count = 0
"""

ACKNOWLEDGES_BEFORE_IT_WRITES = """
async def early(self, mutations):
    kept = list(mutations)
    async def later():
        await asyncio.sleep(0.5)
        with contextlib.suppress(Exception):
            await write(self, kept)
    tasks.append(asyncio.get_running_loop().create_task(later()))
tasks = []
CassandraStore.write = early
"""

FORGETS_SOME = """
async def forgetful(self, mutations):
    global count
    count += 1
    if count % 20:
        await write(self, mutations)
CassandraStore.write = forgetful
"""

ACKNOWLEDGES_IN_ANOTHER_ORDER = """
def reversed_acks(self):
    acks = take_acks(self)
    return b"".join(acks[at:at + 4] for at in range(len(acks) - 4, -4, -4))
Ledger.take_acks = reversed_acks
"""

WRITES_WHAT_NOBODY_SAID = """
import shadowsvc.shadow.document as document
decode = document.Decoder.decode
def liar(self, *arguments):
    update = decode(self, *arguments)
    update.time_us -= 1
    return update
document.Decoder.decode = liar
"""


@pytest.mark.parametrize(
    ("lines", "kill", "found"),
    [
        pytest.param(
            ACKNOWLEDGES_BEFORE_IT_WRITES, False, "acknowledged before it was written", id="early"
        ),
        pytest.param(
            ACKNOWLEDGES_BEFORE_IT_WRITES, True, "the service acknowledged it at", id="killed"
        ),
        pytest.param(FORGETS_SOME, False, "the service acknowledged it at", id="forgets"),
        pytest.param(ACKNOWLEDGES_IN_ANOTHER_ORDER, False, "the oldest delivery is", id="order"),
        pytest.param(WRITES_WHAT_NOBODY_SAID, False, "never published", id="invents"),
    ],
)
def test_a_service_that_breaks_a_promise_is_found(
    make_stage: MakeStage, tmp_path: Path, lines: str, found: str, *, kill: bool
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HEAD + lines)
    stage = make_stage(pods=0)
    source = Path(shadowsvc.__file__).parents[1]
    pod = stage.add_pod(environment={"PYTHONPATH": f"{tmp_path}:{source}"})
    stage.start()
    with stage.traffic(max_messages=300) as traffic:
        pod.wait_more(100, "messages_acknowledged_total")
        if kill:
            pod.service.kill()
            stage.start()
        traffic.join(30)
    verdict = stage.wait_verdict(2)
    assert any(found in line for line in verdict.forbidden), "\n".join(verdict.lines())
