"""A short schedule of random faults, and that a seed always makes the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.chaos import run
from tests.faults.schedule import FAULTS, plan

if TYPE_CHECKING:
    from pathlib import Path

    import backing

pytestmark = pytest.mark.timeout(300)


def test_a_seed_makes_one_schedule_and_all_seeds_together_every_fault() -> None:
    assert plan(7, 600) == plan(7, 600)
    assert plan(7, 600) != plan(8, 600)
    drawn = {
        (step.fault.place, step.fault.name) for seed in range(20) for step in plan(seed, 600).steps
    }
    assert drawn == {(fault.place, fault.name) for fault in FAULTS}
    assert {plan(seed, 1)[:2] for seed in range(40)} == {
        (pods, slots) for pods in (1, 2, 3) for slots in (False, True)
    }


def test_two_faults_at_most_happen_at_once_and_never_two_at_one_place() -> None:
    for seed in range(20):
        steps = plan(seed, 600).steps
        for step in steps:
            others = [one for one in steps if one is not step and one.at <= step.at < one.until]
            assert len(others) <= 1
            assert step.target not in {one.target for one in others}


@pytest.mark.parametrize(
    ("seed", "seconds"),
    [
        (10, 15),  # three services that lease their client ids
        pytest.param(1, 90, marks=pytest.mark.slow),
        pytest.param(5, 90, marks=pytest.mark.slow),
        pytest.param(6, 90, marks=pytest.mark.slow),
    ],
)
def test_whatever_fails_and_when_every_promise_is_kept(
    own_broker: backing.Mosquitto,
    own_cassandra: backing.Cassandra,
    own_migrated: str,
    tmp_path: Path,
    seed: int,
    seconds: float,
) -> None:
    outcome = run(seed, seconds, own_broker, own_cassandra, own_migrated, tmp_path)
    assert outcome.kept, "\n".join(outcome.lines())
    assert sum(outcome.faults.values()) >= seconds / 5
    assert outcome.seen["reconnects"] + outcome.seen["retries"] > 0
    assert outcome.verdict is not None
    assert outcome.verdict.durable > 0
